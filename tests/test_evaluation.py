"""The evaluation: figures, parsers, suites and reports, by a small system that runs and by scripted ones of known faults."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, recall_score

from conftest import _tokenizer, make_model, tone
from dual_slm import DualSLMForConditionalGeneration, DualSLMProcessor
from dual_slm.modeling_dual_slm import resolve_backbone
from dual_slm.training.backbones import ASSETS
from dual_slm.training.corpora.schema import make_row, read_table, write_table
from dual_slm.training.evaluation import judges, metrics, report
from dual_slm.training.evaluation.calibrate import fit_temperature
from dual_slm.training.evaluation.evaluate import averaged, compared, evaluate
from dual_slm.training.evaluation.suites import SUITES, Bench, disentanglement
from dual_slm.training.evaluation.systems import CONDITIONS, Checkpoint
from dual_slm.training.journal import Journal
from dual_slm.training.tasks import label_sets, parse_label, parse_transcript

MODULES = Path(metrics.__file__).parent / "modules"
REAL = [json.loads(line) for line in (Path(__file__).parent / "data/real_replies.jsonl").read_text().splitlines()]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
EMOTIONS = ("neutral", "happy", "sad")
LINES = (ASSETS / "sentences.txt").read_text().splitlines()
SENTENCES = [line for line in LINES if line == metrics.normalize(line)][:12]  # words are words, no numbers
WORDS = sum(len(sentence.split()) for sentence in SENTENCES)


def table(folder: Path) -> Path:
    """Two corpora with the same ids: `read` of varied sentences, `acted` of two sentences with emotions."""
    rows = []
    for n in range(18):
        split, seconds, audio = "train" if n < 6 else "test", 0.5 + n % 6 / 10, str(folder / f"{n % 6}.wav")
        soundfile.write(audio, tone(seconds, n % 6), 16_000)
        about = {"id": str(n), "split": split, "audio": audio, "duration": seconds}
        about["gender"] = ("female", "male")[n % 2]
        rows.append(make_row(corpus="read", speaker=f"r {split} {n % 4}", transcript=SENTENCES[n % 12], **about))
        about |= {"transcript": f"{('kids', 'dogs')[n % 2]} are by the door", "emotion": EMOTIONS[n % 3]}
        rows.append(make_row(corpus="acted", speaker=f"a {split} {n % 4}", **about))
    write_table(rows, folder / "t.parquet")
    return folder / "t.parquet"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small models gain nothing by a second thread, and lose much where another process has the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return table(tmp_path_factory.mktemp("data"))


def records_of(folder: Path, suite: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{suite}.jsonl").read_text().splitlines()]


def figure(result: dict, *place: str) -> dict:
    """By suite, corpus, task, condition and metric."""
    names = ("suite", "corpus", "task", "condition", "metric")
    (found,) = (f for f in result["figures"] if tuple(f[n] for n in names) == place)
    return found


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_figures_of_labels_are_those_of_sklearn(seed):
    rng, labels = random.Random(seed), ["a", "b", "c", "d", "e"]
    true = [rng.choice(labels[: rng.choice([3, 4])]) for _ in range(60)]  # "e" never occurs
    parsed = [rng.choice([t, t, *labels, None]) for t in true]
    occurring, named = sorted(set(true)), [p or "unparsed" for p in parsed]
    matrix = metrics.confusion(zip(true, parsed, strict=True), labels)
    options = {"labels": occurring, "zero_division": 0}
    assert metrics.accuracy(matrix) == pytest.approx(accuracy_score(true, named))
    assert metrics.unweighted_accuracy(matrix) == pytest.approx(recall_score(true, named, average="macro", **options))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert metrics.unweighted_accuracy(matrix) == pytest.approx(balanced_accuracy_score(true, named))
    assert metrics.macro_f1(matrix) == pytest.approx(f1_score(true, named, average="macro", **options))
    assert metrics.weighted_f1(matrix) == pytest.approx(f1_score(true, named, average="weighted", **options))
    assert metrics.unparsed(matrix) == pytest.approx(parsed.count(None) / 60)
    assert metrics.majority(matrix) == pytest.approx(max(Counter(true).values()) / 60)


def test_word_errors_are_those_of_a_hand_and_of_jiwer():
    assert metrics.word_errors("It's Mr. Smith!", "it is mister smith") == (0, 4)
    assert metrics.word_errors("I have twenty three cats.", "i have 23 cats") == (0, 4)
    assert metrics.word_errors("the cat sat", "The hat sat down.") == (2, 3)
    assert metrics.word_errors("the cat sat", "cat") == (2, 3)
    assert metrics.word_errors("", "hello there") == (2, 0)
    assert metrics.word_errors("hello there", "...") == (2, 2)
    rng = random.Random(0)
    for said in SENTENCES:
        words = said.split()
        heard = " ".join(rng.choice([w, w, "fox", f"{w} don't"]) for w in words if rng.random() > 0.2).upper() + "!"
        errors, count = metrics.word_errors(said, heard)
        assert errors / count == pytest.approx(jiwer.wer(metrics.normalize(said), metrics.normalize(heard)))


def test_calibration_error_by_hand():
    """Bin 9: confidences 2.9, two right; bin 1: 0.15, none right."""
    tally = metrics.calibration([(0.95, True), (0.95, False), (1.0, True), (0.15, False)])
    assert metrics.calibration_error(tally) == pytest.approx((0.9 + 0.15) / 4)


def test_the_temperature_of_overconfident_probabilities_is_found():
    """Labels drawn from known probabilities, told three times too sharply."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20_000, 5)) * 1.5
    true = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    labels = np.array([rng.choice(5, p=p) for p in true])
    assert fit_temperature(3 * scores, labels) == pytest.approx(3, rel=0.05)
    assert fit_temperature(scores, labels) == pytest.approx(1, rel=0.05)


