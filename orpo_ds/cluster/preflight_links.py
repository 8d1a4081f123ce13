"""Can every host reach every other one, and how fast? Plain TCP, so that the answer names the pair of hosts.

An all-reduce that hangs says nothing of who it waits for. So before one is tried, each host listens, connects to all
others, and sends to the next one in the ring what passes within two seconds.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

CONNECT_TIMEOUT_S = 5.0
STREAM_S = 2.0
CHUNK = 64 << 10
STREAM_CHUNKS = 4096  # 256 MiB; what a faster network carries is measured by the all-reduce
CHUNKS_IN_FLIGHT = 64
PING, STREAM = b"P", b"S"


@dataclass(frozen=True)
class Target:
    """Where a host listens; `name` says for what, in a message."""

    name: str
    address: str
    port: int


class Listener:
    """A port of this host that answers the others until it is closed."""

    def __init__(self, port: int = 0) -> None:
        """Listen on a port, 0: any free one.

        Raises:
            OSError: another process has the port.
        """
        self._socket = socket.create_server(("", port))
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Give the port back."""
        # Closing alone would leave the port with the thread that waits in accept().
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=_answer, args=(peer,), daemon=True).start()


def _answer(peer: socket.socket) -> None:
    """Serve one connection: say who we are, or acknowledge chunk after chunk."""
    with peer:
        peer.settimeout(CONNECT_TIMEOUT_S + STREAM_S)
        try:
            if peer.recv(1) == PING:
                peer.sendall(socket.gethostname().encode())
                return
            while _receive(peer, CHUNK):
                peer.sendall(b".")
        except OSError:
            return  # the other side reports it: it knows between whom


def _receive(peer: socket.socket, count: int) -> bool:
    """Read `count` bytes; False where the other side has finished."""
    while count:
        part = peer.recv(min(count, 1 << 16))
        if not part:
            return False
        count -= len(part)
    return True


def unreachable(targets: Sequence[Target]) -> dict[str, str]:
    """Which of the targets do not answer a connection, and why."""

    def reach(target: Target) -> str:
        try:
            with socket.create_connection((target.address, target.port), timeout=CONNECT_TIMEOUT_S) as peer:
                peer.sendall(PING)
                return "" if peer.recv(256) else "the connection was closed"
        except TimeoutError:
            return f"no answer within {CONNECT_TIMEOUT_S:g} s"
        except OSError as error:
            return error.strerror or str(error)

    with ThreadPoolExecutor(max_workers=max(1, len(targets))) as pool:
        answers = list(pool.map(reach, targets))
    return {target.name: answer for target, answer in zip(targets, answers, strict=True) if answer}


def stream(target: Target) -> float:
    """Send to a target for two seconds, or 256 MiB.

    Returns:
        Bytes a second that were acknowledged; 0 where nothing got through.
    """
    place = (target.address, target.port)
    try:
        with socket.create_connection(place, timeout=CONNECT_TIMEOUT_S) as peer:
            started = time.monotonic()
            acknowledged = _send_chunks(peer, deadline=started + STREAM_S)
            return acknowledged * CHUNK / (time.monotonic() - started)
    except OSError:
        return 0.0


def _send_chunks(peer: socket.socket, *, deadline: float) -> int:
    """Send until the deadline or the last chunk; returns how many were acknowledged."""
    chunk = bytes(CHUNK)
    sent = acknowledged = 0
    peer.sendall(STREAM)
    while acknowledged < STREAM_CHUNKS and (left := deadline - time.monotonic()) > 0:
        peer.settimeout(left)
        try:
            if sent < STREAM_CHUNKS and sent - acknowledged < CHUNKS_IN_FLIGHT:
                peer.sendall(chunk)
                sent += 1
            elif answers := len(peer.recv(CHUNKS_IN_FLIGHT)):
                acknowledged += answers
            else:
                break
        except TimeoutError:  # a slow link is full when the time is up, and some answers are not read yet
            peer.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                acknowledged += len(peer.recv(CHUNKS_IN_FLIGHT))
            break
    return acknowledged
