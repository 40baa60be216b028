"""The encoder's features on disk: what identifies them, what a build goes on with, what damage is told."""

import pytest
import torch
from world import world

from conftest import make_model, tone
from dual_slm.configuration_dual_slm import DualSLMConfig
from dual_slm.training.augmentation import augmented
from dual_slm.training.corpora.row import Row, Variant
from dual_slm.training.corpora.table import read_table
from dual_slm.training.features import FeatureStore


@pytest.fixture(scope="module", params=["paper", "letters"])
def clips(request, tiny_backbones, tmp_path_factory):
    """(model, processor, rows) of clips of several lengths."""
    folder = tmp_path_factory.mktemp("clips")
    world(folder, tiny_backbones, clips=6)
    return *make_model(tiny_backbones, kind=request.param), list(read_table(folder / "t.parquet"))


def test_features_are_known_by_content_and_survive_damage(clips, tmp_path):
    model, processor, rows = clips
    rows = [*rows[:5], rows[0].replace(id="same file"), rows[1].replace(variant=Variant(copy=1))]
    store = FeatureStore(tmp_path, model.config)
    assert len(store.missing(rows)) == 6
    store.build(rows, model, processor, workers=0)
    assert store.missing(rows) == []
    again = FeatureStore(tmp_path, model.config)
    assert again.missing(rows) == []
    assert torch.equal(again.get(rows[0]), store.get(rows[5]))
    assert not torch.equal(again.get(rows[1])[..., :5, :], again.get(rows[6])[..., :5, :])
    inputs = processor.extract_features([tone(0.5, 0)])
    with torch.inference_mode():
        states, lengths = model.encode_audio(**inputs, all_layers=False)
    assert store.length(rows[0]) == lengths.item()
    torch.testing.assert_close(store.get(rows[0]), states[0, -1], atol=0.15, rtol=0.1)  # encoded in bfloat16
    small = FeatureStore(tmp_path / "8", model.config, bits=8)
    small.build(rows[:3], model, processor, workers=0)
    scale = store.get(rows[2]).abs().max()
    assert (small.get(rows[2]) - store.get(rows[2])).abs().max() < scale / 50  # and the encoder rounds to bfloat16
    (shard,) = store.folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"the feature shard .* is damaged.*Delete it"):
        FeatureStore(tmp_path, model.config)


def test_keys_are_those_that_features_on_disk_have(tmp_path):
    """Digests of audio and variant, and of encoder and settings, as earlier versions wrote them."""
    (tmp_path / "a.wav").write_bytes(b"sound")
    row, config = Row("a", "c", "train", audio=str(tmp_path / "a.wav")), DualSLMConfig(audio_model_fingerprint="print")
    store, small = (FeatureStore(tmp_path, config, bits) for bits in (16, 8))
    assert [store.folder.name, small.folder.name] == ["b712ea6c0c59fac7", "38a0edb7d7aea811"]
    keys = {
        Variant(): "dd29442deca69f52c50006b831cb216e",
        Variant(copy=2): "3fae30540301b999fba00df78639b00c",
        Variant(copy=2, revoiced=True): "92d20d4113b8dcc161555bee0fae20c0",
        Variant(loudness=0.05): "1100089605229f6d647c451f82dcf968",
    }
    assert all(store.key(row.replace(variant=variant)) == key for variant, key in keys.items())
    with pytest.raises(ValueError, match="a has no audio"):
        store.key(row.replace(audio=None))


def test_a_clip_that_cannot_be_read_is_named_and_skipped_if_asked(clips, tmp_path):
    model, processor, rows = clips
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF" + bytes(40))
    rows = [rows[0], rows[1].replace(id="broken", audio=str(bad))]
    with pytest.raises(ValueError, match=r"broken: .*bad\.wav is not audio"):
        FeatureStore(tmp_path / "a", model.config).build(rows, model, processor, workers=0)
    kept = FeatureStore(tmp_path / "b", model.config).build(rows, model, processor, skip_damaged=True, workers=0)
    assert [row.id for row in kept] == ["0"]


def test_augmented_copies_that_share_a_clip_are_drawn_apart(clips, tmp_path):
    """The speed of a copy is drawn by its row, and so are its pitch and tempo: two rows of one clip need two features."""
    model, _, rows = clips
    store = FeatureStore(tmp_path, model.config)
    one, two = (augmented(rows[0].replace(id=name), 1) for name in "ab")
    assert store.key(one) != store.key(two)
    assert store.key(rows[0].replace(id="a")) == store.key(rows[0].replace(id="b"))


def test_a_feature_store_goes_on_where_it_stopped(clips, tmp_path, monkeypatch):
    model, processor, rows = clips
    rows = rows[:5]
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
        # Another batch has other padding, and bfloat16 rounds: the last bit of a half may differ.
        torch.testing.assert_close(whole.get(row), part.get(row), atol=0.1, rtol=0.05)
