"""The paper's tables: each from an evaluation of a scripted system whose mistakes were counted by hand."""

import json
from pathlib import Path

import pytest
from evaluated import figure, system_of
from huggingface_hub import ModelCard

from dual_slm.training.corpora.row import make_row
from dual_slm.training.corpora.table import write_table
from dual_slm.training.evaluation.evaluate import evaluate
from dual_slm.training.evaluation.report import markdown, write_card

pytestmark = pytest.mark.usefixtures("table_cache")

NOUNS = ("bird", "cat", "dog", "fish", "goat", "hen", "lion", "mouse", "owl")


def evaluated(rows, answer, folder: Path, suite: str, **options) -> dict:
    write_table(rows, folder / "t.parquet")
    return evaluate("x", [str(folder / "t.parquet")], folder / "out", [suite], system=system_of(answer), **options)


def librispeech() -> list:
    """Nine clips of four words: four of test-clean, three of test-other, two of a training subset."""
    subsets = ["test-clean"] * 4 + ["test-other"] * 3 + ["train-clean-100"] * 2
    known = {"corpus": "librispeech", "split": "test", "duration": 2.0, "gender": "male"}
    for n, subset in enumerate(subsets):
        said = f"see the small {NOUNS[n]}"
        yield make_row(id=str(n), audio=f"{n}.wav", speaker=str(n), transcript=said, subset=subset, **known)


def forgetful(query) -> str:
    """Forgets the last word of test-other; without the paralinguistic branch the last two of test-clean."""
    words = query.row.transcript.split()
    if query.row.subset == "test-other":
        return " ".join(words[:-1])
    return " ".join(words[:2] if query.condition == "L only" and query.row.subset == "test-clean" else words)


def test_table_3_has_clean_and_other_apart(tmp_path):
    result = evaluated(librispeech(), forgetful, tmp_path, "asr")
    (table,) = result["tables"]
    assert table == {
        "title": "paper, Table III: ASR, WER %",
        "head": ["corpus, system or condition", "test-clean", "test-other"],
        "rows": [
            ["librispeech, P&L-Embs", "0.0 (0.0–0.0), 4 clips", "25.0 (25.0–25.0), 3 clips"],
            ["librispeech, L-Embs", "50.0 (50.0–50.0), 4 clips", "25.0 (25.0–25.0), 3 clips"],
        ],
    }
    every = {t: figure(result, "asr", "librispeech", t, "P&L", "WER") for t in ("asr", "asr, train-clean-100")}
    assert every["asr"]["value"] == 3 / 36 and every["asr"]["samples"] == 9
    assert every["asr, train-clean-100"]["value"] == 0 and every["asr, train-clean-100"]["samples"] == 2
    assert json.loads((tmp_path / "out/report.json").read_text())["tables"] == [table]
    page = (tmp_path / "out/report.html").read_text()
    assert page.index("<h2>The paper's tables</h2>\n<h3>paper, Table III: ASR, WER %</h3>") < page.index(
        "<h2>asr</h2>"
    )
    text = markdown(result["figures"])
    assert text.startswith("**paper, Table III: ASR, WER %**")
    assert "| librispeech, asr, test-other | 3 / 3 |" in text


def test_a_card_calls_official_what_the_corpus_itself_holds_out(tmp_path):
    """Clips of a training subset that this project holds out are no test of LibriSpeech's."""
    write_card(tmp_path, evaluated(librispeech(), forgetful, tmp_path, "asr"))
    told = {
        r.task_name: (r.dataset_name, r.dataset_split)
        for r in ModelCard.load(tmp_path / "README.md").data.eval_results
    }
    assert told == {
        "asr": ("held-out librispeech speakers (test), asr", "test speakers"),
        "asr, train-clean-100": ("held-out librispeech speakers (test), asr, train-clean-100", "test speakers"),
        "asr, test-clean": ("librispeech test-clean", "test"),
        "asr, test-other": ("librispeech test-other", "test"),
    }


def test_a_limit_counts_the_clips_of_each_subset_of_words_alone(tmp_path):
    result = evaluated(librispeech(), forgetful, tmp_path, "asr", limit=2)
    samples = {f["task"]: f["samples"] for f in result["figures"] if f["condition"] == "P&L"}
    assert samples == {"asr": 6, "asr, test-clean": 2, "asr, test-other": 2, "asr, train-clean-100": 2}
    result = evaluated(librispeech(), lambda query: "male", tmp_path, "attributes", limit=2)
    samples = {f["task"]: f["samples"] for f in result["figures"] if f["condition"] == "P&L"}
    assert samples == {"gender": 2}


def test_a_subset_gets_no_warning_of_its_own(tmp_path):
    rows = [row.replace(subset="test-other") for row in librispeech()] + [
        row.replace(id=f"{row.id}b", transcript=f"hear the big {NOUNS[-1 - int(row.id)]}") for row in librispeech()
    ]
    warnings = evaluated(rows, lambda query: "nothing at all was here", tmp_path, "asr")["warnings"]
    assert any("asr, asr on librispeech, P&L: every reply is the same" in warning for warning in warnings)
    assert not any("test-other" in warning for warning in warnings)


def test_table_1_tells_the_unparsed_replies_beside_the_accuracy(tmp_path):
    """Four women: under P&L one reply is wrong and one names nothing; with the voice alone all are right."""
    known = {"corpus": "textrolspeech", "split": "test", "gender": "female", "tempo": "slow"}
    rows = [make_row(id=str(n), audio=f"{n}.wav", speaker="s", transcript=NOUNS[n], **known) for n in range(4)]
    rows.append(rows[0].replace(id="m", gender="male", split="train"))  # so that there are two choices

    def answer(query):
        if query.sample.task == "tempo" or query.condition == "P only":
            return query.voice.label(query.sample.task)
        return {"0": "male", "1": "I cannot tell."}.get(query.row.id, "A female voice.")

    (table,) = evaluated(rows, answer, tmp_path, "attributes")["tables"]
    assert table["title"] == "paper, Table I: attributes, WA % (of all replies; unparsed ones are wrong)"
    assert table["head"][1:] == ["gender", "pitch", "tempo", "energy", "emotion"]
    right = "100.0, unparsed 0.0"
    assert table["rows"] == [
        ["textrolspeech, P&L-Embs", "50.0, unparsed 25.0", "–", right, "–", "–"],
        ["textrolspeech, P-Embs", right, "–", right, "–", "–"],
    ]


def test_table_2_has_the_weighted_accuracy_of_meld(tmp_path):
    """Three of four are neutral and named so, the sad one is not: WA 75, where the mean over the classes is 50."""
    known = {"corpus": "meld", "split": "test", "speaker": "s"}
    moods = ("neutral", "neutral", "neutral", "sad")
    rows = [
        make_row(id=str(n), audio=f"{n}.wav", transcript=NOUNS[n], emotion=m, **known) for n, m in enumerate(moods)
    ]
    result = evaluated(rows, lambda query: "neutral", tmp_path, "meld")
    (table,) = result["tables"]
    assert table["rows"] == [["meld, P&L-Embs", "75.0, unparsed 0.0"]]
    assert table["title"].startswith("paper, Table II: emotion on MELD, WA %")
    assert figure(result, "meld", "meld", "emotion", "P&L", "unweighted accuracy")["value"] == 0.5
