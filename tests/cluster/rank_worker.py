"""A rank that says what reached it, and then does what its number's word tells it to.

    python -m tests.cluster.rank_worker FOLDER WORD_OF_RANK_0 WORD_OF_RANK_1 [anything …]

Words: `done`, `fail:STATUS`, `wait` (for a signal; ends with 85, as a preempted run does), `hang` (deaf to SIGTERM).
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    rank = int(os.environ["RANK"])
    folder, word = Path(words[0]), words[1 + rank]
    seen: list[str] = []
    if word == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for number in (signal.SIGUSR1, *([signal.SIGTERM] if word == "wait" else [])):
        signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))
    facts = {"host": socket.gethostname(), "words": words[3:], "environment": dict(os.environ)}
    (folder / f".{rank}").write_text(json.dumps(facts))
    (folder / f".{rank}").rename(folder / f"rank{rank}.json")
    if word.startswith("fail:"):
        sys.exit(int(word.partition(":")[2]))
    while word == "hang" or (word == "wait" and not seen):
        time.sleep(0.05)
    if word == "wait":
        (folder / f"signal{rank}").write_text(seen[0])
        sys.exit(85)


if __name__ == "__main__":
    main()
