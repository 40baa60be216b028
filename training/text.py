"""Transcripts as character CTC writes them, counts of their words, and draws that depend on a key alone."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from ..configuration_dual_slm import ALPHABET, plain_text

_UNSPOKEN = re.compile(r"\([^)]*\)|\[[^\]]*\]")


def nothing_said(transcript: str) -> bool:
    """Whether a transcript has no words, only remarks such as "(no speech)" or "[noise]"."""
    return not _UNSPOKEN.sub("", transcript).strip()


def spelled_out(transcript: str, alphabet: str = ALPHABET) -> bool:
    """Whether `normalize` keeps all words: the transcript has no digits and no letters outside the alphabet."""
    letters = (letter for letter in plain_text(transcript) if letter.isalnum())
    return nothing_said(transcript) or all(letter in alphabet for letter in letters)


def normalize(text: str, alphabet: str = ALPHABET) -> list[str]:
    """The spoken words in lower case, without punctuation: the targets of CTC.

    Words in parentheses count as spoken when the text has other words too.
    """
    text = "" if nothing_said(text) else plain_text(text)
    text = "".join(letter if letter in alphabet else " " for letter in text)
    return [word.strip("'") for word in text.split() if word.strip("'")]


def word_tuple(text: str) -> tuple[str, ...]:
    """The words of a text, by which it is the same as another."""
    return tuple(normalize(text))


def word_counts(texts: Iterable[str], alphabet: str = ALPHABET) -> Counter[str]:
    return Counter(word for text in texts for word in normalize(text, alphabet))


def bigram_counts(texts: Iterable[str], alphabet: str = ALPHABET) -> Counter[tuple[str, str]]:
    return Counter(bigram for text in texts for bigram in pairwise(normalize(text, alphabet)))


def hash_uniform(key: str, seed: int = 0) -> float:
    """A uniform number in [0, 1) that depends on (seed, key) alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big") / 2**64


def split_by(key: str, seed: int = 0, validation: float = 0.05, test: float = 0.05) -> str:
    """Split of a speaker or a dialogue in a corpus without splits. It does not depend on the other rows."""
    draw = hash_uniform(key, seed)
    return "test" if draw < test else "validation" if draw < test + validation else "train"
