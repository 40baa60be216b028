"""The command line: its start, its errors, its help, and the way from a folder to a batch."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from conftest import make_model, run_cli, tone
from dual_slm.training import reference
from dual_slm.training.cli import build_parser, main
from dual_slm.training.corpora.table import read_table
from dual_slm.training.files import DEMO_CLIP, RECIPES


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--list"], ["corpus", "read", "--help"]], ids=lambda arguments: arguments[0]
)
def test_help_and_lists_import_no_torch(arguments):
    code = (
        "import sys\n"
        "from dual_slm.training.cli import main\n"
        "try:\n"
        f"    main({arguments})\n"
        "except SystemExit:\n"
        "    pass\n"
        "print('loaded:', *{'torch', 'datasets', 'librosa'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800, check=True)
    assert done.stdout.strip().endswith("loaded:")
    assert len(done.stdout.splitlines()) > len(list(RECIPES.glob("*.yaml")))


def test_every_command_and_argument_is_explained():
    for parser in reference._leaves(build_parser()):
        assert parser.description and parser.description.endswith("."), parser.prog
        for action in reference._arguments(parser):
            assert action.help, f"{parser.prog}: {action.dest}"


def test_the_commands_are_the_known_ones():
    names = [parser.prog.removeprefix("dual-slm ") for parser in reference._leaves(build_parser())]
    corpus = [f"corpus {name}" for name in ("build", "read", "folds", "label", "stats", "overlap", "show")]
    assert names == [
        *("backbones", "reply", "hear", "serve"),
        *corpus,
        *("align", "train", "evaluate", "calibrate", "port", "push", "benchmark"),
    ]


def test_the_reference_is_up_to_date(capsys):
    assert reference.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_reference_is_told_and_rewritten(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(reference, "README", readme)
    readme.write_text("# A\n<!-- recipe keys -->\nstale text\n<!-- end -->\n<!-- commands -->\n<!-- end -->\nB\n")
    assert reference.main(["--check"]) == 1
    assert "is out of date" in capsys.readouterr().err
    assert reference.main([]) == 0
    text = readme.read_text()
    assert "stale text" not in text and text.startswith("# A\n") and text.endswith("\nB\n")
    assert "| `caption_share` |" in text and "| `--hotwords` |" in text
    assert reference.main(["--check"]) == 0
    readme.write_text("# A\n")
    with pytest.raises(ValueError, match="has no lines <!-- recipe keys -->"):
        reference.main([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reply", "missing.wav"], "missing.wav: no such file"),
        (["reply", str(Path(__file__))], "is not audio that libsndfile reads"),
        (["reply", str(DEMO_CLIP), "--model", "gone"], "gone: no such folder, and no Hub id (OWNER/NAME)"),
        (["reply", str(DEMO_CLIP), "--device", "cuda:99"], "cuda:99"),
        (["backbones", "whisper-huge"], "unknown backbone 'whisper-huge'"),
        (["push", "tests", "--repo", "me/x"], "tests is no checkpoint"),
        (["calibrate", "tests", "--data", "t.parquet"], "a checkpoint's folder is calibrated in place"),
        (["train", "--recipe", "speedrun"], "--recipe NAME_OR_FILE and --output DIR are needed"),
        (["train", "--recipe", "speedrum", "--dry-run"], "did you mean 'speedrun'"),
        (["evaluate", "checkpoint"], "evaluate needs a checkpoint, --data TABLE (or --benchmark DIR) and --out DIR"),
        (["evaluate", "gone", "--data", "t", "--out", "o", "--card"], "--card writes into a checkpoint's folder"),
        (["corpus", "build"], "--out DIR says where the corpus is made"),
        (["corpus", "read", "ravdess", "--root", ".", "--out", "t", "--fold", "1"], "--fold is for IEMOCAP"),
        (
            ["corpus", "read", "ravdess", "--root", ".", "--out", "t", "--role-reversed"],
            "--role-reversed is StyleTalk's",
        ),
        (["corpus", "stats", "gone.parquet"], "gone.parquet does not exist"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith(f"dual-slm {arguments[0]}: ")
    assert len(error.splitlines()) == 1
    assert "Traceback" not in error


def test_a_wrong_argument_is_exit_code_2(capsys):
    for arguments in (["benchmark", "corpus"], ["corpus", "read", "mine", "--root", ".", "--out", "t"], []):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert "usage: dual-slm" in capsys.readouterr().err


def test_an_interrupt_is_exit_code_130_and_debug_raises(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dual_slm.training.commands.reply.load", interrupted)
    assert main(["reply", str(DEMO_CLIP)]) == 130
    monkeypatch.setenv("DUAL_SLM_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="no such file"):
        main(["reply", "missing.wav"])


def test_a_missing_package_is_told_with_its_cure(monkeypatch, capsys):
    def load(*_):
        raise ModuleNotFoundError("No module named 'librosa'")

    monkeypatch.setattr("dual_slm.training.commands.reply.load", load)
    assert main(["reply", str(DEMO_CLIP)]) == 1
    assert "pip install -e '.[train,eval,serve]'" in capsys.readouterr().err


@pytest.mark.slow
def test_an_unknown_checkpoint_is_named():
    result = run_cli(
        "reply", str(DEMO_CLIP), "--model", "no-such-checkpoint", env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert result.returncode == 1
    assert "no-such-checkpoint" in result.stderr
    assert "Traceback" not in result.stderr


def test_settings_that_are_given_one_by_one_all_count(capsys, tmp_path):
    settings = ["--set", "train.batch_size=3", "--set", "train.seed=5", "data.tables=[]"]
    command = ["train", "--recipe", "speedrun", "--output", str(tmp_path), "--dry-run"]
    assert main([*command, *settings]) == 0
    assert "16 steps of 3" in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_go_from_a_folder_to_a_batch(tmp_path, capsys, monkeypatch, tiny_backbones):
    """read, label, stats and show, as the README says, on a folder that holds a damaged clip."""
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "mine"
    corpus.mkdir()
    lines = []
    for n in range(40):
        soundfile.write(corpus / f"{n}.wav", tone(0.6 + n / 40, n), 16_000)
        split = "train" if n < 36 else "test"
        lines.append(
            {"file": f"{n}.wav", "text": "one two three", "speaker": f"s{n}", "split": split, "emotion": "sad"}
        )
    (corpus / "7.wav").write_bytes(b"RIFF" + bytes(60))
    samples, rate = soundfile.read(corpus / "9.wav")
    soundfile.write(corpus / "9.wav", np.where(np.arange(len(samples)) == 5, np.nan, samples), rate, subtype="FLOAT")
    (corpus / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert main(["corpus", "read", "folder", "--root", "mine", "--out", "t.parquet"]) == 0
    assert "1 x damaged audio, left out" in capsys.readouterr().out
    assert main(["corpus", "label", "t.parquet", "--thresholds", "tertiles"]) == 0
    out = capsys.readouterr().out
    assert "1 x audio that cannot be decoded, left out" in out
    assert "9.wav" in out
    table = list(read_table("t.parquet"))
    assert len(table) == 38
    assert {row.pitch for row in table} == {"low", "normal", "high"}
    assert all(row.caption for row in table)
    assert main(["corpus", "stats", "t.parquet", "--tokenizer", tiny_backbones[1], "--check"]) == 0
    assert "no leaks" in capsys.readouterr().out
    assert (tmp_path / "t.png").stat().st_size > 20_000
    model, processor = make_model(tiny_backbones)
    model.save_pretrained("ckpt")
    processor.save_pretrained("ckpt")
    assert main(["corpus", "show", "t.parquet", "--model", "ckpt", "--task", "emotion", "--count", "3"]) == 0
    out = capsys.readouterr().out
    assert "paralinguistic task emotion" in out
    assert "input_features  (3, 80," in out
    assert main(["corpus", "read", "folder", "--root", "nowhere", "--out", "t.parquet"]) == 1
    assert "nowhere is no folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_long_commands_run_with_an_allocator_that_keeps_its_memory(tmp_path):
    """A training restarts itself with it, once, and with the same arguments. A reply does not; a user's setting stays."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys; print('tunables:', os.environ.get('GLIBC_TUNABLES'), file=sys.stderr)"
    )
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"PYTHONPATH": os.pathsep.join(paths)}

    def starts(command: list[str], environment: dict) -> list[str]:
        done = run_cli(*command, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        return [line for line in done.stderr.splitlines() if line.startswith("tunables:")]

    first, again = starts(["train", "--list"], clean)
    assert first == "tunables: None" and "mmap_max=0" in again
    assert len(starts(["backbones", "--list"], clean)) == 1
    assert starts(["train", "--list"], clean | {"GLIBC_TUNABLES": "glibc.malloc.check=0"}) == [
        "tunables: glibc.malloc.check=0"
    ]
