"""What goes wrong on a user's first day: one message that names the thing and the way out, and nothing is lost.

All of it through `orpo_ds.cli.main` where a command line can ask for it; exit status 2 is a mistake in the input,
1 a run that could not go on.
"""

import json
import logging
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from transformers import AutoModelForCausalLM, TrainerCallback

from orpo_ds.checkpoint import CheckpointSaveError, verify
from orpo_ds.monitor.jsonl import read_metrics
from orpo_ds.step import NonFiniteLossError
from tests import small_runs
from tests.parity.rows import conversation
from tests.parity.tokenizer import tiny_tokenizer
from tests.small_runs import Answer
from tests.tiny_models import tiny_model

Train = Callable[..., Answer]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_runs.save_model_folder(tmp_path_factory.mktemp("saved") / "model", "llama")


@pytest.fixture
def train(tmp_path: Path, saved_model: str) -> Train:
    """Run `orpo-ds train` in `tmp_path` with the given flags."""
    small_runs.write_jsonl(tmp_path / "train.jsonl", small_runs.rows(7))

    def run(*words: str, **flags: Any) -> Answer:
        line = small_runs.command_line(tmp_path, **{"model_name_or_path": saved_model} | flags)
        return small_runs.run_cli([*line, *words], datasets_cache=tmp_path / "hf")

    return run


def assert_refused(answer: Answer, *words: str) -> None:
    """The input was refused in one message that has these words, without a traceback."""
    assert answer.status == 2, answer
    assert "Traceback" not in answer.stderr
    message = answer.stderr.partition("orpo-ds: error: ")[2]
    assert [word for word in words if word not in message] == [], message


# ---------------------------------------------------------------------- data


def test_missing_dataset_file(train: Train, tmp_path: Path) -> None:
    assert_refused(
        train(dataset_name=tmp_path / "trian.jsonl"),
        str(tmp_path / "trian.jsonl"),
        f"did you mean '{tmp_path / 'train.jsonl'}'",
    )


def test_empty_dataset(train: Train, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert_refused(train(dataset_name=tmp_path / "empty.jsonl"), "the dataset is empty")


def test_wrong_columns(train: Train, tmp_path: Path) -> None:
    path = small_runs.write_jsonl(tmp_path / "columns.jsonl", [{"question": "a", "chosen_answer": "b"}])
    assert_refused(train(dataset_name=path), "'chosen', 'rejected'", "'question'", "rename 'chosen_answer'")


def test_malformed_line(train: Train, tmp_path: Path) -> None:
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    lines[4] = lines[4][:-3]
    (tmp_path / "cut.jsonl").write_text("\n".join(lines))
    assert_refused(
        train(dataset_name=tmp_path / "cut.jsonl"), f"{tmp_path / 'cut.jsonl'}: line 5 is not JSON"
    )


def test_rows_that_cannot_be_used(train: Train, tmp_path: Path) -> None:
    rows = small_runs.rows(5)
    rows[3] = conversation("Which?", "the same", "the same")
    path = small_runs.write_jsonl(tmp_path / "same.jsonl", rows)
    assert_refused(train(dataset_name=path), "1 of 5 rows", "row 3", 'unusable_rows="drop"')
    assert train(dataset_name=path, unusable_rows="drop").status == 0


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_prompt_longer_than_max_length_trains(tmp_path: Path, layout: str) -> None:
    rows = [
        conversation("Why? " * 400, "Because.", "No."),
        conversation("Why? " * 400, "Well. " * 400, "No."),
    ]
    trainer = small_runs.trainer(
        tmp_path / "run",
        train_dataset=small_runs.Dataset.from_list(rows),
        max_length=100,
        max_prompt_length=60,
        layout=layout,
    )
    assert trainer.train_dataset is not None
    for index in range(len(rows)):
        pair = trainer.train_dataset[index]
        for ids, start in ((pair.chosen, pair.chosen_start), (pair.rejected, pair.rejected_start)):
            assert 0 < start < len(ids) <= 100
    before = [value.clone() for value in trainer.model.parameters()]
    trainer.train()
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
    assert small_runs.step_lines(trainer)[-1]["logps/rejected"] < 0


# ---------------------------------------------------------------------- model and tokenizer


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mdoel", ("no such folder", "Did you mean {folder}/model?")),
        ("somebody/no-such-model", ("cannot be loaded", "no folder 'somebody/no-such-model' in")),
    ],
)
def test_model_that_does_not_exist(train: Train, tmp_path: Path, name: str, words: tuple[str, ...]) -> None:
    (tmp_path / "model").mkdir()
    wanted = name if "/" in name else str(tmp_path / name)
    assert_refused(train(model_name_or_path=wanted), *(word.format(folder=tmp_path) for word in words))


