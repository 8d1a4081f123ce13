"""Every collective that a piece of a run makes, with its bytes: DeepSpeed's, torch's and ours alike.

All of them end in an operator of torch's `c10d` namespace, so one dispatch mode sees them all, whoever calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A tensor below this is a number or two of bookkeeping: a loss, a norm, an overflow flag, metric sums.
SMALL_BYTES = 64
# Bytes that a rank sends in a ring, for a collective over S bytes and n ranks, in units of S (n - 1) / n.
SENT_SHARE = {"allreduce": 2, "allgather": 1, "reduce_scatter": 1}


@dataclass(frozen=True)
class Collective:
    """One call: its kind, and the bytes of the whole tensor that it works on (gathered, or before it is scattered)."""

    kind: str
    bytes: int

    @property
    def is_large(self) -> bool:
        """Whether it carries parameters or gradients."""
        return self.bytes >= SMALL_BYTES

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends, as ring algorithms do."""
        return SENT_SHARE.get(self.kind, 1) * self.bytes * (ranks - 1) / ranks


@dataclass
class Collectives(TorchDispatchMode):
    """A context in which collectives are written down."""

    calls: list[Collective] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        arguments: tuple[Any, ...] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:
        if function.namespace == "c10d":
            self.calls.append(Collective(_kind(function), _bytes(function, arguments)))
        return function(*arguments, **(keywords or {}))


def _kind(function: Any) -> str:
    name = (
        function._opname.strip("_")
        .removesuffix("_base")
        .removesuffix("_coalesced")
        .removesuffix("_into_tensor")
    )
    return {"reduce_scatter_tensor": "reduce_scatter"}.get(name, name)


def _bytes(function: Any, arguments: tuple[Any, ...]) -> int:
    """Of the larger side: a gather's output, a scatter's input, an all-reduce's tensor."""
    sides = [
        sum(
            leaf.numel() * leaf.element_size()
            for leaf in tree_leaves(argument)
            if isinstance(leaf, torch.Tensor)
        )
        for argument in arguments
    ]
    return max(sides, default=0)
