"""Classifiers on features and on replies."""

import numpy as np
import pytest
import soundfile
from evaluated import figure, records_of, system_of

from conftest import make_model, tone
from dual_slm.training.corpora.row import make_row
from dual_slm.training.corpora.table import write_table
from dual_slm.training.evaluation import probes
from dual_slm.training.evaluation.evaluate import evaluate
from dual_slm.training.evaluation.systems import Checkpoint

pytest_plugins = ["evaluation_fixtures"]


def feeling(query) -> str:
    """Replies to the mood that it is told of or hears."""
    paralinguistic, _ = query.sources()
    if paralinguistic == "none":
        return "I see, thank you for telling me."
    return {"happy": "What wonderful news!", "sad": "I am so sorry to hear it."}[query.voice.emotion]


def test_replies_to_two_styles_are_told_apart_where_the_system_hears_them(data, tmp_path):
    """Taught by replies to the training speakers' text twins alone; the same words without the voice are chance."""
    result = evaluate("feeling", [str(data)], tmp_path / "a", ["style"], system=system_of(feeling))
    place = ("style", "acted", "emotion by the reply")
    assert figure(result, *place, "P&L", "accuracy")["value"] == 1
    assert figure(result, *place, "caption and text", "accuracy")["value"] == 1
    assert figure(result, *place, "L only", "accuracy")["value"] == 0.5
    asked = records_of(tmp_path / "a", "style")
    assert {r["label"] for r in asked} == {"happy", "sad"} and {r["corpus"] for r in asked} == {"acted"}
    assert not any("training" in r["condition"] for r in asked)

    def deaf(query):
        return "I see." if query.sources()[0] == "speech" else feeling(query)

    result = evaluate("deaf", [str(data)], tmp_path / "b", ["style"], system=system_of(deaf))
    assert figure(result, *place, "P&L", "accuracy")["value"] == 0.5


def spread_tells(model, monkeypatch):
    """The encoder's states, standardised over time; long clips have twice the spread in half of a middle layer."""
    encode = model.encode_audio

    def made(*args, all_layers=None, **inputs):
        states, lengths = encode(*args, all_layers=True, **inputs)
        for clip, length in zip(states, lengths.tolist(), strict=True):
            real = clip[:, :length]
            real -= real.mean(1, keepdim=True)
            real /= real.std(1, correction=0, keepdim=True) + 1e-6
            real[1, :, :16] *= 2 if length > 40 else 1
        reads_all = model.config.paralinguistic_layer_mix if all_layers is None else all_layers
        return (states if reads_all else states[:, -1:]), lengths

    monkeypatch.setattr(model, "encode_audio", made)


READS = {
    "statistics": {"kind": "letters"},
    "all layers": {"paralinguistic_adapter_type": "query", "paralinguistic_layer_mix": True},
    "the last layer": {},
}


@pytest.mark.parametrize("reads", READS)
def test_the_probe_of_the_statistics_finds_a_label_in_the_spread_of_a_middle_layer(
    reads, tiny_backbones, tmp_path, monkeypatch
):
    """The probe of the last layer's mean cannot. Nor can that of the statistics, if the adapter reads no other layer."""
    fields = READS[reads] | {"encoder_padding": "real", "paralinguistic_hidden_size": 32}
    model, processor = make_model(tiny_backbones, **fields)
    spread_tells(model, monkeypatch)
    rows = []
    for n in range(24):
        long, audio = n % 2, str(tmp_path / f"{n}.wav")
        soundfile.write(audio, tone(0.6 + 0.4 * long, n), 16_000)
        known = {"audio": audio, "duration": 0.6 + 0.4 * long, "emotion": ("calm", "angry")[long]}
        known |= {"gender": ("female", "male")[long], "split": "train" if n < 16 else "test"}
        rows.append(make_row(id=str(n), corpus="c", speaker=str(n), **known))
    write_table(rows, tmp_path / "t.parquet")
    monkeypatch.setattr(Checkpoint, "hear", lambda self, rows: [{"heard": None, "attributes": None}] * len(rows))
    system = Checkpoint(model, processor, tmp_path / "features")
    suites = ["hearing", "attributes"] if reads == "statistics" else ["hearing"]
    result = evaluate("made", [str(tmp_path / "t.parquet")], tmp_path / "out", suites, system=system)
    for suite in suites:
        for task in ("gender", "emotion", "emotion, equal loudness"):
            place = (suite, "c", task, "linear probe of the statistics", "accuracy")
            found = figure(result, *place)
            assert found["samples"] == 8
            assert found["value"] < 0.8 if reads == "the last layer" else found["value"] == 1
            assert (
                figure(result, *place[:3], "linear probe of the encoder", "accuracy")["value"] < 0.8
            )  # chance is 0.5


def test_a_probe_of_a_large_corpus_takes_a_part_of_each_corpus(monkeypatch, paper, tmp_path):
    rows = [
        make_row(id=str(n), corpus="ab"[n % 2], split="train", gender=("female", "male")[n // 2 % 2])
        for n in range(40)
    ]
    seen = []

    def vectors(system, rows, source):
        seen.extend(rows)
        return np.eye(len(rows))

    monkeypatch.setattr(probes, "vectors", vectors)
    monkeypatch.setattr(probes, "MOST_CLIPS", 6)
    test = make_row(id="t", corpus="a", split="test", gender="male")
    list(probes.probe(Checkpoint(*paper, tmp_path), rows, [test], "hearing", ["encoder"]))
    taken = [row.corpus for row in seen[:-1]]
    assert (taken.count("a"), taken.count("b"), seen[-1].id) == (6, 6, "t")
