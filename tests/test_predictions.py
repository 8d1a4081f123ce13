"""What `compute_metrics` and `predict` are given, against TRL's own trainer and against plain forwards of the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EvalPrediction, PreTrainedModel
from trl.experimental.orpo import ORPOConfig as TrlConfig
from trl.experimental.orpo import ORPOTrainer as TrlTrainer

from orpo_ds.data.tokenize import TokenPair
from orpo_ds.policy import OrpoPolicy
from tests import small_runs
from tests.parity.orpo_side import token_pairs
from tests.parity.reference import pad_pairs, reference_step
from tests.parity.rows import conversation
from tests.parity.tokenizer import tiny_tokenizer
from tests.tiny_models import tiny_model

TOLERANCE = 1e-5  # fp32 sums in another order
PAIRS = 5
VOCABULARY = len(tiny_tokenizer()) + small_runs.SPARE_IDS

# TRL pads to the longer response and takes its means over the padding: here both are of one length.
EVEN_ROWS = [
    conversation(f"How many is {number}?" + " Well?" * number, f"It is {number}.", f"Is it {number}?")
    for number in range(PAIRS)
]


class Keep:
    """A `compute_metrics` that keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[EvalPrediction] = []
        self.last: list[bool] = []

    def __call__(self, found: EvalPrediction, compute_result: bool = True) -> dict[str, Any]:
        self.seen.append(found)
        self.last.append(compute_result)
        return {"rows": np.float64(len(found.label_ids))}


def sequences(pairs: list[TokenPair]) -> list[list[int]]:
    """Prompt + response: the chosen one of a pair, then the rejected one."""
    return [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]


def own_logits(model: PreTrainedModel, pairs: list[TokenPair]) -> list[Tensor]:
    """[S, V] float64 of every sequence, each by itself through the model's own forward."""
    double = model.double().eval()
    with torch.no_grad():
        return [
            double(torch.tensor([ids]), use_cache=False).logits[0].float().double()
            for ids in sequences(pairs)
        ]


def padded(rows: list[Tensor]) -> np.ndarray:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100).numpy()


def argmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Treats every position alone."""
    return logits.argmax(-1)


def label_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Looks at two positions at once: transformers' labels belong to the logits one place before them."""
    logps = logits[:, :-1].log_softmax(-1)
    following = labels[:, 1:]
    return logps.gather(-1, following.clamp(min=0)[..., None])[..., 0].where(following != -100, 0.0)


