"""What test data share with training data and with a checkpoint's lexicon: sentences, n-grams, speakers, clips."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backbones_dual_slm import name_in_errors
from ..configuration_dual_slm import ALPHABET, DualSLMConfig
from ..letters_dual_slm import Lexicon
from .corpora.row import Row
from .spelling import read_linguistic_state
from .text import normalize

ORDERS = (2, 3, 4, 5)  # of n-grams
NOTE = """Sentences, speakers and clips are counted once; n-grams and words as often as the test says them.
Training texts are the rows' transcripts, responses and histories, and text files.
Clips are compared by the content of their files: the same sound in another format is not found."""
PROVENANCE = """The checkpoint holds counts only: it does not say which texts its words and bigrams come from.
Its bigrams that are not in train were counted elsewhere: name all tables, and text files by --texts."""


@dataclass(frozen=True)
class Shared:
    """How many items of a test meet a condition."""

    found: int
    total: int
    share: float | None  # None: there are no items
    examples: list[str]  # the three most frequent


@dataclass(frozen=True)
class Overlap:
    """What one corpus and split of the test shares, by kind of item."""

    corpus: str
    split: str
    rows: int
    without_speaker: int
    missing_files: int  # compared by their paths
    shared: dict[str, Shared]


@dataclass(frozen=True)
class KnownWords:
    """The words of a checkpoint's lexicon, and its bigrams with a space between the two words."""

    words: set[str]
    bigrams: set[str]
    alphabet: str = ALPHABET


def read_lexicon(checkpoint: str) -> KnownWords:
    """The lexicon of a checkpoint, a folder or a Hub id. A linguistic adapter without a lexicon is a ValueError."""
    from transformers.utils.hub import cached_file

    with name_in_errors(checkpoint):
        config: Any = DualSLMConfig.from_pretrained(checkpoint)
        state = read_linguistic_state(str(cached_file(checkpoint, "model.safetensors")))
    if (kind := config.linguistic_adapter_type) != "letters":
        raise ValueError(f"{checkpoint}: linguistic_adapter_type {kind!r} has no lexicon, only 'letters' has one.")
    lexicon = Lexicon(config.linguistic_lexicon_size, config.linguistic_lexicon_pairs)
    lexicon.load_state_dict({name: state[f"lexicon.{name}"] for name in lexicon.state_dict()})
    words, bigrams = lexicon.known(config.linguistic_letters)
    return KnownWords(set(words), set(map(" ".join, bigrams)), config.linguistic_letters)


def compare(
    test: Sequence[Row], train: Sequence[Row], lexicon: KnownWords | None = None, texts: Iterable[str] = ()
) -> list[Overlap]:
    """What each corpus and split of `test` shares with `train`. `normalize` makes words of the transcripts.

    Args:
        texts: more that was trained on, such as the lines of `warm_start.lexicon`.
    """
    alphabet = lexicon.alphabet if lexicon else ALPHABET
    asked = {gram for row in test for n in ORDERS for gram in _ngrams(normalize(row.transcript or "", alphabet), n)}
    counted = [*(row.transcript or "" for row in train if not row.voice_only), *texts]  # by a lexicon
    read = (
        text for row in train for text in (row.transcript, row.response, *(turn["content"] for turn in row.history))
    )
    unique = dict.fromkeys([*counted, *filter(None, read)])
    words_of = {text: normalize(text, alphabet) for text in unique}
    counted_pairs = {gram for text in counted for gram in _ngrams(words_of[text], 2) if gram in asked}
    sentences = set(map(" ".join, words_of.values()))
    ngrams = {gram for words in words_of.values() for n in ORDERS for gram in _ngrams(words, n) if gram in asked}
    speakers = {row.speaker for row in train}
    sizes = {_file_size(row) for row in test}
    clips = {_clip(row) for row in train if row.audio and _file_size(row) in {None, *sizes}}
    overlaps = []
    for corpus, split in sorted({(row.corpus, row.split) for row in test}):
        rows = [row for row in test if (row.corpus, row.split) == (corpus, split)]
        spoken = [words for row in rows if (words := normalize(row.transcript or "", alphabet))]
        said = {n: Counter(gram for words in spoken for gram in _ngrams(words, n)) for n in (1, *ORDERS)}
        paths = {_clip(row): row.audio for row in rows if row.audio}
        shared = {"sentences": _shared({" ".join(words): 1 for words in spoken}, sentences.__contains__)}
        shared |= {f"{n}-grams": _shared(said[n], ngrams.__contains__) for n in ORDERS}
        shared["speakers"] = _shared({row.speaker: 1 for row in rows if row.speaker}, speakers.__contains__)
        shared["clips"] = _shared(dict.fromkeys(paths, 1), clips.__contains__, paths)
        if lexicon:
            shared["words outside lexicon"] = _shared(said[1], lambda word: word not in lexicon.words)
            shared["bigrams in lexicon"] = _shared(said[2], lexicon.bigrams.__contains__)
            shared["lexicon bigrams not in train"] = _shared(said[2], (lexicon.bigrams - counted_pairs).__contains__)
        nameless, missing = [not row.speaker for row in rows], [row.audio and _file_size(row) is None for row in rows]
        overlaps.append(Overlap(corpus, split, len(rows), nameless.count(True), missing.count(True), shared))
    return overlaps


def describe_overlap(overlap: Overlap) -> str:
    """A table of what is shared, with examples."""
    lines = [f"{f'{overlap.corpus}, {overlap.split}':<32}{'found':>8}{'of':>9}{'share':>9}  examples"]
    for name, items in overlap.shared.items():
        share = "unknown" if items.share is None else f"{items.share:.1%}"
        examples = "; ".join(example if len(example) <= 40 else f"{example[:37]}..." for example in items.examples)
        lines.append(f"  {name:<30}{items.found:>8,}{items.total:>9,}{share:>9}  {examples}".rstrip())
    notes = {"rows without a speaker": overlap.without_speaker, "missing files, by path": overlap.missing_files}
    return "\n".join(lines + [f"  {name:<30}{number:>8,}" for name, number in notes.items() if number])


def _ngrams(words: list[str], n: int) -> list[str]:
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def _shared(items: Mapping[str, int], meets: Callable[[str], bool], names: Mapping[str, str] | None = None) -> Shared:
    """What of the items, given with their counts, meets a condition. `names` has what an example is called."""
    found = Counter({item: count for item, count in items.items() if meets(item)})
    examples, total = [names[item] if names else item for item, _ in found.most_common(3)], sum(items.values())
    return Shared(found.total(), total, found.total() / total if total else None, examples)


def _file_size(row: Row) -> int | None:
    return os.path.getsize(row.audio) if row.audio and os.path.isfile(row.audio) else None


def _clip(row: Row) -> str:
    """What identifies a clip: the content of its file, or its path when the file is missing."""
    path = Path(os.path.abspath(str(row.audio)))
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(path)
