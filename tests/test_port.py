"""The ears of a checkpoint move to other LLMs without training: seven families of tokenizers, tiny random LLMs."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import fresh
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from conftest import CAPTION, CHATML, LABELS, make_model, prepare, run_cli, tone, typed
from dual_slm import DualSLMForConditionalGeneration, DualSLMProcessor
from dual_slm.letters_dual_slm import lexicon_rows
from dual_slm.training.forward import load_state

LETTERS = " abe"
WORDS = {"".join(word): 3 for size in (1, 2, 3, 4) for word in itertools.product("abe", repeat=size)}
BIGRAMS = {("a", "be"): 3, ("be", "a"): 2, ("abe", "a"): 4}
TEXT = [" ".join(WORDS)] * 2 + ["( ) , a female voice, male voice, neutral emotion, happy emotion, sad emotion"] * 9
BYTES = [f"<0x{number:02X}>" for number in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]


def train(tokenizer: Tokenizer, trainer, **more) -> Tokenizer:
    tokenizer.train_from_iterator(TEXT, trainer(special_tokens=SPECIAL, show_progress=False, **more))
    return tokenizer


def byte_level(prefix: bool = False, split: str | None = None) -> Tokenizer:
    """GPT-2's, RoBERTa's with the space before a text, or Qwen's with its own pattern."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split is None)
    parts = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, level])
    tokenizer.decoder = decoders.ByteLevel()
    return train(tokenizer, trainers.BpeTrainer, vocab_size=620, initial_alphabet=level.alphabet())


def sentencepiece(prefix: bool) -> Tokenizer:
    """Llama 2's, which adds a space before a text, or Gemma's, which does not; `b` is a byte of the fallback alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained = json.loads(train(tokenizer, trainers.BpeTrainer, vocab_size=400).to_str())["model"]
    if not prefix:
        trained["vocab"] = {token: 0 for token in trained["vocab"] if "b" not in token}
        trained["merges"] = [pair for pair in trained["merges"] if "b" not in "".join(pair)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*SPECIAL, *BYTES, *trained["vocab"]]))}
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    before = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    if not prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def unigram() -> Tokenizer:
    """T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return train(tokenizer, trainers.UnigramTrainer, vocab_size=300, unk_token="<unk>")


def wordpiece() -> Tokenizer:
    """BERT's, which has no token of a space and splits off punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    return train(tokenizer, trainers.WordPieceTrainer, vocab_size=400)


def whole_words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return train(tokenizer, trainers.WordLevelTrainer)


QWEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
FAMILIES = {  # tokenizer and width of the LLM
    "gpt2": (byte_level, 32),
    "roberta": (lambda: byte_level(prefix=True), 40),
    "qwen": (lambda: byte_level(split=QWEN), 56),
    "llama2": (lambda: sentencepiece(prefix=True), 64),
    "gemma": (lambda: sentencepiece(prefix=False), 48),
    "t5": (unigram, 72),
    "bert": (wordpiece, 80),
    "words": (whole_words, 24),
}


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    """Family -> folder of a tiny random LLM; Gemma's embedding scales its rows."""
    root = tmp_path_factory.mktemp("llms")
    torch.manual_seed(3)
    for name, (make, width) in FAMILIES.items():
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=make(), unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )
        tokenizer.chat_template = CHATML
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "pad_token_id": 2}
        sizes = {"vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 64, "eos_token_id": 2}
        if name == "gemma":
            llm = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, head_dim=12))
        else:
            llm = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True, initializer_range=0.2))
        llm.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in FAMILIES}


