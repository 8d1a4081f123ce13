"""What the trainer is made of, before it does anything: model, data, engine, layout, callbacks, and its log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

from orpo_ds import distributed
from orpo_ds.callbacks import flow_callbacks, progress_callback
from orpo_ds.checkpoint import job_ranks
from orpo_ds.checkpoint.engine_state import check_engine
from orpo_ds.config import ORPOConfig
from orpo_ds.data.processing import ProcessingClass
from orpo_ds.data.tokenize import TokenDataset
from orpo_ds.engine import Engine, build_engine, release_gathered
from orpo_ds.evaluator import Evaluator
from orpo_ds.layout import RunLayout, check_collator, choose_layout
from orpo_ds.model.compiled import compile_backbone
from orpo_ds.monitor.jsonl import MetricsFile
from orpo_ds.monitor.report import log_table, reporting_callbacks
from orpo_ds.monitor.verbosity import set_verbosity
from orpo_ds.plan import Position, plan_training, training_batches
from orpo_ds.policy import OrpoPolicy
from orpo_ds.predictions import Preprocess
from orpo_ds.preemption import PreemptedExit, Preemption
from orpo_ds.prepare import prepare_model, prepare_processing
from orpo_ds.prepare_data import Rows, prepare_training_set
from orpo_ds.publish import Publisher
from orpo_ds.saving import RunCheckpoints, can_be_resumed
from orpo_ds.sequence_group import sequence_group
from orpo_ds.tensor_parallel import shard_over_ranks


class TrainerBase:
    """The parts of `orpo_ds.trainer.ORPOTrainer`, which says what the arguments are."""

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        args: ORPOConfig | None = None,
        data_collator: Any | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: ProcessingClass | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        optimizers: tuple[torch.optim.Optimizer | None, Any | None] = (None, None),
        preprocess_logits_for_metrics: Preprocess | None = None,
        peft_config: Any | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
    ) -> None:
        """See the class."""
        self.args = args if args is not None else ORPOConfig()
        set_verbosity(self.args)
        check_collator(data_collator)
        self.model = prepare_model(model, args=self.args, model_init=model_init, peft_config=peft_config)
        self.processing_class = prepare_processing(processing_class, model=self.model, args=self.args)
        self.train_dataset = prepare_training_set(
            train_dataset, processing_class=self.processing_class, model=self.model, args=self.args
        )
        shard_over_ranks(self.model, self.args)
        self.policy = OrpoPolicy(
            self.model,
            beta=self.args.beta,
            logits_cache_mib=self.args.logits_cache_mib,
            router_balance=self.args.router_balance,
            sum_over_ranks=distributed.sum_over_ranks,
            sequence=sequence_group(self.args),
        )
        self._optimizers = optimizers
        self.engine: Engine | None = None
        self._chosen_layout: RunLayout | None = None
        self._owns_output_dir = False
        self._ignore_keys: list[str] | None = None
        self.metrics_file = MetricsFile(self.args.run_dir)
        self.checkpoints = RunCheckpoints(
            self.args, ranks=job_ranks(), processing_class=self.processing_class
        )
        self.position = Position()
        self.preemption = Preemption(
            enabled=self.args.enable_jit_checkpoint and can_be_resumed(self.args), device=self.args.device
        )
        self.state = TrainerState(
            is_local_process_zero=self.args.local_process_index == 0,
            is_world_process_zero=distributed.is_main(),
        )
        self.control = TrainerControl()
        self.callback_handler = CallbackHandler(
            [
                *flow_callbacks(self.args),
                *reporting_callbacks(
                    self.args,
                    output_dir=str(self.args.run_dir),
                    facts=self._facts,
                    logging_dir=self.args.logging_dir,
                    wandb_runs=self.args.wandb_runs,
                ),
                *callbacks,
                progress_callback(self.args),
            ],
            self.model,
            self.processing_class,
            None,
            None,
        )
        self.publisher = Publisher(
            self.model,
            self.processing_class,
            self.args,
            ranks=self.checkpoints.ranks,
            facts=self._facts,
            before_save=self._release_gathered,
        )
        self.evaluator = Evaluator(
            eval_dataset,
            args=self.args,
            model=self.model,
            processing_class=self.processing_class,
            handler=self.callback_handler,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            after_round=self._after_round,
        )
        self._event("on_init_end")

    def _ready_engine(self, *others: TokenDataset) -> Engine:
        """The engine; at first use, wrap the model under DeepSpeed and find out whether packed rows are exact on it."""
        if self.engine is not None:
            return self.engine
        if self.train_dataset is not None:
            plan_training(self.state, self.args, training_batches(self.args, self.train_dataset))
        optimizer, scheduler = self._optimizers
        self.engine = build_engine(
            self.policy,
            args=self.args,
            total_steps=max(self.state.max_steps, 1),  # without training rows there is only an evaluation
            optimizer=optimizer,
            scheduler=scheduler,
        )
        check_engine(self.engine.deepspeed)
        own = [] if self.train_dataset is None else [self.train_dataset]
        self._chosen_layout = choose_layout(
            self.policy,
            args=self.args,
            processing_class=self.processing_class,
            datasets=[*own, *self.evaluator.datasets.values(), *others],
        )
        if (backend := self.args.torch_compile_backend) is not None:  # transformers names inductor by default
            compile_backbone(self.policy.parts, backend=backend, mode=self.args.torch_compile_mode)
        handler = self.callback_handler
        handler.optimizer, handler.lr_scheduler = self.engine.optimizer, self.engine.scheduler
        return self.engine

    @property
    def _layout(self) -> RunLayout:
        assert self._chosen_layout is not None, "there is no engine yet"
        return self._chosen_layout

    def log(self, figures: dict[str, Any]) -> None:
        """Put figures into `metrics.jsonl`, the state's history and all dashboards."""
        # An evaluation before train() may not be of a run in this folder.
        if self._owns_output_dir and distributed.is_main():
            self.metrics_file.append(self._entry(figures))
        self._report(figures)

    def _report(self, figures: dict[str, Any]) -> None:
        self.state.log_history.append(self._entry(figures))
        self._event("on_log", logs={"epoch": self.state.epoch, **figures})

    def _entry(self, figures: dict[str, Any]) -> dict[str, Any]:
        return {"step": self.state.global_step, "epoch": self.state.epoch, **figures}

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table, such as answers of the model, on the dashboards that have tables, at the current step."""
        log_table(self.callback_handler, self.state, name=name, columns=columns, rows=rows)

    def _facts(self) -> dict[str, Any]:
        """What a dashboard's config says beside the settings."""
        dataset = self.train_dataset
        return {
            "dataset_fingerprint": None if dataset is None else dataset.fingerprint,
            "train_pairs": len(dataset) if isinstance(dataset, TokenDataset) else None,
            "world_size": distributed.world_size(),
            "global_batch_size": self.args.global_batch_size,
            "zero_stage": self.args.zero_stage,
            "deepspeed_config": self.args.hf_deepspeed_config.config,
            "layout": "packed" if self._chosen_layout and self._chosen_layout.packed else "padded",
        }

    def _release_gathered(self) -> None:
        if self.engine is not None:
            release_gathered(self.engine.deepspeed)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a transformers callback."""
        self.callback_handler.add_callback(callback)

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Remove a transformers callback, by object or by class."""
        self.callback_handler.remove_callback(callback)

    def _after_round(self, rounds: int) -> None:
        self.callback_handler.eval_dataloader = range(rounds)  # the progress bar asks for its length
        self._event("on_prediction_step")
        if self.preemption.agree() and (self.position.evaluation_due or self.state.global_step == 0):
            raise PreemptedExit(self.state.global_step)

    def _event(self, name: str, **details: Any) -> None:
        """Tell the callbacks; they answer through `self.control`."""
        handle = getattr(self.callback_handler, name)
        self.control = handle(self.args, self.state, self.control, **details)
