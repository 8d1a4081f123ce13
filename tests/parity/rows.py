"""Preference rows in TRL's conversational format, made to meet every shape that a packed pair can have."""

from typing import Any


def conversation(prompt: str, chosen: str, rejected: str, *, system: str | None = None) -> dict[str, Any]:
    """A row in TRL's conversational format."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return {
        "prompt": [*messages, {"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


ROWS = [
    conversation("Name a warm colour.", "Red is warm.", "Blue, I think, is the warmest of them all."),
    # The responses begin alike: these tokens lie in the trunk and count for both.
    conversation("2+2?", "It is 4.", "It is 5, or 22.", system="Be brief."),
    # The rejected response begins with the whole chosen one.
    conversation("Say yes", "yes", "yes yes yes"),
    conversation("A longer question about the weather in the north of the country?", "Rain.", "No."),
    # The long way round: the chosen response begins with the whole rejected one.
    conversation("Count", "one two three four five", "one two"),
    conversation("Hi", "Hello, how can I help you today?", "What?", system="Be kind."),
    conversation("Is it far?", "No, ten minutes on foot.", "Yes."),
]
