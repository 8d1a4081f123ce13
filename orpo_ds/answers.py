"""`generate_during_eval`: a few prompts of each evaluation set, answered before the training and at every evaluation.

The table `prompt, before training, now, chosen` goes to the dashboards that have tables, to the terminal where there
are none, and line by line into `answers.jsonl` beside `metrics.jsonl`. The lines of step 0 are where a resumed run
finds the answers of the untrained model again.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import CallbackHandler, TrainerState

from orpo_ds import distributed
from orpo_ds.config import ORPOConfig
from orpo_ds.data.tokenize import TokenDataset
from orpo_ds.generation import Generator, text_of
from orpo_ds.monitor.jsonl import MetricsFile, read_metrics
from orpo_ds.monitor.report import log_table

ANSWERS_FILE = "answers.jsonl"
COLUMNS = ("prompt", "before training", "now", "chosen")
DASHBOARDS_WITH_TABLES = frozenset({"tensorboard", "wandb"})
WIDTH = 120  # columns of the table in a log
MOST_LETTERS = 400  # of a cell in a log; everything is in the file


@dataclass(frozen=True)
class Question:
    """A prompt that is answered at every evaluation.

    Attributes:
        row: of the dataset.
        ids: of the prompt, as it is trained on.
        prompt: its text.
        chosen: the preferred response.
    """

    row: int
    ids: tuple[int, ...]
    prompt: str
    chosen: str


class AnswerTables:
    """Asks the questions of an evaluation set and shows the answers. Made on every rank; the main one writes."""

    def __init__(
        self, args: ORPOConfig, *, tokenizer: PreTrainedTokenizerBase, handler: CallbackHandler
    ) -> None:
        """Nothing is asked yet.

        Args:
            args: the run's settings.
            tokenizer: of the model.
            handler: its callbacks that have tables get them.
        """
        self._args = args
        self._tokenizer = tokenizer
        self._handler = handler
        self._file = MetricsFile(args.run_dir, name=ANSWERS_FILE)
        self._before: dict[str, str] = {}  # by prompt

    def show(
        self, generator: Generator, state: TrainerState, *, name: str, dataset: TokenDataset, writes: bool
    ) -> None:
        """Answer the questions of a dataset and put the table where it is seen. Collective.

        Args:
            generator: the model as it is now.
            state: of the trainer; at step 0 the answers are those before the training.
            name: of the evaluation set, empty where there is one.
            dataset: the evaluation set.
            writes: whether the run owns its output folder.
        """
        questions = self._questions(dataset)
        untrained = state.global_step == 0
        if untrained and all(question.prompt in self._before for question in questions):
            now = [self._before[question.prompt] for question in questions]
        else:
            now = generator.answers(
                [question.ids for question in questions], max_new_tokens=self._args.generate_max_new_tokens
            )
        if untrained:
            self._before |= {question.prompt: answer for question, answer in zip(questions, now, strict=True)}
        if not distributed.is_main():
            return
        rows = [
            (question.prompt, self._before.get(question.prompt, ""), answer, question.chosen)
            for question, answer in zip(questions, now, strict=True)
        ]
        if writes:
            for question, row in zip(questions, rows, strict=True):
                entry = dict(zip(("prompt", "before", "now", "chosen"), row, strict=True))
                self._file.append({"step": state.global_step, "set": name, "row": question.row, **entry})
        title = f"answers/{name}" if name else "answers"
        log_table(self._handler, state, name=title, columns=COLUMNS, rows=rows)
        if not DASHBOARDS_WITH_TABLES & set(self._args.report_to or ()):
            tqdm.write(as_text(f"{title}, step {state.global_step}", rows))

    def rewind(self, state: TrainerState) -> None:
        """Continue from a checkpoint: forget later answers, and read those of the untrained model."""
        if not self._file.path.is_file():
            return
        step, entries = state.global_step, read_metrics(self._file.path)
        # An evaluation at the checkpoint's own step came before it or comes again.
        logged = {name for entry in state.log_history if entry["step"] == step for name in entry}
        evaluated = any(name.startswith("eval_") for name in logged)
        self._file.rewind(step, entries if evaluated else [])
        self._before = {entry["prompt"]: entry["now"] for entry in entries if entry["step"] == 0}

    def _questions(self, dataset: TokenDataset) -> list[Question]:
        """The same rows at every evaluation, drawn by the run's seed."""
        if dataset.images is not None:
            raise ValueError(
                "generate_during_eval=True: prompts with images are not answered during a training. Leave it out."
            )
        count = min(self._args.generate_num_prompts, len(dataset))
        rows = sorted(random.Random(self._args.seed).sample(range(len(dataset)), count))
        questions = []
        for index in rows:
            pair = dataset[index]
            ids, answer = pair.chosen[: pair.chosen_start], pair.chosen[pair.chosen_start :]
            questions.append(
                Question(
                    row=int(dataset.row_numbers[index]),
                    ids=tuple(ids),
                    prompt=text_of(self._tokenizer, ids),
                    chosen=text_of(self._tokenizer, answer),
                )
            )
        return questions


def as_text(title: str, rows: Sequence[Sequence[str]]) -> str:
    """The table for a log."""
    table = Table(*COLUMNS, title=title, show_lines=True)
    for row in rows:
        table.add_row(*(cell if len(cell) <= MOST_LETTERS else f"{cell[:MOST_LETTERS]} …" for cell in row))
    page = io.StringIO()
    Console(file=page, width=WIDTH, markup=False, highlight=False).print(table)
    return page.getvalue()
