"""One evaluation of a small system: its figures, and how an interrupted run goes on."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import soundfile
from evaluated import SENTENCES, figure, honest, records_of, system_of

from conftest import make_model, tone
from dual_slm import DualSLMForConditionalGeneration
from dual_slm.training.corpora.row import make_row
from dual_slm.training.corpora.table import write_table
from dual_slm.training.evaluation.evaluate import evaluate

pytest_plugins = ["evaluation_fixtures"]

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_report_has_the_figures_of_each_suite(whole):
    _, result = whole
    wanted = {("asr", "read", "asr", c) for c in ("P&L", "L only", "cascade", "text", "heard", "Whisper's decoder")}
    for corpus, task in (("read", "gender"), ("acted", "gender"), ("acted", "emotion")):
        wanted |= {("attributes", corpus, task, c) for c in ("P&L", "P only")}
        wanted |= {("disentanglement", corpus, task, c) for c in ("P&L", "P only", "L only", "none", "swap")}
        turns = [f"{c}, after {n} turns" for c in ("P&L", "caption and text") for n in (0, 2, 6, 12)]
        wanted |= {("context", corpus, task, condition) for condition in turns}
    probed = "linear probe of the encoder"
    wanted |= {("attributes", "acted", "emotion, equal loudness", c) for c in ("P&L", "P only", "heard", probed)}
    wanted |= {("disentanglement", "read", "asr", c) for c in ("P&L", "P only", "L only", "none", "swap")}
    wanted |= {("disentanglement", "acted", "sentence", f"linear probe of the {s} branch") for s in "PL"}
    wanted |= {("context", "read", "instruction", "text")}
    found = {tuple(f[n] for n in ("suite", "corpus", "task", "condition")) for f in result["figures"]}
    assert wanted <= found
    assert not any(corpus == "acted" and task == "asr" for _, corpus, task, _ in found)
    assert any("acted has a handful of sentences" in note for note in result["notes"])
    assert figure(result, "attributes", "acted", "gender", "P&L", "accuracy")["samples"] == 2
    assert all(f["samples"] > 0 and f["speakers"] > 0 for f in result["figures"])


@pytest.mark.slow
def test_what_the_branches_hear_is_scored_for_each_corpus(whole):
    """Ids are unique within a corpus alone."""
    for corpus in ("read", "acted"):
        assert figure(whole[1], "attributes", corpus, "gender", "heard", "accuracy")["samples"] == 2


@pytest.mark.slow
def test_hearing_asks_every_clip_and_agrees_with_the_limited_suites(whole):
    folder, result = whole  # its limit is 2 rows of a corpus and task
    assert figure(result, "hearing", "read", "asr", "heard", "WER")["samples"] == 12
    assert figure(result, "hearing", "acted", "emotion", "heard", "accuracy")["samples"] == 12
    assert figure(result, "hearing", "acted", "emotion, equal loudness", "heard", "accuracy")["samples"] == 12
    for task in ("gender", "emotion", "emotion, equal loudness"):
        assert figure(result, "hearing", "acted", task, "linear probe of the encoder", "accuracy")["samples"] == 12
    asked = {r["task"] for r in records_of(folder, "hearing") if r["condition"].startswith("linear probe")}
    assert asked == {
        "gender",
        "emotion",
        "emotion, equal loudness",
        "sentence",
    }  # loudness matters to the emotion alone
    place = ("corpus", "id", "task", "condition")
    every = {tuple(r[n] for n in place): r["reply"] for r in records_of(folder, "hearing")}
    for suite in ("asr", "attributes"):
        for r in records_of(folder, suite):
            if r["condition"] in ("heard", "Whisper's decoder"):
                assert every[tuple(r[n] for n in place)] == r["reply"]


@pytest.mark.slow
def test_a_second_run_elsewhere_gives_the_same_samples(whole, checkpoint, data, tmp_path):
    suites = ["hearing", "asr", "attributes", "disentanglement"]  # as before: batches of the encoder round alike
    evaluate(checkpoint, [str(data)], tmp_path, suites=suites, limit=2)
    for suite in suites:
        assert (tmp_path / f"{suite}.jsonl").read_bytes() == (whole[0] / f"{suite}.jsonl").read_bytes()


@pytest.mark.slow
def test_the_same_folder_asks_nothing_again(whole, checkpoint, data, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    asked, generate = [], DualSLMForConditionalGeneration.generate

    def counting(self, *args, **more):
        asked.append(len(more["input_ids"]))
        return generate(self, *args, **more)

    monkeypatch.setattr(DualSLMForConditionalGeneration, "generate", counting)
    journal = (folder / "replies.jsonl").read_bytes()
    again = evaluate(checkpoint, [str(data)], folder, suites=["asr", "disentanglement"], limit=2)
    assert not asked
    assert (folder / "replies.jsonl").read_bytes() == journal
    assert again["figures"] == [f for f in whole[1]["figures"] if f["suite"] in again["suites"]]
    larger = evaluate(checkpoint, [str(data)], folder, suites=["asr"], limit=3)
    assert sum(asked) == 4  # one more row under four conditions
    assert figure(larger, "asr", "read", "asr", "P&L", "WER")["samples"] == 3
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        evaluate(checkpoint, [str(data)], folder, suites=["asr"], seed=1)


def test_an_unknown_suite_or_split_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"no suite 'singing'; there are hearing, asr, .*context, .* and all"):
        evaluate("x", [str(data)], tmp_path, suites=["asr", "singing"])
    with pytest.raises(ValueError, match="no row of the split 'validation'"):
        evaluate("x", [str(data)], tmp_path, split="validation", system=system_of(honest))


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_samples(checkpoint, data, tmp_path):
    """SIGKILL between two groups of replies of one suite."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    evaluate(checkpoint, [str(data)], whole, suites=["attributes"])
    arguments = ["evaluate", checkpoint, "--data", str(data), "--suite", "attributes", "--out", str(folder)]
    command = [sys.executable, "-m", "dual_slm.training.cli", *arguments]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit, journal = time.time() + 200, folder / "replies.jsonl"
    while not (journal.is_file() and journal.stat().st_size):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() < limit
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "attributes.jsonl").exists()
    done = journal.read_bytes()
    assert 0 < done.count(b"\n") < len((whole / "replies.jsonl").read_text().splitlines())
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert journal.read_bytes().startswith(done[: done.rfind(b"\n") + 1])
    assert (folder / "attributes.jsonl").read_bytes() == (whole / "attributes.jsonl").read_bytes()
    assert "report.html" in result.stdout


