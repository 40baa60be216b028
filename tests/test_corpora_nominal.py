"""Corpora of their public sizes: counts, and rows as the readers make them."""

from collections import Counter

import pytest

from dual_slm.training.corpora import CORPORA
from dual_slm.training.corpora.nominal import NOMINAL, nominal_rows
from dual_slm.training.corpora.row import make_row
from dual_slm.training.tasks import tasks_of

# What each reader gives a target for; an answer of its own makes a dialogue.
TASKS = {
    "librispeech": {"asr", "gender"},
    "textrolspeech": {"asr", "gender", "pitch", "tempo", "energy", "emotion"},
    "meld": {"asr", "emotion"},
    "styletalk": {"asr", "tempo", "energy", "emotion", "dialogue"},
    "dailytalk": {"asr", "gender", "emotion", "dialogue"},
}
SPLITS = {"librispeech": {"train": 281_241, "validation": 5_567}, "textrolspeech": {"train": 236_220}}
SPLITS |= {"meld": {"train": 9_989, "validation": 1_109}, "styletalk": {"train": 1_838}}


@pytest.mark.parametrize("corpus", ["meld", "styletalk", "dailytalk", "librispeech"])
def test_rows_are_those_of_the_reader(corpus):
    rows = nominal_rows(corpus)
    assert corpus in CORPORA and len({row.id for row in rows}) == len(rows)
    if corpus in SPLITS:
        assert Counter(row.split for row in rows) == SPLITS[corpus]
    some = rows[::97]
    assert all(make_row(**{k: v for k, v in row.to_dict().items() if v is not None}) == row for row in some)
    assert {task for row in some for task in tasks_of(row)} == TASKS[corpus]
    for row in some:  # the speaker's own turn follows the assistant's
        assert [message["role"] for message in row.history][::-1] == (["assistant", "user"] * 5)[: len(row.history)]


def test_lengths_are_those_of_the_corpora():
    """StyleTalk has three earlier turns; LibriSpeech's training hours are 961, and DailyTalk's whole is about 22 h."""
    assert {len(row.history) for row in nominal_rows("styletalk")} == {3}
    hours = sum(row.duration or 0 for row in nominal_rows("librispeech") if row.split == "train") / 3600
    assert hours == pytest.approx(961, rel=0.01)
    daily = nominal_rows("dailytalk")
    assert max(len(row.history) for row in daily) == 9
    assert sum(row.duration or 0 for row in daily) / 3600 == pytest.approx(22 * 0.95, rel=0.06)


def test_all_corpora_of_the_papers_have_a_size():
    assert set(NOMINAL) == set(TASKS)
