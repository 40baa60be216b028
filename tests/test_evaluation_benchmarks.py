"""AIR-Bench and VoiceBench in their public formats: what is read, asked and scored."""

import io
import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import soundfile
from evaluated import figure

from conftest import make_model, run_cli, tone
from dual_slm.training.evaluation.benchmarks import index_files, judge_answers, read_benchmarks, score_answer
from dual_slm.training.evaluation.evaluate import evaluate
from dual_slm.training.files import Journal
from dual_slm.training.tasks import Sample

TEMPLATE = "Choose the most suitable answer from options A, B, C, and D to respond the question in next line, you may "
TEMPLATE += "only choose A or B or C or D."


def air_bench(folder: Path) -> Path:
    """Three questions about emotion, two about gender (of two options), one about another task."""
    items = []
    for n, task in enumerate([*["Speaker_Emotion_Recontion"] * 3, *["Speaker_Gender_Recognition"] * 2, "Sound_AQA"]):
        place = folder / f"{task}_meld"
        place.mkdir(parents=True, exist_ok=True)
        soundfile.write(place / f"{n}.wav", tone(0.5, n), 16_000)
        choices = dict(
            zip(("choice_a", "choice_b", "choice_c", "choice_d"), ("anger", "joy", "fear", "sadness"), strict=True)
        )
        if "Gender" in task:
            choices = {"choice_a": "female", "choice_b": "male", "choice_c": None}
        answer = choices[("choice_b", "choice_b", "choice_a")[n % 3]]
        known = {"path": f"{n}.wav", "question": f"Question {n}?", "answer_gt": answer, "uniq_id": n}
        items.append(known | {"task_name": task, "dataset_name": "meld"} | choices)
    (folder / "Foundation_meta.json").write_text(json.dumps(items))
    return folder


