"""Takes the same step under every setting, on as many ranks as it was started on, and writes what came out.

`test_invariance.py` starts it once for each number of ranks, because starting ranks is what takes long:

    deepspeed --num_accelerators 2 --module tests.distributed.worker folder

It runs what training runs (tokenised dataset, feed, policy, engine, `train_step`), and stops short of the update:
there it reads the gradient of the global batch, which is gone after it. At the end the trainer itself makes a few
updates, on the same global batches whatever the number of ranks.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from orpo_ds import ORPOTrainer, distributed
from orpo_ds.config import ORPOConfig
from orpo_ds.data.batches import CostModel
from orpo_ds.data.feed import Feed
from orpo_ds.data.packing import MicroBatch, pack
from orpo_ds.data.padding import pad
from orpo_ds.data.row_part import part_of_row
from orpo_ds.data.tokenize import TokenDataset, TokenizeOptions, TokenPair, tokenize_dataset
from orpo_ds.engine import build_engine
from orpo_ds.model.attention import packed_attention_enabled
from orpo_ds.model.tiled_mlp import tiled_mlps
from orpo_ds.monitor.metrics import MetricSums, mean_metrics
from orpo_ds.policy import OrpoPolicy
from orpo_ds.sequence_group import sequence_group
from orpo_ds.step import train_step
from tests.parity.tokenizer import tiny_tokenizer
from tests.tiny_models import tiny_model

MODEL_SEED = 5
MAX_LENGTH = 512


@dataclass(frozen=True)
class Setting:
    """One way to take the step. `max_tokens` None: one micro-batch a rank."""

    name: str
    stage: int
    family: str = "qwen2"  # tied embeddings: the hard case of ZeRO-3
    padded: bool = False
    max_tokens: int | None = None
    tile_rows: int | None = None
    logits_cache_mib: int = 0
    gradient_checkpointing: bool = False
    router_balance: str = "global_batch"
    offloaded: bool = False  # the optimizer's state, and under ZeRO-3 the parameters too, to the host
    split: int = 1  # ranks that share a row
    mlp_tile_tokens: int | None = None

    def runs_on(self, ranks: int) -> bool:
        """Whether there are enough ranks to share a row."""
        return ranks % self.split == 0


ONE_KEY_HEAD = "one key head"
MIXTURES = ("qwen3_moe", "olmoe", "deepseek_v3")

# Tokens: room for the longest pair of `tests.parity.rows` or for two short ones, so there are several micro-steps.
TIGHT = 130
TIGHT_PADDED = 400  # the same where sequences are padded to the longest

SETTINGS = [
    *(Setting(f"zero{stage}", stage) for stage in range(4)),
    *(Setting(f"zero{stage}, tight budget", stage, max_tokens=TIGHT) for stage in range(4)),
    Setting("zero2, padded, tight budget", 2, padded=True, max_tokens=TIGHT_PADDED),
    Setting("zero3, padded", 3, padded=True),
    Setting("zero3, small tiles", 3, tile_rows=5),
    Setting("zero3, small tiles, cached", 3, tile_rows=5, logits_cache_mib=64),
    Setting("zero3, gradient checkpointing", 3, max_tokens=TIGHT, gradient_checkpointing=True),
    Setting("zero2, CPU offload", 2, max_tokens=TIGHT, offloaded=True),
    Setting("zero3, CPU offload", 3, max_tokens=TIGHT, offloaded=True),
    Setting("zero3, untied head", 3, family="llama", max_tokens=TIGHT),
    # Experts, whose balance is a product of two means over the whole batch.
    Setting("zero3, experts", 3, family="mixtral"),
    Setting("zero3, experts, one micro-step", 3, family="mixtral", router_balance="micro_step"),
    Setting("zero3, experts, tight budget", 3, family="mixtral", max_tokens=TIGHT),
    Setting("zero2, experts, padded, tight budget", 2, "mixtral", padded=True, max_tokens=TIGHT_PADDED),
    Setting("zero3, experts, checkpointing", 3, "mixtral", max_tokens=TIGHT, gradient_checkpointing=True),
    *(Setting(f"zero3, {family}", 3, family, max_tokens=TIGHT) for family in MIXTURES),
    # Rows of an odd number of tokens among them, micro-batches without pairs, and with 4 ranks two groups of 2.
    *(Setting(f"zero{stage}, split by 2", stage, max_tokens=TIGHT, split=2) for stage in range(4)),
    *(Setting(f"zero{stage}, split by 4", stage, max_tokens=TIGHT, split=4) for stage in range(4)),
    Setting("zero3, tiled MLP", 3, max_tokens=TIGHT, mlp_tile_tokens=29),
    Setting("zero3, split by 4, tiled MLP", 3, gradient_checkpointing=True, split=4, mlp_tile_tokens=29),
    Setting("zero2, split by 4, one key head", 2, ONE_KEY_HEAD, split=4),
    Setting("zero3, split by 2, window and soft-cap", 3, "gemma2", split=2),
    Setting("zero3, split by 2, experts", 3, "mixtral", max_tokens=TIGHT, split=2),
]

GLOBAL_BATCH = 4  # of 7 pairs: the second batch of an epoch holds 3, fewer than there are ranks
TRAINED_STEPS = 4
TRAINED_METRICS = (
    "loss",
    "nll_loss",
    "logps/chosen",
    "logps/rejected",
    "log_odds_chosen",
    "rewards/accuracies",
    "grad_norm",
)


@dataclass(frozen=True)
class Outcome:
    """Of the global batch: `loss`, `metrics` by TRL's names, `gradients` by the model's parameter names."""

    loss: float
    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    micro_steps: int


class BeforeUpdate:
    """A DeepSpeed engine whose `step` keeps the gradients of the global batch instead of using them up."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self.gradients: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *args: Any, **keywords: Any) -> dict[str, Tensor]:
        return self._engine(*args, **keywords)

    def step(self) -> None:
        parameters = self._engine.module.model.named_parameters()
        self.gradients = {name: safe_get_full_grad(parameter).clone().cpu() for name, parameter in parameters}


