"""Counts the collectives of one training step under each ZeRO stage.

deepspeed --num_accelerators 2 --module tests.distributed.collectives_worker FOLDER
"""

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from orpo_ds import distributed
from tests import small_runs
from tests.collectives import Collectives

COUNTED_STEP = 3  # ZeRO-3 learns in the first step what to fetch ahead, and checks that in the second
TOKENS_OF_SEVERAL = 130  # micro-batches of one pair or two, so several a step
FREE = {"stage": 3, "stage3_param_persistence_threshold": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"stage": stage} for stage in range(3)},
    "zero3": FREE,
    # What a model does that is larger than `stage3_max_live_parameters` (1e9): forward lets go, backward gathers again.
    "zero3, let go": {**FREE, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0},
}


class OneStep(TrainerCallback):
    """Watches one step from its beginning to its end."""

    def __init__(self) -> None:
        self.seen = Collectives()
        self.micro_steps = 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == COUNTED_STEP - 1:
            self.seen.__enter__()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.micro_steps += state.global_step == COUNTED_STEP - 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == COUNTED_STEP:
            self.seen.__exit__(None, None, None)


def main(folder: Path) -> None:
    """Write `counted.json`: `steps`, a list of setting, micro-steps and calls; `parameters`, sizes of the model's."""
    steps: list[dict[str, Any]] = []
    for number, (name, max_tokens) in enumerate(itertools.product(SETTINGS, (None, TOKENS_OF_SEVERAL))):
        watch = OneStep()
        trainer = small_runs.trainer(
            folder / str(number),
            max_steps=COUNTED_STEP,
            max_tokens_per_micro_batch=max_tokens,
            deepspeed={"zero_optimization": SETTINGS[name]},
            callbacks=[watch],
        )
        trainer.train()
        calls = [dataclasses.asdict(call) for call in watch.seen.calls]
        steps.append({"setting": name, "micro_steps": watch.micro_steps, "calls": calls})
    sizes = [parameter.numel() for parameter in small_runs.model_of().parameters()]
    if distributed.is_main():
        (folder / "counted.json").write_text(json.dumps({"steps": steps, "parameters": sizes}))


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