def test_clips_without_speech_are_held_to_silence(tiny_backbones, tmp_path, monkeypatch):
    """They count apart from word errors; what is heard in them is a fault."""
    module = sys.modules[evaluate.__module__]
    monkeypatch.setattr(module, "whisper_transcriber", lambda *_: None)  # the tiny encoder has no decoder to ask
    model, processor = make_model(tiny_backbones, kind="letters", encoder_padding="real")
    model.save_pretrained(tmp_path / "ckpt")
    processor.save_pretrained(tmp_path / "ckpt")
    rows = []
    for n in range(4):
        path = tmp_path / f"{n}.wav"
        soundfile.write(path, tone(0.5 + n / 10, n), 16_000)
        said = "(no speech)" if n < 2 else SENTENCES[n]
        rows.append(make_row(id=str(n), corpus="mixed", split="test", audio=str(path), transcript=said, duration=0.5))
    write_table(rows, tmp_path / "t.parquet")
    result = evaluate(str(tmp_path / "ckpt"), [str(tmp_path / "t.parquet")], tmp_path / "out", ["asr"])
    heard = {r["id"]: r for r in records_of(tmp_path / "out", "asr") if r["condition"] == "heard"}
    assert {name: "words" in r for name, r in heard.items()} == {"0": False, "1": False, "2": True, "3": True}
    assert all(heard[name]["value"] == float(not heard[name]["reply"]) for name in "01")
    counted = figure(result, "asr", "mixed", "no speech, nothing heard", "heard", "share")
    assert counted["value"] == sum(heard[name]["value"] for name in "01") / 2
    asked = [r for r in records_of(tmp_path / "out", "asr") if r["condition"] == "P&L"]
    assert {r["id"] for r in asked} == {"2", "3"}
