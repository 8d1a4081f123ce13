"""DeepSpeed's C++ ops, compiled once a machine and never waited for in vain.

torch guards a compilation with a file named `lock` that it deletes afterwards. A process that is killed while it
compiles leaves the file behind, and every later start waits for it for ever, silently. So the first use of an op goes
through here: a lock that the kernel releases when its holder dies admits one process at a time, and a `lock` file that
is then there, and that no running process holds open, is a dead one's.

Each Python environment has a folder of its own for what it compiles. In torch's, which all share, two environments
compile the same op again and again, because the command names the headers of one of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from filelock import FileLock
from torch.utils.cpp_extension import get_default_build_root

logger = logging.getLogger(__name__)

SHARED_MEMORY_COLLECTIVES = "ShareMemCommBuilder"  # DeepSpeed's all-reduce between the ranks of one CPU host
CPU_ADAM = "CPUAdamBuilder"
QUANTIZER = "QuantizerBuilder"  # CUDA; of ZeRO++


def ready(builder_name: str) -> None:
    """Make sure that an op is compiled, before DeepSpeed asks for it.

    Args:
        builder_name: one of this module's names.

    Raises:
        RuntimeError: the op does not compile here; DeepSpeed's message says why.
    """
    _find_ninja()
    root = _build_folder()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "orpo_ds.lock"):
        for lock in root.glob("*/lock"):
            if not _held_open(lock):
                logger.warning("removing %s: the process that compiled there is gone", lock)
                lock.unlink(missing_ok=True)
        get_accelerator().create_op_builder(builder_name).load(verbose=False)


def ready_for_ranks() -> None:
    """Compile what `deepspeed.init_distributed` loads: on CPU hosts, the collectives over shared memory."""
    if not torch.cuda.is_available():
        ready(SHARED_MEMORY_COLLECTIVES)


def _build_folder() -> Path:
    """TORCH_EXTENSIONS_DIR; unless the user has set it, a folder of this environment beside torch's default."""
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    default = Path(get_default_build_root()).with_name("orpo_ds") / "native_ops" / environment
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default)))


def _find_ninja() -> None:
    """Put this interpreter's own programs on the PATH: `.venv/bin/python` without an activated venv has no ninja."""
    programs = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if programs not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join((programs, path)) if path else programs


def _held_open(lock: Path) -> bool:
    """Whether a process that is visible here has the file open; torch keeps it open while it compiles."""
    try:
        wanted = lock.stat()
    except FileNotFoundError:
        return False
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = link.stat()
        except OSError:  # the process, or the file, is gone; or it belongs to someone else
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False
