"""The checkpoints of a training run: `checkpoint/` with the run's settings, engine and state filled in."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from transformers.trainer_callback import TrainerState

from orpo_ds import distributed
from orpo_ds.checkpoint import (
    CheckpointMetadata,
    CheckpointSaveError,
    CheckpointStore,
    Ranks,
    check_resume,
    claim_output_dir,
    load_rank_state,
    resolve_resume,
    save_rank_state,
)
from orpo_ds.checkpoint.engine_state import load_engine, save_engine
from orpo_ds.config import ORPOConfig
from orpo_ds.data.token_stream import TokenStream
from orpo_ds.data.tokenize import TokenDataset
from orpo_ds.engine import Engine
from orpo_ds.redact import redact

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
STREAM_POSITION = "stream_position.json"


class RunCheckpoints:
    """Saves and restores one training run. Every method is called on all ranks."""

    def __init__(self, args: ORPOConfig, *, ranks: Ranks) -> None:
        """Nothing is written before `claim`.

        Args:
            args: where checkpoints go, how many are kept, and what a resume compares.
            ranks: this rank and its collective.
        """
        self.args = args
        self.ranks = ranks
        self.store = CheckpointStore(args.run_dir, save_total_limit=args.save_total_limit, ranks=ranks)

    def claim(self, resume_from_checkpoint: bool | str | None, *, dataset_fingerprint: str) -> Path | None:
        """Take `output_dir` for this run, and find the checkpoint that it continues from.

        Args:
            resume_from_checkpoint: as in `ORPOTrainer.train`; None: `args.resume_from_checkpoint`.
            dataset_fingerprint: of the training set.

        Returns:
            A verified checkpoint of a run with the same settings; None for a new run.

        Raises:
            ValueError: another run is in `output_dir`, or the resume is not possible.
        """
        args = self.args
        resume = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        source = resolve_resume(resume, args.run_dir, ranks=self.ranks) if resume else None
        claim_output_dir(
            args.run_dir,
            resume_from=source,
            overwrite_output_dir=args.overwrite_output_dir,
            ranks=self.ranks,
        )
        self.store.clean_up()
        if source is not None:  # before minutes go into an engine that cannot use it
            check_resume(source, self._metadata(TrainerState(epoch=0.0), dataset_fingerprint))
        return source

    def _metadata(self, state: TrainerState, dataset_fingerprint: str) -> CheckpointMetadata:
        """What a checkpoint says about the run, and what a resume compares."""
        return CheckpointMetadata(
            step=state.global_step,
            epoch=float(state.epoch or 0.0),
            seed=self.args.seed,
            world_size=distributed.world_size(),
            zero_stage=self.args.zero_stage,
            global_batch_size=self.args.global_batch_size,
            dataset_fingerprint=dataset_fingerprint,
            config=redact(self.args.to_dict()),
        )

    def save(self, engine: Engine, state: TrainerState, *, dataset: TokenDataset | TokenStream) -> Path:
        """Write a verified `checkpoint-<step>` from which the run continues bit for bit.

        Args:
            engine: weights, optimizer state and schedule.
            state: of the run.
            dataset: the training set.

        Raises:
            CheckpointSaveError: on all ranks; nothing of the checkpoint is left.
        """

        def write(folder: Path) -> None:
            save_engine(engine.deepspeed, folder, scheduler=engine.scheduler)
            save_rank_state(folder, self.ranks)
            if distributed.is_main():
                state.save_to_json(str(folder / TRAINER_STATE))
                if isinstance(dataset, TokenStream):
                    position = dataset.position(state.global_step)
                    (folder / STREAM_POSITION).write_text(json.dumps(position))

        path = self.store.save(write, self._metadata(state, dataset.fingerprint))
        best = state.best_model_checkpoint
        self.store.prune(keep=[] if best is None else [Path(best)])
        return path

    def save_or_go_on(
        self, engine: Engine, state: TrainerState, *, dataset: TokenDataset | TokenStream, last: bool
    ) -> bool:
        """Save; when that fails (disk full), train on to a save that works, unless this was the `last` one.

        Returns:
            Whether it was saved.

        Raises:
            CheckpointSaveError: no later step will save.
        """
        try:
            self.save(engine, state, dataset=dataset)
        except CheckpointSaveError as error:
            if last:
                raise
            if distributed.is_main():
                logger.error("%s. Training goes on, and the next save tries again.", error)
            return False
        return True

    def restore(
        self, source: Path, engine: Engine, state: TrainerState, *, dataset: TokenDataset | TokenStream
    ) -> TrainerState:
        """Continue from a verified checkpoint: engine, schedule, random generators and a stream's position.

        Args:
            source: what `claim` returned.
            engine: just built.
            state: of this process, with the length of the run.
            dataset: the training set.

        Returns:
            The state of the run at the checkpoint.

        Raises:
            ValueError: the stream has other rows than it had then.
        """
        load_engine(engine.deepspeed, source, scheduler=engine.scheduler)
        load_rank_state(source, self.ranks)
        if isinstance(dataset, TokenStream):
            dataset.seek(json.loads((source / STREAM_POSITION).read_text()))
        saved = TrainerState.load_from_json(str(source / TRAINER_STATE))
        saved.is_local_process_zero = state.is_local_process_zero
        saved.is_world_process_zero = state.is_world_process_zero
        saved.max_steps, saved.num_train_epochs = state.max_steps, state.num_train_epochs
        return saved
