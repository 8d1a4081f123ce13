"""`orpo-ds`: one sub-command, one function.

    orpo-ds train --config run.yaml [--any_field value …]
    deepspeed --num_gpus 8 --module orpo_ds train --config run.yaml [--any_field value …]

The YAML file and the flags have the same flat names, those of `ScriptArguments` and `ORPOConfig`; a flag wins over
the file. A mistake of the user ends in one message and exit status 2, a run that cannot go on (the loss is NaN, the
disk is full at the last checkpoint) in one message and exit status 1; neither prints a traceback.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from transformers import HfArgumentParser

    from orpo_ds.config import ORPOConfig, ScriptArguments
    from orpo_ds.trainer import ORPOTrainer

USAGE_ERROR = 2
RUN_ERROR = 1


class RunError(RuntimeError):
    """A run that started well and cannot go on."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a sub-command; the entry point of `orpo-ds` and `python -m orpo_ds`."""
    words = list(sys.argv[1:] if argv is None else argv)
    # The deepspeed launcher puts --local_rank=N before everything else; the environment says the same.
    words = [word for word in words if not word.startswith("--local_rank=")]
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return
    if words[0] in ("-V", "--version"):
        from orpo_ds import __version__

        print(f"orpo-ds {__version__}")
        return
    command = COMMANDS.get(words[0])
    if command is None:
        _fail(
            f"there is no command {words[0]!r}.{_nearest(words[0], COMMANDS)} Commands: {', '.join(COMMANDS)}."
        )
    try:
        command(words[1:])
    except (ValueError, RunError) as error:
        if os.environ.get("ORPO_DS_DEBUG"):
            raise
        _fail(str(error), status=RUN_ERROR if isinstance(error, RunError) else USAGE_ERROR)


def train(words: Sequence[str]) -> None:
    """Train a model on preference pairs."""
    from orpo_ds.preemption import leave_on_signals

    leave_on_signals()
    script, args = parse_train_arguments(words)
    from orpo_ds.monitor.bars import of_libraries
    from orpo_ds.script_data import load_script_rows, public_name
    from orpo_ds.trainer import ORPOTrainer

    with of_libraries("Reading the dataset"):
        rows = load_script_rows(
            script,
            seed=args.seed if args.data_seed is None else args.data_seed,
            evaluates=args.do_eval or args.do_predict,
        )
    trainer = ORPOTrainer(
        script.model_name_or_path,
        args,
        train_dataset=rows.train,
        eval_dataset=rows.test if args.do_eval else None,
        peft_config=script.peft_config(),
    )
    trainer.publisher.name_card(dataset_name=public_name(script))
    _train_and_save(trainer)
    if args.do_eval and args.eval_strategy == "no":  # otherwise the last step has evaluated
        trainer.evaluate()
    if args.do_predict:
        assert rows.test is not None
        trainer.log(trainer.predict(rows.test).metrics or {})
    trainer.create_model_card()  # with the figures of the evaluation


def chat(words: Sequence[str]) -> None:
    """Talk to a model in the terminal, beside another one with --compare."""
    from orpo_ds import chat as command

    command.chat(words)


def validate(words: Sequence[str]) -> None:
    """Show what a dataset would train on: orpo-ds validate DATA --model M [any field of train]."""
    script, args = parse_train_arguments(validate_words(words))
    from orpo_ds.validate import validate

    if not validate(script, args):
        raise SystemExit(RUN_ERROR)


def validate_words(words: Sequence[str]) -> list[str]:
    """The words of `validate` as those of `train`: DATA first (several are `--datasets`), and `--model`."""
    words = list(words)
    count = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    data = words[:count]
    named = ["--dataset_name", *data] if len(data) == 1 else ["--datasets", *data] if data else []
    rest = ["--model_name_or_path" + word[7:] if _flag(word) == "--model" else word for word in words[count:]]
    return named + rest


def status(words: Sequence[str]) -> None:
    """Show how a run stands: progress, metrics, checkpoint, error."""
    from orpo_ds.monitor import status as command

    command.main(words)


def plot(words: Sequence[str]) -> None:
    """Draw the curves of one or several runs."""
    from orpo_ds.monitor import plot as command

    command.main(words)


def merge(words: Sequence[str]) -> None:
    """Merge adapters and their base model into one model folder."""
    from orpo_ds import merge as command

    command.run(words)


def preflight(words: Sequence[str]) -> None:
    """Check this host, or all hosts of a run, before its start."""
    from orpo_ds.cluster import preflight as command

    command.main(words)


def launch(words: Sequence[str]) -> None:
    """Train on every host of a hostfile: orpo-ds launch HOSTFILE --config run.yaml."""
    from orpo_ds.cluster import launch as command

    command.main(words)


def supervise(words: Sequence[str]) -> None:
    """Start a training again until it is done: after a preemption, a crash, a lost machine."""
    from orpo_ds.cluster import supervise as command

    command.main(words)


def estimate(words: Sequence[str]) -> None:
    """Say what a run will need: orpo-ds estimate run.yaml --gpus 8x80GB --nodes 4 [any field of train]."""
    from orpo_ds.estimate import command

    if not command.run(words):
        raise SystemExit(RUN_ERROR)


def submit(words: Sequence[str]) -> None:
    """Submit a run to SLURM: orpo-ds submit --nodes 4 --gpus-per-node 8 --time 04:00:00 run.yaml."""
    from orpo_ds.cluster import submit as command

    command.main(words)


