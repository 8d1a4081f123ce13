"""With adapters a step is TRL's as well: loss, metrics, and the gradient of everything that PEFT trains."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from tests.parity.orpo_side import one_step, token_pairs
from tests.parity.rows import ROWS
from tests.parity.test_trl import (
    BETA,
    LOSS_TOLERANCE,
    assert_same_gradients,
    assert_same_metrics,
)
from tests.parity.tokenizer import tiny_tokenizer
from tests.parity.trl_side import METRICS, train_one_step
from tests.tiny_models import tiny_model

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "head and embedding": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "new tokens": {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [5, 70, 71]}},
}


def adapted(model: PreTrainedModel, **config: Any) -> Any:
    """With B drawn at random: as PEFT makes it, it is zero, and A has no gradient."""
    wrapped: Any = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False, **config
        ),
    )
    return wrapped


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_adapters_is_that_of_trl(name: str, seed: int) -> None:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = adapted(tiny_model("llama", vocab_size=len(tokenizer), seed=seed), **CONFIGS[name])
    trl = train_one_step(copy.deepcopy(model), tokenizer=tokenizer, rows=ROWS, beta=BETA)
    ours = one_step(model, token_pairs(ROWS, tokenizer=tokenizer), layout="packed", beta=BETA)
    assert ours.loss == pytest.approx(trl.loss, rel=LOSS_TOLERANCE)
    assert_same_metrics(ours.metrics, {key: trl.logged[key] for key in METRICS})
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert ours.gradients.keys() == trl.gradients.keys() == trained
    assert_same_gradients(ours.gradients, trl.gradients)
