"""The logits themselves, for who asks to see them: some rows whole, or each row's mean, tile by tile.

The loss needs neither, and nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from orpo_ds.loss.head import BITS, Head, HeadOptions
from orpo_ds.loss.tiles import MIB
from orpo_ds.loss.vocab_parallel import VocabShard

# A piece that a user's function sees: on a GPU 440 rows of a vocabulary of 152k, on a CPU 55.
_PIECE_MIB = {"cpu": 32, "cuda": 256}


@dataclass(frozen=True, eq=False)
class LogitReader:
    """A head whose logits can be read. Under ZeRO-3 it must be used inside the forward that gathers the weight.

    Attributes:
        weight: [V, H].
        bias: [V].
        softcap: see `token_logps`.
        scale: see `token_logps`.
        tile_rows: see `token_logps`.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    tile_rows: int | None = None

    @property
    def piece_rows(self) -> int:
        """Rows of whole logits to ask for at once: what fits in tens of MiB, at least one."""
        kind = "cpu" if self.weight.device.type == "cpu" else "cuda"
        affordable = _PIECE_MIB[kind] * MIB // (torch.float32.itemsize * self.weight.shape[0])
        return max(1, min(affordable, self.tile_rows or affordable))

    @torch.no_grad()
    def rows(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Logits [R, V] fp32 of `hidden[index]`, R int64 rows of [N, H]; the caller keeps R small (`piece_rows`)."""
        logits = hidden.new_empty(index.shape[0], self.weight.shape[0], dtype=torch.float32)
        for rows, columns, tile in self._tiles(hidden, index):
            logits[rows, columns] = tile
        return logits

    @torch.no_grad()
    def means(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Mean over the vocabulary [R] fp32 of the logits of `hidden[index]`; only a tile of them exists at once."""
        sums = hidden.new_zeros(index.shape[0], dtype=torch.float32)
        for rows, _, tile in self._tiles(hidden, index):
            sums[rows] += tile.sum(1)
        return sums / self.weight.shape[0]

    def _tiles(self, hidden: Tensor, index: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        options = HeadOptions(
            softcap=self.softcap,
            scale=self.scale,
            tile_rows=self.tile_rows,
            tile_columns=None,
            cache_bytes=0,
            shard=VocabShard(group=None, start=0),
            differentiable=False,
        )
        head = Head(hidden, self.weight, self.bias, index, index, options)  # the labels are not read
        for rows in head.work.tiling.rows:
            states = head.states(rows)
            for columns in head.work.tiling.columns:
                tile = head.work.tile(rows, columns)
                yield rows, columns, head.bits_into(tile, states, head.run(columns), columns).div_(BITS)