def test_intervals_are_over_speakers():
    right_and_wrong = np.array([[10, 10], [0, 10]])
    assert metrics.bootstrap(right_and_wrong, metrics.ratio) == (0.0, 1.0)
    assert metrics.bootstrap(np.array([[3, 10]] * 5), metrics.ratio) == (0.3, 0.3)
    assert metrics.bootstrap(right_and_wrong[:1], metrics.ratio) is None
    many = np.random.default_rng(0).integers(1, [[50, 99]], size=(9, 2))
    assert metrics.bootstrap(many, metrics.ratio, seed=3) == metrics.bootstrap(many, metrics.ratio, seed=3)
    assert metrics.bootstrap(many, metrics.ratio, seed=3) != metrics.bootstrap(many, metrics.ratio, seed=4)
    assert metrics.paired_bootstrap(many, many, metrics.ratio) == (0.0, 0.0)
    worse = np.stack([many.sum(1), many[:, 1]], axis=1)  # one error more a word, whoever is drawn
    assert metrics.paired_bootstrap(many, worse, metrics.ratio) == pytest.approx((1, 1))


def test_modules_of_evaluate_agree_with_jiwer_and_sklearn():
    import evaluate as library

    heard = [s.replace("the", "a").upper() for s in SENTENCES]
    found = library.load(str(MODULES / "asr_wer")).compute(predictions=heard, references=SENTENCES)
    assert found["wer"] == pytest.approx(jiwer.wer(SENTENCES, [h.lower() for h in heard]))
    assert 0 < found["wer"] < 0.5
    true = ["sad", "happy", "sad", "angry", "happy"]
    replies = ["The speaker sounds sad.", "sadness", "I cannot tell.", "angry", "happy or sad"]
    scores = library.load(str(MODULES / "label_scores")).compute(predictions=replies, references=true)
    named = ["sad", "sad", "?", "angry", "?"]
    assert scores["accuracy"] == accuracy_score(true, named)
    assert scores["unparsed"] == 0.4
    options = {"labels": ["angry", "happy", "sad"], "zero_division": 0}
    assert scores["unweighted_accuracy"] == pytest.approx(recall_score(true, named, average="macro", **options))
    assert scores["weighted_f1"] == pytest.approx(f1_score(true, named, average="weighted", **options))


# ---- parsers on replies of real checkpoints --------------------------------------------------------------------------


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


