"""From replies to labels, words and scores."""

import json
import random

import jiwer
import pytest
from test_tasks import CHOICES, row

from dual_slm.training.files import ASSETS
from dual_slm.training.parsing import normalizer, parse_label, parse_transcript, score, word_errors
from dual_slm.training.tasks import make_sample


@pytest.mark.parametrize("task", ["gender", "tempo", "emotion"])
def test_every_answer_parses_back_to_its_label(task):
    """The targets and the parser that scores replies agree."""
    for epoch in range(60):
        sample = make_sample(row(), task, CHOICES, epoch=epoch)
        assert sample.kind == "paralinguistic"
        assert parse_label(sample.target, sample.choices) == sample.label == row().label(task)
        instruction = json.dumps(sample.messages)
        assert all(choice in instruction for choice in sample.choices)


def test_every_transcript_answer_parses_back():
    targets = {make_sample(row(), "asr", CHOICES, epoch=epoch).target for epoch in range(60)}
    assert len(targets) == 2
    assert {parse_transcript(target) for target in targets} == {"i passed it"}


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("The speaker sounds sad.", "sad"),
        ("Sadness.", "sad"),
        ("HAPPY", "happy"),
        ("The speaker is not happy.", None),
        ("Either sad or angry.", None),
        ("angry, happy, sad", None),
        ("I cannot tell.", None),
        ("", None),
        ("She sounds unhappy.", None),
        ("It isn't really angry.", None),
        ("The emotion is angry. It is angry.", "angry"),
    ],
)
def test_a_reply_names_one_label_or_is_unparsed(reply, label):
    assert parse_label(reply, ["angry", "happy", "sad"]) == label


def test_labels_inside_other_words_do_not_count():
    assert parse_label("A female voice.", ["female", "male"]) == "female"
    assert parse_label("A woman.", ["female", "male"]) == "female"
    assert parse_label("The high-pitch voice is fast.", ["high", "low"]) == "high"
    assert parse_label("an unfriendly tone", ["friendly", "unfriendly"]) == "unfriendly"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("the cat sat", "the cat sat"),
        ('The speaker says: "the cat sat"', "the cat sat"),
        ('"the cat sat"', "the cat sat"),
        ('he said "go" and left', 'he said "go" and left'),
    ],
)
def test_words_of_an_asr_reply(reply, words):
    assert parse_transcript(reply) == words


def test_word_errors_are_those_of_a_hand_and_of_jiwer():
    assert word_errors("It's Mr. Smith!", "it is mister smith") == (0, 4)
    assert word_errors("I have twenty three cats.", "i have 23 cats") == (0, 4)
    assert word_errors("the cat sat", "The hat sat down.") == (2, 3)
    assert word_errors("the cat sat", "cat") == (2, 3)
    assert word_errors("", "hello there") == (2, 0)
    assert word_errors("hello there", "...") == (2, 2)
    rng, lines = random.Random(0), (ASSETS / "small_talk.txt").read_text(encoding="utf-8").splitlines()
    for said in lines:
        words = said.split()
        heard = " ".join(rng.choice([w, w, "fox", f"{w} don't"]) for w in words if rng.random() > 0.2).upper() + "!"
        errors, _ = word_errors(said, heard)
        reference, reply = normalizer()(said), normalizer()(heard)
        assert errors / len(reference.split()) == pytest.approx(jiwer.wer(reference, reply))


def test_a_reply_is_scored_by_its_task():
    heard = score(make_sample(row(), "asr", CHOICES), "I passed!", "i passed it")
    assert heard == {"said": "i passed it", "heard": "I passed!", "errors": 1, "words": 3}
    named = score(make_sample(row(), "emotion", CHOICES), "A happy voice.")
    assert named == {"label": "sad", "parsed": "happy", "choices": ["angry", "happy", "sad"]}
    assert score(make_sample(row(), "dialogue", CHOICES), "Well done.") == {}
