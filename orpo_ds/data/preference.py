"""A row of a preference dataset -> prompt, chosen and rejected as text, with the chat template applied.

TRL documents four shapes of a row, and every one of them ends here as the same three strings:

    standard, explicit         prompt: str             chosen: str              rejected: str
    standard, implicit                                 chosen: str              rejected: str
    conversational, explicit   prompt: [message, …]    chosen: [message, …]     rejected: [message, …]
    conversational, implicit                           chosen: [message, …]     rejected: [message, …]

An implicit prompt is what chosen and rejected have in common. A `prompt` string beside conversational
responses is only a copy of the question (UltraFeedback has one) and is ignored, as in TRL. `tools` and
`chat_template_kwargs` go to the template, and `system` or `system_prompt` becomes the first message of a conversation
that does not begin with one; every other column is nobody's business.

A row that cannot become three strings raises `RowError` with a reason that can be counted. What is wrong with
the whole run (no chat template at all, no such column) is a plain ValueError.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jinja2 import TemplateError

from orpo_ds.data.processing import ProcessingClass, tokenizer_of

Message: TypeAlias = dict[str, Any]
Text: TypeAlias = str | list[Message]  # a standard or a conversational value

REQUIRED_COLUMNS = ("chosen", "rejected")
SYSTEM_COLUMNS = ("system", "system_prompt")
OPTIONAL_COLUMNS = ("prompt", "tools", "chat_template_kwargs", *SYSTEM_COLUMNS)

Reason: TypeAlias = Literal[
    "missing_key",
    "wrong_type",
    "mixed_formats",
    "malformed_conversation",
    "template_error",
    "empty_prompt",
    "empty_response",
    "identical_responses",
    "no_room_for_response",
    "id_beyond_vocabulary",
    "image_mismatch",
    "image_in_response",
    "unreadable_image",
]


class RowError(ValueError):
    """A row that cannot be trained on.

    Attributes:
        reason: what is wrong, as one of the countable words of `Reason`.
        row: number of the row in the dataset, from 0.
        detail: the sentence for people.
    """

    def __init__(self, *, reason: Reason, row: int, detail: str) -> None:
        super().__init__(f"row {row}: {detail} ({reason})")
        self.reason: Reason = reason
        self.row = row
        self.detail = detail


@dataclass(frozen=True)
class Preference:
    """One pair as text; `prompt + chosen` and `prompt + rejected` are the two full texts."""

    prompt: str
    chosen: str
    rejected: str


def check_columns(columns: Sequence[str]) -> None:
    """Refuse a dataset that has no column `chosen` or `rejected`.

    Raises:
        ValueError: with the columns found, those needed, and the nearest name of each missing one.
    """
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if not missing:
        return
    near = {name: difflib.get_close_matches(name, columns, n=1, cutoff=0.5) for name in missing}
    hints = [f"rename {found[0]!r} to {name!r}" for name, found in near.items() if found]
    raise ValueError(
        f"a preference dataset needs the columns {list(REQUIRED_COLUMNS)} (and may have "
        f"{list(OPTIONAL_COLUMNS)}); {missing} not found among {list(columns)}. "
        + ("Perhaps: " + "; ".join(hints) if hints else "Rename the columns, or choose another dataset")
    )


def to_preference(
    row: Mapping[str, Any], *, processing_class: ProcessingClass, row_number: int
) -> Preference:
    """Bring one row of any of the four shapes to text.

    The texts are those of TRL 1.16 (`maybe_extract_prompt`, then `maybe_apply_chat_template`), with three
    differences: `tools` and a system column reach the template (TRL's ORPO forgets them), and keys that Arrow filled
    with null because another row has them are taken out before the template sees them.

    Args:
        row: the row; values as `datasets` gives them.
        processing_class: the tokenizer or processor whose template renders conversations.
        row_number: number of the row in the dataset, for messages.

    Raises:
        RowError: the row cannot be used.
        ValueError: the row is conversational and the tokenizer has no chat template.
    """
    prompt, chosen, rejected = prompt_and_responses(row, row_number)
    if chosen == rejected:
        raise RowError(
            reason="identical_responses", row=row_number, detail="chosen and rejected are the same text"
        )
    if isinstance(chosen, str):
        assert isinstance(prompt, str)
        assert isinstance(rejected, str)
        for name, response in (("chosen", chosen), ("rejected", rejected)):
            if not response.strip():
                raise _empty_response(name, row_number)
        return Preference(prompt, chosen, rejected)

    assert isinstance(prompt, list)
    assert isinstance(rejected, list)
    _check_conversation(prompt, chosen, rejected, row_number)
    if processing_class.chat_template is None:
        raise ValueError(
            f"row {row_number} is a conversation, and {tokenizer_of(processing_class).name_or_path!r} has no "
            "chat template. Set chat_template_path to a Jinja file or to a model whose tokenizer has one"
        )
    return _render(
        prompt, chosen, rejected, row=row, processing_class=processing_class, row_number=row_number
    )


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of leading elements that two sequences share."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def prompt_and_responses(row: Mapping[str, Any], row_number: int) -> tuple[Text, Text, Text]:
    """The three values of a row, all strings or all conversations; an implicit prompt is split off.

    Raises:
        RowError: a value is missing, of another type, or of another format than the others.
    """
    chosen = _text(row, name="chosen", row_number=row_number)
    rejected = _text(row, name="rejected", row_number=row_number)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError(
            reason="mixed_formats",
            row=row_number,
            detail=f"chosen is {_kind(chosen)} and rejected is {_kind(rejected)}",
        )
    prompt = None if row.get("prompt") is None else _text(row, name="prompt", row_number=row_number)
    if prompt is not None and isinstance(prompt, str) == isinstance(chosen, str):
        return _after_system(prompt, row, row_number), chosen, rejected
    if isinstance(prompt, list):
        raise RowError(
            reason="mixed_formats",
            row=row_number,
            detail=f"prompt is {_kind(prompt)} and chosen is {_kind(chosen)}",
        )
    start = _implicit_prompt_length(chosen, rejected)
    if isinstance(chosen, list) and start == 0:
        raise RowError(
            reason="empty_prompt",
            row=row_number,
            detail="chosen and rejected share no first message, and no conversational prompt is beside them",
        )
    return _after_system(chosen[:start], row, row_number), chosen[start:], rejected[start:]


def _after_system(prompt: Text, row: Mapping[str, Any], row_number: int) -> Text:
    """A conversation behind the message of the row's system column; text has no place for one."""
    if isinstance(prompt, str) or not prompt or prompt[0]["role"] == "system":
        return prompt
    for name in SYSTEM_COLUMNS:
        content = row.get(name)
        if content is None or content == "":
            continue
        if not isinstance(content, str):
            raise RowError(
                reason="wrong_type",
                row=row_number,
                detail=f"{name} must be a string, got {_excerpt(content)}",
            )
        return [{"role": "system", "content": content}, *prompt]
    return prompt


def _implicit_prompt_length(chosen: Text, rejected: Text) -> int:
    """Where the responses begin in texts that carry their prompt: TRL's `extract_prompt`.

    The last shared element stays with the responses when one text is the beginning of the other, and a space
    before the first difference goes with them, because tokenizers attach it to the word that follows.
    """
    shared = common_prefix_length(chosen, rejected)
    if shared == min(len(chosen), len(rejected)):
        return max(0, shared - 1)
    if shared > 0 and chosen[shared - 1] == " ":
        return shared - 1
    return shared


def _text(row: Mapping[str, Any], *, name: str, row_number: int) -> Text:
    """A value of the row that is a string or a list of messages, with Arrow's null fillings taken out."""
    value = row.get(name)
    if value is None:
        raise RowError(
            reason="missing_key",
            row=row_number,
            detail=f"no {name!r} among {[key for key, held in row.items() if held is not None]}",
        )
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(
            reason="wrong_type",
            row=row_number,
            detail=f"{name} must be a string or a list of messages, got {_excerpt(value)}",
        )
    return [
        _message(message, place=f"{name}[{index}]", row_number=row_number)
        for index, message in enumerate(value)
    ]


def _message(value: Any, *, place: str, row_number: int) -> Message:
    """One message with its role and content checked."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise RowError(
            reason="malformed_conversation",
            row=row_number,
            detail=f"{place} is not a message with a 'role': {_excerpt(value)}",
        )
    content = value.get("content")
    if content is not None and not isinstance(content, str | list):
        raise RowError(
            reason="malformed_conversation",
            row=row_number,
            detail=f"the content of {place} must be text, got {_excerpt(content)}",
        )
    # Templates test `message.content is none` for a message that only calls tools: this one null stays.
    return {**_without_nulls(value), "content": _without_nulls(content)}


def _without_nulls(value: Any) -> Any:
    """The value without the dictionary keys that hold null.

    Arrow gives all rows of a column the same keys and fills with null. A template would print those into a
    tool's schema, or take `'tool_calls' in message` for true.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    if isinstance(value, list):
        return [_without_nulls(held) for held in value]
    return value


def _check_conversation(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], row_number: int
) -> None:
    """Refuse what a template cannot turn into a prompt and two answers."""
    if not prompt:
        raise RowError(reason="empty_prompt", row=row_number, detail="the prompt has no message")
    if prompt[-1]["role"] not in ("user", "tool", "assistant"):
        raise RowError(
            reason="malformed_conversation",
            row=row_number,
            detail="the prompt must end with a message of the user, a tool or the assistant, "
            f"not of {prompt[-1]['role']!r}",
        )
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not any(_says_something(message) for message in response):
            raise _empty_response(name, row_number)
        if response[-1]["role"] != "assistant":
            raise RowError(
                reason="malformed_conversation",
                row=row_number,
                detail=f"{name} must end with a message of the 'assistant', not of {response[-1]['role']!r}",
            )


