"""One's own corpus: metadata in any usual form beside audio files."""

import json
from pathlib import Path

import pytest
import soundfile

from conftest import tone
from dual_slm.training.cli import main
from dual_slm.training.corpora.folder import read_folder
from dual_slm.training.corpora.table import read_table, write_table

pytestmark = pytest.mark.usefixtures("table_cache")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('["text"]', "line 2: .* is no JSON object"),
        ('{"speaker": "x", "split": "train"}', "line 2: names no audio file"),
        ('{"text": "x", "split": "dev"}', "line 2: .*split is 'dev'; it must be one of train, validation, test"),
        ('{"text": "x", "gender": "F"}', "line 2: .*gender is 'F'; it must be one of female, male"),
        ('{"text": "x", "voice_only": "perhaps"}', "line 2: .*voice_only is 'perhaps'; it must be true or false"),
        ('{"text": "x", "turn": "third"}', "line 2: .*turn is 'third'; it must be a number"),
        ('{"text": "x", "history": ["hello"]}', "line 2: .*history is .*it must be a list of"),
    ],
)
def test_bad_lines_of_ones_own_corpus_are_named(tmp_path, line, message):
    (tmp_path / "metadata.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"metadata\.jsonl, {message}"):
        read_folder(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_ones_own_corpus_as_csv_or_lines_in_any_usual_encoding(tmp_path, kind, encoding):
    """What editors and spreadsheets save; numbers where the schema has words."""
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16_000)
    record = {"path": "a.wav", "transcript": "it’s a café", "speaker": 7, "pitch_hz": 120.5, "turn": 2, "mood": "x"}
    record["subset"] = "test-other"
    second = {"path": "", "transcript": "nan", "speaker": "zoé", "pitch_hz": "", "turn": "", "mood": "", "subset": ""}
    if kind == "csv":
        lines = [",".join(record), *(",".join(map(str, r.values())) for r in (record, second))]
    else:
        lines = [json.dumps(r, ensure_ascii=False) for r in (record, second)]
    (tmp_path / f"metadata.{kind}").write_text("\r\n".join(lines) + "\r\n", encoding=encoding)
    write_table(read_folder(tmp_path), tmp_path / "t.parquet")
    first, second = read_table(tmp_path / "t.parquet")
    assert (first.transcript, first.speaker, first.pitch_hz, first.turn) == ("it’s a café", "7", 120.5, 2)
    assert (first.audio, first.split, first.subset) == (str(tmp_path / "a.wav"), "train", "test-other")
    assert (second.transcript, second.speaker, second.turn, second.subset) == ("nan", "zoé", None, None)


def test_ones_own_corpus_needs_metadata_and_whole_records(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither metadata\.jsonl nor metadata\.csv"):
        read_folder(tmp_path)
    (tmp_path / "metadata.csv").write_text("file,text,gender\na.wav,fox,male\nb.wav,d")
    with pytest.raises(ValueError, match=r"metadata\.csv, line 3: fewer fields .*cut off\?"):
        read_folder(tmp_path, allow_missing_audio=True)


def test_a_folder_is_read_from_within_and_its_table_used_from_anywhere(tmp_path, monkeypatch):
    corpus = tmp_path / "mine"
    corpus.mkdir()
    soundfile.write(corpus / "a.wav", tone(0.5), 16_000)
    (corpus / "metadata.jsonl").write_text('{"file": "a.wav", "text": "the fox"}\n')
    monkeypatch.chdir(corpus)
    assert main(["corpus", "read", "folder", "--root", ".", "--out", str(tmp_path / "t.parquet")]) == 0
    monkeypatch.chdir(tmp_path)
    (found,) = read_table(tmp_path / "t.parquet")
    assert found.key == ("mine", "mine/a.wav")
    assert Path(found.audio) == corpus / "a.wav"


def test_what_was_wrong_is_told_where_nothing_is_left(tmp_path, capsys):
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0 ftypM4A " * 20)
    (tmp_path / "metadata.jsonl").write_text('{"file": "a.m4a", "text": "the fox"}\n')
    assert main(["corpus", "read", "folder", "--root", str(tmp_path), "--out", str(tmp_path / "t.parquet")]) == 1
    assert "no row is left. 1 x damaged audio" in capsys.readouterr().err
