"""The promises of the model: batches equal single runs, the LLM stays itself, the cache of a conversation is exact."""

import collections
import itertools
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM

from conftest import make_model, tone
from dual_slm import DualSLMConversation, DualSLMForConditionalGeneration
from dual_slm.modeling_dual_slm import masked_adaptive_average


def spoken(seconds: float, seed: int = 0, text: str | None = None, **sources) -> dict:
    content = [{"type": "audio", "audio": tone(seconds, seed), **sources}]
    return {"role": "user", "content": content + ([{"type": "text", "text": text}] if text else [])}


def typed(text: str, role: str = "user") -> dict:
    return {"role": role, "content": text}


def prepare(processor, conversation, **options):
    return processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=True, **options
    )


CONVERSATIONS = [
    [spoken(0.7, 1)],
    [typed("hello to the lazy dog")],
    [spoken(2.3, 2, "the quick brown fox"), typed("a dog", "assistant"), spoken(0.31, 3)],
    [typed("be brief", "system"), typed("the fox"), typed("jumps", "assistant"), spoken(1.4, 4)],
    [spoken(1.1, 5, paralinguistic="none")],
    [spoken(1.3, 6, paralinguistic="caption", caption="(female voice, sad emotion)")],
    [spoken(0.9, 7, linguistic="transcript", transcript="the lazy fox")],
    [spoken(1.0, 8, linguistic="none")],
]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("seed", range(4))
def test_a_batch_gives_what_single_runs_give(tiny, padding_side, seed):
    model, processor = tiny
    rng = np.random.default_rng(seed)
    chosen = [CONVERSATIONS[i] for i in rng.permutation(len(CONVERSATIONS))[: rng.integers(2, 7)]]
    batch = prepare(processor, chosen, padding_side=padding_side)
    with torch.inference_mode():
        together = model(**batch).logits
    for row, conversation in enumerate(chosen):
        single = prepare(processor, conversation)
        with torch.inference_mode():
            alone = model(**single).logits[0]
        real = batch["attention_mask"][row].bool()
        # Logits at placeholders that CTC left empty mean nothing; everything else must agree.
        surplus = single["input_ids"][0] == processor.linguistic_token_id
        torch.testing.assert_close(together[row][real][~surplus], alone[~surplus], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batched_generation_gives_what_single_generation_gives(tiny, padding_side):
    model, processor = tiny
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    # Audio in the batch: the prompt is packed, so even right padding is safe.
    chosen = CONVERSATIONS[:5]
    batch = prepare(processor, chosen, padding_side=padding_side)
    together = model.generate(**batch, **options)
    assert torch.equal(together[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    for row, conversation in enumerate(chosen):
        single = prepare(processor, conversation)
        alone = model.generate(**single, **options)
        assert together[row, -6:].tolist() == alone[0, -6:].tolist()


def test_beams_and_samples_keep_every_clip_with_its_own_row(tiny):
    """generate repeats rows for beams; with several clips a prompt the clips must be repeated with them."""
    model, processor = tiny
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    batch = prepare(processor, CONVERSATIONS[:4])
    together = model.generate(**batch, num_return_sequences=2, **options)
    assert len(together) == 8
    for row, conversation in enumerate(CONVERSATIONS[:4]):
        alone = model.generate(**prepare(processor, conversation), num_return_sequences=2, **options)
        assert together[2 * row : 2 * row + 2, -5:].tolist() == alone[:, -5:].tolist()


def test_text_only_is_the_bare_llm_bit_for_bit(tiny, tiny_backbones):
    model, processor = tiny
    bare = AutoModelForCausalLM.from_pretrained(tiny_backbones[1])
    inputs = prepare(processor, [[typed("hello to the dog")], [typed("the quick brown fox jumps")]])
    assert set(inputs) == {"input_ids", "attention_mask"}
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, bare(**inputs).logits)
    ours = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, bare.generate(**inputs, max_new_tokens=8, do_sample=False))


def test_text_sources_are_the_bare_llm_on_the_text_twin(tiny, tiny_backbones):
    model, processor = tiny
    bare = AutoModelForCausalLM.from_pretrained(tiny_backbones[1])
    turn = {"type": "audio", "paralinguistic": "caption", "linguistic": "transcript"}
    turn |= {"caption": "(male voice, happy emotion)", "transcript": "the fox"}
    inputs = prepare(processor, [{"role": "user", "content": [turn]}])
    twin = prepare(processor, [typed("(male voice, happy emotion) the fox")])
    assert torch.equal(inputs["input_ids"], twin["input_ids"])
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, bare(**twin).logits)


