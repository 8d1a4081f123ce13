"""A run's uploads to the Hugging Face hub (`push_to_hub`, `hub_strategy`), which training never waits for.

What is uploaded is a snapshot: the model's files, the model card and, where the strategy wants it, the checkpoint, as
links in a hidden folder of the run. So later saves and the retention of checkpoints do not touch what is on its way,
and nothing else that lies in `output_dir` (notes, `run.yaml`, W&B's folder) ever leaves the machine. The snapshot is
one commit on the hub, made by `huggingface_hub` in its own thread, and is removed afterwards.

    hub_strategy      on the hub after a save                     after the training
    end               nothing                                     the model, when save_model or push_to_hub is called
    every_save        the model                                   the model
    checkpoint        the model, and `last-checkpoint/`           the model; resume_from_checkpoint takes the folder
    all_checkpoints   the model, and `checkpoint-<step>/`         the model

A hub that fails during the training is spoken of once, and the next save tries again. Only the main process talks to
the hub; every public method is called on all ranks.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from transformers.trainer_utils import HubStrategy, suppress_progress_bars

from orpo_ds.checkpoint import CheckpointSaveError, Ranks
from orpo_ds.checkpoint.ranks import TogetherError, on_main
from orpo_ds.config import ORPOConfig
from orpo_ds.redact import redact_text

logger = logging.getLogger(__name__)

SNAPSHOTS = ".hub"
LAST_CHECKPOINT = "last-checkpoint"
# The repository is made before the training, so that a wrong token is found early; a silent hub is not waited for.
OPEN_SECONDS = 10.0
# Ranks meet this often while they wait for an upload: their collectives time out (`ddp_timeout`), uploads do not.
MEET_SECONDS = 60.0
REFUSALS = (400, 401, 403, 404)


class HubPushError(RuntimeError):
    """The hub did not take an upload; raised on all ranks. The files are on this machine's disk."""


@dataclass(frozen=True)
class Push:
    """One upload on its way: `step` of the model in it."""

    step: int
    future: Future[CommitInfo]

    @property
    def failed(self) -> bool:
        """Whether it has ended without a commit."""
        return self.future.done() and self.future.exception() is not None


