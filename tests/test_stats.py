"""Statistics of a table."""

from dual_slm.training.corpora.row import Row, make_row
from dual_slm.training.stats import first_speech_positions, leaks
from dual_slm.training.tasks import cut_histories


def line(name: str, split: str = "train", **more) -> Row:
    return make_row(id=name, corpus="test", split=split, transcript="i passed it", **more)


def test_leaks_are_found_and_told_from_what_a_corpus_does_by_design():
    rows = [line("1", speaker="x"), line("2", speaker="x", split="test")]
    found, _ = leaks(rows)
    assert len(found) == 1
    assert "speaker" in found[0]
    assert "'x' in train and test" in found[0]
    shared = [row.replace(corpus="meld") for row in rows]
    assert leaks(shared)[0] == []
    assert "by the corpus's design" in leaks(shared)[1][0]
    dialogue = [line("1", dialogue="d"), line("2", dialogue="d", split="validation")]
    assert "dialogue" in leaks(dialogue)[0][0]
    assert leaks([line("1", speaker="x"), line("2", speaker="y", split="test")])[0] == []


def test_positions_of_speech_cover_a_range(paper):
    turns = ["How was the exam?", "I got the results.", "And?"]
    history = [{"role": ("assistant", "user")[n % 2], "content": text} for n, text in enumerate(turns)]
    rows = [line(str(n), emotion="sad", response="Well done.", history=history) for n in range(60)]
    rows = list(cut_histories(rows))
    positions = first_speech_positions(rows, paper[1].tokenizer)
    assert len(positions) == 120
    assert len(set(positions)) > 10
    assert max(positions) > 2 * min(positions)
