"""Suites: pairs of the swap test."""

from collections import Counter

from dual_slm.training.corpora.table import read_table
from dual_slm.training.evaluation.context import EvaluationContext
from dual_slm.training.evaluation.suites import disentanglement
from dual_slm.training.evaluation.systems import CONDITIONS
from dual_slm.training.tasks import label_sets

pytest_plugins = ["evaluation_fixtures"]


def test_a_swap_pairs_another_speaker_with_another_label(data):
    clips = [row for row in read_table(data) if row.split == "test"]
    context = EvaluationContext(clips, label_sets(clips), tuple(CONDITIONS))
    swaps = [query for query in disentanglement(context) if query.condition == "swap"]
    assert Counter(query.sample.task for query in swaps) == {"asr": 12, "gender": 24, "emotion": 12}
    for query in swaps:
        task = query.sample.task
        column = "transcript" if task == "asr" else task
        assert query.row.speaker != query.voice.speaker
        assert getattr(query.row, column) != getattr(query.voice, column)
        assert query.sample.label == (None if task == "asr" else query.voice.label(task))
        assert query.sources() == ("speech", "speech")
