"""A conversation: each position is read once, a failed or abandoned turn leaves no trace."""

import pytest

from conftest import make_model, prepare, spoken, tone, typed
from dual_slm import DualSLMConversation


@pytest.mark.parametrize("kind", ["paper", "letters"])
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


def test_streaming_yields_the_same_text_piece_by_piece(letters):
    model, processor = letters
    said = DualSLMConversation(model, processor, max_new_tokens=12).say(audio=tone(1.0, 1), text="the fox")["reply"]
    conversation = DualSLMConversation(model, processor, max_new_tokens=12)
    pieces = list(conversation.stream(audio=tone(1.0, 1), text="the fox"))
    assert "".join(pieces).strip() == said == conversation.current_turn["reply"]


def test_who_stops_reading_stops_the_reply_and_the_conversation_goes_on(letters):
    """Barge-in: the thread ends before anything else touches the cache, and the history holds what was written."""
    model, processor = letters
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
    model, processor = make_model(tiny_backbones, kind="letters")
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