def _says_something(message: Message) -> bool:
    content = message["content"]
    if isinstance(content, list):  # of parts
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return bool(content and content.strip()) or bool(message.get("tool_calls"))


def _render(
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    *,
    row: Mapping[str, Any],
    processing_class: ProcessingClass,
    row_number: int,
) -> Preference:
    """Apply the chat template to the prompt and to both full conversations."""
    options: dict[str, Any] = {
        "tools": _tools(row, row_number) or None,  # Llama's template announces an empty list of tools
        "tokenize": False,
        **_template_kwargs(row, row_number),
    }

    def render(messages: list[Message], **mode: Any) -> str:
        text = processing_class.apply_chat_template(messages, **options, **mode)
        assert isinstance(text, str)
        return text

    continues = prompt[-1]["role"] == "assistant"
    try:
        before = render(prompt, add_generation_prompt=not continues, continue_final_message=continues)
        with_chosen = render(prompt + chosen)
        with_rejected = render(prompt + rejected)
    except (TemplateError, TypeError, ValueError) as error:
        # Templates refuse by raise_exception, and fail with TypeError on content they did not expect.
        raise RowError(
            reason="template_error", row=row_number, detail=f"the chat template refused it: {error}"
        ) from error
    # A generation prompt may hold more than the conversation does at that place (DeepSeek-R1's <think>): the
    # prompt is what all three have in common.
    start = min(common_prefix_length(before, with_chosen), common_prefix_length(before, with_rejected))
    return Preference(before[:start], with_chosen[start:], with_rejected[start:])