# ---- one evaluation of a small system --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tiny_backbones, tmp_path_factory) -> str:
    """A real Whisper (its decoder is the cascade's), a random LLM and random adapters of the warm start."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in make_model((resolve_backbone("whisper-tiny.en"), tiny_backbones[1]), kind="warm"):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whole(checkpoint, data, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, evaluate(checkpoint, [str(data)], folder, limit=2)


def test_every_suite_writes_its_samples(whole):
    folder, result = whole
    for suite in SUITES:
        for entry in records_of(folder, suite):
            assert isinstance(entry["reply"], str)
            assert ("label" in entry) == ("parsed" in entry)
            if entry["condition"] in CONDITIONS:
                assert entry["prompt"]
            if entry["task"] in ("gender", "emotion"):
                assert entry["label"] in entry["choices"]
                assert entry["parsed"] in (None, *entry["choices"])
    assert result["suites"] == list(SUITES)
    assert result == json.loads((folder / "report.json").read_text())


def test_a_prompt_shows_what_the_llm_was_given(whole):
    for entry in records_of(whole[0], "asr"):
        if entry["condition"] in CONDITIONS:
            assert ("<|audio|>" in entry["prompt"]) == ("speech" in CONDITIONS[entry["condition"]])
            assert (entry["said"] in entry["prompt"]) == (entry["condition"] == "text")


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


def test_what_the_branches_hear_is_scored_for_each_corpus(whole):
    """Ids are unique within a corpus alone."""
    for corpus in ("read", "acted"):
        assert figure(whole[1], "attributes", corpus, "gender", "heard", "accuracy")["samples"] == 2


def test_the_loss_of_the_right_answer_is_the_llms_own(whole, checkpoint, data):
    """One clip at a time, by the plain forward with labels."""
    folder, result = whole
    model = DualSLMForConditionalGeneration.from_pretrained(checkpoint)
    processor = DualSLMProcessor.from_pretrained(checkpoint)
    system, table = Checkpoint(model, processor, folder / "features"), list(read_table(data))
    bench = Bench([r for r in table if r["split"] == "test"], label_sets(table), tuple(CONDITIONS), limit=2)
    found = {(r["task"], r["corpus"], r["id"], r["condition"]): r for r in records_of(folder, "disentanglement")}
    queries = [q for q in disentanglement(bench) if q.condition in ("P&L", "P only", "L only", "none")]
    total, tokens = 0.0, 0
    for query in queries:
        how, what = query.sources()
        audio = system.features([query.voice] if how == "speech" else [], [query.row] if what == "speech" else [])
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        prompt = processor.apply_chat_template(query.sample.messages, **options)["input_ids"]
        answer = query.sample.target + processor.tokenizer.eos_token
        target = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids, labels = torch.cat([prompt, target], 1), torch.cat([torch.full_like(prompt, -100), target], 1)
        with torch.no_grad():
            whole_loss = model(
                ids, attention_mask=torch.ones_like(ids), labels=labels, audio_features=audio
            ).loss.item()
        entry = found[query.sample.task, query.row["corpus"], query.row["id"], query.condition]
        assert entry["answer_tokens"] == target.shape[1]
        assert entry["answer_nll"] / entry["answer_tokens"] == pytest.approx(whole_loss, rel=1e-4)
        if (query.sample.task, query.row["corpus"], query.condition) == ("gender", "read", "P&L"):
            total, tokens = total + whole_loss * target.shape[1], tokens + target.shape[1]
    assert len(queries) > 20
    value = figure(result, "disentanglement", "read", "gender", "P&L", "answer loss")["value"]
    assert value == pytest.approx(total / tokens, rel=1e-4)


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


def test_the_page_stands_by_itself(whole):
    page = (whole[0] / "report.html").read_text()
    assert all(f"<h2>{suite}</h2>" in page for suite in SUITES)
    assert '<audio controls preload="none" src="data:audio/ogg;base64,T2dnUw' in page
    assert '<img alt="accuracy by condition" src="data:image/png;base64,' in page
    assert not re.search(r"""(src|href)=(?!"data:)|url\(|@import|<script|<link""", page)


