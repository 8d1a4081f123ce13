"""The events of a short training, reported to W&B; started by test_wandb.py in a process of its own.

python -m tests.monitor.wandb_run OUTPUT FIRST_STEP LAST_STEP [--hub_token X]
"""

from __future__ import annotations

import sys

from transformers import TrainerControl, TrainerState, TrainingArguments

from orpo_ds.monitor.report import reporting_callbacks


def main(output_dir: str, first: int, last: int, hub_token: str) -> None:
    args = TrainingArguments(
        output_dir=output_dir, report_to=["wandb"], run_name="a name", hub_token=hub_token, learning_rate=3e-6
    )
    (callback,) = reporting_callbacks(
        args, output_dir=output_dir, facts=lambda: {"dataset_fingerprint": "0123abcd", "token": hub_token}
    )
    state, control = TrainerState(global_step=first), TrainerControl()
    callback.on_train_begin(args, state, control, model=None)
    for step in range(first + 1, last + 1):
        state.global_step = step
        callback.on_log(args, state, control, logs={"loss": 1 / step, "eval_loss": 2 / step})
    callback.on_train_end(args, state, control)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[5])
