"""Judges: what they are shown, strict parsing, controls, and endpoints with faults."""

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
from dual_slm.training.corpora.row import make_row
from dual_slm.training.corpora.table import write_table
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
    if replies := re.findall(r"^<response (\d+)> (.*)$", prompt, re.MULTILINE):
        return json.dumps({n: dict.fromkeys(("C1", "C2", "C3", "C4"), score(reply)) for n, reply in replies})
    (reply,) = re.findall(r"^### \[Response\]: (.*)$", prompt, re.MULTILINE)
    return json.dumps(dict.fromkeys(("content", "style"), score(reply)))


class ScriptedJudge:
    name = "scripted"

    def __init__(self, score):
        self.score, self.prompts = score, []

    def complete(self, prompts, seed):
        self.prompts += prompts
        return [answer_to(prompt, lambda reply, prompt=prompt: self.score(prompt, reply)) for prompt in prompts]


def attentive(prompt: str, reply: str) -> int:
    return 5 if re.search(r"(?:\[Instruction\]|listener): (topic\d+!)", prompt)[1] in reply else 1


def test_a_judge_that_does_not_see_the_controls_is_called_weak(tmp_path):
    draw = random.Random(0)
    weak = judges.judge(ScriptedJudge(lambda *_: draw.randint(1, 5)), *talks(12), Journal(tmp_path / "weak"))
    (warning,) = weak_judges(weak)
    assert "scripted is too weak" in warning
    assert "another reply" in warning
    assert weak_judges(judges.judge(ScriptedJudge(attentive), *talks(12), Journal(tmp_path / "good"))) == []


def test_no_system_is_always_read_first(tmp_path):
    records, rows = talks(12)
    records += [r | {"condition": f"system: {n}", "reply": f"{n} says"} for n in "ab" for r in records[:12]]
    orders = []
    for run in range(2):
        judge = ScriptedJudge(attentive)
        judges.judge(judge, records, rows, Journal(tmp_path / str(run)))
        orders.append([p for p in judge.prompts if "<response 3>" in p])
    assert orders[0] == orders[1] and len(orders[0]) == 12
    first = Counter(re.search(r"<response 1> (\S+)", prompt)[1] for prompt in orders[0])
    assert set(first) == {"P&L", "a", "b"}
    assert max(first.values()) < 12


# ---- what a judge is shown

HISTORY = [{"role": "user", "content": "I was ill."}, {"role": "assistant", "content": "Oh no."}]
SEVERAL = {"P&L": "Good.", "system: other": "Fine.", "text": "Great."}


def shown(rows: dict, replies: dict[str, str], wordings: tuple[str, ...]) -> dict[tuple, str]:
    """The prompts for the same replies to each row, by wording, id and conditions."""
    known = ({"corpus": corpus, "id": name, "speaker": "s"} for corpus, name in rows)
    records = [record | {"condition": c, "reply": reply} for record in known for c, reply in replies.items()]
    jobs = judges.make_jobs(ScriptedJudge(attentive), records, rows, wordings=wordings)
    return {(job.wording, job.talk[1], *job.conditions): job.prompt for job in jobs}


def sad_turns() -> dict:
    """Two turns after a history, and one without; all of them sad."""
    known = {"corpus": "c", "split": "test", "emotion": "sad", "tempo": "slow", "caption": "(a weeping voice)"}
    rows = [make_row(id="late", transcript="I am well now.", history=HISTORY, **known)]
    rows.append(make_row(id="first", transcript="Hello.", **known))
    return {row.key: row for row in rows}