def test_a_second_run_elsewhere_gives_the_same_samples(whole, checkpoint, data, tmp_path):
    suites = ["hearing", "asr", "attributes", "disentanglement"]  # as before: batches of the encoder round alike
    evaluate(checkpoint, [str(data)], tmp_path, suites=suites, limit=2)
    for suite in suites:
        assert (tmp_path / f"{suite}.jsonl").read_bytes() == (whole[0] / f"{suite}.jsonl").read_bytes()


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


def test_two_finished_evaluations_are_compared(whole):
    text = compared(whole[0], whole[0])
    assert "| asr, read, asr, P&L | WER |" in text
    assert " 0.0 (0.0 to 0.0) " in text


def test_a_checkpoint_is_compared_with_a_file_of_replies(whole, data, tmp_path):
    """Which has no losses."""
    asked = {(r["id"], r["corpus"], r["task"]) for r in records_of(whole[0], "attributes") if r["condition"] == "P&L"}
    lines = [json.dumps({"id": i, "corpus": c, "task": t, "reply": "It is a female voice."}) for i, c, t in asked]
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    evaluate(str(tmp_path / "other.jsonl"), [str(data)], tmp_path / "out", suites=["attributes"], limit=2)
    for pair in ((whole[0], tmp_path / "out"), (tmp_path / "out", whole[0])):
        assert "attributes, read, gender, P&L | accuracy" in compared(*pair)
        assert "answer loss" not in compared(*pair)


def test_an_unknown_suite_or_split_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"no suite 'singing'; there are hearing, asr, .*context and all"):
        evaluate("x", [str(data)], tmp_path, suites=["asr", "singing"])
    with pytest.raises(ValueError, match="no row of the split 'validation'"):
        evaluate("x", [str(data)], tmp_path, split="validation", system=system_of(honest))


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


# ---- faults that a report must show ----------------------------------------------------------------------------------


def system_of(answer) -> SimpleNamespace:
    """A system that knows what it is asked, and replies by a function of it."""
    ask = {"prepare": lambda rows: None, "prompt": lambda query: "(prompt)"}
    return SimpleNamespace(
        name="scripted", conditions=tuple(CONDITIONS), reply=lambda qs: ((q, answer(q)) for q in qs), **ask
    )


def honest(query):
    """Hears what each branch is given, all of it."""
    how, what = query.sources()
    if query.sample.task == "asr":
        return "I hear no words." if what == "none" else query.row["transcript"]
    return f"It is {query.voice[query.sample.task]}." if how == "speech" else "I cannot tell."


def exchanged(query):
    """Takes the words from the branch of the voice, and the voice from the branch of the words."""
    how, what = query.sources()
    if query.sample.task == "asr":
        return query.voice["transcript"] if how == "speech" else "I hear no words."
    return f"It is {query.row[query.sample.task]}." if what == "speech" else "I cannot tell."


def shuffled(query):
    draw = random.Random(query.key)
    return draw.choice(SENTENCES if query.sample.task == "asr" else query.sample.choices)


def slipping(query):
    """Honest but for one word more in three clips, and the gender of three voices."""
    slips = query.condition == "P&L" and query.row["corpus"] == "read" and query.row["id"] in ("6", "7", "8")
    if not slips or query.sample.task not in ("asr", "gender"):
        return honest(query)
    return f"{honest(query)} indeed" if query.sample.task == "asr" else "male" if "fe" in honest(query) else "female"


ANSWERS = {"honest": honest, "exchanged": exchanged, "shuffled": shuffled, "slipping": slipping}
ANSWERS |= {"constant": lambda query: "It is sad.", "silent": lambda query: "I cannot tell."}


@pytest.fixture(scope="module")
def scripted(data, tmp_path_factory):
    """name -> (folder, report) of a scripted system, each evaluated once."""
    found = {}

    def get(name: str) -> tuple[Path, dict]:
        if name not in found:
            folder, suites = tmp_path_factory.mktemp(name), ["asr", "attributes", "disentanglement"]
            found[name] = folder, evaluate(name, [str(data)], folder, suites, system=system_of(ANSWERS[name]))
        return found[name]

    return get


def feeling(query) -> str:
    """Replies to the mood that it is told of or hears."""
    how, _ = query.sources()
    if how == "none":
        return "I see, thank you for telling me."
    return {"happy": "What wonderful news!", "sad": "I am so sorry to hear it."}[query.voice["emotion"]]


