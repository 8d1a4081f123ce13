"""How much this process says: `log_level` on the main process (of each host), `log_level_replica` on the others."""

from __future__ import annotations

import logging

from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging


def set_verbosity(args: TrainingArguments) -> None:
    """Set the levels of transformers' and of our own messages.

    Args:
        args: `log_level`, `log_level_replica` and `log_on_each_node`; "passive" leaves what is set as it is.
    """
    level = args.get_process_log_level()
    transformers_logging.set_verbosity(level)
    own = logging.getLogger("orpo_ds")
    if args.should_log and args.log_level == "passive":
        return
    own.setLevel(level)
    if not own.hasHandlers():  # without one, Python prints warnings and nothing below
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        own.addHandler(handler)
