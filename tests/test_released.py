"""The tables and the model cards of the released checkpoints."""

import gzip
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SHARED_DATA
from dual_slm.training import released
from dual_slm.training.provenance import SAME_WORDS, SHORT
from dual_slm.training.stats import leaks
from dual_slm.training.text import word_tuple


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="real speech is not here")
def test_the_released_tables_share_no_speaker_between_splits():
    tables = released.recorded(SHARED_DATA, list(released.FOLDERS))
    rows = [row for rows in tables.values() for row in rows]
    assert leaks(rows)[0] == []
    assert len({row.key for row in rows}) == len(rows) > 3_000
    held_out = {row.speaker for row in tables["librispeech_subset"] if row.split == "test"}
    assert len(held_out) == 27


def test_texts_of_trained_speakers_are_spoken_by_subset_and_never_held_out(tmp_path):
    """26 and 2033 have training clips. 2033 reads test-other, so none of its other texts is used, and none is held out."""
    (tmp_path / "SPEAKERS.TXT").write_text(
        "; ID\n26 | M | train-clean-100\n2033 | F | test-other\n19 | F | train-clean-100\n"
    )
    with gzip.open(tmp_path / "transcripts_all.txt.gz", "wt") as file:
        file.write("26-1-0000 OF THE FIRST\n2033-1-0000 OF THE SECOND\n19-1-0000 OF THE THIRD\n")
    texts, others = released._librispeech_texts(tmp_path, {"librispeech_26", "librispeech_2033"})
    assert (texts, others) == (["OF THE FIRST"], ["OF THE THIRD"])


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="real speech is not here")
def test_no_training_clip_says_what_is_held_out():
    rows = [
        row for rows in released.recorded(SHARED_DATA, [*released.FOLDERS, *released.TESTS]).values() for row in rows
    ]
    texts = {row.transcript for row in rows if row.split == "train" and row.corpus not in SAME_WORDS}
    held_out = {words for words in map(word_tuple, released.texts_by_use(SHARED_DATA)[1]) if len(words) >= SHORT}
    assert not [text for text in texts if text and word_tuple(text) in held_out]


def test_a_model_card_of_the_repository_links_to_its_modules(tmp_path, monkeypatch):
    """Large matrices are in half precision; elsewhere the modules are files. What a link points to is never written."""
    root, final = tmp_path / "repository", tmp_path / "run/final"
    (root / "model_cards").mkdir(parents=True)
    final.mkdir(parents=True)
    (root / "modeling_dual_slm.py").write_text("# the module\n")
    for name in ("modeling_dual_slm.py", "config.json"):
        (final / name).write_text("{}")
    tensors = {"large": torch.randn(513, 512), "small": torch.randn(8, 8), "ids": torch.arange(2**19).reshape(2, -1)}
    save_file(tensors, final / "model.safetensors")
    monkeypatch.setattr(released, "ROOT", root)
    card, elsewhere = root / "model_cards/small", tmp_path / "elsewhere/small"
    for folder in (card, card, elsewhere):
        released.release(tmp_path / "run", folder)
    assert (card / "modeling_dual_slm.py").readlink() == Path("../../modeling_dual_slm.py")
    assert (card / "modeling_dual_slm.py").read_text() == "# the module\n"
    assert (elsewhere / "modeling_dual_slm.py").read_text() == "{}"
    assert not any(path.is_symlink() for path in (card / "config.json", elsewhere / "modeling_dual_slm.py"))
    kinds = {name: tensor.dtype for name, tensor in load_file(card / "model.safetensors").items()}
    assert kinds == {"large": torch.float16, "small": torch.float32, "ids": torch.int64}
