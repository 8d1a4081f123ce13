"""Which code a run was started with: the git commit of the user's own code, and what was changed since."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

MAX_NAMES = 50
GIT_SECONDS = 10


def source_facts() -> dict[str, Any]:
    """The commit and the state of the repository that the run's code lies in.

    Returns:
        `git_commit`, with `-dirty` where tracked files differ from it, and `git_changed_files`, the names of changed
        and of new files (at most 50): their content is not copied, it may hold a secret. Empty outside of git.
    """
    folder = source_folder()
    commit = _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    if not commit:
        return {}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=normal") or ""
    return {
        "git_commit": commit.strip(),
        "git_changed_files": [line[3:] for line in changed.splitlines()][:MAX_NAMES],
    }


def source_folder() -> Path:
    """Folder of the script that was started, if it is a project's own; else the working directory.

    `orpo-ds` and `python -m` are installed programs, and the user's files are where they were started from.
    """
    script = Path(sys.argv[0])
    if script.suffix == ".py" and script.is_file() and script.name != "__main__.py":
        return script.resolve().parent
    return Path.cwd()


def _git(folder: Path, *words: str) -> str | None:
    """Answer of git; None where it is not installed, does not answer, or `folder` is not in a repository."""
    try:
        answer = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=False, timeout=GIT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None
