"""The token pairs of a dataset without a length: tokenised as they are read, in memory for as long as they are needed.

A `TokenStream` is to a streamed dataset what a `TokenDataset` and its `GlobalBatches` are to one on disk. Its batches
are a function of (seed, rows) as well, and not of the number of ranks: every rank reads all rows and tokenises them,
because every rank plans the whole global batch. What is held is a block of rows and the pairs of the batches that have
been read and not yet been trained on.

The batches are read in a thread, ahead of the training. So the stream remembers its position behind every batch, and a
checkpoint gets that of the step it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from transformers import ProcessorMixin

from orpo_ds.data.image_inputs import ImageInputs
from orpo_ds.data.images import IMAGE_COLUMNS
from orpo_ds.data.preference import OPTIONAL_COLUMNS, REQUIRED_COLUMNS, RowError, check_columns
from orpo_ds.data.processing import ProcessingClass, processing_hash
from orpo_ds.data.row_stream import Row, RowStream, StreamPosition, hash_rows, readable
from orpo_ds.data.token_dataset import PairLengths, remove_abandoned, unfinished_folder
from orpo_ds.data.tokenize import check_images, tokenize_rows
from orpo_ds.data.truncate import TokenizeOptions, TokenPair

logger = logging.getLogger(__name__)

BLOCK_ROWS = 256  # that are written to disk at a time
COLUMNS = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS)
# They are made ready from rows that can be read again, and those of a stream are gone.
NO_IMAGES = "prompts with images cannot be streamed: load the dataset without streaming"
FIRST_ROWS = 32  # looked at before the training: columns, fingerprint, a pair for the check of the layout


class TokenStream:
    """Token pairs of an `IterableDataset` in global batches, without end.

    A pair's index is its number in the stream, over all epochs.

    Args:
        rows: the source, in any shape of `orpo_ds.data.preference`; the same on every rank.
        processing_class: the tokenizer, or the processor for text.
        options: limits and model kind.
        unusable: stop at a row that cannot be used, or pass it over with a warning.
        global_batch_size: pairs of one optimizer step, over all ranks.
        seed: of the order.
        block_rows: rows that are held and shuffled among each other, see `RowStream`.
        shuffle: False keeps the source's order.
        steps: of the whole run, which is the only epoch that a stream knows (as in transformers).

    Attributes:
        global_batch_size: as above; a resumed run sets it before it reads.
        example: one of its pairs.
        fingerprint: hash of the first rows, the tokenizer and the options.
        refused: reason -> how many rows could not be used so far.
        row_numbers: index of a pair that is held -> number of its row in its epoch.

    Raises:
        ValueError: no rows, no such columns, or no usable row among the first.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        *,
        processing_class: ProcessingClass,
        options: TokenizeOptions,
        unusable: Literal["error", "drop"],
        global_batch_size: int,
        seed: int,
        block_rows: int,
        shuffle: bool = True,
        steps: int,
    ) -> None:
        self.steps_per_epoch = steps
        self._processing_class = processing_class
        self._options = options
        self._unusable = unusable
        self.global_batch_size = global_batch_size
        self.refused: dict[str, int] = {}
        self.row_numbers: dict[int, int] = {}
        self._pairs: dict[int, TokenPair] = {}
        self._count = 0  # pairs read so far
        self._positions: dict[int, StreamPosition] = {}  # by the number of batches before it
        self._next_step = self._released = 0

        rows = rows.with_format(None)
        first = _first_rows(rows)
        self.images: ImageInputs | None = None
        processor = processing_class if isinstance(processing_class, ProcessorMixin) else None
        check_images([], processor=processor, options=options)
        self.example = self._example(first)
        parts = [hash_rows(first), processing_hash(processing_class), asdict(options), block_rows, shuffle]
        self.fingerprint = "stream:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self._rows = RowStream(rows, columns=COLUMNS, seed=seed, block_rows=block_rows, shuffle=shuffle)
        self._positions[0] = self._rows.position

    def __len__(self) -> int:
        raise TypeError("a dataset that is streamed has no length")

    def __getitem__(self, index: int) -> TokenPair:
        """A pair that has been read and not yet released."""
        return self._pairs[index]

    @property
    def lengths(self) -> TokenStream:
        """See `orpo_ds.data.feed.LengthsByPair`."""
        return self

    def of(self, pairs: Sequence[int]) -> PairLengths:
        """Lengths of pairs that have been read and not yet released."""
        held = [self._pairs[index] for index in pairs]
        return PairLengths(
            trunk=np.array([pair.trunk for pair in held], dtype=np.int32),
            chosen=np.array([len(pair.chosen) - pair.trunk for pair in held], dtype=np.int32),
            rejected=np.array([len(pair.rejected) - pair.trunk for pair in held], dtype=np.int32),
            chosen_start=np.array([pair.chosen_start for pair in held], dtype=np.int32),
            image_tokens=np.array([pair.image_tokens for pair in held], dtype=np.int32),
        )

    def pairs(self, step: int) -> list[int]:
        """Read the global batch of optimizer step `step`. Steps are asked for one after the other.

        Returns:
            Indices of its pairs.

        Raises:
            ValueError: a row cannot be used, under "error"; no row can, under "drop".
        """
        assert step == self._next_step, f"the stream is at step {self._next_step}, not {step}"
        batch: list[int] = []
        epoch = self._rows.position.epoch
        while len(batch) < self.global_batch_size:
            wanted = list(islice(self._rows, self.global_batch_size - len(batch)))
            numbers, rows = [number for number, _ in wanted], [row for _, row in wanted]
            for number, one in zip(numbers, self._tokenize(rows, numbers), strict=True):
                if isinstance(one, RowError):
                    self._pass_over(one)
                    continue
                self._pairs[self._count], self.row_numbers[self._count] = one, number
                batch.append(self._count)
                self._count += 1
            if not batch and self._rows.position.epoch > epoch + 1:
                raise ValueError(f"no row of the dataset can be used: {self.refused}")
        self._next_step += 1
        self._positions[self._next_step] = self._rows.position
        return batch

    def release(self, pairs: Sequence[int]) -> None:
        """Forget the batch that was read first; these are its pairs."""
        for index in pairs:
            del self._pairs[index], self.row_numbers[index]
        del self._positions[self._released]
        self._released += 1

    def position(self, step: int) -> dict[str, Any]:
        """The place before the batch of step `step`, which is the next one to be trained on, for `seek`."""
        return {"step": step, "rows": asdict(self._positions[step])}

    def seek(self, position: dict[str, Any]) -> None:
        """Go to a place that `position` returned, in this process or in another one.

        Raises:
            ValueError: the source has other rows there than it had then.
        """
        place = StreamPosition(**position["rows"])
        self._rows.seek(place)
        self._pairs.clear()
        self.row_numbers.clear()
        self._next_step = self._released = position["step"]
        self._count = self._next_step * self.global_batch_size
        self._positions = {self._next_step: place}

    def _tokenize(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[TokenPair | RowError]:
        tokenized = tokenize_rows(
            rows, numbers=numbers, processing_class=self._processing_class, options=self._options
        )
        for number, one in zip(numbers, tokenized, strict=True):
            if isinstance(one, TokenPair) and one.images is not None:
                raise ValueError(f"{NO_IMAGES} (row {number})")
        return tokenized

    def _example(self, rows: Sequence[Row]) -> TokenPair:
        """The first pair; whatever keeps the rows before it from being used is told when they come up."""
        tokenized = self._tokenize(rows, range(len(rows)))
        for one in tokenized:
            if isinstance(one, TokenPair):
                return one
        raise ValueError(f"none of the first {len(rows)} rows can be used. {tokenized[0]}")

    def _pass_over(self, error: RowError) -> None:
        if self._unusable == "error":
            raise ValueError(
                f'{error}. Repair it, or leave such rows out with unusable_rows="drop"'
            ) from error
        before = self.refused.get(error.reason, 0)
        self.refused[error.reason] = before + 1
        if before == 0:
            logger.warning("Dropped: %s. More of this kind are dropped without a word", error)


def _first_rows(rows: datasets.IterableDataset) -> list[Row]:
    first = list(islice(readable(rows), FIRST_ROWS))
    if not first:
        raise ValueError("the dataset has no rows: nothing to train on. Check the files and the split")
    check_columns(list(first[0]))
    for name in IMAGE_COLUMNS:
        if name in first[0]:
            raise ValueError(f"{NO_IMAGES}, or remove the column {name!r} to train on the text alone")
    return [_known(row) for row in first]


def _known(row: Row) -> Row:
    return {name: row[name] for name in COLUMNS if name in row}


def read_whole(rows: datasets.IterableDataset, *, folder: Path) -> datasets.Dataset:
    """Read a stream to its end, into a file: an evaluation set, which is gone through many times.

    Args:
        rows: a source that ends.
        folder: where the file is kept, under a name made of its content.

    Raises:
        ValueError: no rows, or no such columns.
    """
    rows = rows.with_format(None)
    _first_rows(rows)
    digest = hashlib.sha256()
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    unfinished = unfinished_folder("rows", within=folder)
    try:
        written = unfinished / "rows.arrow"
        with ArrowWriter(path=str(written)) as writer:
            source = readable(rows)
            while block := [_known(row) for row in islice(source, BLOCK_ROWS)]:
                digest.update(hash_rows(block).encode())
                for row in block:
                    writer.write(row)
            writer.finalize()
        kept = folder / f"{digest.hexdigest()}.arrow"
        written.rename(kept)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    saved = datasets.Dataset.from_file(str(kept))
    # The name of the content is the same for every process, so that one of them tokenises for all.
    return datasets.Dataset(saved.data, info=saved.info, fingerprint=digest.hexdigest())
