"""The server over a real uvicorn on loopback, asked by the official `openai` client."""

import gc
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
import requests
import torch

from conftest import prepare, spoken, tone, typed
from dual_slm.training.serving.gate import Gate
from dual_slm.training.serving.policy import Policy
from dual_slm.training.serving.server import make_app
from served import audio_part, make_service, running, user, wait_for, wav

pytest_plugins = ["serving_fixtures"]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=1_800)


def ask(client: openai.OpenAI, *messages: dict, **options):
    return client.chat.completions.create(model="tiny", messages=list(messages), **options)  # pyright: ignore


def in_process(serving_model, messages: list[dict], **options) -> tuple[str, int, int]:
    """The greedy reply of `generate`, the tokens that the LLM reads and those of the reply."""
    model, processor = serving_model
    inputs = prepare(processor, messages)
    output = model.generate(**inputs, do_sample=False, **options)[0, inputs["input_ids"].shape[1] :]
    audio = {name: inputs[name] for name in processor.model_input_names[2:] if name in inputs}
    features = model.get_audio_features(**audio) if audio else None
    _, mask = model.merge_audio(inputs["input_ids"], None, features)
    return processor.decode(output, skip_special_tokens=True).strip(), int(mask.sum()), len(output)


CLIP = wav(tone(1.4, 5), subtype="FLOAT")
TURNS = {
    "speech": ([user(audio_part(CLIP))], [spoken(1.4, 5)]),
    "text": ([user("the quick brown fox")], [typed("the quick brown fox")]),
    "speech and text": ([user(audio_part(CLIP), "hello")], [spoken(1.4, 5, "hello")]),
    "several turns": (
        [
            {"role": "developer", "content": "be brief"},
            user(audio_part(CLIP)),
            {"role": "assistant", "content": "a fox"},
            user("and", audio_part(wav(tone(0.6, 4), subtype="FLOAT"))),
        ],
        [
            typed("be brief", "system"),
            spoken(1.4, 5),
            typed("a fox", "assistant"),
            {
                "role": "user",
                "content": [{"type": "text", "text": "and"}, {"type": "audio", "audio": tone(0.6, 4)}],
            },
        ],
    ),
    "caption": (
        [user(audio_part(CLIP, paralinguistic="caption", caption="(sad voice)"))],
        [spoken(1.4, 5, paralinguistic="caption", caption="(sad voice)")],
    ),
    "transcript": (
        [user(audio_part(CLIP, linguistic="transcript", transcript="the dog"))],
        [spoken(1.4, 5, linguistic="transcript", transcript="the dog")],
    ),
    "no voice": ([user(audio_part(CLIP, paralinguistic="none"))], [spoken(1.4, 5, paralinguistic="none")]),
    "no words": ([user(audio_part(CLIP, linguistic="none"))], [spoken(1.4, 5, linguistic="none")]),
}


