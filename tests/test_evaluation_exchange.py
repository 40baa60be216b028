"""Prompts that are written out, and the replies to them as a system of its own."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from evaluated import figure

from conftest import run_cli
from dual_slm.audio_dual_slm import load_audio
from dual_slm.training.corpora.row import make_row
from dual_slm.training.corpora.table import read_table, write_table
from dual_slm.training.evaluation.evaluate import evaluate
from dual_slm.training.evaluation.exchange import write_prompts
from dual_slm.training.evaluation.systems import Replies

pytest_plugins = ["evaluation_fixtures"]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered(path: Path, data: Path, replies: Path, named=("key",), left_out=()) -> Path:
    """A file of right answers to the prompts, found by corpus and id in the table alone."""
    rows = {row.key: row for row in read_table(data)}
    lines = []
    for line in lines_of(path):
        row = rows.get((line["corpus"], line["id"]))
        label = row and (row.transcript if line["task"] == "asr" else row.label(line["task"]))
        if line["key"] not in left_out:
            reply = {"reply": label if label else "ONE WORD?"}
            lines.append(json.dumps({name: line[name] for name in named} | reply) + "\n")
    replies.write_text("".join(lines))
    return replies


@pytest.mark.parametrize("named", [("key",), ("id", "task", "corpus", "condition")])
def test_right_answers_to_the_written_prompts_are_all_right(named, data, tmp_path):
    prompts, suites = tmp_path / "p.jsonl", ["asr", "attributes"]
    write_prompts(prompts, [str(data)], suites)
    replies = answered(prompts, data, tmp_path / "r.jsonl", named)
    result = evaluate(str(replies), [str(data)], tmp_path / "out", suites)
    assert figure(result, "asr", "read", "asr", "P&L", "WER")["value"] == 0
    for corpus, task in (
        ("read", "gender"),
        ("acted", "gender"),
        ("acted", "emotion"),
        ("acted", "emotion, equal loudness"),
    ):
        found = figure(result, "attributes", corpus, task, "P&L", "accuracy")
        assert (found["value"], found["samples"]) == (1, 12)
    assert not any("no reply" in note for note in result["notes"])


def test_a_prompt_tells_what_is_asked_and_not_the_answer(data, tmp_path):
    """The messages are those of our systems; a clip at equal loudness is a file of its own."""
    path = tmp_path / "p.jsonl"
    write_prompts(path, [str(data)], ["attributes"], seed=3)
    rows, lines = {row.key: row for row in read_table(data)}, lines_of(path)
    assert {line["task"] for line in lines} == {"gender", "emotion"}
    for line in lines:
        row = rows[line["corpus"], line["id"]]
        *_, turn = line["messages"]
        assert turn["role"] == "user"
        assert turn["content"][0] == {"type": "audio", "path": line["audio"]}
        texts = [m["content"] for m in line["messages"][:-1]] + [p["text"] for p in turn["content"][1:]]
        assert any("female" in text or "neutral" in text for text in texts)  # the choices
        assert row.transcript not in json.dumps(line)
        samples = load_audio(line["audio"])
        if "equal loudness" in line["condition"]:
            assert np.sqrt(np.mean(samples**2)) == pytest.approx(0.05, rel=1e-3)
        else:
            assert line["audio"] == row.audio
    again = tmp_path / "again.jsonl"
    write_prompts(again, [str(data)], ["attributes"], seed=4)
    assert [line["messages"] for line in lines_of(again)] != [line["messages"] for line in lines]


def test_every_question_of_the_context_suite_has_a_key_of_its_own(data, tmp_path):
    """The same clip is asked after 0, 2, 6 and 12 turns: only the key, or the condition, tells them apart."""
    prompts = tmp_path / "p.jsonl"
    write_prompts(prompts, [str(data)], ["context"], limit=2)
    lines = lines_of(prompts)
    asked = [line for line in lines if line["task"] == "gender" and line["corpus"] == "read"]
    assert len({line["key"] for line in lines}) == len(lines)
    assert {line["condition"] for line in asked} == {f"P&L, after {n} turns" for n in (0, 2, 6, 12)}
    replies = answered(prompts, data, tmp_path / "r.jsonl")
    result = evaluate(str(replies), [str(data)], tmp_path / "out", ["context"], limit=2)
    for turns in (0, 2, 6, 12):
        assert figure(result, "context", "acted", "emotion", f"P&L, after {turns} turns", "accuracy")["value"] == 1
    assert figure(result, "context", "read", "instruction", "P&L", "share")["value"] < 1


def test_missing_lines_are_counted_and_wrong_ones_named(data, tmp_path):
    prompts = tmp_path / "p.jsonl"
    write_prompts(prompts, [str(data)], ["asr"])
    lost = lines_of(prompts)[3]["key"]
    replies = answered(prompts, data, tmp_path / "r.jsonl", left_out=[lost])
    result = evaluate(str(replies), [str(data)], tmp_path / "out", ["asr"])
    assert "asr: 1 of 12 have no reply." in result["notes"]
    assert figure(result, "asr", "read", "asr", "P&L", "WER")["samples"] == 11
    replies.write_text('{"key": "x", "reply": "a"}\n{"key": "y"}\n')
    with pytest.raises(ValueError, match=r"r.jsonl, line 2: a reply is one JSON object with .* key and reply"):
        Replies(replies)


@pytest.mark.slow
def test_a_judge_scores_replies_from_elsewhere(tiny_backbones, tmp_path):
    """The commands: prompts of conversations with their histories, then the judged replies."""
    soundfile.write(tmp_path / "a.wav", np.zeros(8000, np.float32), 16_000)
    history = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes?"}]
    rows = [
        make_row(
            id=str(n), corpus="c", split="test", audio=str(tmp_path / "a.wav"), duration=0.5, transcript=f"words {n}",
            response="fine", history=history, emotion="sad",
        )
        for n in range(3)
    ]  # fmt: skip
    write_table(rows, tmp_path / "t.parquet")
    shared = ["--data", str(tmp_path / "t.parquet"), "--suite", "conversation"]
    done = run_cli("evaluate", "--write-prompts", str(tmp_path / "p.jsonl"), *shared)
    assert "p.jsonl: 3 prompts" in done.stdout, done.stderr[-2000:]
    lines = lines_of(tmp_path / "p.jsonl")
    assert all([m["content"] for m in line["messages"] if m["role"] == "assistant"] == ["yes?"] for line in lines)
    texts = [json.dumps({"key": line["key"], "reply": f"reply {line['id']}"}) for line in lines[1:]]
    (tmp_path / "llama-omni.jsonl").write_text("\n".join(texts))
    arguments = [
        str(tmp_path / "llama-omni.jsonl"),
        *shared,
        "--out",
        str(tmp_path / "o"),
        "--judge",
        tiny_backbones[1],
    ]
    done = run_cli("evaluate", *arguments)
    assert "conversation: 1 of 3 have no reply." in done.stdout, done.stderr[-2000:]
    records = lines_of(tmp_path / "o" / "conversation.jsonl")
    assert {r["reply"] for r in records if "reply" in r} == {f"reply {line['id']}" for line in lines[1:]}
    assert {r["condition"] for r in records if "judge" in r} >= {"P&L", "control: empty reply"}
