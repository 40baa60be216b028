"""Training through the LLM: sources, batches, exact resume, two processes, recipes and their refusals."""

import contextlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel

from conftest import LABELS, make_model, tone
from dual_slm import DualSLMForConditionalGeneration, DualSLMProcessor
from dual_slm.training.alignment import score_targets
from dual_slm.training.cli import main
from dual_slm.training.collator import DualSLMCollator, Item, TrainingCollator
from dual_slm.training.corpora.schema import make_row, read_table, write_table
from dual_slm.training.err import Sources, draw_sources
from dual_slm.training.features import FeatureStore, augmented
from dual_slm.training.recipe import RECIPES, StageRecipe, load_recipe
from dual_slm.training.run import load_data, plan, run, take_linguistic, warm_start
from dual_slm.training.run import make_model as training_model
from dual_slm.training.tasks import label_sets
from dual_slm.training.trainer import (
    BucketSampler,
    DualSLMTrainer,
    StageDataset,
    activation_bytes,
    checkpoint_activations,
    last_checkpoint,
)
from dual_slm.training.warm_start import Speller

# ---- ERR -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linguistic", "paralinguistic"])
def test_the_other_branch_comes_from_three_sources_in_thirds(kind):
    """Chi-square with two degrees of freedom: 13.8 is passed by chance once in a thousand."""
    n = 9_000
    drawn = [draw_sources(kind, "disentangle", 0, epoch, f"id{i}") for epoch in range(3) for i in range(n // 3)]
    own, other = (1, 0) if kind == "linguistic" else (0, 1)
    assert {d[own] for d in drawn} == {"speech"}
    counts = Counter(d[other] for d in drawn)
    text = "caption" if kind == "linguistic" else "transcript"
    assert set(counts) == {text, "speech", "none"}
    assert sum((c - n / 3) ** 2 / (n / 3) for c in counts.values()) < 13.8
    assert {d[2:] for d in drawn} == {(kind == "paralinguistic", kind == "linguistic")}


def test_stages_one_and_three_and_the_ablation():
    assert set(draw_sources("linguistic", "joint", 0, 0, "x")) == {"speech", True}
    duals = Counter(draw_sources("dual", "holistic", 0, 0, str(i), replaced_share=0.25) for i in range(4_000))
    both = duals[("speech", "speech", True, True)]
    assert both == pytest.approx(3_000, abs=120)
    assert duals[("caption", "speech", False, True)] == pytest.approx(500, abs=90)
    assert duals[("speech", "transcript", True, False)] == pytest.approx(500, abs=90)
    off = {
        draw_sources(kind, "disentangle", 0, 0, str(i), err=False)
        for kind in ("linguistic", "dual")
        for i in range(99)
    }
    assert off == {("speech", "speech", True, True)}


def test_what_is_not_known_is_not_drawn_and_bad_names_are_refused():
    drawn = Counter(
        draw_sources("linguistic", "disentangle", 0, 0, str(i), has_caption=False)[0] for i in range(2_000)
    )
    assert set(drawn) == {"speech", "none"}
    assert drawn["none"] == pytest.approx(1_000, abs=120)
    with pytest.raises(ValueError, match="stage is 'two'"):
        draw_sources("dual", "two", 0, 0, "x")


# ---- a small world ---------------------------------------------------------------------------------------------------


def world(folder: Path, backbones, clips: int = 24, **changes) -> Path:
    """A table of real audio files and a recipe over it, warm start and three stages; returns the recipe's file."""
    rows = []
    for n in range(clips):
        path = folder / f"{n}.wav"
        soundfile.write(path, tone(0.5 + (n % 5) / 5, n), 16_000)
        row = make_row(
            id=str(n),
            corpus="c",
            split="train" if n < clips - 6 else "validation",
            audio=str(path),
            duration=0.5 + (n % 5) / 5,
            transcript=("the quick fox", "the lazy dog", "hello brown fox")[n % 3],
            gender=("female", "male")[n % 2],
            emotion=("happy", "sad")[n % 2],
            history=[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}][: n % 3],
            response="hello to the fox",
            response_complete=n % 4 > 0,
        )
        rows.append(row | {"caption": f"({row['gender']} voice, {row['emotion']} emotion)"})
    write_table(rows, folder / "t.parquet")
    audio, text = backbones
    tasks = {"asr": 1, "emotion": 1}
    stage = {"learning_rate": 1e-3, "max_steps": 6}
    recipe = {
        "model": {
            "audio_model_id": audio,
            "text_model_id": text,
            "adapters": "warm_start",
            "config": {
                "paralinguistic_hidden_size": 24,
                "linguistic_hidden_size": 40,
                "caption_template": "({gender} voice, {emotion} emotion)",
                "attribute_labels": LABELS,
            },
        },
        "data": {"tables": [str(folder / "t.parquet")], "validation_rows": 6, "align_responses": False},
        "warm_start": {"pieces": [40, 60], "steps": [6, 8], "caption_steps": 8, "frames_per_batch": 300},
        "train": {"batch_size": 4, "eval_steps": 2, "logging_steps": 1},
        "stages": [
            {"name": "joint", "err_stage": "joint", "tasks": tasks, "ctc_share": 0.3, "caption_share": 0.3, **stage},
            {"name": "disentangle", "err_stage": "disentangle", "tasks": tasks, **stage},
            {
                "name": "holistic",
                "err_stage": "holistic",
                "tasks": tasks | {"dialogue": 2},
                "objective": "ce+kl",
                **stage,
            },
        ],
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        recipe[section] = value if not name else recipe[section] | {name: value}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def finished(tiny_backbones, tmp_path_factory):
    """A whole run, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = world(folder, tiny_backbones)
    return folder, run(load_recipe(str(recipe)), folder / "run")


def test_a_run_trains_both_adapters_in_every_stage_and_nothing_else(finished, tiny_backbones):
    folder, final = finished
    stages = ["stage-0", "stage-1-joint", "stage-2-disentangle", "stage-3-holistic"]
    weights = [load_file(folder / "run" / stage / "final" / "model.safetensors") for stage in stages]
    for before, after in itertools.pairwise(weights):
        for branch in ("paralinguistic", "linguistic"):
            names = [
                n for n in after if n.startswith(branch) and after[n].is_floating_point() and "statistics" not in n
            ]
            assert any(not torch.equal(before[n], after[n]) for n in names)
    model = DualSLMForConditionalGeneration.from_pretrained(final)
    fresh = DualSLMForConditionalGeneration.from_backbones(*tiny_backbones)
    for part in ("audio_tower", "language_model"):
        state, other = getattr(model, part).state_dict(), getattr(fresh, part).state_dict()
        assert all(torch.equal(state[name], other[name]) for name in other)
    log = json.loads((final / "training_log.json").read_text())
    assert [e["stage"] for e in log[-3:]] == ["joint", "disentangle", "holistic"]
    assert {"eval_loss", "eval_loss_asr", "eval_wer", "eval_accuracy_emotion", "eval_unparsed"} <= set(log[-2])
    assert (folder / "run/stage-3-holistic/curves.png").stat().st_size > 10_000
    made = json.loads((folder / "run/environment.json").read_text())
    assert made["data"]["train"] == 18
    assert made["torch"] == torch.__version__.split("+")[0] or made["torch"] == torch.__version__


def _kill_after(process: subprocess.Popen, reached) -> None:
    limit = time.time() + 120
    while not reached():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() < limit
        time.sleep(0.002)
    started = psutil.Process(process.pid).children(recursive=True)  # a launcher's, which would go on without it
    for each in (process, *started):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(started)


@pytest.mark.parametrize(
    "point",
    [
        "stage-0/linguistic-1.pt",
        "stage-1-joint/checkpoint-4/complete",
        "stage-2-disentangle/checkpoint-2",
        "stage-3-holistic/checkpoint-4",
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(finished, tiny_backbones, tmp_path, point):
    """SIGKILL in the warm start and in each stage, in the middle of writing a checkpoint too."""
    folder, final = finished
    recipe = folder / "recipe.yaml"
    command = [
        sys.executable,
        "-m",
        "dual_slm.training.cli",
        "train",
        "--recipe",
        str(recipe),
        "--output",
        str(tmp_path / "run"),
    ]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums are in the same order
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=threads)
    _kill_after(process, (tmp_path / "run" / point).exists)
    assert not (tmp_path / "run" / "final").exists()
    result = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=threads)
    assert result.returncode == 0, result.stderr[-2000:]
    expected, found = (load_file(f / "model.safetensors") for f in (final, tmp_path / "run" / "final"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_corpus_of_fewer_pieces_than_asked_for_makes_a_checkpoint_that_loads(tiny_backbones, tmp_path):
    """The recipes' 9,085 pieces are those of a large corpus; a small one has fewer, and its checkpoint says so."""
    settings = ["warm_start.pieces=[40, 5000]", "warm_start.steps=[1, 1]", "warm_start.caption_steps=1", "stages=[]"]
    final = run(load_recipe(str(world(tmp_path, tiny_backbones)), settings), tmp_path / "run")
    model = DualSLMForConditionalGeneration.from_pretrained(final)
    assert len(model.linguistic_adapter.soft_tokens.token_ids) == model.config.linguistic_ctc_vocab_size < 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "train"}, "the tables have rows of train, and training needs train and validation"),
        ({"transcript": "добрый день"}, "no transcript is in the letters .* which words are spelled in"),
    ],
)
def test_what_training_cannot_use_is_told_with_its_cure(tiny_backbones, tmp_path, changes, message):
    recipe = load_recipe(str(world(tmp_path, tiny_backbones)))
    (table,) = recipe.data.tables
    write_table([row | changes for row in read_table(table)], table)
    with pytest.raises(ValueError, match=message):
        run(recipe, tmp_path / "run")


