"""What `_watched.py` wrote, read back: one run's steps."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import _workload  # noqa: F401  # puts `tests` on the path

from tests.collectives import Collective


@dataclass(frozen=True)
class Watched:
    """One run; the first step warms up and the last is slowed by counting, so neither is timed."""

    seconds_a_step: float
    sent_a_step: float  # bytes that left the first host's interfaces
    losses: list[float]
    calls: list[Collective]
    micro_steps: int
    ranks: int

    @property
    def sent_by_collectives(self) -> float:
        """Bytes that a rank sends in a step by the formula of a ring."""
        return sum(call.sent(self.ranks) for call in self.calls)


def read(path: Path) -> Watched:
    """The figures of a run."""
    facts = json.loads(path.read_text())
    return Watched(
        seconds_a_step=median(facts["seconds"][1:-1]),
        sent_a_step=median(facts["sent"][1:-1]),
        losses=facts["losses"],
        calls=[Collective(**call) for call in facts["calls"]],
        micro_steps=facts["micro_steps"],
        ranks=facts["ranks"],
    )
