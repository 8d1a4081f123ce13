"""The tiles that the head is computed in: their shape, their buffers, their products.

The logits of R target rows are an [R, V] matrix that never exists. It is cut into blocks of rows and runs of
columns, and one buffer of [rows, columns] logits serves every tile in turn:

                 columns (vocabulary)
               +------+------+------+
    block 0    |  00  |  01  |  02  |     left to right inside a block: its hidden states and their
    block 1    |  10  |  11  |  12  |     gradient stay in cache while the weight streams past, once
               +------+------+------+
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIB = 2**20

# `benchmarks/head.py --tune` compares shapes. On a CPU a tile should stay in the last-level cache between the
# product that writes it, the exp() that reads it and the products that use it; from 1024 x 1024 to 2048 x 2048
# the head runs at the same speed, so the smallest is taken. On a GPU no cache holds a tile that fills the device:
# there it is sized for large products and few kernels (a plan: no GPU has run it yet).
_TILE_ROWS = {"cpu": 1024, "cuda": 8192}
_TILE_BYTES = {"cpu": 4 * MIB, "cuda": 256 * MIB}
_COLUMN_MULTIPLE = 64  # 256 bytes of fp32: whole cache lines and whole vector registers


@dataclass(frozen=True)
class Tiling:
    """How R target rows and V columns are cut: slices as long as the first, but for a shorter last."""

    rows: tuple[slice, ...]
    columns: tuple[slice, ...]

    @staticmethod
    def plan(
        num_rows: int,
        num_columns: int,
        *,
        tile_rows: int | None,
        tile_columns: int | None,
        dtype: torch.dtype,
        device: str,
    ) -> Tiling:
        """Cut [num_rows, num_columns] into blocks of at most `tile_rows` and runs of at most `tile_columns`.

        None takes the device's rows, and the columns that then fill its byte budget. The blocks of rows
        depend on `num_rows` and `tile_rows` only, so that the ranks of a vocab-parallel head, whose numbers
        of columns may differ, make the same sequence of collectives.
        """
        kind = "cpu" if device == "cpu" else "cuda"
        rows = _even_slices(num_rows, tile_rows or _TILE_ROWS[kind], multiple=1)
        if tile_columns is not None:
            return Tiling(rows, _even_slices(num_columns, tile_columns, multiple=1))
        affordable = _TILE_BYTES[kind] // ((rows[0].stop if rows else 1) * dtype.itemsize)
        whole_lines = max(affordable // _COLUMN_MULTIPLE, 1) * _COLUMN_MULTIPLE
        return Tiling(rows, _even_slices(num_columns, whole_lines, multiple=_COLUMN_MULTIPLE))

    @property
    def tile_shape(self) -> tuple[int, int]:
        """Rows and columns of the largest tile, (0, 0) without rows."""
        return (self.rows[0].stop, self.columns[0].stop) if self.rows else (0, 0)


def _even_slices(length: int, most: int, *, multiple: int) -> tuple[slice, ...]:
    """Cut range(length) into the fewest slices of at most `most`, as even as multiples of `multiple` allow.

    `most` is a multiple of `multiple`. The first slice is a longest one.
    """
    if length == 0:
        return ()
    even = -(-length // -(-length // most))
    size = min(-(-even // multiple) * multiple, length)
    return tuple(slice(start, min(start + size, length)) for start in range(0, length, size))


class Workspace:
    """The tiling of one call, the dtypes it computes in, and the one buffer that its tiles share."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        num_rows: int,
        tile_rows: int | None,
        tile_columns: int | None,
    ) -> None:
        device = hidden.device.type
        self.sum_dtype = sum_dtype(hidden.dtype, weight.dtype)
        self.operand_dtype = operand_dtype(hidden.dtype, weight.dtype, device=device)
        self.tiling = Tiling.plan(
            num_rows,
            weight.shape[0],
            tile_rows=tile_rows,
            tile_columns=tile_columns,
            dtype=self.sum_dtype,
            device=device,
        )
        rows, columns = self.tiling.tile_shape
        self._buffer = hidden.new_empty(rows * columns, dtype=self.sum_dtype)
        upcast = weight.dtype != self.operand_dtype
        self._run = weight.new_empty(columns, weight.shape[1], dtype=self.operand_dtype) if upcast else None

    def operand(self, tensor: Tensor) -> Tensor:
        """`tensor` in the dtype that products read; itself where it already is."""
        return tensor.to(self.operand_dtype)

    def run(self, weight: Tensor) -> Tensor:
        """A run of weight rows [c, H] in the operand dtype, in the one buffer for it unless it already is."""
        return weight if self._run is None else self._run[: weight.shape[0]].copy_(weight)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """The shared buffer as a contiguous [rows, columns] tile, contents undefined."""
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        return self._buffer[: shape[0] * shape[1]].view(shape)