def test_labels_that_a_checkpoint_cannot_name_are_told(tiny_backbones, tmp_path, capsys):
    recipe = load_recipe(str(world(tmp_path, tiny_backbones)))
    (table,) = recipe.data.tables
    write_table(
        [row | {"emotion": "frustrated" if row["id"] == "3" else row["emotion"]} for row in read_table(table)], table
    )
    model, _ = training_model(recipe)
    load_data(recipe, tmp_path / "run", model.config)
    told = "will not be taught the emotion frustrated: model.config.attribute_labels has neutral, happy, sad"
    assert told in capsys.readouterr().out


def test_a_run_does_not_go_on_with_other_data(finished, tmp_path):
    """A table that was labelled anew between a kill and --resume: half of a run would be of one, half of the other."""
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "copy")
    table = tmp_path / "copy" / "t.parquet"
    recipe = load_recipe(str(folder / "recipe.yaml"), [f"data.tables=[{table}]"])
    (tmp_path / "copy/run/recipe.yaml").write_text(recipe.to_yaml())
    run(recipe, tmp_path / "copy/run", resume=True)  # the same rows: nothing is left to do
    write_table([row | {"emotion": "happy"} for row in read_table(table)], table)
    with pytest.raises(ValueError, match=r"the tables are not those that .*environment\.json tells of"):
        run(recipe, tmp_path / "copy/run", resume=True)


def test_a_run_is_not_written_over_nor_gone_on_with_by_another_recipe(finished):
    folder, _ = finished
    recipe = load_recipe(str(folder / "recipe.yaml"))
    with pytest.raises(FileExistsError, match="--resume goes on with it"):
        run(recipe, folder / "run")
    recipe.train.seed = 7
    with pytest.raises(ValueError, match="the recipe is not the one of"):
        run(recipe, folder / "run", resume=True)


def test_half_a_checkpoint_does_not_count(tmp_path):
    for step, whole in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path / "none") is None


def test_four_processes_evaluate_what_one_does(tiny_backbones, tmp_path):
    """As many rows in a batch as there are processes: each sees its part of every clip once."""
    (tmp_path / "data").mkdir()
    settings = ["stages.0.max_steps=2", "warm_start.enabled=false", "data.validation_rows=4", "stages.0.ctc_share=0"]
    recipe = world(tmp_path / "data", tiny_backbones)
    values = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(values | {"stages": values["stages"][:1]}))
    environment, logs = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, []
    for processes in (1, 4):
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone"] if processes == 4 else []
        command = [sys.executable, *launch, "-m", "dual_slm.training.cli", "train", "--recipe", str(recipe)]
        output = tmp_path / str(processes)
        result = subprocess.run(
            [*command, "--output", str(output), "--set", *settings], capture_output=True, text=True, env=environment
        )
        assert result.returncode == 0, result.stderr[-3000:]
        log = json.loads((output / "stage-1-joint/log.json").read_text())
        logs.append(next(entry for entry in log if "eval_loss" in entry))
    for name in ("eval_loss", "eval_loss_asr", "eval_loss_emotion", "eval_wer"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4)


