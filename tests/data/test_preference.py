"""Rows of all documented shapes become TRL's text, and a row that cannot says which and why."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.data_utils import extract_prompt

from orpo_ds.data.preference import Preference, RowError, check_columns, to_preference
from tests.data.trl_reference import trl_preference
from tests.real_tokenizers import tokenizer, with_template

USER = {"role": "user", "content": "Why is the sky blue?"}
GOOD = {"role": "assistant", "content": "Blue light is scattered more."}
BAD = {"role": "assistant", "content": "It is painted."}
SYSTEM = {"role": "system", "content": "Answer in one sentence."}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bern"}}}],
}

ROWS: dict[str, dict[str, Any]] = {
    "standard, explicit": {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    "standard, implicit": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    "standard, implicit, inside a word": {"chosen": "The cat", "rejected": "The car"},
    "standard, implicit, one continues": {"chosen": "The sky is blue.", "rejected": "The sky is blue. Ha."},
    "conversation, explicit": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "conversation, implicit": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "conversation with a copy of the prompt": {
        "prompt": "Why is the sky blue?",
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
    },
    "several turns": {"prompt": [USER, GOOD, USER], "chosen": [GOOD], "rejected": [BAD]},
    "several turns of response": {"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD]},
    "begun answer": {
        "prompt": [USER, {"role": "assistant", "content": "Well,"}],
        "chosen": [GOOD],
        "rejected": [BAD],
    },
    "system message": {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
    "tool call": {"prompt": [USER], "chosen": [CALL], "rejected": [BAD]},
    "extra columns": {"chosen": "a b", "rejected": "a c", "score": 0.5, "messages": None, "label": True},
}
# Shapes that a template has no words for: Mistral's raises, SmolLM2's finds no content.
REFUSED = {"qwen2": [], "smollm2": ["tool call"], "mistral": ["tool call", "system message", "begun answer"]}


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name in REFUSED for shape in ROWS if shape not in REFUSED[name]]
)
def test_text_is_trls(name: str, shape: str) -> None:
    row = ROWS[shape]
    assert to_preference(row, processing_class=tokenizer(name), row_number=0) == trl_preference(
        {key: value for key, value in row.items() if key not in ("messages", "label")}, tokenizer(name)
    )


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.text("ab \n", max_size=12), st.text("ab \n", max_size=12))
def test_implicit_prompt_of_any_text_is_trls(chosen: str, rejected: str) -> None:
    if chosen == rejected or not chosen or not rejected:
        return
    expected = extract_prompt({"chosen": chosen, "rejected": rejected})
    if chosen[0] != rejected[0]:
        # TRL looks at chosen[-1] for the space before the first character.
        expected = {"prompt": "", "chosen": chosen, "rejected": rejected}
    row = {"chosen": chosen, "rejected": rejected}
    if not expected["chosen"].strip() or not expected["rejected"].strip():
        with pytest.raises(RowError, match="empty_response"):
            to_preference(row, processing_class=tokenizer("qwen2"), row_number=0)
    else:
        found = to_preference(row, processing_class=tokenizer("qwen2"), row_number=0)
        assert found == Preference(**expected)
        assert (found.prompt + found.chosen, found.prompt + found.rejected) == (chosen, rejected)


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER])], ids=["list", "JSON string"])
def test_tools_reach_the_template(tools: Any) -> None:
    row = {"prompt": [USER], "chosen": [CALL], "rejected": [BAD]}
    found = to_preference({**row, "tools": tools}, processing_class=tokenizer("qwen2"), row_number=0)
    assert '"name": "get_weather"' in found.prompt
    assert found == trl_preference(row, tokenizer("qwen2"), tools=[WEATHER])


def test_an_empty_list_of_tools_is_no_tools() -> None:
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    announced = "{% if tools is not none %}You have tools.{% endif %}{{ messages | length }}{{ messages[-1].content }}"
    found = [
        to_preference(variant, processing_class=with_template("qwen2", announced), row_number=0)
        for variant in (row, {**row, "tools": []}, {**row, "tools": "[]"})
    ]
    assert found[0] == found[1] == found[2]
    assert "tools" not in found[0].prompt


def test_chat_template_kwargs_reach_the_template() -> None:
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    template = "{% for message in messages %}{{ message.content }}|{% endfor %}{{ style }}"
    processing_class = with_template("qwen2", template)
    plain = to_preference(row, processing_class=processing_class, row_number=0)
    styled = to_preference(
        {**row, "chat_template_kwargs": {"style": "formal", "filled_by_arrow": None}},
        processing_class=processing_class,
        row_number=0,
    )
    assert plain.chosen == "Blue light is scattered more.|"
    assert styled.chosen == "Blue light is scattered more.|formal"


def test_a_generation_prompt_that_the_conversation_lacks_is_not_prompt() -> None:
    """Qwen3 opens an empty thought in the generation prompt; the rendered answer has none."""
    row = {**ROWS["conversation, explicit"], "chat_template_kwargs": {"enable_thinking": False}}
    found = to_preference(row, processing_class=tokenizer("qwen2"), row_number=0)
    assert found == trl_preference(row, tokenizer("qwen2"))
    assert found.prompt.endswith("<|im_start|>assistant\n")


def test_nulls_that_arrow_filled_in_do_not_reach_the_template() -> None:
    """In a column of lists of structs, every message and every tool gets the keys of all the others."""
    other_tool = {"type": "function", "function": {"name": "stop", "strict": True}}
    alone = [
        {"prompt": [USER], "chosen": [CALL], "rejected": [BAD], "tools": [WEATHER]},
        {"prompt": [{**USER, "name": "Ann"}], "chosen": [GOOD], "rejected": [BAD], "tools": [other_tool]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": None},
    ]
    together = Dataset.from_list(alone)
    assert together[2]["chosen"][0]["tool_calls"] is None
    assert together[0]["tools"][0]["function"]["strict"] is None
    for number, row in enumerate(alone):
        expected = to_preference(row, processing_class=tokenizer("qwen2"), row_number=number)
        assert (
            to_preference(together[number], processing_class=tokenizer("qwen2"), row_number=number)
            == expected
        )


def test_blocks_of_content_have_no_filled_in_nulls() -> None:
    template = "{% for message in messages %}{{ message.content | tojson }}|{% endfor %}"
    block = {"type": "text", "text": "Why?"}
    row = {
        "prompt": [{"role": "user", "content": [{**block, "image": None}]}],
        "chosen": [GOOD],
        "rejected": [BAD],
    }
    found = to_preference(row, processing_class=with_template("qwen2", template), row_number=0)
    assert json.loads(found.prompt.split("|")[0]) == [block]


def test_tools_in_json_keep_their_nulls() -> None:
    tools = [{"name": "f", "default": None}]
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": json.dumps(tools)}
    found = to_preference(row, processing_class=tokenizer("qwen2"), row_number=0)
    assert json.dumps(tools[0]) in found.prompt


CONVERSATION = ROWS["conversation, explicit"]


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ({"prompt": "a", "chosen": " b"}, "missing_key", "rejected"),
        ({"prompt": "a", "chosen": None, "rejected": " b"}, "missing_key", "chosen"),
        ({"prompt": "a", "chosen": 3, "rejected": " b"}, "wrong_type", "chosen must be a string"),
        ({"prompt": 3, "chosen": " a", "rejected": " b"}, "wrong_type", "prompt must be a string"),
        ({"prompt": "a", "chosen": " b", "rejected": " b"}, "identical_responses", "same text"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, "identical_responses", "same text"),
        ({"prompt": "a", "chosen": "", "rejected": " b"}, "empty_response", "chosen has no text"),
        ({"prompt": "a", "chosen": " b", "rejected": " \n"}, "empty_response", "rejected has no text"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": []}, "empty_response", "rejected"),
        (
            {"prompt": [USER], "chosen": [{"role": "assistant", "content": ""}], "rejected": [GOOD]},
            "empty_response",
            "chosen",
        ),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": "It is painted."},
            "mixed_formats",
            "rejected is a string",
        ),
        (
            {"prompt": [USER], "chosen": " blue", "rejected": " red"},
            "mixed_formats",
            "prompt is a conversation",
        ),
        ({"prompt": "Why?", "chosen": [GOOD], "rejected": [BAD]}, "empty_prompt", "no first message"),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "empty_prompt", "no message"),
        ({**CONVERSATION, "chosen": ["Blue."]}, "malformed_conversation", "chosen[0] is not a message"),
        ({**CONVERSATION, "prompt": [{"content": "a"}]}, "malformed_conversation", "prompt[0]"),
        (
            {**CONVERSATION, "rejected": [{"role": "assistant", "content": 5}]},
            "malformed_conversation",
            "content of rejected[0] must be text, got int 5",
        ),
        ({**CONVERSATION, "prompt": [SYSTEM]}, "malformed_conversation", "not of 'system'"),
        (
            {**CONVERSATION, "chosen": [{"role": "gpt", "content": "Blue."}]},
            "malformed_conversation",
            "not of 'gpt'",
        ),
        ({**CONVERSATION, "tools": "[{"}, "wrong_type", "not JSON"),
        ({**CONVERSATION, "tools": {"a": 1}}, "wrong_type", "list of schemas"),
        ({**CONVERSATION, "chat_template_kwargs": [1]}, "wrong_type", "must be a dictionary"),
    ],
)
def test_unusable_rows_say_why(row: dict[str, Any], reason: str, words: str) -> None:
    with pytest.raises(RowError) as raised:
        to_preference(row, processing_class=tokenizer("qwen2"), row_number=17)
    assert (raised.value.reason, raised.value.row) == (reason, 17)
    assert "row 17" in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [("mistral", "system message", "must alternate"), ("smollm2", "tool call", "no attribute 'content'")],
)
def test_a_template_that_refuses(name: str, shape: str, words: str) -> None:
    with pytest.raises(RowError) as raised:
        to_preference(ROWS[shape], processing_class=tokenizer(name), row_number=4)
    assert raised.value.reason == "template_error"
    assert words in str(raised.value)


def test_conversation_without_a_chat_template() -> None:
    bare = with_template("qwen2", None)
    with pytest.raises(ValueError, match="chat_template_path") as raised:
        to_preference(CONVERSATION, processing_class=bare, row_number=8)
    assert not isinstance(raised.value, RowError)
    assert "row 8" in str(raised.value)
    assert to_preference(ROWS["standard, explicit"], processing_class=bare, row_number=0).chosen == " blue."


def test_wrong_columns_are_listed_with_the_nearest_names() -> None:
    with pytest.raises(ValueError) as raised:
        check_columns(["prompt", "chosen_response", "reject", "id"])
    message = str(raised.value)
    for words in (
        "chosen_response",
        "'id'",
        "rename 'chosen_response' to 'chosen'",
        "rename 'reject' to 'rejected'",
    ):
        assert words in message
    check_columns(["rejected", "anything", "chosen"])
