"""Sources of the branches: ERR's rules, and a stage's own."""

from collections import Counter

import pytest

from dual_slm.training.corpora.row import Row, Variant
from dual_slm.training.err import SourceRules, Sources, draw_sources, heard_sources

ROW = Row(id="a", corpus="c", split="train", transcript="the fox")
DISENTANGLE, HOLISTIC = (SourceRules(err_stage=stage) for stage in ("disentangle", "holistic"))


def drawn(rules: SourceRules, kind: str, count: int, row: Row = ROW, **known) -> Counter[Sources]:
    """Draws for so many rows."""
    return Counter(draw_sources(rules, row.replace(id=str(n)), kind, 0, 0, **known) for n in range(count))


@pytest.mark.parametrize("kind", ["linguistic", "paralinguistic"])
def test_the_other_branch_comes_from_three_sources_in_thirds(kind):
    """Chi-square with two degrees of freedom: by chance it exceeds 13.8 once in a thousand."""
    count = 9_000
    found = drawn(DISENTANGLE, kind, count)
    own, other = (1, 0) if kind == "linguistic" else (0, 1)
    assert {sources[own] for sources in found} == {"speech"}
    counts = Counter()
    for sources, number in found.items():
        counts[sources[other]] += number
    text = "caption" if kind == "linguistic" else "transcript"
    assert set(counts) == {text, "speech", "none"}
    assert sum((c - count / 3) ** 2 / (count / 3) for c in counts.values()) < 13.8
    assert {sources[2:] for sources in found} == {(kind == "paralinguistic", kind == "linguistic")}


def test_stages_one_and_three_and_the_ablation():
    assert set(draw_sources(SourceRules(), ROW, "linguistic", 0, 0)) == {"speech", True}
    duals = drawn(HOLISTIC, "dual", 4_000)
    assert duals["speech", "speech", True, True] == pytest.approx(3_000, abs=120)
    assert duals["caption", "speech", False, True] == pytest.approx(500, abs=90)
    assert duals["speech", "transcript", True, False] == pytest.approx(500, abs=90)
    for kind in ("linguistic", "dual"):
        assert set(drawn(SourceRules("disentangle", err=False), kind, 99)) == {("speech", "speech", True, True)}


def test_what_is_not_known_is_not_drawn_and_bad_names_are_refused():
    found = drawn(DISENTANGLE, "linguistic", 2_000, has_caption=False)
    assert {sources.paralinguistic for sources in found} == {"speech", "none"}
    assert found["none", "speech", False, True] == pytest.approx(1_000, abs=120)
    assert set(drawn(HOLISTIC, "dual", 99, has_caption=False, has_transcript=False)) == {
        ("speech", "speech", True, True)
    }
    with pytest.raises(ValueError, match="stage is 'two'"):
        SourceRules(err_stage="two")


def test_a_draw_depends_on_seed_epoch_row_and_copy():
    copy = ROW.replace(variant=Variant(copy=1))
    draws = [[draw_sources(DISENTANGLE, ROW, "linguistic", 0, epoch) for epoch in range(30)] for _ in range(2)]
    assert draws[0] == draws[1]
    others = [[draw_sources(DISENTANGLE, ROW, "linguistic", 1, epoch) for epoch in range(30)]]
    others.append([draw_sources(DISENTANGLE, copy, "linguistic", 0, epoch) for epoch in range(30)])
    assert draws[0] not in others and others[0] != others[1]


@pytest.mark.parametrize("rules", [SourceRules(), DISENTANGLE, HOLISTIC])
def test_a_row_that_lends_its_voice_has_its_words_as_text(rules):
    for kind in ("paralinguistic", "dual"):
        found = drawn(rules, kind, 99, ROW.replace(voice_only=True))
        assert set(found) == {("speech", "transcript", True, False)}


def test_the_sources_of_a_stage_win_over_drawn_ones():
    silent = SourceRules("holistic", paralinguistic_source="none")
    assert {sources[::2] for sources in drawn(silent, "dual", 99)} == {("none", False)}
    spelled = SourceRules("disentangle", linguistic_source="transcript")
    assert {sources[1::2] for sources in drawn(spelled, "paralinguistic", 99)} == {
        ("transcript", False),
        ("none", False),
    }
    wordless = ROW.replace(transcript=None)
    assert {sources.linguistic for sources in drawn(spelled, "paralinguistic", 99, wordless)} == {"none"}
    assert heard_sources(DISENTANGLE, ROW) == ("speech", "speech", True, True)
    assert heard_sources(DISENTANGLE, ROW, Sources("none", "speech", False, True)) == ("speech", "speech", False, True)
    assert heard_sources(spelled, ROW) == ("speech", "transcript", True, False)
    assert heard_sources(silent, ROW) == ("none", "speech", False, True)
