"""One output folder, one run: a new run neither mixes with an older one's results nor overwrites them."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

from orpo_ds.checkpoint.ranks import Ranks, TogetherError, on_main
from orpo_ds.model_card import CARD_NAME, is_own_card
from orpo_ds.monitor.run_state import RUN_STATE_FILE

logger = logging.getLogger(__name__)

WANDB_RUN_FILES = "wandb_run*.json"
# What a run writes into its output folder. Everything else in there (run.yaml, notes, logs) is the user's.
RUN_PRODUCTS = (
    "metrics.jsonl",
    "metrics.superseded.jsonl",
    "checkpoint-*",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    WANDB_RUN_FILES,
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin*",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "*processor_config.json",
    "training_args.*",
    CARD_NAME,  # unless a person wrote it
)
NAMES_SHOWN = 5


def claim_output_dir(
    output_dir: str | Path,
    *,
    resume_from: Path | None,
    overwrite_output_dir: bool,
    started_before: bool = False,
    ranks: Ranks,
) -> None:
    """Make sure that `output_dir` is free for this run. Collective; makes the folder if need be.

    Args:
        output_dir: the run's output folder.
        resume_from: the checkpoint that this run continues (`resolve_resume`), None for a new run. If it lies
            in `output_dir`, what is there is this run's own.
        overwrite_output_dir: move an older run's results into `output_dir/previous-<time>` instead of
            refusing. Nothing is deleted, and files that no run writes stay where they are.
        started_before: what is there are the remains of this very run, which ended before its first checkpoint
            (`resume_from_checkpoint="auto"`): they are moved as well, and it keeps its W&B run.
        ranks: this rank and its collective.

    Raises:
        ValueError: on all ranks, when another run's results are there; names them.
    """
    output_dir = Path(output_dir)
    if resume_from is not None and resume_from.resolve().parent == output_dir.resolve():
        return
    try:
        on_main(ranks, lambda: _claim_on_main(output_dir, overwrite_output_dir, started_before))
    except TogetherError as error:
        raise ValueError(str(error)) from None


def _claim_on_main(output_dir: Path, overwrite_output_dir: bool, started_before: bool) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    found = sorted(
        path
        for path in {path for pattern in RUN_PRODUCTS for path in output_dir.glob(pattern)}
        if (path.name != CARD_NAME or is_own_card(path))
        and not (started_before and path.match(WANDB_RUN_FILES))
    )
    if not found:
        return
    if not (overwrite_output_dir or started_before):
        shown = ", ".join(path.name for path in found[:NAMES_SHOWN])
        more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds the results of another run ({shown}{more}). Continue that "
            "run with resume_from_checkpoint=True, choose another output_dir, or set "
            "overwrite_output_dir=True, which moves them to a sub-folder."
        )
    previous = output_dir / f"previous-{datetime.now():%Y%m%d-%H%M%S-%f}"
    previous.mkdir()
    state = output_dir / RUN_STATE_FILE  # alone, it is a run that left nothing, and no reason to refuse
    for path in [*found, *([state] if state.exists() else [])]:
        path.rename(previous / path.name)
    logger.warning("moved the results of an earlier run to %s", previous)
