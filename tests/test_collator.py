"""From samples to batches: targets with a loss, prompts to generate from, sources that were drawn."""

from dataclasses import replace

import pytest
import torch
from test_tasks import CHOICES, row
from world import world

from conftest import make_model
from dual_slm.training.collator import DualSLMCollator, Item, TrainingCollator
from dual_slm.training.corpora.table import read_table
from dual_slm.training.err import SourceRules, Sources, draw_sources
from dual_slm.training.features import FeatureStore
from dual_slm.training.forward import forward_targets
from dual_slm.training.labels import TASKS
from dual_slm.training.spelling import caption_targets
from dual_slm.training.tasks import label_sets, make_sample


@pytest.fixture(scope="module")
def spoken(tmp_path_factory, tiny_backbones):
    """Rows with audio files of different lengths."""
    folder = tmp_path_factory.mktemp("audio")
    world(folder, tiny_backbones, clips=9)
    return list(read_table(folder / "t.parquet"))


@pytest.fixture(scope="module", params=["paper", "letters"])
def cached(request, tiny_backbones, spoken, tmp_path_factory):
    """(model, processor, store) with features of the spoken rows."""
    model, processor = make_model(tiny_backbones, kind=request.param)
    store = FeatureStore(tmp_path_factory.mktemp("features"), model.config)
    store.build(spoken, model, processor, workers=0)
    return model, processor, store


def samples_of(rows, *tasks: str) -> list:
    choices = label_sets(rows)
    return [make_sample(r, tasks[n % len(tasks)], choices) for n, r in enumerate(rows)]


def test_the_loss_is_on_the_target_and_its_end_alone(paper, spoken):
    _, processor = paper
    rows = [r.replace(response="Well done.", response_complete=n != 1) for n, r in enumerate(spoken[:3])]
    batch = DualSLMCollator(processor)(samples_of(rows, "dialogue"))
    for n, (ids, labels, mask) in enumerate(
        zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ):
        target = processor.decode(labels[labels != -100])
        assert target == ("Well done." if n == 1 else "Well done.<|im_end|>")
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        assert (labels[mask == 0] == -100).all()
        assert processor.decode(ids[mask.bool()][: -len(labels[labels != -100])]).endswith("<|im_start|>assistant\n")


def test_a_batch_has_the_loss_of_its_samples_alone(tiny, spoken):
    """Whatever the padding: 3 samples of different length, and the same ones by themselves."""
    model, processor = tiny
    collator = DualSLMCollator(processor)
    samples = samples_of(spoken[:3], "asr", "emotion", "dialogue")
    total = sum((collator([s])["labels"] != -100).sum() for s in samples)
    with torch.no_grad():
        together = model(**collator(samples)).loss
        apart = sum(model(**(b := collator([s]))).loss * (b["labels"] != -100).sum() for s in samples) / total
    assert together.item() == pytest.approx(apart.item(), rel=2e-4)


def test_prompts_for_generation_are_left_padded_and_hold_no_answer(paper, spoken):
    _, processor = paper
    batch = DualSLMCollator(processor, with_prompts=True)(samples_of(spoken[:3], "asr"))
    for prompt, mask in zip(batch["prompt_input_ids"], batch["prompt_attention_mask"], strict=True):
        assert mask[-1] == 1
        assert processor.decode(prompt[mask.bool()]).endswith("<|im_start|>assistant\n")


def test_a_row_without_audio_is_text(paper):
    _, processor = paper
    batch = DualSLMCollator(processor)([make_sample(row(caption="(sad voice)"), "dialogue", CHOICES)])
    assert "input_features" not in batch
    assert "(sad voice) i passed it" in processor.decode(batch["input_ids"][0])


def test_a_template_that_hides_the_answer_is_refused(tiny_backbones):
    _, processor = make_model(tiny_backbones)
    processor.chat_template = processor.chat_template.replace(
        "message['content']", "'<think></think>' + message['content']"
    )
    with pytest.raises(ValueError, match="does not begin with the prompt"):
        DualSLMCollator(processor)


