"""Recipes: YAML files -> dataclasses. Unknown keys and wrong values are refused by name."""

# ruff: noqa: RUF009 (`option` returns a dataclass field)
import difflib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import SchedulerType, Seq2SeqTrainingArguments

from ..configuration_dual_slm import FIELDS
from .corpora.row import Row
from .corpora.voices import ENGINES, VOICES
from .err import SourceRules
from .files import RECIPES
from .labels import ATTRIBUTES, TASKS


def option(default: Any, help: str) -> Any:
    """A key of a recipe, with its default or the function that makes it. `reference` writes `help` into the README."""
    if callable(default):
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class ModelRecipe:
    """Backbones and adapters."""

    audio_model_id: str = option("whisper-base", "speech encoder: Hub id, folder, or a name of `dual-slm backbones`")
    text_model_id: str = option("smollm2-135m-instruct", "LLM, named likewise")
    adapters: Literal["paper", "warm_start", "emosllm"] = option(
        "warm_start", "paper | warm_start (captions in the LLM's tokens, character CTC) | emosllm"
    )
    config: dict = option(dict, "fields of DualSLMConfig")
    dtype: str = option("auto", "of the backbones: auto, float32, bfloat16")
    load_in_4bit: bool = option(False, "load the LLM in 4 bits by bitsandbytes")
    start_from: str | None = option(None, "a checkpoint that training continues, with stage 0 if that is enabled")


@dataclass
class DataRecipe:
    """Tables of `dual-slm corpus`. Without any, a small corpus is synthesised into the run's folder."""

    tables: list[str] = option(list, "files of `dual-slm corpus` to train and validate on")
    augment: dict = option(dict, "corpus -> augmented copies of each training clip")
    revoice: dict = option(dict, "corpus -> augmented copies in other voices of each training clip")
    synthesise_hours: float = option(0.0, "hours of speech that are synthesised besides the tables")
    synthesise_engines: list[str] = option(lambda: list(ENGINES), "text-to-speech engines that speak them")
    align_responses: bool = option(
        True,
        "let the frozen LLM answer the rows of corpora with the dialogue task, in place of the corpus's own answers",
    )
    cut_histories: bool = option(
        False, "add to each training row of these corpora that has a history a copy with a shorter one (section IV-A)"
    )
    alignment: dict = option(dict, "fields of AlignmentConfig")
    histories: list[str] = option(list, "tables whose text dialogues become the history of rows without one")
    validation_rows: int = option(64, "rows that a validation reads")
    read_aloud: int = option(2, "validation replies that are printed at each evaluation")
    feature_bits: int = option(16, "of a number in the feature cache: 16 or 8")
    skip_damaged: bool = option(False, "leave out rows whose audio cannot be read, by name")

    def copies(self, row: Row) -> int:
        """Augmented copies of a row."""
        return sum(copies.get(row.corpus, 0) for copies in (self.augment, self.revoice) if row.split == "train")


@dataclass
class WarmStartRecipe:
    """Stage 0, without the LLM: words and captions of the `warm_start` adapters, labels of the `emosllm` one."""

    enabled: bool = option(True, "run stage 0")
    tables: list[str] = option(list, "more clips with transcripts, for stage 0 alone")
    lexicon: list[str] = option(list, "text files whose words and bigrams extend the decoding lexicon")
    steps: int = option(2000, "of character CTC")
    learning_rate: float = option(1e-3, "of character CTC (emosllm: of labels) at its highest")
    frames_per_batch: int = option(12_000, "encoder frames of a batch of character CTC, with padding")
    linguistic_from: str | None = option(None, "a checkpoint whose linguistic adapter stage 0 continues to train")
    caption_steps: int = option(1_500, "of captions (emosllm: of labels)")
    caption_temperature: float = option(1.0, "divides caption logits after stage 0: the LLM reads softer mixtures")


