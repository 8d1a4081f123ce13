"""`ORPOTrainer`: TRL's constructor and methods around a loop that one can read.

Constructor, engine and log are in `trainer_base.py`.

The loop is DeepSpeed's (`engine(batch)`, `engine.backward`, `engine.step`; see `step.py`); the callbacks, the state and
the flow control are transformers'. What belongs to one question stands in one file: models and datasets are made
ready in `prepare.py`, `plan.py` says how many steps there are, `layout.py` how pairs become tensors, checkpoints go
through `saving.py`, the trained model leaves through `export.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import CommitInfo
from transformers.trainer_callback import TrainerControl
from transformers.trainer_utils import IntervalStrategy, PredictionOutput, SaveStrategy, TrainOutput

from orpo_ds import best, distributed
from orpo_ds.callback_states import export_states, restore_states, saved_states
from orpo_ds.checkpoint import sole_job
from orpo_ds.data.feed import StepPlan
from orpo_ds.data.packing import MicroBatch
from orpo_ds.data.tokenize import TokenDataset
from orpo_ds.dry_run import end_with_dry_run
from orpo_ds.engine import follows_metric, gradient_norm, release_gathered
from orpo_ds.model.neftune import embedding_noise
from orpo_ds.model.size import measure
from orpo_ds.monitor.gradients import LayerGradients
from orpo_ds.monitor.report import failures_reported, wants_final_model
from orpo_ds.monitor.wandb import FINAL_MODEL
from orpo_ds.out_of_memory import StepOutOfMemoryError
from orpo_ds.plan import Position, training_batches
from orpo_ds.preemption import PreemptedExit
from orpo_ds.prepare import training_dtype
from orpo_ds.prepare_data import Rows
from orpo_ds.rehearsal import feed_that_fits
from orpo_ds.step import NonFiniteLossError, train_step
from orpo_ds.trainer_base import TrainerBase
from orpo_ds.watch import Watch

logger = logging.getLogger(__name__)


class ORPOTrainer(TrainerBase):
    """Train a language model on preference pairs with ORPO (arXiv:2403.07691).

    Args:
        model: a model, or the folder or hub id of one. Loaded by name under ZeRO-3, each rank holds only its shard.
        args: settings; default ones write into `trainer_output`.
        data_collator: None, or TRL's own: pairs are laid out by orpo_ds (`orpo_ds.layout`).
        train_dataset: rows with `prompt`, `chosen`, `rejected` (see `orpo_ds.data.preference`); streamed ones need
            `args.max_steps`.
        eval_dataset: the same, or several by name.
        processing_class: the tokenizer, or for prompts with images the processor; by default the model's own.
        model_init: makes the model, in place of `model`: called once, here, with `args.seed` set.
        callbacks: transformers callbacks, beside those of `args.report_to` and the progress bar.
        optimizers: an optimizer and a schedule of one's own, either may be None.
        preprocess_logits_for_metrics: what to keep of the logits for `compute_metrics` (see `orpo_ds.predictions`).
        peft_config: adapters to train instead of the model.
        compute_metrics: further metrics of an evaluation, from an `EvalPrediction`.

    Raises:
        ValueError: arguments that contradict each other, or rows that cannot be trained on.
    """

    # ------------------------------------------------------------------ training

    def train(
        self,
        resume_from_checkpoint: bool | str | None = None,
        trial: Any | None = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train to the end, or continue a run.

        Args:
            resume_from_checkpoint: True continues from the newest good checkpoint in `output_dir`; "auto" as well, or
                starts where there is none; a path from that one. By default `args.resume_from_checkpoint`.
            trial: must be None: hyperparameter search is not offered.
            ignore_keys_for_eval: `ignore_keys` of the evaluations.

        Returns:
            Steps done, mean loss over the steps of this call, and its figures.

        Raises:
            ValueError: nothing to train on, another run in `output_dir`, or a resume that is not possible.
            NonFiniteLossError: the loss became NaN or infinite; the weights are still those of the step before.
            StepOutOfMemoryError: a micro-batch does not fit; it names the settings to lower.
            SystemExit: with `args.dry_run`, after the largest micro-batch.
            PreemptedExit: a signal ended the training (`orpo_ds.preemption`); a `SystemExit` with status 85.
            CheckpointSaveError: the last checkpoint could not be written; the model is trained, and `save_model` or
                `save_checkpoint` may be called again. A save that fails before the last one is only logged.
        """
        if trial is not None:
            raise ValueError(
                "trial: hyperparameter search is not offered. Start a run of its own for each trial."
            )
        if self.train_dataset is None:
            raise ValueError("train_dataset is missing: pass it to ORPOTrainer.")
        if self._owns_output_dir:
            raise ValueError(
                "this trainer has trained already: make a new ORPOTrainer, with an output_dir of its own."
            )
        self._ignore_keys = ignore_keys_for_eval
        if self.args.dry_run:
            end_with_dry_run(self._ready_engine(), self._layout, self.train_dataset, args=self.args)
        with self.preemption.listening(), sole_job(self.args.run_dir, self.checkpoints.ranks):
            source = self.checkpoints.claim(resume_from_checkpoint, dataset=self.train_dataset)
            self._owns_output_dir = True
            self._ready_engine()
            if source is not None:
                self._restore(source)
            noise = embedding_noise(self.policy.parts, self.args.neftune_noise_alpha)
            with self._layout.attention(), noise, failures_reported(self.callback_handler):
                output = self._loop()
            self.publisher.finish(self.state)
        return output

    def _loop(self) -> TrainOutput:
        assert self.train_dataset is not None
        state, position = self.state, self.position
        batches = training_batches(self.args, self.train_dataset)
        feed = self._layout.feed(self.train_dataset, max_tokens=self.args.micro_batch_tokens)
        gradients = None
        if self.args.log_gradients_by_layer:
            gradients = LayerGradients(self._ready_engine().deepspeed, self.model)
            self.add_callback(gradients)
        watch = Watch(
            feed,
            measure(self.policy.parts),
            device=self.args.device,
            dtype=training_dtype(self.args),
            gradients=gradients,
        )
        if self.args.auto_find_batch_size:
            feed = feed_that_fits(self._ready_engine(), feed, args=self.args)
        self._event("on_train_begin")
        if self.args.generate_during_eval and state.global_step == 0:
            self.evaluator.show_answers(self._ready_engine(), state, self.evaluator.datasets, writes=True)
        if self.args.eval_on_start and state.global_step == 0:
            self.evaluate(ignore_keys=self._ignore_keys)
        watch.start(state.global_step)
        if position.evaluation_due:
            self._evaluate_unless_preempted()
        if self.preemption.agree():
            self._save_and_leave()
        for epoch in range(position.epoch, state.num_train_epochs):
            if self.control.should_training_stop:
                break
            self._event("on_epoch_begin")
            todo = position.steps_left(batches, at_most=state.max_steps - state.global_step)
            with closing(feed.steps(map(batches.pairs, todo), device=self.args.device)) as steps:
                for plan, micro_batches in steps:
                    self._step(plan, micro_batches, watch)
                    position.step += 1
                    state.global_step += 1
                    state.epoch = epoch + position.step / batches.steps_per_epoch
                    self._event("on_step_end")
                    position.stopped = self.control.should_epoch_stop
                    self._log_evaluate_save(watch)
                    if self.control.should_epoch_stop or self.control.should_training_stop:
                        break
            position.end_epoch(batches)
            self._event("on_epoch_end")
            self._log_evaluate_save(watch)
        if self.args.logging_strategy != IntervalStrategy.NO:
            self._log_steps(watch)  # those after the last log
        summary = watch.summary()
        self._report(summary)
        self.checkpoints.finish(self._ready_engine(), state)
        if wants_final_model(self.args.report_to):
            self.save_model(str(self.args.run_dir / FINAL_MODEL))
        self._event("on_train_end")
        return TrainOutput(state.global_step, summary["train_loss"], summary)

    def _step(self, plan: StepPlan, micro_batches: Iterator[MicroBatch], watch: Watch) -> None:
        """One optimizer step and one of the schedule."""
        engine = self._ready_engine()
        self._event("on_step_begin")
        engine.deepspeed.train()
        try:
            outcome = train_step(
                engine,
                plan,
                micro_batches,
                record=watch.record,
                notify=self._event,
                told_to_stop=lambda: self.preemption.noted,
            )
        except NonFiniteLossError as error:
            raise NonFiniteLossError(error.loss, error.pairs, advice=self._advice(error)) from error
        except StepOutOfMemoryError as error:
            # Perhaps on this rank alone, so nothing collective is asked.
            found = _continue_from(self.checkpoints.store.newest_whole())
            raise error.at(f"at step {self.state.global_step + 1} ({found})") from error
        self.preemption.agreed |= outcome.stop
        watch.end_step(outcome, pairs=plan.pairs, learning_rate=engine.optimizer.param_groups[0]["lr"])
        if self.args.include_num_input_tokens_seen != "no":
            padding = self.args.include_num_input_tokens_seen == "all"
            self.state.num_input_tokens_seen += watch.take_tokens(padding=padding)
        if outcome.applied and not follows_metric(engine.scheduler):
            engine.scheduler.step()
        elif not outcome.applied and distributed.is_main():
            logger.warning("step %d: no update, its gradient is not finite", self.state.global_step + 1)

    def _log_evaluate_save(self, watch: Watch) -> None:
        """What the callbacks' flow control asks for, at the end of a step and again at the end of an epoch."""
        if self.control.should_log or self.preemption.agreed:
            self._log_steps(watch)
        takes_long = self.control.should_evaluate or self.control.should_save
        with watch.paused():
            if self.control.should_evaluate:
                self._evaluate_unless_preempted()
            if self.control.should_save and not self.preemption.agreed:
                self._save_or_go_on()
        if self.preemption.agreed or (takes_long and self.preemption.agree()):
            self._save_and_leave()

    def _evaluate_unless_preempted(self) -> None:
        """Evaluate between two steps; in a run that is to stop, `position` says that it is still to be done."""
        engine, self.position.evaluation_due = self._ready_engine(), True
        if self.preemption.agreed:
            return
        try:
            found = self.evaluate(ignore_keys=self._ignore_keys)
        except PreemptedExit:
            release_gathered(engine.deepspeed)
            return
        self.position.evaluation_due = False
        if follows_metric(engine.scheduler):
            engine.scheduler.step(best.metric(found, self.args))
        is_best = best.note(found, self.args, self.state)
        if self.args.save_strategy == SaveStrategy.BEST:
            self.control.should_save = is_best

    def _save_and_leave(self) -> NoReturn:
        """Stop a training that a signal has ended, all ranks after the same step."""
        step = self.state.global_step
        if step != self.checkpoints.resumable_step:
            self.control.should_evaluate = self.control.should_save = False
            self._export_states()
            self.checkpoints.save(self._ready_engine(), self.state, resumable=True)
            self._event("on_save")
        raise PreemptedExit(step)

    def _log_steps(self, watch: Watch) -> None:
        """Log the steps since the last log, if there were any. Collective."""
        if watch.logged_step == self.state.global_step:
            return
        deepspeed = self._ready_engine().deepspeed
        figures = watch.figures(self.state.global_step)
        if self.args.include_num_input_tokens_seen != "no":
            figures["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        self.log(figures | {"grad_norm": gradient_norm(deepspeed), "skipped_steps": deepspeed.skipped_steps})

    def _advice(self, error: NonFiniteLossError) -> str:
        """Where to look and where to go on from, when the loss is not a number."""
        assert self.train_dataset is not None
        rows = sorted(int(self.train_dataset.row_numbers[pair]) for pair in error.pairs)
        found = _continue_from(self.checkpoints.store.latest_good())
        return (
            f"at step {self.state.global_step + 1}, in the micro-batches with the training rows {rows} (from 0). "
            f"The weights were not updated; {found}. Look at these rows, lower learning_rate or "
            "max_grad_norm, or train in bf16 instead of fp16."
        )

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self) -> Path:
        """Write a verified `checkpoint-<step>` from which the run continues bit for bit. All ranks call it."""
        self._export_states()
        path = self.checkpoints.save(self._ready_engine(), self.state)
        self._saved(path)
        return path

    def _saved(self, checkpoint: Path) -> None:
        self._event("on_save")
        self.publisher.push_checkpoint(checkpoint, self.state, begin=lambda: self._event("on_push_begin"))

    def _save_or_go_on(self) -> None:
        self.control.should_save = (
            False  # also after a save that fails: the end of the epoch is no second try
        )
        self._export_states()
        last = self.control.should_training_stop or self.state.global_step == self.state.max_steps
        path = self.checkpoints.save_or_go_on(self._ready_engine(), self.state, last=last)
        if path is not None:
            self._saved(path)

    def _export_states(self) -> None:
        export_states(self.state, [*self.callback_handler.callbacks, self.control, self.position])

    def _restore(self, source: Path) -> None:
        """Continue where a verified checkpoint ends."""
        self.state = self.checkpoints.restore(source, self._ready_engine(), self.state)
        states = saved_states(self.state)
        self.position = Position.from_state(states.pop("Position"))
        if self.args.ignore_data_skip and isinstance(self.train_dataset, TokenDataset):
            self.position.step = 0
        if self.args.restore_callback_states_from_checkpoint:
            self.control = TrainerControl.from_state(states.pop("TrainerControl"))
            restore_states(self.callback_handler, states)
        if distributed.is_main():
            self.metrics_file.rewind(self.state.global_step, self.state.log_history)
            self.evaluator.answers.rewind(self.state)

    # ------------------------------------------------------------------ evaluation

    def evaluate(
        self,
        eval_dataset: Rows | dict[str, Rows] | str | None = None,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and metrics over a whole dataset, the same for any number of ranks and any batch size.

        Args:
            eval_dataset: other rows than those given to the trainer, several by name, which get `<prefix>_<name>_`
                metrics, or the name of one of the trainer's.
            ignore_keys: of the model's outputs, those that `compute_metrics` need not see.
            metric_key_prefix: of the names of the metrics.

        Returns:
            The metrics that are logged, and the epoch.

        Raises:
            ValueError: there is no evaluation set.
        """
        datasets = self.evaluator.sets(eval_dataset)
        figures = self.evaluator.evaluate(
            self._ready_engine(*datasets.values()),
            self._layout,
            datasets,
            state=self.state,
            prefix=metric_key_prefix,
            ignore_keys=ignore_keys,
            writes=self._owns_output_dir,
        )
        self.log(figures)
        self._event("on_evaluate", metrics=figures)
        return figures | {"epoch": self.state.epoch}

    def predict(
        self,
        test_dataset: Rows,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Numbers of every pair of a dataset, and its metrics; nothing is logged.

        Args:
            test_dataset: preference rows.
            ignore_keys: of `eval_logits/chosen` and `eval_logits/rejected`, those to leave out of the predictions.
            metric_key_prefix: of the names of the metrics.

        Returns:
            What `compute_metrics` is given (`orpo_ds.predictions`) and the metrics.
        """
        dataset = self.evaluator.sets({"": test_dataset})[""]
        output = self.evaluator.predict(
            self._ready_engine(dataset),
            self._layout,
            dataset,
            prefix=metric_key_prefix,
            ignore_keys=ignore_keys,
        )
        self._event("on_predict", metrics=output.metrics)
        return output

    # ------------------------------------------------------------------ results

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model and card as a Hugging Face folder, by default into `output_dir`. All ranks call it.

        With `push_to_hub` on, the folder goes to the hub as well; `_internal_call` leaves that out.
        """
        folder = Path(output_dir or self.args.run_dir)
        if _internal_call:
            self.publisher.save(folder, self.state)
        else:
            self.publisher.save_and_push(folder, self.state)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save model, tokenizer and card into `output_dir`, and upload them to `hub_model_id`. All ranks call it.

        Args:
            commit_message: on the hub.
            blocking: wait for the upload.
            token: instead of `hub_token`.
            revision: instead of `hub_revision`.
            private: instead of `hub_private_repo`.
            **card: `model_name`, `dataset_name` and `tags` of `create_model_card`.

        Returns:
            The commit, or its future if not `blocking`; None on ranks other than the main one.

        Raises:
            HubPushError: on all ranks, when the hub did not take it. The model is in `output_dir`.
        """
        self._event("on_push_begin")
        self.publisher.name_card(**card)
        return self.publisher.push(
            self.state,
            message=commit_message,
            blocking=blocking,
            token=token,
            revision=revision,
            private=private,
        )

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """Write `README.md` into `output_dir`, unless a person wrote one. What is named here stays for later cards."""
        self.publisher.name_card(model_name, dataset_name, tags)
        self.publisher.write_card(self.args.run_dir, self.state)


def _continue_from(good: Path | None) -> str:
    return f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"
