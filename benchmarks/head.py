"""The head's claim: memory that does not grow with the rows, and time within 5% of its matrix products.

    python benchmarks/head.py                    the table of the README, 1k to 32k rows (about 20 minutes)
    python benchmarks/head.py --rows 1024 2048   a quick look
    python benchmarks/head.py --frozen           of a LoRA head; also --softcap 30, --logits-cache-mib 1024
    python benchmarks/head.py --tune             which tile is fastest on this machine

Each number of rows gets a process of its own, whose peak resident memory is its own. Head and products
alternate; the seconds are medians, and the ratio is the median of the rounds' own, because one lucky round of
either would move a ratio of two minima by 3%. The products are those of the head: the same shapes, the same
buffers, out of the same weight, and nothing in between. `best` is what they would take at the rate of the
fastest tile of the search, each kind of product at its own.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from orpo_ds.loss import head_memory_bytes, token_logps
from orpo_ds.loss.tiles import MIB, Tiling, product_into

SEED = 0
TILE_SHAPES = [
    (rows, columns)
    for rows in (512, 1024, 2048, 4096)
    for columns in (512, 1024, 2048, 4096)
    if rows * columns <= 2**22
]


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    rows: int
    hidden_size: int
    vocab_size: int
    frozen: bool
    softcap: float | None
    logits_cache_mib: int
    repeat: int
    threads: int


@dataclass(frozen=True)
class Result:
    """What a case took; seconds and bytes."""

    rows: int
    head_s: float
    products_s: float
    ratio: float
    peak_bytes: int  # beyond the inputs
    formula_bytes: int
    multiply_adds: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--hidden-size", type=int, default=896)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--frozen", action="store_true", help="no gradient for the head (LoRA)")
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--logits-cache-mib", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=5, help="rounds up to 8192 rows; one beyond")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tune", action="store_true", help="try tile shapes instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"seed {SEED}, {args.threads} threads, fp32, H={args.hidden_size}, V={args.vocab_size}")
    if args.tune:
        tune(args.hidden_size, args.repeat)
        return

    best = best_rate(args.hidden_size, frozen=args.frozen, cached=args.logits_cache_mib > 0)
    results: list[Result] = []
    titles = ["rows", "head s", "products s", "head/products", "head/best", "GFLOP/s"]
    titles += ["peak MiB", "growth MiB", "hidden gradient MiB", "formula/peak"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for rows in args.rows:
        case = Case(
            rows=rows,
            hidden_size=args.hidden_size,
            vocab_size=args.vocab_size,
            frozen=args.frozen,
            softcap=args.softcap,
            logits_cache_mib=args.logits_cache_mib,
            repeat=args.repeat if rows <= 8192 else 1,
            threads=args.threads,
        )
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            result = pool.submit(measure, case).result()
        results.append(result)
        print(line(result, first=results[0], best=best, hidden_size=args.hidden_size), flush=True)


def line(result: Result, *, first: Result, best: float, hidden_size: int) -> str:
    """One row of the table; growth is over the first row, and the hidden gradient is what it should be."""
    flop = 2 * result.multiply_adds
    gradient = 4 * hidden_size * (result.rows - first.rows)
    cells = (
        f"{result.rows:5d}",
        f"{result.head_s:.2f}",
        f"{result.products_s:.2f}",
        f"{result.ratio:.3f}",
        f"{result.head_s * best / flop:.3f}",
        f"{flop / result.head_s / 1e9:.0f}",
        f"{result.peak_bytes / MIB:.0f}",
        f"{(result.peak_bytes - first.peak_bytes) / MIB:+.0f}",
        f"{gradient / MIB:+.0f}",
        f"{result.formula_bytes / result.peak_bytes:.3f}",
    )
    return "| " + " | ".join(cells) + " |"


def measure(case: Case) -> Result:
    """Time and memory of one case, in a fresh process."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(SEED)
    hidden = torch.randn(case.rows, case.hidden_size).requires_grad_()
    weight = torch.randn(case.vocab_size, case.hidden_size).mul_(0.02).requires_grad_(not case.frozen)
    index, label = torch.arange(case.rows), torch.randint(0, case.vocab_size, (case.rows,))
    grad = torch.rand(case.rows)

    def head(vocab: int = case.vocab_size) -> None:
        logps = token_logps(
            hidden,
            weight[:vocab] if vocab < case.vocab_size else weight,
            index=index,
            label=label.clamp(max=vocab - 1),
            softcap=case.softcap,
            logits_cache_mib=case.logits_cache_mib,
        )
        logps.backward(grad)
        hidden.grad = weight.grad = None

    head(vocab=4096)  # starts the threads, and MKL allocates its own buffers, which are not the head's
    before = resident_bytes("VmRSS")
    reset_peak()
    first = timed(head)
    peak = resident_bytes("VmHWM") - before
    products = Products(case, hidden.detach(), weight.detach())
    rounds = [(first, timed(products.run))]
    rounds += [(timed(head), timed(products.run)) for _ in range(case.repeat - 1)]
    formula = head_memory_bytes(
        rows=case.rows,
        hidden_size=case.hidden_size,
        vocab_size=case.vocab_size,
        frozen=case.frozen,
        softcap=case.softcap is not None,
        logits_cache_mib=case.logits_cache_mib,
    )
    return Result(
        rows=case.rows,
        head_s=median(of_head for of_head, _ in rounds),
        products_s=median(of_products for _, of_products in rounds),
        ratio=median(of_head / of_products for of_head, of_products in rounds),
        peak_bytes=peak,
        formula_bytes=formula,
        multiply_adds=products.multiply_adds,
    )


