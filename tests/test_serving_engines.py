"""Engines: stop strings in a stream, and another LLM that reads the voice as text."""

import numpy as np
import openai
import pytest

from conftest import tone
from dual_slm.training.serving.ears import Ears, Heard
from dual_slm.training.serving.engines import Penalties, StopText, TextEngine, TransformersEngine, describe
from dual_slm.training.serving.messages import HeardPart
from dual_slm.training.serving.server import Service, make_app
from dual_slm.turns_dual_slm import SpokenTurn
from served import audio_part, running, user, wav

pytest_plugins = ["serving_fixtures"]

ATTRIBUTES = {"gender": {"female": 0.9, "male": 0.1}, "emotion": {"sad": 0.4, "happy": 0.35, "neutral": 0.25}}


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("text", "stops", "expected", "done"),
    [
        ("one two three", [], "one two three", False),
        ("one two three", ["two"], "one", True),
        ("one two three", ["three", "wo"], "one t", True),  # the first in the text counts
        ("one tw", ["two"], "one tw", False),  # the beginning of a stop string is no stop string
        ("  one two \n", ["###"], "one two", False),
        ("aab", ["ab"], "a", True),
        ("one", [""], "one", False),
        ("##", ["##"], "", True),
    ],
)
def test_stop_strings_cut_a_stream_wherever_it_is_split(size, text, stops, expected, done):
    cut = StopText(stops)
    pieces = [cut.add(text[start : start + size]) for start in range(0, len(text), size)]
    assert "".join(pieces) + ("" if cut.done else cut.rest()) == expected
    assert cut.done == done


def test_penalties_count_the_reply_and_not_the_prompt():
    import torch

    penalties = Penalties(0.5, 1.0)
    scores = torch.zeros(1, 4)
    assert penalties(torch.tensor([[1, 1, 2]]), scores).tolist() == [[0, 0, 0, 0]]
    assert penalties(torch.tensor([[1, 1, 2, 3, 3, 0]]), scores).tolist() == [[-1.5, 0, 0, -2.0]]


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({}, "(the speaker's voice: gender female, emotion unsure) i am fine"),
        ({"paralinguistic": "none"}, "i am fine"),
        ({"linguistic": "none"}, "(the speaker's voice: gender female, emotion unsure)"),
        ({"paralinguistic": "caption", "caption": "(a tired voice)"}, "(a tired voice) i am fine"),
        (
            {"paralinguistic": "none", "linguistic": "transcript", "transcript": "I am not."},
            "I am not.",
        ),
    ],
)
def test_a_spoken_part_becomes_text(part, text):
    heard = Heard(None, "i am fine", ATTRIBUTES, 5, 0.1)
    assert describe(HeardPart(SpokenTurn.from_part({"audio": b""} | part), heard)) == text


def test_silence_is_told():
    heard = Heard(None, "", None, 5, 0.1)
    assert describe(HeardPart(SpokenTurn.from_part({"audio": b""}), heard)) == "(no words were heard)"


@pytest.fixture(scope="module")
def front(server, serving_model):
    """A server whose LLM is another server of ours."""
    ears = Ears(*serving_model)
    with running(make_app(Service("ears", ears, TextEngine(f"{server}/v1#tiny")))) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), ears


def test_another_llm_answers_the_words_and_the_voice(front, server):
    """Its reply is the one that it gives to the same text, streamed or not."""
    client, ears = front
    clip = wav(tone(0.4, 8), subtype="FLOAT")
    (heard,) = ears.hear([np.frombuffer(clip[-4 * 6_400 :], np.float32)])
    assert heard.words and heard.labels()["emotion"] == "sad"
    seen = f"(the speaker's voice: gender female, emotion sad) {heard.words}\nhello"
    behind = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    options = {"max_tokens": 12, "stop": ["never said"]}
    talk = [{"role": "system", "content": "be brief"}]
    text = [*talk, user(seen)]
    expected = behind.chat.completions.create(model="tiny", messages=text, **options)
    sent = [*talk, user(audio_part(clip), "hello")]
    whole = client.chat.completions.create(model="ears", messages=sent, **options)
    assert whole.choices[0].message.content == expected.choices[0].message.content
    assert (whole.usage, whole.choices[0].finish_reason) == (expected.usage, "length")
    chunks = client.chat.completions.create(model="ears", messages=sent, stream=True, **options)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == expected.choices[0].message.content


def test_what_the_other_llm_refuses_is_passed_on(front):
    client, _ = front
    with pytest.raises(openai.BadRequestError, match=r"the LLM tiny refuses: .* together"):
        client.chat.completions.create(model="ears", messages=[user("x")], max_tokens=10**6)


def test_an_llm_that_is_not_there_and_one_that_breaks_off_are_told(serving_model, server, service, monkeypatch):
    ears = Ears(*serving_model)
    with running(make_app(Service("ears", ears, TextEngine("http://127.0.0.1:1/v1#x")))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="the LLM x does not answer") as refusal:
            client.chat.completions.create(model="ears", messages=[user("x")])
        assert refusal.value.status_code == 502
    with pytest.raises(ValueError, match="name the model behind a #"):
        TextEngine("http://127.0.0.1:1/v1")

    async def broken(self, turns, request):
        yield "half "
        raise RuntimeError("it crashed")

    monkeypatch.setattr(TransformersEngine, "stream", broken)
    ears = Ears(*serving_model)
    with running(make_app(Service("ears", ears, TextEngine(f"{server}/v1#tiny")))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        pieces = []
        with pytest.raises(openai.APIError, match="the server failed"):
            for chunk in client.chat.completions.create(model="ears", messages=[user("x")], stream=True):
                pieces.append(chunk.choices[0].delta.content)  # noqa: PERF401
        assert "".join(filter(None, pieces)) == "half "
        with pytest.raises(openai.InternalServerError, match="the server failed"):
            client.chat.completions.create(model="ears", messages=[user("x")])
