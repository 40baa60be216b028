"""Recipes: YAML files -> dataclasses by HfArgumentParser, and refusals that name what was meant."""

import difflib
import inspect
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser, SchedulerType

from ..configuration_dual_slm import DualSLMConfig
from .corpora.synthesis import ENGINES, VOICES
from .err import STAGES
from .tasks import ATTRIBUTES, TASKS

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class ModelRecipe:
    """Backbones and adapters."""

    audio_model_id: str = "whisper-base"
    text_model_id: str = "smollm2-135m-instruct"
    adapters: str = field(
        default="warm_start", metadata={"help": "paper | warm_start (DESIGN, embedding space) | emosllm"}
    )
    config: dict = field(default_factory=dict, metadata={"help": "fields of DualSLMConfig"})
    dtype: str = field(default="auto", metadata={"help": "of the backbones: auto, float32, bfloat16"})
    load_in_4bit: bool = field(default=False, metadata={"help": "the LLM by bitsandbytes"})
    start_from: str | None = field(
        default=None, metadata={"help": "a checkpoint that training goes on from, with stage 0 if that is enabled"}
    )


@dataclass
class DataRecipe:
    """Tables of `dual-slm corpus`; without any, a small corpus is synthesised into the run's folder."""

    tables: list[str] = field(default_factory=list)
    augment: dict = field(default_factory=dict, metadata={"help": "corpus -> augmented copies of each training clip"})
    revoice: dict = field(default_factory=dict, metadata={"help": "corpus -> copies in other voices, augmented too"})
    synthesise_hours: float = 0.0
    synthesise_engines: list[str] = field(default_factory=lambda: list(ENGINES))
    align_responses: bool = field(
        default=True,
        metadata={
            "help": "let the frozen LLM answer rows that it has not answered yet, in the place of a corpus's own"
        },
    )
    alignment: dict = field(default_factory=dict, metadata={"help": "fields of AlignmentConfig"})
    histories: list[str] = field(
        default_factory=list, metadata={"help": "tables whose text dialogues go before rows that have no history"}
    )
    validation_rows: int = 64
    read_aloud: int = field(default=2, metadata={"help": "validation replies that are printed at each evaluation"})
    feature_bits: int = 16
    skip_damaged: bool = field(default=False, metadata={"help": "leave out rows whose audio cannot be read, by name"})

    def copies(self, row: dict) -> int:
        """Augmented copies of a row."""
        names = (self.augment, self.revoice) if row["split"] == "train" else ()
        return sum(copies.get(row["corpus"], 0) for copies in names)


@dataclass
class WarmStartRecipe:
    """Stage 0, without the LLM: words and captions of the `warm_start` adapters, labels of the `emosllm` one."""

    enabled: bool = True
    tables: list[str] = field(
        default_factory=list, metadata={"help": "more clips with transcripts, for stage 0 alone"}
    )
    pieces: list[int] = field(
        default_factory=lambda: [2379, 9085], metadata={"help": "of the LLM's tokens; letters have none: []"}
    )
    lexicon: list[str] = field(
        default_factory=list,
        metadata={
            "help": "text files, whose words and pairs of words letters are spelled into, beside those of the clips"
        },
    )
    steps: list[int] = field(default_factory=lambda: [500, 1700])
    learning_rate: float = 1e-3
    frames_per_batch: int = 12_000
    sampled_pieces: int = field(
        default=0, metadata={"help": "pieces drawn for a sampled softmax beside those that are said; 0: all"}
    )
    linguistic_from: str | None = field(
        default=None, metadata={"help": "a checkpoint whose linguistic adapter stage 0 goes on from"}
    )
    caption_steps: int = 1_500
    caption_temperature: float = field(
        default=1.0,
        metadata={
            "help": "divides the logits of captions once they are learnt: the LLM learns to read softer mixtures"
        },
    )


@dataclass
class StageRecipe:
    """One stage through the LLM."""

    name: str = ""
    err_stage: str = field(default="joint", metadata={"help": "joint (1) | disentangle (2) | holistic (3)"})
    tasks: dict = field(
        default_factory=dict, metadata={"help": "task -> share among the tasks that a row has a target for"}
    )
    learning_rate: float = 5e-5
    paralinguistic_learning_rate: float | None = field(default=None, metadata={"help": "0 freezes the adapter"})
    linguistic_learning_rate: float | None = None
    epochs: float = 3.0
    max_steps: int = -1
    warmup_steps: int = 0
    lr_scheduler_type: str = "linear"
    objective: str = field(default="ce", metadata={"help": "ce (paper) | kl (to the frozen LLM) | ce+kl"})
    err: bool = True
    replaced_share: float = 0.25
    paralinguistic_source: str = field(default="speech", metadata={"help": "speech | none (ablation: words alone)"})
    linguistic_source: str = field(
        default="speech", metadata={"help": "speech | transcript (EmoSLLM) | none (ablation: voice alone)"}
    )
    facts: list[str] = field(
        default_factory=list, metadata={"help": "attributes that prompts of attribute tasks tell in words"}
    )
    repeat: dict = field(
        default_factory=dict, metadata={"help": "corpus -> how often each of its rows counts in an epoch (default 1)"}
    )
    balanced: bool = field(default=False, metadata={"help": "draw rows so that emotions are equally frequent"})
    lora_learning_rate: float | None = None
    residual_learning_rate: float | None = field(
        default=None, metadata={"help": "of what stands beside the soft tokens (*_soft_residual)"}
    )
    ctc_share: float = field(default=0.0, metadata={"help": "of the warm start's CTC loss that is kept"})
    caption_share: float = field(
        default=0.0, metadata={"help": "of the warm start's loss on captions (emosllm: labels) that is kept"}
    )
    best_by: str = field(
        default="loss", metadata={"help": "validation figure that chooses the checkpoint: loss, wer, accuracy_TASK"}
    )


