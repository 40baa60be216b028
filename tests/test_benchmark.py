"""Benchmarks of a reply and of a training step run, and their figures belong together."""

import pytest

from conftest import make_model
from dual_slm.training import benchmark


@pytest.fixture
def small(tiny_backbones):
    return make_model(tiny_backbones, kind="letters", encoder_padding="real")


def test_a_reply_is_timed_beside_the_same_text(small, monkeypatch):
    monkeypatch.setattr(benchmark, "TURNS", 2)
    result = benchmark.benchmark_reply(*small, seconds=1.0, repeats=2, new_tokens=2)
    parts = result["spoken"]["parts"]
    assert tuple(parts) == benchmark.PARTS and all(seconds > 0 for seconds in parts.values())
    assert len(result["turns"]) == 2
    assert small[0].config.encoder_padding == "real"  # as before the padded encoder was timed
    shown = benchmark.show(result)
    assert "s to first token" in shown and "a conversation, s to the first token: turn 1" in shown


@pytest.mark.slow
def test_a_training_step_is_timed_beside_the_unoptimised_one(small, monkeypatch):
    monkeypatch.setattr(benchmark, "BUCKET_SPAN", 4)
    result = benchmark.benchmark_train(*small, steps=3, batch_size=2)
    assert result["samples a step"] == 2
    assert sum(value for name, value in result.items() if name.startswith("share of")) == pytest.approx(100)
    ratio = result["unoptimised seconds a step"] / result["seconds a step"]
    assert result["times as fast as unoptimised"] == pytest.approx(ratio)
    assert small[0].config.encoder_padding == "real" and not small[0].training
