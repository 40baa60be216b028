"""The scripts of training/examples run on tiny backbones."""

import numpy as np
import pytest
import soundfile

from conftest import make_model, tone
from dual_slm.training.corpora.row import make_row
from dual_slm.training.corpora.table import read_table, write_table
from dual_slm.training.examples import build_model, chat, corpus_reader, own_metric


@pytest.fixture(scope="module")
def checkpoint(tiny_backbones, tmp_path_factory) -> str:
    """A random checkpoint with character CTC and captions."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in make_model(tiny_backbones, kind="letters"):
        part.save_pretrained(folder)
    return str(folder)


def test_chat_prints_what_is_heard_and_two_replies(checkpoint, capsys):
    replies = chat.main(checkpoint, (tone(1.0), 16_000))
    out = capsys.readouterr().out
    assert len(replies) == 2
    assert out.startswith("heard: ") and "emotion" in out
    assert all(reply in out for reply in replies)


def test_a_model_of_new_adapters_learns_one_clip(tiny_backbones, capsys):
    losses = build_model.main(*tiny_backbones, steps=3)
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert "step 2: loss" in capsys.readouterr().out


def test_a_corpus_reader_makes_a_table(tmp_path, capsys):
    for speaker in ("anna", "ben", "carl"):
        (tmp_path / "corpus" / speaker).mkdir(parents=True)
        for n, emotion in enumerate(("happy", "sadness")):
            path = tmp_path / "corpus" / speaker / f"{emotion}-{n}.wav"
            soundfile.write(path, tone(0.5, n), 16_000)
            if (speaker, n) != ("ben", 1):
                path.with_suffix(".txt").write_text("hello fox\n")
    assert corpus_reader.main(str(tmp_path / "corpus"), str(tmp_path / "t.parquet")) == 5
    assert "1 x clip without words, left out" in capsys.readouterr().out
    rows = list(read_table(tmp_path / "t.parquet"))
    assert {(row.speaker, row.split) for row in rows} == {("anna", "train"), ("ben", "train"), ("carl", "test")}
    assert {row.emotion for row in rows} == {"happy", "sad"}
    assert all(row.transcript == "hello fox" and row.duration == 0.5 for row in rows)


@pytest.mark.slow
def test_a_metric_of_ones_own(checkpoint, tmp_path, capsys):
    rows = []
    for n in range(6):
        path = tmp_path / f"{n}.wav"
        soundfile.write(path, tone(0.6, n), 16_000)
        known = {"transcript": "hello fox", "emotion": ("happy", "sad")[n % 2], "speaker": f"s{n // 2}"}
        rows.append(make_row(id=str(n), corpus="c", split="test", audio=str(path), duration=0.6, **known))
    write_table(rows, tmp_path / "t.parquet")
    share = own_metric.main(checkpoint, str(tmp_path / "t.parquet"), str(tmp_path / "out"))
    assert 0 <= share <= 1
    assert "share of short replies" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_interval_of_a_metric_needs_two_speakers():
    records = [{"speaker": speaker, "reply": reply} for speaker, reply in (("a", "yes"), ("a", "one two three four"))]
    assert own_metric.short_replies(records) == (0.5, None)
    share, interval = own_metric.short_replies([*records, {"speaker": "b", "reply": "no"}])
    assert share == pytest.approx(2 / 3)
    assert interval is not None and interval[0] <= share <= interval[1]