@dataclass
class TrainRecipe:
    """What all stages share."""

    seed: int = 0
    batch_size: int = field(default=16, metadata={"help": "of all processes together"})
    gradient_accumulation_steps: int = 1
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    bf16: bool = False
    activation_checkpointing: bool = False
    shard_llm: bool = field(
        default=False, metadata={"help": "several processes share the frozen LLM's layers out among them (FSDP)"}
    )
    positional_randomness: bool = True
    eval_steps: int = field(default=100, metadata={"help": "between evaluations, each with a checkpoint"})
    logging_steps: int = 10
    dataloader_workers: int = 0
    report_to: list[str] = field(default_factory=list, metadata={"help": "tensorboard, trackio, wandb ..."})


@dataclass
class Recipe:
    """A whole run."""

    name: str
    model: ModelRecipe
    data: DataRecipe
    warm_start: WarmStartRecipe
    train: TrainRecipe
    stages: list[StageRecipe]

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


_SECTIONS = {"model": ModelRecipe, "data": DataRecipe, "warm_start": WarmStartRecipe, "train": TrainRecipe}


def _nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}."


def _parse(kind: type, values: dict, where: str):
    names = [f.name for f in fields(kind)]
    for name in values:
        if name not in names:
            raise ValueError(f"{where}: no key {name!r}{_nearest(name, names)}")
    for f in fields(kind):
        value = values.get(f.name)
        if (value is not None and f.type in (int, float, bool, dict)) or (f.type == list[str] and value is not None):
            wanted = {int: int, float: (int, float), bool: bool, dict: dict}.get(f.type, list)
            if not isinstance(value, wanted) or (f.type in (int, float) and isinstance(value, bool)):
                raise ValueError(f"{where}: {f.name} is {value!r}, a {type(value).__name__}; it must be {f.type}.")
    (parsed,) = HfArgumentParser(kind).parse_dict(values)
    return parsed