@pytest.mark.parametrize("name", TURNS)
def test_a_reply_is_the_greedy_one_of_the_checkpoint_streamed_or_not(client, serving_model, name):
    sent, local = TURNS[name]
    text, read, written = in_process(serving_model, local, max_new_tokens=24)
    whole = ask(client, *sent, max_tokens=24)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (read, written) == (read, 24)
    chunks = list(ask(client, *sent, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant"


def test_a_data_url_is_heard_like_input_audio_and_a_reply_can_be_sent_back(client):
    given = audio_part(CLIP)
    url = "data:audio/wav;base64," + given["input_audio"]["data"]
    first = ask(client, user(given), max_tokens=8).choices[0].message
    second = ask(client, user({"type": "audio_url", "audio_url": {"url": url}}), max_tokens=8).choices[0].message
    assert first.content == second.content
    more = ask(client, user(given), first.model_dump(), user("hello"), max_tokens=4)
    assert more.usage.completion_tokens == 4


def test_a_stop_string_ends_the_reply_before_it(client, serving_model):
    text = in_process(serving_model, [spoken(1.4, 5)], max_new_tokens=60)[0]
    stop = text[20:23]
    cut = ask(client, user(audio_part(CLIP)), max_tokens=60, stop=[stop, "never said"])
    assert cut.choices[0].message.content == text[: text.index(stop)].rstrip()
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 60
    chunks = ask(client, user(audio_part(CLIP)), max_tokens=60, stop=stop, stream=True)
    pieces = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert pieces == cut.choices[0].message.content


def test_sampling_follows_its_seed(client):
    sample = {"max_tokens": 16, "temperature": 1.5, "top_p": 0.95}
    texts = [ask(client, user("a fox"), seed=seed, **sample).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_penalties_lower_the_logits_of_what_the_reply_has_said(client, serving_model):
    """Against a greedy loop that is written out here."""
    model, processor = serving_model
    ids = prepare(processor, [typed("a fox")])["input_ids"]
    said: list[int] = []
    for _ in range(24):
        logits = model(input_ids=torch.cat([ids, torch.tensor([said], dtype=torch.long)], 1)).logits[0, -1].clone()
        for token in set(said):
            logits[token] -= 0.5 * said.count(token) + 1.5
        said.append(int(logits.argmax()))
    options = {"max_tokens": 24, "frequency_penalty": 0.5, "presence_penalty": 1.5}
    reply = ask(client, user("a fox"), **options).choices[0].message.content
    assert reply == processor.decode(said, skip_special_tokens=True).strip()
    assert reply != ask(client, user("a fox"), max_tokens=24).choices[0].message.content


def test_a_conversation_past_the_llms_positions_is_refused_with_openais_code(client, serving_model):
    limit = serving_model[0].config.get_text_config().max_position_embeddings
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=f"the LLM takes {limit:,} together") as refusal:
            ask(client, user("hello"), max_tokens=limit, stream=stream)
        assert refusal.value.code == "context_length_exceeded"


def test_transcriptions_and_what_is_heard(client, server, serving_model):
    model, processor = serving_model
    inputs = processor(text="<|audio|>", audio=[tone(1.4, 5)], add_special_tokens=False)
    features = model.get_audio_features(**{name: inputs[name] for name in processor.model_input_names[2:]})
    (expected,) = processor.decode_audio(features)
    assert expected["heard"]
    file = ("a.wav", CLIP)
    assert client.audio.transcriptions.create(model="tiny", file=file).text == expected["heard"]
    plain = client.audio.transcriptions.create(model="tiny", file=file, response_format="text")
    assert plain == expected["heard"]
    heard = requests.post(f"{server}/v1/audio/hear", files={"file": CLIP}, timeout=1_800).json()
    assert (heard["heard"], heard["duration"]) == (expected["heard"], 1.4)
    for name, labels in expected["attributes"].items():
        assert heard["probabilities"][name] == pytest.approx(labels, abs=1e-4)
        best = max(labels, key=labels.get)
        assert heard["attributes"][name] == (best if labels[best] > 0.5 else "unsure")
    with pytest.raises(openai.BadRequestError, match="'language' is not supported"):
        client.audio.transcriptions.create(model="tiny", file=file, language="de")
    with pytest.raises(openai.BadRequestError, match="'srt' is not supported"):
        client.audio.transcriptions.create(model="tiny", file=file, response_format="srt")


def test_models_health_and_metrics(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert requests.get(f"{server}/health", timeout=1_800).json() == {"status": "ok"}

    def read() -> dict[str, float]:
        text = requests.get(f"{server}/metrics", timeout=1_800).text
        assert "# TYPE dual_slm_requests_total counter" in text
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    new = user(audio_part(wav(tone(0.5, 77))))
    ask(client, new, max_tokens=5)
    before = read()
    ask(client, new, max_tokens=5)
    requests.post(f"{server}/no/such/route", timeout=1_800)
    after = read()
    grown = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name)}
    assert grown['dual_slm_requests_total{path="/v1/chat/completions",status="200"}'] == 1
    assert grown['dual_slm_requests_total{path="other",status="404"}'] == 1
    assert grown["dual_slm_completion_tokens_total"] == 5
    assert grown["dual_slm_ears_cache_hits_total"] == 1
    assert "dual_slm_ears_cache_misses_total" not in grown


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/audio/hear", 405)])
def test_unknown_routes_are_told_in_openais_shape(server, method, path, status):
    answer = requests.request(method, server + path, timeout=1_800)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert f"{method} '{path}' is no route" in error["message"]


# ---- load and faults


@pytest.fixture(scope="module")
def small(serving_model):
    """A server that lets two requests in."""
    service = make_service(*serving_model, Policy(max_request_bytes=300_000), capacity=2)
    with running(make_app(service)) as url:
        yield service, url


ENDLESS = {"model": "tiny", "messages": [user("hello")], "max_tokens": 1_900}


def post(url: str, **body):
    return requests.post(f"{url}/v1/chat/completions", json=ENDLESS | body, timeout=1_800)


def test_who_comes_when_it_is_full_is_told_when_to_come_again(small):
    service, url = small
    with ThreadPoolExecutor(2) as pool, held(service):
        running_ones = [pool.submit(post, url, max_tokens=5) for _ in range(2)]
        wait_for(lambda: gate_of(service).inside == 2)
        answer = post(url, max_tokens=1)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert requests.get(f"{url}/health", timeout=1_800).status_code == 200  # it still answers who asks how it is
    assert all(future.result().status_code == 200 for future in running_ones)
    assert post(url, max_tokens=1).status_code == 200


@contextmanager
def held(service):
    """Keeps the thread that generates busy, so that requests wait, however fast the machine is."""
    free = threading.Event()
    service.engine._thread.submit(free.wait)
    try:
        yield free
    finally:
        free.set()


def gate_of(service) -> Gate:
    return next(x for x in gc.get_objects() if type(x) is Gate and x.metrics is service.metrics)


@contextmanager
def steps(service, last: int = 10**9):
    """Counts the LLM's passes; after the last one it hangs."""
    count, free = [0], threading.Event()

    def step(*_) -> None:
        count[0] += 1
        if count[0] > last:
            free.wait()

    hook = service.engine.model.language_model.register_forward_pre_hook(step)
    try:
        yield count
    finally:
        free.set()
        hook.remove()


@pytest.mark.parametrize("stream", [False, True])
def test_generation_stops_when_the_client_disappears(small, stream):
    service, url = small
    body = json.dumps(ENDLESS | {"stream": stream}).encode()
    host, _, port = url.removeprefix("http://").partition(":")
    with steps(service) as count:
        with socket.create_connection((host, int(port))) as connection:
            head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
            head += [f"Content-Length: {len(body)}", "\r\n"]
            connection.sendall("\r\n".join(head).encode() + body)
            wait_for(lambda: count[0] > 5)
        wait_for(lambda: gate_of(service).inside == 0)
        assert post(url, max_tokens=1).status_code == 200  # the thread that generates is free again
        assert count[0] < ENDLESS["max_tokens"]


def test_a_request_that_takes_too_long_ends_in_an_error_that_the_client_sees(small, monkeypatch):
    service, url = small
    monkeypatch.setattr(gate_of(service), "seconds", 3.0)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    received = []
    with steps(service, last=60), pytest.raises(openai.APIError, match=r"took longer than 3 s"):
        for chunk in client.chat.completions.create(**ENDLESS, stream=True):
            received.append(chunk)  # noqa: PERF402
    assert len(received) > 1
    with held(service):
        late = post(url)
    assert (late.status_code, "took longer than 3 s" in late.text) == (504, True)


def test_a_body_that_trickles_in_and_one_that_is_too_large_end(small, monkeypatch):
    service, url = small
    host, _, port = url.removeprefix("http://").partition(":")
    with monkeypatch.context() as patch, socket.create_connection((host, int(port))) as connection:
        patch.setattr(gate_of(service), "seconds", 0.5)
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 504")

    def chunks():  # no Content-Length tells its size
        for _ in range(8):
            yield b" " * 50_000

    for data in (b" " * 400_000, chunks()):
        answer = requests.post(f"{url}/v1/chat/completions", data=data, timeout=1_800)
        assert (answer.status_code, "larger than 300,000 bytes" in answer.text) == (413, True)
    wait_for(lambda: gate_of(service).inside == 0)


def test_a_failure_inside_is_told_without_its_details(small, monkeypatch):
    service, url = small

    def broken(*_):
        raise RuntimeError("a secret path /home/me")

    monkeypatch.setattr(service.engine.model, "generate", broken)
    monkeypatch.setattr(type(service.engine), "_generate", broken)
    for stream in (False, True):
        answer = post(url, stream=stream)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text
    monkeypatch.undo()
    assert post(url, max_tokens=1).status_code == 200


def test_concurrent_requests_get_what_single_ones_get(server, client):
    bodies = [user(audio_part(wav(tone(0.4 + 0.2 * n, 40 + n)))) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: ask(client, body, max_tokens=6).choices[0].message.content, bodies))
    assert together == [ask(client, body, max_tokens=6).choices[0].message.content for body in bodies]
    assert len(set(together)) > 1


def test_at_its_end_the_server_finishes_what_runs_and_frees_its_threads(serving_model):
    service = make_service(*serving_model)
    with ThreadPoolExecutor(1) as pool, running(make_app(service)) as url, held(service):
        last = pool.submit(post, url, max_tokens=60)
        wait_for(lambda: gate_of(service).inside == 1)
        # The server is told to end while the reply is written.
    assert last.result().json()["usage"]["completion_tokens"] == 60
    wait_for(lambda: not service.ears._thread.is_alive())
    assert not any(
        t.name.startswith("generation") and t in service.engine._thread._threads for t in threading.enumerate()
    )
