"""Measured attributes, their classes, and captions."""

import random
import re

import numpy as np
import pytest

from dual_slm.training.attributes import Thresholds, classify, describe, label_row, measure, relabel, tertiles
from dual_slm.training.corpora.row import Row, make_row


def row(name: str, split: str = "train", **more) -> Row:
    return make_row(id=name, corpus="test", split=split, **more)


def test_pitch_energy_and_tempo_of_a_known_voice():
    """A 150 Hz pulse train of known power, one second within silence, over four words."""
    time = np.arange(16_000) / 16_000
    voice = sum(np.sin(2 * np.pi * 150 * k * time) / k for k in range(1, 12)).astype(np.float32)
    voice *= 0.1 / np.sqrt((voice**2).mean())
    clip = np.concatenate([np.zeros(8_000), voice, np.zeros(8_000)]).astype(np.float32)
    measured = measure(clip, 16_000, "one two three four")
    assert measured["pitch"] == pytest.approx(150, abs=3)
    assert measured["energy"] == pytest.approx(0.05, rel=0.1)  # half of the clip is silent
    assert measured["tempo"] == pytest.approx(0.25, rel=0.15)
    assert measure(np.zeros(16_000, np.float32), 16_000, "word")["pitch"] is None
    assert measure(voice, 16_000)["tempo"] is None


def test_classes_follow_the_published_borders():
    thresholds = Thresholds()
    low = classify({"pitch": 120.0, "energy": 0.02, "tempo": 0.2}, thresholds)
    high = classify({"pitch": 220.0, "energy": 0.06, "tempo": 0.5}, thresholds)
    assert low == {"pitch": "low", "energy": "low", "tempo": "fast"}
    assert high == {"pitch": "high", "energy": "high", "tempo": "slow"}
    assert classify({"pitch": 150.0, "energy": 0.04, "tempo": None}, thresholds) == {
        "pitch": "normal",
        "energy": "normal",
        "tempo": None,
    }


def test_what_the_corpus_says_stays_and_the_rest_is_filled_in():
    measured = row("a", tempo="fast", pitch_hz=250.0, energy_rms=0.01, seconds_per_word=0.5)
    labelled = label_row(measured, {"all": Thresholds()})
    assert (labelled.pitch, labelled.energy, labelled.tempo) == ("high", "low", "fast")
    assert label_row(measured, {"all": Thresholds()}, overwrite=True).tempo == "slow"
    assert label_row(measured.replace(caption="as written"), {"all": Thresholds()}).caption == "as written"


def test_a_checkpoints_borders_replace_labels_that_were_measured():
    measured = row("a", pitch="high", energy="low", pitch_hz=250.0, energy_rms=0.01, seconds_per_word=0.5)
    relabelled = relabel(measured, Thresholds(pitch=(300.0, 400.0)))
    assert (relabelled.pitch, relabelled.energy, relabelled.tempo) == ("low", "low", None)  # no tempo before, none now
    assert relabel(measured, None) == measured


def test_tertiles_cut_each_gender_into_thirds_of_the_training_rows():
    rows = []
    for n in range(90):
        for gender, base in (("female", 200.0), ("male", 100.0)):
            values = {"pitch_hz": base + n, "energy_rms": 0.01 + n / 1e4, "seconds_per_word": 0.2 + n / 1e3}
            rows.append(row(f"{gender}{n}", gender=gender, **values))
            rows.append(rows[-1].replace(id=f"t{gender}{n}", split="test", pitch_hz=999.0))
    borders = tertiles(rows)
    for gender, base in (("female", 200), ("male", 100)):
        assert borders[gender].pitch == pytest.approx((base + 89 / 3, base + 2 * 89 / 3), abs=0.1)
    with pytest.raises(ValueError, match="too few for tertiles"):
        tertiles(rows[:20])


def test_captions_say_what_is_known_and_nothing_else():
    known = {"gender": "male", "pitch": None, "tempo": "fast", "energy": None, "emotion": "angry"}
    captions = {describe(known, random.Random(seed)) for seed in range(40)}
    assert len(captions) == 4
    for caption in captions:
        words = caption.lower()
        assert "fast" in words
        assert "angry" in words
        assert "pitch" not in words
        assert "energy" not in words
    assert describe(dict.fromkeys(known), random.Random(0)) is None
    for name, label in {"gender": "male", "pitch": "low", "tempo": "slow", "energy": "high", "emotion": "sad"}.items():
        for seed in range(20):  # whichever one is known, the sentence holds together
            caption = describe(dict.fromkeys(known) | {name: label}, random.Random(seed))
            assert not re.search(r"\b(in|at|with|by) (in|at|with|by)\b|  |[,;:] ?[)\]]", caption), caption