def load_recipe(name_or_file: str, settings: list[str] | None = None) -> Recipe:
    """A recipe of the package by name, or a YAML file, with `key=value` settings (`stages.0.learning_rate=1e-4`).

    Raises:
        FileNotFoundError: neither.
        ValueError: an unknown key (the nearest one is named), a value of another type, or keys that contradict.
    """
    path = Path(name_or_file)
    if not path.is_file():
        names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        if name_or_file not in names:
            raise FileNotFoundError(f"no recipe {name_or_file!r}{_nearest(name_or_file, names)}")
        path = RECIPES / f"{name_or_file}.yaml"
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    for setting in settings or []:
        _set(values, setting)
    names = ["name", *_SECTIONS, "stages"]
    for key in values:
        if key not in names:
            raise ValueError(f"{path}: no section {key!r}{_nearest(key, names)}")
    parsed = {key: _parse(kind, values.get(key) or {}, f"{path}, {key}") for key, kind in _SECTIONS.items()}
    stages = [_parse(StageRecipe, stage, f"{path}, stage {n}") for n, stage in enumerate(values.get("stages") or [])]
    recipe = Recipe(values.get("name") or path.stem, stages=stages, **parsed)
    _check(recipe, str(path))
    return recipe


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-5 for text; this one takes it for a number."""


_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def _set(values: dict, setting: str) -> None:
    keys, found, text = setting.partition("=")
    if not found:
        raise ValueError(f"--set {setting}: it is KEY=VALUE, for example train.batch_size=8.")
    *way, last = keys.split(".")
    place = values
    for depth, key in enumerate(way):
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise ValueError(f"--set {setting}: {key!r} is none of the {len(place)} stages (0, 1 ...).")
            place = place[int(key)]
        elif key in _SECTIONS or key in place or depth > 0:  # a wrong key below a section is found when it is parsed
            place = place.setdefault(key, {})
        else:
            raise ValueError(f"--set {setting}: no key {key!r}{_nearest(key, [*_SECTIONS, 'stages'])}")
    place[last] = yaml.load(text, Loader=_Loader)


def _check(recipe: Recipe, where: str) -> None:
    """Keys that contradict each other."""
    faults = []
    choices = {"adapters": (recipe.model.adapters, ("paper", "warm_start", "emosllm"))}
    for stage in recipe.stages:
        choices[f"stage {stage.name}: err_stage"] = (stage.err_stage, STAGES)
        choices[f"stage {stage.name}: objective"] = (stage.objective, ("ce", "kl", "ce+kl"))
        choices[f"stage {stage.name}: paralinguistic_source"] = (stage.paralinguistic_source, ("speech", "none"))
        sources = ("speech", "transcript", "none")
        choices[f"stage {stage.name}: linguistic_source"] = (stage.linguistic_source, sources)
        faults += [f"stage {stage.name}: no task {t!r}{_nearest(t, TASKS)}" for t in stage.tasks if t not in TASKS]
        if not stage.tasks:
            faults.append(f"stage {stage.name}: names no tasks ({', '.join(TASKS)})")
        if stage.ctc_share and recipe.model.adapters != "warm_start":
            faults.append(f"stage {stage.name}: ctc_share needs model.adapters: warm_start")
        if stage.caption_share and recipe.model.adapters == "paper":
            faults.append(f"stage {stage.name}: caption_share needs model.adapters: warm_start or emosllm")
        figures = ["loss"]
        for task in stage.tasks:
            figures += {"asr": ["wer"], "dialogue": []}.get(task, [f"accuracy_{task}"])
        choices[f"stage {stage.name}: best_by"] = (stage.best_by, figures)
        choices[f"stage {stage.name}: lr_scheduler_type"] = (
            stage.lr_scheduler_type,
            [kind.value for kind in SchedulerType],
        )
        faults += [
            f"stage {stage.name}: facts: no {f!r}{_nearest(f, ATTRIBUTES)}" for f in stage.facts if f not in ATTRIBUTES
        ]
        if recipe.model.adapters == "emosllm" and stage.linguistic_source == "speech":
            faults.append(f"stage {stage.name}: emosllm hears no words: linguistic_source is transcript or none")
    fields_ = [name for name in inspect.signature(DualSLMConfig.__init__).parameters if name not in ("self", "kwargs")]
    faults += [f"model.config: no {n!r}{_nearest(n, fields_)}" for n in recipe.model.config if n not in fields_]
    if recipe.data.validation_rows < 1:
        faults.append(f"data.validation_rows is {recipe.data.validation_rows}; validation needs one at least")
    for name, (value, known) in choices.items():
        if value not in known:
            faults.append(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    if recipe.warm_start.enabled and recipe.model.adapters == "paper":
        faults.append("warm_start.enabled needs other model.adapters than the paper's, which have no pieces to spell")
    if recipe.warm_start.caption_temperature <= 0:
        faults.append(f"warm_start.caption_temperature is {recipe.warm_start.caption_temperature}; it must be above 0")
    in_letters = recipe.model.config.get("linguistic_adapter_type") == "letters"
    if in_letters:
        if recipe.model.adapters != "warm_start":
            faults.append("linguistic_adapter_type: letters needs model.adapters: warm_start")
        if recipe.warm_start.pieces or len(recipe.warm_start.steps) != 1:
            faults.append(
                "linguistic_adapter_type: letters has one number of warm_start.steps and no warm_start.pieces"
            )
        if any(stage.ctc_share for stage in recipe.stages):
            faults.append("linguistic_adapter_type: letters learns in stage 0 alone, without ctc_share")
    elif recipe.warm_start.pieces and len(recipe.warm_start.pieces) != len(recipe.warm_start.steps):
        faults.append("warm_start.pieces and warm_start.steps are not equally long")
    elif not recipe.warm_start.pieces and recipe.model.start_from is None and recipe.model.adapters == "warm_start":
        faults.append("warm_start.pieces is empty, and only linguistic_adapter_type: letters has none")
    if len({stage.name for stage in recipe.stages}) < len(recipe.stages) or not all(s.name for s in recipe.stages):
        faults.append("every stage needs a name of its own")
    if recipe.train.shard_llm and (recipe.model.load_in_4bit or recipe.model.adapters == "emosllm"):
        faults.append("train.shard_llm is for an LLM without LoRA in 16 or 32 bits, not for emosllm or load_in_4bit")
    if not recipe.data.tables and recipe.data.synthesise_hours <= 0:
        faults.append("data.tables is empty; name tables of `dual-slm corpus`, or set data.synthesise_hours")
    unknown = set(recipe.data.synthesise_engines) - {voice.engine for voice in VOICES}
    if unknown:
        faults.append(f"data.synthesise_engines: no engine {', '.join(sorted(unknown))}")
    if faults:
        raise ValueError(f"{where}: " + "; ".join(faults) + ".")
