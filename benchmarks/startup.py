"""Start-up on a million cached rows: seconds and memory until the first batch's ids are there.

    python benchmarks/startup.py [--rows 1000000] [--against 10000] [--rounds 3] [--folder DIR]

A JSONL file of short pairs is written and tokenised once. Then fresh processes do what every later start of a
training does: import, load the tokenizer, open the rows and their token pairs, order the first epoch, read the first
batch. The same with fewer rows tells what of it grows. The claims: under 10 s at a million, and memory flat.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

STARTED = time.perf_counter()
REPOSITORY = Path(__file__).resolve().parent.parent
BATCH = 128  # pairs
SECONDS = ("imports", "tokenizer", "rows", "token pairs", "first batch", "total")


def main() -> None:
    """Measure and print the table."""
    options = _options()
    if options.start_with is not None:
        print(json.dumps(_start(options.start_with)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _save_tokenizer(Path(folder) / "tokenizer")
        measured = {
            count: _measure(Path(folder), count, options.rounds) for count in (options.against, options.rows)
        }
    few, many = measured[options.against], measured[options.rows]
    print(f"{'':14}{options.against:>12,} rows{options.rows:>12,} rows{'ratio':>10}")
    for name in SECONDS:
        print(f"{name + ', s':14}{few[name]:>17.2f}{many[name]:>17.2f}{many[name] / few[name]:>10.2f}")
    name = "peak MiB"
    print(f"{name:14}{few[name]:>17.0f}{many[name]:>17.0f}{many[name] / few[name]:>10.2f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Start-up on a million cached rows.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--against", type=int, default=10_000, help="rows of the smaller dataset")
    parser.add_argument("--rounds", type=int, default=3, help="starts to take the median of")
    parser.add_argument(
        "--folder", type=Path, help="where to write (about 1 GB a million rows); default: temporary"
    )
    parser.add_argument("--start-with", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(folder: Path, count: int, rounds: int) -> dict[str, float]:
    """Median seconds of each part, and the largest peak, over several starts with a full cache."""
    data = folder / str(count)
    data.mkdir()
    with (data / "pairs.jsonl").open("w") as file:
        for number in range(count):
            row = {
                "prompt": f"Question {number}: why is the sky blue, and what is {number} times two?",
                "chosen": f" Blue light is scattered more than red light, and it is {2 * number}.",
                "rejected": f" It is painted, and it is {number}.",
            }
            file.write(json.dumps(row) + "\n")
    first = _run(data)
    print(f"{count:,} rows: {first['token pairs']:.0f} s to tokenise once", flush=True)
    starts = [_run(data) for _ in range(rounds)]
    result = {name: median(start[name] for start in starts) for name in SECONDS}
    return {**result, "peak MiB": max(start["peak MiB"] for start in starts)}


def _run(data: Path) -> dict[str, float]:
    """One start, in a process of its own."""
    command = [sys.executable, __file__, "--start-with", str(data)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])


def _save_tokenizer(folder: Path) -> None:
    sys.path.insert(0, str(REPOSITORY))
    from tests.real_tokenizers import tokenizer

    tokenizer("smollm2").save_pretrained(folder)


def _start(data: Path) -> dict[str, float]:
    """What a training does before its first step, apart from the model; seconds of each part."""
    marks = [STARTED]

    sys.path.insert(0, str(REPOSITORY))
    import datasets
    from transformers import AutoTokenizer

    from orpo_ds.data.batches import GlobalBatches
    from orpo_ds.data.load import load_rows
    from orpo_ds.data.tokenize import TokenizeOptions, tokenize_dataset

    datasets.config.HF_DATASETS_CACHE = data / "cache"
    marks.append(time.perf_counter())
    processing_class = AutoTokenizer.from_pretrained(data.parent / "tokenizer")
    marks.append(time.perf_counter())
    rows = load_rows(str(data / "pairs.jsonl"), split="train")
    marks.append(time.perf_counter())
    pairs = tokenize_dataset(
        rows, processing_class=processing_class, options=TokenizeOptions(), unusable="error"
    )
    marks.append(time.perf_counter())
    batches = GlobalBatches(
        num_pairs=len(pairs), global_batch_size=BATCH, seed=0, fingerprint=pairs.fingerprint
    )
    first = [pairs[index] for index in batches.pairs(0)]
    marks.append(time.perf_counter())

    assert len(first) == BATCH
    parts = [end - begin for begin, end in itertools.pairwise(marks)]
    # ru_maxrss is in KiB on Linux, and counts the pages of the mapped files that were touched.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**dict(zip(SECONDS, [*parts, marks[-1] - STARTED], strict=True)), "peak MiB": peak}


if __name__ == "__main__":
    main()
