"""The warm start's parts, and the voices it learns from."""

import json
import math
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from scipy.signal import lfilter

from conftest import LABELS, make_model, tone
from dual_slm.modeling_dual_slm import masked_statistics
from dual_slm.training.attributes import Thresholds, classify, measure
from dual_slm.training.cli import _TUNABLES
from dual_slm.training.corpora.folder import read_folder
from dual_slm.training.corpora.schema import make_row
from dual_slm.training.corpora.synthesis import build_nonspeech, degrade, span
from dual_slm.training.features import FeatureStore, augmented, load_row, other_voice
from dual_slm.training.warm_start import (
    Letters,
    Speller,
    batches_by_length,
    caption_targets,
    draw_pieces,
    label_losses,
    normalize,
    nothing_said,
    train_linguistic,
    train_paralinguistic,
)


def write_corpus(root, clips: dict[str, dict]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, row in clips.items():
        samples = row.pop("samples")
        if samples is not None:
            soundfile.write(root / name, samples, 16_000)
        lines.append(json.dumps({"file": name, **row}))
    (root / "metadata.jsonl").write_text("\n".join(lines))


# ---- attributes ------------------------------------------------------------------------------------------------------


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


# ---- synthesis -------------------------------------------------------------------------------------------------------


def test_degraded_audio_is_a_function_of_its_seed_and_never_clips():
    for seed in range(12):
        first, again = (degrade(tone(0.5), np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(first, again)
        assert np.abs(first).max() <= 1
    assert not np.array_equal(first, degrade(tone(0.5), np.random.default_rng(99)))


def test_spans_are_runs_of_the_sentence():
    sentence = "one two three four five six seven eight nine ten"
    rng = np.random.default_rng(0)
    spans = [span(sentence, rng, 2, 5) for _ in range(50)]
    assert all(part in sentence and 2 <= len(part.split()) <= 5 for part in spans)
    assert len(set(spans)) > 10


def test_augmented_copies_differ_and_repeat(tmp_path):
    write_corpus(tmp_path, {"a.wav": {"samples": tone(0.5), "split": "train"}})
    (row,) = read_folder(tmp_path)
    first, second = load_row(row | {"augment": 1}), load_row(row | {"augment": 2})
    assert np.array_equal(first, load_row(row | {"augment": 1}))
    assert len(first) != len(second)
    np.testing.assert_allclose(load_row(row), tone(0.5), atol=1e-4)


def test_labels_of_an_augmented_copy_are_what_is_true_of_it():
    """Pitch and tempo follow the speed of the copy, energy is not known any more; words, speaker and emotion stay."""
    row = make_row(
        id="a", corpus="c", split="train", transcript="one two", pitch="normal", tempo="normal", energy="low"
    )
    row |= {"gender": "male", "emotion": "sad", "pitch_hz": 190.0, "seconds_per_word": 0.26, "energy_rms": 0.01}
    speeds, tone_hz = set(), 200.0
    for copy in range(1, 9):
        changed = augmented(row, copy, Thresholds())
        speed = changed["pitch_hz"] / row["pitch_hz"]
        speeds.add(speed)
        assert changed["seconds_per_word"] == pytest.approx(0.26 / speed)
        assert changed["pitch"] == ("high" if 190 * speed > Thresholds().pitch[1] else "normal")
        assert changed["tempo"] == ("fast" if 0.26 / speed < Thresholds().tempo[0] else "normal")
        assert changed["energy"] is None and changed["caption"] is None and changed["energy_rms"] is None
        assert (changed["emotion"], changed["gender"], changed["transcript"]) == ("sad", "male", "one two")
        assert augmented(row, copy)["pitch"] is None  # without borders there is no label
        assert abs(tone_hz * speed - tone_hz) < 0.16 * tone_hz
    assert len(speeds) == 8


def test_the_speed_of_a_copy_is_that_of_its_audio(tmp_path):
    """A tone's frequency in the augmented audio says by how much it was sped up."""
    time = np.arange(32_000) / 16_000
    write_corpus(tmp_path, {"a.wav": {"samples": 0.5 * np.sin(2 * np.pi * 440 * time).astype(np.float32)}})
    (row,) = read_folder(tmp_path)
    row["pitch_hz"] = 440.0
    for copy in (1, 2, 3):
        samples = load_row(augmented(row, copy))
        spectrum = np.abs(np.fft.rfft(samples))
        heard = 16_000 * int(spectrum[len(samples) // 100 :].argmax() + len(samples) // 100) / len(samples)
        assert heard == pytest.approx(augmented(row, copy)["pitch_hz"], rel=0.01)


def test_a_copy_in_another_voice_has_the_pitch_the_formants_and_the_tempo_that_it_says(tmp_path):
    """A vowel of one formant: its pitch is measured, its formant is where the spectrum is strongest."""
    rate, pulses = 16_000, np.zeros(32_000, np.float32)
    pulses[:: rate // 125] = 1.0  # a voice of 125 Hz
    formant = lfilter([1.0], [1.0, -2 * 0.98 * np.cos(2 * np.pi * 1_000 / rate), 0.98**2], pulses)
    vowel = (0.1 * formant / np.abs(formant).max()).astype(np.float32)
    for formants, pitch, tempo in ((1.2, 1.0, 1.0), (1.0, 1.3, 1.0), (1.0, 1.0, 0.9), (0.85, 1.2, 1.1)):
        voice = other_voice(vowel, rate, formants, pitch, tempo)
        assert len(voice) == pytest.approx(len(vowel) / tempo, rel=0.01)
        assert measure(voice, rate)["pitch"] == pytest.approx(125 * pitch, rel=0.03)
        power = np.abs(np.fft.rfft(voice[4_000:-4_000])) ** 2
        frequencies = np.fft.rfftfreq(len(voice) - 8_000, 1 / rate)
        near = np.abs(frequencies - 1_000 * formants) < 1.5 * 125 * pitch  # a harmonic stands there
        assert near[power.argmax()]
    write_corpus(tmp_path, {"a.wav": {"samples": vowel, "split": "train"}})
    (row,) = read_folder(tmp_path)
    row |= {"gender": "male", "emotion": "sad", "pitch_hz": 125.0, "seconds_per_word": 0.3}
    copies = [augmented(row, n, Thresholds(), revoice=True) for n in range(1, 5)]
    assert len({copy["pitch_hz"] for copy in copies}) == 4
    for copy in copies:
        assert (copy["gender"], copy["emotion"], copy["energy"]) == (None, "sad", None)
        assert len(load_row(copy)) == pytest.approx(32_000 * copy["seconds_per_word"] / 0.3, rel=0.01)
    assert not np.array_equal(load_row(copies[0]), load_row(augmented(row, 1)))
    silence = other_voice(np.zeros(3_200, np.float32), rate, 1.1, 0.9, 1.0)  # no voice to change
    assert np.isfinite(silence).all() and np.abs(silence).max() < 1e-3


def test_clips_without_speech_repeat_and_say_nothing(tmp_path):
    for name in "ab":
        build_nonspeech(tmp_path / name, 12, seed=5)
    rows = read_folder(tmp_path / "a")
    assert [row["split"] for row in rows].count("train") == 10 and rows[-1]["split"] == "test"
    for row in rows:
        samples, rate = soundfile.read(row["audio"])
        other, _ = soundfile.read(row["audio"].replace("/a/", "/b/"))
        assert np.array_equal(samples, other) and rate == 16_000 and 1 <= len(samples) / rate <= 12
        assert normalize(row["transcript"]) == [] and nothing_said(row["transcript"])
    assert not nothing_said("42") and not nothing_said("well (laughs)")
    assert normalize("dated (which also was printed)") == ["dated", "which", "also", "was", "printed"]


# ---- spelling and batches --------------------------------------------------------------------------------------------


def test_words_are_spelled_exactly_by_few_or_many_pieces(warm):
    _, processor = warm
    words = {"the": 9, "quick": 5, "brown": 4, "fox": 4, "lazy": 2, "dog": 2, "emotion": 1}
    for size in (31, 90):
        speller = Speller(processor.tokenizer, words, size)
        assert len(speller.token_ids) == len(set(speller.token_ids)) <= size
        for word in [*words, "zebra", "it's"]:
            tokens = [speller.token_ids[i] for i in speller.spell(word)]
            assert processor.tokenizer.decode(tokens) == " " + word
    few, many = (Speller(processor.tokenizer, words, size) for size in (31, 120))
    assert len(many("the quick brown fox")) < len(few("the quick brown fox"))


def test_only_what_can_be_heard_is_spelled():
    assert normalize("“Well,” she said: it’s TWENTY-SEVEN … o'clock!") == [
        "well",
        "she",
        "said",
        "it's",
        "twenty",
        "seven",
        "o'clock",
    ]


def test_batches_hold_every_clip_once_an_epoch_within_the_limit():
    lengths = np.random.default_rng(1).integers(5, 200, 300).tolist()
    batches = batches_by_length(lengths, 1_000, np.random.default_rng(0))
    seen = []
    while len(seen) < 300:
        batch = next(batches)
        assert max(lengths[i] for i in batch) * len(batch) <= 1_000
        seen += batch
    assert sorted(seen) == list(range(300))


def test_a_sampled_softmax_stands_for_the_whole():
    """All that is said is there, and the sum over the drawn pieces is on average the sum over all."""
    generator = torch.Generator().manual_seed(0)
    logits, spelled = torch.randn(500, generator=generator), torch.tensor([3, 77, 3, 410])
    whole, found = logits.exp().sum(), []
    for _ in range(400):
        pieces, offset = draw_pieces(spelled, 500, 40, generator)
        assert set(spelled.tolist()) <= set(pieces.tolist()) and len(set(pieces.tolist())) == 43
        assert not offset[torch.isin(pieces, spelled)].any()
        found.append((logits[pieces] + offset).exp().sum())
    assert torch.stack(found).mean().item() == pytest.approx(whole.item(), rel=0.03)
    pieces, offset = draw_pieces(spelled, 500, 0, generator)
    assert torch.equal(pieces, torch.arange(500)) and not offset.any()


def test_the_loss_of_labels_is_least_for_the_right_rows_and_nothing_where_none_is_known():
    anchors = [torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])]
    targets = torch.tensor([[0, 2], [1, -100], [-100, -100]])
    right = torch.stack([torch.stack([anchors[0][a], anchors[1][b]]) for a, b in ((0, 2), (1, 0), (0, 0))])
    losses = label_losses(right.repeat(1, 3, 1), targets, anchors)  # six outputs, dealt out to two attributes
    # No distance is left. The first attribute's entropy: logits 40 and 0, 5 % of it smoothed to both labels.
    assert losses[1].item() == pytest.approx(0.025 * 40, abs=1e-3)
    assert losses[2].item() == 0.0
    wrong = right.flip(1).repeat(1, 3, 1)
    assert (label_losses(wrong, targets, anchors)[:2] > losses[:2]).all()
    half = torch.ones(
        1, 6, 2, requires_grad=True
    )  # both labels of the first attribute as likely, at the distance sqrt(2)
    (loss,) = label_losses(half, targets[1:2], anchors)
    assert loss.item() == pytest.approx(math.log(2) + 2 / 2)
    loss.backward()
    assert half.grad[0, ::2].any() and not half.grad[0, 1::2].any()


def test_dynamics_tell_fast_change_from_slow():
    """The same frames in another order have the same mean and deviation, and other steps; padding does not count."""
    ramp = torch.linspace(-1, 1, 40)
    shuffled = ramp[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    states = torch.zeros(2, 1, 50, 3)
    states[:, 0, :40] = torch.stack([ramp, shuffled])[..., None]
    states[:, 0, 40:] = 9.0
    smooth, rough = masked_statistics(states, torch.tensor([40, 40]), dynamics=True)[:, 0, 6:]
    torch.testing.assert_close(smooth, torch.full((3,), 2 / 39))
    assert (rough > 5 * smooth).all()
    plain = masked_statistics(states, torch.tensor([40, 40]))
    torch.testing.assert_close(plain[0], plain[1])


# ---- warm start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["warm", "letters"])
def test_the_warm_start_teaches_both_adapters_and_no_backbone(kind, tiny_backbones, tmp_path):
    """Two melodies that stand for two words: after training both are heard, read from the cache as from the audio."""
    model, processor = make_model(tiny_backbones, kind=kind, encoder_padding="real", linguistic_dropout=0.0)
    time = np.arange(4_800) / 16_000
    melodies = [[300, 2500, 700, 5000, 150], [4000, 200, 6000, 1000, 2000]]
    up, down = (np.concatenate([0.3 * np.sin(2 * np.pi * f * time) for f in m]).astype(np.float32) for m in melodies)
    clips = {
        "up.wav": {"samples": up, "text": "fox", "gender": "female", "emotion": "sad", "split": "train"},
        "down.wav": {"samples": down, "text": "dog", "gender": "male", "emotion": "happy", "split": "train"},
    }
    write_corpus(tmp_path / "corpus", clips)
    rows = read_folder(tmp_path / "corpus")
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}

    speller = Letters(model.config.linguistic_letters)
    if kind == "warm":
        speller = Speller(processor.tokenizer, {"the": 3, "fox": 2, "lazy": 2, "dog": 2}, 60)
    store = FeatureStore(tmp_path / "cache", model.config)
    store.build(rows, model, processor, workers=0)
    train_linguistic(model, store, rows, speller, 800, learning_rate=5e-3, warmup=5)  # masks hide a quarter of it
    train_paralinguistic(model, store, rows, caption_targets(rows, processor), 150, batch_size=8)

    for row in rows:
        inputs = processor.extract_features([load_row(row)])
        with torch.inference_mode():
            (heard,) = processor.decode_audio(model.get_audio_features(**inputs))
        assert heard["heard"] == row["transcript"]
        for name in LABELS:
            assert max(heard["attributes"][name], key=heard["attributes"][name].get) == row[name]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_feature_store_goes_on_where_it_stopped(tiny_backbones, tmp_path, monkeypatch):
    model, processor = make_model(tiny_backbones, kind="warm")
    clips = {f"{i}.wav": {"samples": tone(0.3 + 0.1 * i, i), "text": "fox", "split": "train"} for i in range(5)}
    write_corpus(tmp_path / "corpus", clips)
    rows = read_folder(tmp_path / "corpus")
    monkeypatch.setattr("dual_slm.training.features.SHARD", 2)
    stores = []
    for name in "ab":
        stores.append(FeatureStore(tmp_path / name, model.config))
        stores[-1].build(rows, model, processor, workers=0)
    whole, part = stores
    shards = sorted(part.folder.glob("*.safetensors"))
    assert len(shards) == 3
    shards[1].unlink()
    shards[2].with_suffix(".part1").write_bytes(b"half a shard")
    times = {path: path.stat().st_mtime_ns for path in (shards[0], shards[2])}
    part = FeatureStore(tmp_path / "b", model.config)
    assert 0 < len(part.missing(rows)) < 5
    part.build(rows, model, processor, workers=0)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    for row in rows:
        # Another batch pads otherwise, and bfloat16 rounds: the last bit of a half may differ.
        torch.testing.assert_close(whole.get(row), part.get(row), atol=0.1, rtol=0.05)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator that is tuned is glibc's")
def test_holes_in_the_heap_are_given_back():
    """As `dual-slm train` sets the allocator, freed tensors between used ones stay with the process until it is told."""
    code = """
import psutil, torch
from dual_slm.training.warm_start import trim_heap
kept = [torch.ones(2**20) for _ in range(200)]  # 4 MiB each
del kept[:-1:2]
before = psutil.Process().memory_info().rss
trim_heap()
print(before - psutil.Process().memory_info().rss)
assert all(float(tensor.sum()) == 2**20 for tensor in kept)
"""
    environment = os.environ | {"GLIBC_TUNABLES": _TUNABLES}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 250 * 2**20  # of 400 MiB