def write_source(backbones, folder, **fields):
    """A checkpoint whose random letters make words of three letters of the alphabet."""
    model, processor = make_model(backbones, kind="letters", linguistic_letters=LETTERS, **fields)
    adapter = model.linguistic_adapter
    load_state(adapter.lexicon, lexicon_rows(processor.tokenizer, WORDS, BIGRAMS, LETTERS))
    model.config.linguistic_lexicon_size = len(adapter.lexicon.counts)
    model.config.linguistic_lexicon_pairs = len(adapter.lexicon.pairs)
    with torch.no_grad():
        adapter.letters.bias[0 :: len(LETTERS) + 1] = 2.0  # spaces
        model.paralinguistic_adapter.output.weight.normal_(std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.fixture(scope="module")
def source(tiny_backbones, tmp_path_factory):
    """(model, processor, folder)"""
    folder = tmp_path_factory.mktemp("source")
    return *write_source(tiny_backbones, folder), str(folder)


@torch.inference_mode()
def hear(model, processor):
    clips = [tone(1.1, 1), tone(0.4, 2), tone(2.1, 3), tone(0.8, 4)]
    features = model.get_audio_features(**processor.extract_features(clips))
    return features, processor.decode_audio(features)


def load(folder, llm):
    model = DualSLMForConditionalGeneration.from_pretrained(folder, text_model_id=llm)
    return model, DualSLMProcessor.from_pretrained(folder, text_model_id=llm)


def behind(tokenizer, before: str, text: str) -> list[int]:
    """The tokens that a tokenizer gives `text` behind `before`, both in one text."""
    whole, start = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before + text, before))
    assert whole[: len(start)] == start
    return whole[len(start) :]


def expected_caption(tokenizer, rows, attributes) -> torch.Tensor:
    """The mixtures by hand: the fixed text is plain rows, a label the sum of all labels by their probability."""
    space = (tokenizer(" ", add_special_tokens=False)["input_ids"] or tokenizer(",")["input_ids"])[0]
    embeds = [rows(tokenizer("(", add_special_tokens=False)["input_ids"])]
    before = "("
    for field, glue, after in (("gender", "", " voice,"), ("emotion", " ", " emotion)")):
        spelled = {label: behind(tokenizer, before, glue + label) for label in LABELS[field]}
        width = max(map(len, spelled.values()))
        padded = {label: ids + [space] * (width - len(ids)) for label, ids in spelled.items()}
        embeds.append(sum(attributes[field][label] * rows(ids) for label, ids in padded.items()))
        before += glue + LABELS[field][0]
        embeds.append(rows(behind(tokenizer, before, after)))
        before += after
    assert before == "(female voice, neutral emotion)"
    return torch.cat(embeds)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "words"])
