"""One training step of TRL's own `ORPOTrainer`, opened up: its loss, every gradient, and the line that it logs.

This is TRL's real loop on the CPU (its tokenisation, collator, model call, backward pass and logging), not a part of
it called by hand; the only thing added is a callback that copies the gradients before the optimizer moves.
"""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

# What TRL logs of a step and this project logs too. TRL's `logits/*`, a mean over all logits with those of the padding,
# need the [T, V] logits that this project never forms.
METRICS = (
    "loss",
    "nll_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "log_odds_chosen",
    "log_odds_ratio",
)


@dataclass(frozen=True)
class TrlStep:
    """`gradients` by parameter name; `logged`: the whole line of step 1."""

    loss: float
    gradients: dict[str, Tensor]
    logged: dict[str, float]


class _KeepGradients(TrainerCallback):
    """Copies the gradients after the backward pass; nothing clips them, as `max_grad_norm` is 0."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        parameters = kwargs["model"].named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def train_one_step(
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    beta: float = 0.1,
    max_length: int = 1024,
    max_completion_length: int | None = None,
) -> TrlStep:
    """Train a copy of `model` (float32) for one step on all `rows` as one batch, through `ORPOTrainer.train()`.

    `rows` are preference rows as TRL documents them, conversational or not. `max_completion_length` is for
    encoder-decoders only.
    """
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        args = ORPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=len(rows),
            max_steps=1,
            logging_steps=1,
            max_grad_norm=0.0,
            beta=beta,
            max_length=max_length,
            max_completion_length=max_completion_length,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        keep = _KeepGradients()
        trainer = ORPOTrainer(
            model=copy.deepcopy(model),
            args=args,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([dict(row) for row in rows]),
            callbacks=[keep],
        )
        trainer.train()
    logged = trainer.state.log_history[0]
    return TrlStep(loss=logged["loss"], gradients=keep.gradients, logged=logged)
