"""Recipes: those of the package, settings, refusals, and the arguments of transformers that they stand for."""

from dataclasses import fields, replace

import pytest
import torch
import yaml
from transformers import Seq2SeqTrainingArguments

from dual_slm.training.err import SourceRules
from dual_slm.training.files import RECIPES
from dual_slm.training.recipe import Recipe, StageRecipe, TrainRecipe, load_recipe

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def test_every_recipe_of_the_package_is_sound():
    assert {"speedrun", "slm-qwen2.5-7b", "slm-llama3.1-8b", "slm-smollm2-135m"} <= set(NAMES)
    for name in NAMES:
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
        (["train.batch_size=many"], "batch_size is 'many', a str; it must be int"),
        (["train.bf16=1"], "bf16 is 1, a int; it must be bool"),
        (["data.tables=a.parquet"], r"tables is 'a.parquet', a str; it must be list\[str\]"),
        (["train.max_grad_norm=high"], "max_grad_norm is 'high', a str; it must be float"),  # of transformers
        (["train.dataloader_workers=2"], "did you mean 'dataloader_num_workers'"),
        (
            ["train.learning_rate=1e-4"],
            "learning_rate is no key of this section: each stage or the run itself sets it",
        ),
        (["train.output_dir=x"], "output_dir is no key of this section"),
        (["model.adapters=paper"], "warm_start.enabled needs other model.adapters"),
        (["model.adapters=papers"], "adapters is 'papers'; it must be one of paper, warm_start, emosllm"),
        (["stages.0.err_stage=second"], "it must be one of joint, disentangle, holistic"),
        (["stages.0.objective=mse"], "it must be one of ce, kl, ce"),
        (["stages.0.best_by=accuracy_asr"], "best_by is 'accuracy_asr'; it must be one of loss, wer, accuracy_gender"),
        (["data.synthesise_hours=0"], "data.tables is empty"),
        (["data.synthesise_engines=[pipr]"], "no engine 'pipr'; did you mean 'piper'"),
        (["stages.0.tasks.asrr=1"], "no task 'asrr'; did you mean 'asr'"),
        (["stages.1.name=joint"], "every stage needs a name of its own"),
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["warm_start.pieces=[60]"], r"warm_start: pieces is \[60\]\. Version 0\.1\.0 was the last to run this"),
        (["warm_start.sampled_pieces=0"], r"sampled_pieces is 0\. Version 0\.1\.0"),
        (["warm_start.steps=[1, 2]"], r"steps is \[1, 2\]\. .* give warm_start\.steps as one number"),
        (["stages.0.ctc_share=0.1"], r"stage 0: ctc_share is 0\.1\. Version 0\.1\.0"),
        (["model.config.linguistic_ctc_vocab_size=60"], r"config\.linguistic_ctc_vocab_size is 60\. Version 0\.1\.0"),
        (
            ["model.adapters=paper", "warm_start.enabled=false", "model.config.linguistic_adapter_type=letters"],
            "letters needs model.adapters: warm_start",
        ),
    ],
)
def test_letters_refuse_what_they_do_not_have(settings, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("speedrun", settings)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("{c: {asr: 1}, emotion: 1}", "stage joint: tasks gives emotion no corpus, and others one: write CORPUS"),
        ("{c: {asrr: 1}}", "stage joint: no task 'asrr'; did you mean 'asr'"),
        ("{c: {asr: 0}}", r"tasks\.c\.asr is 0; it must be a number above 0: leave out what"),
        ("{c: {asr: .inf}}", r"tasks\.c\.asr is inf; it must be a number above 0"),
        ("{c: {asr: true}}", r"tasks\.c\.asr is True; it must be a number"),
        ("{asr: -1}", r"tasks\.asr is -1; it must be a number above 0"),
        ("{asr: often}", r"tasks\.asr is 'often'; it must be a number"),
        ("{c: {}}", "stage joint: names no tasks"),
    ],
)
def test_the_form_of_tasks_is_checked(tasks, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("speedrun", [f"stages.0.tasks={tasks}"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("repeat={c: 2}", "repeat is {'c': 2} beside tasks by corpus: their exposures say"),
        ("balanced=true", "balanced is True beside tasks by corpus"),
        ("best_by=accuracy_gender", r"best_by is 'accuracy_gender'; it must be one of loss, wer, accuracy_emotion\."),
    ],
)
def test_what_tasks_by_corpus_exclude_is_refused(setting, message):
    tasks = "stages.0.tasks={c: {asr: 1}, d: {emotion: 0.5}}"
    with pytest.raises(ValueError, match=message):
        load_recipe("speedrun", [tasks, f"stages.0.{setting}"])
    stage = load_recipe("speedrun", [tasks, "stages.0.best_by=accuracy_emotion"]).stages[0]
    assert stage.task_names == ["asr", "emotion"]
    assert [stage.share(corpus, "emotion") for corpus in "cde"] == [0, 0.5, 0]


def test_settings_change_a_recipe():
    recipe = load_recipe("speedrun", ["stages.1.learning_rate=3e-4", "train.seed=5", "data.tables=[a.parquet]"])
    assert recipe.stages[1].learning_rate == 3e-4
    assert recipe.train.seed == 5
    assert recipe.data.tables == ["a.parquet"]
    with pytest.raises(FileNotFoundError, match="did you mean 'speedrun'"):
        load_recipe("speedrum")


def test_a_recipe_written_and_read_again_is_the_same(tmp_path):
    """Resuming compares the text, so it holds nothing of the machine, and only what was given of transformers'."""
    settings = ["train.adam_beta2=0.98", "train.report_to=[wandb]", "train.save_total_limit=2"]
    recipe = load_recipe("speedrun", settings)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert again == recipe and again.to_yaml() == recipe.to_yaml()
    train = yaml.safe_load(recipe.to_yaml())["train"]
    assert list(train) == [*TrainRecipe.__annotations__, "adam_beta2", "bf16", "report_to"]
    recipe.train = replace(recipe.train, seed=7)
    assert recipe.to_yaml() != again.to_yaml()


def test_the_rules_of_sources_are_those_of_the_stage():
    stage = StageRecipe(err_stage="holistic", err=False, replaced_share=0.5, linguistic_source="transcript")
    assert stage.source_rules == SourceRules("holistic", False, 0.5, "speech", "transcript")


def arguments_of_0_1_0(recipe: Recipe, stage: StageRecipe, folder: str) -> Seq2SeqTrainingArguments:
    """The arguments of a stage as version 0.1.0 spelled them out, on one process."""
    train = recipe.train
    return Seq2SeqTrainingArguments(
        output_dir=folder,
        seed=train.seed,
        data_seed=train.seed,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        learning_rate=stage.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        warmup_steps=stage.warmup_steps,
        lr_scheduler_type=stage.lr_scheduler_type,
        num_train_epochs=stage.epochs,
        max_steps=stage.max_steps,
        bf16=train.bf16,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps",
        eval_on_start=True,
        eval_steps=train.eval_steps,
        save_strategy="steps",
        save_steps=train.eval_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{stage.best_by}",
        greater_is_better=stage.best_by.startswith("accuracy"),
        logging_steps=train.logging_steps,
        logging_nan_inf_filter=False,
        predict_with_generate=True,
        generation_max_length=20,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0,
        accelerator_config={"split_batches": True, "dispatch_batches": False},
        ddp_find_unused_parameters=False,
        report_to="none",
        project=recipe.name,
        run_name=f"{recipe.name}/{stage.name}",
        disable_tqdm=False,
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_arguments_of_a_stage_are_those_of_0_1_0(name, tmp_path):
    recipe = load_recipe(name)
    for stage in recipe.stages:
        found = recipe.train.arguments(tmp_path / "s", stage, project=recipe.name, generation_max_length=20)
        found, expected = found.to_dict(), arguments_of_0_1_0(recipe, stage, str(tmp_path / "s")).to_dict()
        for key in ("activation_checkpointing", "gradient_checkpointing"):  # the stage switched it on itself
            if key in expected:
                assert found.pop(key) is recipe.train.activation_checkpointing
                del expected[key]
        assert found == expected
    assert not (tmp_path / "s").exists()


def test_any_argument_of_transformers_works():
    settings = ["train.adam_beta2=0.98", "train.dataloader_num_workers=3", "train.save_total_limit=9"]
    recipe = load_recipe("speedrun", [*settings, "train.lr_scheduler_kwargs={a: 1}"])
    arguments = recipe.train.arguments("folder", recipe.stages[0], 2, eval_batch_size=6)
    assert (arguments.adam_beta2, arguments.dataloader_num_workers, arguments.save_total_limit) == (0.98, 3, 9)
    assert (arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size) == (4, 6)
    assert arguments.lr_scheduler_kwargs == {"a": 1}
    checkpointing = load_recipe("speedrun", ["train.gradient_checkpointing=true"]).train
    assert checkpointing.arguments("folder", recipe.stages[0]).gradient_checkpointing  # its name until 5.23
    own = {f.name for f in fields(TrainRecipe)} - {f.name for f in fields(Seq2SeqTrainingArguments)}
    assert own - {"activation_checkpointing"} == {"batch_size", "shard_llm", "positional_randomness"}