def test_the_judge_reads_the_wording_of_the_cited_papers():
    prompts = shown(sad_turns(), SEVERAL, ("CS", "EGS"))
    content = prompts["CS", "late", "P&L"]
    assert content.startswith(
        "I need your help to evaluate the performance of several models in the speech interaction"
    )
    assert "\nContent (1-5 points):\n1 point: The response is largely irrelevant, incorrect, or fails" in content
    assert "\nStyle (1-5 points):\n1 point: The response is poorly suited for speech interaction, possibly" in content
    ending = "### [Response]: Good.\nAfter evaluating, please output the scores in JSON format: "
    ending += '{"content": content score, "style": style score}. You don\'t need to provide any explanations.\n'
    told = "### [Instruction]: User: I was ill.\nAssistant: Oh no.\nUser: I am well now.\n"
    assert content.endswith(told + ending)
    assert prompts["CS", "first", "P&L"].endswith("### [Instruction]: Hello.\n" + ending)
    (empathy,) = (p for key, p in prompts.items() if key[:2] == ("EGS", "late") and "system: other" in key)
    assert "[Context]\nlistener: I was ill.\nspeaker: Oh no.\nlistener: I am well now.\n\n[Prompt]\n" in empathy
    assert 'Now "speaker" needs to make an appropriate response to "listener". Here are some optional' in empathy
    assert "<C4> The speaker's response should have a positive impact on the progress of the conversation" in empathy


def test_only_our_wording_tells_the_style_of_the_turn():
    for key, prompt in shown(sad_turns(), SEVERAL, tuple(judges.ASSET["judges"])).items():
        assert ("a weeping voice" in prompt) == ("style-told" in key[0]), key
        assert "sad" not in prompt and "slow" not in prompt, key


def test_optional_responses_are_the_compared_systems_alone():
    """Ablations and controls have prompts of their own."""
    prompts = shown(sad_turns(), SEVERAL, ("EGS",))
    late = [set(key[2:]) for key in prompts if key[1] == "late"]
    assert sorted(late, key=sorted) == [{"P&L", "system: other"}, *({c} for c in judges.CONTROLS), {"text"}]
    for key, prompt in prompts.items():
        replies = re.findall(r"^<response \d> (.*)$", prompt, re.MULTILINE)
        wanted = SEVERAL | dict(zip(judges.CONTROLS, ("Good.", "..."), strict=True))
        assert replies == [wanted[condition] for condition in key[2:]]


def test_a_control_answers_another_dialogue_and_other_words():
    """StyleTalk has the same words in several styles: a reply to one of these suits the others."""
    said = [("talk_1", "Hello."), ("talk_1", "Bye."), ("talk_2", "Hello."), ("talk_3", "Why?")]
    known = {"corpus": "c", "split": "test"}
    rows = [make_row(id=str(n), dialogue=d, transcript=t, **known) for n, (d, t) in enumerate(said)]
    records = [{"corpus": "c", "id": r.id, "speaker": "s", "condition": "P&L", "reply": f"to {r.id}"} for r in rows]
    jobs = judges.make_jobs(ScriptedJudge(attentive), records, {row.key: row for row in rows}, wordings=["CS"])
    found = {job.talk[1]: job.prompt for job in jobs if job.conditions == [judges.CONTROLS[0]]}
    answered = {name: re.search(r"\[Response\]: to (\d)", prompt)[1] for name, prompt in found.items()}
    assert answered == {"0": "3", "1": "2", "2": "3", "3": "0"}


# ---- endpoints


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
            lenient = 1 if body["model"] == "lenient" else 0
            text = answer_to(body["messages"][0]["content"], lambda reply: 4 + lenient - (reply == "No."))
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
    jobs = 2 * 2 * 4  # conversations, wordings, two replies and two controls
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
    assert len(kept) == 16
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
    monkeypatch.setattr(judges, "ATTEMPTS", 1)
    judge, (records, rows) = judges.load_judge(served), talks(1)
    found = judges.judge(judge, records, rows, Journal(tmp_path / "j"), wordings=["EGS"])
    assert len(found) == 3 * 4  # two replies and an empty one, criteria
    kept = Journal(tmp_path / "j").values
    assert len(kept) == 3
    assert all(isinstance(answer, str) and answer.strip() for answer in kept.values())
    assert judges.judge(judge, records, rows, Journal(tmp_path / "j"), wordings=["EGS"]) == found


def test_a_report_has_the_scores_of_its_judges(data, tmp_path, monkeypatch):
    module = sys.modules[evaluate.__module__]
    monkeypatch.setattr(module, "load_judge", lambda *_: ScriptedJudge(lambda *_: 4))
    system = system_of(lambda query: f"{query.condition} {query.row.transcript}")
    result = evaluate("x", [str(data)], tmp_path, ["conversation"], limit=6, system=system, judges=["any"])
    scores = [f for f in result["figures"] if f["judge"] == "scripted" and f["metric"] == "EGS C1"]
    assert {f["condition"] for f in scores} >= {"P&L", "text", *judges.CONTROLS}
    assert all(f["value"] == 4 for f in scores)
    assert any("scripted is too weak" in warning for warning in result["warnings"])


