"""The events of a short training, reported to W&B; started by test_wandb.py in a process of its own.

python -m tests.monitor.wandb_run OUTPUT FIRST_STEP LAST_STEP ENDING [--hub_token X]

ENDING: `whole` (a table, and the model as an artifact), `failing` (an exception), or `node` (as another node's run).
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from orpo_ds.monitor.report import failures_reported, log_table, reporting_callbacks
from orpo_ds.monitor.wandb import FINAL_MODEL, NodeRun, OrpoWandbCallback


def main(output_dir: str, first: int, last: int, ending: str, hub_token: str) -> None:
    args = TrainingArguments(
        output_dir=output_dir, report_to=["wandb"], run_name="a-name", hub_token=hub_token, learning_rate=3e-6
    )
    facts = {"dataset_fingerprint": "0123abcd", "token": hub_token}
    callbacks = reporting_callbacks(args, output_dir=output_dir, facts=lambda: facts)
    if ending == "node":
        node = NodeRun(node="node1", group="a-name-0123", is_main=False)
        callbacks = [OrpoWandbCallback(output_dir, facts=lambda: facts, node_run=node)]
    handler = CallbackHandler(callbacks, None, None, None, None)
    state = TrainerState(global_step=first, max_steps=last, is_world_process_zero=ending != "node")
    control = TrainerControl()
    with failures_reported(handler):
        handler.on_train_begin(args, state, control)
        for step in range(first + 1, last + 1):
            state.global_step = step
            handler.on_log(args, state, control, logs={"loss": 1 / step, "eval_loss": 2 / step})
        if ending == "failing":
            raise RuntimeError(f"the disk is full, and the token is {hub_token}")
        log_table(handler, state, name="answers", columns=["prompt", "answer"], rows=[["2 + 2?", "four"]])
        if ending == "whole":
            (Path(output_dir) / FINAL_MODEL).mkdir()
            (Path(output_dir) / FINAL_MODEL / "model.safetensors").write_bytes(b"weights")
        handler.on_train_end(args, state, control)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[6])
