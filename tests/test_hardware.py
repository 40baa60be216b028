"""What this machine does fast and keeps in memory."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from dual_slm.training import hardware
from dual_slm.training.allocator import TUNABLES
from dual_slm.training.hardware import activation_bytes, fast_dtype, fitted_attention, is_sharded, weight_bytes

SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


@pytest.mark.parametrize(("attention", "positions"), [("eager", 64), ("eager", 300), ("sdpa", 300)])
def test_the_plan_knows_what_the_backward_pass_keeps(attention, positions):
    """Counted through autograd's own hooks, on layers of SmolLM2's size."""
    config = LlamaConfig(**SIZES, num_hidden_layers=3, vocab_size=64, attn_implementation=attention)
    llm = LlamaModel(config).to(torch.bfloat16).requires_grad_(False)
    weights = {weight.untyped_storage().data_ptr() for weight in llm.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    embeds = torch.randn(2, positions, 576, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = llm(inputs_embeds=embeds, attention_mask=torch.ones(2, positions).long(), use_cache=False)
    found = sum(size for place, size in kept.items() if place not in weights)
    assert activation_bytes(2, positions, config, 2, attention == "eager") == pytest.approx(found, rel=0.15)
    del output


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator that is tuned is glibc's")
def test_holes_in_the_heap_are_given_back():
    """As `dual-slm train` sets the allocator, freed tensors between used ones stay with the process until it is told."""
    code = """
import psutil, torch
from dual_slm.training.hardware import trim_heap
kept = [torch.ones(2**20) for _ in range(200)]  # 4 MiB each
del kept[:-1:2]
before = psutil.Process().memory_info().rss
trim_heap()
print(before - psutil.Process().memory_info().rss)
assert all(float(tensor.sum()) == 2**20 for tensor in kept)
"""
    environment = os.environ | {"GLIBC_TUNABLES": TUNABLES}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 250 * 2**20  # of 400 MiB


@pytest.mark.parametrize("fast", [True, False])
def test_half_width_formats_are_used_where_the_cpu_is_fast_in_them(fast, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda: fast)
    assert fast_dtype("bfloat16") == ("bfloat16" if fast else "float32")
    assert ("float32 it is" in capsys.readouterr().out) is not fast
    assert fast_dtype("auto", sys.stderr) == "auto"
    assert hardware.fast_autocast(torch.device("cpu"))._enabled is fast


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has one kernel for all batches")
def test_attention_is_eager_while_its_weights_fit(monkeypatch):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=8
    )
    llm = LlamaForCausalLM(config)
    monkeypatch.setattr(hardware, "EAGER_LIMIT", weight_bytes(2, 8, 8, config, 4))
    found = []
    for length, grad in ((8, True), (9, True), (8, False)):
        with fitted_attention(llm), torch.set_grad_enabled(grad):
            llm(inputs_embeds=torch.randn(2, length, 32), attention_mask=torch.ones(2, length).long())
        found.append(llm.config._attn_implementation)
    assert found == ["eager", "sdpa", "sdpa"]
    assert not llm.get_decoder()._forward_pre_hooks and not is_sharded(llm)
