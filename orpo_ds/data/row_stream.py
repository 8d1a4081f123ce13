"""The rows of a dataset without a length, in an order that a seed decides, and from any place again.

    rows of the source    0 1 2 3 | 4 5 6 7 | 8 9 …         blocks of `block_rows`, held one at a time
    as they come out      2 0 3 1 | 5 7 4 6 | 9 8 …         each block in an order of its own

`datasets` shuffles through a buffer as well, but its `state_dict` leaves the buffer's rows out: a resumed stream would
lose them. Here a place in the stream is a block and the rows of it that have come out. To go there, the source's own
`state_dict` from before the block is loaded and the block is read again; its hash tells whether these are the rows of
then. Where they are not (the source has a shuffle buffer of its own), the rows before it are read and passed over.

When the source ends, its next epoch begins: `set_epoch` is called and the blocks get other orders.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

import datasets
from datasets.exceptions import DatasetsError

from orpo_ds.data.batches import random_order

logger = logging.getLogger(__name__)

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class StreamPosition:
    """A place between two rows of a `RowStream`; plain values, so that JSON can hold it.

    Attributes:
        epoch: times the source has ended before.
        first_row: rows of this epoch before the block.
        taken: rows of the block that have come out.
        block_hash: of the rows of the block; empty where the block has not been read.
        source: `state_dict` of the source from before the block; None at the start of an epoch.
    """

    epoch: int = 0
    first_row: int = 0
    taken: int = 0
    block_hash: str = ""
    source: dict[str, Any] | None = None


class RowStream:
    """Rows with their numbers, one after the other, for ever.

    Args:
        rows: the source. Every process that reads it must be given the same rows in the same order.
        columns: those that are handed out.
        seed: decides the order within blocks.
        block_rows: rows held in memory and shuffled among each other.
        shuffle: False keeps the source's order.

    Raises:
        ValueError: when the first row is asked for, and the source has none.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        *,
        columns: Sequence[str],
        seed: int,
        block_rows: int,
        shuffle: bool = True,
    ) -> None:
        self._rows = rows
        self._columns = columns
        self._seed = seed
        self._block_rows = block_rows
        self._shuffle = shuffle
        self._position = StreamPosition()
        self._order: list[int] = []
        self._start_epoch(self._position)

    @property
    def position(self) -> StreamPosition:
        """The place behind the row that came out last."""
        return self._position

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        return self

    def __next__(self) -> tuple[int, Row]:
        """The number of a row in its epoch, and the row."""
        if self._position.taken == len(self._block):
            self._next_block()
        place = self._order[self._position.taken]
        self._position = replace(self._position, taken=self._position.taken + 1)
        return self._position.first_row + place, self._block[place]

    def seek(self, position: StreamPosition) -> None:
        """Go to a place that `position` was, in this process or an earlier one.

        Raises:
            ValueError: the source does not have the rows there that it had then.
        """
        self._start_epoch(position)
        if not position.block_hash:
            return
        self._read_block(first_row=position.first_row)
        if self._position.block_hash != position.block_hash and position.source is not None:
            logger.info("the stream cannot go to row %d at once and reads up to it", position.first_row)
            self._start_epoch(StreamPosition(epoch=position.epoch))
            for _ in islice(self._source, position.first_row):
                pass
            self._read_block(first_row=position.first_row)
        if self._position.block_hash != position.block_hash:
            raise ValueError(
                f"the stream has other rows than before from row {position.first_row} of epoch {position.epoch} on: "
                "continue with the data of the checkpoint, or start a new run"
            )
        self._position = position

    def _start_epoch(self, position: StreamPosition) -> None:
        """Open the source at the start of an epoch, or before the block of a position."""
        self._position = StreamPosition(epoch=position.epoch)
        self._block: list[Row] = []
        self._rows.set_epoch(position.epoch)
        self._rows.load_state_dict(position.source)
        self._source = readable(self._rows, first_row=position.first_row)

    def _next_block(self) -> None:
        first_row = self._position.first_row + len(self._block)
        self._read_block(first_row=first_row)
        if self._block:
            return
        if first_row == 0:
            raise ValueError("the dataset has no rows: nothing to train on. Check the files and the split")
        epoch = self._position.epoch + 1
        logger.info("the stream ended after %d rows and begins again (epoch %d)", first_row, epoch)
        self._start_epoch(StreamPosition(epoch=epoch))
        self._next_block()

    def _read_block(self, *, first_row: int) -> None:
        """Read up to `block_rows` rows; at the end of the source there are fewer, or none."""
        state = self._rows.state_dict() if first_row else None
        rows = islice(self._source, self._block_rows)
        self._block = [{name: row[name] for name in self._columns if name in row} for row in rows]
        epoch, count = self._position.epoch, len(self._block)
        self._order = (
            random_order(count, key=f"{self._seed}/{epoch}/{first_row}").tolist()
            if self._shuffle
            else list(range(count))
        )
        self._position = StreamPosition(
            epoch=epoch, first_row=first_row, block_hash=hash_rows(self._block), source=state
        )


def readable(rows: Iterable[Row], *, first_row: int = 0) -> Iterator[Row]:
    """The rows; where one cannot be read, say which.

    Raises:
        ValueError: a file is damaged, not in UTF-8, or cannot be reached any more.
    """
    source, number = iter(rows), first_row
    while True:
        try:
            row = next(source)
        except StopIteration:
            return
        except (ValueError, OSError, EOFError, DatasetsError) as error:
            raise ValueError(f"the stream cannot be read from row {number} on: {error}") from error
        yield row
        number += 1


def hash_rows(rows: Sequence[Row]) -> str:
    """Hash of the content of rows: texts, messages, numbers, bytes and images."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=_content).encode()).hexdigest()


def _content(value: Any) -> str:
    """What JSON has no words for: the hash of its bytes, or else its type."""
    raw = value if isinstance(value, bytes) else value.tobytes() if hasattr(value, "tobytes") else b""
    return type(value).__name__ + hashlib.sha256(raw).hexdigest()
