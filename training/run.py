"""Runs a recipe: features, stage 0, stages, checkpoint. A run that was killed goes on to the same result.

RUN/recipe.yaml  environment.json        how it was made
RUN/corpus/  features/  responses.parquet  the data, made once
RUN/stage-0/  stage-1-NAME/ ...          each with its log, curves and a finished checkpoint in final/
RUN/final/                               the checkpoint: `from_pretrained` it
"""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from .alignment import score_targets
from .build import check_stage_0, fit_dtype, make_model
from .collator import DualSLMCollator
from .data import environment, load_data
from .dataset import StageDataset
from .features import FeatureStore
from .files import read_json, write_json, write_text
from .hardware import shard_llm
from .recipe import Recipe, StageRecipe
from .stages import Run, finish, is_finished, restore, run_stage, run_stage_0
from .tasks import tasks_of


def run(recipe: Recipe, output: str | Path, resume: bool = False) -> Path:
    """Runs a recipe and returns the folder of its checkpoint.

    Args:
        output: the run's folder. It must be new, unless `resume`, which goes on with a run of the same recipe.

    Raises:
        FileExistsError, ValueError: the folder holds a run already, or one of another recipe.
    """
    output = Path(output)
    # Other processes wait while the first one makes the data, which may take many hours.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    batch_size, processes = recipe.train.batch_size, state.num_processes
    if batch_size % processes:
        raise ValueError(f"train.batch_size {batch_size} is no multiple of the {processes} processes.")
    if state.is_main_process:
        _check_folder(recipe, output, resume)
    with state.main_process_first():
        whole = _prepare(recipe, output, state)
    sharded = recipe.train.shard_llm and processes > 1
    if not sharded:  # no device holds a sharded LLM whole
        whole.model.to(state.device)  # pyright: ignore[reportArgumentType]
    log, folder = [], output / "stage-0"
    if recipe.warm_start.enabled:
        with state.main_process_first():
            if is_finished(folder):
                log = restore(whole, folder)
            else:
                log = run_stage_0(whole, folder)
                finish(whole, folder, log)
    if sharded:
        shard_llm(whole.model)
        whole.model.to(state.device)  # pyright: ignore[reportArgumentType]
    teacher = _make_teacher(whole)
    for number, stage in enumerate(recipe.stages, 1):
        folder = output / f"stage-{number}-{stage.name}"
        if is_finished(folder):
            log = restore(whole, folder)
            continue
        print(f"stage {number}, {stage.name}", flush=True)
        log = log + run_stage(whole, stage, folder, resume, teacher)
        if state.is_main_process:
            finish(whole, folder, log)
        state.wait_for_everyone()
    if state.is_main_process:
        finish(whole, output, log)
    state.wait_for_everyone()
    return output / "final"


def _check_folder(recipe: Recipe, output: Path, resume: bool) -> None:
    kept = output / "recipe.yaml"
    if kept.is_file() and not resume:
        raise FileExistsError(f"{output} holds a run already: --resume goes on with it, or name another --output.")
    if kept.is_file() and kept.read_text(encoding="utf-8") != recipe.to_yaml():
        raise ValueError(f"the recipe is not the one of {kept}: go on by --recipe {kept}, or repeat its --set.")


def _prepare(recipe: Recipe, output: Path, state: PartialState) -> Run:
    """Makes the model, loads the data and computes the encoder's features; says in the folder how the run was made."""
    fitted = fit_dtype(recipe)
    model, processor = make_model(fitted)
    check_stage_0(fitted, model.config)
    output.mkdir(parents=True, exist_ok=True)
    if state.is_main_process:  # what is refused so far has not begun
        write_text(output / "recipe.yaml", recipe.to_yaml())
    data = load_data(fitted, output, model.config, str(state.device))
    facts, known = environment(data) | {"dtype": fitted.model.dtype}, output / "environment.json"
    if known.is_file() and read_json(known)["data"] != facts["data"]:
        raise ValueError(
            f"the tables are not those that {known} tells of, or another version wrote it: a run goes on with its own "
            "data. Delete that file to go on all the same."
        )
    store = FeatureStore(output / "features", model.config, fitted.data.feature_bits)
    if state.is_main_process:
        write_json(known, facts)
    options = {"skip_damaged": fitted.data.skip_damaged, "device": state.device}
    data.train = store.build(data.train, model, processor, **options)
    data.words = store.build(data.words, model, processor, **options)
    data.validation = store.build(data.validation, model, processor, **options)
    return Run(fitted, model, processor, store, data)


def _make_teacher(whole: Run) -> Callable | None:
    """Clip -> the frozen LLM's log-probabilities of its dialogue's target, if a stage has an objective with KL."""
    train = whole.recipe.train
    if all(stage.objective == "ce" for stage in whole.recipe.stages):
        return None
    rows = [row for row in whole.data.train if "dialogue" in tasks_of(row)]
    if not rows:
        raise ValueError("an objective with kl learns from dialogues, and no training row has a response.")
    stage = StageRecipe(name="teacher", tasks={"dialogue": 1.0})
    dataset = StageDataset(rows, stage, train.seed, train.positional_randomness)
    samples = {row.clip: dataset.item(row, "dialogue").sample for row in dataset.rows}
    scores = score_targets(list(samples.values()), whole.model, DualSLMCollator(whole.processor))
    return dict(zip(samples, scores, strict=True)).get
