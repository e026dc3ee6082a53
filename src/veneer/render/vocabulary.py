"""The bytes of every token: what a stream shows as soon as they make characters, and what stands beside a log-probability."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PLAIN = (*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100))
"""Bytes that GPT-2's tokenizers write as the character of the same number; the others, in order, as those from 256 on."""
_BYTE_OF = {chr(byte): byte for byte in _PLAIN} | {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in _PLAIN)}


class Vocabulary:
    """Tokens one by one. Joined bytes are the text: also where a tokenizer's own decoder would take a space off its beginning."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = dict(tokenizer.added_tokens_decoder)
        self.special = frozenset({*tokenizer.all_special_ids, *(number for number, token in self._added.items() if token.special)})
        """Tokens that mark turns and documents, and are no text."""
        self._kinds = _decoders(tokenizer)
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """Empty for a number without a token: models have more logits than tokenizers have tokens."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._bytes_of(token)
        return found

    def _bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        written: Any = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(written, str):
            return b""
        if "ByteLevel" in self._kinds and all(character in _BYTE_OF for character in written):
            return bytes(_BYTE_OF[character] for character in written)
        if self._kinds & {"ByteFallback", "Metaspace", "Replace"}:
            byte = _BYTE.fullmatch(written)
            return bytes([int(byte[1], 16)]) if byte else written.replace("\u2581", " ").encode()
        return str(self._tokenizer.decode([token])).encode()

    def name(self, token: int) -> str:
        """A token as OpenAI writes it: its text, or its bytes if they are no text by themselves."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def text(self, tokens: Sequence[int]) -> str:
        """What is no UTF-8 becomes U+FFFD."""
        return b"".join(map(self.bytes_of, tokens)).decode(errors="replace")


class Utf8Reader:
    """Bytes in pieces, characters out: half of one waits for its other half. In all, the text of all bytes at once."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, raw: bytes, last: bool = False) -> str:
        return self._decoder.decode(raw, last)


def _decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Kinds of the steps by which a tokenizer's backend decodes; a slow tokenizer is one of sentencepiece's."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"Metaspace"}
    if backend.decoder is None:
        return set()

    def kinds(step: dict[str, Any]) -> set[str]:
        return {step["type"]}.union(*(kinds(part) for part in step.get("decoders", ())))

    return kinds(json.loads(backend.decoder.__getstate__()))
