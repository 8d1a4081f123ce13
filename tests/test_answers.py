"""`generate_during_eval`: the answers are those of the model at that step, and the training does not feel them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel, TrainerCallback

from orpo_ds import ORPOTrainer
from orpo_ds.answers import COLUMNS, as_text
from orpo_ds.export import full_state
from orpo_ds.generation import CUT_OFF
from orpo_ds.monitor.jsonl import read_metrics
from tests import small_runs
from tests.parity.orpo_side import token_pairs
from tests.parity.tokenizer import tiny_tokenizer

NEW_TOKENS = 6
PROMPTS = 3
SETTINGS: dict[str, Any] = {
    "generate_during_eval": True,
    "generate_num_prompts": PROMPTS,
    "generate_max_new_tokens": NEW_TOKENS,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "max_steps": 4,
    "learning_rate": 0.01,
}


def answer(model: PreTrainedModel, ids: list[int]) -> str:
    """Greedy decoding written out: one full forward a token, one prompt at a time, no cache and no padding."""
    tokenizer = tiny_tokenizer()
    new: list[int] = []
    with torch.no_grad():
        while len(new) < NEW_TOKENS and new[-1:] != [tokenizer.eos_token_id]:
            new.append(int(model.eval()(torch.tensor([ids + new])).logits[0, -1].argmax()))
    ended = new[-1] == tokenizer.eos_token_id
    return tokenizer.decode(new, skip_special_tokens=True).strip() + ("" if ended else CUT_OFF)


def prompt_ids(row: int, *, is_encoder_decoder: bool = False) -> list[int]:
    """The prompt that the row is trained on."""
    rows = small_runs.rows(row + 1)
    pair = token_pairs(rows, tokenizer=tiny_tokenizer(), is_encoder_decoder=is_encoder_decoder)[row]
    return pair.chosen[: pair.chosen_start]


class Snapshots(TrainerCallback):
    """The model at every evaluation, by step."""

    def __init__(self) -> None:
        self.models: dict[int, dict[str, torch.Tensor]] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        self.models[state.global_step] = {
            name: value.clone() for name, value in details["model"].state_dict().items()
        }


class Tables(TrainerCallback):
    """A dashboard with tables."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, list[tuple[str, ...]]]] = []

    def log_table(self, name: str, columns: Any, rows: Any, *, step: int) -> None:
        assert tuple(columns) == COLUMNS
        self.seen.append((name, step, list(rows)))


def run(folder: Path, **changes: Any) -> ORPOTrainer:
    trainer = small_runs.trainer(folder, **{"eval_dataset": small_runs.dataset(5), **SETTINGS, **changes})
    trainer.train()
    return trainer


def test_answers_are_those_of_the_model_at_each_step(tmp_path: Path) -> None:
    kept, tables = Snapshots(), Tables()
    run(tmp_path / "run", callbacks=[kept, tables])
    lines = read_metrics(tmp_path / "run" / "answers.jsonl")
    assert [line["step"] for line in lines] == [0] * PROMPTS + [2] * PROMPTS + [4] * PROMPTS
    kept.models[0] = small_runs.model_of().state_dict()
    rows = {line["row"] for line in lines}
    assert len(rows) == PROMPTS
    for line in lines:
        ids = prompt_ids(line["row"])
        for column, step in (("before", 0), ("now", line["step"])):
            model = small_runs.model_of()
            model.load_state_dict(kept.models[step])
            assert line[column] == answer(model, ids), (line["step"], column)
        (question,) = small_runs.rows(5)[line["row"]]["prompt"]
        assert line["prompt"] == f"user: {question['content']}\nassistant:"
        (chosen,) = small_runs.rows(5)[line["row"]]["chosen"]
        assert line["chosen"] == chosen["content"]
    assert any(line["now"] != line["before"] for line in lines)
    shown = [(step, row) for name, step, table in tables.seen for row in table if name == "answers"]
    assert shown == [
        (line["step"], tuple(line[key] for key in ("prompt", "before", "now", "chosen"))) for line in lines
    ]