def test_branches_are_independent_of_each_other(tiny):
    """Leaving one branch out does not change what the other contributes."""
    model, processor = tiny
    features = {}
    for name, sources in {
        "both": {},
        "how": {"linguistic": "none"},
        "what": {"paralinguistic": "none"},
    }.items():
        inputs = prepare(processor, [spoken(1.2, 9, **sources)])
        names = ("input_features", "input_features_mask", "audio_num_chunks", "audio_branches")
        features[name] = model.get_audio_features(**{key: inputs[key] for key in names})
    torch.testing.assert_close(features["both"].paralinguistic_embeds, features["how"].paralinguistic_embeds)
    torch.testing.assert_close(features["both"].linguistic_embeds, features["what"].linguistic_embeds)
    assert features["how"].linguistic_embeds is None
    assert features["what"].paralinguistic_embeds is None


def test_backbones_are_frozen_and_equal_a_plain_load(tiny, tiny_backbones, tmp_path):
    """After loading, after a training step, after saving and loading: every parameter and buffer, bit for bit."""
    model, processor = make_model(tiny_backbones, kind="warm")
    plain_llm = AutoModelForCausalLM.from_pretrained(tiny_backbones[1])
    plain_encoder = AutoModel.from_pretrained(tiny_backbones[0]).get_encoder()

    def check(candidate):
        for ours, plain in ((candidate.language_model, plain_llm), (candidate.audio_tower, plain_encoder)):
            expected = dict(plain.named_parameters()) | dict(plain.named_buffers())
            actual = dict(ours.named_parameters()) | dict(ours.named_buffers())
            assert actual.keys() == expected.keys()
            assert "rotary" not in str(list(expected)) or any("inv_freq" in name for name in expected)
            for name, tensor in expected.items():
                assert torch.equal(actual[name], tensor), name
            assert not any(p.requires_grad for p in ours.parameters())

    check(model)
    model.train()
    assert not model.language_model.training
    batch = prepare(processor, [spoken(1.0, 1), typed("the fox", "assistant")])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    labels = batch["input_ids"].masked_fill(batch["input_ids"] >= len(processor.tokenizer) - 2, -100)
    model(**batch, labels=labels).loss.backward()
    assert all(p.grad is None for p in model.language_model.parameters())
    optimizer.step()
    changed = [name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])]
    assert any(name.startswith("paralinguistic") for name in changed)
    assert any(name.startswith("linguistic") for name in changed)
    check(model)
    model.save_pretrained(tmp_path)
    check(type(model).from_pretrained(tmp_path))


def test_every_adapter_weight_gets_a_gradient(paper):
    model, processor = paper
    model.train()
    batch = prepare(processor, [spoken(1.0, 1), typed("the fox", "assistant")])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] >= len(processor.tokenizer) - 2, -100)
    model.zero_grad()
    model(**batch, labels=labels).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    model.zero_grad()
    model.eval()
    assert not missing


def test_wrong_number_of_placeholders_is_refused(tiny):
    model, processor = tiny
    batch = prepare(processor, [spoken(1.0, 1)])
    batch["input_ids"] = batch["input_ids"][:, :-30]
    batch["attention_mask"] = batch["attention_mask"][:, :-30]
    with pytest.raises(ValueError, match="placeholders, its audio needs"):
        model(**batch)


