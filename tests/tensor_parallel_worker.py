"""The same training whole on one rank and split over two pairs of ranks; `test_tensor_parallel.py` compares them.

    deepspeed --num_accelerators 4 --module tests.tensor_parallel_worker FOLDER

Each run trains into FOLDER/<name>; what was seen goes to FOLDER/results.pt, by name.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from orpo_ds import distributed
from orpo_ds.export import full_state
from tests import small_runs
from tests.tiny_models import tiny_model

SIZE = 2
STEPS = 3
GLOBAL_BATCH = 4
METRICS = ("loss", "nll_loss", "logps/chosen", "log_odds_chosen", "grad_norm", "num_input_tokens_seen")


@dataclass(frozen=True)
class Setting:
    """One way to train. A vocabulary that is odd leaves one rank a row more of it than the other."""

    name: str
    family: str = "qwen2"  # its head is tied
    vocab_size: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)


SETTINGS = [
    *(Setting(family, family) for family in ("llama", "qwen2", "qwen3", "mistral", "gemma3", "granite")),
    Setting("odd vocabulary", "llama", vocab_size=271),
    Setting("odd vocabulary, tied", "qwen2", vocab_size=271),
    Setting("zero1", changes={"deepspeed": "zero1"}),
    Setting("CPU offload", changes={"deepspeed": "zero2_offload"}),
    Setting("padded", changes={"layout": "padded"}),
    Setting("tight budget", changes={"max_tokens_per_micro_batch": 130, "max_grad_norm": 0.5}),
    Setting("checkpointing", changes={"gradient_checkpointing": True}),
]


class Gradients(TrainerCallback):
    """The gradient of the first step before clipping, whole, by parameter."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: PreTrainedModel, **__: Any) -> None:
        """Look after the backward pass. Collective."""
        if self.found:
            return
        for name, parameter in model.named_parameters():
            gradient = safe_get_full_grad(parameter).detach().clone()
            if hasattr(parameter, "gather_params"):
                parameter.gather_params([gradient])
            self.found[name] = gradient


@dataclass(frozen=True)
class Outcome:
    """Of a run: metrics by step, what an evaluation and the first gradient were, the parameters at the end."""

    history: list[dict[str, float]]
    evaluation: float
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    head_rows: int


def trained(folder: Path, setting: Setting, *, size: int) -> Outcome | None:
    """Train on ranks / `size` shares of the same global batches; None on ranks other than the main one."""
    model = small_runs.model_of(setting.family)
    if setting.vocab_size is not None:
        model = tiny_model(setting.family, vocab_size=setting.vocab_size)
    gradients = Gradients()
    fields = {"optim": "sgd", "learning_rate": 0.05, "max_steps": STEPS} | setting.changes
    trainer = small_runs.trainer(
        folder / setting.name,
        model=model,
        tensor_parallel_size=size,
        pairs=4 * GLOBAL_BATCH,
        per_device_train_batch_size=GLOBAL_BATCH * size // distributed.world_size(),
        per_device_eval_batch_size=1,
        include_num_input_tokens_seen="non_padding",
        eval_dataset=small_runs.dataset(5),
        callbacks=[gradients],
        **fields,
    )
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model()
    parameters = full_state(trainer.model)
    if parameters is None:
        return None
    return Outcome(
        history=[{name: line[name] for name in METRICS} for line in small_runs.step_lines(trainer)],
        evaluation=found["eval_loss"],
        gradients=gradients.found,
        parameters=parameters,
        head_rows=trainer.policy.parts.head.weight.shape[0],
    )


def resumed(folder: Path) -> dict[str, Any]:
    """A run that saved after two of four steps and went on, and the same from its checkpoint."""
    ends = {}
    for name in ("undisturbed", "resumed"):
        run = folder / "resume"
        trainer = small_runs.trainer(
            run, tensor_parallel_size=SIZE, max_steps=4, save_strategy="steps", save_steps=2, pairs=20
        )
        trainer.train(resume_from_checkpoint=name == "resumed")
        ends[name] = full_state(trainer.model)
        distributed.gather_objects(None)
        if distributed.is_main():
            # What a job that was killed after its first checkpoint leaves.
            (run / "checkpoint-4").rename(folder / f"{name}-4")
        distributed.gather_objects(None)
    return ends


def message(folder: Path, **changes: Any) -> str:
    """What a trainer says that is refused."""
    fields = {"tensor_parallel_size": SIZE} | changes
    try:
        trainer = small_runs.trainer(folder / "refused", **fields)
        trainer.predict(small_runs.dataset(5))
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    """See the module."""
    distributed.start_process_group(timeout_s=120)
    outcomes = {setting.name: trained(folder, setting, size=SIZE) for setting in SETTINGS}
    results = {
        "resume": resumed(folder),
        "refused": {
            "predictions": message(folder),
            "compute_metrics": message(folder, compute_metrics=dict),
            "size": message(folder, tensor_parallel_size=4),
        },
    }
    if distributed.is_main():
        results["outcomes"] = {name: asdict(found) for name, found in outcomes.items() if found is not None}
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
