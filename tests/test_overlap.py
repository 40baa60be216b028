"""What a test shares with training data and with a lexicon."""

import json

import pytest

from conftest import SHARED_DATA, make_model
from dual_slm.training.cli import main
from dual_slm.training.corpora.folder import read_folder
from dual_slm.training.corpora.row import Row, make_row
from dual_slm.training.corpora.table import write_table
from dual_slm.training.overlap import KnownWords, Shared, compare, describe_overlap, read_lexicon

pytestmark = pytest.mark.usefixtures("table_cache")

DATA = SHARED_DATA


def said(text: str | None, split: str = "test", name: str | None = None, **more) -> Row:
    return make_row(id=name or f"{split} {text}", corpus="test", split=split, transcript=text, **more)


def test_sentences_and_ngrams_are_counted_in_normalised_words():
    train = [said("THE LAZY DOG SLEEPS", "train"), said("a fox", "train"), said("sleeps a lot of days", "train")]
    (found,) = compare([said("The lazy dog sleeps."), said("the lazy fox sleeps"), said("A fox, a fox!")], train)
    assert found.shared["sentences"] == Shared(1, 3, 1 / 3, ["the lazy dog sleeps"])
    # Of 3 + 3 + 3 bigrams all three of the first, "the lazy" of the second and "a fox" twice; none crosses two texts.
    assert found.shared["2-grams"] == Shared(6, 9, 6 / 9, ["the lazy", "a fox", "lazy dog"])
    assert found.shared["3-grams"] == Shared(2, 6, 2 / 6, ["the lazy dog", "lazy dog sleeps"])
    assert found.shared["4-grams"] == Shared(1, 3, 1 / 3, ["the lazy dog sleeps"])
    assert found.shared["5-grams"] == Shared(0, 0, None, [])
    assert "words outside lexicon" not in found.shared


def test_each_corpus_and_split_is_told_and_speakers_are_counted_once():
    train = [said("a", "train", speaker="x"), said("b", "train")]
    test = [said("c", speaker="x"), said("d", speaker="x"), said("e", speaker="y"), said("a", speaker=None)]
    test += [said("f", "validation", speaker="z"), said("a", name="other").replace(corpus="other")]
    other, whole, validation = compare(test, train)
    assert [(found.corpus, found.split, found.rows) for found in (other, whole, validation)] == [
        ("other", "test", 1),
        ("test", "test", 4),
        ("test", "validation", 1),
    ]
    assert whole.shared["speakers"] == Shared(1, 2, 0.5, ["x"])
    assert validation.shared["speakers"] == Shared(0, 1, 0.0, [])
    assert other.shared["speakers"].share is None and other.without_speaker == 1
    assert "rows without a speaker" in describe_overlap(whole)
    assert "unknown" in describe_overlap(other)


def test_clips_are_compared_by_content_and_by_path_when_files_are_missing(tmp_path):
    for name, content in {"a": b"one", "b": b"two", "copy": b"one", "more": b"three"}.items():
        (tmp_path / name).write_bytes(content)
    a, b, copy, more, gone, lost = (str(tmp_path / name) for name in ("a", "b", "copy", "more", "gone", "lost"))
    train = [said(None, "train", name, audio=name) for name in (copy, more, gone)]
    (found,) = compare([said(None, name=name, audio=name) for name in (a, b, gone, lost)], train)
    assert found.shared["clips"] == Shared(2, 4, 0.5, [a, gone])
    assert found.missing_files == 2
    assert "missing files, by path" in describe_overlap(found)


def test_a_lexicon_is_compared_and_what_training_does_not_explain_is_told():
    lexicon = KnownWords({"the", "lazy", "dog"}, {"the lazy", "lazy dog"})
    (found,) = compare([said("the lazy dog"), said("the cat, the cat")], [said("the lazy fox", "train")], lexicon)
    assert found.shared["words outside lexicon"] == Shared(2, 7, 2 / 7, ["cat"])
    assert found.shared["bigrams in lexicon"] == Shared(2, 5, 2 / 5, ["the lazy", "lazy dog"])
    assert found.shared["lexicon bigrams not in train"] == Shared(1, 5, 1 / 5, ["lazy dog"])


