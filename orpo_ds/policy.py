"""What the DeepSpeed engine wraps: backbone, head and ORPO loss in one forward.

The whole loss runs inside `engine.forward`, because ZeRO-3 gathers a parameter only while the module that owns it
(or has registered it) runs. The head is therefore a module too: it reads the output embedding's weight, which may be
tied to the input embedding, without ever calling the output embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from orpo_ds.data.packing import MicroBatch, TargetRows
from orpo_ds.loss.odds_ratio import OrpoSums, orpo_loss
from orpo_ds.loss.row_logits import LogitReader
from orpo_ds.loss.token_logps import token_logps
from orpo_ds.model.anatomy import ModelParts, find_parts, hidden_states
from orpo_ds.model.router import ExpertSums, expert_sums
from orpo_ds.model.ulysses import SequenceGroup


class Observer(Protocol):
    """Looks at a micro-batch of an evaluation, inside the forward, where ZeRO-3 has the head's weight gathered."""

    def __call__(self, batch: MicroBatch, *, hidden: Tensor, logps: Tensor, head: LogitReader) -> None:
        """Take what is wanted of the hidden states `[N, H]`, the target rows' log-probs `[R]` and the head."""


def alone(values: Tensor) -> Tensor:
    """The sum over the ranks of a job of one."""
    return values


def loss_of_rows(
    logps: Tensor,
    rows: TargetRows,
    *,
    beta: float,
    nll_tokens_total: int,
    pairs_total: int,
    group: dist.ProcessGroup | None = None,
) -> OrpoSums:
    """`orpo_loss` of the log-probs [R] of a micro-batch's target rows."""
    return orpo_loss(
        logps,
        nll=rows.nll,
        chosen_pair=rows.chosen_pair,
        rejected_pair=rows.rejected_pair,
        chosen_len=rows.chosen_len,
        rejected_len=rows.rejected_len,
        beta=beta,
        nll_tokens_total=nll_tokens_total,
        pairs_total=pairs_total,
        group=group,
    )


