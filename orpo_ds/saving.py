"""The checkpoints of a training run: `checkpoint/` with the run's settings, engine and state filled in."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import SaveStrategy

from orpo_ds import distributed, progress
from orpo_ds.adapters import has_adapters
from orpo_ds.checkpoint import (
    CheckpointMetadata,
    CheckpointSaveError,
    CheckpointStore,
    Manifest,
    Ranks,
    check_resume,
    claim_output_dir,
    load_rank_state,
    read_manifest,
    resolve_resume,
    save_rank_state,
    seed_rank_anew,
    verify,
)
from orpo_ds.checkpoint.engine_state import checkpoint_bytes, load_engine, save_engine
from orpo_ds.checkpoint.resume import AUTO
from orpo_ds.config import ORPOConfig
from orpo_ds.data.processing import ProcessingClass
from orpo_ds.data.token_stream import TokenStream
from orpo_ds.data.tokenize import TokenDataset
from orpo_ds.engine import Engine, release_gathered
from orpo_ds.export import save_pretrained
from orpo_ds.monitor.wandb import copy_run_id
from orpo_ds.redact import redact
from orpo_ds.zero_options import keeps_adam_to_itself

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
STREAM_POSITION = "stream_position.json"


class RunCheckpoints:
    """Saves and restores one training run. Every method is called on all ranks.

    Attributes:
        resumable_step: the newest step from which this run can be continued; 0 where that is its beginning.
    """

    def __init__(self, args: ORPOConfig, *, ranks: Ranks, processing_class: ProcessingClass | None) -> None:
        """Nothing is written before `claim`.

        Args:
            args: where checkpoints go, how many are kept, and what a resume compares.
            ranks: this rank and its collective.
            processing_class: saved beside the weights of a checkpoint that is only a model.
        """
        self.args = args
        self.ranks = ranks
        self.processing_class = processing_class
        self.store = CheckpointStore(args.run_dir, save_total_limit=args.save_total_limit, ranks=ranks)
        self._dataset: TokenDataset | TokenStream | None = None
        self.resumable_step = 0

    def claim(
        self, resume_from_checkpoint: bool | str | None, *, dataset: TokenDataset | TokenStream
    ) -> Path | None:
        """Take `output_dir` for this run, and find the checkpoint that it continues from.

        Args:
            resume_from_checkpoint: as in `ORPOTrainer.train`; None: `args.resume_from_checkpoint`.
            dataset: the training set.

        Returns:
            A verified checkpoint of a run with the same settings, whose global batch size `args` now has; None for a
            new run.

        Raises:
            ValueError: another run is in `output_dir`, or the resume is not possible.
        """
        args = self.args
        self._dataset = dataset
        resume = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        may_start = str(resume).lower() == AUTO
        _refuse_state_out_of_reach(args, resume=bool(resume) and not may_start)
        source = resolve_resume(resume, args.run_dir, ranks=self.ranks) if resume else None
        claim_output_dir(
            args.run_dir,
            resume_from=source,
            overwrite_output_dir=args.overwrite_output_dir,
            started_before=may_start and source is None,
            ranks=self.ranks,
        )
        self.store.clean_up()
        if source is not None:  # before minutes go into an engine that cannot use it
            self._keep_global_batch(check_resume(source, self._metadata(TrainerState(epoch=0.0))))
            if distributed.is_main():
                copy_run_id(source, args.run_dir)
        return source

    def _keep_global_batch(self, manifest: Manifest) -> None:
        """Go on with the checkpoint's pairs a step, on however many ranks: steps, epochs and schedule stay as they are.

        A job that comes back with fewer nodes then goes on by itself.
        """
        pairs = manifest.metadata.global_batch_size
        if pairs == self.args.global_batch_size:
            return
        if distributed.is_main():
            logger.warning(
                "the checkpoint's run trains on %d pairs a step and goes on with them: steps, epochs and schedule stay "
                "as they are. per_device_train_batch_size=%d x gradient_accumulation_steps=%d on the ranks of this job "
                "would make %d; each rank runs as many micro-batches as it takes.",
                pairs,
                self.args.per_device_train_batch_size,
                self.args.gradient_accumulation_steps,
                self.args.global_batch_size,
            )
        self.args.kept_global_batch_size = pairs
        if isinstance(self._dataset, TokenStream):
            self._dataset.global_batch_size = pairs

    def _metadata(self, state: TrainerState, *, only_model: bool = False) -> CheckpointMetadata:
        """What a checkpoint says about the run and itself, and what a resume compares."""
        assert self._dataset is not None, "claim comes first"
        return CheckpointMetadata(
            step=state.global_step,
            epoch=float(state.epoch or 0.0),
            seed=self.args.seed,
            world_size=distributed.world_size(),
            zero_stage=self.args.zero_stage,
            global_batch_size=self.args.global_batch_size,
            dataset_fingerprint=self._dataset.fingerprint,
            config=redact(self.args.to_dict() | {"save_only_model": only_model}),
        )

    # ------------------------------------------------------------------ saving

    def save(self, engine: Engine, state: TrainerState, *, resumable: bool = False) -> Path:
        """Write a verified `checkpoint-<step>`, from which the run continues bit for bit.

        With `save_only_model` it is the model as a Hugging Face folder, from which no run continues. The best
        checkpoint and the newest are never deleted for `save_total_limit`.

        Args:
            engine: weights, optimizer state and schedule.
            state: of the run; learns which checkpoint is the best.
            resumable: save everything, whatever `save_only_model` says.

        Raises:
            CheckpointSaveError: on all ranks; nothing of the checkpoint is left.
        """
        earlier_best, state.best_model_checkpoint = state.best_model_checkpoint, self._best(state)

        adapters_only = _adapters_only(engine)
        only_model = self.args.save_only_model and not resumable

        def write(folder: Path) -> None:
            if only_model:
                self._write_model(engine, folder)
            else:
                save_engine(engine.deepspeed, folder, scheduler=engine.scheduler, only_trained=adapters_only)
                if adapters_only:  # small, and so a checkpoint is a folder that PEFT loads
                    self._write_model(engine, folder)
                save_rank_state(folder, self.ranks)
            if distributed.is_main():
                state.save_to_json(str(folder / TRAINER_STATE))
                copy_run_id(self.args.run_dir, folder)
                if isinstance(self._dataset, TokenStream):
                    position = self._dataset.position(state.global_step)
                    (folder / STREAM_POSITION).write_text(json.dumps(position))

        try:
            own = checkpoint_bytes(engine.deepspeed, only_model=only_model, only_trained=adapters_only)
            total = sum(self.ranks.all_gather(own))
            with progress.timed(f"Saving checkpoint-{state.global_step}"):
                path = self.store.save(
                    write, self._metadata(state, only_model=only_model), estimated_bytes=total
                )
        except CheckpointSaveError:
            state.best_model_checkpoint = earlier_best
            raise
        if not only_model:
            self.resumable_step = state.global_step
        best = state.best_model_checkpoint
        self.store.prune(keep=[] if best is None else [Path(best)])
        return path

    def _best(self, state: TrainerState) -> str | None:
        """Folder of the best evaluation's checkpoint, if it was saved or is about to be."""
        if not state.best_global_step:
            return state.best_model_checkpoint
        folder = self.args.run_dir / f"checkpoint-{state.best_global_step}"
        if state.best_global_step == state.global_step or folder.is_dir():
            return str(folder)
        return state.best_model_checkpoint

    def _write_model(self, engine: Engine, folder: Path) -> None:
        release_gathered(engine.deepspeed)
        try:
            save_pretrained(engine.deepspeed.module.model, folder, tokenizer=self.processing_class)
        except CheckpointSaveError as error:
            raise OSError(str(error)) from error  # on all ranks; the store makes one message of it

    def save_or_go_on(self, engine: Engine, state: TrainerState, *, last: bool) -> Path | None:
        """Save; when that fails (disk full), train on to a save that works, unless this was the `last` one.

        Returns:
            The checkpoint; None where it was not saved.

        Raises:
            CheckpointSaveError: no later step will save.
        """
        try:
            return self.save(engine, state)
        except CheckpointSaveError as error:
            if last:
                raise
            if distributed.is_main():
                logger.error("%s. Training goes on, and the next save tries again.", error)
            return None

    # ------------------------------------------------------------------ loading

    def restore(self, source: Path, engine: Engine, state: TrainerState) -> TrainerState:
        """Continue from a verified checkpoint: engine, schedule, random generators and a stream's position.

        Args:
            source: what `claim` returned.
            engine: just built.
            state: of this process, with the length of the run.

        Returns:
            The state of the run at the checkpoint; how often to log, evaluate and save is this run's own.

        Raises:
            ValueError: a stream has other rows than it had then.
        """
        load_engine(engine.deepspeed, source, scheduler=engine.scheduler, only_trained=_adapters_only(engine))
        before = read_manifest(source).metadata
        if before.world_size == self.ranks.world_size:
            load_rank_state(source, self.ranks)
        else:
            seed_rank_anew(seed=before.seed, step=before.step, ranks=self.ranks)
        if isinstance(self._dataset, TokenStream):
            place = json.loads((source / STREAM_POSITION).read_text())
            if self.args.ignore_data_skip:
                place["rows"] = self._dataset.position(0)["rows"]
            self._dataset.seek(place)
        saved = TrainerState.load_from_json(str(source / TRAINER_STATE))
        self.resumable_step = saved.global_step
        saved.is_local_process_zero = state.is_local_process_zero
        saved.is_world_process_zero = state.is_world_process_zero
        saved.max_steps, saved.num_train_epochs = state.max_steps, state.num_train_epochs
        saved.compute_steps(self.args, saved.max_steps)
        best = saved.best_model_checkpoint
        if best is not None and not Path(best).is_dir():
            moved = source.parent / Path(best).name  # the output folder may have another path now
            saved.best_model_checkpoint = str(moved) if moved.is_dir() else None
            if distributed.is_main() and not moved.is_dir():
                logger.warning("the best checkpoint so far, %s, is gone: the next best is looked for", best)
        return saved

    def finish(self, engine: Engine, state: TrainerState) -> None:
        """After the last step: load the best model if that was asked for, and keep only it with a limit of one.

        Raises:
            RuntimeError: the best checkpoint was damaged since it was written; names its files.
        """
        if state.best_model_checkpoint is None:
            return
        best = Path(state.best_model_checkpoint)
        if self.args.load_best_model_at_end:
            problems = verify(best, self.ranks)
            if problems:
                raise RuntimeError(
                    f"load_best_model_at_end: {best} is damaged ({'; '.join(problems)}). The trainer still holds the "
                    "model of the last step."
                )
            load_engine(
                engine.deepspeed, best, scheduler=engine.scheduler, only_trained=_adapters_only(engine)
            )
        if self.args.save_total_limit == 1:
            self.store.prune(keep=[best], keep_newest=False)


def can_be_resumed(args: ORPOConfig) -> bool:
    """Whether DeepSpeed restores what it saves of this run."""
    return keeps_adam_to_itself(args.deepspeed_settings.get("zero_optimization", {})) is None


def _refuse_state_out_of_reach(args: ORPOConfig, *, resume: bool) -> None:
    """Refuse checkpoints that lack the optimizer: the run would go on from another, and nothing would say so."""
    option = keeps_adam_to_itself(args.deepspeed_settings["zero_optimization"])
    saves = args.save_strategy != SaveStrategy.NO and not args.save_only_model
    if option is not None and (resume or saves):
        name = (
            "resume_from_checkpoint"
            if resume
            else f"save_strategy={SaveStrategy(args.save_strategy).value!r}"
        )
        raise ValueError(
            f"{name}: with zero_optimization.{option}, DeepSpeed does not restore the optimizer that it saves. Set "
            "save_only_model=True or save_strategy='no', or offload the optimizer to `cpu` alone to resume."
        )


def _adapters_only(engine: Engine) -> bool:
    """Whether the base model stays out of the checkpoint: it does not train, and the run has it anyway."""
    return has_adapters(engine.deepspeed.module.model)