class HubPushes:
    """All uploads of one run, one after the other."""

    def __init__(self, args: ORPOConfig, *, ranks: Ranks) -> None:
        """Nothing is asked of the hub before `open`.

        Args:
            args: `push_to_hub` and the `hub_*` fields.
            ranks: this rank and its collective.
        """
        self.args = args
        self._ranks = ranks
        self._api = HfApi(token=args.hub_token, library_name="orpo_ds")
        self._repo_id: str | None = None
        self._pushes: list[Push] = []
        self._count = 0
        self._said = False
        self.failure: str | None = None  # of the last push that was to be waited for

    @property
    def repo_name(self) -> str:
        """`hub_model_id`, or the name of `output_dir`; the hub puts the user's name in front."""
        return self.args.hub_model_id or self.args.run_dir.absolute().name

    @property
    def repo_id(self) -> str | None:
        """`user/name` on the hub, once the main process has made the repository."""
        return self._repo_id

    def open(self) -> None:
        """Make the repository, if it is not there, before anything is trained.

        Raises:
            ValueError: on all ranks, when the hub refuses (no valid token, no write access, a name that it does not
                take). A hub that cannot be reached is no reason not to train.
        """
        if not self.args.push_to_hub:
            return
        try:
            on_main(self._ranks, self._open_on_main)
        except TogetherError as error:
            raise ValueError(
                f"push_to_hub=True, but the hub does not take {self.repo_name!r}: {error}. Log in with "
                "`hf auth login` or set HF_TOKEN (a token with write access), set hub_model_id, or leave push_to_hub "
                "out."
            ) from None

    def _open_on_main(self) -> None:
        opened = self._api.run_as_future(self._ensure_repo, None, None, None)
        done, _ = concurrent.futures.wait([opened], timeout=OPEN_SECONDS)
        error = opened.exception() if done else TimeoutError(f"no answer within {OPEN_SECONDS:.0f} s")
        if isinstance(error, HFValidationError):
            raise error
        if isinstance(error, HfHubHTTPError) and error.response.status_code in REFUSALS:
            raise ValueError(self._words_of(error))
        if error is not None:
            self._say_once(error)

    def _ensure_repo(self, token: str | None, private: bool | None, revision: str | None) -> str:
        """Make repository and branch where they are missing; returns `user/name`. In the thread."""
        if private is None:
            private = self.args.hub_private_repo
        found = self._api.create_repo(self.repo_name, token=token, private=private, exist_ok=True)
        self._repo_id = found.repo_id
        revision = revision or self.args.hub_revision
        if revision is not None:
            self._api.create_branch(found.repo_id, branch=revision, token=token, exist_ok=True)
        return found.repo_id

    # ------------------------------------------------------------------ during the training

    def wants_save(self) -> bool:
        """Whether a checkpoint that was just saved is to be pushed now. Collective.

        With `hub_always_push` off, a save that comes while an upload is on its way is not uploaded.
        """
        if not self.args.push_to_hub or HubStrategy(self.args.hub_strategy) is HubStrategy.END:
            return False
        return on_main(self._ranks, lambda: self.args.hub_always_push or not self._running())

    def push_save(self, checkpoint: Path, *, step: int, write_model: Callable[[Path], object]) -> None:
        """Start the upload of the model as it is now and, by the strategy, of its checkpoint.

        Args:
            checkpoint: as it was saved; may be deleted before it is uploaded.
            step: of the model.
            write_model: writes model and card into a folder; called on all ranks.
        """
        snapshot = self._new_snapshot()
        strategy = HubStrategy(self.args.hub_strategy)
        names = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        try:
            write_model(snapshot)
            if strategy in names:
                on_main(self._ranks, lambda: _link(checkpoint, snapshot / names[strategy]))
        except (CheckpointSaveError, TogetherError) as error:
            if self._ranks.is_main:
                shutil.rmtree(snapshot, ignore_errors=True)
            self._say_once(error)
            return
        message = f"Training in progress, step {step}"
        if self._ranks.is_main:
            replaced = f"{LAST_CHECKPOINT}/*" if strategy is HubStrategy.CHECKPOINT else None
            self._submit(snapshot, step=step, message=message, replaced=replaced)

    def finish(self, step: int | None, push: Callable[[], object]) -> None:
        """At the end of the training, wait until the model of its last step is on the hub, and say how it went.

        Args:
            step: of the model as it is now; None where no save has had it (the best one was loaded).
            push: pushes the model as it is now; used where the last save was not, or not successfully, pushed.
        """
        if not self.args.push_to_hub or HubStrategy(self.args.hub_strategy) is HubStrategy.END:
            return
        self._wait_for_all()
        if on_main(self._ranks, lambda: any(it.step == step and not it.failed for it in self._pushes)):
            return
        self.push_or_say(push)

    def push_or_say(self, push: Callable[[], object]) -> None:
        """Push; a hub that does not take it is an error in the log, and not the end of the user's script."""
        self.failure = None
        try:
            push()
        except (HubPushError, CheckpointSaveError) as error:
            self.failure = str(error)
            if self._ranks.is_main:
                logger.error("%s", error)

    # ------------------------------------------------------------------ a folder, now

    def push_files(
        self,
        folder: Path,
        names: Iterable[str],
        *,
        step: int,
        message: str,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        blocking: bool = True,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Upload files after all that is on its way.

        Args:
            folder: where the files are.
            names: of files in it; those that are not there are left out.
            step: of the model in it.
            message: of the commit.
            token: instead of `hub_token`.
            revision: branch, made if it is not there; instead of `hub_revision`.
            private: of a repository that is new; instead of `hub_private_repo`.
            blocking: wait for it.

        Returns:
            The commit, or its future if not `blocking`; None on ranks other than the main one.

        Raises:
            HubPushError: on all ranks, when the hub did not take a blocking upload.
        """
        snapshot = self._new_snapshot()
        names = list(names)
        future = None
        try:
            on_main(self._ranks, lambda: _link_files(folder, names, snapshot))
            if self._ranks.is_main:
                future = self._submit(
                    snapshot, step=step, message=message, token=token, revision=revision, private=private
                )
            if not blocking:
                return future
            self._wait_for_all()
            on_main(self._ranks, lambda: self._raise_as_os_error(future))
        except TogetherError as error:
            raise HubPushError(
                f"the model was not uploaded to {self.repo_name!r}: {error}. It is whole in {folder}; "
                "trainer.push_to_hub() tries again."
            ) from None
        return None if future is None else future.result()

    def _raise_as_os_error(self, future: Future[CommitInfo] | None) -> None:
        error = None if future is None else future.exception()
        if error is not None:
            raise OSError(self._words_of(error))

    def _new_snapshot(self) -> Path:
        """A name for a folder; the first one of a run takes away what a killed run has left."""
        folder = self.args.run_dir / SNAPSHOTS
        if self._count == 0 and self._ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        self._count += 1
        return folder / str(self._count)

    def _submit(
        self,
        snapshot: Path,
        *,
        step: int,
        message: str,
        replaced: str | None = None,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Future[CommitInfo]:
        """Queue an upload. On the main process."""

        def upload() -> CommitInfo:
            quiet = contextlib.nullcontext() if are_progress_bars_disabled() else suppress_progress_bars()
            try:
                with quiet:
                    return self._api.upload_folder(
                        repo_id=self._ensure_repo(token, private, revision),
                        folder_path=snapshot,
                        commit_message=message,
                        token=token,
                        revision=revision or self.args.hub_revision,
                        delete_patterns=replaced,
                    )
            finally:
                shutil.rmtree(snapshot, ignore_errors=True)

        future = self._api.run_as_future(upload)
        future.add_done_callback(self._report)
        self._pushes.append(Push(step, future))
        return future

    def _running(self) -> bool:
        return any(not push.future.done() for push in self._pushes)

    def _wait_for_all(self) -> None:
        """Wait for every upload. Collective, with a word a minute."""
        if self._ranks.is_main and self._running():
            logger.info("waiting for the upload to %r on the hub", self.repo_name)
        while on_main(self._ranks, self._still_running_after_a_while):
            if self._ranks.is_main:
                logger.warning("still uploading to %r on the hub", self.repo_name)

    def _still_running_after_a_while(self) -> bool:
        futures = [push.future for push in self._pushes]
        return bool(concurrent.futures.wait(futures, timeout=MEET_SECONDS).not_done)

    def _report(self, future: Future[CommitInfo]) -> None:
        error = future.exception()
        if error is not None:
            self._say_once(error)
        else:
            logger.info("uploaded: %s", future.result().commit_url)

    def _say_once(self, error: BaseException) -> None:
        if not self._said and self._ranks.is_main:
            logger.warning(
                "no upload to %r on the hub: %s. Training goes on, and the next save tries again; this is not "
                "said a second time.",
                self.repo_name,
                self._words_of(error),
            )
        self._said = True

    def _words_of(self, error: BaseException) -> str:
        """An error in one line, without the token."""
        text = " ".join(str(error).split()) or type(error).__name__
        secret = self.args.hub_token
        return redact_text(text.replace(secret, "<redacted>") if secret else text)


def _link(source: Path, target: Path) -> None:
    """A folder of links to a folder's files; copies where the file system has no links."""
    shutil.copytree(source, target, copy_function=_link_file)


def _link_files(folder: Path, names: list[str], target: Path) -> None:
    target.mkdir(parents=True)
    for name in names:
        if (folder / name).is_file():
            _link_file(folder / name, target / name)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