def test_model_folder_without_weights(train: Train, tmp_path: Path, saved_model: str) -> None:
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text((Path(saved_model) / "config.json").read_text())
    assert_refused(
        train(model_name_or_path=tmp_path / "hollow"), str(tmp_path / "hollow"), "model.safetensors"
    )


def test_tokenizer_without_chat_template(train: Train, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    small_runs.model_of("llama").save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    assert_refused(train(model_name_or_path=tmp_path / "plain"), "chat template", "chat_template_path")
    (tmp_path / "chat.jinja").write_text(tiny_tokenizer().chat_template)
    answer = train(model_name_or_path=tmp_path / "plain", chat_template_path=tmp_path / "chat.jinja")
    assert answer.status == 0, answer.stderr


def test_tokenizer_without_pad_token_trains_to_the_same_weights(train: Train, tmp_path: Path) -> None:
    """Padding is masked, so it cannot matter which token it is."""
    weights = []
    for name, pad_token in (("with", "<pad>"), ("without", None)):
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = pad_token
        small_runs.model_of("llama").save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        run = tmp_path / f"run-{name}"
        answer = train(
            model_name_or_path=tmp_path / name, output_dir=run, layout="padded", learning_rate="1e-3"
        )
        assert answer.status == 0, answer.stderr
        weights.append(AutoModelForCausalLM.from_pretrained(run).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_vocabulary_larger_than_the_embedding(train: Train, tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=100).save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    assert_refused(
        train(model_name_or_path=tmp_path / "small"),
        *("259 tokens", "100 rows", "resize_token_embeddings(259)"),
    )


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            {"train_micro_batch_size_per_gpu": 7},
            ("train_micro_batch_size_per_gpu=7", "per_device_train_batch_size=4"),
        ),
        ({"gradient_clipping": 0.3}, ("gradient_clipping=0.3", "max_grad_norm=1.0")),
        ({"bf16": {"enabled": True}}, ("bf16.enabled=True", "bf16|bf16_full_eval=False")),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}},
            ("optimizer.params.lr=3e-05", "learning_rate=1e-06"),
        ),
    ],
)
def test_deepspeed_json_that_disagrees(
    train: Train, tmp_path: Path, setting: dict[str, Any], words: tuple[str, str]
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}} | setting))
    assert_refused(train(deepspeed=tmp_path / "ds.json"), *words, "in the JSON", "in ORPOConfig")


def test_deepspeed_json_that_is_none(train: Train, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization":\n {"stage": 2,}}')
    assert_refused(train(deepspeed=tmp_path / "ds.json"), f"{tmp_path / 'ds.json'}: line 2 is not valid JSON")


def test_unknown_preset(train: Train) -> None:
    assert_refused(train(deepspeed="zero4"), "deepspeed='zero4'", "zero3_offload")


def test_nvme_without_a_folder(train: Train) -> None:
    assert_refused(train(deepspeed="zero3_nvme"), "offload_optimizer.nvme_path")


@pytest.mark.skipif(AsyncIOBuilder().is_compatible(verbose=False), reason="libaio is installed here")
@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_nvme_without_libaio(train: Train, tmp_path: Path, part: str) -> None:
    zero = {"stage": 3, part: {"device": "nvme", "nvme_path": str(tmp_path)}}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    answer = train(deepspeed=tmp_path / "ds.json")
    assert_refused(answer, f"zero_optimization.{part}.device", "libaio-dev")
    assert "Loading weights" not in answer.stderr, "it was found out after the model had been loaded"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("learning_rte: 1e-5\n", ("unknown field 'learning_rte'", "Did you mean learning_rate?")),
        ("learning_rate: [1\nbeta: 2\n", ("not valid YAML", "line 2")),
        ("- learning_rate\n", ("expected `field: value` lines", "list")),
        ("# nothing yet\n", ("the file is empty",)),
        ("num_train_epochs: many\n", ("num_train_epochs", "invalid float value: 'many'")),
    ],
)
def test_yaml_that_is_wrong(train: Train, tmp_path: Path, content: str, words: tuple[str, ...]) -> None:
    (tmp_path / "run.yaml").write_text(content)
    assert_refused(train("--config", str(tmp_path / "run.yaml")), *words)


