"""What every test shares: a seed that a failure prints, no network, and GPU tests that a CPU run collects.

`ORPO_DS_TEST_SEED=7 pytest …` runs with another seed; a failing test prints the one it ran with.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch

SEED_VARIABLE = "ORPO_DS_TEST_SEED"
DEFAULT_SEED = 20240307  # the day the paper appeared; any number would do

# Set before the first test imports them: nothing is fetched, and nobody's W&B account sees a test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def base_seed() -> int:
    """The seed of this run of the suite."""
    return int(os.environ.get(SEED_VARIABLE, DEFAULT_SEED))


def pytest_report_header() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"seed: {base_seed()} ({SEED_VARIABLE}), CUDA device: {device}, torch threads: {torch.get_num_threads()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.append(("seed", f"{SEED_VARIABLE}={base_seed()} pytest '{item.nodeid}'"))
    return report


@pytest.fixture
def seed() -> int:
    """The number to seed a test's own generators with."""
    return base_seed()


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on: for `deepspeed --master_port`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system of its own, of a size such as `64k`, so that a disk can really be full."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk{len(mounted) or ''}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(words, check=False, capture_output=True).returncode != 0:
            pytest.skip("mounting a small file system needs root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
