"""Says what a run would do without doing it: instances by task and corpus, rows, steps, disk, memory and hours."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from ..backbones_dual_slm import resolve_backbone
from ..configuration_dual_slm import DualSLMConfig
from .build import adapter_defaults, fit_dtype
from .corpora.nominal import NOMINAL, nominal_rows
from .corpora.row import Row, Variant
from .corpora.table import read_table
from .data import check_mapping, cut_dialogues, to_answer
from .dataset import StageDataset
from .features import FRAMES_PER_SECOND, FeatureStore
from .hardware import activation_bytes, eager_fits, matrix_rate, positions_floor
from .labels import TASKS
from .recipe import Recipe, StageRecipe
from .stats import describe_positions, speech_position
from .tasks import label_sets, lend_histories

_CLIPS_PER_HOUR = 900  # of synthesised speech, 4 s each
_ANSWER = "x" * 100  # stands for what the LLM will answer
_DRAWN = 2_000  # instances of a stage whose contexts are looked at


@dataclass
class _Rows:
    """The rows of a run: of train and validation as they would be read, and how many the LLM would answer."""

    read: list[Row] = field(default_factory=list)  # of all splits
    used: list[Row] = field(default_factory=list)  # of train and validation, with cut histories and some answer
    train: list[Row] = field(default_factory=list)  # with augmented copies
    to_answer: int = 0
    nominal: list[str] = field(default_factory=list)  # tables that are not there


def plan(recipe: Recipe, output: str | Path) -> str:
    """Lines on the stages, the data, disk, memory and time of a run, at the speed of this machine.

    A table that is not there counts with the public size of the corpus that it has the name of, and the plan says so. What
    needs the configuration of a backbone that cannot be read is left out likewise.
    """
    recipe = fit_dtype(recipe)
    if recipe.model.start_from:
        config = DualSLMConfig.from_pretrained(recipe.model.start_from)
        ids = {"audio_model_id": config.audio_model_id, "text_model_id": config.text_model_id}
        recipe = replace(recipe, model=replace(recipe.model, **ids))
    model, data = recipe.model, recipe.data
    rows = plan_rows(recipe)
    tables = recipe.stage_0.tables  # additional clips
    words = [row for row in read_table(*tables) if row.audio and row.split == "train"] if tables else []
    text = _config(model.text_model_id, "text")
    positions = _positions(recipe, rows.used or [Row("0", "", "train", transcript="x" * 50, response=_ANSWER)])
    rate = matrix_rate(model.dtype)
    step = positions_floor(int(positions.mean()), 20, text) if text else None
    lines, hours = [], 0.0
    tokenizer, choices = _tokenizer(model.text_model_id), label_sets(rows.used)
    for number, stage in enumerate(recipe.stages, 1):
        dataset = None
        if rows.train:
            positional = recipe.train.positional_randomness
            dataset = StageDataset(rows.train, stage, recipe.train.seed, positional, choices=choices)
        steps = _steps(recipe, stage, len(dataset) if dataset else int(data.synthesise_hours * _CLIPS_PER_HOUR * 0.85))
        floor = steps * recipe.train.batch_size * step / rate / 3600 if step else 0.0
        hours += floor
        told = f"floor {60 * floor:,.1f} min" if step else "time unknown"
        lines.append(f"stage {number}   {stage.name}: {steps:,} steps of {recipe.train.batch_size}, {told}")
        if dataset:
            lines += [f"          {line}" for line in _stage_lines(dataset, tokenizer)]
    lines = [
        f"recipe {recipe.name}: {model.audio_model_id} + {model.text_model_id}",
        *_data_lines(recipe, Path(output), rows, words),
        *lines,
    ]
    if text and step:
        time = f"about {hours:,.2f} h or more, at {rate / 1e12:.2f} TFLOPS measured here; expect 1.5 to 2 times that"
        lines += [_memory_line(recipe, positions.max(), text), f"time      {time}"]
    else:
        lines.append(f"memory    and time are unknown: {_unread(model.text_model_id)}")
    return "\n".join([*lines, f"output    {output}"])


def plan_rows(recipe: Recipe) -> _Rows:
    """The rows that a recipe would train and validate on."""
    data, rows = recipe.data, _Rows()
    rows.nominal = [table for table in data.tables if not Path(table).is_file() and Path(table).stem in NOMINAL]
    if there := [table for table in data.tables if table not in rows.nominal]:
        rows.read = [row for row in read_table(*there) if row.audio]
    rows.read += [row for table in rows.nominal for row in nominal_rows(Path(table).stem)]
    if not rows.read:
        return rows
    if data.histories:
        rows.read = list(lend_histories(rows.read, read_table(*data.histories), recipe.train.seed))
    used = list(cut_dialogues([row for row in rows.read if row.split in ("train", "validation")], recipe))
    check_mapping(used, recipe)
    asked = [to_answer(row, recipe) for row in used]
    rows.to_answer = sum(asked)
    pairs = zip(used, asked, strict=True)
    rows.used = [row.replace(response=row.response or _ANSWER) if answered else row for row, answered in pairs]
    for row in rows.used:
        if row.split == "train":
            copies = [row.replace(variant=Variant(copy=n + 1)) for n in range(data.copies(row))]
            rows.train += [row, *copies]
    return rows


def _steps(recipe: Recipe, stage: StageRecipe, instances: int) -> int:
    if stage.max_steps > 0:
        return stage.max_steps
    return int(stage.epochs * (instances // recipe.train.batch_size) / recipe.train.gradient_accumulation_steps)


def _config(model_id: str, side: str) -> PreTrainedConfig | None:
    """Configuration of a backbone; None if it is to come from the Hub, and that is out of reach."""
    for preset in (DualSLMConfig.slm_qwen(), DualSLMConfig.slm_llama()):  # the paper's need no Hub
        if getattr(preset, f"{side}_model_id") == model_id:
            return getattr(preset, f"{side}_config").get_text_config()
    try:
        return AutoConfig.from_pretrained(resolve_backbone(model_id)).get_text_config()
    except OSError:
        if "/" not in model_id or os.path.isdir(model_id):
            raise
        return None


def _unread(model_id: str) -> str:
    return f"no configuration of {model_id} could be read. Is the Hub within reach, and the name right?"


def _tokenizer(model_id: str) -> Any:
    """The LLM's tokenizer if it is on this machine, else None."""
    try:
        return AutoTokenizer.from_pretrained(resolve_backbone(model_id), local_files_only=True)
    except (OSError, ValueError):
        return None


