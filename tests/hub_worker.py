"""Runs that push to a hub, on two ranks under ZeRO-3; `tests/test_hub.py` looks at what arrived.

    HF_ENDPOINT=... deepspeed --num_accelerators 2 --module tests.hub_worker FOLDER

The hub is `tests/hub_server.py`, in the test's process; what only this process can see goes to FOLDER/results.pt.
"""

import logging
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from transformers import TrainerCallback

from orpo_ds import ORPOTrainer, distributed
from orpo_ds.export import full_state
from orpo_ds.hub import HubPushError
from tests import small_runs
from tests.hub_server import TOKEN

STEPS, SAVE_STEPS = 4, 2
STRATEGIES = ("every_save", "checkpoint", "all_checkpoints")  # and "end", in `pushed_by_hand`
UNKNOWN_TOKEN = "hf_NobodyKnowsThisTokenAtAll0000"


class Heard(logging.Handler):
    """Warnings and errors of `orpo_ds.hub`, as the log of the main process has them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("orpo_ds.hub").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def taken(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


heard = Heard()


def switch(name: str, *, on: bool) -> None:
    """Turn a switch of the hub, on all ranks' behalf."""
    if distributed.is_main():
        url = f"{constants.ENDPOINT}/switch/{name}/{'on' if on else 'off'}"
        urllib.request.urlopen(urllib.request.Request(url, method="POST")).close()
    distributed.gather_objects(None)


def trainer(folder: Path, **changes: Any) -> ORPOTrainer:
    fields: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "learning_rate": 0.05,
        "optim": "sgd",
        "deepspeed": "zero3",
        "push_to_hub": True,
        "hub_token": TOKEN,
    }
    return small_runs.trainer(folder, pairs=2 * STEPS, **fields | changes)


def strategy(name: str, folder: Path) -> dict[str, Any]:
    """One of `hub_strategy`; W&B looks on at one of them, since it writes down what it sees of the settings."""
    run = trainer(
        folder / name,
        hub_model_id=f"user/{name}",
        hub_strategy=name,
        hub_always_push=True,
        report_to="wandb" if name == "checkpoint" else "none",
    )
    run.train()
    return {"parameters": full_state(run.model)}


def pushed_by_hand(folder: Path) -> dict[str, Any]:
    """`hub_strategy="end"`, the name from `output_dir`, a private repository, a branch, the card's own words."""
    run = trainer(folder / "by-hand", hub_strategy="end", hub_private_repo=True, hub_revision="v2")
    run.train()
    run.save_model(_internal_call=True)
    before = distributed.gather_objects(
        sorted(HfApi(token=TOKEN).list_repo_files("user/by-hand", revision="v2"))
    )
    commit = run.push_to_hub("by hand", dataset_name="user/pairs", tags=["mine"])
    run.create_model_card(model_name="Another name")
    later = run.push_to_hub("later", blocking=False)
    if isinstance(later, Future):
        later.result()
    return {
        "files_before": before,
        "answers": distributed.gather_objects((commit is None, later is None)),
        "parameters": full_state(run.model),
    }


def resumed(folder: Path) -> dict[str, Any]:
    """`last-checkpoint/` of the hub is a checkpoint like any other."""
    copy = folder / f"downloaded-{distributed.rank()}"
    snapshot_download("user/checkpoint", local_dir=copy, token=TOKEN)
    (copy,) = set(distributed.gather_objects(copy)) - {folder / "downloaded-1"}
    longer = trainer(folder / "resumed", max_steps=STEPS + 1, push_to_hub=False, save_strategy="no")
    longer.train(resume_from_checkpoint=str(copy / "last-checkpoint"))
    return {"steps": [entry["step"] for entry in longer.state.log_history if "loss" in entry]}


class AtTheEnd(TrainerCallback):
    """Sees what the hub has when the last step is done, and lets it go on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.files: list[str] | None = None

    def on_train_end(self, *unused: Any, **also: Any) -> None:
        self.files = HfApi(token=TOKEN).list_repo_files(self.name)
        switch("hold", on=False)


def held(folder: Path, *, always: bool) -> dict[str, Any]:
    """A hub that takes no commit before the training has ended; with a README.md that somebody has written."""
    name = "always" if always else "busy"
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "README.md").write_text("Mine.\n")
    end = AtTheEnd(f"user/{name}")
    switch("hold", on=True)
    run = trainer(folder / name, hub_model_id=f"user/{name}", hub_always_push=always, callbacks=[end])
    run.train()
    return {"files_at_the_end": end.files, "heard": heard.taken()}


def refused(folder: Path) -> dict[str, Any]:
    """A token that may no longer write, from the first save on."""
    run = trainer(folder / "refused", hub_model_id="user/refused")
    switch("refuse", on=True)
    run.train()
    during = heard.taken()
    run.save_model()
    saved = heard.taken()
    try:
        run.push_to_hub()
        raised = ""
    except HubPushError as error:
        raised = str(error)
    switch("refuse", on=False)
    return {
        "steps": run.state.global_step,
        "during": during,
        "saved": saved,
        "raised": distributed.gather_objects(raised),
    }


def down(folder: Path) -> dict[str, Any]:
    """A hub that does not answer from before the start; it is back for the last push."""
    switch("down", on=True)

    class Back(TrainerCallback):
        def on_train_end(self, *unused: Any, **also: Any) -> None:
            switch("down", on=False)

    run = trainer(folder / "down", hub_model_id="user/down", callbacks=[Back()])
    run.train()
    return {"steps": run.state.global_step, "heard": heard.taken()}


def wrong_token(folder: Path) -> dict[str, Any]:
    try:
        trainer(folder / "wrong", hub_token=UNKNOWN_TOKEN, hub_model_id="user/wrong")
        raised = ""
    except ValueError as error:
        raised = str(error)
    return {"raised": distributed.gather_objects(raised)}


def main(folder: Path) -> None:
    """Run every part and write what was seen."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        **{name: lambda name=name: strategy(name, folder) for name in STRATEGIES},
        "by_hand": lambda: pushed_by_hand(folder),
        "resumed": lambda: resumed(folder),
        "busy": lambda: held(folder, always=False),
        "always": lambda: held(folder, always=True),
        "refused": lambda: refused(folder),
        "down": lambda: down(folder),
        "wrong_token": lambda: wrong_token(folder),
    }
    results = {name: part() for name, part in parts.items()}
    if distributed.is_main():
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
