"""The part of preflight that runs on each host: one JSON request a line on stdin, one answer a line on stdout.

It ends when stdin does, so a driver that is killed leaves nothing behind on the hosts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from orpo_ds.cluster import preflight_links as links
from orpo_ds.cluster.preflight_allreduce import Meeting, reduce_here
from orpo_ds.cluster.preflight_host import Request, describe_host

# Before an answer, so that what a login shell or a site's module system prints is not taken for one.
MARK = "orpo-ds-preflight "


class Agent:
    """Keeps the ports that it listens on from one request to the next."""

    def __init__(self) -> None:
        self._listeners: list[links.Listener] = []
        self.handlers: dict[str, Callable[[dict[str, Any]], Any]] = {
            "describe": lambda request: describe_host(Request(**request)).to_json(),
            "listen": self._listen,
            "close": self._close,
            "reach": lambda request: links.unreachable(
                [links.Target(*target) for target in request["targets"]]
            ),
            "stream": lambda request: links.stream(links.Target(*request["target"])),
            "reduce": lambda request: vars(reduce_here(Meeting(**request))),
        }

    def _listen(self, request: dict[str, Any]) -> Any:
        """Listen on the ports (0: any); answers each with its number, or with why not."""
        answers: list[int | str] = []
        for port in request["ports"]:
            try:
                self._listeners.append(links.Listener(port))
                answers.append(self._listeners[-1].port)
            except OSError as error:
                answers.append(error.strerror or str(error))
        return answers

    def _close(self, request: dict[str, Any]) -> None:
        while self._listeners:
            self._listeners.pop().close()


def main() -> None:
    """Answer requests until there are no more."""
    agent = Agent()
    for line in sys.stdin:
        request = json.loads(line)
        answer = agent.handlers[request.pop("do")](request)
        print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
