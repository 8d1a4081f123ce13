"""Adapters (PEFT) instead of the whole model, and the quantised base that they may stand on (QLoRA).

Three things are ours. Adapters have the dtype of the training: PEFT would leave them in fp32 beside a bf16 model, and
ZeRO-3 gathers parameters of one dtype (DeepSpeed #8072, #8113). A checkpoint holds what is trained and not the base,
which `from_pretrained` gives again. And the flags of `orpo-ds train` are those of TRL's `ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass
class AdapterArguments:
    """What `orpo-ds train` trains instead of the model: the names of TRL's `ModelConfig`."""

    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of the model."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the layers that get an adapter, or all-linear. Unset: PEFT's choice for the family."
        },
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Names of parameters that get an adapter: experts that are one 3-D parameter."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Layers that are trained as a whole, and saved with the adapters."}
    )
    lora_task_type: str = field(
        default="CAUSAL_LM", metadata={"help": "PEFT's task type; SEQ_2_SEQ_LM for encoder-decoder models."}
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) instead of lora_alpha / r."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Train magnitude and direction of the weights apart (DoRA)."}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Hold the base model in 8 bits; needs bitsandbytes and use_peft."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the base model in 4 bits; needs bitsandbytes and use_peft."}
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Values of 4 bits.", "choices": ["nf4", "fp4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantise the scales of the 4-bit blocks as well."}
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None,
        metadata={"help": "dtype that holds the 4-bit values; unset: uint8."},
    )

    def peft_config(self) -> Any | None:
        """The `LoraConfig` of the flags; None where the model itself is trained.

        Raises:
            ValueError: a quantised model without adapters, which cannot be trained.
        """
        if not self.use_peft:
            if self.load_in_4bit or self.load_in_8bit:
                raise ValueError(
                    "load_in_4bit and load_in_8bit hold the model in bits that cannot be trained: set use_peft=True."
                )
            return None
        from peft import LoraConfig

        targets = self.lora_target_modules
        return LoraConfig(
            task_type=self.lora_task_type,
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            bias="none",
            # A single name may be a word with a meaning, such as all-linear.
            target_modules=targets[0] if targets is not None and len(targets) == 1 else targets,
            target_parameters=self.lora_target_parameters,
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )

    def quantization_config(self, *, dtype: torch.dtype) -> dict[str, Any] | None:
        """`quantization_config` for `from_pretrained`, plain enough for a checkpoint's manifest; None for none.

        Args:
            dtype: of the training, in which the dequantised weights are multiplied.

        Raises:
            ValueError: both widths.
        """
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other: set one of them.")
        if self.load_in_8bit:
            return {"load_in_8bit": True}
        if not self.load_in_4bit:
            return None
        settings: dict[str, Any] = {
            "load_in_4bit": True,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.use_bnb_nested_quant,
        }
        if self.bnb_4bit_quant_storage is not None:
            settings["bnb_4bit_quant_storage"] = self.bnb_4bit_quant_storage
        return settings


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether a model is PEFT's: its adapters are trained and saved, and the rest is not."""
    return hasattr(model, "peft_config")


def add_adapters(model: PreTrainedModel, peft_config: Any) -> PreTrainedModel:
    """Wrap a model with PEFT adapters.

    Args:
        model: not yet a PeftModel.
        peft_config: a `peft.PeftConfig`, or the fields of one; without `peft_type` those of a `LoraConfig`.

    Raises:
        ValueError: the model has adapters already.
    """
    from peft import PeftModel, get_peft_config, get_peft_model

    if isinstance(model, PeftModel):
        raise ValueError(
            "the model is a PeftModel already, and `peft_config` was passed: leave one of them out."
        )
    if isinstance(peft_config, Mapping):
        task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        peft_config = get_peft_config({"peft_type": "LORA", "task_type": task, **peft_config})
    wrapped: Any = get_peft_model(model, peft_config, autocast_adapter_dtype=False)
    return wrapped


def align_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Bring what is trained of a PeftModel into the dtype of the training, as ZeRO-3 needs it; in place."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def keep_quantised_weights(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU, in place.

    Its first forward pass in eval mode, that of an evaluation, would bring them into a format for inference, which
    rounds the scales to bf16 and has no gradient: training would go on and learn nothing of the layers before.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (an attribute of bitsandbytes' layers)


def check_quantization(keywords: Mapping[str, Any], *, zero_stage: int) -> None:
    """Refuse at once a quantised model that cannot be loaded or trained here.

    Args:
        keywords: for `from_pretrained`.
        zero_stage: of the run.

    Raises:
        ValueError: names what is missing.
    """
    wanted = keywords.get("quantization_config")
    if wanted is None:
        return
    if not isinstance(wanted, Mapping):
        wanted = wanted.to_dict()
    if not (wanted.get("load_in_4bit") or wanted.get("load_in_8bit")):
        return
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "a model in 4 or 8 bits needs bitsandbytes, which is not installed: pip install 'orpo-ds[qlora]'."
        )
    if zero_stage == 3:
        raise ValueError(
            "a model in 4 or 8 bits cannot be sharded by ZeRO-3, which gathers parameters of one dtype. Use "
            "deepspeed='zero2' (the quantised weights need no gradient and no optimizer state), or ZeRO-3 without "
            "load_in_4bit and load_in_8bit."
        )
