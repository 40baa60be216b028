"""Whole runs: what learns, exact resume after a kill, two processes, and what a run refuses."""

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_build import small_blocks
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP
from world import world

from conftest import make_model
from dual_slm import DualSLMForConditionalGeneration, DualSLMProcessor
from dual_slm.training.corpora.table import read_table, write_table
from dual_slm.training.recipe import load_recipe
from dual_slm.training.run import run

STAGES = ["stage-0", "stage-1-joint", "stage-2-disentangle", "stage-3-holistic"]
PAPER = ["model.adapters=paper", "model.config={linguistic_hidden_size: 40, num_paralinguistic_tokens: 4}"]
PAPER += ["warm_start.enabled=false", "stages.0.caption_share=0"]
TRAIN = ["-m", "dual_slm.training.cli", "train"]
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def finished(tiny_backbones, tmp_path_factory):
    """A whole run, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = world(folder, tiny_backbones)
    return folder, run(load_recipe(str(recipe)), folder / "run")


def weights(run_folder, folders=("final",)) -> list[dict[str, torch.Tensor]]:
    return [load_file(run_folder / folder / "model.safetensors") for folder in folders]


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The modules whose parameters differ."""
    return {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}


def refolded(recipe_file, **sections) -> None:
    """Rewrites sections of a recipe's file."""
    values = yaml.safe_load(recipe_file.read_text())
    merged = {name: value if isinstance(value, list) else values[name] | value for name, value in sections.items()}
    recipe_file.write_text(yaml.safe_dump(values | merged))


def started(*arguments, threads: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """A training in processes of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def killed(*arguments, reached, threads: int = 1) -> None:
    """A training that gets SIGKILL, with all processes that it started, as soon as `reached`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    process = subprocess.Popen([sys.executable, *map(str, arguments)], **silent)
    limit = time.time() + 120
    while not reached():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() < limit
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True)  # a launcher's, which would go on without it
    for each in (process, *children):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(children)


# ---- what learns -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_trains_both_adapters_in_every_stage_and_nothing_else(finished, tiny_backbones):
    """Character CTC learns in stage 0 alone."""
    folder, final = finished
    states = weights(folder / "run", [f"{stage}/final" for stage in STAGES])
    for before, after in itertools.pairwise(states):
        assert changed(before, after) == {"paralinguistic_adapter"}
    model = DualSLMForConditionalGeneration.from_pretrained(final)
    fresh = DualSLMForConditionalGeneration.from_backbones(*tiny_backbones)
    for part in ("audio_tower", "language_model"):
        state, other = getattr(model, part).state_dict(), getattr(fresh, part).state_dict()
        assert all(torch.equal(state[name], other[name]) for name in other)
    log = json.loads((final / "training_log.json").read_text())
    assert [entry["stage"] for entry in log[-3:]] == ["joint", "disentangle", "holistic"]
    assert {entry["stage"] for entry in log[:-3]} == {"linguistic", "paralinguistic"}
    assert {"eval_loss", "eval_loss_asr", "eval_wer", "eval_accuracy_emotion", "eval_unparsed"} <= set(log[-3])
    assert (folder / "run/stage-3-holistic/curves.png").stat().st_size > 10_000
    made = json.loads((folder / "run/environment.json").read_text())
    assert made["data"]["train"] == 18
    assert made["torch"] == torch.__version__.split("+")[0] or made["torch"] == torch.__version__


@pytest.mark.slow
def test_a_run_trains_both_of_the_papers_adapters_in_every_stage(tiny_backbones, tmp_path):
    recipe = load_recipe(str(world(tmp_path, tiny_backbones)), [*PAPER, "stages.1.tasks={asr: 1, emotion: 1}"])
    run(recipe, tmp_path / "run")
    for before, after in itertools.pairwise(weights(tmp_path / "run", [f"{stage}/final" for stage in STAGES[1:]])):
        assert changed(before, after) == {"paralinguistic_adapter", "linguistic_adapter"}


