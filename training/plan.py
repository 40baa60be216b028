"""Says what a run would do without doing it: rows, steps, disk, memory and hours."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from ..backbones_dual_slm import resolve_backbone
from ..configuration_dual_slm import DualSLMConfig
from .build import adapter_defaults, fit_dtype
from .corpora.row import Row
from .corpora.table import read_table
from .features import FRAMES_PER_SECOND, FeatureStore
from .hardware import activation_bytes, eager_fits, matrix_rate, positions_floor
from .recipe import Recipe
from .tasks import lend_histories

_CLIPS_PER_HOUR = 900  # of synthesised speech, 4 s each


def plan(recipe: Recipe, output: str | Path) -> str:
    """Lines on the data, the stages, disk, memory and time of a run, at the speed of this machine."""
    recipe = fit_dtype(recipe)
    if recipe.model.start_from:
        config = DualSLMConfig.from_pretrained(recipe.model.start_from)
        ids = {"audio_model_id": config.audio_model_id, "text_model_id": config.text_model_id}
        recipe = replace(recipe, model=replace(recipe.model, **ids))
    model, data, batch_size = recipe.model, recipe.data, recipe.train.batch_size
    rows = [row for row in read_table(*data.tables) if row.audio] if data.tables else []
    if rows and data.histories:
        rows = list(lend_histories(rows, read_table(*data.histories), recipe.train.seed))
    tables = recipe.warm_start.tables if recipe.warm_start.enabled else []  # additional clips of stage 0
    words = [row for row in read_table(*tables) if row.audio and row.split == "train"] if tables else []
    clips = int(data.synthesise_hours * _CLIPS_PER_HOUR * 0.85)
    if rows:
        clips = sum(1 + data.copies(row) for row in rows if row.split == "train")
    text = AutoConfig.from_pretrained(resolve_backbone(model.text_model_id)).get_text_config()
    positions = _positions(recipe, rows or [Row("0", "", "train", transcript="x" * 50, response="x" * 100)])
    rate, step = matrix_rate(model.dtype), positions_floor(int(positions.mean()), 20, text)
    lines, hours = [], 0.0
    for number, stage in enumerate(recipe.stages, 1):
        steps = stage.max_steps
        if steps <= 0:
            steps = int(stage.epochs * (clips // batch_size) / recipe.train.gradient_accumulation_steps)
        floor = steps * batch_size * step / rate / 3600
        hours += floor
        lines.append(f"stage {number}   {stage.name}: {steps:,} steps of {batch_size}, floor {60 * floor:,.1f} min")
    lines = [
        f"recipe {recipe.name}: {model.audio_model_id} + {model.text_model_id}",
        *_data_lines(recipe, Path(output), rows, words, clips),
        *lines,
        _memory_line(recipe, positions.max(), text),
        f"time      about {hours:.2f} h or more, at {rate / 1e12:.2f} TFLOPS measured here; expect 1.5 to 2 times that",
        f"output    {output}",
    ]
    return "\n".join(lines)


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


def _data_lines(recipe: Recipe, output: Path, rows: list[Row], words: list[Row], clips: int) -> list[str]:
    data, warm_start, lines = recipe.data, recipe.warm_start, []
    used = [row for row in rows if row.split in ("train", "validation")]
    if data.synthesise_hours:
        lines.append(f"data      {data.synthesise_hours} h to synthesise")
    if rows:
        hours = f"{_hours(rows):.2f} h of audio in all splits"
        lines.append(f"data      {clips:,} training clips with augmented copies, {hours}")
    if warm_start.enabled:
        more = f", on {len(words):,} clips ({_hours(words):.2f} h) more" if words else ""
        lines.append(f"stage 0   {warm_start.steps} CTC steps, {warm_start.caption_steps} caption steps{more}")
    if data.align_responses and any(stage.tasks.get("dialogue") for stage in recipe.stages):
        unanswered = sum(row.response_complete is None and bool(row.transcript) for row in used)
        lines.append(f"align     {unanswered:,} rows are answered by the LLM")
    audio = AutoConfig.from_pretrained(resolve_backbone(recipe.model.audio_model_id))
    config = DualSLMConfig(audio_config=audio.to_dict(), **adapter_defaults(recipe.model) | recipe.model.config)
    store = FeatureStore(output / "features", config, data.feature_bits)
    seconds = sum((row.duration or 0) * (1 + data.copies(row)) for row in used) + 3600 * _hours(words)
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
