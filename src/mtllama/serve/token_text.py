"""The bytes that a token stands for, and where in a text each token begins."""

import codecs
import json
import re
from collections.abc import Iterable
from typing import Any

from mtllama.data.words import BYTE_LETTERS

_BYTE_OF = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Token id -> bytes in UTF-8, of which a character may take several tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(id for id, added in tokenizer.added_tokens_decoder.items() if added.special)
        self._added: dict[int, str] = {id: str(added.content) for id, added in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        steps = json.loads(backend.decoder.__getstate__()) if backend is not None and backend.decoder is not None else {}
        self._byte_level = any(step.get("type") == "ByteLevel" for step in (steps, *steps.get("decoders", ())))

    def of(self, token: int) -> bytes:
        """The bytes of one token: those of its vocabulary entry, by the kind of the vocabulary."""
        entry = self.tokenizer.convert_ids_to_tokens(token)
        if entry is None:  # the embedding may have more rows than the vocabulary
            return b""
        if not self._byte_level and (byte := _BYTE_TOKEN.fullmatch(entry)):
            return bytes([int(byte[1], 16)])
        if token in self._added:
            return self._added[token].encode()
        if self._byte_level and all(letter in _BYTE_OF for letter in entry):
            return bytes(_BYTE_OF[letter] for letter in entry)
        return str(entry).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def text(self, token: int) -> str:
        """A token by itself, for reading; bytes that are no whole character are written out, as in OpenAI's API: `bytes:\\xf0\\x9f`."""
        raw = self.of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Offsets:
    """Where in a text each of its tokens begins, in characters; a token amid a character begins where that character does."""

    def __init__(self, tokens: TokenBytes) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._place = 0

    def take(self, tokens: Iterable[int], *, special: bool = True) -> list[int]:
        """The places of the next tokens; `special`: whether special ones are written in the text, as in a prompt's, not in an answer's."""
        found = []
        for token in tokens:
            found.append(max(self._place, 0))
            if special or token not in self._tokens.special:
                self._place += len(self._decoder.decode(self._tokens.of(token)))
        return found

    def unwritten(self, characters: int) -> None:
        """The first tokens have characters that the text has not: a blank that SentencePiece puts before it, a marker of its beginning."""
        self._place -= characters
