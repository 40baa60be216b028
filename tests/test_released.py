"""The tables and the model cards of the released checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SHARED_DATA
from dual_slm.training import released
from dual_slm.training.stats import leaks


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="real speech is not here")
def test_the_released_tables_share_no_speaker_between_splits():
    tables = released.recorded(SHARED_DATA, list(released.FOLDERS))
    rows = [row for rows in tables.values() for row in rows]
    assert leaks(rows)[0] == []
    assert len({row.key for row in rows}) == len(rows) > 3_000
    held_out = {row.speaker for row in tables["librispeech_subset"] if row.split == "test"}
    assert len(held_out) == 27


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
