"""Runs the self-check on sharded models, then takes a training step of each, and writes what came out.

`test_selfcheck_zero3.py` starts it on two ranks:

    deepspeed --num_accelerators 2 --module tests.model.zero3_worker folder

Every rank writes `<folder>/<rank>.json`.
"""

from __future__ import annotations

import copy
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from orpo_ds.data.packing import count_targets, pack
from orpo_ds.data.padding import pad
from orpo_ds.model.attention import packed_attention_enabled
from orpo_ds.model.selfcheck import check_packing
from orpo_ds.policy import OrpoPolicy
from tests.model.odd_models import ODD_VOCAB, UNPACKABLE
from tests.model.pairs import random_pairs
from tests.tiny_models import tiny_model

SEED = 0
MODELS = {
    "qwen2": lambda: tiny_model("qwen2", vocab_size=ODD_VOCAB, seed=SEED),  # tied head
    "gpt_oss": UNPACKABLE["gpt_oss"][0],  # raises in the middle of a forward
    "phimoe": UNPACKABLE["phimoe (window in the mask only)"][0],
}
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def run(name: str) -> dict[str, Any]:
    """The verdict under ZeRO-3, and the loss of two steps that follow it beside the loss without DeepSpeed."""
    torch.manual_seed(SEED)
    policy = OrpoPolicy(MODELS[name](), beta=0.1, logits_cache_mib=0)
    plain = copy.deepcopy(policy)
    for parameter in policy.head.external_parameters():
        deepspeed.zero.register_external_parameter(policy.head, parameter)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=CONFIG)
    pairs = random_pairs([(12, 9, 14), (5, 8, 3)], vocab_size=ODD_VOCAB, seed=SEED)
    verdict = check_packing(policy.parts, policy.head, pairs[0])

    totals = {"nll_tokens_total": sum(count_targets(pair, True) for pair in pairs), "pairs_total": len(pairs)}
    batch = pack(pairs, pair_ids=range(2)) if verdict.ok else pad(pairs, pair_ids=range(2), pad_token_id=0)
    losses = []
    with packed_attention_enabled(policy) if verdict.ok else nullcontext():
        for _ in range(2):
            loss = engine(batch, **totals)["loss"]
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    with packed_attention_enabled(plain) if verdict.ok else nullcontext(), torch.no_grad():
        expected = plain(batch, **totals)["loss"].item()
    return {"verdict": asdict(verdict), "losses": losses, "expected": expected}


def main() -> None:
    """Run all models; called on every rank."""
    deepspeed.init_distributed("gloo")
    found = {name: run(name) for name in MODELS}
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
