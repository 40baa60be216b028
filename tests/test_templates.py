"""Chats under templates without a system role, or with alternating roles: Gemma 2's and Mistral v0.3's own texts."""

import pytest
import torch
from test_tasks import CHOICES, HISTORY, row

from conftest import make_model, prepare, spoken, tone, typed
from dual_slm import DualSLMConversation
from dual_slm.templates_dual_slm import fit_messages
from dual_slm.training.alignment import Aligner, AlignmentConfig
from dual_slm.training.collator import DualSLMCollator
from dual_slm.training.tasks import make_sample, text_twin

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# Mistral-7B-Instruct-v0.3's, without its branches for tools.
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}"""
TEMPLATES = {"gemma": GEMMA, "mistral": MISTRAL}
ENDS = {"gemma": "<end_of_turn>", "mistral": "<|im_end|>"}
PROMPT_ENDS = {"gemma": "<start_of_turn>model\n", "mistral": "[/INST]"}


@pytest.fixture(params=TEMPLATES)
def strict(request, tiny_backbones):
    """(name, model, processor) whose tokenizer has the template and its special tokens."""
    model, processor = make_model(tiny_backbones, kind="letters")
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATES[request.param]
    return request.param, model, processor


CHAT = [typed("Be kind.", "system"), *HISTORY, typed("I passed it."), typed("At last.")]
FITTED = {
    "gemma": [typed("Be kind.\nI got the results."), HISTORY[2], typed("I passed it.\nAt last.")],
    "mistral": [CHAT[0], HISTORY[1], HISTORY[2], typed("I passed it.\nAt last.")],
}


def test_a_chat_is_fitted_to_its_template(strict):
    name, _, processor = strict
    with pytest.raises(Exception, match=r"alternate|not supported"):
        processor.tokenizer.apply_chat_template(CHAT, tokenize=False)
    fitted = fit_messages(CHAT, processor.tokenizer)
    assert fitted == FITTED[name]
    assert fit_messages(fitted, processor.tokenizer) == fitted
    rendered = processor.tokenizer.apply_chat_template(fitted, add_generation_prompt=True, tokenize=False)
    assert processor.apply_chat_template(CHAT, add_generation_prompt=True) == rendered
    assert "How was the exam" not in rendered and rendered.count("Be kind.") == 1


def test_dropped_turns_are_told(strict, monkeypatch):
    told = []
    monkeypatch.setattr("dual_slm.templates_dual_slm.logging.warning_once", lambda _, text: told.append(text))
    _, _, processor = strict
    fit_messages(CHAT[2:], processor.tokenizer)
    assert not told
    fit_messages(CHAT, processor.tokenizer)
    assert told and "begin with the assistant" in told[0]


def test_a_template_that_accepts_everything_changes_nothing(letters):
    _, processor = letters
    assert fit_messages(CHAT, processor.tokenizer) == CHAT
    assert processor.apply_chat_template(CHAT) == processor.tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_without_a_system_role_the_prompt_goes_to_the_first_user_turn(letters):
    """Also behind an assistant that may begin, and where no user has spoken."""
    _, processor = letters
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    template = refusal + processor.tokenizer.chat_template
    found = fit_messages(CHAT, processor.tokenizer, template)
    assert found == [HISTORY[0], typed("Be kind.\nI got the results."), *CHAT[3:]]
    assert fit_messages(CHAT[:1], processor.tokenizer, template) == [typed("Be kind.")]


def test_a_spoken_turn_keeps_its_clip_behind_the_system_prompt(strict):
    _, _, processor = strict
    chat = [typed("Be kind.", "system"), typed("the fox", "assistant"), spoken(0.7, 1), typed("hello")]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text.count("<|audio|>") == 1 and "<|audio|>\nhello" in text
    plain = prepare(processor, [spoken(0.7, 1)])
    assert torch.equal(prepare(processor, chat)["input_features"], plain["input_features"])


def test_the_loss_is_on_the_answer_as_the_template_writes_it(strict):
    """The batch is the template's own rendering of the whole chat; Mistral's writes a space before an answer."""
    name, _, processor = strict
    processor.tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    told = row(caption="(sad voice)", system="Be kind.")
    samples = [make_sample(told, "dialogue", CHOICES)]
    samples += [make_sample(told, "emotion", CHOICES, epoch=epoch) for epoch in range(9)]
    batch, compared = DualSLMCollator(processor)(samples), 0
    for n, sample in enumerate(samples):
        ids, trained = batch["input_ids"][n], batch["labels"][n] != -100
        assert processor.decode(ids[trained]) == (" " if name == "mistral" else "") + sample.target + ENDS[name]
        ids = ids[batch["attention_mask"][n].bool()]
        assert processor.decode(ids[: -int(trained.sum())]).endswith(PROMPT_ENDS[name])
        if name == "gemma" or sample.messages[0]["role"] != "system":  # Mistral tells the last user turn alone
            chat = [*text_twin(sample.messages), typed(sample.target, "assistant")]
            whole = str(processor.apply_chat_template(chat))
            assert processor.decode(ids) == whole.removesuffix("\n")
            assert ids.tolist() == processor.tokenizer(whole, add_special_tokens=False)["input_ids"][: len(ids)]
            compared += 1
    assert compared > 1


def test_three_turns_with_the_cache_are_those_without(strict):
    _, model, processor = strict
    conversation = DualSLMConversation(model, processor, system="be brief", max_new_tokens=6, eos_token_id=None)
    chat, turns = (
        [typed("be brief", "system")],
        ({"audio": tone(1.0, 1)}, {"text": "the fox"}, {"audio": tone(0.5, 2)}),
    )
    for turn in turns:
        parts = [{"type": "audio", **turn}] if "audio" in turn else [{"type": "text", **turn}]
        inputs = prepare(processor, [*chat, {"role": "user", "content": parts}])
        whole = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
        reply = processor.decode(whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert conversation.say(**turn)["reply"] == reply
        chat += [{"role": "user", "content": parts}, typed(reply, "assistant")]


def test_alignment_answers_under_the_prompt_that_is_trained(strict, tiny_backbones):
    name, _, processor = strict
    aligner = Aligner(tiny_backbones[1], AlignmentConfig())
    aligner.tokenizer.chat_template = TEMPLATES[name]
    told = row(caption="(sad voice)", system="Be kind.")
    system, prompt = aligner.prompt(told)
    assert system == "Be kind." and "How was the exam" not in prompt
    sample = make_sample(told, "dialogue", CHOICES)
    assert prompt == processor.apply_chat_template(text_twin(sample.messages), add_generation_prompt=True)
    ids = DualSLMCollator(processor, with_prompts=True)([sample])["prompt_input_ids"][0]
    assert processor.decode(ids) == prompt
