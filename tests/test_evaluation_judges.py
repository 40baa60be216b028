"""Judges: strict parsing, controls, and endpoints with faults."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from evaluated import system_of, talks

from dual_slm.backbones_dual_slm import resolve_backbone
from dual_slm.training.evaluation import judges
from dual_slm.training.evaluation.evaluate import evaluate
from dual_slm.training.evaluation.figures import weak_judges
from dual_slm.training.files import Journal

pytest_plugins = ["evaluation_fixtures"]

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

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
    (warning,) = weak_judges(weak)
    assert "scripted is too weak" in warning
    assert "another reply" in warning
    assert weak_judges(judges.judge(ScriptedJudge(attentive), *talks(12), Journal(tmp_path / "good"))) == []


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
            self.send_header("Content-Type", "application/json")
            self.send_header("Retry-After-Ms", "10")
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1#m", faults, requests
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_an_endpoint_with_faults_loses_nothing(faulty, tmp_path):
    url, faults, requests = faulty
    faults += [429, 429, "silence", "broken"]
    judge = judges.RemoteJudge(url, timeout=0.5)
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
    judge = judges.RemoteJudge(url, max_retries=2)
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
    judge = judges.RemoteJudge(f"http://127.0.0.1:{port}/v1#m", max_retries=1)
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


@pytest.mark.slow
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


def test_a_report_has_the_scores_of_its_judges(data, tmp_path, monkeypatch):
    module = sys.modules[evaluate.__module__]
    monkeypatch.setattr(module, "load_judge", lambda *_: ScriptedJudge(lambda *_: 4))
    system = system_of(lambda query: f"{query.condition} {query.row.transcript}")
    result = evaluate("x", [str(data)], tmp_path, ["conversation"], limit=2, system=system, judges=["any"])
    scores = [f for f in result["figures"] if f["judge"] == "scripted" and f["metric"] == "EGS C1"]
    assert {f["condition"] for f in scores} >= {"P&L", "text", *judges.CONTROLS}
    assert all(f["value"] == 4 for f in scores)
    assert any("scripted is too weak" in warning for warning in result["warnings"])
