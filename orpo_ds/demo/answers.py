"""What a model says: greedy answers to a few questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def answers(folder: Path, questions: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """The model's most likely answer to each question, without sampling.

    Args:
        folder: a Hugging Face folder with a tokenizer that has a chat template.
        questions: one user turn each; all are answered in one batch.
        max_new_tokens: an answer that is longer ends with an ellipsis.
    """
    # transformers' annotations leave open what a template and a generation return.
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        generated = model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False)
    texts = []
    for ids in generated[:, prompts["input_ids"].shape[1] :]:
        ended = bool((ids == tokenizer.eos_token_id).any())
        texts.append(tokenizer.decode(ids, skip_special_tokens=True).strip() + ("" if ended else " …"))
    return texts
