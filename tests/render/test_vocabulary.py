"""The bytes of tokens, against what the tokenizers themselves decode."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from veneer.render import load_renderer
from veneer.render.vocabulary import Utf8Reader, Vocabulary

NANO = load_renderer("nano")
CORPUS = ["the cat sat on the mat", "27+94+38=159", "naïve café — déjà vu", "  two  spaces\n\nand lines", "汉字 😀"] * 20


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Cut as Llama 2's and Gemma's are: spaces as a block character, bytes where there is no piece."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", *fallback], limit_alphabet=40)
    tokenizer.train_from_iterator(CORPUS, trainer)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<|end|>")


def gpt2_like() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


TOKENIZERS = {"nano": NANO.tokenizer, "sentencepiece": sentencepiece_like(), "gpt2": gpt2_like()}
TEXT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(CORPUS)), max_size=4).map("".join)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(text=TEXT.filter(lambda text: "\u2581" not in text))
def test_joined_bytes_are_the_text(kind: str, text: str) -> None:
    """A byte too many or too few anywhere and every stream is wrong behind it."""
    tokenizer = TOKENIZERS[kind]
    vocabulary = Vocabulary(tokenizer)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(vocabulary.bytes_of, tokens)) == text.encode()
    assert vocabulary.text(tokens) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 575), max_size=24))
def test_any_tokens_read_as_the_tokenizer_reads_them(tokens: list[int]) -> None:
    """A model draws bytes that are no text; they must show as transformers shows them."""
    assert NANO.vocabulary.text(tokens) == NANO.decode(np.array(tokens, np.int64))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=5), max_size=12))
def test_no_half_characters(pieces: list[bytes]) -> None:
    """Whatever the pieces, the text is that of all bytes at once, and never shows what the next piece would change."""
    reader = Utf8Reader()
    told = [reader.feed(piece) for piece in pieces]
    shown = "".join(told)
    assert shown + reader.feed(b"", last=True) == b"".join(pieces).decode(errors="replace")


def test_an_emoji_waits_for_its_last_byte() -> None:
    """Four tokens, one character."""
    tokens = NANO.encode("😀").tolist()
    assert len(tokens) == 4
    reader = Utf8Reader()
    assert [reader.feed(NANO.vocabulary.bytes_of(token)) for token in tokens] == ["", "", "", "😀"]


def test_names_of_tokens() -> None:
    """As OpenAI writes them: text, or bytes that say that they are bytes."""
    vocabulary = NANO.vocabulary
    first = NANO.encode("😀").tolist()[0]
    assert vocabulary.name(first) == "bytes:\\xf0"
    assert vocabulary.name(NANO.encode("<think>").tolist()[0]) == "<think>"
    assert vocabulary.name(len(NANO.tokenizer)) == ""
    assert {NANO.encode(t).tolist()[0] for t in ("<|im_end|>", "<|im_start|>", "<|endoftext|>")} <= vocabulary.special
    assert NANO.encode("</think>").tolist()[0] not in vocabulary.special
