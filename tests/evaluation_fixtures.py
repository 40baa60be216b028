"""Fixtures of the evaluation's tests: a table, and systems that are evaluated once."""

from pathlib import Path

import pytest
from evaluated import ANSWERS, system_of, table

from conftest import make_model
from dual_slm.backbones_dual_slm import resolve_backbone
from dual_slm.training.evaluation.evaluate import evaluate


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return table(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def checkpoint(tiny_backbones, tmp_path_factory) -> str:
    """A real Whisper, whose decoder is the cascade's, a random LLM and random adapters of the warm start."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in make_model((resolve_backbone("whisper-tiny.en"), tiny_backbones[1]), kind="letters"):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def whole(checkpoint, data, tmp_path_factory) -> tuple[Path, dict]:
    """All suites of the checkpoint, two rows of each corpus and task."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, evaluate(checkpoint, [str(data)], folder, limit=2)


@pytest.fixture(scope="session")
def scripted(data, tmp_path_factory):
    """name -> (folder, report) of a scripted system; each is evaluated once."""
    found = {}

    def get(name: str) -> tuple[Path, dict]:
        if name not in found:
            folder, suites = tmp_path_factory.mktemp(name), ["asr", "attributes", "disentanglement"]
            found[name] = folder, evaluate(name, [str(data)], folder, suites, system=system_of(ANSWERS[name]))
        return found[name]

    return get
