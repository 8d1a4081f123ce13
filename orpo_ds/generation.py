"""The model in training answers prompts: transformers' `generate` on all ranks, with nothing of the training changed.

Each rank answers its share of the prompts. Under ZeRO-3 a layer's parameters are gathered while it runs, as in
training, so no GPU ever holds the model; the ranks therefore make the same number of forward calls
(`synced_gpus`), and one without prompts of its own answers one of another's. Answers are greedy: two answers to a
prompt differ because the model does, and no random number is drawn.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from orpo_ds import distributed
from orpo_ds.engine import Engine, release_gathered
from orpo_ds.model.attention import AttentionChoice
from orpo_ds.model.load import own_generation_config

logger = logging.getLogger(__name__)

CUT_OFF = " …"  # behind an answer that did not end


@dataclass(frozen=True, eq=False)
class Generator:
    """Answers prompts with a model that is in its engine.

    Attributes:
        engine: holds the model.
        model: the transformers model, or the PeftModel around it.
        tokenizer: of the model.
        attention: that the model had before it was packed.
        padding_value: token id of the padding; None: the tokenizer's.
        batch_size: prompts that a rank answers at once.
        synced: whether every forward call is a collective (ZeRO-3).
    """

    engine: Engine
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    attention: AttentionChoice
    padding_value: int | None
    batch_size: int
    synced: bool

    @torch.no_grad()
    def answers(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
        """The greedy answer to each prompt, on every rank. Collective.

        Args:
            prompts: token ids, the same on every rank.
            max_new_tokens: an answer that is longer is cut off, and ends with an ellipsis.
        """
        room = self._room(prompts)
        if room is not None and room < 1:
            logger.warning("no answers: the longest prompt fills all positions that the model has")
            return ["" for _ in prompts]
        config = self._config(max_new_tokens if room is None else min(max_new_tokens, room))
        ranks, rank = distributed.world_size(), distributed.rank()
        mine = list(range(rank, len(prompts), ranks))
        most = -(-len(prompts) // ranks)
        asked = mine + [0] * (most - len(mine))  # whoever has none left answers the first prompt again
        texts: list[str] = []
        with self._undisturbed():
            for first in range(0, most, self.batch_size):
                batch = asked[first : first + self.batch_size]
                texts += self._generate([prompts[index] for index in batch], config)
        found = dict(
            entry
            for entries in distributed.gather_objects(list(zip(mine, texts, strict=False)))
            for entry in entries
        )
        return [found[index] for index in range(len(prompts))]

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """The model's own attention, no dropout, and everything as it was afterwards."""
        device = next(self.model.parameters()).device
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with self.attention.enabled(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            release_gathered(self.engine.deepspeed)

    def _generate(self, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[str]:
        """Answer prompts as one batch, padded on the left: what is generated follows on the prompt's last token."""
        device = next(self.model.parameters()).device
        width = max(map(len, prompts))
        pad = config.pad_token_id
        ids = torch.tensor(
            [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device
        )
        lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        mask = (torch.arange(width, device=device) >= width - lengths).long()
        model: Any = self.model  # generate comes from a mixin that annotations do not see
        output = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=self.synced
        )
        # A decoder of its own begins with a start token, and the prompt is not in what it returns.
        start = 1 if self.model.config.is_encoder_decoder else width
        ends = config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=device)
        return [
            text_of(self.tokenizer, new) + ("" if torch.isin(new, ends).any() else CUT_OFF)
            for new in output[:, start:]
        ]

    def _config(self, max_new_tokens: int) -> GenerationConfig:
        """The model's own generation config, greedy and with the cache that training turns off."""
        return own_generation_config(
            self.model,
            self.tokenizer,
            padding_value=self.padding_value,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            min_p=None,
            typical_p=None,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            return_dict_in_generate=False,
        )

    def _room(self, prompts: Sequence[Sequence[int]]) -> int | None:
        """Positions that the model has left behind the longest prompt; None for as many as wanted."""
        if self.model.config.is_encoder_decoder:
            return None
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return None if limit is None else int(limit) - max(map(len, prompts))


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    """Token ids as text without special tokens."""
    text: Any = tokenizer.decode(ids, skip_special_tokens=True)
    return str(text).strip()