def convert(words: Sequence[str]) -> None:
    """Turn a checkpoint into a model folder, or into DeepSpeed's universal format."""
    from orpo_ds import convert as command

    command.run(words)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "validate": validate,
    "estimate": estimate,
    "chat": chat,
    "status": status,
    "plot": plot,
    "merge": merge,
    "convert": convert,
    "preflight": preflight,
    "launch": launch,
    "supervise": supervise,
    "submit": submit,
}


def parse_train_arguments(words: Sequence[str]) -> tuple[ScriptArguments, ORPOConfig]:
    """Settings of a run from `--config FILE` and flags.

    Raises:
        ValueError: an unknown key or flag (names the nearest), a missing one, a value of another type, or a file that
            cannot be read.
    """
    from transformers import HfArgumentParser

    from orpo_ds.config import ORPOConfig, ScriptArguments

    kinds: Any = [ScriptArguments, ORPOConfig]
    # Without abbreviations: `--learning_rat` is a slip, and in the YAML file it is one as well.
    parser = HfArgumentParser(kinds, prog="orpo-ds train", allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", help="YAML file with any of these fields.")
    words = list(words)
    config_path = _take_config(words)
    if config_path is not None:
        _set_defaults(parser, read_yaml(config_path), source=config_path)
    missing = [
        f"--{action.dest}"
        for action in parser._actions
        if action.required and not any(_flag(word) in action.option_strings for word in words)
    ]
    if missing and not {"-h", "--help"} & set(words):
        raise ValueError(f"{', '.join(missing)} must be given, as a flag or in the file of --config.")
    try:
        *parsed, _, unknown = parser.parse_args_into_dataclasses(args=words, return_remaining_strings=True)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if unknown:
        fields = [action.dest for action in parser._actions]
        raise ValueError(
            f"unknown argument {unknown[0]!r}.{_nearest(unknown[0].lstrip('-'), fields, prefix='--')}"
        )
    script, args = parsed
    _merge_model_keywords(script, args)
    return script, args


def read_yaml(path: str) -> dict[str, Any]:
    """The fields of a run's YAML file.

    Raises:
        ValueError: no such file, not YAML, or not a mapping of fields.
    """
    import yaml

    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"--config {path}: no such file (from {Path.cwd()}).")
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML: {error}") from error
    if content is None:
        raise ValueError(
            f"--config {path}: the file is empty. Write `field: value` lines, or leave --config out."
        )
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: expected `field: value` lines, found {type(content).__name__}.")
    return content


def _take_config(words: list[str]) -> str | None:
    """Remove `--config FILE` from the words and return FILE."""
    for place, word in enumerate(words):
        if word.startswith("--config="):
            del words[place]
            return word.partition("=")[2]
        if word == "--config":
            if place + 1 == len(words):
                raise ValueError("--config needs the path of a YAML file.")
            path = words[place + 1]
            del words[place : place + 2]
            return path
    return None


def _set_defaults(parser: HfArgumentParser, fields: dict[str, Any], *, source: str) -> None:
    """Make the file's values the defaults of the flags; argparse converts strings (`1e-5`) by the field's type."""
    for name, value in fields.items():
        # A switch that is on by default is two actions: --disable_dropout and --no_disable_dropout.
        actions = [action for action in parser._actions if action.dest == name]
        if not actions:
            known = {action.dest for action in parser._actions}
            raise ValueError(f"{source}: unknown field {name!r}.{_nearest(name, known)}")
        for action in actions:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            action.default = str(value) if is_number and action.type is not None else value
            action.required = False


def _train_and_save(trainer: ORPOTrainer) -> None:
    """Train, and write the model even where the last checkpoint did not fit on the disk: the model is smaller.

    Raises:
        RunError: the loss is not a number, memory is short, or something could not be saved.
    """
    from orpo_ds.checkpoint import CheckpointSaveError
    from orpo_ds.out_of_memory import StepOutOfMemoryError
    from orpo_ds.step import NonFiniteLossError

    failures = []
    for part in (trainer.train, trainer.save_model):
        try:
            part()
        except CheckpointSaveError as error:
            failures.append(str(error))
        except (NonFiniteLossError, StepOutOfMemoryError) as error:
            raise RunError(str(error)) from error
    if trainer.publisher.failure is not None:
        failures.append(trainer.publisher.failure)
    if failures:
        raise RunError("\n".join(failures))


def _merge_model_keywords(script: ScriptArguments, args: ORPOConfig) -> None:
    """The model's flags become keywords of `from_pretrained`."""
    from orpo_ds.prepare import training_dtype

    keywords = args.model_keywords
    keywords.setdefault("revision", script.model_revision)
    keywords.setdefault("dtype", script.dtype)
    if script.attn_implementation is not None:
        keywords.setdefault("attn_implementation", script.attn_implementation)
    quantization = script.quantization_config(dtype=training_dtype(args))
    if quantization is not None:
        keywords.setdefault("quantization_config", quantization)
    args.model_init_kwargs = keywords


def _overview() -> str:
    lines = [f"  {name:<10} {function.__doc__}" for name, function in COMMANDS.items()]
    return "\n".join(["usage: orpo-ds COMMAND …   (orpo-ds COMMAND --help lists its fields)", "", *lines])


def _nearest(word: str, known: Any, *, prefix: str = "") -> str:
    near = difflib.get_close_matches(word.partition("=")[0], list(known), n=1)
    return f" Did you mean {prefix}{near[0]}?" if near else ""


def _flag(word: str) -> str:
    return word.partition("=")[0]


def _fail(message: str, *, status: int = USAGE_ERROR) -> NoReturn:
    rank = int(os.environ.get("RANK", "0"))
    origin = f"orpo-ds (rank {rank})" if rank else "orpo-ds"
    print(f"{origin}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)
