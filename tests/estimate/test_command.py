"""`orpo-ds estimate`, and the function that `submit` asks."""

import json
from pathlib import Path

import pytest

from orpo_ds import cli
from orpo_ds.estimate import Pairs, estimate_run, parse_cluster
from orpo_ds.estimate.hardware import GB
from orpo_ds.estimate.workload import workload
from orpo_ds.model.size import ModelSize
from tests import small_runs

# Llama 3.1 8B's config.json.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
ELEMENTS = 8_030_261_248  # as its model card's files have them


def words(folder: Path, **flags: object) -> list[str]:
    fields = {"output_dir": folder / "run", "dataset_name": "someone/elses", "report_to": "none"} | flags
    return [text for name, value in fields.items() for text in (f"--{name}", str(value))]


def test_an_8b_model_is_estimated_without_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    flags = {
        "model_name_or_path": tmp_path,
        "deepspeed": "zero3",
        "max_length": 512,
        "per_device_train_batch_size": 1,
        "max_steps": 100,
    }
    answer = estimate_run(words(tmp_path, **flags), parse_cluster("8x80GB", nodes=4))
    held = answer.own.memory.states.device
    assert held["parameters"] == 2 * ELEMENTS // 32
    assert held["optimizer"] == pytest.approx(8 * ELEMENTS / 32, rel=1e-6)
    assert "8.03B parameters, all of them trained, bfloat16" in answer.text
    # 6 N FLOPs a token for forward and backward, and the head's logits once more; the embedding multiplies nothing.
    head = 128_256 * 4096
    tokens = 2 * 512 - 1
    assert answer.own.work.flops == pytest.approx((6 * (ELEMENTS - head) + 2 * head) * tokens, rel=0.02)
    assert answer.fits
    assert answer.best is not None
    assert answer.best.time.total <= answer.own.time.total
    assert answer.own.days == pytest.approx(100 * answer.own.time.total / 86_400)
    # 16 bytes a parameter do not fit 8 GPUs of 16 GB; on the host they do.
    small = estimate_run(words(tmp_path, **flags), parse_cluster("8x16GB", nodes=1))
    assert not small.fits
    assert small.best is not None
    assert small.best.fits
    assert small.best.plan.optimizer_on == "cpu"


def test_the_command_reads_the_dataset_and_says_whether_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_runs.save_model_folder(tmp_path / "model")
    small_runs.write_jsonl(tmp_path / "train.jsonl", small_runs.rows(12))
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model_name_or_path: {tmp_path}/model\ndataset_name: {tmp_path}/train.jsonl\noutput_dir: {tmp_path}/run\n"
        f"dataset_cache_dir: {tmp_path}/tokens\nnum_train_epochs: 2\nper_device_train_batch_size: 2\n"
    )
    cli.main(["estimate", str(run), "--gpus", "2x80GB", "--usd-per-gpu-hour", "2"])
    page = capsys.readouterr().out
    assert "12 pairs of" in page
    assert "6 steps" in page  # 2 epochs of 12 pairs, 4 a step
    assert "It fits with 10% to spare." in page
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit) as stop:
        cli.main(["estimate", str(run), "--gpus", "2x1GB"])
    assert stop.value.code == 1
    assert "It does NOT fit" in capsys.readouterr().out


def test_words_for_a_cluster() -> None:
    cluster = parse_cluster("4xA100", nodes=2, network_gbit=100, host_gb=500, usd_per_gpu_hour=1.5)
    assert cluster.ranks == 8
    assert cluster.gpu.memory_bytes == 80 * GB
    assert cluster.host_bytes_per_node == 500 * GB
    # 8 GB to all: 7 of 8 parts over the link inside; half of it between the nodes, through 4 cards of 12.5 GB/s.
    assert cluster.seconds_to_move(8 * GB) == pytest.approx(4 / 50)
    assert parse_cluster("8x64GB", nodes=1).gpu.memory_bytes == 64 * GB
    with pytest.raises(ValueError, match="write the GPUs of one node as 8x80GB"):
        parse_cluster("eight", nodes=1)
    with pytest.raises(ValueError, match="known are H100"):
        parse_cluster("8xZ9", nodes=1)


def test_pairs_that_share_their_prompt_cost_less(tmp_path: Path) -> None:
    """Packing and trunk sharing count: half of the tokens shared are a quarter less to push."""
    args = small_runs.settings(tmp_path / "run", max_length=100, per_device_train_batch_size=2)
    size = ModelSize(10**6, 10**5, 2, 64, head_frozen=False, body_frozen=False)
    alone = workload(args, Pairs.longest(100), size, ranks=4)
    pairs = Pairs.longest(100)
    shared = Pairs(pairs.trunk + 49, pairs.chosen - 49, pairs.rejected - 49, None, "")
    together = workload(args, shared, size, ranks=4)
    assert alone.fullest_tokens == 2 * 199
    assert together.fullest_tokens == 2 * 150
    assert together.flops == pytest.approx(alone.flops * 150 / 199, rel=0.02)
    assert alone.pairs_a_step == 8
