"""`orpo-ds validate`: what a run would train on, from its own settings, without its model's weights."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, ProcessorMixin

from orpo_ds.config import ORPOConfig, ScriptArguments
from orpo_ds.data.images import IMAGE_COLUMNS
from orpo_ds.data.load import Rows
from orpo_ds.data.preference import OPTIONAL_COLUMNS, REQUIRED_COLUMNS, check_columns
from orpo_ds.data.processing import ProcessingClass, tokenizer_of
from orpo_ds.data.report import LENGTHS, DataReport, examine
from orpo_ds.data.tokenize import check_images
from orpo_ds.data.truncate import TokenizeOptions, TokenPair
from orpo_ds.model.load import load_processing, reads_images, use_chat_template
from orpo_ds.monitor.bars import of_libraries
from orpo_ds.prepare_data import tokenize_options
from orpo_ds.progress import bar
from orpo_ds.script_data import load_script_rows

logger = logging.getLogger(__name__)

PERCENTILES = (50, 90, 95, 99)
SHOWN_NUMBERS = 8


def validate(script: ScriptArguments, args: ORPOConfig, *, console: Console | None = None) -> bool:
    """Examine the rows to train on and print what they come to.

    Args:
        script: model and data.
        args: the run's settings.
        console: where to print; by default stdout, in colours on a terminal (`NO_COLOR` turns them off).

    Returns:
        Whether the training would start: some row is usable, and none is refused or rows may be dropped.

    Raises:
        ValueError: the tokenizer or the data cannot be loaded, or all rows have the same fault.
    """
    console = Console(highlight=False) if console is None else console
    processing_class, options = tokenizing_of(script, args)
    seed = args.seed if args.data_seed is None else args.data_seed
    with of_libraries("Reading the dataset"):
        rows = load_script_rows(script, seed=seed, evaluates=False).train
    columns = rows.column_names or list(next(iter(rows)))
    check_columns(columns)
    processor = processing_class if isinstance(processing_class, ProcessorMixin) else None
    check_images(columns, processor=processor, options=options)
    wanted = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS, *IMAGE_COLUMNS)
    known = [name for name in columns if name in wanted]
    report, done = DataReport(), 0
    total = len(rows) if isinstance(rows, Dataset) else 0  # a stream's bar counts up
    with bar(total=total, desc="Tokenising", unit=" rows") as tokenising:
        source: Rows = rows.select_columns(known).with_format(None)
        for report in examine(source, processing_class=processing_class, options=options):
            tokenising.update(report.rows - done)
            done = report.rows
    _print_rows(report, console, columns=(known, [name for name in columns if name not in known]))
    if report.usable:
        _print_lengths(report, console, options=options)
        _print_packing(report, console, args=args)
        _print_example(report, console, processing_class=processing_class)
    return _verdict(report, console, args=args)


def tokenizing_of(script: ScriptArguments, args: ORPOConfig) -> tuple[ProcessingClass, TokenizeOptions]:
    """The tokenizer or processor of the run, and the limits; the model's config is read if it has one."""
    name, keywords = script.model_name_or_path, {"trust_remote_code": args.trust_remote_code}
    try:
        config: Any = AutoConfig.from_pretrained(name, revision=script.model_revision, **keywords)
    except (OSError, ValueError) as error:
        logger.info("%s has no config, only its tokenizer is looked at: %s", name, error)
        config = None
    try:
        processing_class = load_processing(
            name,
            revision=script.model_revision,
            reads_images=config is not None and reads_images(config),
            **keywords,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"the tokenizer of model {name!r} cannot be loaded: {error}") from error
    if args.chat_template_path is not None:
        use_chat_template(processing_class, args.chat_template_path)
    options = tokenize_options(
        args,
        is_encoder_decoder=bool(config is not None and config.is_encoder_decoder),
        vocab_size=None if config is None else config.get_text_config().vocab_size,
    )
    return processing_class, options