class TileCache:
    """Logit tiles kept from forward to backward under a byte budget; each is handed out once."""

    def __init__(self, budget_bytes: int) -> None:
        self._left = budget_bytes
        self._tiles: dict[tuple[int, int], Tensor] = {}

    def keep(self, place: tuple[int, int], like: Tensor) -> Tensor | None:
        """A new tile of `like`'s shape that lives until it is taken, or None where the budget is spent."""
        if like.nbytes > self._left:
            return None
        self._left -= like.nbytes
        self._tiles[place] = torch.empty_like(like)
        return self._tiles[place]

    def take(self, place: tuple[int, int]) -> Tensor | None:
        """The kept tile, the caller's to overwrite. A second backward through the same graph gets None."""
        return self._tiles.pop(place, None)


class WeightGradient:
    """sum_r D_rv (g_r h_r) for a whole weight [V, H], summed in fp32 whatever the weight's dtype.

    A half-precision sum over several blocks of rows would be rounded once a block. So a half-precision weight
    gets an fp32 total when there are several blocks; with one, every run of columns is complete as soon as it
    is computed and goes straight into a gradient of the weight's own dtype.
    """

    def __init__(self, weight: Tensor, work: Workspace) -> None:
        self._dtype = weight.dtype
        single_block = len(work.tiling.rows) <= 1
        make = torch.empty_like if work.tiling.rows else torch.zeros_like
        self._total = make(weight, dtype=weight.dtype if single_block else work.sum_dtype)
        self._run: Tensor | None = None
        if self._total.dtype != work.sum_dtype:
            self._run = weight.new_empty(work.tiling.tile_shape[1], weight.shape[1], dtype=work.sum_dtype)

    def add(self, columns: slice, left: Tensor, right: Tensor, *, alpha: float, first: bool) -> None:
        """Add alpha * left [c, r] @ right [r, H] to the rows `columns`; `first` overwrites what is there."""
        if self._run is None:
            product_into(self._total[columns], left, right, alpha=alpha, add=not first)
        else:
            self._total[columns] = product_into(
                self._run[: left.shape[0]], left, right, alpha=alpha, add=False
            )

    def result(self) -> Tensor:
        """[V, H] in the weight's dtype."""
        return self._total.to(self._dtype)


def sum_dtype(hidden: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums and the result: fp32; float64 where an input is (for gradcheck)."""
    return torch.float64 if torch.float64 in (hidden, weight) else torch.float32


def operand_dtype(hidden: torch.dtype, weight: torch.dtype, *, device: str) -> torch.dtype:
    """The dtype that matrix products read.

    On CUDA the inputs' own: tensor cores multiply half precision and accumulate in fp32. Elsewhere fp32: a
    CPU without AMX runs a bf16 product at about 1/100 of the speed of the fp32 one, so hidden states and
    weight rows are upcast, one tile's worth at a time.
    """
    return torch.promote_types(hidden, weight) if device == "cuda" else sum_dtype(hidden, weight)


def product_into(out: Tensor, left: Tensor, right: Tensor, *, alpha: float, add: bool) -> Tensor:
    """Set out to alpha * left @ right (+ out if `add`), summed and stored in out's dtype, no temporary."""
    beta = 1 if add else 0  # beta 0 ignores what is in `out`, NaN included
    if left.dtype == out.dtype:
        return torch.addmm(out, left, right, beta=beta, alpha=alpha, out=out)
    # CUDA only: half-precision operands, and an fp32 sum that is not rounded on its way out.
    return torch.addmm(out, left, right, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
