"""A stream of token pairs: the ids of the dataset on disk, memory that does not grow, and its place found again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from orpo_ds.data.batches import CostModel
from orpo_ds.data.feed import Feed
from orpo_ds.data.packing import pack
from orpo_ds.data.token_stream import FIRST_ROWS, TokenStream, read_whole
from orpo_ds.data.tokenize import TokenizeOptions, tokenize_dataset
from tests import vision
from tests.parity.tokenizer import tiny_tokenizer
from tests.small_runs import rows

OPTIONS = TokenizeOptions(max_length=256, max_prompt_length=128)
COUNT, BATCH, BLOCK = 41, 4, 8
IDENTICAL = {"prompt": "a", "chosen": " b", "rejected": " b"}


def source(lines: list[dict[str, Any]] | None = None) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows(COUNT) if lines is None else lines))


def stream(of: IterableDataset | None = None, **changes: Any) -> TokenStream:
    settings: dict[str, Any] = {
        "processing_class": tiny_tokenizer(),
        "options": OPTIONS,
        "unusable": "error",
        "global_batch_size": BATCH,
        "seed": 0,
        "block_rows": BLOCK,
        "steps": 100,
    }
    return TokenStream(source() if of is None else of, **settings | changes)


def test_pairs_and_lengths_are_those_of_the_dataset_on_disk(tmp_path: Path) -> None:
    on_disk = tokenize_dataset(
        Dataset.from_list(rows(COUNT)),
        processing_class=tiny_tokenizer(),
        options=OPTIONS,
        unusable="error",
        cache_dir=tmp_path,
    )
    streamed = stream()
    for step in range(2 * COUNT // BATCH):
        pairs = streamed.pairs(step)
        numbers = [streamed.row_numbers[pair] for pair in pairs]
        assert pairs == list(range(step * BATCH, (step + 1) * BATCH))
        assert [streamed[pair] for pair in pairs] == [on_disk[number] for number in numbers]
        ours, theirs = streamed.lengths.of(pairs), on_disk.lengths.of(numbers)
        for name in ("trunk", "chosen", "rejected", "chosen_start"):
            assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()
        streamed.release(pairs)


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_batches_do_not_depend_on_the_ranks(world_size: int) -> None:
    """Each rank opens the stream for itself, reads ahead in a thread, and trains on its part."""
    plain = stream()
    expected = [[plain.row_numbers[pair] for pair in plain.pairs(step)] for step in range(12)]
    dealt: list[list[int]] = [[] for _ in expected]
    for rank in range(world_size):
        own = stream()
        feed = Feed(
            dataset=own,
            layout=lambda pairs, ids: pack(pairs, pair_ids=ids),
            padded=False,
            cost_model=CostModel(per_token=1.0, per_score=0.01, per_target=1.0),
            nll_on_prompt=True,
            rank=rank,
            world_size=world_size,
            max_tokens=300,
        )
        batches = (own.pairs(step) for step in range(len(expected)))
        for step, (plan, micro_batches) in enumerate(feed.steps(batches, device=torch.device("cpu"))):
            taken = [pair for batch in micro_batches for pair in batch.pair_ids]
            assert taken == [pair for group in plan.micro_batches for pair in group]
            dealt[step] += [own.row_numbers[pair] for pair in taken]
        assert own.row_numbers == {}, "what was trained on is let go"
    assert [sorted(step) for step in dealt] == [sorted(step) for step in expected]


def test_a_checkpoint_of_any_step_continues(tmp_path: Path) -> None:
    """Positions are taken while the stream has read further, as the background thread does."""
    whole, ahead = stream(), 3
    batches, positions = [], []
    for step in range(20):
        pairs = whole.pairs(step)
        batches.append([(whole.row_numbers[pair], whole[pair]) for pair in pairs])
        if step >= ahead:
            done = range((step - ahead) * BATCH, (step - ahead + 1) * BATCH)
            positions.append(json.dumps(whole.position(step - ahead + 1)))
            whole.release(done)
    for trained, position in enumerate(positions, start=1):
        resumed = stream()
        resumed.seek(json.loads(position))
        for step in range(trained, min(trained + 2, len(batches))):
            pairs = resumed.pairs(step)
            assert pairs[0] == step * BATCH
            assert [(resumed.row_numbers[pair], resumed[pair]) for pair in pairs] == batches[step]


def test_memory_does_not_grow(seed: int) -> None:
    read = 0

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal read
        for line in itertools.cycle(rows(30)):
            read += 1
            yield line

    streamed = stream(IterableDataset.from_generator(endless), seed=seed)
    for step in range(50):
        streamed.release(streamed.pairs(step))
        assert len(streamed.row_numbers) == 0
    assert read <= 50 * BATCH + BLOCK + FIRST_ROWS + 2
    with pytest.raises(KeyError):
        streamed[0]
    with pytest.raises(TypeError, match="no length"):
        len(streamed)


def test_unusable_rows_stop_the_stream_or_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    lines = rows(10)
    lines[3] = lines[7] = IDENTICAL
    refusing = stream(source(lines), shuffle=False)
    with pytest.raises(ValueError, match=r"row 3: .*identical_responses.*unusable_rows=\"drop\""):
        refusing.pairs(0)
    dropping = stream(source(lines), shuffle=False, unusable="drop")
    numbers = [dropping.row_numbers[pair] for step in range(4) for pair in dropping.pairs(step)]
    assert numbers == [0, 1, 2, 4, 5, 6, 8, 9] * 2
    assert dropping.refused == {"identical_responses": 4}
    assert caplog.text.count("row 3: chosen and rejected are the same text") == 1


def test_a_stream_of_nothing_but_unusable_rows_ends() -> None:
    with pytest.raises(ValueError, match=r"none of the first 5 rows can be used. row 0: .*identical"):
        stream(source([IDENTICAL] * 5), unusable="drop")
    with pytest.raises(ValueError, match=r"none of the first 32"):
        stream(source([IDENTICAL] * 40), unusable="drop")


def test_columns_and_emptiness_are_seen_at_once() -> None:
    with pytest.raises(ValueError, match="rename 'choosen' to 'chosen'"):
        stream(source([{"prompt": "a", "choosen": " b", "rejected": " c"}]))
    with pytest.raises(ValueError, match="has no rows"):
        stream(source([]))


def test_the_fingerprint_knows_rows_options_and_buffer() -> None:
    changed = rows(COUNT)
    changed[5]["chosen"] = [{"role": "assistant", "content": "Another."}]
    fingerprints = {
        stream(one, **settings).fingerprint
        for one, settings in (
            (source(), {}),
            (source(), {}),
            (source(changed), {}),
            (source(), {"options": TokenizeOptions(max_length=100)}),
            (source(), {"block_rows": 2 * BLOCK}),
            (source(), {"shuffle": False}),
        )
    }
    assert len(fingerprints) == 5


def test_a_stream_read_whole_is_the_dataset(tmp_path: Path) -> None:
    lines = rows(COUNT)
    extra = [{**line, "score": number} for number, line in enumerate(lines)]
    whole = read_whole(source(extra), folder=tmp_path)
    assert whole.to_list() == lines
    again = read_whole(source(lines), folder=tmp_path)
    assert again._fingerprint == whole._fingerprint
    assert len(list(tmp_path.iterdir())) == 1
    other = read_whole(source(lines[:-1]), folder=tmp_path)
    assert other._fingerprint != whole._fingerprint
    with pytest.raises(ValueError, match="has no rows"):
        read_whole(source([]), folder=tmp_path)


def test_images_are_not_streamed(tmp_path: Path) -> None:
    """In a column or inside a message, to train or to evaluate on; text for a processor is."""
    processor = vision.PROCESSORS["idefics3"]()
    columns = IterableDataset.from_generator(vision.rows, gen_kwargs={"count": 3})
    for attempt in (
        lambda: stream(columns, processing_class=processor),
        lambda: read_whole(columns, folder=tmp_path),
    ):
        with pytest.raises(ValueError, match="prompts with images cannot be streamed"):
            attempt()
    content = [{"type": "image", "image": vision.picture(1)}, {"type": "text", "text": "What?"}]
    inside = [{**row, "prompt": [{"role": "user", "content": content}]} for row in rows(COUNT)]
    with pytest.raises(ValueError, match=r"prompts with images cannot be streamed.* \(row 0\)"):
        stream(source(inside), processing_class=processor)
    text = stream(processing_class=processor)
    assert text.images is None
    assert text.example.chosen[0] == processor.tokenizer.bos_token_id