def _print_rows(report: DataReport, console: Console, *, columns: tuple[list[str], list[str]]) -> None:
    read, ignored = columns
    console.print(f"rows            {report.rows:,}", style="bold")
    console.print(
        f"columns         {', '.join(read)}" + (f"; ignored: {', '.join(ignored)}" if ignored else "")
    )
    console.print(f"usable pairs    {report.usable:,}", style="green" if report.usable else "red")
    refused = sum(len(numbers) for numbers in report.refused.values())
    console.print(f"refused rows    {refused:,}", style="red" if refused else "")
    for reason, numbers in sorted(report.refused.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(str(number) for number in numbers[:SHOWN_NUMBERS])
        more = ", …" if len(numbers) > SHOWN_NUMBERS else ""
        console.print(Text(f"  {reason}: {len(numbers):,} (row {shown}{more})", style="red"), soft_wrap=True)
        console.print(Text(f"    row {numbers[0]}: {report.details[reason]}"), soft_wrap=True)


def _print_lengths(report: DataReport, console: Console, *, options: TokenizeOptions) -> None:
    table = Table("tokens", *("min", *(f"{one}%" for one in PERCENTILES), "max", "mean"), box=None)
    for name in LENGTHS:
        tokens = report.tokens(name)
        figures = [tokens.min(), *np.percentile(tokens, PERCENTILES), tokens.max(), tokens.mean()]
        table.add_row(name, *(f"{figure:,.0f}" for figure in figures))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print()
    console.print(table)
    console.print()
    count = report.usable
    console.print(
        f"cut to max_length={options.max_length}: {report.cut_prompts:,} prompts ({report.cut_prompts / count:.1%}), "
        f"responses of {report.cut_responses:,} pairs ({report.cut_responses / count:.1%}), "
        f"{report.cut_tokens:,} tokens in all",
        soft_wrap=True,
    )


def _print_packing(report: DataReport, console: Console, *, args: ORPOConfig) -> None:
    console.print(f"trunk saving    {report.trunk_saving:.1%} of the tokens of the full sequences")
    budget = args.micro_batch_tokens
    long = report.too_long(budget)
    if long:
        console.print(
            f"{long:,} pairs have more tokens than a micro-batch of {budget}: raise max_tokens_per_micro_batch or "
            "lower max_length",
            style="red",
            soft_wrap=True,
        )
        return
    packing = report.packing(batch_size=args.global_batch_size, max_tokens=budget)
    console.print(
        f"packing         {packing.pairs_per_micro_batch:.1f} pairs a micro-batch"
        + ("" if budget is None else f" of {budget:,} tokens, {packing.filled:.0%} full")
        + f"; {packing.of_padded:.0%} of the tokens of padded rows",
        soft_wrap=True,
    )


def _print_example(report: DataReport, console: Console, *, processing_class: ProcessingClass) -> None:
    pair = report.example
    assert pair is not None
    tokenizer = tokenizer_of(processing_class)
    console.print()
    console.print(f"row {report.example_row}, decoded", style="bold")
    for name, ids, style in _parts(pair):
        text = tokenizer.decode(ids)
        console.print(
            Text.assemble((f"{name} ({len(ids)} tokens) ", "bold"), (str(text), style)), soft_wrap=True
        )


def _parts(pair: TokenPair) -> list[tuple[str, list[int], str]]:
    """Name, ids and colour of the trunk and the two branches."""
    return [
        ("trunk", pair.chosen[: pair.trunk], "cyan"),
        ("chosen", pair.chosen[pair.trunk :], "green"),
        ("rejected", pair.rejected[pair.trunk :], "red"),
    ]


def _verdict(report: DataReport, console: Console, *, args: ORPOConfig) -> bool:
    console.print()
    if not report.usable:
        console.print("Nothing here can be trained on.", style="bold red")
        return False
    if report.refused and args.unusable_rows == "error":
        console.print(
            'Training stops at the refused rows; unusable_rows="drop" leaves them out.', style="bold red"
        )
        return False
    if report.too_long(args.micro_batch_tokens):
        return False
    console.print(f"{report.usable:,} pairs would be trained on.", style="bold green")
    return True
