"""Stage 0: its batches, masks and loop, and what the adapters hear after it."""

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from conftest import LABELS, make_model
from dual_slm.configuration_dual_slm import EMOSLLM_ADAPTERS
from dual_slm.training.augmentation import load_clip
from dual_slm.training.corpora.row import Row, make_row
from dual_slm.training.features import FeatureStore
from dual_slm.training.spelling import caption_targets
from dual_slm.training.warm_start import (
    Descent,
    batches_by_length,
    descend,
    mask_frames,
    read_labels,
    train_captions,
    train_letters,
    train_queries,
)


def test_batches_hold_every_clip_once_an_epoch_within_the_limit():
    lengths = np.random.default_rng(1).integers(5, 200, 300).tolist()
    batches = batches_by_length(lengths, 1_000, np.random.default_rng(0))
    seen = []
    while len(seen) < 300:
        batch = next(batches)
        assert max(lengths[i] for i in batch) * len(batch) <= 1_000
        seen += batch
    assert sorted(seen) == list(range(300))


def test_masks_hide_time_and_if_strong_channels():
    states, lengths = torch.full((3, 240, 64), 5.0), torch.tensor([240, 120, 60])
    for strong in (False, True):
        masked, again = (mask_frames(states, lengths, torch.Generator().manual_seed(1), strong) for _ in range(2))
        assert torch.equal(masked, again)
        hidden = masked == 0
        assert hidden.all(2).any(1).all()  # some frames of each clip
        assert hidden.all(1).any() == strong  # some channels
        assert (masked[~hidden] - 5).abs().mean() == pytest.approx(0.08, abs=0.01)  # a little noise
    assert not states[states != 5].any()


class _Killed(Exception):
    pass


def test_a_resumed_descent_ends_in_the_same_bits(tmp_path):
    """Dropout, draws, batches, optimiser and schedule go on where they were."""

    def run(checkpoint=None, kill_at=None) -> tuple[list, dict]:
        torch.manual_seed(0)
        adapter = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        batches = batches_by_length([3] * 8, 6, np.random.default_rng(0))

        def evaluate(step: int) -> dict:
            assert not adapter.training
            if step == kill_at:
                raise _Killed
            return {"step squared": step**2}

        def loss(generator: torch.Generator) -> torch.Tensor:
            inputs = torch.randn(4, 4, generator=generator) + torch.tensor(next(batches)).sum()
            return (adapter(inputs) - 1).pow(2).mean()

        args = Descent(20, 1e-2, 4, seed=3, evaluate=evaluate, evaluate_every=6, checkpoint=checkpoint)
        log = descend(adapter, optimizer, loss, args, "test", lambda count: [next(batches) for _ in range(count)])
        return log, adapter.state_dict()

    log, whole = run()
    assert [entry["step"] for entry in log] == [6, 12, 18, 20]
    assert log[1] == {"stage": "test", "step": 12, "loss": log[1]["loss"], "step squared": 144}
    checkpoint = tmp_path / "stage-0" / "test.pt"
    with pytest.raises(_Killed):
        run(checkpoint, kill_at=18)
    assert torch.load(checkpoint, weights_only=True)["step"] == 12
    again, resumed = run(checkpoint)
    assert again == log
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert run(checkpoint)[0] == log  # nothing is left to do


def test_the_rate_warms_up_and_falls_to_a_fiftieth():
    args = Descent(100, warmup=10)
    assert [args.rate(step) for step in (0, 9, 10)] == [0.1, 1.0, 1.0]
    assert args.rate(55) == pytest.approx(0.51)
    assert args.rate(100) == pytest.approx(0.02)
    assert Descent(5, warmup=0).rate(0) == 1.0


def test_a_descent_stops_where_the_loss_is_not_finite():
    adapter = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1 of stage 0, test"):
        descend(adapter, optimizer, lambda _: adapter.weight.sum() * torch.nan, Descent(3), "test")
    assert torch.isfinite(adapter.weight).all()


def melodies(folder) -> list[Row]:
    """Two melodies that stand for two words, two voices and two moods."""
    time, rows = np.arange(4_800) / 16_000, []
    for word, gender, emotion, pitches in (
        ("fox", "female", "sad", [300, 2500, 700, 5000, 150]),
        ("dog", "male", "happy", [4000, 200, 6000, 1000, 2000]),
    ):
        path = folder / f"{word}.wav"
        samples = np.concatenate([0.3 * np.sin(2 * np.pi * pitch * time) for pitch in pitches])
        soundfile.write(path, samples.astype(np.float32), 16_000)
        known = {"split": "train", "audio": str(path), "transcript": word, "gender": gender, "emotion": emotion}
        rows.append(make_row(id=word, corpus="c", **known))
    return rows


@pytest.mark.slow
def test_the_warm_start_teaches_both_adapters_and_no_backbone(tiny_backbones, tmp_path):
    """After training both are heard, read from the cache as from the audio."""
    model, processor = make_model(tiny_backbones, kind="letters", linguistic_dropout=0.0)
    rows = melodies(tmp_path)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    store = FeatureStore(tmp_path / "cache", model.config)
    store.build(rows, model, processor, workers=0)
    train_letters(model, store, rows, Descent(800, 5e-3, warmup=5))  # masks hide a quarter of it
    train_captions(model, store, rows, caption_targets(rows, processor), Descent(150), batch_size=8)

    for row in rows:
        inputs = processor.extract_features([load_clip(row)])
        with torch.inference_mode():
            (heard,) = processor.decode_audio(model.get_audio_features(**inputs))
        assert heard["heard"] == row.transcript
        for name in LABELS:
            assert max(heard["attributes"][name], key=heard["attributes"][name].get) == row.label(name)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_transcripts_that_do_not_fit_their_audio_teach_nothing(tiny_backbones, tmp_path):
    model, processor = make_model(tiny_backbones, kind="letters")
    rows = [row.replace(transcript="the quick brown fox " * 20) for row in melodies(tmp_path)]
    store = FeatureStore(tmp_path / "cache", model.config)
    store.build(rows, model, processor, workers=0)
    with pytest.raises(ValueError, match="none of the 2 rows has a transcript that its audio has room for"):
        train_letters(model, store, rows, Descent(1))
    rows[0] = rows[0].replace(transcript="(no speech)")
    assert train_letters(model, store, rows, Descent(1))[0]["step"] == 1


def test_queries_learn_the_labels_without_the_llm(tiny_backbones, tmp_path):
    small = {"num_paralinguistic_tokens": 4, "paralinguistic_num_heads": 4, "paralinguistic_hidden_size": 32}
    small |= {"attribute_labels": LABELS, "lora_config": None, "encoder_padding": "real"}
    model, processor = make_model(tiny_backbones, **(EMOSLLM_ADAPTERS | small))
    rows = melodies(tmp_path)
    store = FeatureStore(tmp_path / "cache", model.config)
    store.build(rows, model, processor, workers=0)
    model.language_model.forward = None
    args = Descent(40, 3e-3, 5, evaluate=lambda _: read_labels(model, store, rows, processor), evaluate_every=20)
    log = train_queries(model, store, rows, processor, args, batch_size=8)
    assert log[-1]["stage"] == "queries" and log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["gender"] == log[-1]["emotion"] == 1.0
    bias = model.paralinguistic_adapter.output.bias.clone()
    train_queries(model, store, rows, processor, Descent(1, 0.0), fresh=False)
    assert torch.equal(bias, model.paralinguistic_adapter.output.bias)  # it goes on as it was
