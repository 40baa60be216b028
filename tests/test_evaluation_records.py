"""Records: parsers on replies of real checkpoints, and what each line holds."""

import json
from pathlib import Path

import pytest
from evaluated import records_of

from dual_slm.training.evaluation.benchmarks import BENCHMARKS
from dual_slm.training.evaluation.suites import SUITES
from dual_slm.training.evaluation.systems import CONDITIONS
from dual_slm.training.parsing import parse_label, parse_transcript

pytest_plugins = ["evaluation_fixtures"]

REAL = [json.loads(line) for line in (Path(__file__).parent / "data/real_replies.jsonl").read_text().splitlines()]


def test_the_parser_of_labels_agrees_with_a_human():
    rows = [row for row in REAL if row["task"] != "asr"]
    assert len(rows) > 120
    parsed = [parse_label(row["reply"], row["choices"], row["task"]) for row in rows]
    other = [f"{p} for {r['task']} {r}" for p, r in zip(parsed, rows, strict=True) if p != r["human"]]
    unparsed, human = parsed.count(None) / len(rows), sum(row["human"] is None for row in rows) / len(rows)
    assert len(other) <= 0.03 * len(rows), "\n".join(other)
    assert unparsed == pytest.approx(human, abs=0.03)


def test_the_parser_of_transcripts_agrees_with_a_human():
    for row in (row for row in REAL if row["task"] == "asr"):
        assert parse_transcript(row["reply"]) == row["human"]


@pytest.mark.slow
def test_every_suite_writes_its_samples(whole):
    folder, result = whole
    suites = [suite for suite in SUITES if suite not in BENCHMARKS]  # those of tables
    for suite in suites:
        for entry in records_of(folder, suite):
            assert isinstance(entry["reply"], str)
            assert ("label" in entry) == ("parsed" in entry)
            if entry["condition"] in CONDITIONS:
                assert entry["prompt"]
            if entry["task"] in ("gender", "emotion"):
                assert entry["label"] in entry["choices"]
                assert entry["parsed"] in (None, *entry["choices"])
    assert result["suites"] == suites
    assert result == json.loads((folder / "report.json").read_text())


@pytest.mark.slow
def test_a_prompt_shows_what_the_llm_was_given(whole):
    for entry in records_of(whole[0], "asr"):
        if entry["condition"] in CONDITIONS:
            assert ("<|audio|>" in entry["prompt"]) == ("speech" in CONDITIONS[entry["condition"]])
            assert (entry["said"] in entry["prompt"]) == (entry["condition"] == "text")