def test_missing_yaml(train: Train, tmp_path: Path) -> None:
    assert_refused(train("--config", str(tmp_path / "no.yaml")), str(tmp_path / "no.yaml"), "no such file")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bta", "0.1"], "unknown argument '--bta'. Did you mean --beta?"),
        (["--bta=0.1"], "Did you mean --beta?"),
        # An abbreviation would be taken for the field until another field begins alike.
        (["--learning_rat", "1e-5"], "Did you mean --learning_rate?"),
        (["--learning_rate", "small"], "invalid float value: 'small'"),
        (["--max_length", "0"], "max_length=0 must be at least 1"),
    ],
)
def test_flag_that_is_wrong(train: Train, words: list[str], message: str) -> None:
    assert_refused(train(*words), message)


def test_unknown_dashboard(train: Train) -> None:
    assert_refused(train(report_to="wandbb"), "wandbb", "is not supported")


def test_missing_fields() -> None:
    answer = small_runs.run_cli(["train", "--output_dir", "x"], datasets_cache=Path("unused"))
    assert_refused(answer, "--model_name_or_path must be given")


def test_unknown_command() -> None:
    assert_refused(small_runs.run_cli(["trian"], datasets_cache=Path("unused")), "Did you mean train?")


# ---------------------------------------------------------------------- the run itself


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_output_folder_with_another_run(train: Train, tmp_path: Path) -> None:
    assert train(save_strategy="steps", save_steps=2).status == 0
    before = content_of(tmp_path / "run")
    assert {"metrics.jsonl", "model.safetensors", "checkpoint-2/manifest.json"} <= before.keys()
    assert_refused(
        train(), str(tmp_path / "run"), "another run", "resume_from_checkpoint", "overwrite_output_dir"
    )
    assert content_of(tmp_path / "run") == before

    assert train(overwrite_output_dir=True).status == 0
    [previous] = (tmp_path / "run").glob("previous-*")
    lock = {".orpo_ds.lock": b""}  # of whoever trains here
    assert content_of(previous) | lock == before


def test_a_learning_rate_that_blows_up(train: Train, tmp_path: Path) -> None:
    answer = train(learning_rate="1e30", max_steps=5, save_strategy="steps", save_steps=1)
    assert answer.status == 1
    assert "Traceback" not in answer.stderr
    assert "the loss is nan at step 2" in answer.stderr
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint-1'}" in answer.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]


class Poison(TrainerCallback):
    """From step 2 on the embedding of one token is NaN; remembers all weights as each step begins."""

    def __init__(self, token: int) -> None:
        self._token = token
        self.before: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        if state.global_step:
            details["model"].get_input_embeddings().weight.data[self._token] = torch.nan
        self.before = {name: value.detach().clone() for name, value in details["model"].named_parameters()}


@pytest.mark.parametrize("stage", [0, 2])
def test_a_loss_that_turns_nan_names_its_rows(tmp_path: Path, stage: int) -> None:
    rows = small_runs.rows(11)
    rows[6]["chosen"][0]["content"] += " ~"  # no other row has this byte
    rows[2] = conversation("Which?", "the same", "the same")  # dropped; the rows after it keep their numbers
    [token] = tiny_tokenizer()("~", add_special_tokens=False)["input_ids"]
    poison = Poison(token)
    trainer = small_runs.trainer(
        tmp_path / "run",
        model=small_runs.model_of("llama"),  # its head is not tied: only rows with the token are hit
        train_dataset=small_runs.Dataset.from_list(rows),
        callbacks=[poison],
        unusable_rows="drop",
        max_tokens_per_micro_batch=130,
        max_steps=9,
        save_strategy="steps",
        save_steps=1,
        deepspeed=f"zero{stage}",
    )
    with pytest.raises(NonFiniteLossError) as raised:
        trainer.train()
    message, steps = str(raised.value), trainer.state.global_step
    assert steps >= 1
    named = json.loads(message.partition("training rows ")[2].partition("]")[0] + "]")
    assert 6 in named
    assert len(named) <= 2, "the rows of the other micro-batches are not to blame"
    assert f"at step {steps + 1}" in message
    assert f"last good checkpoint is {tmp_path / 'run' / f'checkpoint-{steps}'}" in message
    assert verify(tmp_path / "run" / f"checkpoint-{steps}") == []
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value.nan_to_num(), poison.before[name].nan_to_num()), f"{name} was updated"
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [
        *range(1, steps + 1)
    ]