def test_masked_adaptive_average_equals_torchs_on_each_length():
    torch.manual_seed(0)
    lengths = torch.tensor([1, 3, 7, 16, 40])
    states = torch.randn(5, 40, 6)
    pooled = masked_adaptive_average(states, lengths, 7)
    for row, length in enumerate(lengths):
        expected = torch.nn.functional.adaptive_avg_pool1d(states[row, :length].T[None], 7)[0].T
        torch.testing.assert_close(pooled[row], expected)


def test_a_new_residual_adds_nothing(tiny_backbones):
    """Of both branches: a fresh model with them says what it would say without."""
    fields = {"paralinguistic_soft_residual": True, "linguistic_soft_residual": True}
    plain, processor = make_model(tiny_backbones, kind="warm")
    model, _ = make_model(tiny_backbones, kind="warm", **fields)
    for branch in ("paralinguistic_adapter", "linguistic_adapter"):
        assert not getattr(model, branch).residual.weight.any()
        assert getattr(model, branch).residual.weight.requires_grad
        getattr(model, branch).load_state_dict(getattr(plain, branch).state_dict(), strict=False)
    inputs = processor.extract_features([tone(1.2, 3)])
    with torch.inference_mode():
        features, expected = model.get_audio_features(**inputs), plain.get_audio_features(**inputs)
    assert torch.equal(features.paralinguistic_embeds, expected.paralinguistic_embeds)
    assert torch.equal(features.linguistic_embeds, expected.linguistic_embeds)


def test_ctc_compression_drops_blanks_and_merges_repeats(warm):
    """Against the definition, on outputs that point at embedding rows: a a _ a b b _ -> a a b."""
    model, _ = warm
    soft, embedding = model.linguistic_adapter.soft_tokens, model.get_input_embeddings()
    rows = soft.rows(embedding).detach()
    blank = soft.blank.detach()
    path = [5, 5, None, 5, 9, 9, None]
    outputs = torch.stack([50 * (blank if i is None else rows[i]) for i in path])
    with torch.no_grad():
        probabilities, _, ids = soft.segments(soft.logits(outputs, rows), outputs)
        embeds = probabilities @ rows
    assert ids.tolist() == [soft.token_ids[5], soft.token_ids[5], soft.token_ids[9]]
    torch.testing.assert_close(embeds, rows[[5, 5, 9]], atol=1e-3, rtol=1e-3)


def test_the_search_finds_the_text_that_all_paths_together_make_most_likely(tiny_backbones):
    """Against the definition: every path of six outputs over three letters, summed over those that collapse to a text."""
    model, _ = make_model(tiny_backbones, kind="letters", linguistic_letters=" abe", linguistic_beam_width=500)
    adapter, generator = model.linguistic_adapter, torch.Generator().manual_seed(0)
    words, texts = adapter.words(), set()
    assert set(words.share) == {"a", "be"} and set(words.pairs) == {("a", "be"), ("be", "a")}
    for _ in range(12):
        log_probs = torch.randn(6, 5, generator=generator).clamp(-1.5).log_softmax(-1)
        totals = collections.defaultdict(list)
        for path in itertools.product(range(5), repeat=6):
            text = "".join(" abe"[i] for i, _ in itertools.groupby(path) if i < 4)
            if not text.startswith(" ") and "  " not in text:
                totals[text].append(sum(log_probs[t, i].item() for t, i in enumerate(path)))
        scores = {
            text: torch.tensor(paths).logsumexp(0).item()
            + sum(words.score(*pair) for pair in itertools.pairwise(["", *text.split()]))
            for text, paths in totals.items()
        }
        texts.add(adapter.search(log_probs, words))
        assert adapter.search(log_probs, words) == max(scores, key=scores.get).strip()
    assert len(texts) > 3


