"""A release whose words come from held-out speakers is refused."""

import re
from pathlib import Path

import pytest
import yaml

from conftest import SHARED_DATA, make_model
from dual_slm.training.corpora.folder import read_folder
from dual_slm.training.corpora.row import Row, make_row
from dual_slm.training.corpora.table import write_table
from dual_slm.training.provenance import check_release, held_out_texts, write_overlap
from dual_slm.training.released import sentences

pytestmark = pytest.mark.usefixtures("table_cache")

# The lexicon of `make_model` has the, fox, lazy, dog, dig, a, be and four bigrams: "the fox", "lazy dog", "a be", "be a".
TEXTS = ("the fox dig", "a be a", "lazy dog")


def said(text: str, split: str = "train", **changes) -> Row:
    row = make_row(id=f"{split} {text}", corpus="c", split=split, transcript=text, speaker=f"{split} speaker")
    return row.replace(**changes)


@pytest.fixture
def run(tiny_backbones, tmp_path) -> Path:
    """A finished run with a lexicon; its tables are in the same folder."""
    model, _ = make_model(tiny_backbones, kind="letters")
    model.save_pretrained(tmp_path / "final")
    stage_0 = {"tables": ["words.parquet"], "lexicon": ["lines.txt"]}
    recipe = {"data": {"tables": ["t.parquet"]}, "warm_start": stage_0, "stages": []}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def make_tables(folder: Path, *rows: Row, words: tuple[Row, ...] = (), lines: str = "") -> None:
    write_table([*map(said, TEXTS[:2]), said("a dig fox", "test"), *rows], folder / "t.parquet")
    write_table([said(TEXTS[2], speaker="synthetic"), *words], folder / "words.parquet")
    (folder / "lines.txt").write_text(lines)


def test_a_release_whose_words_are_all_explained_is_told_what_it_shares(run):
    make_tables(run)
    (found,) = check_release(run, run, [], ["the dog will be a fox"])
    assert (found.corpus, found.split, found.rows) == ("c", "test", 1)
    assert found.shared["speakers"].found == found.shared["sentences"].found == 0
    assert found.shared["lexicon bigrams not in train"].found == 0
    write_table([said("be a lazy dog", "test", id="new", corpus="official")], run / "official.parquet")
    assert [overlap.corpus for overlap in check_release(run, run, [run / "official.parquet"], [])] == ["c", "official"]


LEAK = "1 texts are those of held-out speakers, the first is 'be a lazy dog'"
SYNTHETIC = said("be a lazy dog", corpus="synthetic")
SPEAKER = said("dig", "test", speaker="train speaker")
CLIP = (said("dig", "test", audio=__file__), said("fox", audio=__file__))


@pytest.mark.parametrize(
    ("changes", "held_out", "message"),
    [
        ({}, ["A lazy dog."], None),  # three words that two people say are chance
        ({"words": (SYNTHETIC,), "lines": "the fox be a lazy dog"}, ["Be a lazy dog."], None),  # a piece of a sentence
        ({"words": (SYNTHETIC,), "lines": "the fox be a lazy dogs"}, ["Be a lazy dog."], LEAK),
        ({"words": (SYNTHETIC,), "lines": "be a lazy dog"}, ["Be a lazy dog."], LEAK),
        ({"words": (said("be a lazy dog"), SYNTHETIC), "lines": "the fox be a lazy dog"}, ["Be a lazy dog."], LEAK),
        ({"words": (said("be a lazy dog"),)}, ["Be a LAZY dog!"], LEAK),
        ({"lines": "the fox\nbe a lazy dog\n"}, ["Be a LAZY dog!"], LEAK),
        ({"rows": (SPEAKER,)}, [], "1 speakers of c, test, are in training (train speaker)"),
        ({"rows": CLIP}, [], "1 clips of c, test, are in training"),
        ({"rows": (said("be a lazy dog", "test"),), "lines": "be a lazy dog"}, [], LEAK),
    ],
)
def test_words_of_held_out_speakers_are_refused_wherever_they_are(run, changes, held_out, message):
    make_tables(run, *changes.get("rows", ()), words=changes.get("words", ()), lines=changes.get("lines", ""))
    if message is None:
        assert check_release(run, run, [], held_out)
        return
    with pytest.raises(ValueError, match=f"is not released: .*{re.escape(message)}"):
        check_release(run, run, [], held_out)


def test_counts_of_a_lexicon_that_no_text_explains_are_refused(run):
    """Such words were counted in a text that the recipe does not name, like those of an older checkpoint."""
    make_tables(run)
    write_table([said("dog", speaker="synthetic")], run / "words.parquet")
    told = "1 words of the lexicon are in no text of the run, one is 'lazy'; 1 bigrams .*, one is 'lazy dog'"
    with pytest.raises(ValueError, match=told):
        check_release(run, run, [], [])
    (run / "lines.txt").write_text("The lazy dog.")
    assert check_release(run, run, [], [])


def test_the_model_card_has_the_table_once(run):
    make_tables(run)
    (run / "README.md").write_text("# A card\n")
    for _ in range(2):
        write_overlap(run, check_release(run, run, [], []))
    text = (run / "README.md").read_text()
    assert text.startswith("# A card\n") and text.count("c, test") == 1
    assert re.search(r"^  speakers +0 +1 +0.0%$", text, re.MULTILINE)


def test_corpora_of_few_sentences_hold_no_words_back():
    rows = [said("a dog", "test"), said("a fox", "test", corpus="ravdess"), said("be a dog")]
    assert held_out_texts(rows) == ["a dog"]


def test_the_words_of_another_run_are_followed_to_its_tables(run, tmp_path):
    """`warm_start.linguistic_from` takes the letters and the lexicon of a run on other tables."""
    make_tables(run)
    later = tmp_path / "later"
    (later / "final").mkdir(parents=True)
    for file in (run / "final").iterdir():
        (later / "final" / file.name).write_bytes(file.read_bytes())
    write_table([said("a dog"), said("a fox", "test", id="later")], run / "later.parquet")
    recipe = {
        "data": {"tables": ["later.parquet"]},
        "warm_start": {"linguistic_from": "final", "steps": 0},
        "stages": [],
    }
    (later / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (found,) = check_release(later, run, [], [])
    assert found.rows == 2 and found.shared["lexicon bigrams not in train"].found == 0
    (run / "lines.txt").write_text("the dog will be lazy")
    with pytest.raises(
        ValueError, match="1 texts are those of held-out speakers, the first is 'the dog will be lazy'"
    ):
        check_release(later, run, [], ["The dog will be lazy."])
    recipe["warm_start"]["linguistic_from"] = "elsewhere/final"
    (later / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="elsewhere/final is not the `final` of a run"):
        check_release(later, run, [], [])


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"real speech is not at {SHARED_DATA}")
def test_the_released_texts_have_no_sentence_of_a_test_clip():
    texts = {" ".join(re.findall("[a-z']+", text)) for text in sentences(SHARED_DATA)}
    assert len(texts) > 40_000
    for folder in ("librispeech_subset", "librispeech_test_clean"):
        held_out = {str(row.transcript).lower() for row in read_folder(SHARED_DATA / folder) if row.split == "test"}
        assert len(held_out) >= 45 and not held_out & texts
