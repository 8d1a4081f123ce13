"""What `ORPOTrainer.evaluate` and `predict` do: one evaluation after the other, and the answers to go with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_callback import CallbackHandler, TrainerState
from transformers.trainer_utils import PredictionOutput

from orpo_ds import distributed
from orpo_ds.answers import AnswerTables
from orpo_ds.config import ORPOConfig
from orpo_ds.data.processing import ProcessingClass, tokenizer_of
from orpo_ds.data.tokenize import TokenDataset
from orpo_ds.engine import Engine
from orpo_ds.evaluation import Evaluation
from orpo_ds.generation import Generator
from orpo_ds.layout import RunLayout
from orpo_ds.model.attention import AttentionChoice
from orpo_ds.predictions import Preprocess
from orpo_ds.prepare_data import Rows, prepare_dataset


class Evaluator:
    """The evaluation sets of a trainer, and what is computed on them. Every method is called on all ranks.

    Attributes:
        datasets: by name; with an empty name where there is one.
        compute_metrics: the user's, or None.
        preprocess_logits_for_metrics: the user's, or None.
        answers: the tables of `generate_during_eval`.
    """

    def __init__(
        self,
        rows: Rows | Mapping[str, Rows] | None,
        *,
        args: ORPOConfig,
        model: PreTrainedModel,
        processing_class: ProcessingClass,
        handler: CallbackHandler,
        compute_metrics: Callable[..., dict[str, Any]] | None,
        preprocess_logits_for_metrics: Preprocess | None,
        after_round: Callable[[int], None],
    ) -> None:
        """Tokenise the sets.

        Args:
            rows: one set, several by name, or none.
            args: the run's settings.
            model: with the attention that generation shall use.
            processing_class: of the model.
            handler: the trainer's callbacks; those with tables get the answers.
            compute_metrics: see `evaluation.Evaluation`.
            preprocess_logits_for_metrics: see `predictions`.
            after_round: called with the number of batches after each of them.
        """
        if compute_metrics is not None and args.tensor_parallel_size > 1:
            raise ValueError(
                f"compute_metrics with tensor_parallel_size={args.tensor_parallel_size}: no rank has whole rows of "
                "logits to predict from. Leave it out; the losses of an evaluation need none."
            )
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self._args = args
        self._model = model
        self._processing_class = processing_class
        self._after_round = after_round
        self._attention = AttentionChoice.of(model)
        self.answers = AnswerTables(args, tokenizer=tokenizer_of(processing_class), handler=handler)
        self.datasets = {} if rows is None else self._prepared(rows)

    def sets(self, given: Rows | Mapping[str, Rows] | str | None) -> dict[str, TokenDataset]:
        """The sets that a call of `evaluate` names, brings, or means.

        Raises:
            ValueError: there is none, or none of that name.
        """
        if isinstance(given, str):
            if given not in self.datasets:
                known = ", ".join(name for name in self.datasets if name) or "none that has a name"
                raise ValueError(f"eval_dataset={given!r}: the trainer has no such set. It has: {known}.")
            return {"": self.datasets[given]}
        datasets = self.datasets if given is None else self._prepared(given)
        if not datasets:
            raise ValueError(
                "there is nothing to evaluate: pass eval_dataset to ORPOTrainer or to evaluate()."
            )
        return datasets

    def evaluate(
        self,
        engine: Engine,
        layout: RunLayout,
        datasets: Mapping[str, TokenDataset],
        *,
        state: TrainerState,
        prefix: str,
        ignore_keys: Sequence[str] | None,
        writes: bool,
    ) -> dict[str, float]:
        """Metrics of every set; with `generate_during_eval` also the answers to its prompts.

        Args:
            engine: the model as it is now.
            layout: of the run.
            datasets: what `sets` returned.
            state: of the trainer.
            prefix: of the names of the metrics, to which the names of the sets are added.
            ignore_keys: see `Evaluation.run`.
            writes: whether the run owns its output folder.
        """
        loss_only = self.compute_metrics is None or self._args.prediction_loss_only
        figures: dict[str, float] = {}
        for name, dataset in datasets.items():
            output = self._evaluation(engine, layout).run(
                dataset,
                prefix=f"{prefix}_{name}" if name else prefix,
                loss_only=loss_only,
                ignore_keys=ignore_keys,
            )
            figures |= output.metrics or {}
        # Those of the untrained model were shown when the training began.
        if self._args.generate_during_eval and not (writes and state.global_step == 0):
            self.show_answers(engine, state, datasets, writes=writes)
        return figures

    def predict(
        self,
        engine: Engine,
        layout: RunLayout,
        dataset: TokenDataset,
        *,
        prefix: str,
        ignore_keys: Sequence[str] | None,
    ) -> PredictionOutput:
        """Predictions and metrics of one set; arguments as in `evaluate`."""
        return self._evaluation(engine, layout).run(
            dataset, prefix=prefix, loss_only=self._args.prediction_loss_only, ignore_keys=ignore_keys
        )

    def show_answers(
        self, engine: Engine, state: TrainerState, datasets: Mapping[str, TokenDataset], *, writes: bool
    ) -> None:
        """Answer prompts of every set; arguments as in `evaluate`."""
        generator = Generator(
            engine=engine,
            model=self._model,
            tokenizer=tokenizer_of(self._processing_class),
            attention=self._attention,
            padding_value=self._args.padding_value,
            batch_size=self._args.per_device_eval_batch_size,
            synced=self._args.zero_stage == 3 and distributed.world_size() > 1,
        )
        for name, dataset in datasets.items():
            self.answers.show(generator, state, name=name, dataset=dataset, writes=writes)

    def _evaluation(self, engine: Engine, layout: RunLayout) -> Evaluation:
        return Evaluation(
            engine=engine,
            layout=layout,
            args=self._args,
            compute_metrics=self.compute_metrics,
            preprocess=self.preprocess_logits_for_metrics,
            on_round=self._after_round,
        )

    def _prepared(self, rows: Rows | Mapping[str, Rows]) -> dict[str, TokenDataset]:
        named = rows if isinstance(rows, dict) else {"": rows}
        return {
            name: prepare_dataset(
                part, processing_class=self._processing_class, model=self._model, args=self._args
            )
            for name, part in named.items()
        }
