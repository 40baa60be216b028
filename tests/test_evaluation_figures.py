"""Figures: faults that warnings must show, and differences of two systems."""

import re

import numpy as np
import pytest
from evaluated import WORDS, figure, records_of

from dual_slm.training.evaluation.figures import compare
from dual_slm.training.parsing import word_errors

pytest_plugins = ["evaluation_fixtures"]

CAUGHT = {
    "constant": r"""attributes, emotion on acted, P&L: 33.3 % is not above always naming the most frequent label
        attributes, emotion on acted, P&L: every reply is 'sad'
        attributes, gender on read, P&L: 100.0 % of the replies name no label
        asr, asr on read, P&L: a word error rate of .* the words are not heard
        asr, asr on read, P&L: every reply is the same""",
    "shuffled": r"""attributes, gender on read, P&L: .* % is not above
        attributes, gender on acted, P&L: .* % is not above
        attributes, emotion on acted, P&L: .* % is not above
        asr, asr on read, L only: a word error rate of""",
    "exchanged": r"""gender on read, swap: the reply names the label of the clip whose words .*the branches look exchanged
        emotion on acted, swap: the reply names the label of the clip whose words are heard
        asr on read, swap: the transcript follows the clip of the voice
        asr on read, P only: the words come through the paralinguistic branch""",
}


@pytest.mark.parametrize("name", CAUGHT)
def test_a_wrong_system_is_caught_by_the_report(scripted, name):
    folder, result = scripted(name)
    for wanted in CAUGHT[name].splitlines():
        assert any(re.search(wanted.strip(), found) for found in result["warnings"]), wanted.strip()
    assert "class=warning" in (folder / "report.html").read_text()


def test_a_right_system_gets_no_warning(scripted):
    assert scripted("honest")[1]["warnings"] == []


def test_a_right_system_is_never_suspected_of_exchanged_branches(scripted):
    result = scripted("honest")[1]
    assert figure(result, "disentanglement", "read", "asr", "swap", "WER")["value"] == 0
    for corpus, task in (("read", "gender"), ("acted", "gender"), ("acted", "emotion")):
        assert figure(result, "attributes", corpus, task, "P&L", "accuracy")["value"] == 1
        assert figure(result, "disentanglement", corpus, task, "swap", "names the other clip's label")["value"] == 0
    assert not any("swap" in w for w in result["warnings"])


def test_an_unparsed_reply_names_no_label_of_another_clip(scripted):
    """Some of the other clips have no emotion that is known."""
    result = scripted("silent")[1]
    for place in (("read", "gender"), ("acted", "emotion")):
        assert figure(result, "disentanglement", *place, "swap", "names the other clip's label")["value"] == 0
    assert not any("exchanged" in w for w in result["warnings"])


def test_words_against_the_other_clip_are_counted_in_its_own_words(scripted):
    """Saying every third word of the other clip wrong is an error rate of a third, however long the right one was."""
    folder, result = scripted("honest")
    swapped = [r for r in records_of(folder, "disentanglement") if r["condition"] == "swap" and r["task"] == "asr"]
    counts = np.sum([word_errors(r["other"]["transcript"], r["reply"]) for r in swapped], axis=0)
    found = figure(result, "disentanglement", "read", "asr", "swap", "WER against the other clip")
    assert found["value"] == pytest.approx(counts[0] / counts[1])


def test_differences_of_two_systems_are_those_that_were_made(scripted):
    first, second = (
        [r for suite in ("asr", "attributes") for r in records_of(scripted(name)[0], suite)]
        for name in ("honest", "slipping")
    )
    names = ("suite", "corpus", "task", "condition", "metric")
    found = {tuple(d[n] for n in names): d for d in compare(first, second)}
    made = {("asr", "read", "asr", "P&L", "WER"): 3 / WORDS}
    made |= {("attributes", "read", "gender", "P&L", "accuracy"): -3 / 12}
    for place, difference in made.items():
        assert found[place]["difference"] == pytest.approx(difference)
        assert found[place]["low"] <= difference <= found[place]["high"]
        assert found[place]["samples"] == 12
    assert found["asr", "read", "asr", "L only", "WER"]["difference"] == 0
    for same in compare(second, second):
        assert (same["difference"], same["low"], same["high"]) == (0, 0, 0)