@pytest.mark.slow
def test_a_run_with_letters_goes_on_and_learns_more_words(tiny_backbones, tmp_path):
    """A run that lost its end makes the same; another corpus adds to the lexicon."""
    (tmp_path / "more.txt").write_text("Foxes, quickly.\nThe foxes quickly\n", encoding="utf-8")
    recipe = str(world(tmp_path, tiny_backbones))
    settings = [f"warm_start.lexicon=[{tmp_path / 'more.txt'}]"]
    final = run(load_recipe(recipe, settings), tmp_path / "run")
    (state,) = weights(tmp_path / "run")
    model = DualSLMForConditionalGeneration.from_pretrained(final)
    adapter = model.linguistic_adapter
    known, bigrams = adapter.lexicon.known(adapter.alphabet)
    assert {"foxes", "quickly", "lazy", "fox"} <= known.keys()
    assert bigrams["foxes", "quickly"] == 2  # in two sentences
    assert ("lazy", "dog") not in bigrams  # many clips say it, in one sentence
    assert not any("quickly" in bigram and "the" in bigram for bigram in bigrams)
    assert model.config.linguistic_lexicon_size == len(state["linguistic_adapter.lexicon.counts"]) > len(known)
    for folder in ("final", "stage-3-holistic", "stage-2-disentangle"):
        shutil.rmtree(tmp_path / "run" / folder)
    run(load_recipe(recipe, settings), tmp_path / "run", resume=True)
    (again,) = weights(tmp_path / "run")
    assert all(torch.equal(state[name], again[name]) for name in state)

    write_table(
        [row.replace(transcript="hello") for row in read_table(tmp_path / "t.parquet")], tmp_path / "t.parquet"
    )
    on = ["stages=[]", f"model.start_from={final}", "model.config={}", "warm_start.caption_steps=0"]
    second = DualSLMForConditionalGeneration.from_pretrained(run(load_recipe(recipe, on), tmp_path / "second"))
    words, kept = second.linguistic_adapter.lexicon.known(adapter.alphabet)
    assert known.keys() | {"hello"} <= words.keys() and bigrams == kept


@pytest.mark.slow
def test_stage_0_goes_on_from_a_whole_checkpoint(finished, tmp_path):
    """More words for a released checkpoint: its words learn on, its voice stays bit for bit without caption steps."""
    folder, final = finished
    settings = ["stages=[]", f"model.start_from={final}", "model.config={}", "warm_start.caption_steps=0"]
    run(load_recipe(str(folder / "recipe.yaml"), settings), tmp_path / "run")
    (old, new) = (load_file(f / "model.safetensors") for f in (final, tmp_path / "run/final"))
    assert changed(old, new) == {"linguistic_adapter"}
    assert not torch.equal(old["linguistic_adapter.linear_1.weight"], new["linguistic_adapter.linear_1.weight"])


def test_letters_may_be_those_of_any_language(tiny_backbones, tmp_path):
    recipe = str(world(tmp_path, tiny_backbones))
    rows = [row.replace(transcript="Ёлки: это – добрый день!") for row in read_table(tmp_path / "t.parquet")]
    write_table(rows, tmp_path / "t.parquet")
    settings = ["stages=[]", "model.config.linguistic_letters=' абвгдеёжзийклмнопрстуфхцчшщъыьэюя'"]
    final = run(load_recipe(recipe, settings), tmp_path / "run")
    model = DualSLMForConditionalGeneration.from_pretrained(final)
    adapter, tokenizer = model.linguistic_adapter, DualSLMProcessor.from_pretrained(final).tokenizer
    assert tokenizer.decode(adapter.words().tokens("новое это слово")) == " новое это слово"
    assert set(adapter.words().unigrams) == {"ёлки", "это", "добрый", "день"}  # though they take many tokens here


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
    settings = ["warm_start.steps=0", "stages=[]", f"warm_start.linguistic_from={tmp_path / 'first'}"]
    final = run(load_recipe(str(recipe), settings), tmp_path / "run")
    second, tokenizer = DualSLMForConditionalGeneration.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    adapters = [model.linguistic_adapter, second.linguistic_adapter]
    frames, lengths = torch.randn(1, 20, model.config.audio_hidden_size), torch.tensor([20])
    with torch.no_grad():
        torch.testing.assert_close(*(adapter.logits(frames, lengths) for adapter in adapters))
    first, second = (adapter.words().tokens("the lazy fox zuxy") for adapter in adapters)
    assert first != second
    assert processor.tokenizer.decode(first) == tokenizer.decode(second) == " the lazy fox zuxy"


@pytest.mark.slow
def test_an_llm_in_4_bits_teaches_the_adapters(tiny_backbones, tmp_path):
    backbones = small_blocks(tiny_backbones, tmp_path / "llama")
    settings = ["model.load_in_4bit=true", "model.dtype=bfloat16", "stages.0.max_steps=2", "train.eval_steps=1"]
    recipe = load_recipe(str(world(tmp_path, backbones)), settings)
    recipe.stages = recipe.stages[:1]
    run(recipe, tmp_path / "run")
    before, after = weights(tmp_path / "run", ("stage-0/final", "final"))
    assert {name.split(".")[0] for name in after} == {"paralinguistic_adapter", "linguistic_adapter"}
    assert changed(before, after) == {"paralinguistic_adapter"}


