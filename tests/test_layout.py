"""Who lays the pairs out, and how: the collator, the padding, and models that packing is not exact on."""

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    DataCollatorWithPadding,
    FalconH1Config,
    FalconH1ForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from trl.experimental.utils import DPODataCollatorWithPadding

from orpo_ds.layout import check_collator
from orpo_ds.monitor.jsonl import read_metrics
from orpo_ds.trainer import ORPOTrainer
from tests import small_runs
from tests.parity.tokenizer import tiny_tokenizer


def test_trls_collator_pads_as_we_do(tmp_path: Path) -> None:
    """The one that TRL makes by itself: a script that passes it trains the same."""
    losses = []
    for name, collator in (("own", None), ("trl", DPODataCollatorWithPadding(pad_token_id=0))):
        trainer = small_runs.trainer(tmp_path / name, data_collator=collator)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]


def test_a_collator_that_would_not_be_called_is_refused(tmp_path: Path) -> None:
    def mine(features: list[dict[str, Any]]) -> dict[str, Any]:
        return {}

    with pytest.raises(ValueError, match="data_collator=mine: orpo_ds lays the pairs out itself"):
        small_runs.trainer(tmp_path / "run", data_collator=mine)
    with pytest.raises(ValueError, match="data_collator=DataCollatorWithPadding"):
        check_collator(DataCollatorWithPadding(tiny_tokenizer()))


def test_padding_is_the_token_that_was_named(tmp_path: Path) -> None:
    """`padding_value`; its id is masked, so no number depends on it."""
    losses = []
    for value in (None, 9):
        trainer = small_runs.trainer(
            tmp_path / str(value), layout="padded", padding_value=value, eval_dataset=small_runs.dataset(3)
        )
        losses.append(trainer.evaluate()["eval_loss"])
        assert trainer.train_dataset is not None
        batch = trainer._layout.feed(trainer.train_dataset, max_tokens=None).build([0, 1, 2])
        assert batch.attention_mask is not None
        padding = batch.input_ids[batch.attention_mask == 0]
        assert len(padding) > 0
        assert set(padding.tolist()) == {tiny_tokenizer().pad_token_id if value is None else value}


VOCABULARY = len(tiny_tokenizer())


def _mamba2() -> PreTrainedModel:
    config = Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=1,
        chunk_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Mamba2ForCausalLM(config)


def _qwen3_next() -> PreTrainedModel:
    config = Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=2,
        num_experts_per_tok=1,
        layer_types=["linear_attention", "full_attention"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen3NextForCausalLM(config)


def _falcon_h1(initializer_range: float = 0.15) -> PreTrainedModel:
    config = FalconH1Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=initializer_range,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return FalconH1ForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        # Each of its layers has attention and a state side by side.
        (_falcon_h1, "layers of another kind (hybrid)"),
        (_mamba2, "0 of its 2 layers call an attention function"),
        (
            _qwen3_next,
            "1 of its 2 layers call an attention function; layers of another kind (linear_attention)",
        ),
    ],
)
def test_a_model_with_a_state_trains_padded_and_the_command_says_why(
    build: Any, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    small_runs.write_jsonl(tmp_path / "train.jsonl", small_runs.rows(8))
    answer = small_runs.run_cli(small_runs.command_line(tmp_path), datasets_cache=tmp_path / "hf")
    assert answer.status == 0, answer.stderr
    [said] = [one.getMessage() for one in caplog.records if "padded layout" in one.getMessage()]
    assert said.startswith("Training in the padded layout: Packed log-probs of ")
    assert why in said
    assert "may carry a state from one segment of the row into the next" in said
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["trunk_saving"] for line in lines] == [0.0, 0.0]
    answer = small_runs.run_cli(
        small_runs.command_line(tmp_path, layout="packed", output_dir=tmp_path / "packed"),
        datasets_cache=tmp_path / "hf",
    )
    assert answer.status == 2
    assert why in answer.stderr


def test_a_state_that_the_probe_does_not_feel(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A young model's layers do so little that its log-probs are the same to the tolerance, state or not."""
    trainer = small_runs.trainer(tmp_path / "run", model=_falcon_h1(initializer_range=0.02))
    trainer.train()
    [said] = [one.getMessage() for one in caplog.records if "padded layout" in one.getMessage()]
    assert "FalconH1ForCausalLM convolves along the row" in said
    assert "differ" not in said


def test_a_tokenizer_that_pads_on_the_left_trains_the_same(tmp_path: Path) -> None:
    """Tokenizers of chat models are often set up for generation, which wants the left."""
    losses = []
    for side in ("left", "right"):
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = tokenizer.truncation_side = side
        trainer = ORPOTrainer(
            small_runs.model_of(),
            small_runs.settings(tmp_path / side, layout="padded", max_length=60, max_prompt_length=30),
            train_dataset=small_runs.dataset(8),
            processing_class=tokenizer,
        )
        trainer.train()
        losses.append([line["loss"] for line in small_runs.step_lines(trainer)])
    assert losses[0] == losses[1]
