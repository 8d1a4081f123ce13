"""How a trained model leaves: into a folder, with its card, and from there to the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState

from orpo_ds.checkpoint import CheckpointSaveError, Ranks
from orpo_ds.checkpoint.manifest import package_versions
from orpo_ds.checkpoint.ranks import TogetherError, on_main
from orpo_ds.config import ORPOConfig
from orpo_ds.data.processing import ProcessingClass
from orpo_ds.export import save_pretrained
from orpo_ds.hub import HubPushes
from orpo_ds.model_card import CARD_NAME, CardFacts, card_text, is_own_card, license_of, write_card


class Publisher:
    """Saves one run's model, with its card, and pushes it. Every method is called on all ranks."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: ProcessingClass,
        args: ORPOConfig,
        *,
        ranks: Ranks,
        facts: Callable[[], Mapping[str, Any]],
        before_save: Callable[[], None],
    ) -> None:
        """Open the hub's repository if `push_to_hub` is on; nothing is written before a save.

        Args:
            model: what is trained.
            tokenizer: goes beside it.
            args: where to.
            ranks: this rank and its collective.
            facts: what the card says about data and run.
            before_save: makes the weights ready to be gathered.

        Raises:
            ValueError: the hub refuses the repository.
        """
        self._model, self._tokenizer, self._args, self._ranks = model, tokenizer, args, ranks
        self._facts, self._before_save = facts, before_save
        self._model_name: str | None = None
        self._dataset_name: str | None = None
        self._tags: tuple[str, ...] = ()
        self._hub = HubPushes(args, ranks=ranks)
        self._hub.open()

    @property
    def failure(self) -> str | None:
        """Why the model as it was last saved is not on the hub; None where it is, or was not to be."""
        return self._hub.failure

    def save(self, folder: Path, state: TrainerState) -> list[str]:
        """Write model and card into a folder; returns the names of the files that belong to the model.

        Raises:
            CheckpointSaveError: on all ranks.
        """
        self._before_save()
        names = save_pretrained(self._model, folder, tokenizer=self._tokenizer)
        self.write_card(folder, state)
        return [*names, CARD_NAME]

    def save_and_push(self, folder: Path, state: TrainerState) -> None:
        """What `save_model` does: with `push_to_hub` on, the saved folder also goes to the hub."""
        names = self.save(folder, state)
        if self._args.push_to_hub:
            step = state.global_step
            self._hub.push_or_say(
                lambda: self._hub.push_files(folder, names, step=step, message="Model save")
            )

    def push(
        self,
        state: TrainerState,
        *,
        message: str,
        blocking: bool,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save into `output_dir` and push that; see `HubPushes.push_files`."""
        folder = self._args.run_dir
        names = self.save(folder, state)
        return self._hub.push_files(
            folder,
            names,
            step=state.global_step,
            message=message,
            token=token,
            revision=revision,
            private=private,
            blocking=blocking,
        )

    def push_checkpoint(self, checkpoint: Path, state: TrainerState, *, begin: Callable[[], None]) -> None:
        """After a save, push what `hub_strategy` asks for, in the background; `begin` is called before."""
        if self._hub.wants_save():
            begin()
            self._hub.push_save(
                checkpoint, step=state.global_step, write_model=lambda folder: self.save(folder, state)
            )

    def finish(self, state: TrainerState) -> None:
        """At the end of the training: the last model is on the hub, or the log says why it is not."""
        is_last = not self._args.load_best_model_at_end or state.best_global_step == state.global_step
        self._hub.finish(
            state.global_step if is_last else None,
            lambda: self.push(state, message="End of training", blocking=True),
        )

    # ------------------------------------------------------------------ the card

    def name_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Iterable[str] | None = None,
    ) -> None:
        """Keep what the user says about model and data, for this card and the following."""
        if dataset_name is not None and Path(dataset_name).exists():
            dataset_name = Path(dataset_name).name  # where it lies on this disk is nobody's business
        self._model_name = model_name or self._model_name
        self._dataset_name = dataset_name or self._dataset_name
        if tags is not None:
            self._tags = tuple([tags] if isinstance(tags, str) else tags)

    def write_card(self, folder: Path, state: TrainerState) -> None:
        """Write README.md, where no person has written one. A card of the user's in `output_dir` goes along."""
        try:
            on_main(self._ranks, lambda: self._write_card_on_main(folder, state))
        except TogetherError as error:
            raise CheckpointSaveError(f"the model card in {folder} was not written: {error}") from None

    def _write_card_on_main(self, folder: Path, state: TrainerState) -> None:
        text = card_text(self._card_facts(state))
        own = self._args.run_dir / CARD_NAME
        if folder != self._args.run_dir and own.exists() and not is_own_card(own):
            text = own.read_text(encoding="utf-8")
        write_card(folder, text)

    def _card_facts(self, state: TrainerState) -> CardFacts:
        base = self._model.config.name_or_path or None
        is_folder = base is not None and Path(base).exists()
        name = self._hub.repo_id or self._hub.repo_name
        return CardFacts(
            model_name=self._model_name or name.rpartition("/")[2],
            base_model=None if is_folder else base,
            hub_id=name,
            dataset_name=self._dataset_name,
            tags=self._tags,
            license=license_of(base) if base and is_folder else None,
            is_adapter=hasattr(self._model, "peft_config"),
            data=self._facts(),
            settings=self._args.to_dict(),
            versions=package_versions(),
            history=state.log_history,
        )