def counted_once(terms: OrpoSums, *, here: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and sums that every rank of a group computed alike, such that their sum over the ranks counts them once.

    Args:
        terms: of the whole micro-batch.
        here: whether this rank counts them. Elsewhere the sums are 0, and the loss is 0 with the gradient that it has.
    """
    if here:
        return terms.loss, dict(terms.sums)
    nothing = {name: torch.zeros_like(value) for name, value in terms.sums.items()}
    return terms.loss - terms.loss.detach(), nothing


class TiledHead(nn.Module):
    """Token log-probs of the rows that the loss needs, without the `[T, V]` logits."""

    def __init__(self, parts: ModelParts, *, logits_cache_mib: int, tile_rows: int | None = None) -> None:
        """Remember where the head is; the parameters stay the model's.

        Args:
            parts: anatomy of the model.
            logits_cache_mib: byte budget (MiB) of tiles kept for the backward pass.
            tile_rows: rows of a tile; None: chosen by the loss module.
        """
        super().__init__()
        self.parts = parts
        self.logits_cache_mib = logits_cache_mib
        self.tile_rows = tile_rows

    def external_parameters(self) -> list[nn.Parameter]:
        """The parameters that this module reads and does not own, for ZeRO-3 to gather while it runs."""
        return [
            value for value in (self.parts.head.weight, self.parts.bias) if isinstance(value, nn.Parameter)
        ]

    def forward(self, hidden: Tensor, rows: TargetRows, observe: Callable[..., None] | None = None) -> Tensor:
        """Log-probs `[R]` fp32 of `rows` from the hidden states `[N, H]`; an `Observer` of the batch sees them."""
        logps = token_logps(
            hidden,
            self.parts.head.weight,
            index=rows.index,
            label=rows.label,
            bias=self.parts.bias,
            softcap=self.parts.softcap,
            scale=self.parts.scale,
            tile_rows=self.tile_rows,
            logits_cache_mib=self.logits_cache_mib,
            vocab_group=self.parts.vocab_group,
            vocab_start=self.parts.vocab_start,
        )
        if observe is not None:
            parts = self.parts
            if parts.vocab_group is not None:
                raise ValueError(
                    "predictions and compute_metrics read whole rows of logits, which no rank has with "
                    "tensor_parallel_size above 1: leave them out, or predict with the saved model."
                )
            reader = LogitReader(parts.head.weight, parts.bias, parts.softcap, parts.scale, self.tile_rows)
            observe(hidden=hidden, logps=logps, head=reader)
        return logps


class OrpoPolicy(nn.Module):
    """A language model whose forward is the ORPO loss of a micro-batch."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        beta: float,
        logits_cache_mib: int,
        tile_rows: int | None = None,
        router_balance: str = "global_batch",
        sum_over_ranks: Callable[[Tensor], Tensor] = alone,
        sequence: SequenceGroup | None = None,
    ) -> None:
        """Wrap a causal or encoder-decoder language model.

        Args:
            model: the model, possibly a PEFT model.
            beta: weight of the odds-ratio term.
            logits_cache_mib: see `TiledHead`.
            tile_rows: see `TiledHead`.
            router_balance: see `ORPOConfig`; the step reads it.
            sum_over_ranks: of a small tensor; a mixture of experts is balanced over the tokens of all ranks.
            sequence: the ranks that share each row; None where a rank has rows of its own.
        """
        super().__init__()
        self.model = model
        self.beta = beta
        self.router_balance = router_balance
        self.sum_over_ranks = sum_over_ranks
        self.sequence = sequence
        self.parts = find_parts(model)
        self.head = TiledHead(self.parts, logits_cache_mib=logits_cache_mib, tile_rows=tile_rows)

    def forward(
        self,
        batch: MicroBatch,
        *,
        nll_tokens_total: int,
        pairs_total: int,
        observe: Observer | None = None,
        experts: ExpertSums | None = None,
        tokens_total: int | None = None,
        count_experts: Callable[[ExpertSums], None] | None = None,
        count_only: bool = False,
    ) -> dict[str, Tensor]:
        """The micro-batch's share of the global loss, and the sums of its metrics.

        Args:
            batch: packed or padded; this rank's part of it where several share a row.
            nll_tokens_total: nll tokens of the whole global batch.
            pairs_total: pairs of the whole global batch.
            observe: shown the micro-batch from inside (evaluation only).
            experts: what all tokens of the global batch did to the experts; None: the micro-batches that the ranks
                push at this moment are all of it. This and what follows is for models with a router.
            tokens_total: tokens of all full sequences of the global batch; given, the experts are balanced in these
                micro-batches by themselves, which count for their part of the tokens.
            count_experts: shown what this micro-batch's tokens did, without a gradient.
            count_only: do only that: no head, no loss.

        Returns:
            `loss`: scalar fp32 with a gradient; the sum over all micro-batches and ranks is the global loss, and that
            of `aux_loss` the balance of the global batch. Every other entry is a detached scalar sum over this
            micro-batch (see `orpo_loss`).
        """
        rows = batch.rows
        hidden, router_logits = hidden_states(self.parts, batch, sequence=self.sequence)
        own = self._expert_sums(router_logits, batch)
        if own is not None and count_experts is not None:
            count_experts(own.detach())
        if count_only:
            return {}
        logps = self.head(hidden, rows, None if observe is None else partial(observe, batch))
        terms = loss_of_rows(
            logps,
            rows,
            beta=self.beta,
            nll_tokens_total=nll_tokens_total,
            pairs_total=pairs_total,
            group=None if self.sequence is None else self.sequence.group,
        )
        loss, sums = counted_once(terms, here=self.sequence is None or self.sequence.reports)
        if own is not None and router_logits is not None:
            whole = own.over_ranks(self.sum_over_ranks) if experts is None else experts
            aux = own.balance(whole)
            if tokens_total is not None:
                aux = aux * (whole.tokens / (len(router_logits) * tokens_total)).to(aux.dtype)
            loss = loss + self.parts.aux_coefficient * aux
            sums["aux_loss"] = aux.detach()
        return {"loss": loss, **sums}

    def _expert_sums(self, router_logits: tuple[Tensor, ...] | None, batch: MicroBatch) -> ExpertSums | None:
        if router_logits is None or self.parts.router is None:
            return None
        return expert_sums(
            self.parts.router,
            router_logits,
            token_weight=batch.token_weight,
            checkpointed=self.training and self.parts.model.is_activation_checkpointing,
        )
