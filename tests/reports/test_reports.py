"""What users of TRL, transformers, DeepSpeed and ms-swift have reported, as tests that fail with what is reported.

One test a report; its docstring is the report's story. `docs/trl.md` lists all of them, also those that the test of a
feature shows already.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional

from orpo_ds import ORPOTrainer
from orpo_ds.data.preference import Preference
from orpo_ds.export import full_state
from tests import small_runs
from tests.data.trl_reference import trl_ids
from tests.parity.rows import conversation
from tests.parity.tokenizer import tiny_tokenizer

FP32 = 2.0**-23


def long_rows(lengths: Iterable[tuple[int, int]]) -> list[dict[str, Any]]:
    """Rows whose responses have the given numbers of words."""
    return [
        conversation(f"Count to {number}.", "one " * chosen + ".", "two " * rejected + "!")
        for number, (chosen, rejected) in enumerate(lengths)
    ]


def trained(folder: Path, rows: Sequence[dict[str, Any]], **changes: Any) -> ORPOTrainer:
    """One step of plain SGD over all rows in one global batch: the weights have moved by the gradient itself."""
    fields = {
        "per_device_train_batch_size": len(rows),
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "beta": 0.5,
        "model": small_runs.model_of("llama"),
    }
    run = small_runs.trainer(folder, train_dataset=Dataset.from_list(list(rows)), **fields | changes)
    run.train()
    return run


def gradient(run: ORPOTrainer) -> torch.Tensor:
    """All parameters' gradients in one vector, from how far the step went."""
    start = dict(small_runs.model_of("llama").named_parameters())
    moved = [start[name].detach() - value.detach() for name, value in run.model.named_parameters()]
    return torch.cat([part.flatten() for part in moved]).double()


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of two vectors, as a share of the first one's length."""
    return float((first - second).norm() / first.norm())


def test_trl_6548_truncation_empties_no_response(tmp_path: Path) -> None:
    """A completion that truncation has emptied gave NaN, or a pair without anything to learn.

    trl #6548: both responses were cut by the length of the longer one, so a short answer beside a long one vanished.
    trl #6588 gives each response its own room; a prompt that fills max_length still leaves both empty there.
    """
    answer, ramble = " Paris.", " Well, " + "you know, " * 60
    rows = [{"prompt": prompt, "chosen": answer, "rejected": ramble} for prompt in ("Which?", "Which? " * 60)]
    run = small_runs.trainer(
        tmp_path / "run", train_dataset=Dataset.from_list(rows), max_length=100, max_prompt_length=60
    )
    assert run.train_dataset is not None
    for index in range(len(rows)):
        pair = run.train_dataset[index]
        assert tiny_tokenizer().decode(pair.chosen[pair.chosen_start :]).startswith(answer), "short: whole"
        assert 100 - 60 <= len(pair.rejected) - pair.rejected_start < 100, "long: what the prompt leaves"
    theirs = trl_ids(Preference("Which? " * 60, answer, ramble), tiny_tokenizer(), max_length=100)
    assert theirs.chosen_start == len(theirs.chosen), "TRL leaves nothing to learn from"


def test_trl_3716_accumulation_does_not_multiply_the_loss(tmp_path: Path) -> None:
    """With gradient_accumulation_steps=4 the reported loss was four times too high.

    trl #2628 (of the tracking issue #2617), mended by #3716; the same through transformers #35651.
    """
    rows = small_runs.rows(8)
    whole = trained(tmp_path / "whole", rows).state.log_history[0]
    parts = trained(
        tmp_path / "parts", rows, per_device_train_batch_size=2, gradient_accumulation_steps=4
    ).state.log_history[0]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=64 * FP32)
    assert parts["nll_loss"] == pytest.approx(whole["nll_loss"], rel=64 * FP32)