def test_each_evaluation_set_has_its_table(tmp_path: Path) -> None:
    tables = Tables()
    sets = {"short": small_runs.dataset(2), "long": small_runs.dataset(5)}
    run(tmp_path / "run", eval_dataset=sets, callbacks=[tables], max_steps=2)
    assert [(name, step, len(rows)) for name, step, rows in tables.seen] == [
        ("answers/short", 0, 2),
        ("answers/long", 0, PROMPTS),
        ("answers/short", 2, 2),
        ("answers/long", 2, PROMPTS),
    ]


@pytest.mark.parametrize("stage", [2, 3])
def test_the_training_does_not_feel_it(tmp_path: Path, stage: int) -> None:
    """Bit for bit, with dropout, so that one random number more or less would show; checkpointed and resumed, too."""
    changes = {
        "deepspeed": f"zero{stage}",
        "disable_dropout": False,
        "gradient_checkpointing": True,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    adapters = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
    silent = run(tmp_path / "silent", generate_during_eval=False, peft_config=adapters, **changes)
    asked = run(tmp_path / "asked", peft_config=adapters, **changes)
    first = read_metrics(tmp_path / "asked" / "answers.jsonl")
    resumed = small_runs.trainer(
        tmp_path / "asked",
        eval_dataset=small_runs.dataset(5),
        peft_config=adapters,
        **SETTINGS | changes,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "asked" / "checkpoint-2"))
    without = full_state(silent.model)
    assert without is not None
    for trainer in (asked, resumed):
        state = full_state(trainer.model)
        assert state is not None
        assert all(torch.equal(value, state[name]) for name, value in without.items())
        assert trainer.model.config.use_cache is False
    # The resumed run answers again what came after its checkpoint, and still knows the answers before the training.
    assert read_metrics(tmp_path / "asked" / "answers.jsonl") == first


def test_an_evaluation_by_itself_writes_nothing(tmp_path: Path) -> None:
    tables = Tables()
    trainer = small_runs.trainer(
        tmp_path / "run",
        train_dataset=None,
        eval_dataset=small_runs.dataset(2),
        callbacks=[tables],
        **SETTINGS,
    )
    trainer.evaluate()
    (shown,) = tables.seen
    assert [row[1] for row in shown[2]] == [row[2] for row in shown[2]]  # nothing has been trained
    assert not (tmp_path / "run" / "answers.jsonl").exists()


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "t5"])
def test_other_models_answer_too(tmp_path: Path, family: str) -> None:
    """Learned positions, a sliding window, an encoder; against transformers' own generate of one prompt."""
    tables = Tables()
    model = small_runs.model_of(family)
    trainer = small_runs.trainer(
        tmp_path / "run",
        model=model,
        train_dataset=None,
        eval_dataset=small_runs.dataset(5),
        callbacks=[tables],
        max_completion_length=64,
        **SETTINGS | {"generate_num_prompts": 5},
    )
    trainer.evaluate()
    fresh: Any = small_runs.model_of(family).eval()
    is_seq2seq = family == "t5"
    for row, (_, _, now, _) in enumerate(tables.seen[0][2]):
        ids = torch.tensor([prompt_ids(row, is_encoder_decoder=is_seq2seq)])
        output = fresh.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        new = output[0, 1 if is_seq2seq else ids.shape[1] :]
        assert now.removesuffix(CUT_OFF) == tiny_tokenizer().decode(new, skip_special_tokens=True).strip()


def test_the_table_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", max_steps=2)
    printed = capsys.readouterr().out
    assert "answers, step 0" in printed
    assert "answers, step 2" in printed
    for title in COLUMNS:
        assert title in printed
    page = as_text("a title", [("[bold]what?[/bold]", "x" * 1000, "now", "chosen")])
    assert "[bold]what?[/bold]" in page.replace("\n", "")  # markup of the model's is text
    assert page.count("x") <= 400


def test_a_model_without_room_for_an_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tables = Tables()
    model = small_runs.model_of("gpt2")
    trainer = small_runs.trainer(
        tmp_path / "run",
        model=model,
        train_dataset=None,
        eval_dataset=small_runs.dataset(2),
        callbacks=[tables],
        **SETTINGS,
    )
    trainer.model.config.max_position_embeddings = 20
    trainer.evaluate()
    assert {row[2] for row in tables.seen[0][2]} == {""}
    assert "fills all positions" in caplog.text


@pytest.mark.parametrize("name", ["generate_num_prompts", "generate_max_new_tokens"])
def test_sizes_are_positive(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        small_runs.settings(tmp_path, **{name: 0})