def model_of(family: str) -> PreTrainedModel:
    """The family's tiny model, or Llama's with one key head that all query heads share."""
    vocab_size = len(tiny_tokenizer())
    if family != ONE_KEY_HEAD:
        return tiny_model(family, vocab_size=vocab_size, seed=MODEL_SEED)
    config = tiny_model("llama", vocab_size=vocab_size).config
    config.num_key_value_heads = 1
    with torch.random.fork_rng():
        torch.manual_seed(MODEL_SEED)
        return LlamaForCausalLM(config).float().train()


def zero_section(setting: Setting) -> dict[str, Any]:
    """`zero_optimization` of the DeepSpeed JSON."""
    parts = ("offload_optimizer", "offload_param") if setting.stage == 3 else ("offload_optimizer",)
    offload = {part: {"device": "cpu"} for part in parts if setting.offloaded}
    return {"stage": setting.stage, **offload}


def take_step(setting: Setting, dataset: TokenDataset, *, pad_token_id: int) -> Outcome:
    """Forward and backward of all pairs of the dataset as one global batch. All ranks call it."""
    args = ORPOConfig(
        output_dir=tempfile.gettempdir(),  # nothing is written
        bf16=False,
        deepspeed={"zero_optimization": zero_section(setting)},
        sequence_parallel_size=setting.split,
        mlp_tile_tokens=setting.mlp_tile_tokens,
        report_to="none",
    )
    sequence = sequence_group(args)
    model = model_of(setting.family)
    if setting.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = OrpoPolicy(
        model,
        beta=0.1,
        logits_cache_mib=setting.logits_cache_mib,
        tile_rows=setting.tile_rows,
        router_balance=setting.router_balance,
        sum_over_ranks=distributed.sum_over_ranks,
        sequence=sequence,
    )
    engine = build_engine(policy, args=args, total_steps=1)
    before_update = BeforeUpdate(engine.deepspeed)

    def lay_out(pairs: Sequence[TokenPair], ids: Sequence[int]) -> MicroBatch:
        if setting.padded:
            return pad(pairs, pair_ids=ids, pad_token_id=pad_token_id)
        row = pack(pairs, pair_ids=ids)
        return row if sequence is None else part_of_row(row, part=sequence.rank, parts=sequence.size)

    feed = Feed(
        dataset=dataset,
        layout=lay_out,
        padded=setting.padded,
        cost_model=CostModel(per_token=1.0, per_score=0.01, per_target=1.0),
        nll_on_prompt=True,
        rank=distributed.rank() // setting.split,
        world_size=args.data_parallel_size,
        max_tokens=setting.max_tokens,
    )
    sums = MetricSums()
    steps = feed.steps([range(len(dataset))], device=args.device)  # held: dropped, it ends its background
    plan, micro_batches = next(steps)
    attention = nullcontext() if setting.padded else packed_attention_enabled(model)
    with attention, tiled_mlps(policy.parts, setting.mlp_tile_tokens):
        step = train_step(
            engine._replace(deepspeed=before_update), plan, micro_batches, record=sums.add_micro_batch
        )
    metrics = mean_metrics(sums.reduce(distributed.sum_over_ranks), steps=1)
    engine.deepspeed.destroy()
    return Outcome(step.loss, metrics, before_update.gradients, len(plan.micro_batches))


def train(rows: datasets.Dataset, folder: Path) -> list[dict[str, float]]:
    """What `ORPOTrainer` logs of TRAINED_STEPS updates under ZeRO-3. All ranks call it.

    Plain SGD: Adam would blow a gradient that is nothing but rounding up to the size of a real one.
    """
    args = ORPOConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=GLOBAL_BATCH // distributed.world_size(),
        max_steps=TRAINED_STEPS,
        optim="sgd",
        learning_rate=0.02,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        deepspeed={"zero_optimization": {"stage": 3}},
        dataset_cache_dir=str(folder / "cache"),
    )
    tokenizer = tiny_tokenizer()
    trainer = ORPOTrainer(
        model=tiny_model("qwen2", vocab_size=len(tokenizer), seed=MODEL_SEED),
        args=args,
        processing_class=tokenizer,
        train_dataset=rows,
    )
    trainer.train()
    return [
        {name: line[name] for name in TRAINED_METRICS} for line in trainer.state.log_history[:TRAINED_STEPS]
    ]


def main(folder: Path) -> None:
    """Read `rows.json` in `folder`, and let rank 0 write `results.pt` there.

    Results: `steps`, a dict of setting name -> Outcome as a dict, and `training`, see `train`.
    """
    distributed.start_process_group(timeout_s=600)
    tokenizer = tiny_tokenizer()
    rows = datasets.Dataset.from_list(json.loads((folder / "rows.json").read_text()))
    dataset = tokenize_dataset(
        rows,
        processing_class=tokenizer,
        options=TokenizeOptions(max_length=MAX_LENGTH, max_prompt_length=MAX_LENGTH - 1),
        unusable="error",
        cache_dir=folder / "cache",
    )
    steps = {
        setting.name: asdict(take_step(setting, dataset, pad_token_id=tokenizer.pad_token_id))
        for setting in SETTINGS
        if setting.runs_on(distributed.world_size())
    }
    training = train(rows, folder)
    if distributed.is_main():
        torch.save({"steps": steps, "training": training}, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
