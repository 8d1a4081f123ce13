"""docs/watching.md names every metric of a run, and every file that watching it needs."""

from __future__ import annotations

import re
from pathlib import Path

from tests import small_runs

PAGE = (small_runs.REPOSITORY / "docs" / "watching.md").read_text()


def test_every_metric_has_its_meaning(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = small_runs.trainer(
        run,
        model=small_runs.model_of("mixtral"),
        log_gradients_by_layer=True,
        eval_dataset={"": small_runs.dataset(3), "math": small_runs.dataset(2)},
        eval_strategy="epoch",
        include_num_input_tokens_seen="all",
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    named = set(
        re.findall(r"`([^`]+)`", "\n".join(line for line in PAGE.splitlines() if line.startswith("|")))
    )
    logged = {name for entry in trainer.state.log_history for name in entry} - {"step", "epoch"}
    for name in logged:
        own = re.sub(r"^grad_norm_by_layer/.*", "grad_norm_by_layer/<layer>", name)
        if own.startswith("eval_"):
            own = re.sub(r"^eval_(math_)?", "", own)
            assert own in named or f"eval_{own}" in named, name
        else:
            assert own in named, name
    for path in run.iterdir():
        kind = re.sub(r"checkpoint-\d+", "checkpoint-<step>/", path.name)
        assert kind in named, f"{path.name} is not on the page"