@dataclass
class StageRecipe:
    """One stage through the LLM."""

    name: str = option("", "of the stage and its folder; each stage has its own")
    err_stage: Literal["joint", "disentangle", "holistic"] = option("joint", "stage 1, 2 or 3 of ERR")
    tasks: dict = option(
        dict,
        "task -> share among the tasks that a row has a target for, one of which it draws in each epoch. Or corpus -> task "
        "-> exposures: how often an epoch asks each row (0.1: a tenth of the rows, others in the next epoch)",
    )
    learning_rate: float = option(5e-5, "of what has no rate of its own below")
    paralinguistic_learning_rate: float | None = option(None, "0 freezes the adapter")
    linguistic_learning_rate: float | None = option(None, "of the paper's adapter; character CTC learns in stage 0")
    epochs: float = option(3.0, "passes through the rows, or through their exposures")
    max_steps: int = option(-1, "if positive, steps of the stage in place of `epochs`")
    warmup_steps: int = option(0, "steps in which the rates rise from 0")
    lr_scheduler_type: str = option("linear", "a schedule of transformers: linear, cosine, constant ...")
    objective: Literal["ce", "kl", "ce+kl"] = option("ce", "ce (paper) | kl (to the frozen LLM) | ce+kl")
    err: bool = option(True, "apply ERR; without it both branches come from speech (ablation)")
    replaced_share: float = option(0.25, "share of a holistic stage's dual samples in which text replaces one branch")
    paralinguistic_source: Literal["speech", "none"] = option("speech", "speech | none (ablation: words alone)")
    linguistic_source: Literal["speech", "transcript", "none"] = option(
        "speech", "speech | transcript (EmoSLLM) | none (ablation: voice alone)"
    )
    facts: list[str] = option(list, "attributes that prompts of attribute tasks tell in words")
    repeat: dict = option(dict, "corpus -> how often each of its rows counts in an epoch (default 1)")
    balanced: bool = option(False, "repeat rows so that emotions are equally frequent")
    lora_learning_rate: float | None = option(None, "of the LLM's LoRA")
    residual_learning_rate: float | None = option(None, "of the vectors that paralinguistic_soft_residual adds")
    caption_share: float = option(0.0, "weight of stage 0's loss on captions (emosllm: labels) in this stage")
    best_by: str = option("loss", "validation figure that chooses the checkpoint: loss, wer, accuracy_TASK")

    @property
    def by_corpus(self) -> bool:
        """Whether `tasks` gives exposures for each corpus."""
        return any(isinstance(value, dict) for value in self.tasks.values())

    @property
    def task_names(self) -> list[str]:
        """The tasks of all corpora."""
        names = [task for tasks in self.tasks.values() for task in tasks] if self.by_corpus else self.tasks
        return list(dict.fromkeys(names))

    def share(self, corpus: str, task: str) -> float:
        """Share or exposures of a task for rows of a corpus; 0 where the stage does not ask for it."""
        return (self.tasks.get(corpus, {}) if self.by_corpus else self.tasks).get(task, 0)

    @property
    def source_rules(self) -> SourceRules:
        """How the sources of both branches are drawn."""
        return SourceRules(**{f.name: getattr(self, f.name) for f in fields(SourceRules)})


