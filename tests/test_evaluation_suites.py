"""Suites: pairs of the swap test, and all turns of conversations."""

from collections import Counter

from dual_slm.training.corpora.row import make_row
from dual_slm.training.corpora.table import read_table
from dual_slm.training.evaluation.context import EvaluationContext
from dual_slm.training.evaluation.suites import conversation, disentanglement
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


def test_every_turn_of_both_roles_is_asked_once():
    """Of StyleTalk; only `limit` takes fewer."""
    talk = [{"role": "user", "content": "Hi."}]
    known = {"split": "test", "audio": "a.wav", "history": talk, "transcript": "So there."}
    roles = ("styletalk", "styletalk_reversed")
    rows = [make_row(id=str(n), corpus=corpus, **known) for n in range(60) for corpus in roles]
    for limit, count in ((None, 60), (7, 7)):
        queries = conversation(EvaluationContext(rows, label_sets(rows), ("P&L",), limit=limit))
        assert Counter(query.row.corpus for query in queries) == dict.fromkeys(roles, count)
        assert len({query.row.key for query in queries}) == 2 * count
        assert all(query.sample.messages[-2] == talk[0] for query in queries)