@pytest.fixture
def tables(tmp_path) -> tuple[str, str]:
    test, train = str(tmp_path / "test.parquet"), str(tmp_path / "train.parquet")
    write_table([said("the fox says be a dog"), said("a lazy dog", "train", name="not compared")], test)
    write_table([said("the fox", "train"), said("a dog", "validation", name="not learnt")], train)
    return test, train


def test_the_command_reads_a_checkpoint(tables, tiny_backbones, tmp_path, capsys):
    model, _ = make_model(tiny_backbones, kind="letters")
    model.save_pretrained(tmp_path / "letters")
    lexicon = read_lexicon(str(tmp_path / "letters"))
    assert lexicon.words == {"the", "fox", "lazy", "dog", "dig", "a", "be"}
    assert lexicon.bigrams == {"the fox", "lazy dog", "a be", "be a"}  # "a fox" is said once
    arguments = ["corpus", "overlap", tables[0], "--train", tables[1], "--checkpoint", str(tmp_path / "letters")]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "words outside lexicon" in shown and "The checkpoint holds counts only" in shown
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (found,) = told["overlaps"]
    assert (told["train_rows"], found["rows"]) == (1, 1)
    assert found["shared"]["2-grams"] == {"found": 1, "total": 5, "share": 0.2, "examples": ["the fox"]}
    assert found["shared"]["lexicon bigrams not in train"]["examples"] == ["be a"]
    assert found["shared"]["words outside lexicon"]["examples"] == ["says"]


def test_what_cannot_be_compared_is_one_line(tables, tiny_backbones, tmp_path, capsys):
    model, _ = make_model(tiny_backbones, kind="paper")
    model.save_pretrained(tmp_path / "paper")
    test, train = tables
    write_table([said("a dog", "train")], only := str(tmp_path / "only.parquet"))
    write_table([said("a dog")], none := str(tmp_path / "none.parquet"))
    for arguments, message in (
        (["gone.parquet", "--train", train], "gone.parquet does not exist"),
        ([test, "--train", train, "gone.parquet"], "gone.parquet does not exist"),
        ([only, "--train", train], "no row has the split validation or test"),
        ([test, "--train", none], "no row has the split train"),
        ([test, "--train", train, "--checkpoint", "gone"], "gone: no such folder, and no Hub id"),
        ([test, "--train", train, "--checkpoint", str(tmp_path / "paper")], "'concat' has no lexicon"),
    ):
        assert main(["corpus", "overlap", *arguments]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]  # behind the progress bars of datasets
        assert error.startswith("dual-slm corpus: ") and message in error


@pytest.mark.skipif(not DATA.is_dir(), reason=f"real speech is not at {DATA}")
def test_real_speakers_and_clips_are_apart_and_the_official_test_is_new():
    rows = read_folder(DATA / "librispeech_subset")
    train = [row for row in rows if row.split == "train"]
    test = [row for row in rows if row.split == "test"]
    (found,) = compare([*test, *[row.replace(split="test") for row in train[:1]]], train)
    for kind, total in (("sentences", 46), ("speakers", 28), ("clips", 46)):
        assert (found.shared[kind].found, found.shared[kind].total) == (1, total)  # the training row that was added
    (official,) = compare(read_folder(DATA / "librispeech_test_clean"), train)
    assert official.shared["sentences"].found == official.shared["clips"].found == 0
    assert official.shared["speakers"] == Shared(0, 20, 0.0, [])
    assert 0.1 < (official.shared["2-grams"].share or 0) < 0.5 > (official.shared["5-grams"].share or 0)
