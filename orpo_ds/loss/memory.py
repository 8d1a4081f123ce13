"""What the head costs in bytes: a formula, so that `estimate` can print it before anything is allocated."""

from __future__ import annotations

import torch

from orpo_ds.loss.tiles import MIB, Tiling, operand_dtype, sum_dtype


def head_memory_bytes(
    *,
    rows: int,
    hidden_size: int,
    vocab_size: int,
    hidden_rows: int | None = None,
    hidden_dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    frozen: bool = False,
    bias: bool = False,
    softcap: bool = False,
    tile_rows: int | None = None,
    tile_columns: int | None = None,
    logits_cache_mib: int = 0,
) -> int:
    """Peak bytes that `token_logps` and its backward hold beyond their inputs: gradients, cache and tiles.

    With r x c the largest tile, and bytes a number of s in sums (fp32), o in operands of products, h in hidden
    states and w in the weight, backward of a trained head holds

        grads      h N H + w V H + s V        of hidden states, weight and bias
        cache      s r c                      for each tile that fits the budget
        tile       s r c                      as much again for the slope of a soft-cap, o r c more if o < s
        block      (s + 2 o) r H              gradient of its states, the states, the states times g
        run        o c H                      if the weight is upcast for products
        dW run     s c H                      if w < s; or, if there are several blocks of rows, s V H for dW

    so that only `h N H`, the gradient of the hidden states, grows with the rows (and three numbers a row). A
    frozen head has no `w V H`; its forward leaves a direction, `h R H`, to backward.

    Args:
        rows: R, target rows of a micro-batch.
        hidden_size: H.
        vocab_size: V, of this rank's shard.
        hidden_rows: N, rows of the hidden states; None for as many as target rows.
        hidden_dtype: of the hidden states and their gradient.
        weight_dtype: of the head and its gradient.
        device: "cpu" or "cuda", which choose tiles and operands differently.
        frozen: whether the head has no gradient.
        bias: whether the head has a bias that is trained.
        softcap: whether its logits are soft-capped.
        tile_rows: as in `token_logps`.
        tile_columns: as in `token_logps`.
        logits_cache_mib: as in `token_logps`.
    """
    sums = sum_dtype(hidden_dtype, weight_dtype)
    operands = operand_dtype(hidden_dtype, weight_dtype, device=device)
    s, o, h, w = sums.itemsize, operands.itemsize, hidden_dtype.itemsize, weight_dtype.itemsize
    tiling = Tiling.plan(
        rows, vocab_size, tile_rows=tile_rows, tile_columns=tile_columns, dtype=sums, device=device
    )
    r, c = tiling.tile_shape
    width = hidden_size

    row_numbers = 3 * s * rows  # log-probs, peaks, masses
    grad_hidden = h * (rows if hidden_rows is None else hidden_rows) * width
    run = o * c * width if weight_dtype != operands else 0
    tile = s * r * c
    beside_tile = (s * r * c if softcap else 0) + (o * r * c if o != s else 0)
    if frozen:
        in_products = beside_tile + o * r * width
        in_direction = (w if w == s else w + s) * r * width  # W[y], in its own dtype and in that of sums
        forward = tile + run + s * r * width + max(in_products, in_direction)
        backward = grad_hidden + (s if h == s else s + h) * r * width
        return row_numbers + h * rows * width + max(forward, backward)

    # WeightGradient: a half-precision weight is summed in fp32, one run at a time or all of it (tiles.py).
    summed_whole = w != s and len(tiling.rows) > 1
    grad_weight = (s if summed_whole else w) * vocab_size * width
    last_copy = w * vocab_size * width if summed_whole else 0
    run += s * c * width if w != s and not summed_whole else 0
    grads = grad_hidden + grad_weight + (s * vocab_size if bias else 0)
    cache = _cache_bytes(tiling, s, budget=logits_cache_mib * MIB)
    in_blocks = cache + beside_tile + (s + 2 * o) * r * width
    return row_numbers + grads + tile + run + max(in_blocks, last_copy)


def _cache_bytes(tiling: Tiling, itemsize: int, *, budget: int) -> int:
    """What the budget really keeps: tiles in the order of forward, each whole or not at all."""
    kept = 0
    for rows in tiling.rows:
        for columns in tiling.columns:
            size = itemsize * (rows.stop - rows.start) * (columns.stop - columns.start)
            kept += size if kept + size <= budget else 0
    return kept