def _tools(row: Mapping[str, Any], row_number: int) -> list[Any] | None:
    """The `tools` column: a list of JSON schemas, or the same as a JSON string, which keeps its nulls."""
    column = row.get("tools")
    try:
        tools = json.loads(column) if isinstance(column, str) else _without_nulls(column)
    except json.JSONDecodeError as error:
        raise RowError(
            reason="wrong_type",
            row=row_number,
            detail=f"tools is a string that is not JSON ({error}): {_excerpt(column)}",
        ) from error
    if tools is not None and not isinstance(tools, list):
        raise RowError(
            reason="wrong_type",
            row=row_number,
            detail=f"tools must be a list of schemas or its JSON, got {_excerpt(tools)}",
        )
    return tools


def _template_kwargs(row: Mapping[str, Any], row_number: int) -> dict[str, Any]:
    """The `chat_template_kwargs` column: extra variables for this row's template."""
    kwargs = row.get("chat_template_kwargs")
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict):
        raise RowError(
            reason="wrong_type",
            row=row_number,
            detail=f"chat_template_kwargs must be a dictionary, got {_excerpt(kwargs)}",
        )
    return _without_nulls(kwargs)


def _empty_response(name: str, row_number: int) -> RowError:
    return RowError(reason="empty_response", row=row_number, detail=f"{name} has no text")


def _kind(value: Text) -> str:
    return "a string" if isinstance(value, str) else "a conversation"


def _excerpt(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
