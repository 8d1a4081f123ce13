"""The layout that a run trains in: packed rows where they are proved exact on its model, padded ones elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from orpo_ds import distributed
from orpo_ds.config import ORPOConfig
from orpo_ds.data.batches import CostModel
from orpo_ds.data.feed import Feed, Layout, PairSource
from orpo_ds.data.image_inputs import pad_with_images, without_ids
from orpo_ds.data.packing import pack
from orpo_ds.data.padding import pad, pad_encoder_decoder
from orpo_ds.data.processing import ProcessingClass, tokenizer_of
from orpo_ds.data.row_part import part_of_row
from orpo_ds.data.tokenize import TokenPair
from orpo_ds.model.anatomy import ModelParts
from orpo_ds.model.attention import packed_attention_enabled
from orpo_ds.model.load import padding_id
from orpo_ds.model.selfcheck import PackingVerdict, check_head, check_packing
from orpo_ds.model.size import measure
from orpo_ds.model.tiled_mlp import tiled_mlps
from orpo_ds.policy import OrpoPolicy

logger = logging.getLogger(__name__)

TRL_COLLATORS = frozenset({"DPODataCollatorWithPadding", "DataCollatorForPreference"})


@dataclass(frozen=True)
class RunLayout:
    """How pairs of this run become tensors, and the attention that reads them.

    Attributes:
        packed: one row of trunks and branches; otherwise two padded rows a pair.
        parts: anatomy of the model.
        args: the run's settings.
        processing_class: knows what to pad with.
    """

    packed: bool
    parts: ModelParts
    args: ORPOConfig
    processing_class: ProcessingClass

    @property
    def nll_on_prompt(self) -> bool:
        """Whether the nll counts the prompt; an encoder's prompt has no log-probs."""
        return self.args.nll_on_prompt and not self.parts.is_encoder_decoder

    @contextmanager
    def attention(self) -> Iterator[None]:
        """The attention of this layout, and MLPs in tiles; what the model had before is restored afterwards."""
        attention = packed_attention_enabled(self.parts.model) if self.packed else nullcontext()
        with attention, tiled_mlps(self.parts, self.args.mlp_tile_tokens):
            yield

    def feed(self, dataset: PairSource, *, max_tokens: int | None) -> Feed:
        """This rank's view of a dataset.

        Args:
            dataset: token pairs.
            max_tokens: budget of a micro-batch; None: a rank's share of a batch is one micro-batch.

        Raises:
            ValueError: its prompts have images, and the run is packed.
        """
        size = measure(self.parts)
        return Feed(
            dataset=dataset,
            layout=self._tensors(dataset),
            padded=not self.packed,
            cost_model=CostModel.of_model(
                body_parameters=size.body_parameters,
                head_parameters=size.head_parameters,
                layers=size.layers,
                attention_width=size.attention_width,
                nll_on_prompt=self.nll_on_prompt,
            ),
            nll_on_prompt=self.nll_on_prompt,
            rank=distributed.data_rank() // self.args.sequence_parallel_size,
            world_size=self.args.data_parallel_size,
            max_tokens=max_tokens,
            ahead=self.args.micro_batches_ahead,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _tensors(self, dataset: PairSource) -> Layout:
        nll_on_prompt, images = self.nll_on_prompt, dataset.images
        if self.packed:
            if images is not None:
                raise ValueError(
                    "this dataset has images, and the run is in the packed layout: it was chosen for text alone. Give "
                    "this dataset to ORPOTrainer, or set layout='padded'"
                )
            ranks = self.args.sequence_parallel_size
            if ranks == 1:
                return lambda pairs, ids: pack(pairs, pair_ids=ids, nll_on_prompt=nll_on_prompt)
            part = distributed.rank() % ranks
            return lambda pairs, ids: part_of_row(
                pack(pairs, pair_ids=ids, nll_on_prompt=nll_on_prompt), part=part, parts=ranks
            )
        pad_id = padding_id(tokenizer_of(self.processing_class), padding_value=self.args.padding_value)
        if self.parts.is_encoder_decoder:
            start = self.parts.model.config.decoder_start_token_id
            return lambda pairs, ids: pad_encoder_decoder(
                pairs, pair_ids=ids, pad_token_id=pad_id, decoder_start_token_id=start
            )
        if images is not None:
            companion = dataset[images.companion]
            return lambda pairs, ids: pad_with_images(
                pairs,
                pair_ids=ids,
                images=images,
                companion=companion,
                pad_token_id=pad_id,
                nll_on_prompt=nll_on_prompt,
            )
        return lambda pairs, ids: pad(pairs, pair_ids=ids, pad_token_id=pad_id, nll_on_prompt=nll_on_prompt)


def check_collator(collator: object) -> None:
    """Let TRL's own collators pass, and refuse others by name.

    TRL's pad the sequences of a batch on the right, which is what the padded layout does, and what the packed one is
    proved equal to; so a script that passes one trains the same. What another would change (labels, masks, further
    inputs) would have to reach the packed rows, the counts that the loss is normalised by and the balance over ranks.

    Raises:
        ValueError: names the collator.
    """
    if collator is None:
        return
    kind = type(collator)
    if kind.__module__.partition(".")[0] == "trl" and kind.__name__ in TRL_COLLATORS:
        logger.info("%s pads as orpo_ds does: it is not called", kind.__name__)
        return
    raise ValueError(
        f"data_collator={getattr(collator, '__name__', kind.__name__)}: orpo_ds lays the pairs out itself, in packed "
        "rows (layout='padded' for padded ones), so a collator would not be called. Leave it out, and make its changes "
        "in the rows of the dataset; nll_on_prompt, padding_value and max_length are settings."
    )


def choose_layout(
    policy: OrpoPolicy, *, args: ORPOConfig, processing_class: ProcessingClass, datasets: Sequence[PairSource]
) -> RunLayout:
    """Find out, on a pair of the user's own data and on the user's own model, whether packed rows are exact.

    Prompts with images train padded: their positions and masks are made by the model from the rows that it is given.

    Args:
        policy: in its engine.
        args: `layout` says what the user wishes.
        processing_class: of the model.
        datasets: those that this run trains on or evaluates; one at least.

    Raises:
        ValueError: packing was asked for, or rows are to be split over ranks, and it is not exact on this model; or the
            head is not read exactly.
    """
    images = next((dataset.images for dataset in datasets if dataset.images is not None), None)
    example = datasets[0].example
    if images is not None:
        example = without_ids(example, images.token_ids)
    packed = _is_packed(policy, wish=args.layout, example=example, has_images=images is not None)
    return RunLayout(packed=packed, parts=policy.parts, args=args, processing_class=processing_class)


def _is_packed(policy: OrpoPolicy, *, wish: str, example: TokenPair, has_images: bool) -> bool:
    if policy.parts.is_encoder_decoder and policy.sequence is not None:
        raise ValueError(
            f"sequence_parallel_size={policy.sequence.size}: {type(policy.parts.model).__name__} is an encoder-decoder "
            "model, whose rows are padded, and only packed rows are split. Use 1."
        )
    if wish == "padded" or policy.parts.is_encoder_decoder:
        check_head(policy.parts, policy.head, example)
        return False
    if has_images:
        check_head(policy.parts, policy.head, example)
        verdict = PackingVerdict(False, "The prompts have images.")
    else:
        verdict = check_packing(policy.parts, policy.head, example, sequence=policy.sequence)
    if verdict.ok:
        return True
    if policy.sequence is not None:
        raise ValueError(
            f"sequence_parallel_size={policy.sequence.size} needs packed rows: {verdict.reason} Choose a size that "
            "this model allows, or 1 for none."
        )
    if wish == "packed":
        raise ValueError(f"layout='packed': {verdict.reason} Use layout='auto' to train padded instead.")
    if distributed.is_main():
        logger.warning("Training in the padded layout: %s", verdict.reason)
    return False
