"""`transformers chat`, as a person types it, with the folder that a run leaves: served by `transformers serve`."""

from __future__ import annotations

import json
import os
import pty
import select
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from transformers.utils import is_serve_available

from tests import small_runs
from tests.environment import without_rendezvous
from tests.test_chat import NEW_TOKENS, generated

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not is_serve_available(), reason="transformers serve needs fastapi, uvicorn and openai"
    ),
]
TRANSFORMERS = str(Path(sys.executable).with_name("transformers"))
PATIENCE_S = 180.0  # for the start of a process that imports torch, on a busy machine


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    trainer = small_runs.trainer(folder, model=small_runs.model_of("llama"))
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def address(trained: Path) -> Iterator[str]:
    """The address of `transformers serve FOLDER`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", str(trained), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = trained.parent / "serve.log"
    with log.open("wb") as written:
        server = subprocess.Popen(
            [TRANSFORMERS, *words], stdout=written, stderr=subprocess.STDOUT, env=without_rendezvous()
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + PATIENCE_S
        while not answers(f"{url}/health"):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError):
        return False


class Terminal:
    """A command in a pseudo-terminal: what it shows is read, and lines are typed."""

    def __init__(self, words: list[str], *, folder: Path) -> None:
        self._own, its = pty.openpty()
        self.shown = ""
        # Offline, huggingface_hub's client would not even talk to this machine.
        environment = without_rendezvous() | {"TERM": "dumb", "COLUMNS": "200", "HF_HUB_OFFLINE": "0"}
        self.process = subprocess.Popen(
            words, stdin=its, stdout=its, stderr=its, cwd=folder, env=environment, close_fds=True
        )
        os.close(its)

    def read_until(self, text: str, *, after: int = 0) -> None:
        """Read until `text` is shown, behind the first `after` characters."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.shown[after:]:
            ready, _, _ = select.select([self._own], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} is not shown:\n{self.shown}"
            try:
                self.shown += os.read(self._own, 65536).decode(errors="replace")
            except OSError as ended:  # the other side of the terminal is closed
                raise AssertionError(f"{text!r} is not shown:\n{self.shown}") from ended

    def type(self, line: str) -> None:
        os.write(self._own, f"{line}\n".encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)


def test_it_talks_to_the_trained_folder(trained: Path, address: str, tmp_path: Path) -> None:
    flags = [f"max_new_tokens={NEW_TOKENS}", "do_sample=False"]
    terminal = Terminal(
        [TRANSFORMERS, "chat", str(trained), address, *flags, "--user", "me"], folder=tmp_path
    )
    try:
        terminal.read_until("<me>:")
        terminal.type("Hello")
        terminal.read_until("Continue generating?")  # the answer ends with its last token that was allowed
        terminal.type("n")
        terminal.read_until("<me>:", after=terminal.shown.index("Continue generating?"))
        terminal.type("!save")
        terminal.read_until("Chat saved")
        terminal.type("!exit")
        assert terminal.process.wait(timeout=PATIENCE_S) == 0
    finally:
        terminal.close()
    [saved] = trained.glob("chat_*.json")  # below its own folder only where a model has a relative name
    turns = json.loads(saved.read_text())["chat_history"]
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert turns[0] == {"role": "user", "content": "Hello"}
    assert turns[1]["role"] == "assistant"
    assert turns[1]["content"].strip() == generated(model, [("user", "Hello")])
    assert turns[1]["content"].strip()