class BadGradient(TrainerCallback):
    """Makes the gradient of one parameter infinite in step 2; the loss stays finite."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        if state.global_step == 1:
            norm = details["model"].model.norm.weight
            hook = norm.register_hook(lambda gradient: (hook.remove(), gradient * torch.inf)[1])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(
    tmp_path: Path, stage: int, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = small_runs.trainer(
        tmp_path / "run",
        model=small_runs.model_of("llama"),
        callbacks=[BadGradient()],
        max_steps=3,
        lr_scheduler_type="linear",
        deepspeed=f"zero{stage}",
    )
    with caplog.at_level(logging.WARNING, "orpo_ds"):
        trainer.train()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    assert lines[1]["grad_norm"] is None  # JSON has no infinity
    assert all(line["grad_norm"] > 0 for line in (lines[0], lines[2]))
    # The schedule waits: step 3 is taken with the learning rate that step 2 could not use.
    assert lines[2]["learning_rate"] == lines[1]["learning_rate"] < lines[0]["learning_rate"]
    assert [record.message for record in caplog.records if "no update" in record.message] == [
        "step 2: no update, its gradient is not finite"
    ]


# ---------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(disk_of: Callable[[str], Path]) -> Path:
    """A file system with room for one checkpoint of the tiny model (1.5 MiB) and for the model (0.4 MiB)."""
    return disk_of("2400k")


def test_a_disk_that_is_full_ends_nothing_before_the_last_save(
    train: Train, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = small_disk / "run"
    with caplog.at_level(logging.ERROR, "orpo_ds"):
        answer = train(output_dir=run, max_steps=3, save_strategy="steps", save_steps=1)
    assert answer.status == 1, answer
    assert "Traceback" not in answer.stderr
    [failed] = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    for step, message in ((2, failed), (3, answer.stderr)):
        assert f"{run / f'checkpoint-{step}'} was not saved: it needs about" in message
        assert "bytes were free in" in message
    assert "Training goes on" in failed
    assert verify(run / "checkpoint-1") == []
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-1"]
    # The trained model is smaller than a checkpoint, and is there.
    assert all(value.isfinite().all() for value in AutoModelForCausalLM.from_pretrained(run).parameters())


class FullDisk(TrainerCallback):
    """Files of more than 4 KiB cannot be written while the step `step` ends and saves."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step_end(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        if state.global_step == self._step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, self._limits[1]))

    def on_step_begin(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        self.free()

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_save_that_fails_is_made_up_for_by_the_next(
    tmp_path: Path, stage: int, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = small_runs.trainer(
        tmp_path / "run",
        callbacks=[FullDisk(2)],
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        deepspeed=f"zero{stage}",
    )
    with caplog.at_level(logging.ERROR, "orpo_ds"):
        trainer.train()
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert str(tmp_path / "run" / "checkpoint-2") in record.message
    assert "File too large" in record.message
    saved = sorted(path.name for path in (tmp_path / "run").glob("*checkpoint*"))
    assert saved == ["checkpoint-1", "checkpoint-3"]
    assert [verify(tmp_path / "run" / name) for name in saved] == [[], []]


def test_a_model_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    trainer = small_runs.trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model()
    before = content_of(tmp_path / "run")
    disk = FullDisk(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        with pytest.raises(CheckpointSaveError, match=r"the model was not saved in .*run.* bytes are free"):
            trainer.save_model()
    finally:
        disk.free()
    assert content_of(tmp_path / "run") == before
