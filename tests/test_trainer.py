"""Training through the frozen LLM: losses, KL, what is frozen, and checkpoints."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from world import world

from conftest import make_model
from dual_slm.training.alignment import score_targets
from dual_slm.training.collator import DualSLMCollator, TrainingCollator
from dual_slm.training.corpora.table import read_table
from dual_slm.training.dataset import BucketSampler, StageDataset
from dual_slm.training.err import Sources
from dual_slm.training.features import FeatureStore
from dual_slm.training.forward import adapt_cached, forward_targets
from dual_slm.training.hardware import checkpoint_activations
from dual_slm.training.labels import TASKS
from dual_slm.training.recipe import StageRecipe, TrainRecipe
from dual_slm.training.trainer import DualSLMTrainer, last_checkpoint


@pytest.fixture(scope="module", params=["paper", "letters"])
def cached(request, tiny_backbones, tmp_path_factory):
    """(model, processor, store, rows) with cached features."""
    folder = tmp_path_factory.mktemp("cached")
    world(folder, tiny_backbones, clips=12)
    rows = list(read_table(folder / "t.parquet"))
    model, processor = make_model(tiny_backbones, kind=request.param)
    store = FeatureStore(folder / "features", model.config)
    store.build(rows, model, processor, workers=0)
    return model, processor, store, rows


def stage(**changes) -> StageRecipe:
    tasks = {"asr": 1, "emotion": 1, "gender": 1, "dialogue": 1}
    return StageRecipe(**({"name": "s", "err_stage": "holistic", "tasks": tasks} | changes))


def packed(cached, items) -> dict[str, torch.Tensor]:
    """A batch of items as the model takes it."""
    _, processor, store, _ = cached
    batch = TrainingCollator(processor, store)(items)
    del batch["task_ids"]
    return batch


def target_loss(model, batch) -> torch.Tensor:
    output = forward_targets(model, **batch)
    return cross_entropy(output.logits, output.labels[output.labels != -100])


def gradients(model) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def trainer(cached, folder: Path, **changes) -> DualSLMTrainer:
    """A trainer of one stage on the cached rows, which validates on four of them."""
    model, processor, store, rows = cached
    asked = stage(**{"learning_rate": 1e-3, "max_steps": 4, **changes})
    dataset = StageDataset(rows, asked, seed=3)
    train = TrainRecipe(batch_size=4, eval_steps=2, logging_steps=1)
    return DualSLMTrainer(
        model=model,
        args=train.arguments(folder, asked, generation_max_length=6),
        stage=asked,
        train_dataset=dataset,
        eval_dataset=[dataset.item(row, "emotion") for row in rows[:4]],
        data_collator=TrainingCollator(processor, store, captions=asked.caption_share > 0),
        evaluation_collator=TrainingCollator(processor, store, with_prompts=True),
        processing_class=processor,
        compute_metrics=lambda prediction: {"reply_tokens": prediction.predictions.shape[1]},
    )


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_cached_packed_training_has_the_loss_of_the_plain_model(cached):
    """Features in half precision from the disk, masked positions dropped, logits at targets alone: the same loss."""
    model, processor, _, rows = cached
    dataset = StageDataset(rows, stage(err_stage="joint"), seed=3)
    items = [dataset[0, i] for i in range(6)]
    plain = DualSLMCollator(processor)([item.sample for item in items])
    with torch.no_grad():
        output = forward_targets(model, **packed(cached, items))
        loss = cross_entropy(output.logits, output.labels[output.labels != -100])
        expected = model(**plain).loss
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)  # bfloat16 encoder in the cache
    assert (output.labels != -100).sum() == (plain["labels"] != -100).sum()
    assert len(output.logits) == (plain["labels"] != -100).sum()


def test_the_prefix_before_the_speech_is_read_without_gradient_and_changes_nothing(cached, monkeypatch):
    """System prompt and history go through the LLM apart, without a backward pass: the same loss and gradients, and
    fewer positions in the graph."""
    model, *_, rows = cached
    long = [{"role": "user", "content": "the quick brown fox"}, {"role": "assistant", "content": "hello yes"}]
    items = [
        StageDataset([row.replace(history=long * (1 + n % 3))], stage(tasks={"dialogue": 1}), seed=3)[0, 0]
        for n, row in enumerate(rows[:6])
    ]
    batch, seen, found, losses = packed(cached, items), [], [], []
    layer = model.language_model.model.layers[0]
    watch = layer.register_forward_hook(
        lambda m, i, o: seen.append(i[0].shape[1]) if torch.is_grad_enabled() else None
    )
    for shortest in (1, 10**6):
        monkeypatch.setattr("dual_slm.training.forward._SHORTEST_PREFIX", shortest)
        model.zero_grad()
        loss = target_loss(model, batch)
        loss.backward()
        losses.append(loss.item())
        found.append(gradients(model))
    watch.remove()
    model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(found[0]) == len(found[1]) > 4
    for split, whole in zip(*found, strict=True):
        torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-3)
    assert seen[0] < seen[1]


def test_the_teacher_is_the_frozen_llm_on_the_text_twin(cached):
    """Where both branches come from text, model and teacher see the same: no divergence, with all tokens kept."""
    model, processor, _, rows = cached
    dataset = StageDataset(rows, stage(err_stage="joint"), seed=0)
    items = [dataset.item(row, "dialogue") for row in rows[:5]]
    size = model.config.get_text_config().vocab_size
    scores = score_targets([item.sample for item in items], model, DualSLMCollator(processor), k=size, batch_size=2)
    known = [replace(item, teacher=score) for item, score in zip(items, scores, strict=True)]
    asked = [*known, dataset.item(rows[6], "asr")]
    for sources, equal in ((("caption", "transcript"), True), (("speech", "speech"), False)):
        batch = packed(cached, [replace(item, sources=Sources(*sources, False, False)) for item in asked])
        ids, teacher = batch.pop("teacher_ids"), batch.pop("teacher_log_probs")
        with torch.no_grad():
            output = forward_targets(model, **batch)
        log_probs = output.logits.float().log_softmax(-1)
        token_loss = -log_probs.gather(-1, output.labels[output.labels != -100][:, None])[:, 0]
        judge = SimpleNamespace(stage=stage(objective="kl"))
        loss = DualSLMTrainer._with_teacher(judge, token_loss, log_probs, ids, teacher)
        taught = torch.isfinite(teacher[:, 0])
        assert taught.sum() == sum(len(ids) for ids, _ in scores)
        assert torch.equal(loss[~taught], token_loss[~taught])  # the ASR row has no teacher
        assert (loss[taught].abs().max() < 1e-4) == equal


def test_activation_checkpointing_changes_nothing_but_memory(cached, monkeypatch):
    model, *_, rows = cached
    monkeypatch.setattr("dual_slm.training.forward._SHORTEST_PREFIX", 10**6)  # one pass in either case
    dataset = StageDataset(rows, stage(err_stage="joint"), seed=0)
    batch, results = packed(cached, [dataset[0, i] for i in range(4)]), []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model)
        model.train()
        calls = Counter()
        layer = model.language_model.get_decoder().layers[0]
        hook = layer.self_attn.register_forward_pre_hook(lambda *_, calls=calls: calls.update(["attention"]))
        model.zero_grad()
        torch.manual_seed(0)
        target_loss(model, batch).backward()
        hook.remove()
        results.append((calls["attention"], gradients(model)))
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    model.eval()
    model.zero_grad()
    assert results[0][0] == 1
    assert results[1][0] == 2  # computed again in the backward pass
    for plain, checkpointed in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(plain, checkpointed)


# ---- a stage ---------------------------------------------------------------------------------------------------------


def test_a_stage_learns_and_logs_each_task(cached, tmp_path):
    """A run keeps two marked checkpoints and the figures of each task, and generates from the prompts alone."""
    model, *_, store, _ = cached
    taught = trainer(cached, tmp_path, err_stage="joint", caption_share=0.3 * bool(store.pools))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    taught.train()
    changed = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    letters = model.config.linguistic_adapter_type == "letters"  # which learn in stage 0 alone
    assert changed == {"paralinguistic_adapter"} | (set() if letters else {"linguistic_adapter"})
    logged = set().union(*taught.state.log_history)
    assert {name.removeprefix("token_accuracy_") for name in logged if name.startswith("token_accuracy_")} <= set(
        TASKS
    )
    assert ("loss_caption" in logged) == letters
    assert {"eval_loss", "eval_loss_emotion", "eval_token_accuracy_emotion"} <= logged
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert all(entry["eval_reply_tokens"] <= 6 for entry in taught.state.log_history if "eval_loss" in entry)


def test_adapters_without_a_rate_are_frozen(cached, tmp_path):
    taught = trainer(cached, tmp_path, err_stage="joint", paralinguistic_learning_rate=2e-3, learning_rate=1e-3)
    groups = {(group["lr"], group["weight_decay"]) for group in taught.create_optimizer().param_groups}
    letters = taught.processing_class.linguistic_adapter_type == "letters"
    assert groups == {(2e-3, 0.05), (2e-3, 0.0)} | (set() if letters else {(1e-3, 0.05), (1e-3, 0.0)})
    with pytest.raises(ValueError, match="stage s: nothing learns, as the rates of all that there is are 0"):
        trainer(cached, tmp_path, learning_rate=0.0)
    frozen = {"paralinguistic_learning_rate": 0.0, "err_stage": "disentangle", "tasks": {"gender": 1, "asr": 1}}
    with pytest.raises(ValueError, match="nothing learns" if letters else "stage s: gender would teach nothing"):
        trainer(cached, tmp_path, **frozen)
    if not letters:
        with pytest.raises(ValueError, match=r"caption_share is 0\.1, and stage 0 taught these adapters neither"):
            trainer(cached, tmp_path, caption_share=0.1)


def test_half_a_checkpoint_does_not_count(tmp_path):
    for step, whole in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path / "none") is None


def test_an_adapter_that_err_freezes_in_a_step_keeps_its_bits(tiny_backbones, tmp_path, monkeypatch):
    """Two optimizer steps of one kind of task each: momentum and decay move only the adapter that the step teaches."""
    world(tmp_path, tiny_backbones, clips=24)
    rows = list(read_table(tmp_path / "t.parquet"))
    model, processor = make_model(tiny_backbones)
    store = FeatureStore(tmp_path / "features", model.config)
    store.build(rows, model, processor, workers=0)
    asked = {"err_stage": "disentangle", "tasks": {"asr": 1, "emotion": 1}, "max_steps": 3}
    learner = trainer((model, processor, store, rows), tmp_path / "out", **asked)
    kinds = [learner.train_dataset[0, index].sample.kind for index in range(len(rows))]
    batches = [[(0, i) for i, kind in enumerate(kinds) if kind == wanted][:4] for wanted in set(kinds)]
    order = {"linguistic": 0, "paralinguistic": 1}
    batches.sort(key=lambda batch: order[kinds[batch[0][1]]])
    chosen = [batches[0], batches[1], batches[0]]  # the last has momentum of the paralinguistic adapter behind it
    monkeypatch.setattr(BucketSampler, "__iter__", lambda self: iter(chosen))
    before, after = [], []

    def weights() -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters() if "_adapter." in name}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            before.append(weights())

        def on_step_end(self, args, state, control, **kwargs):
            after.append(weights())

    learner.add_callback(Watch())
    learner.train()
    moved = [
        {name.split("_adapter.")[0] for name, p in old.items() if not torch.equal(p, new[name])}
        for old, new in zip(before, after, strict=True)
    ]
    assert moved == [{"linguistic"}, {"paralinguistic"}, {"linguistic"}]


def test_an_adapter_that_err_freezes_for_a_clip_has_no_dropout_there(tiny_backbones):
    """In a batch of both kinds the clips that teach keep their dropout."""
    model, _ = make_model(tiny_backbones, paralinguistic_dropout=0.5, linguistic_dropout=0.5)
    states, lengths = (
        torch.randn(4, 1, 30, 32, generator=torch.Generator().manual_seed(0)),
        torch.tensor([30, 20, 9, 30]),
    )
    states *= (torch.arange(30) < lengths[:, None])[:, None, :, None]
    branches, trained = torch.ones(4, 2), torch.tensor([[1, 0], [0, 1], [0, 1], [1, 0]])
    model.eval()
    with torch.no_grad():
        still = adapt_cached(model, states, lengths, branches)
    model.train()
    found = adapt_cached(model, states, lengths, branches, audio_trained=trained)
    words = zip(found.linguistic_embeds.split([6, 4, 2, 6]), still.linguistic_embeds.split([6, 4, 2, 6]), strict=True)
    pairs = {"voice": zip(found.paralinguistic_embeds, still.paralinguistic_embeds, strict=True), "words": words}
    for column, (branch, clips) in enumerate(pairs.items()):
        for row, (one, other) in enumerate(clips):
            assert torch.allclose(one, other, atol=1e-6) != bool(trained[row, column]), (branch, row)
            assert one.requires_grad
    (found.paralinguistic_embeds[1:3].sum() + found.linguistic_embeds[:6].sum()).backward()
    gradients_ = [p.grad for p in model.parameters() if p.grad is not None]
    assert not any(gradient.any() for gradient in gradients_)
