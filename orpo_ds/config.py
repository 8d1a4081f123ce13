"""The two halves of a run's settings.

`ORPOConfig` is `transformers.TrainingArguments` with ORPO's own fields and TRL's defaults; `ScriptArguments` says
which model and which data the `train` command loads. Both are flat dataclasses: Python keywords, keys of the YAML
file and `--flags` are the same names. What DeepSpeed's JSON decides stays in that JSON, with `"auto"` where a field
of `ORPOConfig` decides; a value that stands in both and disagrees is an error that names both.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from orpo_ds import distributed, progress
from orpo_ds.adapters import AdapterArguments
from orpo_ds.data.truncate import TruncationMode
from orpo_ds.deepspeed_json import read_deepspeed_config, settle_host_groups
from orpo_ds.low_rank import check_low_rank
from orpo_ds.settings.checks import check_values
from orpo_ds.settings.dropped import DROPPED, DroppedFields, take_dropped

logger = logging.getLogger(__name__)

LayoutName = Literal["auto", "packed", "padded"]
UnusableRows = Literal["error", "drop"]
RouterBalance = Literal["global_batch", "micro_step"]
WandbRuns = Literal["job", "node"]


@dataclass
class ORPOConfig(DroppedFields, TrainingArguments):
    """Settings of ORPO training: `transformers.TrainingArguments` and the fields below.

    Raises:
        ValueError: for a value out of its range, or one that the DeepSpeed JSON contradicts.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012 (as its base)

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})
    logging_steps: float = field(
        default=10, metadata={"help": "Optimizer steps between two logs; below 1, a share of all steps."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]  # None: not yet settled
        default=None,
        metadata={
            "help": "Train in bfloat16. Unset, the hardware decides: bfloat16 where it is native, else float32.",
            # `--bf16` alone, as TRL's commands have it; argparse would want a value of a field that may be None.
            "nargs": "?",
            "const": True,
        },
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "Recompute activations in the backward pass: less memory, about 30%% more compute."
        },
    )

    # The defaults that TRL's users know, where transformers 5 writes the same thing differently.
    optim: OptimizerNames | str = field(
        default="adamw_torch", metadata={"help": "Name of an optimizer of transformers."}
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "Keywords of the schedule."}
    )
    report_to: list[str] | str | None = field(
        default=None, metadata={"help": "Dashboards, or `all` that are installed. Unset: none."}
    )
    include_num_input_tokens_seen: str | bool = field(
        default=False, metadata={"help": "Log the tokens of the whole run: all, non_padding, or no."}
    )
    enable_jit_checkpoint: bool = field(
        default=True,
        metadata={"help": "Save and end the run, to be continued, when SIGTERM or SIGUSR1 comes to a rank."},
    )
    fsdp: str | None = field(default="", metadata={"help": "Refused: DeepSpeed shards the model."})

    beta: float = field(
        default=0.1,
        metadata={"help": "Weight of the odds-ratio term (lambda in the paper, arXiv:2403.07691, eq. 6)."},
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Tokens of prompt and response together. Unset: no limit."}
    )
    max_prompt_length: int | None = field(
        default=512,
        metadata={"help": "Tokens that a prompt may be cut down to when its pair exceeds `max_length`."},
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Tokens of a response of an encoder-decoder model. Unset: 128."}
    )
    truncation_mode: TruncationMode = field(
        default="keep_end",
        metadata={"help": "Which end of a prompt that is too long survives."},
    )
    unusable_rows: UnusableRows = field(
        default="error",
        metadata={
            "help": "What happens to rows that cannot be trained on: stop, or drop and count them.",
        },
    )
    nll_on_prompt: bool = field(
        default=True,
        metadata={"help": "Count the prompt's tokens in the nll, as TRL and the paper's code do."},
    )
    layout: LayoutName = field(
        default="auto",
        metadata={
            "help": "packed: one row of shared trunks and branches; padded: two rows a pair; auto: packed where "
            "the check before step 0 proves it on this model.",
        },
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens that a rank pushes through the model at once. Unset: what "
            "`per_device_train_batch_size` pairs of `max_length` can need."
        },
    )
    sequence_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Ranks that share each row, for pairs longer than one GPU holds. It divides the ranks of the job "
            "and the model's heads; the global batch is that of ranks / sequence_parallel_size."
        },
    )
    mlp_tile_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that an MLP computes at once, and again in backward: less memory for long rows, about 20%% "
            "more compute. Unset: all."
        },
    )
    tensor_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Ranks that split each matrix and the vocabulary among them, for models whose parameters do not "
            "fit one GPU. It divides the ranks of the job and the model's heads."
        },
    )
    logits_cache_mib: int = field(
        default=0,
        metadata={
            "help": "MiB of logits kept from forward to backward, for a step some percent faster; the other tiles "
            "of the head are recomputed."
        },
    )
    router_balance: RouterBalance = field(
        default="global_batch",
        metadata={
            "help": "Tokens over which a mixture of experts with output_router_logits is balanced. global_batch: "
            "exact for any number of ranks and micro-batches, for one more forward pass where a step has several "
            "micro-steps; micro_step: the mean of the micro-steps' balances."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without the model's own dropout."})
    label_pad_token_id: int = field(
        default=-100, metadata={"help": "Label of a prompt's tokens, in what `compute_metrics` is given."}
    )
    padding_value: int | None = field(
        default=None, metadata={"help": "Token id of the padding. Unset: the tokenizer's."}
    )
    generate_during_eval: bool = field(
        default=False,
        metadata={"help": "Answer a few prompts before training and at every evaluation, and show them."},
    )
    generate_num_prompts: int = field(
        default=8, metadata={"help": "Prompts of each evaluation set that `generate_during_eval` answers."}
    )
    generate_max_new_tokens: int = field(
        default=128, metadata={"help": "Tokens of an answer of `generate_during_eval`, at most."}
    )
    is_encoder_decoder: bool | None = field(
        default=None, metadata={"help": "Needed only with `model_init`. Unset: the model's config says."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keywords for `from_pretrained` when the model is given by name."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that a model repository ships. Off unless asked for."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    dataset_cache_dir: str | None = field(
        default=None, metadata={"help": "Where tokenised data is kept. Unset: datasets' own cache."}
    )
    dataset_shuffle_buffer: int = field(
        default=1000,
        metadata={"help": "Rows of a streamed dataset that are held in memory and shuffled with each other."},
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A Jinja file, or a tokenizer folder, whose chat template is used."}
    )
    log_gradients_by_layer: bool = field(
        default=False,
        metadata={"help": "Log the norm of each layer's gradient as `grad_norm_by_layer/<layer>`."},
    )
    wandb_runs: WandbRuns = field(
        default="job",
        metadata={"help": "job: one W&B run for the whole job; node: one for each node, in one group."},
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Push the largest micro-batch through forward, backward and update, print peak memory and time, "
            "and end. Nothing is written."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Move an earlier run in `output_dir` aside instead of refusing to start."},
    )

    def __post_init__(self) -> None:
        """Check the values, settle the precision, join the process group, fill DeepSpeed's `auto` values."""
        taken = take_dropped(self)
        self.kept_global_batch_size: int | None = None  # of a run that is resumed on other ranks
        check_values(self)
        settings = read_deepspeed_config(self.deepspeed)
        self.deepspeed = settings
        self._settle_precision(settings)
        # transformers 5.23 renamed the field and warns about the old name that every TRL script uses.
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        self.report_to = "none" if self.report_to is None else self.report_to
        distributed.start_process_group(timeout_s=self.ddp_timeout, backend=self.ddp_backend)
        distributed.form_tensor_groups(self.tensor_parallel_size)
        settle_host_groups(settings, distributed.ranks_of_hosts)
        self._check_ranks()
        if distributed.is_main():
            for warning in taken:
                logger.warning(warning)
        progress.show(distributed.is_main() and not self.disable_tqdm)
        use_cpu = self.use_cpu
        self.use_cpu = False  # accelerate would start a process group of its own
        super().__post_init__()
        self.use_cpu = use_cpu
        self.accelerator_config = None  # filled with accelerate's defaults by now, and nothing reads it
        self._refuse_mismatches()
        check_low_rank(self)

    def _refuse_mismatches(self) -> None:
        """Say at once what transformers found when it compared the two, and would say after the model is loaded."""
        found = [text.removeprefix("- ds ").split(" vs hf ") for text in self.hf_deepspeed_config.mismatches]
        if found:
            lines = "\n".join(f"  {theirs} in the JSON, {ours} in ORPOConfig" for theirs, ours in found)
            raise ValueError(
                f'the DeepSpeed JSON and ORPOConfig disagree:\n{lines}\nSet them alike, or write "auto" in the JSON.'
            )

    def _check_ranks(self) -> None:
        ranks, size = distributed.world_size(), self.sequence_parallel_size
        if ranks % size:
            raise ValueError(
                f"sequence_parallel_size={size} does not divide the {ranks} ranks of this job: start a multiple of it."
            )

    def _settle_precision(self, settings: dict[str, Any]) -> None:
        """bf16 unset: what the DeepSpeed JSON says, else bf16 where the hardware multiplies it natively.

        A CPU without AMX or AVX512-BF16 kernels runs bf16 products a hundred times slower than fp32 ones.
        """
        if self.bf16 is not None:
            return
        wanted = settings.get("bf16", {}).get("enabled", "auto")
        if wanted == "auto":
            wanted = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.bf16 = bool(wanted)

    def _validate_args(self) -> None:
        """Run the checks of transformers, less the one that wants `use_cpu` for bf16 on a machine without a GPU.

        `use_cpu` would make accelerate start a process group of its own beside DeepSpeed's.
        """
        bf16, bf16_full_eval = self.bf16, self.bf16_full_eval
        if not torch.cuda.is_available():
            self.bf16 = self.bf16_full_eval = False
        super()._validate_args()
        self.bf16, self.bf16_full_eval = bf16, bf16_full_eval
        if self.fp16 and self.bf16:
            raise ValueError("fp16=True and bf16=True exclude each other: set one of them.")
        for precision in ("bf16", "fp16"):
            if getattr(self, f"{precision}_full_eval") and not getattr(self, precision):
                raise ValueError(
                    f"{precision}_full_eval=True: an evaluation runs in the precision of the training. Set "
                    f"{precision}=True as well, or leave it out."
                )
        if self.fp16:
            self._check_fp16()

    def _check_fp16(self) -> None:
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().is_fp16_supported():
            raise ValueError(
                "fp16=True: DeepSpeed does not compute in fp16 on this device. Set bf16=True, or neither for fp32."
            )
        if self.deepspeed_settings.get("zero_optimization", {}).get("stage", 0) == 0:
            # DeepSpeed 0.19's engine.backward scales the loss for its ZeRO optimizers only.
            raise ValueError(
                "fp16=True needs a zero_optimization.stage of 1 to 3 in the DeepSpeed JSON: at stage 0 DeepSpeed "
                "divides the gradient by a scale that the loss never had. zero1 needs no more memory or time."
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings for dashboards and checkpoints, without the old names, which say nothing any more."""
        said = {name: value for name, value in super().to_dict().items() if name not in DROPPED}
        if self.hub_token is None:  # transformers hides a token where there is none, too
            said["hub_token"] = None
        return said

    # accelerate takes a job without GPUs for a single process; the process group knows better.
    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return distributed.world_size()

    @property
    def process_index(self) -> int:
        """Number of this rank in the job."""
        return distributed.rank()

    @property
    def local_process_index(self) -> int:
        """Number of this rank on its host."""
        return distributed.local_rank()

    @property
    def model_keywords(self) -> dict[str, Any]:
        """`model_init_kwargs` as a dict; transformers has parsed a JSON string by now."""
        assert not isinstance(self.model_init_kwargs, str)
        return dict(self.model_init_kwargs or {})

    @property
    def deepspeed_settings(self) -> dict[str, Any]:
        """The DeepSpeed JSON; it has been read by now."""
        assert isinstance(self.deepspeed, dict)
        return self.deepspeed

    @property
    def run_dir(self) -> Path:
        """`output_dir` as a path; transformers has filled it by now."""
        assert self.output_dir is not None
        return Path(self.output_dir)

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the DeepSpeed JSON; 0 where it says nothing."""
        return int(self.hf_deepspeed_config.get_value("zero_optimization.stage", 0))

    @property
    def micro_batch_tokens(self) -> int | None:
        """Token budget of one micro-batch; None where neither it nor `max_length` is limited."""
        if self.max_tokens_per_micro_batch is not None:
            return self.max_tokens_per_micro_batch
        if self.max_length is None:
            return None
        return 2 * self.max_length * self.per_device_train_batch_size

    @property
    def eval_micro_batch_tokens(self) -> int | None:
        """That of an evaluation: no gradients, so as much as the batch size says."""
        if self.max_tokens_per_micro_batch is not None or self.max_length is None:
            return self.max_tokens_per_micro_batch
        return 2 * self.max_length * self.per_device_eval_batch_size

    @property
    def micro_batches_ahead(self) -> int:
        """Micro-batches that are built before they are asked for: as many as workers would have under way."""
        if self.dataloader_num_workers == 0:
            return 2
        return self.dataloader_num_workers * (self.dataloader_prefetch_factor or 2)

    @property
    def data_parallel_size(self) -> int:
        """Parts that a global batch is dealt into: the ranks, or the groups of ranks that share their rows."""
        return distributed.data_size() // self.sequence_parallel_size

    @property
    def global_batch_size(self) -> int:
        """Pairs of one optimizer step over all ranks; a run that is resumed on other ranks keeps its own."""
        if self.kept_global_batch_size is not None:
            return self.kept_global_batch_size
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.data_parallel_size


@dataclass(kw_only=True)
class ScriptArguments(AdapterArguments):
    """Which model and which data `orpo-ds train` loads: the names of TRL's scripts."""

    model_name_or_path: str = field(metadata={"help": "Model folder or hub id."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, .jsonl/.json/.csv/.parquet/.arrow file, folder, glob of files, or the URL of one."
        },
    )
    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Several datasets instead of `dataset_name`: names, or mappings (JSON on the command line) with "
            "path, name, data_dir, data_files, split, columns, fraction."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on, if any."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read rows as they are trained on, and never all; needs max_steps."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "The same, by the name it has beside `datasets`."}
    )
    test_split_size: float | None = field(
        default=None,
        metadata={"help": "Share, or number, of the training rows that are evaluated and not trained on."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of the loaded weights; auto: that of the training (float32 unless bf16/fp16)."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of the padded layout and of generation."}
    )
