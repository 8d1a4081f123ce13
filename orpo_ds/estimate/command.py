"""`orpo-ds estimate run.yaml --gpus 8x80GB --nodes 4`: what a run will need, before it has a machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from orpo_ds.cli import parse_train_arguments, read_yaml
from orpo_ds.config import ORPOConfig, ScriptArguments
from orpo_ds.data.tokenize import tokenize_dataset
from orpo_ds.deepspeed_json import read_deepspeed_config
from orpo_ds.estimate.hardware import Cluster, parse_cluster
from orpo_ds.estimate.plans import Estimate, Estimator
from orpo_ds.estimate.report import report
from orpo_ds.estimate.timing import EFFICIENCY
from orpo_ds.estimate.workload import Pairs
from orpo_ds.monitor.bars import of_libraries
from orpo_ds.script_data import load_script_rows
from orpo_ds.validate import tokenizing_of

WORST_LENGTH = 1024  # tokens, where the settings name no limit and there is no dataset


@dataclass(frozen=True)
class Answer:
    """What is to be known before a job is submitted.

    Attributes:
        own: the run as it is set.
        best: the fastest preset that fits; None if none does.
        text: all of it in words.
    """

    own: Estimate
    best: Estimate | None
    text: str

    @property
    def fits(self) -> bool:
        """Whether the run fits as it is set."""
        return self.own.fits


def estimate_run(
    words: Sequence[str], cluster: Cluster, *, efficiency: float = EFFICIENCY, precision_of_gpus: bool = True
) -> Answer:
    """Estimate a run without loading a weight or needing a GPU.

    Args:
        words: those of `orpo-ds train`: `--config run.yaml` and any flags.
        cluster: see `parse_cluster`.
        efficiency: share of the GPUs' peak that arithmetic reaches.
        precision_of_gpus: take bf16 where the settings leave it open, as a GPU would.

    Raises:
        ValueError: settings that `train` refuses as well, or a model whose config cannot be read.
    """
    words = [*words, "--bf16", "True"] if precision_of_gpus and _leaves_precision_open(words) else list(words)
    script, args = parse_train_arguments(words)
    pairs = lengths_of(script, args)
    estimator = Estimator(
        script.model_name_or_path, args, pairs=pairs, peft_config=script.peft_config(), efficiency=efficiency
    )
    own = estimator.own(cluster)
    best = estimator.fastest_that_fits(cluster)
    count = estimator.subject(recomputes=args.gradient_checkpointing).count
    trained = (
        "all of them trained" if count.trained == count.elements else f"{count.trained / 1e6:,.1f}M trained"
    )
    title = (
        f"{script.model_name_or_path}: {count.elements / 1e9:,.2f}B parameters, {trained}, "
        f"{str(estimator.dtype).removeprefix('torch.')}"
    )
    return Answer(own=own, best=best, text=report(own, best=best, about_pairs=pairs.about, title=title))


def run(words: Sequence[str]) -> bool:
    """Print the estimate of a run; returns whether it fits as it is set."""
    parser = argparse.ArgumentParser(
        prog="orpo-ds estimate",
        description="Memory, time and price of a run; further flags are those of train.",
    )
    parser.add_argument("config", nargs="?", help="YAML file of the run")
    parser.add_argument("--gpus", required=True, help="of one node: 8x80GB, 8x141GB or 8xH100")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument(
        "--network-gbit", type=float, help="Gbit/s between nodes for each GPU (default: the vendor's)"
    )
    parser.add_argument("--host-gb", type=float, help="GB of host memory of a node (default: the vendor's)")
    parser.add_argument("--usd-per-gpu-hour", type=float, help="price of a GPU (default: a list price)")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=EFFICIENCY,
        help="share of the peak that arithmetic reaches (default: %(default)s, Llama 3's)",
    )
    options, rest = parser.parse_known_args(list(words))
    cluster = parse_cluster(
        options.gpus,
        nodes=options.nodes,
        network_gbit=options.network_gbit,
        host_gb=options.host_gb,
        usd_per_gpu_hour=options.usd_per_gpu_hour,
    )
    if not 0 < options.efficiency <= 1:
        raise ValueError(f"--efficiency {options.efficiency}: give a share above 0 and up to 1.")
    config = [] if options.config is None else ["--config", options.config]
    answer = estimate_run([*config, *rest], cluster, efficiency=options.efficiency)
    print(answer.text)
    return answer.fits


def _leaves_precision_open(words: Sequence[str]) -> bool:
    """Whether neither the flags, nor the file, nor the DeepSpeed JSON say in which precision to train."""
    flags = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")]
    fields = dict.fromkeys(flags)
    for place, word in enumerate(words):
        if word.partition("=")[0] == "--config":
            path = word.partition("=")[2] or words[place + 1]
            fields |= read_yaml(path)
    if fields.keys() & {"bf16", "fp16", "deepspeed_config"}:
        return False
    source = fields.get("deepspeed")
    if source is None and "deepspeed" in fields:
        return True  # a flag: a contradiction is found when the settings are read
    precision = read_deepspeed_config(source)
    return all(precision.get(name, {}).get("enabled", "auto") == "auto" for name in ("bf16", "fp16"))


def lengths_of(script: ScriptArguments, args: ORPOConfig) -> Pairs:
    """Lengths of the run's dataset where it lies on this machine, else the worst that the settings permit."""
    local = script.dataset_name is not None and Path(script.dataset_name).expanduser().exists()
    if local and not (script.dataset_streaming or script.streaming):
        with of_libraries("Reading the dataset"):
            rows = load_script_rows(
                script, seed=args.seed if args.data_seed is None else args.data_seed, evaluates=False
            )
        assert isinstance(rows.train, datasets.Dataset)
        processing_class, options = tokenizing_of(script, args)
        with of_libraries("Tokenising"):
            tokens = tokenize_dataset(
                rows.train,
                processing_class=processing_class,
                options=options,
                unusable=args.unusable_rows,
                cache_dir=args.dataset_cache_dir,
                num_proc=args.dataset_num_proc,
            )
        return Pairs.of(tokens.lengths, about=f"{len(tokens):,} pairs of {script.dataset_name}")
    return Pairs.longest(args.max_length or WORST_LENGTH)