class Products:
    """The head's matrix products with nothing in between."""

    def __init__(self, case: Case, hidden: Tensor, weight: Tensor) -> None:
        self._case, self._hidden, self._weight = case, hidden, weight
        self._tiling = Tiling.plan(
            case.rows, case.vocab_size, tile_rows=None, tile_columns=None, dtype=hidden.dtype, device="cpu"
        )
        self._tile = torch.empty(self._tiling.tile_shape[0] * self._tiling.tile_shape[1])
        self.multiply_adds = 0

    def run(self) -> None:
        """Forward, then backward."""
        self.multiply_adds = 0
        frozen = self._case.frozen
        self._walk(of_hidden=frozen, of_weight=False, cached_bytes=0)
        if not frozen:
            self._walk(of_hidden=True, of_weight=True, cached_bytes=self._case.logits_cache_mib * MIB)

    def _walk(self, *, of_hidden: bool, of_weight: bool, cached_bytes: int) -> None:
        grad_weight = torch.empty_like(self._weight) if of_weight else None
        for i, rows in enumerate(self._tiling.rows):
            states = self._hidden[rows]
            grad_states = torch.empty_like(states)
            for j, columns in enumerate(self._tiling.columns):
                run = self._weight[columns]
                tile = self._tile[: states.shape[0] * run.shape[0]].view(states.shape[0], run.shape[0])
                if tile.nbytes <= cached_bytes:
                    cached_bytes -= tile.nbytes
                else:
                    self._product(tile, states, run.t(), add=False)
                if grad_weight is not None:
                    self._product(grad_weight[columns], tile.t(), states, add=i > 0)
                if of_hidden:
                    self._product(grad_states, tile, run, add=j > 0)

    def _product(self, out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
        product_into(out, left, right, alpha=1, add=add)
        self.multiply_adds += left.shape[0] * left.shape[1] * right.shape[1]


def best_rate(hidden_size: int, *, frozen: bool, cached: bool) -> float:
    """FLOP/s of the head's mix of products, each kind in the fastest of TILE_SHAPES."""
    seconds = {"logits": 1.0, "hidden": 1.0, "weight": 1.0}  # per FLOP
    for rows, columns in TILE_SHAPES:
        states, run = torch.randn(rows, hidden_size), torch.randn(columns, hidden_size)
        tile = torch.zeros(rows, columns)
        products = {
            "logits": (tile, states, run.t()),
            "hidden": (torch.zeros_like(states), tile, run),
            "weight": (torch.zeros_like(run), tile.t(), states),
        }
        for name, (out, left, right) in products.items():
            product = functools.partial(product_into, out, left, right, alpha=1, add=True)
            fastest = min(timed(product) for _ in range(8))
            seconds[name] = min(seconds[name], fastest / (2 * rows * columns * hidden_size))
    logits = seconds["logits"] * (1 if frozen or cached else 2)
    mix = [logits, seconds["hidden"]] if frozen else [logits, seconds["hidden"], seconds["weight"]]
    count = 2 if frozen else 3 if cached else 4
    return count / sum(mix)


def tune(hidden_size: int, repeat: int) -> None:
    """Forward and backward of the head for every tile shape, over a quarter of a large vocabulary."""
    rows, vocab_size = 4096, 32_768
    torch.manual_seed(SEED)
    hidden = torch.randn(rows, hidden_size).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size).mul_(0.02).requires_grad_()
    index, label, grad = torch.arange(rows), torch.randint(0, vocab_size, (rows,)), torch.rand(rows)
    flop = 2 * rows * hidden_size * vocab_size
    print(
        "| tile rows | tile columns | MiB | forward GFLOP/s | backward GFLOP/s | both |\n|---|---|---|---|---|---|"
    )
    for tile_rows, tile_columns in TILE_SHAPES:
        forward = backward = float("inf")
        for _ in range(repeat):
            start = time.perf_counter()
            logps = token_logps(
                hidden, weight, index=index, label=label, tile_rows=tile_rows, tile_columns=tile_columns
            )
            middle = time.perf_counter()
            logps.backward(grad)
            forward = min(forward, middle - start)
            backward = min(backward, time.perf_counter() - middle)
            hidden.grad = weight.grad = None
        print(
            f"| {tile_rows} | {tile_columns} | {4 * tile_rows * tile_columns / MIB:.0f} | {flop / forward / 1e9:.0f} | "
            f"{3 * flop / backward / 1e9:.0f} | {4 * flop / (forward + backward) / 1e9:.0f} |",
            flush=True,
        )


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    gc.collect()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (highest) of this process."""
    for status in Path("/proc/self/status").read_text().splitlines():
        if status.startswith(field + ":"):
            return int(status.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def reset_peak() -> None:
    """Set VmHWM to VmRSS (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