def instance_table(instances: Mapping[tuple[str, str], float]) -> list[str]:
    """Lines of a table of instances an epoch, by task and corpus, with sums."""
    corpora, tasks = list(dict.fromkeys(corpus for corpus, _ in instances)), {task for _, task in instances}
    names = [task for task in TASKS if task in tasks]
    numbers = np.array([[instances.get((corpus, task), 0.0) for corpus in corpora] for task in names])
    numbers = np.vstack([numbers, numbers.sum(0)])
    numbers = np.hstack([numbers, numbers.sum(1, keepdims=True)])
    lines = ["an epoch  " + "".join(f"{corpus:>{max(9, len(corpus)) + 2}}" for corpus in [*corpora, "all"])]
    for name, line in zip([*names, "all"], numbers, strict=True):
        cells = zip((f"{number:,.0f}" if number else "-" for number in line), [*corpora, "all"], strict=True)
        lines.append(f"{name:<10}" + "".join(f"{cell:>{max(9, len(corpus)) + 2}}" for cell, corpus in cells))
    return lines


def _stage_lines(dataset: StageDataset, tokenizer: Any) -> list[str]:
    """Instances by task and corpus, and the contexts of some that are drawn."""
    drawn = np.random.default_rng(0).choice(len(dataset), min(_DRAWN, len(dataset)), replace=False)
    chats = [dataset[0, int(index)].sample.messages for index in drawn]
    context = np.mean([any(message["role"] != "system" for message in chat[:-1]) for chat in chats])
    positions = [speech_position(chat, tokenizer) for chat in chats]
    how = "" if tokenizer else ", estimated at four letters a token"
    told = f"of {len(chats):,} drawn instances {context:.1%} have context (earlier turns)"
    return [*instance_table(dataset.instances()), told, f"{describe_positions(positions)}{how}"]