def test_transformers_35808_accumulation_has_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    """Scaled by the trainer and again by DeepSpeed, or as a mean of means, the accumulated gradient was another one.

    transformers #35808 turned DeepSpeed's own scaling off; #34191 asked for one mean over the global batch.
    """
    rows = long_rows([(1, 1), (40, 2), (2, 40), (30, 30)])
    whole = gradient(trained(tmp_path / "whole", rows))
    parts = gradient(
        trained(tmp_path / "parts", rows, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    )
    singles = [gradient(trained(tmp_path / f"single-{at}", [row])) for at, row in enumerate(rows)]
    mean_of_means = torch.stack(singles).mean(0)
    assert distance(whole, parts) < 1e-4  # fp32 sums over a few thousand terms, in another order
    assert distance(whole, mean_of_means) > 0.05, "the test wants lengths at which a mean of means is wrong"


def test_ms_swift_10144_packed_pairs_weigh_the_same(tmp_path: Path) -> None:
    """Micro-batches of one and of three pairs were averaged each: the lone pair counted as much as the other three.

    ms-swift #10144 (packed DPO). The odds term alone is looked at: beta is large and dwarfs the nll.
    """
    rows = long_rows([(40, 40), (1, 2), (2, 1), (3, 2)])
    whole = gradient(trained(tmp_path / "whole", rows, beta=100.0))
    packed = trained(tmp_path / "packed", rows, beta=100.0, max_tokens_per_micro_batch=450)
    lone = gradient(trained(tmp_path / "lone", rows[:1], beta=100.0))
    three = gradient(trained(tmp_path / "three", rows[1:], beta=100.0))
    log = packed.state.log_history[0]
    assert log["tokens_per_s"] * log["step_time_s"] > 450, "the test wants more than one micro-batch"
    assert distance(whole, gradient(packed)) < 1e-4
    assert distance(whole, (lone + three) / 2) > 0.05


@pytest.mark.parametrize("on_prompt", [True, False])
def test_trl_1676_the_nll_is_over_prompt_and_response(tmp_path: Path, on_prompt: bool) -> None:
    """Is the nll that of the response or of the whole text? TRL changed it to and fro, and users asked which it is.

    trl #1676 (the question), #1516 and #1625 (whole text), #2502 (response), #2527 (back to the whole text). Here
    `nll_on_prompt` says it, and both are what float64 logits of the whole sequences give.
    """
    rows = small_runs.rows(3)
    run = trained(tmp_path / "run", rows, nll_on_prompt=on_prompt)
    assert run.train_dataset is not None
    model = small_runs.model_of("llama").double().eval()
    total, count = 0.0, 0
    for index in range(len(rows)):
        pair = run.train_dataset[index]
        ids = torch.tensor([list(pair.chosen)])
        first = 1 if on_prompt else pair.chosen_start
        logits = model(input_ids=ids).logits[0, first - 1 : -1]
        total += functional.cross_entropy(logits, ids[0, first:], reduction="sum").item()
        count += ids.shape[1] - first
    assert run.state.log_history[0]["nll_loss"] == pytest.approx(total / count, rel=1e-5)


def test_trl_2468_metrics_are_means_over_pairs_and_not_over_micro_batches(tmp_path: Path) -> None:
    """Logged rewards were those of one rank, or means of means of unequal batches.

    trl #2468 (metrics of rank 0 only), #6943 and #7045 (means that weigh unequal batches alike). Over ranks:
    tests/distributed/test_invariance.py.
    """
    rows = long_rows([(40, 40), (1, 2), (2, 1), (3, 2)])
    whole = trained(tmp_path / "whole", rows).state.log_history[0]
    packed = trained(tmp_path / "packed", rows, max_tokens_per_micro_batch=450).state.log_history[0]
    for name in ("rewards/chosen", "rewards/margins", "log_odds_chosen", "log_odds_ratio", "nll_loss"):
        assert packed[name] == pytest.approx(whole[name], rel=1e-4), name


def test_trl_1679_special_tokens_are_there_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model without a bos token got None among its ids, and one with a template got the bos token twice.

    trl #1679, #1073 and #1885; axolotl #1616.
    """
    tokenizer = tiny_tokenizer()
    with caplog.at_level(logging.WARNING):
        run = small_runs.trainer(tmp_path / "run", pairs=3)
    assert run.train_dataset is not None
    for index in range(3):
        pair = run.train_dataset[index]
        for ids in (list(pair.chosen), list(pair.rejected)):
            assert all(isinstance(token, int) for token in ids)
            assert ids.count(tokenizer.bos_token_id) <= 1
            assert ids[-1] == tokenizer.eos_token_id
            assert ids[-2] != tokenizer.eos_token_id


def test_deepspeed_8072_adapters_have_the_dtype_of_the_base(tmp_path: Path) -> None:
    """PEFT kept adapters in fp32 beside a bf16 model, and ZeRO-3 could not gather the two together.

    DeepSpeed #8072, worked around in #8113. Here there is one dtype, and the adapters move.
    """
    run = small_runs.trainer(
        tmp_path / "run",
        model=small_runs.model_of("llama").bfloat16(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
        bf16=True,
        deepspeed="zero3",
        max_steps=1,
        learning_rate=0.1,
    )
    run.train()
    assert {value.dtype for value in run.model.parameters()} == {torch.bfloat16}
    state = full_state(run.model)
    assert state is not None
    assert all(value.any() for name, value in state.items() if "lora_B" in name)
