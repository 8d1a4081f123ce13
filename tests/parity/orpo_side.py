"""The same step on our side: token pairs through a layout and `OrpoPolicy`, without trainer or DeepSpeed."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orpo_ds.data.packing import count_targets, pack
from orpo_ds.data.padding import pad, pad_encoder_decoder
from orpo_ds.data.preference import to_preference
from orpo_ds.data.tokenize import TokenizeOptions, TokenPair, tokenize_pair
from orpo_ds.model.attention import packed_attention_enabled
from orpo_ds.policy import OrpoPolicy

LAYOUTS = ("packed", "padded", "encoder-decoder")


@dataclass(frozen=True)
class OrpoStep:
    """`gradients` by the model's own parameter names; `metrics`: TRL's names, means as they are logged."""

    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def token_pairs(
    rows: Sequence[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 1024,
    is_encoder_decoder: bool = False,
) -> list[TokenPair]:
    """Rows of a dataset to token pairs. No prompt is cut, as TRL 1.16 cuts none."""
    options = TokenizeOptions(
        max_length=max_length,
        max_prompt_length=max_length - 1,
        truncation_mode="keep_end",
        is_encoder_decoder=is_encoder_decoder,
        max_completion_length=max_length,
    )
    preferences = [
        to_preference(row, processing_class=tokenizer, row_number=number) for number, row in enumerate(rows)
    ]
    return [
        tokenize_pair(preference, processing_class=tokenizer, options=options, row_number=number)
        for number, preference in enumerate(preferences)
    ]


def one_step(
    model: PreTrainedModel,
    pairs: Sequence[TokenPair],
    *,
    layout: str,
    beta: float = 0.1,
    nll_on_prompt: bool = True,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> OrpoStep:
    """Loss, gradients and metrics of a copy of `model` on all `pairs` as one micro-batch.

    `layout` is one of LAYOUTS. An encoder-decoder's nll counts its responses only, because the prompt is not
    predicted. The model is copied to `device` in `dtype`; the gradients come back to the CPU.
    """
    policy = OrpoPolicy(copy.deepcopy(model), beta=beta, logits_cache_mib=0, tile_rows=7).to(device, dtype)
    pad_token_id, pair_ids = model.config.pad_token_id, range(len(pairs))
    if layout == "packed":
        batch = pack(pairs, pair_ids=pair_ids, nll_on_prompt=nll_on_prompt)
    elif layout == "padded":
        batch = pad(pairs, pair_ids=pair_ids, pad_token_id=pad_token_id, nll_on_prompt=nll_on_prompt)
    else:
        start = model.config.decoder_start_token_id
        batch = pad_encoder_decoder(
            pairs, pair_ids=pair_ids, pad_token_id=pad_token_id, decoder_start_token_id=start
        )
        nll_on_prompt = False
    nll_tokens = sum(count_targets(pair, nll_on_prompt) for pair in pairs)
    with packed_attention_enabled(policy.model) if layout == "packed" else nullcontext():
        sums = policy(batch.to(device), nll_tokens_total=nll_tokens, pairs_total=len(pairs))
        sums["loss"].backward()
    loss = sums.pop("loss").item()
    counts = {"nll_loss": nll_tokens, "aux_loss": 1}
    return OrpoStep(
        loss=loss,
        gradients={n: p.grad.cpu() for n, p in policy.model.named_parameters() if p.grad is not None},
        metrics={"loss": loss} | {name: sums[name].item() / counts.get(name, len(pairs)) for name in sums},
    )
