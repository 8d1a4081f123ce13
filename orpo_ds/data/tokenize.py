r"""Preference text -> token pairs, and a whole dataset of them, tokenised once.

The ids are those of TRL's ORPO (`ORPOTrainer.tokenize_row`), where those are right:

* `prompt + response` is tokenised in one piece, and the response begins at the first token that the prompt on
  its own does not have. A tokenizer that merges over the border gives the merged token to the response.
* BOS stands once at the front if the tokenizer has one, whether or not the text brought it.
* EOS stands once at the end. TRL looks only at the last token and adds a second EOS to a turn of ChatML,
  which ends with `<|im_end|>\n`; here an EOS with nothing but white space behind it counts.
* Too long a pair is cut as `orpo_ds.data.truncate` says.

`tokenize_dataset` keeps its result under a key made of everything the ids depend on, so that a second start,
another rank or another job maps the same files into memory instead of tokenising again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import datasets
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from orpo_ds.data.image_inputs import ImageInputs
from orpo_ds.data.images import IMAGE_COLUMNS, has_image_parts
from orpo_ds.data.preference import (
    OPTIONAL_COLUMNS,
    REQUIRED_COLUMNS,
    Preference,
    RowError,
    check_columns,
    common_prefix_length,
    to_preference,
)
from orpo_ds.data.processing import ProcessingClass, processing_hash, tokenizer_of
from orpo_ds.data.token_dataset import FEATURES, PairLengths, TokenDataset, build_once
from orpo_ds.data.truncate import TokenizeOptions, TokenPair, truncate_pair
from orpo_ds.data.vision import Encoded, SeenImages, image_token, look_at

__all__ = [
    "PairLengths",
    "TokenDataset",
    "TokenPair",
    "TokenizeOptions",
    "cache_entry",
    "tokenize_dataset",
    "tokenize_pair",
    "tokenize_rows",
]

logger = logging.getLogger(__name__)

# The files of this package that decide the ids and how they are laid out on disk.
SOURCES = ("images.py", "preference.py", "token_dataset.py", "tokenize.py", "truncate.py", "vision.py")

# Rows a worker holds as Python lists at one time: 10^5 to 10^6 ids, enough for the tokenizer's threads.
MAP_BATCH_ROWS = 256
IMAGE_BATCH_ROWS = 16  # of a vision dataset: a batch is what is lost when a worker runs out of memory


def tokenize_pair(
    preference: Preference,
    *,
    processing_class: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    row_number: int,
) -> TokenPair:
    """Tokenise and truncate one pair.

    Raises:
        RowError: see `orpo_ds.data.truncate.truncate_pair`; also an empty response, or an id beyond
            `vocab_size`.
        ValueError: the tokenizer has no EOS token.
    """
    [encoded] = _encode([preference], processing_class=processing_class, options=options)
    return _assemble(encoded, processing_class=processing_class, options=options, row_number=row_number)


def tokenize_rows(
    rows: Sequence[Mapping[str, Any]] | datasets.Dataset,
    *,
    numbers: Sequence[int],
    processing_class: ProcessingClass,
    options: TokenizeOptions,
) -> list[TokenPair | RowError]:
    """Tokenise many rows at once: a fast tokenizer uses all cores for a long list of texts.

    Args:
        rows: in any shape of `orpo_ds.data.preference`. With a processor they are read one at a time, because the
            images of all may not fit into memory.
        numbers: of the rows, for messages.
        processing_class: the tokenizer, or the processor of rows with images.
        options: limits and model kind.

    Returns:
        For every row its pair, or why it cannot be used.

    Raises:
        ValueError: see `to_preference`; also a message with an image for a tokenizer.
    """
    tokenizer = tokenizer_of(processing_class)
    found: dict[int, TokenPair | RowError] = {}
    preferences: dict[int, Preference] = {}
    seen: dict[int, SeenImages] = {}
    for place, number in enumerate(numbers):
        try:
            if isinstance(processing_class, ProcessorMixin):
                preferences[place], seen[place] = look_at(
                    rows, place, processor=processing_class, row_number=number
                )
            else:
                preferences[place] = to_preference(
                    _without_images(rows[place], number), processing_class=processing_class, row_number=number
                )
        except RowError as error:
            found[place] = error
    encoded_rows = _encode(list(preferences.values()), processing_class=tokenizer, options=options)
    for place, encoded in zip(preferences, encoded_rows, strict=True):
        images = seen.get(place)
        try:
            pair = _assemble(
                encoded if images is None else images.expand(encoded),
                processing_class=tokenizer,
                options=options,
                row_number=numbers[place],
                whole_prompt=images is not None and images.prompt is not None,
            )
            found[place] = pair if images is None else images.note(pair)
        except RowError as error:
            found[place] = error
    return [found[place] for place in range(len(rows))]


def tokenize_dataset(
    rows: datasets.Dataset,
    *,
    processing_class: ProcessingClass,
    options: TokenizeOptions,
    unusable: Literal["error", "drop"],
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
) -> TokenDataset:
    """Tokenise all rows, or open what an earlier start made of them.

    Memory does not grow with the number of rows: ids go to Arrow files and lengths to .npy files, both
    memory-mapped. Processes that start together take turns at a file lock; one tokenises, the others open its
    files.

    Args:
        rows: a map-style dataset in any shape of `orpo_ds.data.preference`; other columns are ignored.
        processing_class: the tokenizer; or the processor, and then rows may have images.
        options: limits and model kind.
        unusable: refuse the dataset when it has rows that cannot be used, or drop them with a warning. Both
            count them by reason.
        cache_dir: where to keep the result; default `orpo_ds` inside the cache of `datasets`.
        num_proc: processes to tokenise with.

    Raises:
        ValueError: no rows, no such columns, unusable rows under "error", no usable row at all, no chat
            template for conversations, no EOS token, or text that is not UTF-8; images for a tokenizer.
    """
    if not isinstance(rows, datasets.Dataset):
        raise ValueError(
            f"the dataset must be a datasets.Dataset with a length, got {type(rows).__name__}: load one "
            "split, without streaming"
        )
    check_columns(rows.column_names)
    if len(rows) == 0:
        raise ValueError("the dataset has no rows: nothing to train on. Check the file and the split")
    processor = processing_class if isinstance(processing_class, ProcessorMixin) else None
    check_images(rows.column_names, processor=processor, options=options)
    if not options.is_encoder_decoder:
        _eos_token_id(tokenizer_of(processing_class))
    entry = cache_entry(rows, processing_class=processing_class, options=options, cache_dir=cache_dir)
    wanted = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS, *(IMAGE_COLUMNS if processor is not None else ()))
    known = [name for name in wanted if name in rows.column_names]
    rows = rows.select_columns(known).with_format(None)
    given = rows if processor is None else rows.select_columns(["chosen"])  # `map` would decode all images

    def tokenize_into(folder: Path) -> datasets.Dataset:
        try:
            return given.map(
                _TokenizeBatch(processing_class, options, rows=rows),
                with_indices=True,
                batched=True,
                batch_size=MAP_BATCH_ROWS if processor is None else IMAGE_BATCH_ROWS,
                remove_columns=given.column_names,
                features=FEATURES,
                cache_file_name=str(folder / "pairs.arrow"),
                load_from_cache_file=False,
                new_fingerprint=entry.name,
                num_proc=num_proc,
                desc="Tokenising",
            )
        except UnicodeDecodeError as error:  # Arrow takes any bytes for text until they are read
            raise ValueError(f"the dataset has text that is not UTF-8: {error}. Convert its files") from error

    tokenized = build_once(entry, tokenize_into)
    _report_unusable(tokenized, unusable=unusable, num_rows=len(rows))
    if processor is not None and tokenized.lengths.image_tokens.any():
        tokenized.images = ImageInputs(
            rows, tokenized.row_numbers, tokenized.lengths.image_tokens, processor=processor
        )
    return tokenized


def check_images(
    columns: Sequence[str], *, processor: ProcessorMixin | None, options: TokenizeOptions
) -> None:
    """Refuse images that nobody would look at, and processors that cannot be read with.

    Raises:
        ValueError: image columns for a tokenizer; a processor that names no image token; an encoder-decoder model.
    """
    if processor is None:
        images = [name for name in IMAGE_COLUMNS if name in columns]
        if images:
            raise ValueError(
                f"the dataset has images in the column {images[0]!r}, and processing_class is a tokenizer. Pass the "
                f"model's processor (AutoProcessor), or rows.remove_columns({images}) to train on the text alone"
            )
        return
    image_token(processor)
    if options.is_encoder_decoder:
        raise ValueError("images are read by decoder-only models here, and this one is an encoder-decoder")


def _without_images(row: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    if has_image_parts(row):
        raise ValueError(
            f"row {number} has an image in a message, and processing_class is a tokenizer. Pass the model's processor "
            "(AutoProcessor)"
        )
    return row


def cache_entry(
    rows: datasets.Dataset,
    *,
    processing_class: ProcessingClass,
    options: TokenizeOptions,
    cache_dir: str | Path | None = None,
) -> Path:
    """Folder of the token pairs of `rows`, whether it is there or not: a hash of all that the ids depend on.

    The fingerprint of `datasets` stands for the rows (content in memory, or files with their time of change,
    and every transform since). The files of this package that make ids or their files are hashed themselves,
    so that nobody has to remember to raise a version.
    """
    root = Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "orpo_ds"
    parts = {
        "rows": rows._fingerprint,
        "tokenizer": processing_hash(processing_class),
        "options": asdict(options),
        "code": [Path(__file__).with_name(source).read_text() for source in SOURCES],
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    return root / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class _TokenizeBatch:
    """What `Dataset.map` runs: a batch of rows -> columns of `FEATURES`, a line for every row."""

    def __init__(
        self, processing_class: ProcessingClass, options: TokenizeOptions, *, rows: datasets.Dataset
    ) -> None:
        self.processing_class = processing_class
        self.options = options
        self.rows = rows

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows: Any = self.rows.select(indices)
        if not isinstance(self.processing_class, ProcessorMixin):
            rows = [{name: values[place] for name, values in batch.items()} for place in range(len(indices))]
        tokenized = tokenize_rows(
            rows, numbers=indices, processing_class=self.processing_class, options=self.options
        )
        lines = [_refused_line(one) if isinstance(one, RowError) else _line(one) for one in tokenized]
        return {name: [line[name] for line in lines] for name in FEATURES}


def _line(pair: TokenPair) -> dict[str, Any]:
    # The trunk is stored once.
    return {
        "chosen": pair.chosen,
        "rejected_branch": pair.rejected[pair.trunk :],
        "chosen_start": pair.chosen_start,
        "rejected_start": pair.rejected_start,
        "trunk": pair.trunk,
        "image_tokens": pair.image_tokens,
        "images": pair.images,
        "reason": None,
        "detail": None,
    }


def _refused_line(error: RowError) -> dict[str, Any]:
    return {
        "chosen": [],
        "rejected_branch": [],
        "chosen_start": 0,
        "rejected_start": 0,
        "trunk": 0,
        "image_tokens": 0,
        "images": None,
        "reason": error.reason,
        "detail": error.detail,
    }


def _encode(
    preferences: Sequence[Preference], *, processing_class: PreTrainedTokenizerBase, options: TokenizeOptions
) -> list[Encoded]:
    """Run the tokenizer over many pairs at once: a fast one uses all cores for a long list of texts."""
    if not preferences:
        return []
    prompts = [preference.prompt for preference in preferences]
    if options.is_encoder_decoder:
        limit = options.max_completion_length
        cut = {"truncation": True, "max_length": limit} if limit is not None else {}
        prompt_ids = processing_class(prompts, add_special_tokens=True, verbose=False)["input_ids"]
        responses = [p.chosen for p in preferences] + [p.rejected for p in preferences]
        response_ids = processing_class(responses, add_special_tokens=True, verbose=False, **cut)["input_ids"]
    else:
        prompt_ids = processing_class(prompts, add_special_tokens=False, verbose=False)["input_ids"]
        responses = [p.prompt + p.chosen for p in preferences] + [p.prompt + p.rejected for p in preferences]
        response_ids = processing_class(responses, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(preferences)
    return list(zip(prompt_ids, response_ids[:count], response_ids[count:], strict=True))


def _assemble(
    encoded: Encoded,
    *,
    processing_class: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    row_number: int,
    whole_prompt: bool = False,
) -> TokenPair:
    """From ids as the tokenizer gave them to a pair that is complete, cut and checked."""
    prompt, chosen, rejected = encoded
    if options.is_encoder_decoder:
        head = int(bool(prompt) and prompt[0] == processing_class.bos_token_id)
        tail = int(len(prompt) > head and prompt[-1] == processing_class.eos_token_id)
        chosen_start = rejected_start = len(prompt)
        chosen, rejected = prompt + chosen, prompt + rejected
    else:
        chosen, chosen_start = _decoder_sequence(prompt, chosen, "chosen", processing_class, row_number)
        rejected, rejected_start = _decoder_sequence(
            prompt, rejected, "rejected", processing_class, row_number
        )
        head, tail = int(processing_class.bos_token_id is not None), 0
    pair = truncate_pair(
        chosen,
        rejected,
        chosen_start=chosen_start,
        rejected_start=rejected_start,
        head=head,
        tail=tail,
        options=options,
        row_number=row_number,
        whole_prompt=whole_prompt,
    )
    if options.vocab_size is not None:
        highest = max(max(pair.chosen), max(pair.rejected))
        if highest >= options.vocab_size:
            raise RowError(
                reason="id_beyond_vocabulary",
                row=row_number,
                detail=f"token id {highest} ({processing_class.convert_ids_to_tokens(highest)!r}) has no row "
                f"in an embedding of {options.vocab_size}: resize it, or use the model's own tokenizer",
            )
    return pair


def _decoder_sequence(
    prompt: list[int],
    full: list[int],
    name: str,
    processing_class: PreTrainedTokenizerBase,
    row_number: int,
) -> tuple[list[int], int]:
    """Ids of prompt + response with BOS and EOS, and where the response begins.

    TRL puts the border at len(prompt), or one before it when the prompt's ids changed. The length of what
    they share is the same number then, and is still right when a merge changed more than one token.
    """
    start = common_prefix_length(prompt, full)
    if start == len(full):
        raise RowError(reason="empty_response", row=row_number, detail=f"{name} has text but no tokens")
    if not _ends_with_eos(full[start:], processing_class):
        full = [*full, _eos_token_id(processing_class)]
    bos = processing_class.bos_token_id
    if bos is not None and (start == 0 or full[0] != bos):
        return [bos, *full], start + 1
    return full, start


def _ends_with_eos(response: list[int], processing_class: PreTrainedTokenizerBase) -> bool:
    """Whether a response already ends its turn: an EOS with at most white space behind it."""
    eos = _eos_token_id(processing_class)
    if eos not in response:
        return False
    behind = response[len(response) - response[::-1].index(eos) :]
    text = processing_class.decode(behind)
    assert isinstance(text, str)
    return not text.strip()


def _eos_token_id(processing_class: PreTrainedTokenizerBase) -> int:
    eos = processing_class.eos_token_id
    if not isinstance(eos, int):
        raise ValueError(
            f"the tokenizer {processing_class.name_or_path!r} has no EOS token, so the model could not learn "
            "to stop. Set tokenizer.eos_token"
        )
    return eos


def _report_unusable(tokenized: TokenDataset, *, unusable: Literal["error", "drop"], num_rows: int) -> None:
    """Refuse or announce the rows that were left out, counted by reason with their numbers."""
    if not tokenized.refused:
        return
    count = sum(len(numbers) for numbers in tokenized.refused.values())
    reasons = "\n".join(
        f"  {reason}: {len(numbers)} (row {_first_numbers(numbers)}). {tokenized.example_details[reason]}"
        for reason, numbers in tokenized.refused.items()
    )
    summary = f"{count} of {num_rows} rows cannot be used (rows count from 0):\n{reasons}"
    if count == num_rows:
        raise ValueError(f"no row of the dataset can be used. {summary}")
    if unusable == "error":
        raise ValueError(f'{summary}\nRepair them, or leave them out with unusable_rows="drop"')
    logger.warning("Dropped: %s", summary)


def _first_numbers(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:10])
    return shown + (", …" if len(numbers) > 10 else "")