@pytest.mark.parametrize("settings", [[], ["train.shard_llm=true"]], ids=["whole", "sharded"])
def test_two_processes_do_what_one_does(tiny_backbones, tmp_path, settings):
    """A real run of two processes over gloo, the same global batches: the same adapters within float tolerance, also where
    each process keeps but half of the LLM's layers."""
    still = {"paralinguistic_dropout": 0.0, "linguistic_dropout": 0.0}
    recipe = world(tmp_path, tiny_backbones)
    values = yaml.safe_load(recipe.read_text())
    values["model"]["config"] |= still
    values["train"] |= {"eval_steps": 6}
    recipe.write_text(yaml.safe_dump(values))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name, processes in (("one", 1), ("two", 2)):
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"] if processes == 2 else []
        command = [sys.executable, *launch, "-m", "dual_slm.training.cli", "train", "--recipe", str(recipe)]
        command += ["--output", str(tmp_path / name), *(["--set", *settings] if settings else [])]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
    if settings:
        kept, whole = re.search(r"layers: ([\d.]+) of ([\d.]+) MiB in each process", result.stdout).groups()
        assert float(kept) == pytest.approx(float(whole) / 2, abs=0.011)
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("shard_llm", [False, True], ids=["whole", "sharded"])
def test_two_processes_resume_to_the_same_bits_in_a_later_epoch(tiny_backbones, tmp_path, shard_llm):
    """Both are killed in the second pass over the data; what follows must be its batches, not the first pass's again."""
    recipe = world(tmp_path, tiny_backbones, warm_start={"enabled": False})
    values = yaml.safe_load(recipe.read_text())
    values["stages"] = [values["stages"][1] | {"max_steps": 8}]
    values["train"] |= {"eval_steps": 5, "shard_llm": shard_llm}
    recipe.write_text(yaml.safe_dump(values))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    train = ["train", "--recipe", str(recipe), "--output"]
    command = [*launch, "-m", "dual_slm.training.cli", *train]
    options = {"capture_output": True, "text": True, "env": environment, "timeout": 300}
    whole = subprocess.run([*command, str(tmp_path / "whole")], **options)
    assert whole.returncode == 0, whole.stderr[-3000:]
    log = json.loads((tmp_path / "whole/stage-1-disentangle/log.json").read_text())
    assert 1 < next(entry["epoch"] for entry in log if entry["step"] == 5) < 2

    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    late = tmp_path / "late.py"  # the second process writes its part of a checkpoint well after the first one
    late.write_text(
        "import time\n"
        "from dual_slm.training.cli import main\n"
        "from dual_slm.training.trainer import DualSLMTrainer\n"
        "save = DualSLMTrainer._save_rng_state\n"
        "DualSLMTrainer._save_rng_state = lambda self, to: time.sleep(2 * self.args.process_index) or save(self, to)\n"
        "main()\n"
    )
    process = subprocess.Popen([*launch, str(late), *train, str(tmp_path / "killed")], **silent)
    _kill_after(process, (tmp_path / "killed/stage-1-disentangle/checkpoint-5/complete").exists)
    assert not (tmp_path / "killed/final").exists()
    resumed = subprocess.run([*command, str(tmp_path / "killed"), "--resume"], **options)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    expected, found = (load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# ---- batches and losses ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["paper", "warm"])
def bench(request, tiny_backbones, tmp_path_factory):
    """(model, processor, store, rows) with cached features."""
    folder = tmp_path_factory.mktemp("bench")
    world(folder, tiny_backbones, clips=12)
    model, processor = make_model(tiny_backbones, kind=request.param)
    rows = list(read_table(folder / "t.parquet"))
    store = FeatureStore(folder / "features", model.config)
    store.build(rows, model, processor, workers=0)
    return model, processor, store, rows


def stage(**changes) -> StageRecipe:
    tasks = {"asr": 1, "emotion": 1, "gender": 1, "dialogue": 1}
    return StageRecipe(**({"name": "s", "err_stage": "holistic", "tasks": tasks} | changes))


def test_cached_packed_training_has_the_loss_of_the_plain_model(bench):
    """Features in half precision from the disk, masked positions dropped, logits at targets alone: the same loss."""
    model, processor, store, rows = bench
    dataset = StageDataset(rows, stage(err_stage="joint"), seed=3)
    items = [dataset[(0, i)] for i in range(6)]
    batch = TrainingCollator(processor, store)(items)
    batch.pop("task_ids")
    plain = DualSLMCollator(processor)([item.sample for item in items])
    with torch.no_grad():
        output = model(**batch, only_targets=True)
        loss = torch.nn.functional.cross_entropy(output.logits, output.labels[output.labels != -100])
        expected = model(**plain).loss
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)  # bfloat16 encoder in the cache
    assert (output.labels != -100).sum() == (plain["labels"] != -100).sum()
    assert len(output.logits) == (plain["labels"] != -100).sum()


def test_the_prefix_before_the_speech_is_read_without_gradient_and_changes_nothing(bench, monkeypatch):
    """System prompt and history go through the LLM apart, without a backward pass: the same loss and gradients, and
    fewer positions in the graph."""
    model, processor, store, rows = bench
    long = [{"role": "user", "content": "the quick brown fox"}, {"role": "assistant", "content": "hello yes"}]
    items = [
        StageDataset([row | {"history": long * (1 + n % 3)}], stage(tasks={"dialogue": 1}), seed=3)[(0, 0)]
        for n, row in enumerate(rows[:6])
    ]
    batch = TrainingCollator(processor, store)(items)
    batch.pop("task_ids")
    seen, gradients, losses = [], [], []
    layer = model.language_model.model.layers[0]
    watch = layer.register_forward_hook(
        lambda m, i, o: seen.append(i[0].shape[1]) if torch.is_grad_enabled() else None
    )
    for shortest in (1, 10**6):
        monkeypatch.setattr(sys.modules[type(model).__module__], "_SHORTEST_PREFIX", shortest)
        model.zero_grad()
        output = model(**batch, only_targets=True)
        loss = torch.nn.functional.cross_entropy(output.logits, output.labels[output.labels != -100])
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    watch.remove()
    model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(gradients[0]) == len(gradients[1]) > 4
    for split, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-3)
    assert seen[0] < seen[1]


def test_the_teacher_is_the_frozen_llm_on_the_text_twin(bench):
    """Where both branches come from text, model and teacher see the same: no divergence, with all tokens kept."""
    model, processor, store, rows = bench
    dataset = StageDataset(rows, stage(err_stage="joint"), seed=0)
    items = [dataset.item(row, "dialogue") for row in rows[:5]]
    size = model.config.get_text_config().vocab_size
    scores = score_targets([item.sample for item in items], model, DualSLMCollator(processor), k=size, batch_size=2)
    known = [replace(item, teacher=score) for item, score in zip(items, scores, strict=True)]
    for sources, equal in ((("caption", "transcript"), True), (("speech", "speech"), False)):
        batch = TrainingCollator(processor, store)(
            [replace(item, sources=Sources(*sources, False, False)) for item in [*known, dataset.item(rows[6], "asr")]]
        )
        ids, teacher = batch.pop("teacher_ids"), batch.pop("teacher_log_probs")
        batch.pop("task_ids")
        with torch.no_grad():
            output = model(**batch, only_targets=True)
        mask = output.labels != -100
        log_probs = output.logits.float().log_softmax(-1)
        token_loss = -log_probs.gather(-1, output.labels[mask][:, None])[:, 0]
        judge = SimpleNamespace(stage=stage(objective="kl"))
        loss = DualSLMTrainer._with_teacher(judge, token_loss, log_probs, ids, teacher)
        taught = torch.isfinite(teacher[:, 0])
        assert taught.sum() == sum(len(ids) for ids, _ in scores)
        assert torch.equal(loss[~taught], token_loss[~taught])  # the ASR row has no teacher
        assert (loss[taught].abs().max() < 1e-4) == equal


def test_err_freezes_the_other_adapter_for_each_sample(bench):
    """In one batch of both kinds, each adapter's gradient is that of its own tasks' samples alone."""
    model, processor, store, rows = bench
    collator = TrainingCollator(processor, store)
    dataset = StageDataset(rows, stage(err_stage="disentangle"), seed=0)
    asr = [i for i in (dataset.item(row, "asr") for row in rows) if i.sources.paralinguistic == "speech"][:2]
    emotion = [i for i in (dataset.item(row, "emotion") for row in rows) if i.sources.linguistic == "speech"][:2]
    assert asr
    assert emotion

    def gradients(items) -> dict[str, float]:
        model.zero_grad()
        batch = collator(items)
        batch.pop("task_ids")
        output = model(**batch, only_targets=True)
        known = output.labels != -100
        torch.nn.functional.cross_entropy(output.logits, output.labels[known], reduction="sum").backward()
        sums = {}
        for branch in ("paralinguistic", "linguistic"):
            parameters = getattr(model, f"{branch}_adapter").parameters()
            sums[branch] = sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None)
        return sums

    assert gradients(asr)["paralinguistic"] == 0
    assert gradients(asr)["linguistic"] > 0
    assert gradients(emotion)["linguistic"] == 0
    assert gradients(emotion)["paralinguistic"] > 0
    assert all(value > 0 for value in gradients(asr + emotion).values())
    model.zero_grad()


