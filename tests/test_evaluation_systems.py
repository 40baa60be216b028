"""Systems: the swap of branches, the answer loss, files of replies, Qwen2-Audio, cascades."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluated import figure, records_of, table
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import _tokenizer
from dual_slm import DualSLMForConditionalGeneration, DualSLMProcessor
from dual_slm.training.corpora.row import Row
from dual_slm.training.corpora.table import read_table
from dual_slm.training.evaluation.context import EvaluationContext
from dual_slm.training.evaluation.evaluate import evaluate
from dual_slm.training.evaluation.suites import disentanglement
from dual_slm.training.evaluation.systems import CONDITIONS, Checkpoint, Replies, load_system
from dual_slm.training.files import DEMO_CLIP
from dual_slm.training.tasks import label_sets

pytest_plugins = ["evaluation_fixtures"]


@pytest.fixture(scope="module")
def clips(data) -> list[Row]:
    return [row for row in read_table(data) if row.split == "test"]


@pytest.mark.slow
def test_the_loss_of_the_right_answer_is_the_llms_own(whole, checkpoint, data):
    """One clip at a time, by the plain forward with labels."""
    folder, result = whole
    model = DualSLMForConditionalGeneration.from_pretrained(checkpoint)
    processor = DualSLMProcessor.from_pretrained(checkpoint)
    system, table = Checkpoint(model, processor, folder / "features"), list(read_table(data))
    context = EvaluationContext([r for r in table if r.split == "test"], label_sets(table), tuple(CONDITIONS), limit=2)
    found = {(r["task"], r["corpus"], r["id"], r["condition"]): r for r in records_of(folder, "disentanglement")}
    queries = [q for q in disentanglement(context) if q.condition in ("P&L", "P only", "L only", "none")]
    total, tokens = 0.0, 0
    for query in queries:
        paralinguistic, linguistic = query.sources()
        audio = system.features(
            [query.voice] if paralinguistic == "speech" else [], [query.row] if linguistic == "speech" else []
        )
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        prompt = processor.apply_chat_template(query.sample.messages, **options)["input_ids"]
        answer = query.sample.target + processor.tokenizer.eos_token
        target = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids, labels = torch.cat([prompt, target], 1), torch.cat([torch.full_like(prompt, -100), target], 1)
        with torch.no_grad():
            whole_loss = model(
                ids, attention_mask=torch.ones_like(ids), labels=labels, audio_features=audio
            ).loss.item()
        entry = found[query.sample.task, query.row.corpus, query.row.id, query.condition]
        assert entry["answer_tokens"] == target.shape[1]
        assert entry["answer_nll"] / entry["answer_tokens"] == pytest.approx(whole_loss, rel=1e-4)
        if (query.sample.task, query.row.corpus, query.condition) == ("gender", "read", "P&L"):
            total, tokens = total + whole_loss * target.shape[1], tokens + target.shape[1]
    assert len(queries) > 20
    value = figure(result, "disentanglement", "read", "gender", "P&L", "answer loss")["value"]
    assert value == pytest.approx(total / tokens, rel=1e-4)


def test_a_swap_takes_the_voice_of_one_clip_and_the_words_of_another(tiny, clips, tmp_path):
    system = Checkpoint(*tiny, tmp_path)
    a, b = clips[0], clips[4]
    system.prepare([a, b])
    with torch.inference_mode():
        mixed, only_a, only_b = system.features([a], [b]), system.features([a], [a]), system.features([b], [b])
    for name, mine, other in (("paralinguistic", only_a, only_b), ("linguistic", only_b, only_a)):
        assert torch.equal(mixed[f"{name}_embeds"], mine[f"{name}_embeds"])
        assert not torch.equal(mixed[f"{name}_embeds"], other[f"{name}_embeds"])
    if mixed.linguistic_token_ids is not None:
        assert torch.equal(mixed.linguistic_token_ids, only_b.linguistic_token_ids)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """The real classes of Qwen2-Audio with small random weights, in bfloat16 as the released ones."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = _tokenizer()
    tokenizer.add_tokens(["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"], special_tokens=True)
    tokenizer.chat_template = None  # Qwen2-Audio's processor has its own
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"model_type": "qwen2", "vocab_size": len(tokenizer), "num_key_value_heads": 2}
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    config = Qwen2AudioConfig(
        audio_config=audio | {"num_mel_bins": 128},
        text_config=text | {"eos_token_id": 2, "pad_token_id": 0},
        audio_token_id=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    torch.manual_seed(0)
    Qwen2AudioForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=128), tokenizer).save_pretrained(folder)
    return folder


