"""A compile that was killed does not stop the next start, and a venv need not be activated to compile."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_ds import native_ops

COMPILE_TIMEOUT_S = 240  # torch's own wait for the file has no end
READY = (
    "from orpo_ds import native_ops; import logging; logging.basicConfig();"
    "native_ops.ready(native_ops.SHARED_MEMORY_COLLECTIVES); print('compiled')"
)


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    """A copy of the compiled op's folder, in a `TORCH_EXTENSIONS_DIR` of this test's own."""
    native_ops.ready(native_ops.SHARED_MEMORY_COLLECTIVES)
    [library] = Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*shm*/*.so")
    return Path(shutil.copytree(library.parent, tmp_path / "ops" / library.parent.name))


def start(compiled: Path, *, path: str) -> subprocess.CompletedProcess[str]:
    """Get the op ready in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", READY],
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(compiled.parent), "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMPILE_TIMEOUT_S,
        check=False,
    )


def without_ninja() -> str:
    """The PATH less the folders that have a `ninja`."""
    folders = os.environ["PATH"].split(os.pathsep)
    kept = [folder for folder in folders if shutil.which("ninja", path=folder) is None]
    assert shutil.which("ninja", path=os.pathsep.join(kept)) is None
    return os.pathsep.join(kept)


def test_a_lock_that_a_killed_compile_left_is_removed(compiled: Path) -> None:
    lock = compiled / "lock"
    lock.touch()
    finished = start(compiled, path=os.environ["PATH"])
    assert finished.returncode == 0, finished.stdout
    assert f"removing {lock}: the process that compiled there is gone" in finished.stdout
    assert finished.stdout.endswith("compiled\n")
    assert not lock.exists()


def test_a_lock_that_someone_holds_is_respected(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with lock.open("w"):
        assert native_ops._held_open(lock)
    assert not native_ops._held_open(lock)
    lock.unlink()
    assert not native_ops._held_open(lock)


def test_ninja_is_found_beside_the_interpreter(compiled: Path) -> None:
    """`.venv/bin/python` started by its path: the shell knows nothing of the venv."""
    assert shutil.which("ninja", path=str(Path(sys.executable).parent)) is not None
    # torch asks ninja in every process, also when everything is compiled.
    finished = start(compiled, path=without_ninja())
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.endswith("compiled\n")