def test_activation_checkpointing_changes_nothing_but_memory(bench, monkeypatch):
    model, processor, store, rows = bench
    monkeypatch.setattr(sys.modules[type(model).__module__], "_SHORTEST_PREFIX", 10**6)  # one pass in either case
    dataset = StageDataset(rows, stage(err_stage="joint"), seed=0)
    batch = TrainingCollator(processor, store)([dataset[(0, i)] for i in range(4)])
    batch.pop("task_ids")
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model)
        model.train()
        calls = Counter()
        layer = model.language_model.get_decoder().layers[0]
        hook = layer.self_attn.register_forward_pre_hook(lambda *_, calls=calls: calls.update(["attention"]))
        model.zero_grad()
        torch.manual_seed(0)
        output = model(**batch, only_targets=True)
        known = output.labels != -100
        torch.nn.functional.cross_entropy(output.logits, output.labels[known]).backward()
        hook.remove()
        results.append((calls["attention"], [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    model.eval()
    model.zero_grad()
    assert results[0][0] == 1
    assert results[1][0] == 2  # computed again in the backward pass
    for plain, checkpointed in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(("attention", "positions"), [("eager", 64), ("eager", 300), ("sdpa", 300)])
def test_the_plan_knows_what_the_backward_pass_keeps(attention, positions):
    """Counted through autograd's own hooks, on layers of SmolLM2's size."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**sizes, num_hidden_layers=3, vocab_size=64, attn_implementation=attention)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has one kernel for all batches")
def test_a_batch_whose_attention_weights_would_fill_the_memory_gets_the_fused_one(
    tiny_backbones, tmp_path, monkeypatch
):
    """The same losses, by another kernel."""
    recipe, losses, plain = world(tmp_path, tiny_backbones), [], PreTrainedModel.set_attn_implementation
    for limit in (2**40, 0):
        used = []
        monkeypatch.setattr(
            LlamaForCausalLM,
            "set_attn_implementation",
            lambda llm, name, used=used: used.append(name) or plain(llm, name),
        )
        monkeypatch.setattr("dual_slm.training.trainer.EAGER_LIMIT", limit)
        run(load_recipe(str(recipe)), tmp_path / str(limit))
        assert ("eager" in used) == (limit > 0)  # the LLM comes with the fused one
        log = json.loads((tmp_path / str(limit) / "stage-1-joint/log.json").read_text())
        losses.append([entry["eval_loss"] for entry in log if "eval_loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_stage_repeats_the_rows_of_a_rare_corpus(bench):
    *_, rows = bench
    rare = [row | {"id": f"rare {n}", "corpus": "rare"} for n, row in enumerate(rows[:2])]
    dataset = StageDataset([*rows, *rare], stage(repeat={"rare": 3}), seed=1)
    counts = Counter(row["id"] for row in dataset.rows)
    assert all(counts[row["id"]] == 1 for row in rows) and all(counts[row["id"]] == 3 for row in rare)


def test_the_llm_answers_only_what_it_has_not_answered(tiny_backbones, tmp_path):
    """A reply that `dual-slm align` made stays, test rows are left alone, and rows of two corpora that have the same id get
    their own replies; a row keeps everything else."""
    recipe = load_recipe(str(world(tmp_path, tiny_backbones)))
    (table,) = recipe.data.tables
    rows = list(read_table(table))
    open_row = {"corpus": "open", "response": None, "response_complete": None}
    others = [row | open_row | {"transcript": f"the fox number {row['id']}"} for row in rows]
    test = [row | open_row | {"corpus": "test", "split": "test"} for row in rows]
    write_table([*others, *test], tmp_path / "open.parquet")
    recipe.data.tables, recipe.data.align_responses = [table, str(tmp_path / "open.parquet")], True
    recipe.data.alignment = {"max_new_tokens": 6}
    model, _ = training_model(recipe)
    data = load_data(recipe, tmp_path / "run", model.config)
    found = {(row["corpus"], row["id"]): row for row in data.train + data.validation}
    assert len(found) == 2 * len(rows)
    for row, other in zip(rows, others, strict=True):
        assert found["c", row["id"]] == row
        answered = found["open", row["id"]]
        given = ("system", "response", "response_complete")
        assert {k: v for k, v in answered.items() if k not in given} == {
            k: v for k, v in other.items() if k not in given
        }
    answers = {row["response"] for (corpus, _), row in found.items() if corpus == "open"}
    assert len(answers - {"hello to the fox", None}) > 2
    assert {row["corpus"] for row in read_table(tmp_path / "run" / "responses.parquet")} == {"open"}


def test_a_row_whose_words_are_not_known_teaches_no_silence(bench):
    """The CTC share of a stage: a transcript that is null, or has figures, is not one that says nothing."""
    _, processor, store, rows = bench
    speller = Speller(processor.tokenizer, {"the": 2, "lazy": 1, "dog": 1}, 60)
    collator = TrainingCollator(processor, store, speller)
    said = ("the lazy dog", None, "in 1984", "(no speech)", "das schöne haus")
    items = []
    for row, text in zip(rows, said, strict=False):
        sample = StageDataset([row], stage(), seed=1).item(row, "asr").sample
        items.append(Item(sample, row | {"transcript": text}, Sources("speech", "speech", True, True)))
    assert collator(items)["ctc_known"].tolist() == [True, False, False, True, False]


def test_augmented_copies_that_share_a_clip_are_drawn_apart(bench):
    """The speed of a copy is drawn by its row, and so are its pitch and tempo: two rows of one clip need two features."""
    _, _, store, rows = bench
    one, two = (augmented(rows[0] | {"id": name}, 1) for name in "ab")
    assert store.key(one) != store.key(two)
    assert store.key(rows[0] | {"id": "a"}) == store.key(rows[0] | {"id": "b"})


def test_the_labels_that_a_prompt_offers_are_those_of_all_speakers(bench):
    *_, rows = bench
    women = [row for row in rows if row["gender"] == "female"]
    asked = StageDataset(women, stage(tasks={"gender": 1}), seed=1, choices=label_sets(rows)).item(women[0], "gender")
    assert sorted(asked.sample.choices) == ["female", "male"]


def test_a_clip_that_lends_its_voice_teaches_no_words(tiny_backbones, tmp_path, monkeypatch):
    """`voice_only` rows: their words are others, so they are text in every stage, and no target of CTC or ASR. The flag
    survives the tables, and the alignment that a recipe asks for."""
    recipe = load_recipe(str(world(tmp_path, tiny_backbones)))
    (table,) = recipe.data.tables
    words = {"corpus": "lent", "transcript": "hello lazy fox", "response": None, "response_complete": None}
    lent = [r | words | {"id": f"{r['id']}/v", "voice_only": True} for r in read_table(table)]
    write_table(lent, tmp_path / "lent.parquet")
    recipe.data.tables, recipe.data.align_responses = [table, str(tmp_path / "lent.parquet")], True
    recipe.data.alignment = {"max_new_tokens": 6}
    model, processor = training_model(recipe)
    data = load_data(recipe, tmp_path / "run", model.config)
    rows = [row for row in data.train if row["corpus"] == "lent"]
    assert len(rows) == len(data.train) / 2
    for about in recipe.stages:
        dataset = StageDataset(rows, replace(about, tasks={"asr": 3, "emotion": 1, "dialogue": 1}), seed=1)
        items = [dataset[epoch, index] for epoch in range(3) for index in range(len(rows))]
        assert {item.sources for item in items} == {Sources("speech", "transcript", True, False)}
        assert "asr" not in {item.sample.task for item in items}
    store = FeatureStore(tmp_path / "features", model.config)
    store.build(data.train + data.validation, model, processor)
    recipe.warm_start.steps, heard = [1, 1], {}
    for name in ("train_linguistic", "train_paralinguistic"):

        def spy(model, store, rows, *args, name=name, **kwargs):
            heard[name] = rows
            return []

        monkeypatch.setattr(f"dual_slm.training.run.{name}", spy)
    warm_start(recipe, tmp_path, model, processor, store, data)
    for rows in heard.values():  # the lent clips are there once, with their own words
        assert [row["corpus"] for row in rows] == ["c"] * 18
    assert set(heard) == {"train_linguistic", "train_paralinguistic"}


def test_batches_hold_rows_whose_histories_are_cut_to_similar_lengths(bench):
    """Sizes are those of the epoch: a history that is cut away does not count."""
    *_, rows = bench
    long = [{"role": r, "content": "the quick brown fox and the lazy dog"} for r in ("user", "assistant")] * 4
    dataset = StageDataset([row | {"history": long} for row in rows], stage(tasks={"asr": 1}), seed=1)
    for epoch in (0, 1):
        for index in range(len(dataset)):
            sample = dataset[(epoch, index)].sample
            kept = sum(len(m["content"]) for m in sample.messages if isinstance(m["content"], str))
            assert kept <= dataset.size(index, epoch) <= kept + 400
    assert [dataset.size(i, 0) for i in range(len(dataset))] != [dataset.size(i, 1) for i in range(len(dataset))]


def test_draws_do_not_depend_on_who_asks(bench):
    *_, rows = bench
    dataset = StageDataset(rows, stage(), seed=1)
    again = StageDataset(rows, stage(), seed=1)
    order = list(range(len(dataset)))
    assert [dataset[(2, i)] for i in order] == [again[(2, i)] for i in reversed(order)][::-1]
    assert [dataset[(2, i)] for i in order] != [dataset[(3, i)] for i in order]
    batches = []
    for epoch in (0, 0, 1):
        sampler = BucketSampler(dataset, 4, seed=5)
        sampler.set_epoch(epoch)
        batches.append(list(sampler))
    assert batches[0] == batches[1]
    assert batches[0] != batches[2]
    for epoch, order in ((0, batches[0]), (1, batches[2])):
        assert sorted(key for batch in order for key in batch) == [(epoch, i) for i in range(12)]
    with pytest.raises(ValueError, match="a batch of 99 is larger than the 12 rows"):
        BucketSampler(dataset, 99, seed=0)


@pytest.mark.parametrize("branch", ["paralinguistic", "linguistic"])
def test_a_residual_starts_as_nothing_and_learns(tiny_backbones, tmp_path, branch):
    """Going on from a warm start with a soft residual: the same embeddings, until it is trained."""
    model, processor = make_model(tiny_backbones, kind="warm")
    model.save_pretrained(tmp_path / "ckpt")
    processor.save_pretrained(tmp_path / "ckpt")
    recipe = load_recipe(str(world(tmp_path, tiny_backbones)))
    recipe.model.start_from, recipe.model.config = str(tmp_path / "ckpt"), {f"{branch}_soft_residual": True}
    going_on, _ = training_model(recipe)
    inputs = processor.extract_features([tone(0.8)])
    with torch.inference_mode():
        before, after = (m.get_audio_features(**inputs)[f"{branch}_embeds"] for m in (model, going_on))
    assert torch.equal(before, after)
    getattr(going_on, f"{branch}_adapter").residual.weight.data.normal_()
    going_on.save_pretrained(tmp_path / "with")
    loaded = DualSLMForConditionalGeneration.from_pretrained(tmp_path / "with")
    with torch.inference_mode():
        changed, again = (m.get_audio_features(**inputs)[f"{branch}_embeds"] for m in (going_on, loaded))
    assert torch.equal(changed, again)
    assert not torch.equal(changed, before)
    recipe.model.config = {"linguistic_hidden_size": 9}
    with pytest.raises(ValueError, match="the checkpoint has a config of its own"):
        training_model(recipe)


LETTERS = ["warm_start.pieces=[]", "warm_start.steps=[6]", "model.config.linguistic_adapter_type=letters"]


def test_a_run_with_letters_goes_on_and_learns_more_words(tiny_backbones, tmp_path):
    """Letters learn in stage 0 alone; a run that lost its end makes the same; another corpus adds to the lexicon."""
    (tmp_path / "more.txt").write_text("Foxes, quickly.\nThe foxes quickly\n", encoding="utf-8")
    recipe = str(world(tmp_path, tiny_backbones))
    settings = [*LETTERS, f"warm_start.lexicon=[{tmp_path / 'more.txt'}]", "stages.0.ctc_share=0"]
    settings += ["stages.1.tasks={emotion: 1}", "stages.2.tasks={emotion: 1, dialogue: 2}"]
    final = run(load_recipe(recipe, settings), tmp_path / "run")
    weights = load_file(final / "model.safetensors")
    model = DualSLMForConditionalGeneration.from_pretrained(final)
    adapter = model.linguistic_adapter
    known, pairs = adapter.lexicon.known(adapter.alphabet)
    assert {"foxes", "quickly", "lazy", "fox"} <= known.keys()
    assert pairs["foxes", "quickly"] == 2 and pairs["lazy", "dog"] > 2  # the clips say it too
    assert not any("quickly" in pair and "the" in pair for pair in pairs)
    assert model.config.linguistic_lexicon_size == len(weights["linguistic_adapter.lexicon.counts"]) > len(known)
    stages = ["stage-0", "stage-1-joint", "stage-2-disentangle", "stage-3-holistic"]
    before, *after = (load_file(tmp_path / "run" / stage / "final" / "model.safetensors") for stage in stages)
    for name, tensor in before.items():
        assert name.startswith("paralinguistic") or all(torch.equal(tensor, later[name]) for later in after)
    for folder in ("final", "stage-3-holistic", "stage-2-disentangle"):
        shutil.rmtree(tmp_path / "run" / folder)
    again = load_file(run(load_recipe(recipe, settings), tmp_path / "run", resume=True) / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)

    write_table([row | {"transcript": "hello"} for row in read_table(tmp_path / "t.parquet")], tmp_path / "t.parquet")
    on = ["stages=[]", f"model.start_from={final}", "model.config={}", "warm_start.caption_steps=0", *LETTERS[:2]]
    second = DualSLMForConditionalGeneration.from_pretrained(run(load_recipe(recipe, on), tmp_path / "second"))
    adapter = second.linguistic_adapter
    words, kept = adapter.lexicon.known(adapter.alphabet)
    assert known.keys() | {"hello"} <= words.keys() and pairs == kept

    shutil.copytree(final, tmp_path / "old")  # as before there were pairs
    save_file({n: t for n, t in weights.items() if "pairs" not in n}, tmp_path / "old" / "model.safetensors")
    third = run(load_recipe(recipe, [*on, f"warm_start.linguistic_from={tmp_path / 'old'}"]), tmp_path / "third")
    words, kept = DualSLMForConditionalGeneration.from_pretrained(third).linguistic_adapter.lexicon.known(
        adapter.alphabet
    )
    assert known.keys() | {"hello"} == words.keys() and not kept  # its clips say hello alone
    with pytest.raises(ValueError, match=r"writes letters: give warm_start\.pieces="):
        run(load_recipe(recipe, [*on, "warm_start.pieces=[60]"]), tmp_path / "fourth")


def test_the_plan_of_the_released_recipe_knows_letters(tiny_backbones, tmp_path):
    settings = [*LETTERS, "stages.0.ctc_share=0"]
    assert "stage 0   6 CTC steps" in plan(
        load_recipe(str(world(tmp_path, tiny_backbones)), settings), tmp_path / "run"
    )


def test_the_plan_of_a_papers_recipe_tells_hours_at_the_rate_of_this_machine(tiny_backbones, tmp_path):
    settings = ["model.adapters=paper", "model.config={}", "warm_start.enabled=false", "stages.0.ctc_share=0"]
    recipe = load_recipe(str(world(tmp_path, tiny_backbones)), [*settings, "stages.0.caption_share=0"])
    hours, rate = re.search(r"about ([\d.]+) h or more, at ([\d.]+) TFLOPS", plan(recipe, tmp_path)).groups()
    assert float(rate) > 0 and float(hours) < 0.1  # a toy


def test_letters_are_for_checkpoints_of_the_warm_start_without_letters(tiny_backbones, tmp_path):
    recipe, refused = str(world(tmp_path, tiny_backbones)), "can be given letters"
    for kind in ("paper", "letters"):
        model, processor = make_model(tiny_backbones, kind=kind)
        model.save_pretrained(tmp_path / kind)
        processor.save_pretrained(tmp_path / kind)
        settings = [*LETTERS[:2], "stages=[]", f"model.start_from={tmp_path / kind}"]
        settings.append("model.config={linguistic_adapter_type: letters}")
        with pytest.raises(ValueError, match=refused):
            run(load_recipe(recipe, settings), tmp_path / "run")
    settings = [*LETTERS[:2], "stages.0.ctc_share=0.1", f"model.start_from={tmp_path / 'letters'}", "model.config={}"]
    with pytest.raises(ValueError, match="ctc_share has to be 0"):
        run(load_recipe(recipe, settings), tmp_path / "shared")
    model, _ = make_model(tiny_backbones, kind="letters", linguistic_letters=" zyxwvutsrqponmlkjihgfedcba'")
    with pytest.raises(ValueError, match="writes in other letters"):
        take_linguistic(model, tmp_path / "letters")


def test_letters_may_be_those_of_any_language(tiny_backbones, tmp_path):
    recipe = str(world(tmp_path, tiny_backbones))
    rows = [row | {"transcript": "Ёлки: это – добрый день!"} for row in read_table(tmp_path / "t.parquet")]
    write_table(rows, tmp_path / "t.parquet")
    settings = [*LETTERS, "stages=[]", "model.config.linguistic_letters=' абвгдеёжзийклмнопрстуфхцчшщъыьэюя'"]
    final = run(load_recipe(recipe, settings), tmp_path / "run")
    model = DualSLMForConditionalGeneration.from_pretrained(final)
    adapter, tokenizer = model.linguistic_adapter, DualSLMProcessor.from_pretrained(final).tokenizer
    assert tokenizer.decode(adapter.words().tokens("новое это слово")) == " новое это слово"
    assert set(adapter.words().share) == {"ёлки", "это", "добрый", "день"}  # though they take many tokens here


def test_letters_go_to_another_llm_as_they_are(tiny_backbones, tmp_path):
    """Without a step of training: only the tokens that the words are written in are others."""
    model, processor = make_model(tiny_backbones, kind="letters")
    model.save_pretrained(tmp_path / "first")
    plain = AutoTokenizer.from_pretrained(tiny_backbones[1])
    tokenizer = plain.train_new_from_iterator(["hello the foxes are here again"] * 4, 290)
    config = model.config.text_config.to_dict() | {"vocab_size": len(tokenizer), "hidden_size": 32, "head_dim": None}
    type(model.language_model)(type(model.config.text_config)(**config)).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    recipe = world(tmp_path, (tiny_backbones[0], str(tmp_path / "llm")))
    settings = [*LETTERS, "warm_start.steps=[0]", "stages=[]", f"warm_start.linguistic_from={tmp_path / 'first'}"]
    final = run(load_recipe(str(recipe), settings), tmp_path / "run")
    second, tokenizer = DualSLMForConditionalGeneration.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    adapters = [model.linguistic_adapter, second.linguistic_adapter]
    frames, lengths = torch.randn(1, 20, model.config.audio_hidden_size), torch.tensor([20])
    with torch.no_grad():
        torch.testing.assert_close(*(adapter.logits(frames, lengths) for adapter in adapters))
    first, second = (adapter.words().tokens("the lazy fox zuxy") for adapter in adapters)
    assert first != second
    assert processor.tokenizer.decode(first) == tokenizer.decode(second) == " the lazy fox zuxy"


def test_a_checkpoint_gets_letters_and_keeps_its_voice(finished, tmp_path):
    folder, final = finished
    on = ["stages=[]", f"model.start_from={final}", "warm_start.caption_steps=0", *LETTERS[:2]]
    on += ["model.config={linguistic_adapter_type: letters, linguistic_hidden_size: 48}"]
    made = run(load_recipe(str(folder / "recipe.yaml"), on), tmp_path / "run")
    old, new = (load_file(f / "model.safetensors") for f in (final, made))
    voice = [name for name in old if name.startswith("paralinguistic")]
    assert voice and all(torch.equal(old[name], new[name]) for name in voice)
    model = DualSLMForConditionalGeneration.from_pretrained(made)
    assert model.config.linguistic_adapter_type == "letters" and model.linguistic_adapter.linear_1.out_features == 48
    assert DualSLMProcessor.from_pretrained(made).linguistic_adapter_type == "letters"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["warm_start.pieces=[60]"], "one number of warm_start.steps and no warm_start.pieces"),
        (["warm_start.steps=[1, 2]"], "one number of warm_start.steps and no warm_start.pieces"),
        (["stages.0.ctc_share=0.1"], "learns in stage 0 alone, without ctc_share"),
        (["model.adapters=paper", "warm_start.enabled=false"], "letters needs model.adapters: warm_start"),
        (["model.config={}"], "warm_start.pieces is empty, and only linguistic_adapter_type: letters has none"),
    ],
)
def test_letters_refuse_what_they_do_not_have(settings, message, tiny_backbones, tmp_path):
    recipe = str(world(tmp_path, tiny_backbones))
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe, [*LETTERS, "stages.0.ctc_share=0", *settings])


def test_stage_0_goes_on_from_the_words_of_a_checkpoint_that_fits(tiny_backbones, tmp_path):
    """Words are taken over bit for bit, the paralinguistic adapter is new; another backbone or shape is refused."""
    model, _ = make_model(tiny_backbones, kind="warm")
    model.linguistic_adapter.soft_tokens.token_ids += 3
    model.save_pretrained(tmp_path / "ckpt")
    other, _ = make_model(tiny_backbones, kind="warm", linguistic_soft_residual=True)
    fresh = [p.clone() for p in other.paralinguistic_adapter.parameters()]
    take_linguistic(other, tmp_path / "ckpt")
    taken = other.linguistic_adapter.state_dict()
    assert all(torch.equal(taken[name], value) for name, value in model.linguistic_adapter.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(fresh, other.paralinguistic_adapter.parameters(), strict=True))
    narrow, _ = make_model(tiny_backbones, kind="warm", linguistic_hidden_size=9)
    with pytest.raises(ValueError, match=r"does not fit the recipe in .*linear_1"):
        take_linguistic(narrow, tmp_path / "ckpt")
    other.config.text_model_fingerprint = "another"
    with pytest.raises(ValueError, match="trained with another text backbone"):
        take_linguistic(other, tmp_path / "ckpt")


def test_stage_0_goes_on_from_a_whole_checkpoint(tiny_backbones, tmp_path):
    """More words for a released checkpoint: its words learn on, its voice stays bit for bit without caption steps, and it
    can still write the words that the new corpus lacks."""
    first = run(load_recipe(str(world(tmp_path, tiny_backbones)), ["stages=[]"]), tmp_path / "first")
    write_table([row | {"transcript": "hello"} for row in read_table(tmp_path / "t.parquet")], tmp_path / "t.parquet")
    settings = ["stages=[]", f"model.start_from={first}", "model.config={}", "warm_start.caption_steps=0"]
    settings += ["warm_start.pieces=[60]", "warm_start.steps=[4]"]
    second = run(load_recipe(str(tmp_path / "recipe.yaml"), settings), tmp_path / "second")
    old, new = (load_file(folder / "model.safetensors") for folder in (first, second))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {name.split(".")[0] for name in changed} == {"linguistic_adapter"}
    assert "linguistic_adapter.linear_1.weight" in changed
    assert "linguistic_adapter.soft_tokens.token_ids" not in changed
    with pytest.raises(ValueError, match=r"warm_start.pieces.*99.*has 60"):
        run(load_recipe(str(tmp_path / "recipe.yaml"), [*settings, "warm_start.pieces=[99]"]), tmp_path / "third")


def test_an_llm_in_4_bits_teaches_the_adapters(tiny_backbones, tmp_path):
    """bitsandbytes' NF4 for the LLM alone; gradients go through it, also after an evaluation, its weights stay."""
    audio, text = tiny_backbones
    shutil.copytree(text, tmp_path / "llama")
    config = LlamaConfig.from_pretrained(text)
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})  # its CPU kernel wants whole blocks
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    settings = ["model.load_in_4bit=true", "model.dtype=bfloat16", "stages.0.max_steps=2", "train.eval_steps=1"]
    recipe = load_recipe(str(world(tmp_path, (audio, str(tmp_path / "llama")))), settings)
    recipe.stages = recipe.stages[:1]
    model, _ = training_model(recipe)
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(quantised) == 2 * 7  # all of both decoder layers
    assert all(name.startswith("language_model.") for name in quantised)
    # On some CPUs bitsandbytes repacks the weights in a pass without gradients, for a kernel that has none.
    inputs, gradients = torch.randn(2, 5, 64, dtype=torch.bfloat16), []
    for _ in range(2):
        embeds = inputs.clone().requires_grad_()
        model.language_model(inputs_embeds=embeds).logits.float().logsumexp(-1).sum().backward()
        gradients.append(embeds.grad)
        with torch.no_grad():
            model.language_model(inputs_embeds=inputs)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)
    final = run(recipe, tmp_path / "run")
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "run" / "stage-0" / "final", final))
    assert {name.split(".")[0] for name in after} == {"paralinguistic_adapter", "linguistic_adapter"}
    for branch in ("paralinguistic_adapter", "linguistic_adapter"):
        assert any(not torch.equal(before[name], after[name]) for name in after if name.startswith(branch))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without CUDA")