def test_a_training_batch_says_what_is_heard_and_what_learns(cached, spoken):
    _, processor, store = cached
    sources = [Sources("speech", "speech", True, True), Sources("caption", "speech", False, True)]
    sources += [Sources("speech", "transcript", True, False), Sources("none", "none", False, False)]
    samples = samples_of(spoken[:4], "asr", "emotion", "dialogue")
    teacher = (torch.full((1, 2), 7), torch.log(torch.tensor([[0.75, 0.25]])))
    items = [Item(*parts) for parts in zip(samples, spoken, sources, strict=False)]
    count = int((TrainingCollator(processor, store)(items[2:3])["labels"] != -100).sum())
    items[2] = replace(items[2], teacher=tuple(part.expand(count, -1) for part in teacher))
    captions = processor.caption_slots is not None
    batch = TrainingCollator(processor, store, captions=captions, with_prompts=True)(items)
    assert batch["audio_branches"].tolist() == [[1, 1], [0, 1], [1, 0], [0, 0]]
    assert batch["audio_trained"].tolist() == [[True, True], [False, True], [True, False], [False, False]]
    assert [TASKS[task] for task in batch["task_ids"]] == ["asr", "emotion", "dialogue", "asr"]
    assert batch["audio_lengths"].tolist() == [store.length(r) for r in spoken[:4]]
    assert torch.equal(batch["audio_states"][0, -1, : store.length(spoken[0])], store.get(spoken[0]))
    assert ("audio_pooled" in batch) == store.pools and "input_features" not in batch
    assert spoken[2].transcript in processor.decode(batch["input_ids"][2])
    assert spoken[1].caption in processor.decode(batch["input_ids"][1])
    if captions:
        assert torch.equal(batch["caption_labels"], caption_targets(spoken[:4], processor))
    owners = (batch["labels"] != -100).nonzero()[:, 0]
    assert torch.equal(torch.isfinite(batch["teacher_log_probs"]).all(1), owners == 2)
    assert (batch["teacher_ids"][owners == 2] == 7).all()


def test_err_freezes_the_other_adapter_for_each_sample(cached, spoken):
    """In one batch of both kinds, each adapter's gradient is that of its own tasks' samples alone."""
    model, processor, store = cached
    collator, rules = TrainingCollator(processor, store), SourceRules(err_stage="disentangle")

    def items(task: str) -> list[Item]:
        samples = samples_of(spoken, task)
        drawn = [draw_sources(rules, r, s.kind, 0, 0) for r, s in zip(spoken, samples, strict=True)]
        return [Item(*i) for i in zip(samples, spoken, drawn, strict=True) if i[2][:2] == ("speech", "speech")][:2]

    def gradients(items: list[Item]) -> dict[str, float]:
        model.zero_grad()
        batch = collator(items)
        batch.pop("task_ids")
        output = forward_targets(model, **batch)
        loss = torch.nn.functional.cross_entropy(output.logits, output.labels[output.labels != -100])
        if loss.requires_grad:
            loss.backward()
        sums = {}
        for branch in ("paralinguistic", "linguistic"):
            parameters = getattr(model, f"{branch}_adapter").parameters()
            sums[branch] = sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None)
        return sums

    asr, emotion = items("asr"), items("emotion")
    assert asr and emotion
    learns = model.config.linguistic_adapter_type != "letters"  # no gradient comes back through letters
    assert gradients(asr)["paralinguistic"] == 0
    assert (gradients(asr)["linguistic"] > 0) == learns
    assert gradients(emotion)["linguistic"] == 0
    assert gradients(emotion)["paralinguistic"] > 0
    assert [value > 0 for value in gradients(asr + emotion).values()] == [True, learns]
    model.zero_grad()
