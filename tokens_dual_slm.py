"""How an LLM's tokenizer spells a piece of text behind other text: byte-level BPE, SentencePiece, WordPiece and others."""

import re
from collections.abc import Sequence
from typing import Any

_ANY_TEXT = "0"  # no tokenizer merges a figure with letters


def encode(tokenizer: Any, text: Any) -> Any:
    """The tokens of a text, or of each of several texts, without those that the tokenizer would add."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _decode(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def encode_pieces(tokenizer: Any, pieces: Sequence[str], before: str = _ANY_TEXT) -> list[list[int]]:
    """The tokens of each piece where it stands behind the text `before`. A space that begins a piece belongs to it.

    A piece is encoded alone where its tokens read right behind `before`. A tokenizer that adds a space, or leaves one
    out, gets both texts together, and the tokens of `before` are cut off.
    """
    start, found = encode(tokenizer, before), encode(tokenizer, list(pieces))
    base, *read = _decode(tokenizer, [start, *(start + ids for ids in found)])
    wrong = [n for n, text in enumerate(read) if text != base + pieces[n]]
    for n, ids in zip(wrong, encode(tokenizer, [before + pieces[n] for n in wrong]), strict=True):
        if ids[: len(start)] == start:
            found[n] = ids[len(start) :]
    return found


def read_vocabulary(tokenizer: Any) -> dict[str, int]:
    """What each token adds to a text -> the token. Bytes of a byte fallback give way to real tokens of the same text."""
    start = encode(tokenizer, _ANY_TEXT)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (not _is_byte(item[0]), item[1]))
    base, *read = _decode(tokenizer, [start, *([*start, number] for _, number in vocabulary)])
    texts = zip(read, vocabulary, strict=True)
    return {text[len(base) :]: number for text, (_, number) in texts if text.startswith(base)}


def _is_byte(token: str) -> bool:
    return re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token) is not None