@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_used_where_the_cpu_is_fast_in_it(fast, tiny_backbones, tmp_path, monkeypatch, capsys):
    """Without AVX-512 it takes a hundred times as long as float32: there a recipe that asks for it runs in float32."""
    for module in ("backbones", "features", "warm_start"):
        monkeypatch.setattr(f"dual_slm.training.{module}.cpu_has_bfloat16", lambda: fast)
    settings = ["model.dtype=bfloat16", "train.bf16=true", "stages.0.max_steps=1"]
    recipe = load_recipe(str(world(tmp_path, tiny_backbones)), settings)
    recipe.stages = recipe.stages[:1]
    run(recipe, tmp_path / "run")
    assert ("float32 it is" in capsys.readouterr().out) is not fast
    assert json.loads((tmp_path / "run/environment.json").read_text())["dtype"] == ("bfloat16" if fast else "float32")
    arguments = next((tmp_path / "run").glob("stage-1-*/checkpoint-*/training_args.bin"))
    assert torch.load(arguments, weights_only=False).bf16 is fast
    run(recipe, tmp_path / "run", resume=True)  # the recipe in the folder is as it was written


# ---- features --------------------------------------------------------------------------------------------------------


def test_features_are_known_by_content_and_survive_damage(bench, tmp_path, tiny_backbones):
    model, processor, _, rows = bench
    rows = [dict(row) for row in rows[:5]]
    rows.append(rows[0] | {"id": "same file"})
    rows.append(rows[1] | {"augment": 1})
    store = FeatureStore(tmp_path, model.config)
    assert len(store.missing(rows)) == 6
    store.build(rows, model, processor, workers=0)
    assert store.missing(rows) == []
    again = FeatureStore(tmp_path, model.config)
    assert again.missing(rows) == []
    assert torch.equal(again.get(rows[0]), store.get(rows[5]))
    assert not torch.equal(again.get(rows[1])[..., :5, :], again.get(rows[6])[..., :5, :])
    inputs = processor.extract_features([tone(0.5, 0)])
    with torch.inference_mode():
        states, lengths = model.encode_audio(**inputs, all_layers=False)
    assert store.length(rows[0]) == lengths.item()
    torch.testing.assert_close(store.get(rows[0]), states[0, -1], atol=0.15, rtol=0.1)  # encoded in bfloat16
    small = FeatureStore(tmp_path / "8", model.config, bits=8)
    small.build(rows[:3], model, processor, workers=0)
    scale = store.get(rows[2]).abs().max()
    assert (small.get(rows[2]) - store.get(rows[2])).abs().max() < scale / 50  # and the encoder rounds to bfloat16
    (shard,) = store.folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"the feature shard .* is damaged.*Delete it"):
        FeatureStore(tmp_path, model.config)


