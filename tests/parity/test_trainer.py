"""The line that `ORPOTrainer` logs is the line that TRL's logs: same names, same numbers, from the same call."""

from pathlib import Path

import pytest
from datasets import Dataset

from orpo_ds import ORPOConfig, ORPOTrainer
from tests.parity.compare import metric_errors
from tests.parity.rows import ROWS
from tests.parity.tokenizer import tiny_tokenizer
from tests.parity.trl_side import METRICS, train_one_step
from tests.tiny_models import tiny_model

# A norm adds up the errors of all gradients, each within 1e-6 of the reference's.
TOLERANCE = 1e-5
LOGGED = (*METRICS, "grad_norm", "learning_rate", "epoch")


@pytest.mark.parametrize(
    ("family", "stage"), [("qwen2", 0), ("qwen2", 2), ("qwen2", 3), ("mixtral", 3), ("t5", 3)]
)
def test_one_step_logs_what_trl_logs(family: str, stage: int, tmp_path: Path, seed: int) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(family, vocab_size=len(tokenizer), seed=seed)
    trl = train_one_step(model, tokenizer=tokenizer, rows=ROWS)

    args = ORPOConfig(
        output_dir=str(tmp_path),
        bf16=False,
        per_device_train_batch_size=len(ROWS),
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        deepspeed={"zero_optimization": {"stage": stage}},
        dataset_cache_dir=str(tmp_path / "cache"),
    )
    trainer = ORPOTrainer(
        model=model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(ROWS)
    )
    trainer.train()

    ours, theirs = trainer.state.log_history[0], {name: trl.logged[name] for name in LOGGED}
    assert {name: error for name, error in metric_errors(ours, theirs).items() if error > TOLERANCE} == {}