@dataclass
class TrainRecipe(Seq2SeqTrainingArguments):
    """What all stages share: any argument of transformers' `Seq2SeqTrainingArguments`, and some of our own."""

    seed: int = option(0, "of every draw")
    batch_size: int = option(16, "of all processes together")
    weight_decay: float = option(0.05, "of matrices; norms, biases and vectors have none")
    activation_checkpointing: bool | None = option(False, "compute the LLM's activations twice to save memory")
    shard_llm: bool = option(False, "share the frozen LLM's layers among the processes (FSDP)")
    positional_randomness: bool = option(True, "vary history, wording and place of the instruction (section III-C)")
    eval_steps: float | None = option(100, "between evaluations, each with a checkpoint")
    logging_steps: float = option(10, "between lines of the log")
    save_total_limit: int | None = option(2, "checkpoints of a stage that are kept")
    logging_nan_inf_filter: bool = option(False, "leave losses that are not finite out of the log")
    disable_tqdm: bool | None = option(False, "show no progress bars")

    def __post_init__(self):
        """Keeps the values as given. `arguments` derives the others, and only then a device is initialised."""

    def given(self) -> dict[str, Any]:
        """Our own fields, and those of transformers that differ from their default."""
        own, default = list(TrainRecipe.__annotations__), TrainRecipe()
        others = sorted(f.name for f in fields(self) if getattr(self, f.name) != getattr(default, f.name))
        return {name: getattr(self, name) for name in dict.fromkeys(own + others)}

    def arguments(
        self,
        output_dir: str | Path,
        stage: StageRecipe,
        num_processes: int = 1,
        *,
        project: str = "dual-slm",
        eval_batch_size: int | None = None,
        generation_max_length: int | None = None,
        eval_on_start: bool = True,
    ) -> Seq2SeqTrainingArguments:
        """The arguments of one stage.

        Args:
            num_processes: share `batch_size` among them.
            eval_batch_size: of all processes together. Default: `batch_size`.
            generation_max_length: new tokens of a validation reply.
            eval_on_start: log where the stage began; not when it is resumed.
        """
        inherited = {f.name for f in fields(Seq2SeqTrainingArguments)}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name in inherited}
        # transformers before 5.23 knows the old name alone.
        name = "activation_checkpointing" if "activation_checkpointing" in inherited else "gradient_checkpointing"
        values[name] = bool(values.pop("gradient_checkpointing", None) or self.activation_checkpointing)
        values |= {
            "output_dir": str(output_dir),
            "per_device_train_batch_size": self.batch_size // num_processes,
            "per_device_eval_batch_size": eval_batch_size or self.batch_size,
            "metric_for_best_model": f"eval_{stage.best_by}",
            "greater_is_better": stage.best_by.startswith("accuracy"),
            "save_steps": self.eval_steps,  # the checkpoint that validation chooses has to be there
            "data_seed": self.seed,
            "generation_max_length": generation_max_length,
            "eval_on_start": eval_on_start,
            "project": project,
            "run_name": f"{project}/{stage.name}",
            "use_cpu": self.use_cpu or not torch.cuda.is_available(),
            "num_train_epochs": stage.epochs,
            **{name: getattr(stage, name) for name in _OF_STAGES},
            **_FIXED,
        }
        arguments = Seq2SeqTrainingArguments(**values)
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # several GPUs need `accelerate launch`: one process would use `DataParallel`
        return arguments


# Arguments of transformers that each stage sets, besides its epochs.
_OF_STAGES = ("learning_rate", "warmup_steps", "lr_scheduler_type", "max_steps")
# The trainer works with these values alone.
_FIXED: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
_FIXED |= {"predict_with_generate": True, "remove_unused_columns": False, "ddp_find_unused_parameters": False}
_FIXED |= {"label_names": ["labels"], "accelerator_config": {"split_batches": True, "dispatch_batches": False}}
# Arguments of transformers that are no keys of a recipe.
_RESERVED = {*_OF_STAGES, *_FIXED, "num_train_epochs", "output_dir", "data_seed", "save_steps", "project", "run_name"}
_RESERVED |= {"per_device_train_batch_size", "per_device_eval_batch_size", "generation_max_length", "eval_on_start"}
_RESERVED |= {"metric_for_best_model", "greater_is_better"}


@dataclass
class Recipe:
    """A whole run."""

    name: str
    model: ModelRecipe
    data: DataRecipe
    warm_start: WarmStartRecipe
    train: TrainRecipe
    stages: list[StageRecipe]

    @property
    def stage_0(self) -> WarmStartRecipe:
        """`warm_start` if it is enabled, else one without tables and texts."""
        return self.warm_start if self.warm_start.enabled else WarmStartRecipe()

    def learns_dialogues(self, corpus: str) -> bool:
        """Whether a stage asks rows of this corpus for dialogues."""
        return any(stage.share(corpus, "dialogue") > 0 for stage in self.stages)

    def to_yaml(self) -> str:
        """The same text on every machine, by which a run that is resumed knows its recipe."""
        values = asdict(self) | {"train": self.train.given()}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