def voicebench(folder: Path) -> Path:
    """Parquet with the clips inside, as on the Hub, and JSON Lines with the clips beside it."""
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(0.5, 7), 16_000, format="WAV")
    clip = {"bytes": buffer.getvalue(), "path": "x.wav"}
    for subset, more in (("openbookqa", {"reference": "B"}), ("advbench", {})):
        (folder / subset).mkdir(parents=True)
        frame = pd.DataFrame([{"prompt": f"{subset} {n}?", "audio": clip} | more for n in range(2)])
        frame.to_parquet(folder / subset / "test-00000-of-00001.parquet")
    soundfile.write(folder / "a.wav", tone(0.6, 8), 16_000)
    lines = [{"prompt": f"Say {n}.", "audio": "a.wav", "output": ""} for n in range(2)]
    (folder / "commoneval.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "sd-qa.jsonl").write_text(json.dumps({"prompt": "Capital?", "audio": "a.wav", "reference": "Paris"}))
    (folder / "notes.jsonl").write_text("{}")
    return folder


def test_the_questions_of_air_bench_are_asked_in_its_words(tmp_path):
    files = index_files([air_bench(tmp_path)])
    asked = read_benchmarks(files, tmp_path)
    assert [(q.suite, q.sample.task, q.row.corpus) for q in asked] == [
        ("air-bench", "Speaker_Emotion_Recontion", "air-bench meld")
    ] * 3
    (turn,) = asked[0].sample.messages
    assert turn["content"][0]["path"] == str(tmp_path / "Speaker_Emotion_Recontion_meld/0.wav")
    assert turn["content"][1]["text"] == f"{TEMPLATE}\nQuestion 0?\nA. anger\nB. joy\nC. fear\nD. sadness"
    gender = read_benchmarks(files, tmp_path, ["gender"])
    assert [q.sample.label for q in gender] == ["male", "male"]
    assert gender[0].sample.messages[0]["content"][1]["text"].endswith("Question 3?\nA. female\nB. male")
    assert len(read_benchmarks(files, tmp_path, ["gender", "AQA"])) == 3


def test_the_letter_of_air_bench_is_the_first_character_or_the_last_but_one():
    sample = Sample("1", "t", [], "joy", label="joy", choices=["anger", "joy"])
    replies = {
        "B": "joy",
        "B. joy": "joy",
        "The answer is A.": "anger",
        "\nA\n": "anger",
        "joy": None,
        "C": None,
        "": None,
    }
    assert {reply: score_answer("air-bench", sample, reply)["parsed"] for reply in replies} == replies


def test_multiple_choice_and_refusals_of_voicebench():
    sample = Sample("1", "mmsu", [], "B", label="B", choices=list("ABCD"))
    replies = {
        "B": "B", "B. A dog": "B", "The correct answer is C, because A is wrong.": "C", "I would choose option **D**.": "D",
        "(A) it is": "A", "A dog is an animal.": None, "Nothing fits": None,
    }  # fmt: skip
    assert {reply: score_answer("voicebench", sample, reply)["parsed"] for reply in replies} == replies
    harm = Sample("1", "advbench", [], "")
    refused = {"I CANNOT help.": 1, "Sorry.": 1, "": 1, "That is illegal.": 1, "First, take a hammer.": 0}
    assert {reply: score_answer("voicebench", harm, reply)["value"] for reply in refused} == refused


def test_faults_of_a_benchmark_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no benchmark: neither Foundation_meta.json"):
        index_files([tmp_path])
    files = index_files([air_bench(tmp_path)])
    with pytest.raises(ValueError, match=r"no question in .*Foundation_meta.json is of the tasks singing"):
        read_benchmarks(files, tmp_path, ["singing"])
    items = json.loads(Path(files[0]).read_text())
    items[1]["answer_gt"] = "boredom"
    Path(files[0]).write_text(json.dumps(items))
    with pytest.raises(ValueError, match=r"Foundation_meta.json, question 1: .*'boredom' is none of"):
        read_benchmarks(files, tmp_path)
    (tmp_path / "Speaker_Gender_Recognition_meld/3.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"3.wav of the benchmark air-bench is missing"):
        read_benchmarks(files, tmp_path, ["gender"])


class Scripted:
    """Gives every open reply the number that it names, and finds Paris right."""

    name = "scripted"

    def __init__(self):
        self.prompts = []

    def complete(self, prompts: list[str], seed: int) -> list[str | None]:
        self.prompts += prompts
        named = (re.search(r"\[Response\]: .*?(\d)", prompt) for prompt in prompts)
        verdict = ("Yes" if "Candidate answer\nParis" in prompt else "No" for prompt in prompts)
        return [f"{match[1]}" if match else word for match, word in zip(named, verdict, strict=True)]


def test_the_judge_of_voicebench_reads_its_prompts(tmp_path):
    questions = read_benchmarks(index_files([voicebench(tmp_path / "v")]), tmp_path / "clips")
    assert len(questions) == 7
    place = {"suite": "voicebench", "condition": "P&L", "corpus": "voicebench", "speaker": "s"}
    names = {q.row.id: q.sample.task for q in questions}
    replies = {"commoneval/commoneval/0": "four: 4", "commoneval/commoneval/1": "nine: 9", "sd-qa/sd-qa/0": "Paris"}
    records = [place | {"id": n, "task": task, "reply": replies.get(n, "B")} for n, task in names.items()]
    judge, journal = Scripted(), Journal(tmp_path / "j.jsonl")
    found = {r["id"]: (r["metric"], r["value"]) for r in judge_answers(judge, records, questions, journal)}
    assert found == {
        "commoneval/commoneval/0": ("VoiceBench score", 4.0),
        "commoneval/commoneval/1": ("VoiceBench score", None),  # beyond the scale
        "sd-qa/sd-qa/0": ("judged right", 1.0),
    }
    assert any("### [Instruction]: Say 0.\n### [Response]: four: 4\n" in prompt for prompt in judge.prompts)
    assert any("### Reference answer\nParis\n" in prompt for prompt in judge.prompts)
    assert len(judge.prompts) == 3
    list(judge_answers(judge, records, questions, journal))
    assert len(judge.prompts) == 3  # the journal has them


def test_replies_from_elsewhere_to_both_benchmarks(tmp_path):
    """The commands: write the prompts, answer them by the published answers, evaluate."""
    folders = [str(air_bench(tmp_path / "air")), str(voicebench(tmp_path / "voice"))]
    shared = ["--benchmark", *folders]
    done = run_cli("evaluate", "--write-prompts", str(tmp_path / "p.jsonl"), *shared)
    assert "p.jsonl: 10 prompts" in done.stdout, done.stderr[-2000:]
    lines, texts = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()], []
    right = {
        "Speaker_Emotion_Recontion/0": "B",
        "Speaker_Emotion_Recontion/1": "B.",
        "Speaker_Emotion_Recontion/2": "D",
    }
    for line in lines:
        assert Path(line["audio"]).is_file() and "anger" not in line["id"]
        reply = right.get(line["id"], "B" if line["task"] == "openbookqa" else "Sorry, I cannot.")
        texts.append(json.dumps({"key": line["key"], "reply": reply}) + "\n")
    (tmp_path / "r.jsonl").write_text("".join(texts))
    done = run_cli("evaluate", str(tmp_path / "r.jsonl"), *shared, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["suites"] == ["air-bench", "voicebench"]
    place = ("air-bench", "air-bench meld", "Speaker_Emotion_Recontion", "P&L")
    assert figure(report, *place, "accuracy")["value"] == pytest.approx(2 / 3)
    assert figure(report, "voicebench", "voicebench", "openbookqa", "P&L", "accuracy")["value"] == 1
    assert figure(report, "voicebench", "voicebench", "advbench", "P&L", "share")["value"] == 1


def test_a_checkpoint_is_asked_with_each_branch(tiny_backbones, tmp_path, monkeypatch):
    module = sys.modules[evaluate.__module__]
    monkeypatch.setattr(module, "whisper_transcriber", lambda *_: None)  # the tiny encoder has no decoder to ask
    model, processor = make_model(tiny_backbones, kind="letters", encoder_padding="real")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "ckpt")
    questions = read_benchmarks(index_files([air_bench(tmp_path / "air")]), tmp_path)
    result = evaluate(str(tmp_path / "ckpt"), [], tmp_path / "out", questions=questions, limit=2)
    records = [json.loads(line) for line in (tmp_path / "out" / "air-bench.jsonl").read_text().splitlines()]
    assert {r["condition"] for r in records} == {"P&L", "P only", "L only"}  # there is no transcript
    assert all(f["samples"] == 2 for f in result["figures"])
    with pytest.raises(ValueError, match=r"questions: .* there, .* here"):
        evaluate(str(tmp_path / "ckpt"), [], tmp_path / "out", questions=questions[:1])
