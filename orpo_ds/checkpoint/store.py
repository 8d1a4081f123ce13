"""Checkpoints of one run: written as a whole or not at all, found again, and kept within a limit.

The life of a checkpoint in `output_dir`:

    .tmp-checkpoint-20/     all ranks write here; after a crash it is removed at the next start
    checkpoint-20/          the same folder, renamed once every file is on the disk and in manifest.json
    .del-checkpoint-20/     on its way out; after a crash its removal is finished at the next start

A rename is atomic, so `checkpoint-20` never exists half written or half deleted.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from orpo_ds.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointMetadata,
    FileEntry,
    hash_progress,
    list_files,
    new_manifest,
    problems_by_size,
    read_manifest,
    seal_files,
    share_of_files,
    sync_path,
    verify,
    write_durably,
)
from orpo_ds.checkpoint.ranks import Ranks, TogetherError, free_bytes, on_main, together

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
PARTIAL_PREFIX = ".tmp-"
DOOMED_PREFIX = ".del-"


class CheckpointSaveError(RuntimeError):
    """A save failed on some rank; nothing of it is left, and earlier checkpoints are as they were."""


class CheckpointStore:
    """The checkpoints of one output folder, which all ranks share. Every rank makes a store.

    Args:
        output_dir: where `checkpoint-<step>` folders go; made if it does not exist.
        save_total_limit: checkpoints to keep, None for all (`TrainingArguments.save_total_limit`).
        ranks: this rank and its collective.
    """

    def __init__(self, output_dir: str | Path, *, save_total_limit: int | None, ranks: Ranks) -> None:
        if save_total_limit is not None and save_total_limit < 1:
            raise ValueError(f"save_total_limit={save_total_limit}: at least one checkpoint must be kept")
        self.output_dir = Path(output_dir)
        self.save_total_limit = save_total_limit
        self.ranks = ranks
        self._proved_good: set[Path] = set()

    def clean_up(self) -> None:
        """Finish or undo what a crash interrupted. Collective; called at the start, before any save."""
        on_main(self.ranks, self._clean_up_on_main)

    def _clean_up_on_main(self) -> None:
        for doomed in self.output_dir.glob(f"{DOOMED_PREFIX}checkpoint-*"):
            final = self.output_dir / doomed.name.removeprefix(DOOMED_PREFIX)
            if not final.exists() and not problems_by_size(doomed):
                # Killed between the two renames of `_publish`: the old checkpoint is still whole.
                doomed.rename(final)
            else:
                shutil.rmtree(doomed)
        for partial in self.output_dir.glob(f"{PARTIAL_PREFIX}checkpoint-*"):
            logger.warning("removing %s: its save was interrupted", partial)
            shutil.rmtree(partial)

    def save(
        self,
        write: Callable[[Path], None],
        metadata: CheckpointMetadata,
        *,
        estimated_bytes: int = 0,
    ) -> Path:
        """Write `checkpoint-<metadata.step>`. Collective: all ranks call it at the same step.

        Args:
            write: writes this rank's files into the folder that it is given. An OSError or ValueError that it
                raises fails the save on all ranks; it must then have left no rank waiting in a collective.
            metadata: what the manifest says about the run.
            estimated_bytes: size of the checkpoint over all ranks, used for the check of the free space while
                there is no earlier checkpoint to go by.

        Returns:
            The path of the finished checkpoint, the same on every rank.

        Raises:
            CheckpointSaveError: on all ranks, when one of them failed (disk full, no permission, ...); says
                which and why. The partial folder is gone and the earlier checkpoints are untouched.
        """
        final = self.output_dir / f"checkpoint-{metadata.step}"
        partial = self.output_dir / f"{PARTIAL_PREFIX}{final.name}"
        try:
            on_main(self.ranks, lambda: self._make_partial(partial, final, estimated_bytes))
            together(self.ranks, lambda: self._see_partial(partial))
            together(self.ranks, lambda: write(partial))
            sized = on_main(self.ranks, lambda: list_files(partial))
            entries = together(self.ranks, lambda: self._seal_share(partial, sized))
            files = {name: entry for share in entries for name, entry in share.items()}
            on_main(self.ranks, lambda: self._publish(partial, final, metadata, files))
        except TogetherError as error:
            free = on_main(self.ranks, lambda: free_bytes(self.output_dir))
            on_main(self.ranks, lambda: shutil.rmtree(partial, ignore_errors=True))
            raise CheckpointSaveError(
                f"{final} was not saved: {error} ({free:,} bytes were free in {self.output_dir})"
            ) from None
        self._proved_good.add(final)
        return final

    def _make_partial(self, partial: Path, final: Path, estimated_bytes: int) -> None:
        if final.exists() and not (final / MANIFEST_NAME).is_file():
            raise ValueError(f"{final} is there already and is not a checkpoint of orpo_ds: move it away")
        if partial.exists():
            shutil.rmtree(partial)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        needed = self._expected_bytes(estimated_bytes)
        if free_bytes(self.output_dir) < needed:
            raise OSError(
                f"it needs about {needed:,} bytes, which {self.output_dir} does not have. Free space there, "
                f"or set a lower save_total_limit (now {self.save_total_limit})"
            )
        partial.mkdir()

    def _expected_bytes(self, estimated_bytes: int) -> int:
        for folder in self.checkpoints():
            try:
                return read_manifest(folder).total_bytes
            except ValueError:
                continue
        return estimated_bytes

    def _see_partial(self, partial: Path) -> None:
        if not partial.is_dir():
            raise OSError(
                f"{partial} is not visible here: output_dir must be on a file system that all hosts share"
            )

    def _seal_share(self, partial: Path, sized: dict[str, int]) -> dict[str, FileEntry]:
        with hash_progress(f"hash {partial.name}", sized, self.ranks) as progress:
            return seal_files(partial, share_of_files(sized, self.ranks), progress)

    def _publish(
        self, partial: Path, final: Path, metadata: CheckpointMetadata, files: dict[str, FileEntry]
    ) -> None:
        if not files:
            raise ValueError("no rank wrote a file")
        for folder in [path for path in partial.rglob("*") if path.is_dir()]:
            sync_path(folder)
        write_durably(partial / MANIFEST_NAME, new_manifest(metadata, files).to_json())
        sync_path(partial)
        replaced = self._set_aside(final) if final.exists() else None
        partial.rename(final)
        sync_path(self.output_dir)
        if replaced is not None:
            shutil.rmtree(replaced)

    def _set_aside(self, folder: Path) -> Path:
        doomed = folder.with_name(f"{DOOMED_PREFIX}{folder.name}")
        if doomed.exists():
            shutil.rmtree(doomed)
        return folder.rename(doomed)

    def checkpoints(self) -> list[Path]:
        """This run's checkpoint folders (those with a manifest), good or not, highest step first."""
        return [folder for folder in numbered_folders(self.output_dir) if (folder / MANIFEST_NAME).is_file()]

    def latest_good(self) -> Path | None:
        """The newest good checkpoint, or None. Collective. Broken newer ones are reported by name."""
        newest_first = on_main(self.ranks, lambda: numbered_folders(self.output_dir))
        for folder in newest_first:
            problems = verify(folder, self.ranks)
            if not problems:
                self._proved_good.add(folder)
                return folder
            if self.ranks.is_main:
                logger.warning("skipping %s, which is not a good checkpoint: %s", folder, "; ".join(problems))
        return None

    def newest_whole(self) -> Path | None:
        """The newest checkpoint whose files have their sizes, or None. Not collective: for a rank that fails alone."""
        return next((folder for folder in self.checkpoints() if not problems_by_size(folder)), None)

    def prune(self, *, keep: Iterable[Path] = (), keep_newest: bool = True) -> list[Path]:
        """Delete the oldest checkpoints beyond `save_total_limit`. Collective.

        `keep` (the best one) stays and counts. The newest good checkpoint always stays, unless the training is over
        (`keep_newest=False`). Nothing is deleted before the bytes of one that stays were proved, by this run's own
        save or by reading them again. Folders without our manifest are never touched. Returns the deleted folders.
        """
        if self.save_total_limit is None:
            return []
        names = {Path(path).name for path in keep}
        whole, surplus = on_main(self.ranks, lambda: self._split_by_limit(names, keep_newest=keep_newest))
        if not surplus or not any(self._prove(folder) for folder in whole):
            return []
        on_main(self.ranks, lambda: self._delete(surplus))
        return surplus

    def _delete(self, folders: list[Path]) -> None:
        for folder in folders:
            shutil.rmtree(self._set_aside(folder))

    def _split_by_limit(self, keep: set[str], *, keep_newest: bool) -> tuple[list[Path], list[Path]]:
        """(checkpoints that stay, newest first; checkpoints to delete). Only whole ones fill the limit."""
        folders = self.checkpoints()
        whole = [folder for folder in folders if not problems_by_size(folder)]
        kept = [folder for folder in whole if folder.name in keep]
        for folder in whole:
            if len(kept) < (self.save_total_limit or 0) and folder not in kept:
                kept.append(folder)
        if whole and whole[0] not in kept and keep_newest:
            kept.append(whole[0])
        kept.sort(key=step_of, reverse=True)
        return kept, [folder for folder in folders if folder not in kept]

    def _prove(self, folder: Path) -> bool:
        if folder not in self._proved_good and not verify(folder, self.ranks):
            self._proved_good.add(folder)
        return folder in self._proved_good


def numbered_folders(output_dir: Path) -> list[Path]:
    """Folders named `checkpoint-<step>` in `output_dir`, highest step first, with or without a manifest."""
    if not output_dir.is_dir():
        return []
    folders = [
        path for path in output_dir.iterdir() if path.is_dir() and CHECKPOINT_NAME.fullmatch(path.name)
    ]
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """20 for `checkpoint-20`."""
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    assert match is not None, folder
    return int(match.group(1))
