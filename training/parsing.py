"""Parses replies into labels and words, and scores them."""

import re
from collections.abc import Callable, Iterable
from functools import cache

from .prompts import PROMPTS
from .tasks import Sample

# Words for each attribute: "high pitch" says nothing about the energy.
_NOUNS = {
    "gender": "gender|sex",
    "pitch": "pitch(?:ed)?",
    "tempo": "tempo|speed|pace|rate",
    "energy": "energy|volume|loudness",
    "emotion": "emotions?|feelings?|mood",
}
_DENIED = re.compile(r"(\bnot|n't|\bneither|\bnor|\brather than|\binstead of)\s+(\w+\s+)?$")
_QUOTED = re.compile(r"^[^\"]*?\b(?:says?|said|is|transcript)\b[^\"]{0,20}\"(.*)\"\s*\.?\s*$", re.S | re.I)


def parse_label(reply: str, choices: Iterable[str], task: str | None = None) -> str | None:
    """The one label that a reply names, by itself or by a synonym (`prompts.yaml`); None if it names none or several.

    Denied labels do not count, nor do labels of another attribute than the `task`'s.
    """
    others = "|".join(nouns for name, nouns in _NOUNS.items() if task is not None and name != task)
    behind = rf"(?!\w|[ -](?:{others})\b)" if others else r"(?!\w)"
    found, text = set(), reply.lower()
    for label in choices:
        names = "|".join(re.escape(name) for name in (label, *PROMPTS["synonyms"].get(label, ())))
        for match in re.finditer(rf"(?<![\w-])(?:{names}){behind}(?!-(?!pitch|energy|tempo))", text):
            if not _DENIED.search(text[: match.start()]):
                found.add(label)
    return found.pop() if len(found) == 1 else None


def parse_transcript(reply: str) -> str:
    """The words of an ASR reply: the quoted words if the reply is a sentence about them, else the whole reply."""
    reply = reply.strip()
    quoted = _QUOTED.match(reply)
    return (quoted[1] if quoted else reply.strip('"')).strip()


@cache
def normalizer() -> Callable[[str], str]:
    """Whisper's English normalizer. Case, punctuation, numbers, contractions and spellings do not count as errors."""
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def word_errors(said: str, heard: str) -> tuple[int, int]:
    """Substitutions, deletions and insertions together, and the words that were said, after normalization."""
    import jiwer

    said, heard = normalizer()(said), normalizer()(heard)
    if not said:
        return len(heard.split()), 0
    found = jiwer.process_words(said, heard)
    return found.substitutions + found.deletions + found.insertions, len(said.split())


def score(sample: Sample, reply: str, transcript: str | None = None) -> dict:
    """Scores one reply; `transcript` is the reference of an ASR task. A dialogue has no score."""
    if sample.task == "asr":
        said, heard = transcript or "", parse_transcript(reply)
        errors, words = word_errors(said, heard)
        return {"said": said, "heard": heard, "errors": errors, "words": words}
    if sample.choices:
        parsed = parse_label(reply, sample.choices, sample.task)
        return {"label": sample.label, "parsed": parsed, "choices": sorted(sample.choices)}
    return {}