def test_letters_are_spelled_into_words_that_are_known_and_others_as_they_are_heard(tiny_backbones):
    """What sounds like a known word becomes it, a clear new name stays; the LLM gets its own tokens of known words."""
    model, processor = make_model(tiny_backbones, kind="letters")
    adapter = model.linguistic_adapter

    def heard(*outputs: dict[str, float]) -> str:
        probabilities = torch.full((len(outputs), len(adapter.alphabet) + 1), 1e-6)
        for row, letters in zip(probabilities, outputs, strict=True):
            for letter, probability in letters.items():
                row[adapter.alphabet.find(letter) if letter != "_" else -1] = probability
        return adapter.search((probabilities / probabilities.sum(-1, keepdim=True)).log(), adapter.words())

    def clear(text: str) -> list[dict[str, float]]:
        return [{letter: 1.0} for letter in text]

    assert heard(*clear("the f"), {"u": 0.6, "o": 0.4}, *clear("x_")) == "the fox"
    assert heard(*clear("the z"), {"u": 0.6, "o": 0.4}, *clear("x_")) == "the zux"
    assert heard(*clear("ddo_gg")) == "dog"
    assert heard(*clear("d_d")) == "dd"
    assert heard(*clear("____")) == ""
    assert heard(*[{"_": 0.99, "a": 0.005}] * 600) == ""  # noise, however long
    assert heard(*clear("the d"), {"i": 0.6, "o": 0.4}, *clear("g_")) == "the dig"  # both words are as common
    assert heard(*clear("lazy d"), {"i": 0.6, "o": 0.4}, *clear("g_")) == "lazy dog"  # which follows more often
    assert heard(*clear("lazy d"), {"i": 0.99, "o": 0.01}, *clear("g_")) == "lazy dig"
    processor.set_hotwords(model, ["Zux", "zox-trap"])
    assert heard(*clear("the z"), {"u": 0.3, "o": 0.7}, *clear("x_")) == "the zox"
    assert heard(*clear("the z"), {"u": 0.9, "o": 0.1}, *clear("x_")) == "the zux"
    processor.set_hotwords(model, ["zux"])
    assert heard(*clear("the z"), {"u": 0.3, "o": 0.7}, *clear("x_")) == "the zux"
    with pytest.raises(ValueError, match="the hotword 'r2d2' is not in the letters"):
        processor.set_hotwords(model, ["R2D2"])
    processor.set_hotwords(model, [])
    assert heard(*clear("the z"), {"u": 0.3, "o": 0.7}, *clear("x_")) == "the zox"
    tokens = adapter.words().tokens("the fox zuxy")
    assert tokens[:2] == processor.tokenizer(" the fox", add_special_tokens=False)["input_ids"][: len(tokens[:2])]
    assert processor.tokenizer.decode(tokens) == " the fox zuxy"


def test_the_words_that_may_follow_a_word_have_all_of_its_probability(tiny_backbones):
    model, _ = make_model(tiny_backbones, kind="letters")
    words = model.linguistic_adapter.words()
    for before in ("", "the", "lazy", "fox", "a", "unheard"):
        following = [math.exp((words.score(before, word) - words.bonus) / words.weight) for word in words.share]
        assert sum(following) == pytest.approx(1, abs=1e-6)
    assert words.score("lazy", "dog") > words.score("", "dog") > words.score("lazy", "dig")


def test_an_empty_lexicon_says_what_fills_it(tiny_backbones):
    model, _ = make_model(tiny_backbones, kind="letters")
    for name, buffer in dict(model.linguistic_adapter.lexicon.named_buffers()).items():
        setattr(model.linguistic_adapter.lexicon, name, buffer[:0])
    with pytest.raises(ValueError, match="Stage 0 of training fills it"):
        model.linguistic_adapter.words().tokens("fox")


