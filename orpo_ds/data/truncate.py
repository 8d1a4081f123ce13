"""A token pair, and how it is cut to fit.

    chosen    bos p p p p p p | c c c c c c eos         the bar is `chosen_start`
    rejected  bos p p p p p p | r r r eos               and `rejected_start`

The contract is `prompt + response <= max_length` for both sequences. The prompt gives way first: one block of
positions is taken out of both sequences, inside what their prompts share, so that chosen and rejected are
never conditioned on different prompts and the trunk survives. Its size comes from the longer sequence. The
prompt does not shrink below `max_prompt_length` tokens for this; what is still too long then loses the end of
its response.

    keep_end     bos [p p p] p p p | c c c              the block in brackets goes
    keep_start   bos p p p [p p p] | c c c
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from orpo_ds.data.preference import RowError, common_prefix_length

TruncationMode = Literal["keep_end", "keep_start"]


@dataclass(frozen=True)
class TokenPair:
    """One preference example as token ids.

    For an encoder-decoder model `ids[:start]` is the encoder's input and `ids[start:]` are the decoder's
    labels.

    Attributes:
        chosen: prompt + chosen ids, truncated.
        rejected: prompt + rejected ids, truncated.
        chosen_start: index in `chosen` of the first token of the response, at least 1 and below its length.
        rejected_start: the same for `rejected`; it differs when the tokenizer merged over only one of the
            borders.
        trunk: length of the longest common prefix of `chosen` and `rejected`. It may reach into the
            responses.
        image_tokens: tokens of the prompt, after its first, that stand for an image; the nll counts none of them.
        images: hash of the prompt's images; None without any.
    """

    chosen: list[int]
    rejected: list[int]
    chosen_start: int
    rejected_start: int
    trunk: int
    image_tokens: int = 0
    images: str | None = None


@dataclass(frozen=True)
class TokenizeOptions:
    """Everything that decides the ids of a pair, beside the tokenizer.

    Attributes:
        max_length: most tokens of prompt + response; None does not cut.
        max_prompt_length: the prompt is not cut below this many tokens; None means half of `max_length`. A
            longer prompt stays whole where the pair fits.
        truncation_mode: which end of a prompt that is too long survives. The BOS token always does.
        is_encoder_decoder: prompt and responses are tokenised apart, each with the tokenizer's special
            tokens.
        max_completion_length: most tokens of a response of an encoder-decoder model, special tokens included;
            not used for decoder-only models (as in TRL). None leaves only `max_length`.
        vocab_size: rows with an id at or beyond this are refused; None does not look.
    """

    max_length: int | None = 1024
    max_prompt_length: int | None = None
    truncation_mode: TruncationMode = "keep_end"
    is_encoder_decoder: bool = False
    max_completion_length: int | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.truncation_mode not in get_args(TruncationMode):
            raise ValueError(
                f"truncation_mode={self.truncation_mode!r}: choose one of {list(get_args(TruncationMode))}"
            )
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length={self.max_length}: at least 2, a token of prompt and one of response"
            )
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length}: at least 1; None means half of max_length"
            )
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(
                f"max_completion_length={self.max_completion_length}: at least 1; None is no limit"
            )
        if (
            self.max_length is not None
            and self.max_prompt_length is not None
            and self.max_prompt_length >= self.max_length
        ):
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} leaves no room for a response in "
                f"max_length={self.max_length}: lower it, or leave it unset for half of max_length"
            )

    @property
    def prompt_floor(self) -> int:
        """Tokens below which a prompt is not cut. Only meaningful with a `max_length`."""
        assert self.max_length is not None
        return self.max_length // 2 if self.max_prompt_length is None else self.max_prompt_length


def truncate_pair(
    chosen: list[int],
    rejected: list[int],
    *,
    chosen_start: int,
    rejected_start: int,
    head: int,
    tail: int,
    options: TokenizeOptions,
    row_number: int,
    whole_prompt: bool = False,
) -> TokenPair:
    """Cut both full sequences to `options.max_length` and find their trunk.

    Args:
        chosen: prompt + chosen ids; its first min(chosen_start, rejected_start) ids are those of `rejected`.
        rejected: prompt + rejected ids.
        chosen_start: where the chosen response begins.
        rejected_start: where the rejected response begins.
        head: special tokens at the start of the prompt that are not cut (1 with a BOS token).
        tail: special tokens at the end of the prompt that are not cut (the encoder's EOS).
        options: the limits.
        row_number: for messages.
        whole_prompt: take nothing out of the prompt: it has images, whose tokens the model counts.

    Raises:
        RowError: there is nothing before a response, nothing left of it, or nothing that tells the two apart.
    """
    shared = min(chosen_start, rejected_start)
    if shared == 0:
        raise RowError(
            reason="empty_prompt",
            row=row_number,
            detail="no token comes before a response (no prompt, or all of it merged into the response, and "
            "no BOS token): nothing predicts its first token",
        )
    if options.max_length is not None:
        excess = max(len(chosen), len(rejected)) - options.max_length
        spare = max(chosen_start, rejected_start) - options.prompt_floor
        # The special tokens of the prompt stay, and without any at least one token does.
        cut = 0 if whole_prompt else max(0, min(excess, spare, shared - max(1, head + tail)))
        begin = head if options.truncation_mode == "keep_end" else shared - tail - cut
        chosen = (chosen[:begin] + chosen[begin + cut :])[: options.max_length]
        rejected = (rejected[:begin] + rejected[begin + cut :])[: options.max_length]
        chosen_start -= cut
        rejected_start -= cut
    for name, ids, start in (("chosen", chosen, chosen_start), ("rejected", rejected, rejected_start)):
        if start >= len(ids):
            raise RowError(
                reason="no_room_for_response",
                row=row_number,
                detail=f"{start} tokens of prompt leave nothing of the {name} response in "
                f"max_length={options.max_length}"
                + (", and a prompt with images is never cut: raise max_length" if whole_prompt else ""),
            )
    if chosen == rejected:
        raise RowError(
            reason="identical_responses",
            row=row_number,
            detail=f"chosen and rejected are the same {len(chosen)} tokens after truncation",
        )
    return TokenPair(chosen, rejected, chosen_start, rejected_start, common_prefix_length(chosen, rejected))