@pytest.mark.slow
def test_activations_of_the_llm_are_computed_again_where_the_recipe_asks_for_it(tiny_backbones, tmp_path, monkeypatch):
    """The same adapters, by more passes through the layers."""
    recipe, states, passes, forward = str(world(tmp_path, tiny_backbones)), [], [], LlamaMLP.forward
    monkeypatch.setattr("dual_slm.training.forward._SHORTEST_PREFIX", 10**6)  # one pass in either case
    monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, x: passes.append(asked) or forward(mlp, x))
    for asked in ("false", "true"):
        settings = [*PAPER, "stages.0.max_steps=2", f"train.activation_checkpointing={asked}"]
        shortened = load_recipe(recipe, settings)
        shortened.stages = shortened.stages[:1]
        run(shortened, tmp_path / asked)
        states += weights(tmp_path / asked)
    assert passes.count("true") == passes.count("false") + 2 * 2  # steps, layers
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without CUDA")
@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_used_where_the_cpu_is_fast_in_it(fast, tiny_backbones, tmp_path, monkeypatch, capsys):
    """Without AVX-512 it takes a hundred times as long as float32: there a recipe that asks for it runs in float32."""
    for module in ("hardware", "features"):
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


@pytest.mark.slow
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
        monkeypatch.setattr("dual_slm.training.hardware.EAGER_LIMIT", limit)
        run(load_recipe(str(recipe)), tmp_path / str(limit))
        assert ("eager" in used) == (limit > 0)  # the LLM comes with the fused one
        log = json.loads((tmp_path / str(limit) / "stage-1-joint/log.json").read_text())
        losses.append([entry["eval_loss"] for entry in log if "eval_loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# ---- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        "stage-0/linguistic-0.pt",
        "stage-1-joint/checkpoint-4/complete",
        "stage-2-disentangle/checkpoint-2",
        "stage-3-holistic/checkpoint-4",
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(finished, tmp_path, point):
    """SIGKILL in stage 0 and in each stage, in the middle of writing a checkpoint too."""
    folder, final = finished
    command = [*TRAIN, "--recipe", folder / "recipe.yaml", "--output", tmp_path / "run"]
    threads = torch.get_num_threads()  # sums are in the same order
    killed(*command, reached=(tmp_path / "run" / point).exists, threads=threads)
    assert not (tmp_path / "run" / "final").exists()
    started(*command, "--resume", threads=threads)
    expected, found = load_file(final / "model.safetensors"), weights(tmp_path / "run")[0]
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_processes_evaluate_what_one_does(tiny_backbones, tmp_path):
    """As many rows in a batch as there are processes: each sees its part of every clip once."""
    settings, logs = [*PAPER, "stages.0.max_steps=2", "data.validation_rows=4"], []
    recipe = world(tmp_path, tiny_backbones)
    refolded(recipe, stages=yaml.safe_load(recipe.read_text())["stages"][:1])
    for processes in (1, 4):
        launch, output = [*LAUNCH, 4] if processes == 4 else [], tmp_path / str(processes)
        started(*launch, *TRAIN, "--recipe", recipe, "--output", output, "--set", *settings)
        log = json.loads((output / "stage-1-joint/log.json").read_text())
        logs.append(next(entry for entry in log if "eval_loss" in entry))
    for name in ("eval_loss", "eval_loss_asr", "eval_loss_emotion", "eval_wer"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4)


@pytest.mark.slow
def test_two_processes_do_what_one_does(tiny_backbones, tmp_path):
    """Real runs of two processes over gloo, the same global batches: the same adapters within float tolerance, also where
    each process keeps but half of the LLM's layers."""
    recipe = world(tmp_path, tiny_backbones)
    config = yaml.safe_load(recipe.read_text())["model"]["config"]
    still = {"paralinguistic_dropout": 0.0, "linguistic_dropout": 0.0}
    refolded(recipe, model={"config": config | still}, train={"eval_steps": 6})
    command = [*TRAIN, "--recipe", recipe, "--output"]
    started(*command, tmp_path / "one")
    started(*LAUNCH, 2, *command, tmp_path / "two")
    result = started(*LAUNCH, 2, *command, tmp_path / "sharded", "--set", "train.shard_llm=true")
    kept, whole = re.search(r"layers: ([\d.]+) of ([\d.]+) MiB in each process", result.stdout).groups()
    assert float(kept) == pytest.approx(float(whole) / 2, abs=0.011)
    one = weights(tmp_path / "one")[0]
    for other in (weights(tmp_path / name)[0] for name in ("two", "sharded")):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=2e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("shard_llm", [False, True], ids=["whole", "sharded"])
def test_two_processes_resume_to_the_same_bits_in_a_later_epoch(tiny_backbones, tmp_path, shard_llm):
    """Both are killed in the second pass over the data; what follows must be its batches, not the first pass's again."""
    recipe, small = world(tmp_path, tiny_backbones), {"linguistic_hidden_size": 40, "num_paralinguistic_tokens": 4}
    small = {} if shard_llm else small  # small gradients would not show that sums and gathers wait for each other
    stage = yaml.safe_load(recipe.read_text())["stages"][1] | {"max_steps": 8, "tasks": {"asr": 1, "emotion": 1}}
    paper = {"model": {"adapters": "paper", "config": small}, "warm_start": {"enabled": False}}
    refolded(recipe, stages=[stage], train={"eval_steps": 5, "shard_llm": shard_llm}, **paper)
    train, stage = ["train", "--recipe", recipe, "--output"], "stage-1-disentangle"
    command = [*LAUNCH, 2, "-m", "dual_slm.training.cli", *train]
    started(*command, tmp_path / "whole")
    log = json.loads((tmp_path / "whole" / stage / "log.json").read_text())
    assert 1 < next(entry["epoch"] for entry in log if entry["step"] == 5) < 2

    late = tmp_path / "late.py"  # the second process writes its part of a checkpoint well after the first one
    late.write_text(
        "import time\n"
        "from dual_slm.training.cli import main\n"
        "from dual_slm.training.trainer import DualSLMTrainer\n"
        "save = DualSLMTrainer._save_rng_state\n"
        "DualSLMTrainer._save_rng_state = lambda self, to: time.sleep(2 * self.args.process_index) or save(self, to)\n"
        "main()\n"
    )
    complete = tmp_path / "killed" / stage / "checkpoint-5/complete"
    killed(*LAUNCH, 2, late, *train, tmp_path / "killed", reached=complete.exists)
    assert not (tmp_path / "killed/final").exists()
    started(*command, tmp_path / "killed", "--resume")
    expected, found = (weights(tmp_path / name)[0] for name in ("whole", "killed"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# ---- what a run refuses ----------------------------------------------------------------------------------------------


def test_a_run_does_not_go_on_with_other_data(finished, tmp_path):
    """A table that was labelled anew between a kill and --resume: half of a run would be of one, half of the other."""
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "copy")
    table = tmp_path / "copy" / "t.parquet"
    recipe = load_recipe(str(folder / "recipe.yaml"), [f"data.tables=[{table}]"])
    (tmp_path / "copy/run/recipe.yaml").write_text(recipe.to_yaml())
    run(recipe, tmp_path / "copy/run", resume=True)  # the same rows: nothing is left to do
    write_table([row.replace(emotion="happy") for row in read_table(table)], table)
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
    write_table([row.replace(**changes) for row in read_table(table)], table)
    with pytest.raises(ValueError, match=message):
        run(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("config", "tasks", "message"),
    [
        ({}, {"emotion": 1}, "stage disentangle: nothing learns, as the rates of all that there is are 0"),
        (
            {"paralinguistic_soft_residual": True},
            {"asr": 1, "emotion": 1},
            "stage disentangle: asr would teach nothing",
        ),
    ],
)
def test_a_stage_that_cannot_learn_what_it_is_asked_is_refused(tiny_backbones, tmp_path, config, tasks, message):
    recipe = load_recipe(str(world(tmp_path, tiny_backbones, warm_start={"enabled": False})))
    recipe.model.config |= config
    recipe.stages = [replace(recipe.stages[1], tasks=tasks, learning_rate=0.0, residual_learning_rate=1e-3)]
    with pytest.raises(ValueError, match=message):
        run(recipe, tmp_path / "run")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_what_there_is(tiny_backbones, tmp_path):
    recipe = world(tmp_path, tiny_backbones)
    settings = ["stages.0.learning_rate=1e12", "stages.0.max_steps=40", "stages.0.warmup_steps=3"]
    settings += ["train.max_grad_norm=0.0", "train.eval_steps=1"]
    with pytest.raises(FloatingPointError, match="the loss is nan at step"):
        run(load_recipe(str(recipe), settings), tmp_path / "run")
    assert (tmp_path / "run/stage-0/final/model.safetensors").is_file()