def test_qwen2_audio_answers_through_transformers(qwen, tmp_path):
    """The chat format, the placeholder of the clip, a reply of its own."""
    data = table(tmp_path)
    result = evaluate(str(qwen), [str(data)], tmp_path / "out", suites=["attributes"], limit=2)
    records = [json.loads(line) for line in (tmp_path / "out" / "attributes.jsonl").read_text().splitlines()]
    assert {r["condition"] for r in records} == {"P&L"}
    assert all("<|AUDIO|>" in r["prompt"] and "<|im_start|>assistant" in r["prompt"] for r in records)
    assert any(f["task"] == "gender" and f["metric"] == "accuracy" for f in result["figures"])
    with pytest.raises(ValueError, match="is a llama"):
        llama = tmp_path / "llama"
        llama.mkdir()
        (llama / "config.json").write_text('{"model_type": "llama"}')
        evaluate(str(llama), [data], tmp_path / "no")


def query_of(row: Row, task: str, **options):
    (found,) = EvaluationContext([row], label_sets([row]), ("P&L",), **options).queries("s", ["P&L"], task, [row])
    return replace(found, max_new_tokens=4)


def test_qwen2_audio_gets_system_history_clip_and_instruction(qwen, clips):
    """In this order, the clip before the text of its turn, and nothing of the transcript."""
    history = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}]
    talk = query_of(clips[0].replace(history=history, response="Fine.", system="Be kind."), "dialogue")
    system = load_system(str(qwen), "unused")
    assert system.prompt(talk) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\nAudio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n<|im_end|>\n<|im_start|>assistant\n"
    )
    asked = next(q for n in range(9) if (q := query_of(clips[n], "gender")).sample.messages[0]["role"] == "user")
    instruction = asked.sample.messages[0]["content"][1]["text"]
    assert f"<|audio_eos|>\n{instruction}<|im_end|>" in system.prompt(asked)
    replies = [reply for _, reply in system.reply([talk, asked])]
    assert len(replies) == 2 and all(isinstance(reply, str) for reply in replies)


def test_a_cascade_answers_about_the_words_that_its_whisper_hears(tiny_backbones, tmp_path):
    """Real speech and Whisper's real decoder; a random LLM reads the words in the prompt of our systems."""
    row = Row(id="d", corpus="c", split="test", audio=str(DEMO_CLIP), transcript="other words", gender="female")
    system = load_system(f"cascade:whisper-tiny.en+{tiny_backbones[1]}", tmp_path)
    heard, read = EvaluationContext([row], label_sets([row]), system.conditions).queries(
        "s", ["P only", "P&L", "text"], "asr", [row]
    )
    assert (heard.condition, read.condition) == ("P&L", "text")
    words = system.prompt(heard).lower()
    assert "which was the big news of the day" in words and "other words" not in words
    assert "other words" in system.prompt(read) and "big news" not in system.prompt(read)
    short = [replace(heard, max_new_tokens=3), replace(read, max_new_tokens=5)]
    replies = {query.condition: reply for query, reply in system.reply(short)}
    llm = AutoModelForCausalLM.from_pretrained(tiny_backbones[1])
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbones[1])
    for query in short:
        ids = tokenizer(system.prompt(query), return_tensors="pt", add_special_tokens=False)
        output = llm.generate(**ids, max_new_tokens=query.max_new_tokens, do_sample=False)
        text = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert replies[query.condition] == text.strip()


def test_a_name_that_is_no_cascade_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'cascade:whisper-base' names no cascade; write cascade:WHISPER\+LLM"):
        load_system("cascade:whisper-base", tmp_path)


def test_the_journal_keeps_its_keys(clips):
    """A folder of an earlier version goes on: its journal has these keys."""
    context = EvaluationContext(clips, label_sets(clips), tuple(CONDITIONS))
    found = disentanglement(context)
    assert found[0].key == f"P&L/asr/read/{found[0].row.id}/read/{found[0].row.id}"
    swap = next(q for q in found if q.condition == "swap" and q.sample.task == "emotion")
    assert swap.key == f"swap/emotion/{swap.row.corpus}/{swap.row.id}/acted/{swap.voice.id}"


def test_a_damaged_line_of_replies_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": "1", "task": "asr", "reply": "a"}\n\n{"id": "2"}\n')
    with pytest.raises(ValueError, match=r"r.jsonl, line 3: a reply is one JSON object with id, task and reply"):
        Replies(path)