def test_long_audio_is_encoded_whole(tiny):
    """70 s are three chunks of one clip; the last seconds are heard."""
    model, processor = tiny
    audio = tone(70.0, 3)
    cut = audio.copy()
    cut[-8_000:] = 0
    outputs = []
    for samples in (audio, cut):
        inputs = prepare(processor, [{"role": "user", "content": [{"type": "audio", "audio": samples}]}])
        assert inputs["audio_num_chunks"].tolist() == [3]
        with torch.inference_mode():
            _, lengths = model.encode_audio(
                inputs["input_features"], inputs["input_features_mask"], inputs["audio_num_chunks"]
            )
            outputs.append(model(**inputs).logits[0, -1])
        assert lengths.tolist() == [3500]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-6


@pytest.mark.parametrize("kind", ["paper", "warm"])
def test_conversation_prefills_only_the_new_turn(tiny_backbones, kind):
    """Same text as without the cache, and the LLM sees each position once."""
    model, processor = make_model(tiny_backbones, kind=kind)
    seen = []
    handle = model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(
            (kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]).shape[1]
        ),
        with_kwargs=True,
    )
    conversation = DualSLMConversation(model, processor, system="be brief", max_new_tokens=7)
    turns = [{"audio": tone(1.5, 1)}, {"text": "and the lazy dog"}, {"audio": tone(0.8, 2), "text": "hello"}]
    prefills, messages = [], [typed("be brief", "system")]
    for turn in turns:
        seen.clear()
        answer = conversation.say(**turn)
        prefills.append(seen[0])
        content = [{"type": "audio", "audio": turn["audio"]}] if "audio" in turn else []
        content += [{"type": "text", "text": turn["text"]}] if "text" in turn else []
        messages.append({"role": "user", "content": content})
        inputs = prepare(processor, messages)
        full = model.generate(**inputs, max_new_tokens=7, do_sample=False)
        reply = processor.decode(full[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert answer["reply"] == reply
        messages.append(typed(reply, "assistant"))
    handle.remove()
    # 14 characters and the template's own tokens, but neither the first clip nor the history again.
    assert prefills[1] < 40 < prefills[0] + prefills[1]


def test_streaming_yields_the_same_text_piece_by_piece(warm):
    model, processor = warm
    said = DualSLMConversation(model, processor, max_new_tokens=12).say(audio=tone(1.0, 1), text="the fox")["reply"]
    conversation = DualSLMConversation(model, processor, max_new_tokens=12)
    pieces = list(conversation.stream(audio=tone(1.0, 1), text="the fox"))
    assert "".join(pieces).strip() == said == conversation.current_turn["reply"]


def test_who_stops_reading_stops_the_reply_and_the_conversation_goes_on(warm):
    """Barge-in: the thread ends before anything else touches the cache, and the history holds what was written."""
    model, processor = warm
    options = {"max_new_tokens": 1_000, "eos_token_id": None}
    conversation = DualSLMConversation(model, processor, **options)
    for _ in conversation.stream(audio=tone(1.0, 1)):
        break
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    cut = len(conversation._cached)
    assert cut < 1_000
    inputs = {"text": "the lazy dog", "max_new_tokens": 6}
    told = conversation.say(**inputs)["reply"]
    fresh = DualSLMConversation(model, processor, **options)
    fresh.messages, fresh._features = conversation.messages[:2], conversation._features[:1]
    assert fresh.say(**inputs)["reply"] == told


@pytest.mark.parametrize("beams", [1, 3])
def test_a_turn_that_fails_amid_the_layers_leaves_no_trace(tiny_backbones, beams):
    """An interrupt in the last layer of a later turn; then the same turn again, as without a cache, with beams too."""
    model, processor = make_model(tiny_backbones, kind="warm")
    options = {"max_new_tokens": 7, "num_beams": beams, "eos_token_id": None}
    conversation = DualSLMConversation(model, processor, **options)
    first = conversation.say(audio=tone(1.5, 1))["reply"]

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.language_model.model.layers[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        conversation.say(text="and the lazy dog")
    handle.remove()
    messages = [spoken(1.5, 1), typed(first, "assistant"), typed("and the lazy dog")]
    for text in ("and the lazy dog", "hello"):
        inputs = prepare(processor, messages)
        whole = model.generate(**inputs, do_sample=False, **options)
        reply = processor.decode(whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert conversation.say(text=text)["reply"] == reply
        messages += [typed(reply, "assistant"), typed("hello")]


def test_placeholders_without_audio_are_refused(tiny):
    model, processor = tiny
    inputs = prepare(processor, [spoken(0.7, 1)])
    for call in (model.generate, model):
        with pytest.raises(ValueError, match="paralinguistic placeholders, its audio needs 0"):
            call(input_ids=inputs["input_ids"])


def test_soft_tokens_have_the_scale_of_the_llms_own_embeddings(tiny_backbones, tmp_path):
    """Gemma's embedding layer multiplies what it looks up."""
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_backbones[1])
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, pad_token_id=0)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = make_model((tiny_backbones[0], str(tmp_path)), kind="warm")
    soft, embedding = model.linguistic_adapter.soft_tokens, model.get_input_embeddings()
    torch.testing.assert_close(soft.rows(embedding), embedding(soft.token_ids))


def test_a_model_that_is_cast_as_a_whole_still_hears(tiny_backbones):
    model, processor = make_model(tiny_backbones, kind="warm")
    inputs = prepare(processor, [spoken(1.0, 1)])
    heard = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    wanted = processor.decode_audio(model.get_audio_features(**heard))
    found = processor.decode_audio(model.to(torch.bfloat16).get_audio_features(**heard))
    for name, labels in wanted[0]["attributes"].items():
        assert found[0]["attributes"][name] == pytest.approx(labels, abs=0.05)


def test_options_of_loading_reach_the_backbones(tiny_backbones, tmp_path):
    """Through the auto classes too, and what is no option is refused: it would be written into every checkpoint."""
    audio, text = tiny_backbones
    model, _ = make_model(tiny_backbones)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(
        tmp_path, attn_implementation="eager", torch_dtype=torch.bfloat16
    )
    assert loaded.language_model.config._attn_implementation == "eager"
    assert loaded.audio_tower.config._attn_implementation == "eager"
    assert loaded.language_model.dtype == torch.bfloat16
    assert loaded.paralinguistic_adapter.output.weight.dtype == torch.float32
    made = DualSLMForConditionalGeneration.from_backbones(
        audio, text, attn_implementation="eager", token="hf_secret", cache_dir=str(tmp_path / "cache")
    )
    assert made.language_model.config._attn_implementation == "eager"
    made.save_pretrained(tmp_path / "made")
    assert not {"token", "cache_dir"} & json.loads((tmp_path / "made" / "config.json").read_text()).keys()
    with pytest.raises(TypeError, match="num_paralingustic_tokens is no field of DualSLMConfig"):
        DualSLMForConditionalGeneration.from_backbones(audio, text, num_paralingustic_tokens=32)


def test_a_device_map_is_told_to_pipelines_and_trainers(tiny_backbones):
    """Both look for it on the model that they are given, and move one without it. As accelerate leaves it on an LLM."""
    model, _ = make_model(tiny_backbones)
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "lm_head": 1}
    model.language_model.hf_device_map = places
    model.attach_backbones(model.audio_tower, model.language_model)
    ours = dict.fromkeys(("audio_tower", "paralinguistic_adapter", "linguistic_adapter"), 0)
    assert model.hf_device_map == ours | {f"language_model.{name}": place for name, place in places.items()}
    single, _ = make_model(tiny_backbones)  # on one device it is moved like any other
    single.language_model.hf_device_map = {"": 0}
    single.attach_backbones(single.audio_tower, single.language_model)
    assert not hasattr(single, "hf_device_map")
