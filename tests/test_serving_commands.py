"""`dual-slm hear` and `dual-slm serve`, as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import threading

import openai
import pytest
import requests
import soundfile

from conftest import tone
from dual_slm.training.cli import main
from dual_slm.training.commands import hear as hear_command
from served import user, wav

pytest_plugins = ["serving_fixtures"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, serving_model):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    for part in serving_model:
        part.save_pretrained(folder)
    for seconds in (0.4, 0.6):
        soundfile.write(folder.parent / f"{seconds}.wav", tone(seconds, 8), 16_000, subtype="FLOAT")
    return folder


def test_hear_prints_words_and_attributes_without_the_layers_of_the_llm(checkpoint, capsys, monkeypatch):
    loaded = []
    load = hear_command.load
    monkeypatch.setattr(hear_command, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    files = [str(checkpoint.parent / name) for name in ("0.4.wav", "0.6.wav")]
    assert main(["hear", *files, "--model", str(checkpoint), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == files
    assert [line["heard"] for line in lines] == ["a be a", "a be a"]
    assert [line["duration"] for line in lines] == [0.4, 0.6]
    assert set(lines[0]["probabilities"]) == {"gender", "emotion"} == set(lines[0]["attributes"])
    assert len(loaded[0][0].language_model.layers) == 0
    assert main(["hear", files[0], "--model", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "heard       a be a\nattributes  gender female (63%), emotion sad (56%)" in out
    assert main(["hear", "gone.wav", "--model", str(checkpoint)]) == 1
    assert "gone.wav: no such file" in capsys.readouterr().err


def test_hear_refuses_a_checkpoint_that_only_its_llm_can_read(tmp_path, paper, capsys):
    for part in paper:
        part.save_pretrained(tmp_path / "paper")
    soundfile.write(tmp_path / "a.wav", tone(0.4), 16_000)
    assert main(["hear", str(tmp_path / "a.wav"), "--model", str(tmp_path / "paper")]) == 1
    assert "use `dual-slm reply`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--llm", "http://127.0.0.1:1/v1#x"], "--llm URL and --as text belong together"),
        (["--as", "text"], "--llm URL and --as text belong together"),
        (["--as", "text", "--llm", "http://127.0.0.1:1/v1"], "name the model behind a #"),
    ],
)
def test_serve_refuses_options_that_do_not_fit(checkpoint, arguments, message, capsys):
    assert main(["serve", str(checkpoint), *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_serve_says_where_it_is_and_ends_gracefully(checkpoint):
    """What runs when SIGTERM comes is finished."""
    command = [sys.executable, "-m", "dual_slm.training.cli", "serve", str(checkpoint), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        name, url = process.stdout.readline().split()
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        assert (name, [model.id for model in client.models.list()]) == ("tiny", ["tiny"])
        heard = requests.post(f"{url}/audio/hear", files={"file": wav(tone(0.4, 8), subtype="FLOAT")}, timeout=1_800)
        assert heard.json()["heard"] == "a be a"
        options = {"model": "tiny", "messages": [user("hello")], "max_tokens": 200, "stream": True}
        stream = client.chat.completions.create(**options)
        pieces = [next(stream), next(stream)]
        process.send_signal(signal.SIGTERM)
        rest = threading.Thread(target=lambda: pieces.extend(stream))
        rest.start()
        rest.join(60)
        assert pieces[-1].choices[0].finish_reason == "length"
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.stdout.close()
