"""Refuses a release whose words come from held-out speakers: in clips, synthetic speech, texts or the decoding lexicon.

It also says in the model card what the test data share with what was trained on.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from .corpora import CORPORA
from .corpora.row import Row
from .corpora.table import read_table
from .files import read_json, read_lines, replace_section, write_text
from .overlap import NOTE, KnownWords, Overlap, compare, describe_overlap, read_lexicon
from .recipe import Recipe, load_recipe
from .text import bigram_counts, word_counts, word_tuple

SAME_WORDS = ("ravdess", "vctk", "fsdd", "synthetic")  # corpora that let all of their speakers say the same words
SHORT = 4  # words: a shorter sentence that two people say is chance
SECTION = ("<!-- overlap: written by training.released -->", "<!-- end of overlap -->")


def check_release(run: Path, tables: Path, tests: Iterable[Path], held_out: Iterable[str]) -> list[Overlap]:
    """What the test rows of a finished run share with what it was trained on.

    Args:
        run: its `recipe.yaml` names the tables and the texts, its `final` has the lexicon.
        tables: folder of these tables.
        tests: more tables, of which only the rows outside `train` count.
        held_out: texts of speakers who are in no training clip.

    Raises:
        ValueError: a speaker, a clip or a sentence of a test is in training, a held-out text is, or the lexicon has
            words or bigrams that no text of the run explains.
    """
    train, test, lines = _data(load_recipe(str(run / "recipe.yaml")), tables)
    test += [row for table in tests for row in read_table(table) if row.split != "train"]
    spells = read_json(run / "final/config.json").get("linguistic_adapter_type") == "letters"
    lexicon = read_lexicon(str(run / "final")) if spells else None
    overlaps = compare(test, train, lexicon, lines)
    spoken = [row for row in train if row.transcript and not row.voice_only]
    said = [*(str(row.transcript) for row in spoken), *lines]
    faults = [
        *_shared(overlaps),
        *_held_out(spoken, lines, [*held_out, *held_out_texts(test)]),
        *(_unexplained(lexicon, said) if lexicon else []),
    ]
    if faults:
        raise ValueError(f"{run} is not released: " + "; ".join(faults) + ". Make the tables again without them.")
    return overlaps


def _data(recipe: Recipe, tables: Path) -> tuple[list[Row], list[Row], list[str]]:
    """Training rows, held-out rows and more texts of a recipe, and of the run that its words come from."""
    stage_0 = recipe.stage_0
    rows = list(read_table(*_paths(tables, [*recipe.data.tables, *stage_0.tables])))
    train = [row for row in rows if row.split == "train"]
    test = [row for row in rows if row.split != "train" and not row.voice_only]
    lines = read_lines(_paths(tables, stage_0.lexicon))
    if stage_0.linguistic_from:
        source = tables / stage_0.linguistic_from / "../recipe.yaml"
        if not source.is_file():
            raise ValueError(
                f"{stage_0.linguistic_from} is not the `final` of a run, so nothing says what its words were trained on: "
                "name the run's folder in warm_start.linguistic_from."
            )
        more, held_out, texts = _data(load_recipe(str(source)), tables)
        train, test, lines = [*train, *more], [*test, *held_out], [*lines, *texts]
    unique = {(row.key, row.split): row for row in test}
    return train, list(unique.values()), lines


def _paths(folder: Path, names: Iterable[str]) -> list[str]:
    return [str(folder / name) for name in names]


def _shared(overlaps: Sequence[Overlap]) -> list[str]:
    faults = []
    for overlap in overlaps:
        known = CORPORA.get(overlap.corpus)
        kinds = ["clips"] + ["speakers"] * (known is None or not known.shares_speakers)
        found = {kind: overlap.shared[kind] for kind in kinds if overlap.shared[kind].found}
        faults += [
            f"{items.found} {kind} of {overlap.corpus}, {overlap.split}, are in training ({items.examples[0]})"
            for kind, items in found.items()
        ]
    return faults


def _held_out(spoken: Sequence[Row], lines: Sequence[str], held_out: Iterable[str]) -> list[str]:
    """Synthetic speech says pieces of the lines, too. A piece that someone else says whole is chance."""
    known = {words for words in map(word_tuple, held_out) if len(words) >= SHORT}
    pieces = "\n".join(f" {' '.join(word_tuple(line))} " for line in lines)
    synthetic_first = sorted(
        spoken, key=lambda row: row.corpus != "synthetic"
    )  # what a person says too, is a person's
    texts = {str(row.transcript): row.corpus == "synthetic" for row in synthetic_first} | dict.fromkeys(lines, False)
    found = [
        text
        for text, synthetic in texts.items()
        if (words := word_tuple(text)) in known and not (synthetic and f" {' '.join(words)} " in pieces)
    ]
    return [f"{len(found)} texts are those of held-out speakers, the first is {found[0][:60]!r}"] if found else []


def _unexplained(lexicon: KnownWords, said: Sequence[str]) -> list[str]:
    words = lexicon.words - word_counts(said, lexicon.alphabet).keys()
    bigrams = lexicon.bigrams - set(map(" ".join, bigram_counts(said, lexicon.alphabet)))
    kinds = {"words": words, "bigrams": bigrams}
    return [
        f"{len(found)} {kind} of the lexicon are in no text of the run, one is {min(found)!r}"
        for kind, found in kinds.items()
        if found
    ]


def held_out_texts(rows: Iterable[Row]) -> list[str]:
    """What validation and test clips say, but for corpora that let all of their speakers say the same words."""
    own = (row for row in rows if row.split != "train" and row.corpus not in SAME_WORDS)
    return [row.transcript for row in own if row.transcript]


def write_overlap(card: Path, overlaps: Sequence[Overlap]) -> None:
    """Writes the table into the section of a model card that has its two marks; a card without it gets one at the end."""
    path = card / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    table = ["```text", "\n\n".join(map(describe_overlap, overlaps)), "", NOTE, "```"]
    body = "\n".join(["<details><summary>Sentences, n-grams, speakers, clips</summary>", "", *table, "", "</details>"])
    write_text(path, replace_section(text, SECTION, body, "What the tests share with training"))
