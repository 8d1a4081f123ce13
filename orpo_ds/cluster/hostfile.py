"""DeepSpeed's hostfile: a line `host slots=PROCESSES` for every host, comments behind `#`."""

from __future__ import annotations

import re
from pathlib import Path

# As in deepspeed/launcher/runner.py, whose import would load torch.
LINE = re.compile(r"(\S+)\s+slots=(\d+)")


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Hosts in the order of the file, each with its number of processes.

    Raises:
        ValueError: no such file, no host in it, a host named twice, or a line of another form.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"hostfile {path}: no such file. Write one with a line `host slots=GPUS` for every host."
        )
    slots: dict[str, int] = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        found = LINE.fullmatch(content)
        if found is None:
            raise ValueError(f"hostfile {path}, line {number}: {content!r} is not `host slots=GPUS`.")
        host = found[1]
        if host in slots:
            raise ValueError(f"hostfile {path}, line {number}: host {host} was named before.")
        slots[host] = int(found[2])
    if not slots:
        raise ValueError(f"hostfile {path}: it names no host. Write a line `host slots=GPUS` for every host.")
    return slots