def best_two(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Several tensors in one another."""
    values, places = logits.topk(2, dim=-1)
    return {"values": values, "more": (places, labels)}


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "t5"])
def test_without_preprocess_it_is_what_trl_gives(tmp_path: Path, family: str) -> None:
    """TRL's trainer with batches of one pair; ours with batches of another size. `gemma2` soft-caps its logits."""
    tokenizer = tiny_tokenizer()
    theirs, ours = Keep(), Keep()
    common: dict[str, Any] = {"bf16": False, "report_to": "none", "include_for_metrics": ["loss"]}
    settings = TrlConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        gradient_checkpointing=False,
        per_device_eval_batch_size=1,
        max_completion_length=64,
        **common,
    )
    rows = Dataset.from_list(EVEN_ROWS)
    model = tiny_model(family, vocab_size=VOCABULARY, seed=3)
    trl = TrlTrainer(
        model=model,
        args=settings,
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=theirs,
    )
    expected = trl.predict(trl.eval_dataset)
    trainer = small_runs.trainer(
        tmp_path / "ours",
        model=tiny_model(family, vocab_size=VOCABULARY, seed=3),
        train_dataset=None,
        eval_dataset=rows,
        compute_metrics=ours,
        per_device_eval_batch_size=2,
        max_completion_length=64,
        **common,
    )
    found = trainer.predict(rows)
    assert found.predictions.shape == expected.predictions.shape == (2 * PAIRS,)
    np.testing.assert_allclose(found.predictions, expected.predictions, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_array_equal(found.label_ids, expected.label_ids)
    assert found.label_ids.dtype == expected.label_ids.dtype
    (mine,), (trls,) = ours.seen, theirs.seen
    np.testing.assert_allclose(mine.losses, trls.losses, rtol=TOLERANCE)
    assert found.metrics["test_rows"] == 2 * PAIRS
    assert expected.metrics.keys() - found.metrics.keys() <= {"test_model_preparation_time"}


@pytest.mark.parametrize("tile_rows", [None, 7], ids=["whole sequences", "pieces"])
@pytest.mark.parametrize("preprocess", [argmax, label_logps])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_preprocess_sees_the_logits_of_the_model(
    tmp_path: Path, layout: str, preprocess: Callable[..., Tensor], tile_rows: int | None
) -> None:
    pairs = token_pairs(small_runs.rows(PAIRS), tokenizer=tiny_tokenizer())
    logits = own_logits(small_runs.model_of(), pairs)
    labels = [
        torch.tensor([-100] * start + ids[start:])
        for pair in pairs
        for ids, start in ((pair.chosen, pair.chosen_start), (pair.rejected, pair.rejected_start))
    ]
    exact = [preprocess(one[None], label[None])[0] for one, label in zip(logits, labels, strict=True)]
    kept = Keep()
    trainer = small_runs.trainer(
        tmp_path / "run",
        train_dataset=None,
        eval_dataset=small_runs.dataset(PAIRS),
        layout=layout,
        per_device_eval_batch_size=3,
        preprocess_logits_for_metrics=preprocess,
        compute_metrics=kept,
        include_for_metrics=["inputs", "loss"],
    )
    trainer.policy.head.tile_rows = tile_rows
    found = trainer.evaluate()
    (seen,) = kept.seen
    np.testing.assert_allclose(seen.predictions, padded(exact), rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_array_equal(seen.label_ids, padded(labels))
    np.testing.assert_array_equal(seen.inputs, padded([torch.tensor(ids) for ids in sequences(pairs)]))
    each = [
        reference_step(small_runs.model_of(), pad_pairs([pair], pad_token_id=0), beta=0.1).loss
        for pair in pairs
    ]
    np.testing.assert_allclose(seen.losses, each, rtol=TOLERANCE)
    assert found["eval_rows"] == 2 * PAIRS


def predictions_of(folder: Path, **changes: Any) -> tuple[Any, Keep]:
    """What `predict` returns under some settings, and what `compute_metrics` saw."""
    kept = Keep()
    trainer = small_runs.trainer(
        folder,
        train_dataset=None,
        eval_dataset=small_runs.dataset(PAIRS),
        compute_metrics=kept,
        **{"per_device_eval_batch_size": 2} | changes,
    )
    return trainer.predict(small_runs.dataset(PAIRS)), kept


class TestSettings:
    """transformers' settings of an evaluation; the numbers are held against those of the plain run."""

    def test_batches_apart(self, tmp_path: Path) -> None:
        whole, _ = predictions_of(tmp_path / "whole", preprocess_logits_for_metrics=argmax)
        apart, _ = predictions_of(
            tmp_path / "apart", preprocess_logits_for_metrics=argmax, eval_do_concat_batches=False
        )
        assert [len(batch) for batch in apart.predictions] == [4, 4, 2]
        for first, batch in zip((0, 4, 8), apart.predictions, strict=True):
            np.testing.assert_array_equal(whole.predictions[first:][:4, : batch.shape[1]], batch)

    def test_metrics_batch_by_batch(self, tmp_path: Path) -> None:
        whole, _ = predictions_of(tmp_path / "whole")
        found, kept = predictions_of(
            tmp_path / "batches", batch_eval_metrics=True, include_for_metrics=["loss"]
        )
        assert kept.last == [False, False, True]
        assert all(isinstance(seen.predictions, Tensor) for seen in kept.seen)
        assert [len(seen.losses) for seen in kept.seen] == [2, 2, 1]
        together = torch.cat([seen.predictions for seen in kept.seen])
        np.testing.assert_allclose(together, whole.predictions, rtol=TOLERANCE, atol=TOLERANCE)
        assert found.metrics["test_rows"] == 2  # what the last call returned

    def test_accumulation_on_the_device(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from orpo_ds import distributed

        moves = []
        gather = distributed.gather_objects
        monkeypatch.setattr(distributed, "gather_objects", lambda value: moves.append(value) or gather(value))
        results = {}
        for steps in (None, 2):
            moves.clear()
            results[steps], _ = predictions_of(tmp_path / str(steps), eval_accumulation_steps=steps)
            assert [len(pairs) for pairs in moves if isinstance(pairs, list)] == ([2, 2, 1], [4, 1])[
                steps == 2
            ]
        np.testing.assert_array_equal(results[None].predictions, results[2].predictions)

    def test_loss_only(self, tmp_path: Path) -> None:
        found, kept = predictions_of(tmp_path / "run", prediction_loss_only=True)
        assert (found.predictions, found.label_ids, kept.seen) == (None, None, [])
        assert found.metrics["test_loss"] > 0

    def test_keys_to_ignore(self, tmp_path: Path) -> None:
        kept = Keep()
        trainer = small_runs.trainer(
            tmp_path / "run", train_dataset=None, eval_dataset=small_runs.dataset(PAIRS), compute_metrics=kept
        )
        both = trainer.predict(small_runs.dataset(PAIRS)).predictions
        rejected = trainer.predict(small_runs.dataset(PAIRS), ["eval_logits/chosen"]).predictions
        np.testing.assert_array_equal(both[1::2], rejected)
        trainer.evaluate(ignore_keys=["eval_logits/rejected"])
        np.testing.assert_array_equal(both[::2], kept.seen[-1].predictions)

    def test_the_label_of_a_prompt(self, tmp_path: Path) -> None:
        usual, _ = predictions_of(tmp_path / "usual", preprocess_logits_for_metrics=argmax)
        minus_one, _ = predictions_of(
            tmp_path / "other", preprocess_logits_for_metrics=argmax, label_pad_token_id=-1
        )
        assert (minus_one.label_ids[:, 0] == -1).all()
        is_prompt = minus_one.label_ids == -1
        assert (usual.label_ids[is_prompt] == -100).all()
        np.testing.assert_array_equal(usual.label_ids[~is_prompt], minus_one.label_ids[~is_prompt])

    def test_objects_need_to_be_asked_for(self, tmp_path: Path) -> None:
        def words(logits: Tensor, labels: Tensor) -> str:
            return f"{labels.shape[1]} tokens"

        found, _ = predictions_of(
            tmp_path / "objects", preprocess_logits_for_metrics=words, eval_use_gather_object=True
        )
        pairs = token_pairs(small_runs.rows(PAIRS), tokenizer=tiny_tokenizer())
        assert found.predictions.tolist() == [f"{len(ids)} tokens" for ids in sequences(pairs)]
        with pytest.raises(ValueError, match=r"returned a str.*eval_use_gather_object"):
            predictions_of(tmp_path / "tensors", preprocess_logits_for_metrics=words)

    def test_several_tensors_in_one_another(self, tmp_path: Path) -> None:
        found, _ = predictions_of(tmp_path / "tree", preprocess_logits_for_metrics=best_two)
        first, _ = predictions_of(tmp_path / "argmax", preprocess_logits_for_metrics=argmax)
        places, labels = found.predictions["more"]
        np.testing.assert_array_equal(places[..., 0], first.predictions)
        np.testing.assert_array_equal(labels, first.label_ids)
        assert found.predictions["values"].shape == places.shape


class WidestTile(TorchDispatchMode):
    """The most rows of a tensor whose last dimension is the vocabulary, the head's own weight left out."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight.untyped_storage().data_ptr()
        self.rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for value in result if isinstance(result, list | tuple) else [result]:
            is_wide = isinstance(value, Tensor) and value.ndim and value.shape[-1] == VOCABULARY
            if is_wide and value.untyped_storage().data_ptr() != self.weight:
                self.rows = max(self.rows, value.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize(
    "callables",
    [{}, {"compute_metrics": Keep()}, {"compute_metrics": Keep(), "preprocess_logits_for_metrics": argmax}],
    ids=["none", "compute_metrics", "both"],
)
def test_no_more_logits_than_a_tile(tmp_path: Path, callables: dict[str, Any]) -> None:
    """Every tensor that the evaluation makes is looked at; there are hundreds of tokens."""
    trainer = small_runs.trainer(
        tmp_path / "run", train_dataset=None, eval_dataset=small_runs.dataset(PAIRS), **callables
    )
    trainer.evaluate()  # the check of the layout asks the model for its own logits: not what is meant here
    trainer.policy.head.tile_rows = 6
    with WidestTile(trainer.policy.parts.head.weight) as seen:
        trainer.evaluate()
    assert 0 < seen.rows <= 6


def test_the_callables_alone_make_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them the head runs once over the target rows, and nothing looks inside."""
    observers = []
    forward = OrpoPolicy.forward

    def noting(self: OrpoPolicy, *args: Any, observe: Any = None, **keywords: Any) -> Any:
        observers.append(observe)
        return forward(self, *args, observe=observe, **keywords)

    monkeypatch.setattr(OrpoPolicy, "forward", noting)
    trainer = small_runs.trainer(
        tmp_path / "run",
        train_dataset=None,
        eval_dataset=small_runs.dataset(PAIRS),
        preprocess_logits_for_metrics=argmax,  # nobody asks for what it would keep
    )
    trainer.evaluate()
    assert set(observers) == {None}
