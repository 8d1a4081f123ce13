"""Start-up on a million cached rows: seconds and memory until the first batch's ids are there.

    python benchmarks/startup.py [--rows 1000000] [--against 10000] [--rounds 3] [--folder DIR]

Fresh processes do what every start of a training does whose data was tokenised before: import, load the tokenizer,
open the rows and their token pairs, order the first epoch, read the first batch. The same with fewer rows tells
what of it grows. The claims: under 10 s at a million, and memory flat.

Tokenising a million rows takes many minutes and is not what is measured, so the cache is filled with the ids of a
few pairs, repeated, as long as those of real pairs: at a million rows 3 GB, in the same files that tokenising writes.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

STARTED = time.perf_counter()
REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

BATCH = 128  # pairs
SECONDS = ("imports", "tokenizer", "rows", "token pairs", "first batch", "total")
MEMORY = {"own MiB": "RssAnon", "peak MiB": "VmHWM"}  # lines of /proc/self/status
# Means of dpo_en_demo.jsonl with Qwen2's tokenizer and a cap of 1,024 tokens (shared/data/README.md).
PROMPT, CHOSEN, REJECTED = 347, 220, 235
REPEATED = 1000  # pairs


def main() -> None:
    """Measure and print the table."""
    options = _options()
    if options.start_with is not None:
        print(json.dumps(_start(options.start_with)))
        return
    counts = (options.against, options.rows)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        few, many = (_measure(Path(folder) / str(count), count, options.rounds) for count in counts)
    print(f"{'':14}{options.against:>12,} rows{options.rows:>12,} rows{'ratio':>10}")
    for name in SECONDS:
        print(f"{name + ', s':14}{few[name]:>17.2f}{many[name]:>17.2f}{many[name] / few[name]:>10.2f}")
    for name in MEMORY:
        print(f"{name:14}{few[name]:>17.0f}{many[name]:>17.0f}{many[name] / few[name]:>10.2f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Start-up on a million cached rows.")
    parser.add_argument("--rows", type=int, default=1_000_000, help=f"a multiple of {REPEATED}")
    parser.add_argument("--against", type=int, default=10_000, help="rows of the smaller dataset")
    parser.add_argument("--rounds", type=int, default=3, help="starts to take the median of")
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--start-with", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(folder: Path, count: int, rounds: int) -> dict[str, float]:
    """Medians of seconds and MiB over several starts with a full cache."""
    _fill_cache(folder, count)
    command = [sys.executable, __file__, "--start-with", str(folder)]
    starts = [
        json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) for _ in range(rounds)
    ]
    return {name: median(start[name] for start in starts) for name in (*SECONDS, *MEMORY)}


def _fill_cache(folder: Path, count: int) -> None:
    """A JSONL file of `count` pairs, its rows in the cache of `datasets`, and token pairs in that of orpo_ds."""
    import datasets

    from orpo_ds.data.load import load_rows
    from orpo_ds.data.token_dataset import FEATURES, build_once
    from orpo_ds.data.tokenize import TokenizeOptions, cache_entry
    from tests.real_tokenizers import tokenizer

    folder.mkdir()
    tokenizer("smollm2").save_pretrained(folder / "tokenizer")
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(count):
            pair = {"prompt": f"What is {number} times two?", "chosen": f" {2 * number}", "rejected": " 7"}
            file.write(json.dumps(pair) + "\n")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    rows = load_rows(str(folder / "pairs.jsonl"), split="train")
    lines = datasets.Dataset.from_list(
        [
            {
                "chosen": [number % 49_152] * (PROMPT + CHOSEN),
                "rejected_branch": [number % 49_152 + 1] * REJECTED,
                "chosen_start": PROMPT,
                "rejected_start": PROMPT,
                "trunk": PROMPT,
                "image_tokens": 0,
                "images": None,
                "reason": None,
                "detail": None,
            }
            for number in range(REPEATED)
        ],
        features=FEATURES,
    )

    def repeat_into(unfinished: Path) -> datasets.Dataset:
        path = str(unfinished / "pairs.arrow")
        with datasets.arrow_writer.ArrowWriter(features=FEATURES, path=path) as writer:
            for _ in range(count // REPEATED):
                writer.write_table(lines.data.table)
            writer.finalize()
        return datasets.Dataset.from_file(path)

    entry = cache_entry(rows, processing_class=tokenizer("smollm2"), options=TokenizeOptions())
    build_once(entry, repeat_into)


def _start(folder: Path) -> dict[str, float]:
    """What a training does before its first step, apart from the model; seconds of each part."""
    marks = [STARTED]

    import datasets
    from transformers import AutoTokenizer

    from orpo_ds.data.batches import GlobalBatches
    from orpo_ds.data.load import load_rows
    from orpo_ds.data.tokenize import TokenizeOptions, tokenize_dataset

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    marks.append(time.perf_counter())
    processing_class = AutoTokenizer.from_pretrained(folder / "tokenizer")
    marks.append(time.perf_counter())
    rows = load_rows(str(folder / "pairs.jsonl"), split="train")
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

    # The ids are those that were put there: nothing was tokenised.
    assert all(len(pair.chosen) == PROMPT + CHOSEN for pair in first)
    parts = [end - begin for begin, end in itertools.pairwise(marks)]
    return {**dict(zip(SECONDS, [*parts, marks[-1] - STARTED], strict=True)), **_memory()}


def _memory() -> dict[str, float]:
    """MiB of this process: its own, and the most it ever had with the pages of mapped files that it touched.

    The kernel may take those pages back, and ranks of one node share them. Not `getrusage`: its maximum outlives
    exec, and so would be that of the process that filled the cache.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[key].split()[0]) / 1024 for name, key in MEMORY.items()}


if __name__ == "__main__":
    main()
