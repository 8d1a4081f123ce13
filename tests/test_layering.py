"""The one-way street of the design: which room of the house may know which.

Read from the source with `ast`, so that an import inside a function or under `TYPE_CHECKING` counts as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "orpo_ds"
LIBRARIES = {"accelerate", "datasets", "deepspeed", "peft", "torch", "transformers", "wandb"}


@dataclass(frozen=True)
class Room:
    """What a module or sub-package may import: rooms of ours, and of the libraries that cost or couple something."""

    name: str
    ours: frozenset[str]
    libraries: frozenset[str]
    uses_collectives: bool = False


ROOMS = [
    Room("data", frozenset(), frozenset({"torch", "datasets", "transformers"})),
    Room("loss", frozenset(), frozenset({"torch"}), uses_collectives=True),
    Room("model", frozenset({"data"}), frozenset({"torch", "transformers", "peft"}), uses_collectives=True),
    Room(
        "policy",
        frozenset({"data", "loss", "model"}),
        frozenset({"torch", "transformers", "peft"}),
        uses_collectives=True,
    ),
]
# Tokenizers and processors are all that the data may know of transformers.
TRANSFORMERS_FOR_DATA = {"PreTrainedTokenizerBase", "PreTrainedTokenizerFast", "ProcessorMixin", "load_image"}


@dataclass(frozen=True)
class Import:
    """One name that a file imports: `from module import name`, or `import module` with an empty name."""

    where: str
    module: str
    name: str

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]

    @property
    def room(self) -> str | None:
        """The room of ours that is imported, or None for anything else."""
        dotted = f"{self.module}.{self.name}".split(".")
        return dotted[1] if dotted[0] == "orpo_ds" and dotted[1] else None

    def __str__(self) -> str:
        what = f"from {self.module} import {self.name}" if self.name else f"import {self.module}"
        return f"{self.where}: {what}"


def files_of(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


def imports_of(path: Path) -> Iterator[Import]:
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        where = f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"
        if isinstance(node, ast.Import):
            yield from (Import(where, alias.name, "") for alias in node.names)
        else:
            assert node.level == 0, f"{where}: relative import; the project writes absolute ones"
            yield from (Import(where, node.module or "", alias.name) for alias in node.names)


def imports_of_room(room: str) -> list[Import]:
    files = files_of(room)
    assert files, f"orpo_ds/{room} has no file: the table above is out of date"
    return [found for path in files for found in imports_of(path)]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_imports_only_what_lies_upstream(room: Room) -> None:
    allowed = room.ours | {room.name}
    wrong = [
        found for found in imports_of_room(room.name) if found.room is not None and found.room not in allowed
    ]
    assert not wrong, f"{room.name} may import of ours only {sorted(allowed)}:\n" + "\n".join(map(str, wrong))


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_imports_only_its_libraries(room: Room) -> None:
    forbidden = LIBRARIES - room.libraries
    wrong = [found for found in imports_of_room(room.name) if found.library in forbidden]
    assert not wrong, f"{room.name} may import only {sorted(room.libraries)}:\n" + "\n".join(map(str, wrong))


def test_data_knows_tokenizers_and_no_models() -> None:
    wrong = [
        found
        for found in imports_of_room("data")
        if found.module.startswith("transformers")
        and found.name not in TRANSFORMERS_FOR_DATA
        # `import transformers` alone serves its __version__ in the cache key.
        and (found.name or found.module != "transformers")
    ]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_no_room_asks_which_rank_it_is(room: Room) -> None:
    """Collectives over a group that was handed in may be used; ranks are the trainer's alone."""
    asked = {"get_rank", "get_world_size", "is_initialized", "init_process_group"}
    environment = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    wrong = []
    for path in files_of(room.name):
        for node in ast.walk(ast.parse(path.read_text())):
            named = getattr(node, "attr", None) in asked or getattr(node, "id", None) in asked
            if named or (isinstance(node, ast.Constant) and node.value in environment):
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{node.lineno}: {ast.unparse(node)}")
        if not room.uses_collectives:
            wrong += [
                str(found) for found in imports_of(path) if found.module.startswith("torch.distributed")
            ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "first_words", ["import orpo_ds", "import orpo_ds.cli; orpo_ds.cli.main(['--help'])"]
)
def test_help_answers_before_torch_is_loaded(first_words: str) -> None:
    heavy = sorted(LIBRARIES)
    script = f"import sys; {first_words}; print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    assert answer.stderr.strip() == "[]"