def styletalk(folder) -> str:
    """Three turns of users, and one with exchanged roles, as the reader of StyleTalk gives them."""
    rows = []
    for n, corpus in enumerate(("styletalk", "styletalk", "styletalk", "styletalk_reversed")):
        known = {"id": f"d_{n}/{'r' if n == 3 else 'c'}_0", "corpus": corpus, "split": "test", "emotion": "sad"}
        known |= {"transcript": f"words {n}", "dialogue": f"d_{n}", "history": HISTORY, "audio": f"{n}.wav"}
        rows.append(make_row(**known))
    write_table(rows, folder / "styletalk.parquet")
    return str(folder / "styletalk.parquet")


def yes_or_no(query):
    """No where the roles are exchanged."""
    return "No." if query.row.corpus == "styletalk_reversed" else "Yes."


def test_two_judges_score_both_roles_and_another_system_in_one_command(faulty, tmp_path):
    """The paper's Table IV: for each judge the systems, by role and with both roles together."""
    url, _, requests = faulty
    data, strict, lenient = styletalk(tmp_path), url, url.replace("#m", "#lenient")
    other = system_of(lambda query: "No.")
    evaluate("other", [data], tmp_path / "other", ["conversation"], system=other)
    assert not requests
    options = {"judges": [strict, lenient], "beside": [tmp_path / "other"], "system": system_of(yes_or_no)}
    result = evaluate("x", [data], tmp_path / "out", ["conversation"], **options)
    tables = [t for t in result["tables"] if t["title"].startswith("paper, Table IV")]
    assert [t["title"] for t in tables] == [f"paper, Table IV: judge {name}" for name in (strict, lenient)]
    # "Yes." gets 4 and "No." 3, by the lenient judge one more; three turns of users, one with exchanged roles.
    for more, table in enumerate(tables):
        assert table["head"][1:] == [
            "CS content",
            "CS style",
            *(f"EGS C{n}" for n in "1234"),
            "turns",
            "unread answers %",
        ]
        scores = {label: ({text.split()[0] for text in texts[:6]}, texts[6:]) for label, *texts in table["rows"]}
        assert scores == {
            "styletalk, user's turn, P&L-Embs": ({f"{4 + more}.00"}, ["3", "0.0"]),
            "styletalk, user's turn, other": ({f"{3 + more}.00"}, ["3", "0.0"]),
            "styletalk, roles reversed, P&L-Embs": ({f"{3 + more}.00"}, ["1", "0.0"]),
            "styletalk, roles reversed, other": ({f"{3 + more}.00"}, ["1", "0.0"]),
            "styletalk, both roles, P&L-Embs": ({f"{3 + more}.75"}, ["4", "0.0"]),
            "styletalk, both roles, other": ({f"{3 + more}.00"}, ["4", "0.0"]),
        }
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"<h3>paper, Table IV: judge {lenient}</h3>" in page
    assert not any("sad" in r["messages"][0]["content"] for r in requests)
    count = len(requests)
    assert evaluate("x", [data], tmp_path / "out", ["conversation"], **options)["figures"] == result["figures"]
    assert len(requests) == count  # the journal answers


def test_a_wrong_name_is_told_before_anything_is_asked(data, tmp_path):
    options = {"suites": ["conversation"], "system": system_of(lambda query: pytest.fail("asked"))}
    with pytest.raises(ValueError, match=r"no wording 'cs' of judges; there are CS, EGS, CS-style-told"):
        evaluate("x", [str(data)], tmp_path / "a", wordings=["cs"], **options)
    with pytest.raises(FileNotFoundError, match="nowhere holds no finished evaluation"):
        evaluate("x", [str(data)], tmp_path / "a", beside=[tmp_path / "nowhere"], **options)
    with pytest.raises(ValueError, match="two folders of one name"):
        evaluate("x", [str(data)], tmp_path / "a", beside=[tmp_path / "r", tmp_path / "q" / "r"], **options)