def test_replies_to_two_styles_are_told_apart_where_the_system_hears_them(data, tmp_path):
    """Taught by replies to the training speakers' text twins alone; the same words without the voice are chance."""
    result = evaluate("feeling", [str(data)], tmp_path / "a", ["style"], system=system_of(feeling))
    place = ("style", "acted", "emotion by the reply")
    assert figure(result, *place, "P&L", "accuracy")["value"] == 1
    assert figure(result, *place, "caption and text", "accuracy")["value"] == 1
    assert figure(result, *place, "L only", "accuracy")["value"] == 0.5
    asked = records_of(tmp_path / "a", "style")
    assert {r["label"] for r in asked} == {"happy", "sad"} and {r["corpus"] for r in asked} == {"acted"}
    assert not any("training" in r["condition"] for r in asked)

    def deaf(query):
        return "I see." if query.sources()[0] == "speech" else feeling(query)

    result = evaluate("deaf", [str(data)], tmp_path / "b", ["style"], system=system_of(deaf))
    assert figure(result, *place, "P&L", "accuracy")["value"] == 0.5


def test_clips_without_speech_are_held_to_silence(tiny_backbones, tmp_path, monkeypatch):
    """They count apart from word errors; what is heard in them is a fault."""
    module = sys.modules[evaluate.__module__]
    monkeypatch.setattr(module, "_transcriber", lambda *_: None)  # the tiny encoder has no decoder to ask
    model, processor = make_model(tiny_backbones, kind="warm", encoder_padding="real")
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
    counts = np.sum([metrics.word_errors(r["other"]["transcript"], r["reply"]) for r in swapped], axis=0)
    found = figure(result, "disentanglement", "read", "asr", "swap", "WER against the other clip")
    assert found["value"] == pytest.approx(counts[0] / counts[1])


def test_differences_of_two_systems_are_those_that_were_made(scripted):
    first, second = (
        [r for suite in ("asr", "attributes") for r in records_of(scripted(name)[0], suite)]
        for name in ("honest", "slipping")
    )
    names = ("suite", "corpus", "task", "condition", "metric")
    found = {tuple(d[n] for n in names): d for d in report.compare(first, second)}
    made = {("asr", "read", "asr", "P&L", "WER"): 3 / WORDS}
    made |= {("attributes", "read", "gender", "P&L", "accuracy"): -3 / 12}
    for place, difference in made.items():
        assert found[place]["difference"] == pytest.approx(difference)
        assert found[place]["low"] <= difference <= found[place]["high"]
        assert found[place]["samples"] == 12
    assert found["asr", "read", "asr", "L only", "WER"]["difference"] == 0
    for same in report.compare(second, second):
        assert (same["difference"], same["low"], same["high"]) == (0, 0, 0)


def test_a_card_tells_its_figures_to_the_hub(scripted, tmp_path):
    from huggingface_hub import ModelCard

    path = tmp_path / "README.md"
    path.write_text("---\nlicense: apache-2.0\ntags:\n- speech\n---\n\n# A model\n\nWhat it does.\n")
    result = scripted("slipping")[1]
    report.write_card(tmp_path, result)
    once = path.read_bytes()
    report.write_card(tmp_path, result)
    assert path.read_bytes() == once
    card = ModelCard.load(path)
    assert (card.data.license, card.data.tags) == ("apache-2.0", ["speech"])
    assert card.text.count("## Evaluation") == 1
    assert "# A model\n\nWhat it does." in card.text
    names = ("dataset_type", "task_name", "metric_type", "metric_name")
    values = {tuple(getattr(r, n) for n in names): r.metric_value for r in card.data.eval_results}
    assert values["read", "asr", "wer", "WER %, P&L"] == round(300 / WORDS, 1)
    assert values["read", "gender", "accuracy", "accuracy %, P&L"] == 75.0
    assert values["acted", "emotion", "unweighted_accuracy", "unweighted accuracy %, P&L"] == 100.0


# ---- the swap test ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(data) -> list[dict]:
    return [row for row in read_table(data) if row["split"] == "test"]


