"""Progress of long work: a bar on a terminal, and in a log file one line now and then.

A bar redraws itself with carriage returns, which a log of SLURM keeps, all of them. Only the main process shows
anything, and `disable_tqdm` turns everything off; the trainer says so once (`show`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeAlias, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

LINE_SECONDS = 30.0
WORTH_SHOWING_SECONDS = 2.0  # what is done sooner needs no bar

_shown = True


def is_shown() -> bool:
    """Whether this process shows progress at all."""
    return _shown


def show(shown: bool) -> None:
    """Turn the progress of this process on or off: the trainer does, for its rank and `disable_tqdm`."""
    global _shown
    _shown = shown


class Lines(Generic[T]):
    """Stands in for a `tqdm` where the output is no terminal: writes a line each `seconds`, and one at the end."""

    def __init__(
        self,
        iterable: Iterable[T] = (),
        *,
        total: float,
        desc: str,
        seconds: float | None = None,
        unit: str = "it",
        unit_scale: bool = False,
    ) -> None:
        """Begin at zero; nothing is written before `seconds` are over.

        Args:
            iterable: what iterating over this object gives.
            total: work in `unit`s.
            desc: what is being done.
            seconds: between two lines; by default 30.
            unit: of the work.
            unit_scale: write 1.2G for 1,200,000,000.
        """
        self.iterable = iterable
        self.total = total
        self.desc = desc
        self.seconds = LINE_SECONDS if seconds is None else seconds
        self.n = 0
        self.unit, self.unit_scale = unit, unit_scale
        self._began = self._written = time.monotonic()

    def __iter__(self) -> Iterator[T]:
        for item in self.iterable:
            yield item
            self.update(1)
        self.close()

    def __enter__(self) -> Lines[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Note that `n` more are done."""
        self.n += n
        now = time.monotonic()
        if now - self._written >= self.seconds:
            self._written = now
            self._line(now)

    def close(self) -> None:
        """Write the last line, unless it all took no time worth mentioning."""
        now = time.monotonic()
        if now - self._began >= WORTH_SHOWING_SECONDS:
            self._line(now)
        self._began = now

    def write(self, text: str) -> None:
        """Write a line of one's own, as `tqdm.write` does."""
        print(text, flush=True)

    def _line(self, now: float) -> None:
        # Without a width tqdm's own formatter draws no bar: `Training:  50% 5/10 [01:00<01:00, 12.0s/it]`.
        text = tqdm.format_meter(
            self.n,
            self.total,
            now - self._began,
            ncols=0,
            prefix=self.desc,
            unit=self.unit,
            unit_scale=self.unit_scale,
        )
        print(text.rstrip(), file=sys.stderr, flush=True)


Bar: TypeAlias = "tqdm[Any] | Lines[Any]"


def bar(iterable: Iterable[Any] = (), *, total: float, desc: str, shown: bool = True, **unit: Any) -> Bar:
    """A progress bar, or lines: iterate over it, or call `update`; it can be a context manager.

    Args:
        iterable: to go through.
        total: how much there is to do.
        desc: what is being done.
        shown: whether this process may show it at all.
        unit: `unit` and `unit_scale`, as in `tqdm`.
    """
    if not (shown and _shown):
        return tqdm(iterable, total=total, disable=True)
    if sys.stderr.isatty():
        return tqdm(
            iterable,
            total=total,
            desc=desc,
            delay=WORTH_SHOWING_SECONDS,
            leave=False,
            dynamic_ncols=True,
            **unit,
        )
    return Lines(iterable, total=total, desc=desc, **unit)


@contextlib.contextmanager
def timed(desc: str) -> Iterator[None]:
    """Work whose length nobody knows: if it takes a while, a line that it is being done, and one when it is over."""
    began = time.monotonic()
    said = threading.Timer(WORTH_SHOWING_SECONDS, _say, [f"{desc} …"])
    said.daemon = True
    said.start()
    try:
        yield
    finally:
        said.cancel()
        said.join()  # it may be writing at this moment, and its line comes first
    if (took := time.monotonic() - began) >= WORTH_SHOWING_SECONDS:
        _say(f"{desc}: done in {took:.0f} s")


def _say(text: str) -> None:
    if _shown:
        print(text, file=sys.stderr, flush=True)