_SECTIONS = {"model": ModelRecipe, "data": DataRecipe, "warm_start": WarmStartRecipe, "train": TrainRecipe}
# Keys of version 0.1.0, most of them for CTC over the LLM's own tokens.
_RETIRED = ("pieces", "sampled_pieces", "ctc_share")
_RETIRED_CONFIG = ("linguistic_ctc_vocab_size", "linguistic_soft_residual", "lora_only_with_audio")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as text; this one reads it as a number."""


_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def load_recipe(name_or_file: str, settings: list[str] | None = None) -> Recipe:
    """A recipe of the package by name, or a YAML file, with `key=value` settings (`stages.0.learning_rate=1e-4`).

    Raises:
        FileNotFoundError: neither.
        ValueError: an unknown key (the nearest one is named), a value of another type, or keys that contradict.
    """
    path, recipes = Path(name_or_file), {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    if not path.is_file() and name_or_file not in recipes:
        raise FileNotFoundError(f"no recipe {name_or_file!r}{_nearest(name_or_file, recipes)}")
    path = path if path.is_file() else recipes[name_or_file]
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
    faults = _faults(recipe)
    if faults:
        raise ValueError(f"{path}: " + "; ".join(faults) + ".")
    return recipe


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
        elif key in _SECTIONS or key in place or depth > 0:  # a wrong key in a section is found when it is parsed
            place = place.setdefault(key, {})
        else:
            raise ValueError(f"--set {setting}: no key {key!r}{_nearest(key, [*_SECTIONS, 'stages'])}")
    place[last] = yaml.load(text, Loader=_Loader)


def _nearest(name: str, names: Iterable[str], rest: str = "") -> str:
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {rest or ', '.join(names)}."


def _parse(kind: type[Any], values: dict[str, Any], where: str) -> Any:
    """One section of a recipe; `where` names the file and the section in errors."""
    types, reserved = get_type_hints(kind), _RESERVED if kind is TrainRecipe else set()
    known = [f.name for f in fields(kind) if f.init and f.name not in reserved]
    own = ", ".join(name for name in known if name in kind.__annotations__)
    rest = f"{own}, and arguments of transformers.Seq2SeqTrainingArguments" if kind is TrainRecipe else own
    _refuse_retired(values, where)
    for name, value in values.items():
        if name in reserved:
            raise ValueError(f"{where}: {name} is no key of this section: each stage or the run itself sets it.")
        if name not in known:
            raise ValueError(f"{where}: no key {name!r}{_nearest(name, known, rest)}")
        wanted = types[name]
        if get_origin(wanted) is Literal and value not in get_args(wanted):
            raise ValueError(f"{where}: {name} is {value!r}; it must be one of {', '.join(get_args(wanted))}.")
        if not _fits(value, wanted):
            wanted = wanted.__name__ if isinstance(wanted, type) and not get_args(wanted) else wanted
            raise ValueError(f"{where}: {name} is {value!r}, a {type(value).__name__}; it must be {wanted}.")
    return kind(**values)


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value of YAML is one of an annotation."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if wanted in (int, float):
        return isinstance(value, (int, wanted)) and not isinstance(value, bool)
    wanted = origin if isinstance(origin, type) else wanted
    return isinstance(value, wanted) if isinstance(wanted, type) else True


def _refuse_retired(values: dict[str, Any], where: str) -> None:
    """Refuses what version 0.1.0 knew and this one does not."""
    retired, config = {name: values[name] for name in _RETIRED if name in values}, values.get("config")
    if isinstance(config, dict):
        retired |= {f"config.{name}": config[name] for name in _RETIRED_CONFIG if name in config}
    if isinstance(values.get("steps"), list):
        retired["steps"] = values["steps"]
    if retired:
        told = ", ".join(f"{name} is {value!r}" for name, value in retired.items())
        raise ValueError(
            f"{where}: {told}. Version 0.1.0 was the last to run this: use dual-slm 0.1.0, or leave these keys out and give "
            "warm_start.steps as one number."
        )


def _mapping_fault(stage: StageRecipe) -> str | None:
    """What is wrong with the form of `tasks`: numbers by task, or by corpus and task."""
    by_corpus, tasks = stage.by_corpus, stage.tasks
    if by_corpus and (bare := [name for name, value in tasks.items() if not isinstance(value, dict)]):
        return (
            f"tasks gives {', '.join(bare)} no corpus, and others one: write CORPUS: {{TASK: EXPOSURES}} for all of them, "
            "or TASK: SHARE for all"
        )
    pairs = [((c, t), n) for c, part in tasks.items() for t, n in part.items()] if by_corpus else tasks.items()
    for key, number in pairs:
        known = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not known or number < 0 or (by_corpus and not 0 < number < float("inf")):
            name = ".".join(key) if isinstance(key, tuple) else key
            return f"tasks.{name} is {number!r}; it must be a number above 0: leave out what is not to be trained"
    for name in ("repeat", "balanced"):
        if by_corpus and getattr(stage, name):
            return (
                f"{name} is {getattr(stage, name)!r} beside tasks by corpus: their exposures say how often rows count"
            )
    return None


def _faults(recipe: Recipe) -> list[str]:
    """Names that nothing has, and keys that contradict each other. DualSLMConfig refuses what a model forbids."""
    model, data, train, warm_start = recipe.model, recipe.data, recipe.train, recipe.warm_start
    schedules, engines = [kind.value for kind in SchedulerType], sorted({voice.engine for voice in VOICES})
    named = [("model.config: no", name, [*FIELDS, "initializer_range"]) for name in model.config]
    named += [("data.synthesise_engines: no engine", name, engines) for name in data.synthesise_engines]
    faults = []
    for stage in recipe.stages:
        where = f"stage {stage.name}:"
        if told := _mapping_fault(stage):
            return [f"{where} {told}"]
        named += [(f"{where} no task", task, TASKS) for task in stage.task_names]
        named += [(f"{where} facts: no", fact, ATTRIBUTES) for fact in stage.facts]
        figures = ["wer" if task == "asr" else f"accuracy_{task}" for task in stage.task_names if task != "dialogue"]
        for key, known in (("best_by", ["loss", *figures]), ("lr_scheduler_type", schedules)):
            value = getattr(stage, key)
            if value not in known:
                faults.append(f"{where} {key} is {value!r}; it must be one of {', '.join(known)}")
        if not stage.task_names:
            faults.append(f"{where} names no tasks ({', '.join(TASKS)})")
        if stage.caption_share and model.adapters == "paper":
            faults.append(f"{where} caption_share needs model.adapters: warm_start or emosllm")
        if model.adapters == "emosllm" and stage.linguistic_source == "speech":
            faults.append(f"{where} emosllm hears no words: linguistic_source is transcript or none")
    if len({stage.name for stage in recipe.stages} - {""}) < len(recipe.stages):
        faults.append("every stage needs a name of its own")
    if data.validation_rows < 1:
        faults.append(f"data.validation_rows is {data.validation_rows}; validation needs one at least")
    if not data.tables and data.synthesise_hours <= 0:
        faults.append("data.tables is empty; name tables of `dual-slm corpus`, or set data.synthesise_hours")
    if warm_start.enabled and model.adapters == "paper":
        faults.append("warm_start.enabled needs other model.adapters than paper, which learn through the LLM alone")
    if warm_start.caption_temperature <= 0:
        faults.append(f"warm_start.caption_temperature is {warm_start.caption_temperature}; it must be above 0")
    if model.config.get("linguistic_adapter_type") == "letters" and model.adapters != "warm_start":
        faults.append("linguistic_adapter_type: letters needs model.adapters: warm_start, whose stage 0 teaches it")
    if train.shard_llm and (model.load_in_4bit or model.adapters == "emosllm"):
        faults.append("train.shard_llm is for an LLM without LoRA in 16 or 32 bits, not for emosllm or load_in_4bit")
    return [f"{told} {name!r}{_nearest(name, known)}" for told, name, known in named if name not in known] + faults
