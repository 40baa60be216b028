"""A small world for tests of training: tones as clips, their table, and a recipe over it."""

from pathlib import Path

import soundfile
import yaml

from conftest import CAPTION, LABELS, tone
from dual_slm.training.corpora.row import make_row
from dual_slm.training.corpora.table import write_table


def world(folder: Path, backbones: tuple[str, str], clips: int = 24, **changes) -> Path:
    """A table `t.parquet` of audio files and a recipe over it, stage 0 and three stages; returns the recipe's file.

    Args:
        changes: sections of the recipe, or keys as `section__key`.
    """
    rows = []
    for n in range(clips):
        path, duration = folder / f"{n}.wav", 0.5 + (n % 5) / 5
        soundfile.write(path, tone(duration, n), 16_000)
        gender, emotion = ("female", "male")[n % 2], ("happy", "sad")[n % 2]
        history = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
        rows.append(
            make_row(
                id=str(n),
                corpus="c",
                split="train" if n < clips - 6 else "validation",
                audio=str(path),
                duration=duration,
                transcript=("the quick fox", "the lazy dog", "hello brown fox")[n % 3],
                gender=gender,
                emotion=emotion,
                caption=f"({gender} voice, {emotion} emotion)",
                history=history[: n % 3],
                response="hello to the fox",
                response_complete=n % 4 > 0,
            )
        )
    write_table(rows, folder / "t.parquet")
    stage = {"learning_rate": 1e-3, "max_steps": 6}
    config = {"paralinguistic_hidden_size": 24, "linguistic_hidden_size": 40, "linguistic_beam_width": 4}
    recipe = {
        "model": {
            "audio_model_id": backbones[0],
            "text_model_id": backbones[1],
            "adapters": "warm_start",
            "config": config | {"caption_template": CAPTION, "attribute_labels": LABELS},
        },
        "data": {"tables": [str(folder / "t.parquet")], "validation_rows": 6, "align_responses": False},
        "warm_start": {"steps": 8, "caption_steps": 8, "frames_per_batch": 300},
        "train": {"batch_size": 4, "eval_steps": 2, "logging_steps": 1},
        "stages": [
            {"name": "joint", "err_stage": "joint", "tasks": {"asr": 1, "emotion": 1}, "caption_share": 0.3, **stage},
            {"name": "disentangle", "err_stage": "disentangle", "tasks": {"emotion": 1, "gender": 1}, **stage},
            {
                "name": "holistic",
                "err_stage": "holistic",
                "tasks": {"emotion": 1, "dialogue": 2},
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