def test_a_clip_that_cannot_be_read_is_named_and_skipped_if_asked(bench, tmp_path):
    model, processor, _, rows = bench
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF" + bytes(40))
    rows = [rows[0], rows[1] | {"id": "broken", "audio": str(bad)}]
    with pytest.raises(ValueError, match=r"broken: .*bad\.wav is not audio"):
        FeatureStore(tmp_path / "a", model.config).build(rows, model, processor, workers=0)
    kept = FeatureStore(tmp_path / "b", model.config).build(rows, model, processor, skip_damaged=True, workers=0)
    assert [row["id"] for row in kept] == ["0"]


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_every_recipe_of_the_package_is_sound():
    names = [path.stem for path in RECIPES.glob("*.yaml")]
    assert {"speedrun", "slm-qwen2.5-7b", "slm-llama3.1-8b", "slm-smollm2-135m"} <= set(names)
    for name in names:
        load_recipe(name)
    paper = load_recipe("slm-qwen2.5-7b")  # section IV-C
    assert [s.learning_rate for s in paper.stages] == [5e-5, 5e-6, 5e-6]
    assert [s.warmup_steps for s in paper.stages] == [1000, 1000, 0]
    assert [s.epochs for s in paper.stages] == [3, 3, 3]
    assert (paper.train.batch_size, paper.train.weight_decay, paper.train.bf16) == (48, 0.05, True)
    assert paper.stages[0].lr_scheduler_type == "linear"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.batchsize=4"], "no key 'batchsize'; did you mean 'batch_size'"),
        (["trian.batch_size=4"], "no key 'trian'; did you mean 'train'"),
        (["stages.0.lerning_rate=1e-4"], "no key 'lerning_rate'; did you mean 'learning_rate'"),
        (["stages.9.learning_rate=1e-4"], "'9' is none of the 3 stages"),
        (["train.batch_size=many"], "batch_size is 'many'"),
        (["model.adapters=paper"], "warm_start.enabled needs other model.adapters"),
        (["stages.0.err_stage=second"], "it must be one of joint, disentangle, holistic"),
        (["stages.0.objective=mse"], "it must be one of ce, kl, ce"),
        (["stages.0.best_by=accuracy_asr"], "best_by is 'accuracy_asr'; it must be one of loss, wer, accuracy_gender"),
        (["data.synthesise_hours=0"], "data.tables is empty"),
        (["stages.0.tasks.asrr=1"], "no task 'asrr'; did you mean 'asr'"),
        (
            ["model.config.num_paralingustic_tokens=4"],
            "no 'num_paralingustic_tokens'; did you mean 'num_paralinguistic_tokens'",
        ),
        (["data.validation_rows=0"], "validation_rows is 0; validation needs one at least"),
        (["stages.0.lr_scheduler_type=cosin"], "lr_scheduler_type is 'cosin'; it must be one of linear, cosine"),
        (["stages.0.facts=[gendr]"], "no 'gendr'; did you mean 'gender'"),
        (["model.adapters=emosllm"], "emosllm hears no words: linguistic_source is transcript or none"),
        (["train.shard_llm=true", "model.load_in_4bit=true"], "shard_llm is for an LLM without LoRA in 16 or 32 bits"),
        (["warm_start.caption_temperature=0"], "caption_temperature is 0; it must be above 0"),
        (["batch"], "it is KEY=VALUE"),
    ],
)
def test_unknown_and_contradicting_keys_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("speedrun", settings)