def _hours(rows: Sequence[Row]) -> float:
    return sum(row.duration or 0 for row in rows) / 3600


def _positions(recipe: Recipe, rows: Sequence[Row]) -> np.ndarray:
    """About how many positions each row takes in the LLM: a token for four letters, and the prompt's own 70."""
    texts = ([row.transcript, row.response, *(turn["content"] for turn in row.history)] for row in rows)
    positions = np.array([sum(len(text or "") for text in parts) for parts in texts]) / 4 + 70
    if recipe.model.adapters == "paper":  # the others take as many positions as there are words
        per_second = 50 / recipe.model.config.get("linguistic_downsample_rate", 5)
        positions = positions + per_second * np.array([row.duration or 4.0 for row in rows])
    return positions


def _data_lines(recipe: Recipe, output: Path, rows: _Rows, words: list[Row]) -> list[str]:
    data, warm_start, lines = recipe.data, recipe.warm_start, []
    if rows.nominal:
        lines.append(f"data      nominal sizes, no table: {', '.join(rows.nominal)}")
    if data.synthesise_hours:
        lines.append(f"data      {data.synthesise_hours} h to synthesise")
    if rows.read:
        hours = f"{_hours(rows.read):,.2f} h of audio in all splits"
        lines.append(f"data      {len(rows.train):,} training rows with augmented and cut copies, {hours}")
    if warm_start.enabled:
        more = f", on {len(words):,} clips ({_hours(words):.2f} h) more" if words else ""
        lines.append(f"stage 0   {warm_start.steps} CTC steps, {warm_start.caption_steps} caption steps{more}")
    if rows.to_answer:
        lines.append(f"align     {rows.to_answer:,} rows are answered by the LLM")
    audio = _config(recipe.model.audio_model_id, "audio")
    if audio is None:
        return [*lines, f"disk      unknown: {_unread(recipe.model.audio_model_id)}"]
    config = DualSLMConfig(audio_config=audio.to_dict(), **adapter_defaults(recipe.model) | recipe.model.config)
    store = FeatureStore(output / "features", config, data.feature_bits)
    clips = {(row.audio, row.variant.copy): row.duration for row in rows.used}.values()  # cut histories share a clip
    seconds = sum(duration or 0 for duration in clips) + 3600 * _hours(words)
    seconds += sum((row.duration or 0) * data.copies(row) for row in rows.used)
    size = (seconds or 3600 * data.synthesise_hours) * FRAMES_PER_SECOND * store.layers * store.width * store.bits / 8
    layers = f"{store.layers} of the encoder's layers, data.feature_bits"
    return [*lines, f"disk      about {size / 2**30:,.2f} GiB of features ({layers})"]


def _memory_line(recipe: Recipe, longest: float, text: PreTrainedConfig) -> str:
    batch = recipe.train.batch_size
    item = {"float32": 4, "auto": 4}.get(recipe.model.dtype, 2)
    layer = 0.5625 if recipe.model.load_in_4bit else item  # bytes a weight; NF4 keeps a float32 for each 64
    size = positions_floor(1, 0, text) / 4 * layer + text.vocab_size * text.hidden_size * item
    eager = eager_fits(batch, longest, longest, text, item)
    activations = activation_bytes(batch, longest, text, item, eager)
    if recipe.train.activation_checkpointing:
        activations /= 12
    return (
        f"memory    LLM {size / 2**30:.1f} GiB, activations about {activations / 2**30:.1f} GiB in the longest batch "
        f"({batch} of {longest:.0f} positions)"
    )
