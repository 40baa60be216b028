"""Checks of rows against their audio files; those of videos are in test_corpora_readers.py."""

import json
import logging
from pathlib import Path

import numpy as np
import soundfile

from conftest import tone
from dual_slm.training.corpora.checks import Report, check_rows
from dual_slm.training.corpora.folder import read, read_folder


def test_broken_and_missing_audio_is_counted_and_the_rest_survives(tmp_path, caplog):
    for name in ("good", "header", "empty"):
        soundfile.write(tmp_path / f"{name}.wav", tone(0.5), 16_000)
    (tmp_path / "header.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:20])
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "silent.wav", np.zeros(0), 16_000)
    names = ["gone", "header", "good", "empty", "silent", "lost"]
    lines = [json.dumps({"id": name, "file": f"{name}.wav", "text": name}) for name in names]
    lines.append(json.dumps({"id": "good", "text": "again"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))

    report = Report()
    rows = list(check_rows(read(tmp_path, report), report))
    assert [(row.id, row.transcript) for row in rows] == [("good", "good")]
    kinds = {kind.split(",")[0]: (count, Path(report.first[kind]).name) for kind, count in report.items()}
    assert kinds == {
        "missing audio": (2, "gone.wav"),
        "damaged audio": (1, "header.wav"),
        "empty audio": (2, "empty.wav"),
        "repeated id": (1, "good"),
    }

    report = Report()
    rows = list(check_rows(read(tmp_path, report), report, allow_missing_audio=True))
    assert [row.id for row in rows] == names  # in the order of the metadata
    assert [row.id for row in rows if row.audio] == ["good"]
    assert f"2 x missing audio, kept as text; the first: {tmp_path / 'gone.wav'}" in str(report)

    with caplog.at_level(logging.WARNING):
        assert [row.id for row in read_folder(tmp_path)] == ["good"]
    assert "2 x missing audio, left out (--allow-missing-audio keeps the text)" in caplog.text
