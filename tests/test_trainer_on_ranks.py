"""What only several ranks can show of `ORPOTrainer`: what `trainer_worker.py` found on two of them, under ZeRO-3."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from orpo_ds.monitor.jsonl import read_metrics
from tests import small_runs
from tests.parity.compare import metric_errors
from tests.test_answers import answer, prompt_ids
from tests.test_evaluation import evaluation_errors
from tests.test_trainer import TOLERANCE, TRL_METRICS, largest_difference, parameters
from tests.trainer_worker import (
    BATCH_SIZES,
    EVAL_PAIRS,
    TOKENS_THAT_FIT,
    TRAINED_STEPS,
    best_tokens,
    stream,
)
from tests.trainer_worker import SETTINGS as WORKER_SETTINGS


@pytest.fixture(scope="module")
def worker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `trainer_worker.py` after its run."""
    folder = tmp_path_factory.mktemp("two_ranks")
    small_runs.save_model_folder(folder / "model")
    finished = small_runs.launch("tests.trainer_worker", str(folder))
    assert finished.returncode == 0, finished.stdout[-6000:]
    return folder


@pytest.fixture(scope="module")
def seen(worker_folder: Path) -> dict[str, Any]:
    return torch.load(worker_folder / "results.pt", weights_only=False)


@pytest.mark.distributed
@pytest.mark.slow
class TestTwoRanks:
    def test_a_model_by_name_is_loaded_in_shards(self, seen: dict[str, Any]) -> None:
        # What zero.Init has partitioned is an empty tensor until it is gathered.
        assert seen["by_name"]["elements_before_the_engine"] == 0

    def test_each_rank_knows_its_place_and_one_reports(self, seen: dict[str, Any]) -> None:
        # accelerate calls every rank of a CPU job the only one: two W&B runs came of it.
        assert seen["quick_start"]["places"] == [(2, 0, 0), (2, 1, 1)]
        assert seen["quick_start"]["reporters"] == [2, 0]

    def test_by_name_or_by_object_is_the_same_training(self, seen: dict[str, Any]) -> None:
        named, loaded = seen["by_name"], seen["quick_start"]
        assert largest_difference(named["parameters"], loaded["parameters"]) == 0.0
        assert [line["loss"] for line in named["history"]] == [line["loss"] for line in loaded["history"]]
        assert len(named["history"]) == TRAINED_STEPS

    def test_one_rank_trains_to_the_same_parameters(self, seen: dict[str, Any], tmp_path: Path) -> None:
        changes = WORKER_SETTINGS | {"per_device_train_batch_size": 4, "deepspeed": "zero0"}
        alone = small_runs.trainer(tmp_path / "run", pairs=8, **changes)
        before = parameters(alone)
        alone.train()
        moved = {name: value - before[name] for name, value in parameters(alone).items()}
        together = {name: value - before[name] for name, value in seen["by_name"]["parameters"].items()}
        # The change itself is compared, so a step that does nothing cannot pass.
        assert largest_difference(together, moved) <= 1e-4

    def test_a_stream_trains_the_same_on_one_rank(self, seen: dict[str, Any], tmp_path: Path) -> None:
        changes = WORKER_SETTINGS | {"per_device_train_batch_size": 4, "deepspeed": "zero0"}
        alone = small_runs.trainer(tmp_path / "run", train_dataset=stream(), **changes)
        alone.train()
        together, apart = (
            [line["loss"] for line in history if "loss" in line]
            for history in (seen["streamed"]["history"], alone.state.log_history)
        )
        assert together == pytest.approx(apart, rel=TOLERANCE)
        assert len(together) == TRAINED_STEPS
        # Shards of one's own for each rank would make batches of nobody's.
        assert all("the ranks do not read the same rows" in said for said in seen["streamed"]["messages"])

    def test_ranks_find_micro_batches_that_fit_together(self, seen: dict[str, Any]) -> None:
        part = seen["fitted"]
        assert min(part["widest"]) > TOKENS_THAT_FIT, "it never ran out of memory"
        assert max(part["after"]) <= TOKENS_THAT_FIT
        losses, named = ([line["loss"] for line in seen[name]["history"]] for name in ("fitted", "by_name"))
        assert losses == pytest.approx(named, rel=TOLERANCE)

    def test_ranks_that_share_each_row(self, seen: dict[str, Any], tmp_path: Path) -> None:
        part = seen["split_rows"]
        assert max(part["widest"]) <= 130 / 2, "no rank holds a whole row"
        losses, named = (
            [line["loss"] for line in seen[name]["history"]] for name in ("split_rows", "by_name")
        )
        assert losses == pytest.approx(named, rel=TOLERANCE)
        counted = [[line[key] for key in ("trunk_saving", "grad_norm")] for line in part["history"]]
        plain = [[line[key] for key in ("trunk_saving", "grad_norm")] for line in seen["by_name"]["history"]]
        assert counted == [pytest.approx(line, rel=TOLERANCE) for line in plain]
        start = parameters(small_runs.trainer(tmp_path / "run", pairs=8))
        moved, wanted = (
            {key: value - start[key] for key, value in seen[name]["parameters"].items()}
            for name in ("split_rows", "by_name")
        )
        assert largest_difference(moved, wanted) <= 1e-4
        assert largest_difference(part["resumed"], part["parameters"]) == 0.0

    def test_ranks_that_share_each_row_evaluate(self, seen: dict[str, Any], tmp_path: Path) -> None:
        alone = small_runs.trainer(
            tmp_path / "run", train_dataset=None, eval_dataset=small_runs.dataset(EVAL_PAIRS)
        )
        alone.model.load_state_dict(seen["split_rows"]["parameters"])
        wanted, found = (
            {name: figures[f"eval_{name}"] for name in TRL_METRICS}
            for figures in (alone.evaluate(), seen["split_rows"]["evaluation"])
        )
        assert max(metric_errors(found, wanted).values()) <= TOLERANCE

    def test_what_shared_rows_cannot_do_is_named(self, seen: dict[str, Any]) -> None:
        assert "sequence_parallel_size=2: compute_metrics and predict()" in seen["split_rows"]["message"]
        for message in seen["one_head"]["messages"]:
            assert "sequence_parallel_size=2 needs packed rows: Qwen2Attention has 1 query heads" in message

    def test_ranks_log_the_same(self, seen: dict[str, Any]) -> None:
        first, second = seen["model_steps_of_all_ranks"]
        assert [line["loss"] for line in first] == [line["loss"] for line in second]

    def test_the_saved_folder_has_the_trained_weights(
        self, seen: dict[str, Any], worker_folder: Path
    ) -> None:
        loaded = AutoModelForCausalLM.from_pretrained(worker_folder / "by_name").state_dict()
        trained = seen["by_name"]["parameters"]
        assert {name for name in trained if not torch.equal(trained[name], loaded[name])} == set()

    @pytest.mark.parametrize("batch_size", BATCH_SIZES)
    def test_evaluation_is_exact(self, seen: dict[str, Any], batch_size: int) -> None:
        assert max(evaluation_errors(seen["evaluations"][batch_size]).values()) <= TOLERANCE

    def test_answers_under_zero3_leave_the_training_alone(self, seen: dict[str, Any]) -> None:
        """ZeRO-3 gathers layer by layer while the ranks generate: of three prompts two and one."""
        trained, plain = seen["answers"]["parameters"], seen["by_name"]["parameters"]
        assert largest_difference(trained, plain) == 0.0

    def test_answers_under_zero3_are_those_of_the_model(
        self, seen: dict[str, Any], worker_folder: Path
    ) -> None:
        lines = read_metrics(worker_folder / "answers" / "answers.jsonl")
        assert [line["step"] for line in lines] == [0] * 3 + [TRAINED_STEPS] * 3
        for line in lines:
            for column, step in (("before", 0), ("now", line["step"])):
                model = AutoModelForCausalLM.from_pretrained(worker_folder / "model")
                if step:
                    model.load_state_dict(seen["answers"]["parameters"])
                assert line[column] == answer(model, prompt_ids(line["row"])), (step, column)

    def test_predictions_of_all_ranks_are_whole_and_in_order(
        self, seen: dict[str, Any], tmp_path: Path
    ) -> None:
        first, second = seen["answers"]["predictions"]
        for mine, theirs in zip(first, second, strict=True):
            assert (mine == theirs).all()
        alone = small_runs.trainer(
            tmp_path / "run",
            train_dataset=None,
            eval_dataset=small_runs.dataset(EVAL_PAIRS),
            preprocess_logits_for_metrics=best_tokens,
        )
        alone.model.load_state_dict(seen["answers"]["parameters"])
        found = alone.predict(small_runs.dataset(EVAL_PAIRS))
        assert (found.predictions == first[0]).all()
        assert (found.label_ids == first[1]).all()

    def test_adapters_train_and_nothing_else(self, seen: dict[str, Any]) -> None:
        part = seen["adapters"]
        assert part["before"].keys() == part["after"].keys()
        assert all("lora_" in name for name in part["after"])
        # B starts at zero, so A has no gradient in the first step and moves from the second.
        assert all(not torch.equal(part["before"][name], part["after"][name]) for name in part["after"])
        assert part["head_trains"] is False
        assert part["head_gradients"]
        assert not any(part["head_gradients"])
        fresh = small_runs.model_of().state_dict()
        base = {name.replace(".base_layer", ""): value for name, value in part["base"].items()}
        frozen = {name: value for name, value in base.items() if "lora_" not in name}
        assert all(torch.equal(value, fresh[name]) for name, value in frozen.items())

    def test_adapters_in_half_precision(self, seen: dict[str, Any]) -> None:
        """DeepSpeed #8072: adapters in fp32 beside bf16 weights could not be gathered together."""
        part, single = seen["half_adapters"], seen["adapters"]
        assert part["dtypes"] == [{torch.bfloat16}] * 2
        assert all(not torch.equal(part["before"][name], part["after"][name]) for name in part["after"])
        # bfloat16 has 8 bits: a loss of logits of one size is within a few of their halves, 2^-9 each.
        losses, exact = ([line["loss"] for line in lines["history"]] for lines in (part, single))
        assert losses == pytest.approx(exact, rel=2**-6)
        assert losses[-1] < losses[0]

    def test_all_ranks_end_alike_when_the_loss_turns_nan(
        self, seen: dict[str, Any], worker_folder: Path
    ) -> None:
        first, second = seen["blow_up"]["messages"]
        assert first == second
        assert "the loss is nan at step 2" in first
        assert f"the last good checkpoint is {worker_folder / 'blow_up' / 'checkpoint-1'}" in first

    def test_adapters_are_saved_alone_and_load(self, seen: dict[str, Any], worker_folder: Path) -> None:
        folder = worker_folder / "adapters"
        assert (folder / "adapter_model.safetensors").is_file()
        assert not (folder / "model.safetensors").exists()
        model = PeftModel.from_pretrained(small_runs.model_of(), folder)
        loaded = {name: value for name, value in model.named_parameters() if "lora_" in name}
        trained = seen["adapters"]["after"]
        assert loaded.keys() == trained.keys()
        assert all(torch.equal(trained[name], value) for name, value in loaded.items())
