"""The CUDA kernels held to their contract without a GPU; `varlen_contract.py` says how.

`make test` puts flash-attn and the triton that its reference needs into a folder of their own, so that
nothing else imports them. They may lie in the environment itself just as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model import varlen_contract

ROOT = Path(__file__).parents[2]
FLASH_REFERENCE = Path(sys.prefix, "flash-reference")

ROUNDING = 2.0**-11  # of a number to fp16, relative
# An output is rounded once. A gradient of a trunk is the rounded sum of two rounded parts; the reference also
# reads the rounded output in its backward.
TOLERANCE = {"output": 1.1 * ROUNDING} | dict.fromkeys(
    ("query gradient", "key gradient", "value gradient"), 4 * ROUNDING
)


@pytest.mark.parametrize("kernel", varlen_contract.KERNELS)
def test_the_call_gives_full_attention_forward_and_backward(kernel: str, seed: int) -> None:
    path = os.pathsep.join([str(ROOT), str(FLASH_REFERENCE)])
    ran = subprocess.run(
        [sys.executable, "-m", varlen_contract.__name__, kernel, str(seed)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if ran.returncode == varlen_contract.UNAVAILABLE:
        pytest.skip(f"{kernel} cannot be imported: {ran.stdout.strip()}")
    assert ran.returncode == 0, ran.stderr
    cases = json.loads(ran.stdout.splitlines()[-1])
    rules = varlen_contract.KERNELS[kernel][2]
    assert len(cases) == len(varlen_contract.HEADS) * len(rules)
    too_far = {
        (case, name): error
        for case, errors in cases.items()
        for name, error in errors.items()
        if not error <= TOLERANCE[name]
    }
    assert not too_far