def test_settings_change_a_recipe():
    recipe = load_recipe("speedrun", ["stages.1.learning_rate=3e-4", "train.seed=5", "data.tables=[a.parquet]"])
    assert recipe.stages[1].learning_rate == 3e-4
    assert recipe.train.seed == 5
    assert recipe.data.tables == ["a.parquet"]
    with pytest.raises(FileNotFoundError, match="did you mean 'speedrun'"):
        load_recipe("speedrum")


def test_settings_that_are_given_one_by_one_all_count(capsys, tmp_path):
    settings = ["--set", "train.batch_size=3", "--set", "train.seed=5", "data.tables=[]"]
    command = ["train", "--recipe", "speedrun", "--output", str(tmp_path), "--dry-run"]
    assert main([*command, *settings]) == 0
    assert "16 steps of 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "stage disentangle: nothing learns, as the rates of all that there is are 0"),
        ({"paralinguistic_soft_residual": True}, "stage disentangle: asr would teach nothing"),
    ],
)
def test_a_stage_that_cannot_learn_what_it_is_asked_is_refused(tiny_backbones, tmp_path, config, message):
    recipe = load_recipe(str(world(tmp_path, tiny_backbones, warm_start={"enabled": False})))
    recipe.model.config |= config
    recipe.stages = [replace(recipe.stages[1], learning_rate=0.0, residual_learning_rate=1e-3)]
    with pytest.raises(ValueError, match=message):
        run(recipe, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_with_what_there_is(tiny_backbones, tmp_path):
    recipe = world(tmp_path, tiny_backbones)
    settings = [
        "stages.0.learning_rate=1e12",
        "stages.0.max_steps=40",
        "train.max_grad_norm=0.0",
        "stages.0.warmup_steps=3",
    ]
    settings += ["train.eval_steps=1"]
    with pytest.raises(FloatingPointError, match="the loss is nan at step"):
        run(load_recipe(str(recipe), settings), tmp_path / "run")
    assert (tmp_path / "run/stage-0/final/model.safetensors").is_file()


def test_the_speedrun_in_short(tmp_path):
    """The real backbones, from synthesised speech to a checkpoint that loads and answers, by the command line."""
    settings = ["data.synthesise_hours=0.05", "data.synthesise_engines=[piper]", "data.validation_rows=4"]
    settings += ["data.alignment.max_new_tokens=8", "warm_start.steps=[4]", "warm_start.caption_steps=6"]
    settings += ["train.batch_size=4", "train.eval_steps=2"]
    settings += [f"stages.{n}.max_steps=2" for n in range(3)]
    command = [sys.executable, "-m", "dual_slm.training.cli", "train", "--recipe", "speedrun"]
    command += ["--output", str(tmp_path / "run"), "--set", *settings]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    final = tmp_path / "run" / "final"
    assert result.stdout.strip().endswith(str(final))
    clip = next((tmp_path / "run" / "corpus").rglob("*.flac"))
    command = [sys.executable, "-m", "dual_slm.training.cli", "reply", str(clip), "--model", str(final), "--json"]
    answer = subprocess.run([*command, "--max-new-tokens", "8"], capture_output=True, text=True, check=True)
    assert set(json.loads(answer.stdout)["attributes"]) == {"gender", "pitch", "tempo", "energy", "emotion"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_long_commands_run_with_an_allocator_that_keeps_its_memory(tmp_path):
    """A training starts itself again with it, once, and with the same arguments; a reply does not, nor over a user's own."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys; print('tunables:', os.environ.get('GLIBC_TUNABLES'), file=sys.stderr)"
    )
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"PYTHONPATH": str(tmp_path)}

    def starts(command: list[str], environment: dict) -> list[str]:
        command = [sys.executable, "-m", "dual_slm.training.cli", *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip()
        return [line for line in done.stderr.splitlines() if line.startswith("tunables:")]

    first, again = starts(["train", "--list"], clean)
    assert first == "tunables: None" and "mmap_max=0" in again
    assert len(starts(["backbones", "--list"], clean)) == 1
    assert starts(["train", "--list"], clean | {"GLIBC_TUNABLES": "glibc.malloc.check=0"}) == [
        "tunables: glibc.malloc.check=0"
    ]
