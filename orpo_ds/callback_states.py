"""States of callbacks in a checkpoint: transformers' `ExportableState`, by class name, in `trainer_state.json`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from transformers.trainer_callback import CallbackHandler, ExportableState, TrainerState

from orpo_ds import distributed

logger = logging.getLogger(__name__)


def export_states(state: TrainerState, objects: Iterable[Any]) -> None:
    """Write into `state` the states of those objects that have one, as transformers does it in `TrainerState`."""
    exportable: Any = [item for item in objects if isinstance(item, ExportableState)]
    state.stateful_callbacks = TrainerState(stateful_callbacks=exportable).stateful_callbacks


def saved_states(state: TrainerState) -> dict[str, Any]:
    """What `export_states` wrote into a state that was loaded: states by the name of their class."""
    assert isinstance(state.stateful_callbacks, dict), "its annotation is of before it is exported"
    return dict(state.stateful_callbacks)


def restore_states(handler: CallbackHandler, states: dict[str, Any]) -> None:
    """Put in place of every callback that has a saved state a new one in that state, as transformers does.

    Args:
        handler: of the run; its callbacks are replaced where they stand.
        states: from a checkpoint. States of classes that the run has no callback of are named in a warning.
    """
    left = {name: list(data) if isinstance(data, list) else [data] for name, data in states.items()}
    for place, callback in enumerate(handler.callbacks):
        waiting = left.get(type(callback).__name__)
        if waiting and isinstance(callback, ExportableState):
            handler.callbacks[place] = type(callback).from_state(waiting.pop(0))
    unused = sorted(name for name, waiting in left.items() if waiting)
    if unused and distributed.is_main():
        logger.warning("the checkpoint has states of callbacks that this run lacks: %s", ", ".join(unused))
