"""Reports: the page, model cards, comparisons and means."""

import json
import re

import pytest
from evaluated import WORDS, records_of

from dual_slm.training.evaluation.benchmarks import BENCHMARKS
from dual_slm.training.evaluation.evaluate import evaluate
from dual_slm.training.evaluation.report import averaged, compared, write_card
from dual_slm.training.evaluation.suites import SUITES

pytest_plugins = ["evaluation_fixtures"]


@pytest.mark.slow
def test_the_page_stands_by_itself(whole):
    page = (whole[0] / "report.html").read_text()
    assert all(f"<h2>{suite}</h2>" in page for suite in SUITES if suite not in BENCHMARKS)
    assert '<audio controls preload="none" src="data:audio/ogg;base64,T2dnUw' in page
    assert '<img alt="accuracy by condition" src="data:image/png;base64,' in page
    assert not re.search(r"""(src|href)=(?!"data:)|url\(|@import|<script|<link""", page)


@pytest.mark.slow
def test_two_finished_evaluations_are_compared(whole):
    text = compared(whole[0], whole[0])
    assert "| asr, read, asr, P&L | WER |" in text
    assert " 0.0 (0.0 to 0.0) " in text


@pytest.mark.slow
def test_a_checkpoint_is_compared_with_a_file_of_replies(whole, data, tmp_path):
    """Which has no losses."""
    asked = {(r["id"], r["corpus"], r["task"]) for r in records_of(whole[0], "attributes") if r["condition"] == "P&L"}
    lines = [json.dumps({"id": i, "corpus": c, "task": t, "reply": "It is a female voice."}) for i, c, t in asked]
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    evaluate(str(tmp_path / "other.jsonl"), [str(data)], tmp_path / "out", suites=["attributes"], limit=2)
    for pair in ((whole[0], tmp_path / "out"), (tmp_path / "out", whole[0])):
        assert "attributes, read, gender, P&L | accuracy" in compared(*pair)
        assert "answer loss" not in compared(*pair)


def test_a_card_tells_its_figures_to_the_hub(scripted, tmp_path):
    from huggingface_hub import ModelCard

    path = tmp_path / "README.md"
    path.write_text("---\nlicense: apache-2.0\ntags:\n- speech\n---\n\n# A model\n\nWhat it does.\n")
    result = scripted("slipping")[1]
    write_card(tmp_path, result)
    once = path.read_bytes()
    write_card(tmp_path, result)
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
