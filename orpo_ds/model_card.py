"""The model card: `README.md` beside a trained model, with what a reader of the hub's page asks.

What it was trained from, on which data, with which settings, and what came out; the paper; the versions. A card that
a person wrote or edited is never overwritten: ours carries a hash of itself.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from orpo_ds.redact import redact, redact_text

CARD_NAME = "README.md"
TAGS = ("orpo", "orpo_ds", "deepspeed", "generated_from_trainer")
MARK = re.compile(r"<!-- orpo_ds wrote this card: ([0-9a-f]{16}) -->\n")
CITATION = """@article{hong2024orpo,
  title   = {{ORPO: Monolithic Preference Optimization without Reference Model}},
  author  = {Jiwoo Hong and Noah Lee and James Thorne},
  year    = 2024,
  eprint  = {arXiv:2403.07691},
  url     = {https://arxiv.org/abs/2403.07691}
}"""
# Settings that a reader needs to judge or to repeat the run; the others are in its checkpoints' manifests.
SHOWN_SETTINGS = (
    "beta",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "max_length",
    "max_prompt_length",
    "truncation_mode",
    "nll_on_prompt",
    "seed",
    "bf16",
    "fp16",
)
SHOWN_FIGURES = (
    "loss",
    "nll_loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "log_odds_ratio",
    "log_odds_chosen",
    "aux_loss",
)


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside the settings.

    Attributes:
        model_name: the title.
        base_model: hub id of the model that was trained; None for a folder or a random model.
        hub_id: `user/name` where the model is, or the name it will have.
        dataset_name: hub id or title of the data; None where nobody said.
        tags: for the hub's search.
        license: of the base model, where it says so.
        is_adapter: whether the folder holds PEFT adapters.
        data: facts about data and run (fingerprint, pairs, ranks, ...), by name.
        settings: all settings of the run, by name; those that matter are shown.
        versions: of Python and packages.
        history: the state's log, oldest first.
    """

    model_name: str
    base_model: str | None
    hub_id: str
    dataset_name: str | None
    tags: tuple[str, ...]
    license: str | None
    is_adapter: bool
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    history: Iterable[Mapping[str, Any]]


def card_text(facts: CardFacts) -> str:
    """The whole README.md, with its YAML header and the mark by which it is known again."""
    metadata = ModelCardData(
        base_model=facts.base_model,
        datasets=[facts.dataset_name] if facts.dataset_name and _is_hub_id(facts.dataset_name) else None,
        library_name="peft" if facts.is_adapter else "transformers",
        license=facts.license,
        model_name=facts.model_name,
        pipeline_tag="text-generation",
        tags=sorted({*TAGS, *facts.tags, *(["lora"] if facts.is_adapter else [])}),
    )
    body = "\n\n".join(
        part
        for part in (
            f"# {facts.model_name}",
            _opening(facts),
            _quick_start(facts.hub_id),
            "## Results\n\n" + _results(facts.history),
            "## Data and run\n\n" + _table(("", ""), redact(facts.data).items()),
            "## Settings\n\n" + _table(("setting", "value"), _settings(facts.settings)),
            "## Versions\n\n" + _table(("package", "version"), facts.versions.items()),
            f"## Citation\n\n```bibtex\n{CITATION}\n```",
        )
    )
    content = redact_text(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")
    ModelCard(content)  # raises where the header is not YAML
    return f"{content}\n<!-- orpo_ds wrote this card: {_hash(content)} -->\n"


def write_card(folder: Path, text: str) -> bool:
    """Write `README.md`, unless there is one that a person wrote or edited; returns whether it was written."""
    path = folder / CARD_NAME
    if path.exists() and not is_own_card(path):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return True


def is_own_card(path: Path) -> bool:
    """Whether a card is as this module wrote it."""
    text = path.read_text(encoding="utf-8", errors="replace")
    mark = MARK.search(text)
    return mark is not None and text[mark.end() :] == "" and _hash(text[: mark.start() - 1]) == mark.group(1)


def license_of(base_model: str) -> str | None:
    """The licence that the card in a local model folder names; None where it does not say."""
    path = Path(base_model) / CARD_NAME
    if not path.is_file():
        return None
    try:
        name = ModelCard.load(path, ignore_metadata_errors=True).data.license
    except (ValueError, OSError):  # somebody's README need not be a card
        return None
    return str(name) if name else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_hub_id(name: str | None) -> bool:
    return (
        name is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()
    )


def _opening(facts: CardFacts) -> str:
    base = facts.base_model or "a model"
    linked = f"[{base}](https://huggingface.co/{base})" if facts.base_model else base
    data = f" on {facts.dataset_name}" if facts.dataset_name else ""
    text = (
        f"{linked} trained{data} with ORPO ([Odds Ratio Preference Optimization](https://arxiv.org/abs/2403.07691)), "
        "by orpo_ds on DeepSpeed."
    )
    url = _wandb_url()
    return text if url is None else f"{text}\n\nThe run: [{url}]({url})"


def _wandb_url() -> str | None:
    """Page of the W&B run of this process, if there is one."""
    run = sys.modules["wandb"].run if "wandb" in sys.modules else None
    return run.url if run is not None else None


def _quick_start(hub_id: str) -> str:
    return f"""## Quick start

```python
from transformers import pipeline

chat = pipeline("text-generation", model="{hub_id}")
question = [{{"role": "user", "content": "What makes a good answer?"}}]
print(chat(question, max_new_tokens=128, return_full_text=False)[0]["generated_text"])
```"""


def _results(history: Iterable[Mapping[str, Any]]) -> str:
    """The last figures of the training and of each evaluation set."""
    train: dict[str, Any] = {}
    evaluated: dict[str, Any] = {}
    for entry in history:
        if any(name.startswith("eval_") for name in entry):
            evaluated = {**evaluated, **entry}
        elif "loss" in entry:
            train = dict(entry)
    rows = [
        (name, _number(train.get(name)), _number(evaluated.get(f"eval_{name}"))) for name in SHOWN_FIGURES
    ]
    others = [
        (name, "", _number(value))
        for name, value in evaluated.items()
        if name.startswith("eval_") and name.removeprefix("eval_") not in SHOWN_FIGURES
    ]
    shown = [row for row in rows if any(row[1:])] + others
    if not shown:
        return "Nothing was logged."
    return _table(("", f"training (step {train.get('step', '-')})", "evaluation"), shown)


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, redact(settings[name])) for name in SHOWN_SETTINGS if name in settings]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
