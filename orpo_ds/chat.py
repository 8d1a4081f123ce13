"""`orpo-ds chat MODEL [--compare BASE]`: talk to a model in the terminal, beside another one if asked.

    /system TEXT    a system message; begins anew
    /reset          forget the conversation
    /quit           end; so does the end of the input

On a terminal the answers grow in boxes, side by side. Elsewhere (a pipe, a test) the lines of the input are the
questions, and an answer is plain text, in a comparison with the model's name in front. The sampling is that of the
model's own generation config unless a flag says otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from orpo_ds.data.processing import tokenizer_of
from orpo_ds.model.load import ADAPTER_CONFIG, load_model, load_processing, own_generation_config

HELP = "/system TEXT: a system message · /reset: forget the conversation · /quit: end"

Turn = dict[str, str]


@dataclass(eq=False)
class Talker:
    """A model with its side of the conversation.

    Attributes:
        name: shown with its answers.
        model: on its device.
        tokenizer: with a chat template, or without one: then the turns are put one below the other.
        generation: changes to the model's own generation config.
        turns: the conversation so far.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    generation: dict[str, Any]
    turns: list[Turn] = field(default_factory=list)

    def answer(self, question: str, show: Callable[[str], None]) -> str:
        """Answer the next question, and remember both.

        Args:
            question: the user's turn.
            show: called with each piece of the answer as soon as it is a text.

        Raises:
            ValueError: the conversation leaves no room for an answer.
        """
        asked = [*self.turns, {"role": "user", "content": question}]
        inputs = self._inputs(asked)
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        width = inputs["input_ids"].shape[1]
        if limit is not None and width >= limit and not self.model.config.is_encoder_decoder:
            raise ValueError(
                f"the conversation has {width} tokens, and {self.name} has {limit} positions: /reset begins anew."
            )
        streamer = _Pieces(self.tokenizer, show)
        config = own_generation_config(
            self.model, self.tokenizer, padding_value=None, num_beams=1, **self.generation
        )
        model: Any = self.model  # generate comes from a mixin that annotations do not see
        with torch.inference_mode():
            model.generate(**inputs, generation_config=config, streamer=streamer)
        text = streamer.text.strip()
        self.turns = [*asked, {"role": "assistant", "content": text}]
        return text

    def _inputs(self, turns: Sequence[Turn]) -> dict[str, torch.Tensor]:
        if self.tokenizer.chat_template is None:
            made: Any = self.tokenizer("\n".join(turn["content"] for turn in turns), return_tensors="pt")
        else:
            made = self.tokenizer.apply_chat_template(
                list(turns), add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        return {name: made[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


class _Pieces(TextStreamer):
    """transformers' streamer, which holds a word back until it is whole, with another place to write to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass a finished piece on."""
        self.text += text
        self._show(text)


class Conversation:
    """Reads questions and commands, lets every talker answer, shows what they say."""

    def __init__(
        self, talkers: Sequence[Talker], *, source: TextIO, console: Console, system: str | None
    ) -> None:
        """Begin.

        Args:
            talkers: one or two.
            source: of the lines; a terminal is asked with a prompt.
            console: where answers go.
            system: the first system message, if any.
        """
        self._talkers = talkers
        self._source = source
        self._console = console
        self._system = system
        self._reset()

    def run(self) -> None:
        """Until /quit or the end of the input."""
        if self._console.is_terminal:
            self._console.print(HELP, style="dim")
        for line in self._lines():
            words = line.strip()
            command, _, rest = words.partition(" ")
            if not words:
                continue
            if command in ("/quit", "/exit"):
                return
            if command == "/reset":
                self._reset()
            elif command == "/system":
                self._system = rest.strip() or None
                self._reset()
            elif command.startswith("/"):
                self._say(f"there is no {command}. {HELP}")
            else:
                self._ask(words)

    def _lines(self) -> Iterator[str]:
        if not self._console.is_terminal:
            yield from self._source
            return
        while True:
            try:
                yield self._console.input("[bold]you ›[/bold] ")
            except (EOFError, KeyboardInterrupt):
                return

    def _reset(self) -> None:
        for talker in self._talkers:
            talker.turns = [{"role": "system", "content": self._system}] if self._system else []

    def _ask(self, question: str) -> None:
        before = [talker.turns for talker in self._talkers]
        try:
            in_boxes = self._console.is_terminal
            (answer_in_boxes if in_boxes else answer_plainly)(self._console, self._talkers, question)
        except (KeyboardInterrupt, ValueError) as error:
            for talker, turns in zip(self._talkers, before, strict=True):
                talker.turns = turns  # all of them have heard the same questions
            self._say(str(error) or "stopped: the question is forgotten")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


def answer_plainly(console: Console, talkers: Sequence[Talker], question: str) -> None:
    """One answer after the other, written as it comes."""

    def write(text: str) -> None:
        console.file.write(text)
        console.file.flush()

    for talker in talkers:
        if len(talkers) > 1:
            write(f"{talker.name}: ")
        talker.answer(question, write)
        write("\n")


def answer_in_boxes(console: Console, talkers: Sequence[Talker], question: str) -> None:
    """Boxes side by side that grow, and stay when all is said."""
    said = ["" for _ in talkers]

    def boxes() -> Table:
        grid = Table.grid(expand=True)
        for _ in talkers:
            grid.add_column(ratio=1)
        grid.add_row(
            *(
                Panel(Markdown(text), title=Text(talker.name), title_align="left")
                for talker, text in zip(talkers, said, strict=True)
            )
        )
        return grid

    # Transient: what is higher than the terminal is cut while it grows, and printed whole in the end.
    with Live(boxes(), console=console, transient=True) as live:
        for number, talker in enumerate(talkers):

            def grow(text: str, number: int = number) -> None:
                said[number] += text
                live.update(boxes())

            talker.answer(question, grow)
    console.print(boxes())


def load_talker(
    name: str, *, generation: dict[str, Any], dtype: str, trust_remote_code: bool = False
) -> Talker:
    """Load a model, or the adapters of a PEFT folder with the base model that they name.

    Args:
        name: folder or hub id.
        generation: changes to the model's own generation config.
        dtype: of the weights; `auto` is what the files have, but float32 on a CPU.
        trust_remote_code: run the code that the repository ships.

    Raises:
        ValueError: there is no such model.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    folder = Path(name).expanduser()
    tokens, base = name, name
    if (folder / ADAPTER_CONFIG).is_file():
        base = json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
        if not base:
            raise ValueError(
                f"{folder / ADAPTER_CONFIG} does not name the base model of the adapters: write its folder or hub id "
                "into base_model_name_or_path."
            )
        tokens = name if (folder / "tokenizer_config.json").is_file() else base
    try:
        model: Any = load_model(base, dtype=dtype, trust_remote_code=trust_remote_code)
        tokenizer = tokenizer_of(load_processing(tokens, trust_remote_code=trust_remote_code))
    except OSError as error:
        raise ValueError(f"model {base!r} cannot be loaded: {error}") from error
    if base != name:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
    return Talker(folder.name or name, model.eval().to(device), tokenizer, generation)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line of `orpo-ds chat`."""
    parser = argparse.ArgumentParser(
        prog="orpo-ds chat", description="Talk to a model in the terminal.", epilog=HELP, allow_abbrev=False
    )
    parser.add_argument("model", help="Folder (of a model or of PEFT adapters) or hub id.")
    parser.add_argument("--compare", metavar="BASE", help="A second model that answers the same questions.")
    parser.add_argument("--system", help="A system message.")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="Tokens of an answer, at most.")
    parser.add_argument(
        "--temperature", type=float, help="0: always the likeliest token. Unset: as the model says."
    )
    parser.add_argument("--top_p", type=float, help="Unset: as the model says.")
    parser.add_argument("--seed", type=int, default=42, help="Of the sampling.")
    parser.add_argument(
        "--dtype", default="auto", help="Of the weights; auto: of the files, float32 on a CPU."
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that the model ships.")
    return parser.parse_args(list(words))


def chat(words: Sequence[str], *, source: TextIO = sys.stdin, console: Console | None = None) -> None:
    """Run the command.

    Args:
        words: the command line.
        source: of the questions where the console is no terminal.
        console: where answers go; by default the standard output.

    Raises:
        ValueError: there is no such model.
    """
    args = arguments(words)
    generation: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
    if args.temperature == 0:
        generation |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    elif args.temperature is not None:
        generation |= {"do_sample": True, "temperature": args.temperature}
    if args.top_p is not None:
        generation |= {"do_sample": True, "top_p": args.top_p}
    set_seed(args.seed)
    names = [args.model] if args.compare is None else [args.model, args.compare]
    talkers = [
        load_talker(name, generation=generation, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
        for name in names
    ]
    if len(talkers) > 1 and talkers[1].tokenizer.chat_template is None:
        # A base model has none; answers to the same words are compared.
        talkers[1].tokenizer.chat_template = talkers[0].tokenizer.chat_template
    terminal = Console() if console is None else console
    if not sys.stdin.isatty() and console is None:
        terminal = Console(force_terminal=False)  # questions from a pipe: the answers are for another program
    Conversation(talkers, source=source, console=terminal, system=args.system).run()