def test_the_ears_are_the_same_and_speak_to_another_llm_in_its_own_tokens(source, llms, family, tmp_path):
    model, processor, folder = source
    first, heard = hear(model, processor)
    ported, its = load(folder, llms[family])
    tokenizer, llm = AutoTokenizer.from_pretrained(llms[family]), AutoModelForCausalLM.from_pretrained(llms[family])

    def rows(ids: list[int]) -> torch.Tensor:
        return llm.get_input_embeddings()(torch.tensor(ids)).detach()

    features, found = hear(ported, its)
    assert found == heard and len({turn["heard"] for turn in heard}) == len(heard)
    alone = DualSLMForConditionalGeneration.from_pretrained(folder, text_model_id=llms[family], ears_only=True)
    assert hear(alone, its)[1] == heard
    assert torch.equal(features.paralinguistic_logits, first.paralinguistic_logits)
    for turn, ids in zip(
        found, features.linguistic_token_ids.split(features.linguistic_lengths.tolist()), strict=True
    ):
        assert tokenizer.decode(ids).strip() == turn["heard"] != ""
        if WORDS.keys() >= set(turn["heard"].split()):
            assert ids.tolist() == behind(tokenizer, "a", " " + turn["heard"])
    assert any(WORDS.keys() >= set(turn["heard"].split()) for turn in found)
    assert torch.equal(features.linguistic_embeds, rows(features.linguistic_token_ids.tolist()))
    for turn, embeds in zip(found, features.paralinguistic_embeds, strict=True):
        torch.testing.assert_close(embeds, expected_caption(tokenizer, rows, turn["attributes"]), atol=1e-5, rtol=1e-4)

    text = prepare(its, [typed("a female voice")])
    with torch.inference_mode():
        assert torch.equal(ported(**text).logits, llm(**text).logits)
    spoken = prepare(its, [{"role": "user", "content": [{"type": "audio", "audio": tone(0.9)}]}])
    output = ported.generate(**spoken, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert output.shape[1] == spoken["input_ids"].shape[1] + 3

    ported.save_pretrained(tmp_path)
    its.save_pretrained(tmp_path)
    again = DualSLMForConditionalGeneration.from_pretrained(tmp_path)
    reloaded, same = hear(again, DualSLMProcessor.from_pretrained(tmp_path))
    assert same == heard and torch.equal(reloaded.paralinguistic_embeds, features.paralinguistic_embeds)
    home, processor = load(tmp_path, model.config.text_model_id)
    back, same = hear(home, processor)
    assert same == heard and home.config.caption_origin is None
    for name, tensor in back.items():
        assert torch.equal(tensor, first[name]), name
    assert home.config.text_model_fingerprint == model.config.text_model_fingerprint
    assert home.paralinguistic_adapter.state_dict().keys() == model.paralinguistic_adapter.state_dict().keys()


def test_a_port_of_a_port_is_a_port_of_the_first(source, llms, tmp_path):
    _, _, folder = source
    for part in load(folder, llms["llama2"]):
        part.save_pretrained(tmp_path)
    expected, found = hear(*load(folder, llms["qwen"])), hear(*load(tmp_path, llms["qwen"]))
    assert found[1] == expected[1]
    for name, tensor in expected[0].items():
        assert torch.equal(tensor, found[0][name]), name


def test_the_command_writes_a_checkpoint_as_any_other_and_tells_what_it_drops(tiny_backbones, llms, tmp_path):
    model, processor = write_source(tiny_backbones, tmp_path / "old", paralinguistic_soft_residual=True)
    torch.nn.init.normal_(model.paralinguistic_adapter.residual.weight)
    model.save_pretrained(tmp_path / "old")
    arguments = ("port", str(tmp_path / "old"), "--to", llms["t5"], "--out", str(tmp_path / "new"))
    result = run_cli(*arguments)
    assert result.returncode == 0, result.stderr
    assert "the free vectors beside the soft tokens, which start again at zero" in result.stderr
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["text_model_id"] == llms["t5"] and config["text_config"]["hidden_size"] == 72
    assert config["text_model_fingerprint"] != model.config.text_model_fingerprint
    assert config["caption_origin"]["text_model_fingerprint"] == model.config.text_model_fingerprint
    assert (
        config["eos_token_id"] == json.loads((tmp_path / "new" / "generation_config.json").read_text())["eos_token_id"]
    )
    new = DualSLMForConditionalGeneration.from_pretrained(tmp_path / "new")
    assert not new.paralinguistic_adapter.residual.weight.any()
    assert hear(new, DualSLMProcessor.from_pretrained(tmp_path / "new"))[1] == hear(model, processor)[1]
    assert fresh(tmp_path / "new", "remote", tmp_path)["module"].startswith("transformers_modules.")
    result = run_cli(*arguments)
    assert result.returncode == 1 and "holds a checkpoint already" in result.stderr


def test_free_vectors_of_a_ported_branch_learn_beside_the_same_part_of_the_caption(tiny_backbones, llms, tmp_path):
    write_source(tiny_backbones, tmp_path, paralinguistic_soft_residual=True)
    model, processor = load(tmp_path, llms["bert"])
    adapter = model.paralinguistic_adapter
    assert adapter.residual.out_features == 80
    heard, slots = processor.caption_slots, model.config.num_paralinguistic_tokens
    assert len(adapter.soft_tokens.sources) == slots != heard.num_slots
    assert (
        adapter.soft_tokens.sources[1] == heard.fields["gender"].start
    )  # behind the bracket, which is one token in both
    assert adapter.soft_tokens.sources[-1] == heard.num_slots - 1
    features = model.get_audio_features(**processor.extract_features([tone(1.0)]))
    features.paralinguistic_embeds.square().sum().backward()
    assert adapter.residual.weight.grad.any() and adapter.output.weight.grad.any()


def test_another_llm_has_to_be_asked_for_and_the_same_one_may_lie_elsewhere(source, llms, tmp_path):
    model, processor, folder = source
    shutil.copytree(model.config.text_model_id, tmp_path / "elsewhere")
    same, its = load(folder, str(tmp_path / "elsewhere"))
    assert same.config.caption_origin is None and its.caption_slots.token_ids == processor.caption_slots.token_ids
    auto = AutoModelForMultimodalLM.from_pretrained(folder, text_model_id=llms["gpt2"])
    assert auto.config.text_model_id == llms["gpt2"] and auto.config.caption_origin is not None
    assert (
        hear(auto, AutoProcessor.from_pretrained(folder, text_model_id=llms["gpt2"]))[1] == hear(model, processor)[1]
    )
    shutil.copytree(folder, tmp_path / "replaced")
    config = json.loads((tmp_path / "replaced" / "config.json").read_text())
    changed = config | {"text_model_id": llms["gpt2"]}  # a backbone that was replaced behind the checkpoint's back
    (tmp_path / "replaced" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"is not the text backbone .* `dual-slm port`"):
        DualSLMForConditionalGeneration.from_pretrained(tmp_path / "replaced")
    result = run_cli("port", folder, "--to", str(tmp_path / "elsewhere"), "--out", str(tmp_path / "out"))
    assert result.returncode == 1 and "that is its LLM already" in result.stderr


def test_an_earlier_checkpoint_gets_its_keys_from_the_old_llm_where_that_is_at_hand(source, llms, tmp_path):
    model, processor, folder = source
    shutil.copytree(folder, tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    assert torch.equal(
        tensors.pop("paralinguistic_adapter.soft_tokens.keys"),
        model.get_input_embeddings().weight[processor.caption_slots.token_ids],
    )
    save_file(tensors, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    ported, its = load(tmp_path / "old", llms["qwen"])
    assert hear(ported, its)[1] == hear(model, processor)[1]
    for file in (tmp_path / "old").glob("tokenizer*"):  # then the old LLM's tokenizer says how the caption was spelled
        file.unlink()
    bare = DualSLMForConditionalGeneration.from_pretrained(tmp_path / "old", text_model_id=llms["qwen"])
    assert bare.config.caption_origin == ported.config.caption_origin
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps(config | {"text_model_id": str(tmp_path / "gone")}))
    shutil.copy(f"{folder}/tokenizer.json", tmp_path / "old")
    shutil.copy(f"{folder}/tokenizer_config.json", tmp_path / "old")
    with pytest.raises(OSError, match="saved without the embedding rows that it hears with"):
        load(tmp_path / "old", llms["qwen"])
    ported.save_pretrained(tmp_path / "ported")
    tensors = load_file(tmp_path / "ported" / "model.safetensors")
    del tensors["paralinguistic_adapter.soft_tokens.keys"]
    save_file(tensors, tmp_path / "ported" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: paralinguistic_adapter\.soft_tokens\.keys"):
        DualSLMForConditionalGeneration.from_pretrained(tmp_path / "ported")


def test_what_cannot_move_is_refused(source, tiny_backbones, llms, tmp_path):
    fields = {"paralinguistic_adapter_type": "query", "linguistic_adapter_type": "none", "attribute_labels": LABELS}
    for name, more, reason in (
        ("paper", {}, "spells no caption, and its linguistic adapter, which writes no letters"),
        ("query", fields | {"paralinguistic_num_heads": 4}, "the query adapter of its paralinguistic branch"),
    ):
        model, processor = make_model(tiny_backbones, **more)
        for part in (model, processor):
            part.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"cannot be ported to .*{reason}"):
            DualSLMForConditionalGeneration.from_pretrained(tmp_path / name, text_model_id=llms["gpt2"])
    with pytest.raises(ValueError, match="this tokenizer spells the letter"):
        DualSLMForConditionalGeneration.from_pretrained(source[2], text_model_id=llms["words"])


def test_hotwords_are_spelled_in_the_tokens_of_the_llm(source, llms):
    model, processor = load(source[2], llms["llama2"])
    processor.set_hotwords(model, ["abba"])
    expected = behind(AutoTokenizer.from_pretrained(llms["llama2"]), "a", " abba")
    assert model.linguistic_adapter.words().tokens("abba") == expected
    assert CAPTION.startswith("({gender}")