def test_a_swap_takes_the_voice_of_one_clip_and_the_words_of_another(tiny, clips, tmp_path):
    system = Checkpoint(*tiny, tmp_path)
    a, b = clips[0], clips[4]
    system.prepare([a, b])
    with torch.inference_mode():
        mixed, only_a, only_b = system.features([a], [b]), system.features([a], [a]), system.features([b], [b])
    for name, mine, other in (("paralinguistic", only_a, only_b), ("linguistic", only_b, only_a)):
        assert torch.equal(mixed[f"{name}_embeds"], mine[f"{name}_embeds"])
        assert not torch.equal(mixed[f"{name}_embeds"], other[f"{name}_embeds"])
    if mixed.linguistic_token_ids is not None:
        assert torch.equal(mixed.linguistic_token_ids, only_b.linguistic_token_ids)


def test_a_swap_pairs_another_speaker_with_another_label(clips):
    bench = Bench(clips, label_sets(clips), tuple(CONDITIONS))
    swaps = [query for query in disentanglement(bench) if query.condition == "swap"]
    assert Counter(query.sample.task for query in swaps) == {"asr": 12, "gender": 24, "emotion": 12}
    for query in swaps:
        task = query.sample.task
        column = "transcript" if task == "asr" else task
        assert query.row["speaker"] != query.voice["speaker"]
        assert query.row[column] != query.voice[column]
        assert query.sample.label == (None if task == "asr" else query.voice[task])
        assert query.sources() == ("speech", "speech")


# ---- judges ----------------------------------------------------------------------------------------------------------


ONE = '{"content": 3, "style": 2}'


@pytest.mark.parametrize("answer", [ONE, f"Here you are: {ONE} I hope it helps.", f"```json\n{ONE}\n```"])
def test_scores_are_read(answer):
    assert judges.parse_scores(answer, judges.ASSET["judges"]["CS"], ["1"]) == {"1": {"content": 3.0, "style": 2.0}}


@pytest.mark.parametrize("wrong", ["6", "0", "-3", "NaN", "true", '"3"', "null", "[3]", "3, 3"])
def test_scores_are_read_strictly(wrong):
    about = judges.ASSET["judges"]["CS"]
    assert judges.parse_scores(ONE.replace("3", wrong), about, ["1"]) is None
    for answer in ('{"content": 3}', ONE[:-1], f"{ONE} or {ONE}", "[3, 2]", "I would say 3.", "", None):
        assert judges.parse_scores(answer, about, ["1"]) is None


def test_every_reply_of_several_needs_its_scores():
    about, one = judges.ASSET["judges"]["EGS"], dict.fromkeys(("C1", "C2", "C3", "C4"), 7)
    assert judges.parse_scores(json.dumps({"1": one, "2": one}), about, ["1", "2"])["2"]["C4"] == 7.0
    for second in ({}, {"2": one | {"C3": 11}}):
        assert judges.parse_scores(json.dumps({"1": one} | second), about, ["1", "2"]) is None


def talks(count: int) -> tuple[list[dict], dict]:
    """Records of replies under two conditions that name what the conversation is about, and its rows."""
    names = [str(n) for n in range(count)]
    rows = {("c", n): make_row(id=n, corpus="c", split="test", transcript=f"topic{n}!") for n in names}
    records = []
    for condition in ("P&L", "text"):
        for n in names:
            about = {"corpus": "c", "id": n, "speaker": n, "condition": condition}
            records.append(about | {"reply": f"{condition} replies to topic{n}!"})
    return records, rows


def answer_to(prompt: str, score) -> str:
    """Well-formed scores of every reply in a prompt, by `score(reply)`."""
    if replies := re.findall(r"^Response (\d+): (.*)$", prompt, re.MULTILINE):
        return json.dumps({n: dict.fromkeys(("C1", "C2", "C3", "C4"), score(reply)) for n, reply in replies})
    (reply,) = re.findall(r'^The assistant replies: "(.*)"$', prompt, re.MULTILINE)
    return json.dumps(dict.fromkeys(("content", "style"), score(reply)))


class ScriptedJudge:
    name = "scripted"

    def __init__(self, score):
        self.score, self.prompts = score, []

    def complete(self, prompts, seed):
        self.prompts += prompts
        return [answer_to(prompt, lambda reply, prompt=prompt: self.score(prompt, reply)) for prompt in prompts]


def attentive(prompt: str, reply: str) -> int:
    return 5 if re.search(r'"(topic\d+!)"', prompt)[1] in reply else 1


def test_a_judge_that_does_not_see_the_controls_is_called_weak(tmp_path):
    draw = random.Random(0)
    weak = judges.judge(ScriptedJudge(lambda *_: draw.randint(1, 5)), *talks(12), Journal(tmp_path / "weak"))
    (warning,) = report.weak_judges(weak)
    assert "scripted is too weak" in warning
    assert "another reply" in warning
    assert report.weak_judges(judges.judge(ScriptedJudge(attentive), *talks(12), Journal(tmp_path / "good"))) == []


def test_no_system_is_always_read_first(tmp_path):
    orders = []
    for run in range(2):
        judge = ScriptedJudge(attentive)
        judges.judge(judge, *talks(12), Journal(tmp_path / str(run)))
        orders.append([p for p in judge.prompts if "[Responses]" in p])
    assert orders[0] == orders[1]
    first = Counter(re.search(r"Response 1: (\S+)", prompt)[1] for prompt in orders[0])
    assert len(first) >= 3
    assert max(first.values()) < 12


@pytest.fixture
def faulty():
    """(address, faults, requests) of an endpoint that has its faults, one a request, before it answers rightly."""
    faults, requests = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            fault = faults.pop(0) if faults else None
            if fault == "silence":
                time.sleep(1.5)
            text = answer_to(body["messages"][0]["content"], lambda reply: 4)
            sent = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
            sent = sent[: len(sent) // 2] if fault == "broken" else sent
            self.send_response(fault if isinstance(fault, int) else 200)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1#m", faults, requests
    server.shutdown()
    server.server_close()


def test_an_endpoint_with_faults_loses_nothing(faulty, tmp_path):
    url, faults, requests = faulty
    faults += [429, 429, "silence", "broken"]
    judge = judges.RemoteJudge(url, timeout=0.5, patience=0.01)
    found = judges.judge(judge, *talks(2), Journal(tmp_path / "j"))
    assert all(record["value"] == 4.0 for record in found)
    jobs = 2 * 4 + 2  # CS: two replies and two controls, one by one; EGS: together
    assert len(requests) == jobs + 4
    assert len(Journal(tmp_path / "j").values) == jobs
    assert judges.judge(judge, *talks(2), Journal(tmp_path / "j")) == found
    assert len(requests) == jobs + 4  # the journal answers


def test_an_answer_that_never_came_is_not_kept_and_asked_for_again(faulty, tmp_path):
    url, faults, _ = faulty
    faults += [500] * 3
    judge = judges.RemoteJudge(url, attempts=3, patience=0.01)
    found = judges.judge(judge, *talks(2), Journal(tmp_path / "j"))
    assert all(record["value"] == 4.0 for record in found)
    kept = Journal(tmp_path / "j").values
    assert len(kept) == 10
    assert None not in kept.values()
    assert [key[-2:] for key in kept].count("#1") == 1


def test_a_refusal_is_told_at_once(faulty, tmp_path):
    url, faults, requests = faulty
    faults.append(401)
    with pytest.raises(ValueError, match=r"the judge http://127.0.0.1:\d+/v1#m refuses with status 401"):
        judges.judge(judges.RemoteJudge(url), *talks(2), Journal(tmp_path / "j"))
    assert len(requests) == 1
    with pytest.raises(ValueError, match="name the model behind a #"):
        judges.load_judge("http://localhost:8000/v1")


def test_a_judge_that_nobody_runs_stops_the_evaluation_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    judge = judges.RemoteJudge(f"http://127.0.0.1:{port}/v1#m", attempts=2, patience=0.01)
    with pytest.raises(ConnectionError, match=rf"the judge http://127.0.0.1:{port}/v1#m cannot be reached"):
        judges.judge(judge, *talks(2), Journal(tmp_path / "j"))


@pytest.fixture(scope="module")
def served():
    """Address of `transformers serve`, a real OpenAI-style server, with a real LLM."""
    pytest.importorskip("fastapi", reason='pip install "transformers[serving]"')
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", start, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    limit, ready = time.time() + 120, False
    try:
        while not ready:
            assert process.poll() is None, "the server did not start"
            assert time.time() < limit
            with suppress(OSError):
                ready = urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1#{resolve_backbone('smollm2-135m-instruct')}"
    finally:
        process.terminate()
        process.wait()


def test_a_real_server_judges_conversations(served, tmp_path, monkeypatch):
    monkeypatch.setitem(judges.ASSET, "judges", {"EGS": judges.ASSET["judges"]["EGS"]})  # one question a conversation
    monkeypatch.setattr(judges, "ATTEMPTS", 1)
    judge = judges.load_judge(served)
    found = judges.judge(judge, *talks(2), Journal(tmp_path / "j"))
    assert len(found) == 2 * 4 * 4  # conversations, replies with controls, criteria
    kept = Journal(tmp_path / "j").values
    assert len(kept) == 2
    assert all(isinstance(answer, str) and answer.strip() for answer in kept.values())
    assert judges.judge(judge, *talks(2), Journal(tmp_path / "j")) == found


def test_qwen2_audio_answers_through_transformers(tmp_path):
    """The real classes with small random weights: the chat format, the placeholder of the clip, a reply of its own."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    tokenizer = _tokenizer()
    tokenizer.add_tokens(["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"], special_tokens=True)
    tokenizer.chat_template = None  # Qwen2-Audio's processor has its own
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"model_type": "qwen2", "vocab_size": len(tokenizer), "num_key_value_heads": 2}
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    config = Qwen2AudioConfig(
        audio_config=audio | {"num_mel_bins": 128},
        text_config=text | {"eos_token_id": 2, "pad_token_id": 0},
        audio_token_id=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    torch.manual_seed(0)
    Qwen2AudioForConditionalGeneration(config).save_pretrained(tmp_path / "q")
    extractor = WhisperFeatureExtractor(feature_size=128)
    Qwen2AudioProcessor(extractor, tokenizer).save_pretrained(tmp_path / "q")
    data = table(tmp_path)
    result = evaluate(str(tmp_path / "q"), [data], tmp_path / "out", suites=["attributes"], limit=2)
    records = [json.loads(line) for line in (tmp_path / "out" / "attributes.jsonl").read_text().splitlines()]
    assert {r["condition"] for r in records} == {"P&L"}
    assert all("<|AUDIO|>" in r["prompt"] and "<|im_start|>assistant" in r["prompt"] for r in records)
    assert any(f["task"] == "gender" and f["metric"] == "accuracy" for f in result["figures"])
    with pytest.raises(ValueError, match="is a llama"):
        llama = tmp_path / "llama"
        llama.mkdir()
        (llama / "config.json").write_text('{"model_type": "llama"}')
        evaluate(str(llama), [data], tmp_path / "no")


def test_the_mean_over_seeds_has_a_spread_and_a_row_of_all_attributes(tmp_path):
    # (gender, pitch, pitch of one gender, words) of two seeds; the mean over attributes counts the first two alone.
    for seed, values in enumerate([(0.6, 0.8, 0.1, 2.0), (0.7, 0.5, 0.2, 3.0)]):
        tasks = [("gender", "accuracy"), ("pitch", "accuracy"), ("pitch, male voices", "accuracy"), ("asr", "WER")]
        figures = [
            {
                "suite": "attributes",
                "corpus": "c",
                "task": task,
                "metric": metric,
                "condition": "P only",
                "value": value,
            }
            for (task, metric), value in zip(tasks, values, strict=True)
        ]
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "report.json").write_text(json.dumps({"figures": figures}))
    lines = averaged([tmp_path / "0", tmp_path / "1"]).splitlines()
    assert "| attributes, c, gender, accuracy | 65.0 ± 7.1 |" in lines
    assert "| attributes, c, asr, WER | 250.0 ± 70.7 |" in lines
    assert "| attributes, mean, 2 attributes, accuracy | 65.0 ± 7.1 |" in lines  # 70 and 60
    with pytest.raises(FileNotFoundError, match="no finished evaluation"):
        averaged([tmp_path / "0", tmp_path / "2"])
