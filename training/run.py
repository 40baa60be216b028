"""A recipe -> features -> warm start -> stages -> checkpoint. A run that was killed goes on to the same result.

RUN/recipe.yaml  environment.json        how it was made
RUN/corpus/  features/  responses.parquet  the data, made once
RUN/stage-0/  stage-1-NAME/ ...          each with its log, curves and a finished checkpoint in final/
RUN/final/                               the checkpoint: `from_pretrained` it
"""

import collections
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoTokenizer, Seq2SeqTrainingArguments, TrainerCallback

from .. import DualSLMForConditionalGeneration, DualSLMProcessor
from ..configuration_dual_slm import ALPHABET, EMOSLLM_ADAPTERS, LETTER_ADAPTER, WARM_START_ADAPTERS, DualSLMConfig
from ..modeling_dual_slm import LetterAdapter, SoftResidual, resolve_backbone
from ..processing_dual_slm import CaptionSlots
from .alignment import Aligner, AlignmentConfig, align_rows, score_targets
from .attributes import Thresholds, label_row, measure_rows, tertiles, write_thresholds
from .backbones import BACKBONES, fast_dtype, fetch_backbone
from .collator import DualSLMCollator, Item, TrainingCollator
from .corpora.folder import read
from .corpora.schema import Report, check_rows, read_table, share, write_table
from .corpora.synthesis import build, read_texts
from .evaluation.metrics import score
from .features import FRAMES_PER_SECOND, FeatureStore, augmented
from .journal import Journal, write_json, write_text
from .prompts import PROMPTS
from .recipe import DataRecipe, ModelRecipe, Recipe, StageRecipe
from .tasks import ATTRIBUTES, TASKS, label_sets, lend_histories, tasks_of
from .trainer import (
    DualSLMTrainer,
    StageDataset,
    activation_bytes,
    checkpoint_activations,
    eager_fits,
    last_checkpoint,
    positions_floor,
    shard_llm,
    with_stage_sources,
)
from .warm_start import (
    Letters,
    Speller,
    caption_targets,
    lexicon_rows,
    normalize,
    read_labels,
    spelled_out,
    train_linguistic,
    train_paralinguistic,
    train_queries,
)

CAPTION_TEMPLATE = "({gender} voice, {pitch} pitch, {tempo} tempo, {energy} energy, {emotion} emotion)"
ATTRIBUTE_LABELS = {
    "gender": ["female", "male"],
    "pitch": ["low", "normal", "high"],
    "tempo": ["slow", "normal", "fast"],
    "energy": ["low", "normal", "high"],
    "emotion": ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"],
}


# --------------------------------------------------------------------------------------------------------------------
# Model and data
# --------------------------------------------------------------------------------------------------------------------


def adapter_defaults(about: ModelRecipe) -> dict:
    """Fields of the config that `adapters` stands for."""
    kinds = {"warm_start": WARM_START_ADAPTERS, "emosllm": EMOSLLM_ADAPTERS}
    in_letters = about.config.get("linguistic_adapter_type") == "letters"
    return kinds.get(about.adapters, {}) | (LETTER_ADAPTER if in_letters else {})


def make_model(recipe: Recipe) -> tuple[DualSLMForConditionalGeneration, DualSLMProcessor]:
    """New adapters between the recipe's backbones, or those of the checkpoint it starts from."""
    about, options = recipe.model, {"dtype": None if recipe.model.dtype == "auto" else recipe.model.dtype}
    if about.load_in_4bit:
        from transformers import BitsAndBytesConfig

        kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": options["dtype"] or "float32"}  # as in QLoRA
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **kind)
    if about.start_from:
        processor = DualSLMProcessor.from_pretrained(about.start_from)
        added = {"paralinguistic_soft_residual", "linguistic_soft_residual"}  # start at zero: nothing changes
        anew = {name for name in about.config if name.startswith("linguistic_")} - added
        anew = anew if about.config.get("linguistic_adapter_type") == "letters" else set()
        if set(about.config) - added - anew:
            raise ValueError(
                "model.start_from: the checkpoint has a config of its own; model.config may add "
                f"{', '.join(sorted(added))}, or give it a linguistic_adapter_type: letters, which begins anew."
            )
        model = DualSLMForConditionalGeneration.from_pretrained(about.start_from, **options)
        if anew:
            fits = processor.caption_slots is not None and "Ġ" in processor.tokenizer.get_vocab()
            if not fits or model.config.linguistic_adapter_type == "letters":
                raise ValueError(
                    "model.start_from: a checkpoint of the warm start that has no letters yet can be given letters, and "
                    f"{about.start_from} is none."
                )
            fields = LETTER_ADAPTER | {"linguistic_soft_residual": False} | {name: about.config[name] for name in anew}
            model.config = DualSLMConfig.from_dict(model.config.to_dict() | fields)
            torch.manual_seed(recipe.train.seed)
            model.linguistic_adapter = LetterAdapter(model.config).apply(model._init_weights)
            processor.linguistic_adapter_type = model.config.linguistic_adapter_type
            processor.linguistic_downsample_rate = model.config.linguistic_downsample_rate
        for name in (name for name in added if about.config.get(name) and not getattr(model.config, name)):
            adapter = getattr(model, name.replace("_soft_residual", "_adapter"))
            width = model.config.text_config.hidden_size
            adapter.residual = SoftResidual(
                adapter.output.in_features if adapter is model.paralinguistic_adapter else width, width
            )
            setattr(model.config, name, True)
        _keep_gradients(model)
        return model, processor
    for name in (about.audio_model_id, about.text_model_id):
        if name in BACKBONES:
            fetch_backbone(name)
    tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(about.text_model_id))
    config, slots = adapter_defaults(about), None
    asked = about.adapters == "emosllm"
    labels = about.config.get(
        "attribute_labels", {"emotion": ATTRIBUTE_LABELS["emotion"]} if asked else ATTRIBUTE_LABELS
    )
    template = about.config.get("caption_template", CAPTION_TEMPLATE if about.adapters == "warm_start" else None)
    if template is not None:
        if "Ġ" not in tokenizer.get_vocab():
            raise ValueError(
                "model.adapters: warm_start, and a caption_template, spell words with the tokens of a byte-level tokenizer, "
                f"and that of {about.text_model_id} is none; take model.adapters: paper, or emosllm without a template."
            )
        slots = CaptionSlots(tokenizer, template, labels)
        config |= {
            "num_paralinguistic_tokens": slots.num_slots,
            "paralinguistic_soft_vocab_size": len(slots.token_ids),
            "caption_template": template,
            "attribute_labels": labels,
        }
    if about.adapters == "warm_start":
        config["linguistic_ctc_vocab_size"] = (recipe.warm_start.pieces or [0])[-1]
    if asked:
        wording = PROMPTS["attributes"]
        config |= {
            "attribute_labels": labels,
            "attribute_questions": {
                name: {"instruction": wording[name]["instructions"][0], "answer": wording[name]["answers"][0]}
                for name in labels
            },
            "prompt_facts": recipe.stages[-1].facts,
        }
    torch.manual_seed(recipe.train.seed)
    model = DualSLMForConditionalGeneration.from_backbones(
        about.audio_model_id, about.text_model_id, **options, **(config | about.config)
    )
    extractor = AutoFeatureExtractor.from_pretrained(resolve_backbone(about.audio_model_id))
    processor = DualSLMProcessor.from_config(model.config, extractor, tokenizer)
    if slots is not None:
        model.paralinguistic_adapter.soft_tokens.token_ids = torch.tensor(slots.token_ids)
    _keep_gradients(model)
    return model, processor


def _keep_gradients(model: DualSLMForConditionalGeneration) -> None:
    """bitsandbytes repacks 4-bit weights in the first pass without gradients on some CPUs (AVX512-BF16), for a kernel that
    has no gradient of its own: behind the first evaluation the adapters would be taught a wrong one."""
    for module in model.language_model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@dataclass
class Data:
    """Rows with audio, by split, and what was found on the way."""

    train: list[dict]
    validation: list[dict]
    fingerprint: str
    words: list[dict] = field(default_factory=list)  # more to hear words in, for stage 0 alone
    lines: list[str] = field(default_factory=list)  # texts whose words the lexicon has


def load_data(recipe: Recipe, folder: Path, config, device: torch.device | str = "cpu") -> Data:
    """The recipe's tables, or a small corpus that is synthesised and labelled; responses by the frozen LLM if asked for.

    Args:
        config: of the model: its LLM answers, its `attribute_thresholds` label augmented copies.
        device: where the LLM answers.
    """
    about, tables = recipe.data, [Path(table) for table in recipe.data.tables]
    if about.synthesise_hours > 0:
        tables.append(_synthesised(recipe, folder))
    used = (row for row in read_table(*tables) if row["split"] in ("train", "validation"))
    rows = _with_audio(used, about)
    starts = recipe.warm_start.enabled and recipe.warm_start.tables
    words = (row for row in read_table(*recipe.warm_start.tables) if row["split"] == "train") if starts else ()
    words = _with_audio(words, about)
    files = recipe.warm_start.lexicon if recipe.warm_start.enabled else []
    lines = [line for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    kept = {row["split"] for row in rows}
    if kept != {"train", "validation"}:
        raise ValueError(
            f"the tables have rows of {' and '.join(sorted(kept)) or 'no split'}, and training needs train and validation: "
            "give each row its `split` in the metadata."
        )
    for name, labels in (config.attribute_labels or {}).items():
        if other := {row[name] for row in rows} - {None, *labels}:
            print(
                f"the voice will not be taught the {name} {', '.join(sorted(other))}: model.config.attribute_labels has "
                f"{', '.join(labels)}",
                flush=True,
            )
    if about.histories:
        rows = list(lend_histories(rows, read_table(*about.histories), recipe.train.seed))
    wanted = any(stage.tasks.get("dialogue") for stage in recipe.stages)
    open_rows = [row for row in rows if row["response_complete"] is None and row["transcript"]]
    if wanted and about.align_responses and open_rows:
        path = folder / "responses.parquet"
        if not path.is_file():
            alignment = AlignmentConfig(**{"seed": recipe.train.seed, **about.alignment})
            aligner = Aligner(config.text_model_id, alignment, recipe.model.dtype, device)
            report = Report()
            write_table(align_rows(open_rows, aligner, Journal(folder / "replies.jsonl"), report), path)
            print(report, flush=True)
        answers = {
            (row["corpus"], row["id"]): {name: row[name] for name in ("system", "response", "response_complete")}
            for row in read_table(path)
        }
        rows = [row | answers.get((row["corpus"], row["id"]), {}) for row in rows]
    digest = hashlib.sha256()
    for row in rows + words:
        labels = [row[name] for name in ATTRIBUTES]
        digest.update(f"{row['id']}\t{row['split']}\t{row['transcript']}\t{row['response']}\t{labels}\n".encode())
    digest.update("\n".join(lines).encode())
    split = {name: [row for row in rows if row["split"] == name] for name in ("train", "validation")}
    named = {*about.augment, *about.revoice, *(corpus for stage in recipe.stages for corpus in stage.repeat)}
    if unknown := sorted(named - {row["corpus"] for row in split["train"]}):
        print(
            f"no training row is of a corpus that augment, revoice or repeat names: {', '.join(unknown)}", flush=True
        )
    thresholds = config.attribute_thresholds
    train, borders = list(split["train"]), Thresholds(**thresholds) if thresholds else None
    for row in split["train"]:
        plain = about.augment.get(row["corpus"], 0)
        train += [augmented(row, n, borders, revoice=n > plain) for n in range(1, about.copies(row) + 1)]
    return Data(train, split["validation"], digest.hexdigest(), words, lines)


def _with_audio(rows: Iterable[dict], about: DataRecipe) -> list[dict]:
    """The rows whose audio is there."""
    rows = list(rows)
    silent = [row["id"] for row in rows if row["audio"] is None]
    if silent:
        print(f"{len(silent):,} rows have no audio and are left out, the first is {silent[0]}", flush=True)
    gone = [row for row in rows if row["audio"] is not None and not Path(row["audio"]).is_file()]
    if gone and not about.skip_damaged:
        first = gone[0]
        raise FileNotFoundError(
            f"{len(gone):,} audio files are gone since the tables were made, the first is {first['audio']} of the row "
            f"{first['id']}. Restore them, or set data.skip_damaged to leave such rows out."
        )
    for row in gone:
        print(f"left out, its audio is gone: {row['id']} ({row['audio']})", flush=True)
    lost = {(row["corpus"], row["id"]) for row in gone}
    return [row for row in rows if row["audio"] is not None and (row["corpus"], row["id"]) not in lost]


def _synthesised(recipe: Recipe, folder: Path) -> Path:
    table = folder / "corpus.parquet"
    if not table.is_file():
        corpus = folder / "corpus"
        engines = tuple(recipe.data.synthesise_engines)
        if not (corpus / "metadata.jsonl").is_file():
            build(read_texts(None), corpus, recipe.data.synthesise_hours, recipe.train.seed, engines=engines)
        report = Report()
        rows = list(check_rows(read(corpus, report), report))
        if len({row["split"] for row in rows}) < 3:  # too few voices for splits by voice: by voice and vocal tract
            tenths = ("train",) * 8 + ("validation", "test")
            for row in rows:
                row["split"] = tenths[int(hashlib.sha256(row["speaker"].encode()).hexdigest(), 16) % 10]
        journal = Journal(folder / "measured.jsonl")
        rows = list(measure_rows(rows, journal, report))
        thresholds = tertiles(rows)
        write_thresholds(thresholds, folder / "thresholds.json")
        write_table((label_row(row, {"all": thresholds["all"]}, recipe.train.seed) for row in rows), table)
        if report:
            print(report, flush=True)
    return table


def word_counts(texts: Iterable[str], alphabet: str = ALPHABET) -> collections.Counter:
    """How often each word is said: what the pieces are chosen by, and how likely a word is to letters."""
    return collections.Counter(word for text in texts for word in normalize(text, alphabet))


def pair_counts(texts: Iterable[str], alphabet: str = ALPHABET) -> collections.Counter:
    """How often each word is said right after another."""
    return collections.Counter(pair for text in texts for pair in itertools.pairwise(normalize(text, alphabet)))


# --------------------------------------------------------------------------------------------------------------------
# Stage 0
# --------------------------------------------------------------------------------------------------------------------


def word_errors(model, store: FeatureStore, rows: list[dict], processor: DualSLMProcessor) -> float:
    """WER of `heard` on cached clips, over bare lower-case words: the quick figure that training is watched by."""
    import jiwer

    said, heard = [], []
    adapter, embedding = model.linguistic_adapter, model.get_input_embeddings()
    alphabet = model.config.linguistic_letters
    with torch.inference_mode():
        for row in rows:
            frames = store.get(row)[None].to(model.device)
            _, _, ids, _ = adapter(frames, torch.tensor([frames.shape[1]], device=model.device), embedding)
            said.append(" ".join(normalize(row["transcript"], alphabet)))
            heard.append(" ".join(normalize(processor.decode(ids), alphabet)))
    return jiwer.wer(said, heard)


def slot_accuracy(model, store: FeatureStore, rows: list[dict], processor: DualSLMProcessor) -> dict[str, float]:
    """Accuracy of each attribute's first slot on cached clips: the quick figure that training is watched by."""
    pooled, targets = torch.stack([store.get(row, "pooled") for row in rows]), caption_targets(rows, processor)
    with torch.inference_mode():
        adapter = model.paralinguistic_adapter
        pieces = adapter.soft_tokens.rows(model.get_input_embeddings())
        best = adapter.soft_tokens.logits(adapter.project(pooled.to(pieces.device)), pieces).argmax(-1).cpu()
    figures = {}
    for name, place in processor.caption_slots.fields.items():
        known = targets[:, place.start] != -100
        if known.any():
            figures[name] = round((best[known, place.start] == targets[known, place.start]).float().mean().item(), 4)
    return figures


def own_clips(rows: list[dict]) -> list[dict]:
    """What there is to hear: rows whose words are those of their clip, each clip (and augmented copy) once."""
    return list({(r["audio"], r.get("augment")): r for r in reversed(rows) if not r["voice_only"]}.values())[::-1]


def take_linguistic(model, checkpoint: Path) -> None:
    """The linguistic adapter of a checkpoint with the same encoder and LLM; what has no counterpart there stays as it is.
    One that writes letters knows nothing of the LLM: only its lexicon does, whose words `warm_start` spells anew.

    Raises:
        ValueError: it does not fit.
    """
    state = load_file(checkpoint / "model.safetensors")
    state = {n.removeprefix("linguistic_adapter."): t for n, t in state.items() if n.startswith("linguistic_adapter.")}
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for side in ("audio",) if model.config.linguistic_adapter_type == "letters" else ("audio", "text"):
        if config[f"{side}_model_fingerprint"] != getattr(model.config, f"{side}_model_fingerprint"):
            raise ValueError(f"warm_start.linguistic_from: {checkpoint} was trained with another {side} backbone.")
    letters = config.get("linguistic_letters", model.config.linguistic_letters)
    if letters != model.config.linguistic_letters:
        raise ValueError(f"warm_start.linguistic_from: {checkpoint} writes in other letters, {letters!r}.")
    if "lexicon.counts" in state:  # written before there were pairs, it has none
        state.setdefault("lexicon.pairs", torch.zeros(0, 3, dtype=torch.int32))
    adapter = model.linguistic_adapter
    buffers = dict(adapter.named_buffers())  # pieces and words: as many as there were
    known = {name: tensor.shape for name, tensor in adapter.state_dict().items() if name not in buffers}
    wrong = [name for name, tensor in state.items() if known.get(name) != tensor.shape and name not in buffers]
    wrong += [name for name in (*known, *buffers) if name not in state and not name.startswith("residual.")]
    if wrong:
        raise ValueError(f"warm_start.linguistic_from: {checkpoint} does not fit the recipe in {', '.join(wrong)}.")
    put(adapter, state)


def put(module, state: dict[str, torch.Tensor]) -> None:
    """Tensors into a module that may lack some of them; a buffer takes the new one's size (pieces, words)."""
    buffers = dict(module.named_buffers())
    for name in state.keys() & buffers.keys():
        place, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(place), leaf, state[name].to(buffers[name].device))
    module.load_state_dict(state, strict=False)


def check_stage_0(recipe: Recipe, config: DualSLMConfig) -> None:
    """That stage 0 and the kept shares are those of the model's adapters.

    Raises:
        ValueError: they are not.
    """
    about = recipe.warm_start
    in_letters, known = config.linguistic_adapter_type == "letters", config.linguistic_ctc_vocab_size
    if in_letters and any(stage.ctc_share for stage in recipe.stages):
        raise ValueError("the linguistic adapter writes letters, which learn in stage 0 alone: ctc_share has to be 0.")
    in_words = config.reads_statistics and config.paralinguistic_soft_vocab_size
    taught = about.enabled and about.caption_steps and config.paralinguistic_adapter_type == "pooling"
    if taught and not in_words:
        raise ValueError(
            "stage 0 teaches an adapter that reads statistics to say a caption: give a model.config.caption_template, "
            "paralinguistic_pooling: statistics and paralinguistic_num_layers: 0, or take paralinguistic_adapter_type: "
            "query, or leave stage 0 out by warm_start.enabled=false."
        )
    if not about.enabled or config.linguistic_adapter_type == "none":
        return
    if in_letters and (about.pieces or len(about.steps) != 1):
        raise ValueError(
            "the linguistic adapter writes letters: give warm_start.pieces=[] and one number of warm_start.steps, or leave "
            "stage 0 out by warm_start.enabled=false."
        )
    if not in_letters and (not known or not about.pieces or about.pieces[-1] != known):
        raise ValueError(
            f"warm_start.pieces ends with {(about.pieces or [0])[-1]}, and the linguistic adapter has {known}: name as many "
            f"(warm_start.pieces=[{known}]), or leave stage 0 out by warm_start.enabled=false."
        )


def _warm_start_words(recipe: Recipe, folder: Path, model, processor, store: FeatureStore, data: Data) -> list[dict]:
    """The linguistic adapter's part of stage 0."""
    about, seed, log = recipe.warm_start, recipe.train.seed, []
    in_letters = model.config.linguistic_adapter_type == "letters"
    spoken = own_clips([row for row in data.train + data.words if row["transcript"]])
    alphabet = model.config.linguistic_letters if in_letters else ALPHABET
    odd = [row for row in spoken if not spelled_out(row["transcript"], alphabet)]
    if odd:
        print(
            f"{len(odd):,} transcripts have figures or letters that are none of {alphabet!r}, and teach no words; the first "
            f"is {odd[0]['transcript'][:60]!r}",
            flush=True,
        )
        spoken = [row for row in spoken if spelled_out(row["transcript"], alphabet)]
        if not spoken:
            raise ValueError(
                f"no transcript is in the letters {alphabet!r}, which words are spelled in: name those of the language in "
                "model.config.linguistic_letters, with linguistic_adapter_type: letters, or take model.adapters: paper and "
                "warm_start.enabled: false."
            )
    heard = [
        row for row in own_clips(data.validation) if row["transcript"] and spelled_out(row["transcript"], alphabet)
    ]
    heard = [row for row in heard if normalize(row["transcript"], alphabet)]
    heard = [row for row in heard if row["corpus"] != "ravdess"][:64]
    texts = data.lines if in_letters else read_texts(None)
    texts = [row["transcript"] for row in spoken] + texts
    words = word_counts(texts, alphabet)
    if about.linguistic_from:
        take_linguistic(model, Path(about.linguistic_from))
    adapter = model.linguistic_adapter
    if in_letters:
        known, known_pairs = map(collections.Counter, adapter.lexicon.known(alphabet))  # going on, it keeps these
        pairs = pair_counts(texts, alphabet) | known_pairs
        put(adapter.lexicon, lexicon_rows(processor.tokenizer, words | known, pairs, alphabet))
    learnt = adapter.soft_tokens.token_ids.tolist() if recipe.model.start_from and not in_letters else []
    for number, (pieces, steps) in enumerate(zip(about.pieces or [0], about.steps, strict=True)):
        # Going on, it keeps its pieces: those of another corpus would not spell the words that this one lacks.
        if in_letters:
            speller = Letters(alphabet)
        elif len(learnt) == pieces:
            speller = Speller.of(processor.tokenizer, learnt)
        else:
            speller = Speller(processor.tokenizer, words, pieces)
        log += train_linguistic(
            model,
            store,
            spoken,
            speller,
            steps,
            learning_rate=about.learning_rate,
            frames_per_batch=about.frames_per_batch,
            warmup=min(100, steps // 5),
            seed=seed + number,
            sampled_pieces=about.sampled_pieces,
            evaluate=lambda _: (
                {"validation_wer": round(word_errors(model, store, heard, processor), 4)} if heard else {}
            ),
            evaluate_every=min(250, max(1, steps // 4)),
            checkpoint=folder / f"linguistic-{number}.pt",
        )
    return log


def warm_start(recipe: Recipe, folder: Path, model, processor, store: FeatureStore, data: Data) -> list[dict]:
    """Stage 0: the adapters without the LLM."""
    about, seed, log = recipe.warm_start, recipe.train.seed, []
    if model.config.paralinguistic_adapter_type == "query":
        labels = processor.attribute_labels
        return train_queries(
            model,
            store,
            [row for row in own_clips(data.train) if any(row[name] in labels[name] for name in labels)],
            processor,
            about.caption_steps,
            about.learning_rate,
            seed=seed,
            fresh=recipe.model.start_from is None,
            evaluate=lambda _: read_labels(model, store, own_clips(data.validation), processor),
            evaluate_every=min(100, max(1, about.caption_steps // 3)),
            checkpoint=folder / "queries.pt",
        )
    if model.linguistic_adapter is not None:
        log += _warm_start_words(recipe, folder, model, processor, store, data)
    clips = own_clips(data.train)
    targets = caption_targets(clips, processor)
    known = (targets != -100).sum(1) > len(processor.caption_slots.fixed)
    rows = [row for row, usable in zip(clips, known, strict=True) if usable]
    if not rows:
        print("no row has a label that the caption tells (dual-slm corpus label): the voice is not taught", flush=True)
    if rows and about.caption_steps:
        log += train_paralinguistic(
            model,
            store,
            rows,
            targets[known],
            about.caption_steps,
            seed=seed,
            evaluate=lambda _: slot_accuracy(model, store, own_clips(data.validation), processor),
            evaluate_every=min(250, max(1, about.caption_steps // 4)),
            checkpoint=folder / "paralinguistic.pt",
        )
        with torch.no_grad():
            model.paralinguistic_adapter.soft_tokens.scale.div_(about.caption_temperature)
    return log


# --------------------------------------------------------------------------------------------------------------------
# Stages 1 to 3
# --------------------------------------------------------------------------------------------------------------------


def validation_items(dataset: StageDataset, rows: list[dict], limit: int, multiple: int = 1) -> list[Item]:
    """Validation rows, the stage's tasks in turn, both branches from what the stage has for them; sorted by size. If there
    are enough, a `multiple` of them."""
    tasks = list(dataset.stage.tasks)
    rows = sorted(rows, key=lambda row: share(row["id"]))  # a mixture of corpora, whatever the order of the tables
    able = {task: [row for row in rows if task in tasks_of(row)] for task in tasks}
    items, number = [], 0
    while len(items) < limit and any(number < len(able[task]) for task in tasks):
        for task in tasks:
            if number < len(able[task]):
                item = dataset.item(able[task][number], task)
                heard = item.sources._replace(paralinguistic="speech", linguistic="speech")
                sources = with_stage_sources(heard, dataset.stage, item.row)
                items.append(Item(item.sample, item.row, sources))
        number += 1
    items = items[: min(limit, len(items)) // multiple * multiple or limit]
    return sorted(items, key=lambda item: item.sample.duration or 0.0)


def reply_metrics(items: list[Item], processor: DualSLMProcessor, read_aloud: int):
    """Replies -> WER, accuracy and unparsed share of each task; some are printed."""

    def compute(prediction) -> dict[str, float]:
        ids = np.where(prediction.predictions == -100, processor.tokenizer.pad_token_id, prediction.predictions)
        # Several processes fill up the last batch with the first items again.
        replies = processor.batch_decode(ids[: len(items)], skip_special_tokens=True)
        figures, errors, words = collections.defaultdict(list), 0, 0
        for item, reply in zip(items, replies, strict=True):
            found = score(item.sample, reply, item.row["transcript"])
            if "words" in found:
                errors, words = errors + found["errors"], words + found["words"]
            elif "label" in found:
                figures[f"accuracy_{item.sample.task}"].append(found["parsed"] == found["label"])
                figures["unparsed"].append(found["parsed"] is None)
        step = max(1, len(items) // max(1, read_aloud))
        for item, reply in list(zip(items, replies, strict=True))[::step][:read_aloud]:
            print(
                f"  {item.sample.task:>9}  wanted: {item.sample.target[:90]!r}\n{'':>11}  reply:  {reply.strip()[:90]!r}",
                flush=True,
            )
        return {name: float(np.mean(values)) for name, values in figures.items()} | (
            {"wer": errors / words} if words else {}
        )

    return compute


class _Curves(TrainerCallback):
    """Keeps the stage's log and draws it, at every evaluation."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_json(self.folder / "log.json", state.log_history)
            plot_log(state.log_history, self.folder / "curves.png")


def run_stage(
    recipe: Recipe, stage: StageRecipe, folder: Path, model, processor, store, data: Data, resume: bool, teacher=None
) -> list[dict]:
    """One stage; the model holds its best adapters at the end."""
    about = recipe.train
    choices = label_sets(data.train + data.validation)  # the few validation speakers may not have all labels
    common = {"positional_randomness": about.positional_randomness, "choices": choices}
    dataset = StageDataset(data.train, stage, about.seed, **common, teacher=teacher)
    asked = StageDataset(data.validation, stage, about.seed, **common)
    world = PartialState().num_processes
    # Several processes would fill up an incomplete batch with clips that count twice.
    items = validation_items(asked, data.validation, recipe.data.validation_rows, world)
    sizes = range(world, about.batch_size + 1, world)
    whole = max((size for size in sizes if len(items) % size == 0), default=world)
    speller = None
    if stage.ctc_share:
        speller = Speller.of(processor.tokenizer, model.linguistic_adapter.soft_tokens.token_ids.tolist())
    collator = TrainingCollator(processor, store, speller, captions=stage.caption_share > 0)
    if about.activation_checkpointing:
        checkpoint_activations(model)
    longest = max(len(processor.tokenizer(item.sample.target)["input_ids"]) for item in items)
    checkpoint = last_checkpoint(folder) if resume else None
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        seed=about.seed,
        data_seed=about.seed,
        per_device_train_batch_size=about.batch_size // world,
        per_device_eval_batch_size=whole
        if world > 1
        else about.batch_size,  # split_batches: of all processes together
        gradient_accumulation_steps=about.gradient_accumulation_steps,
        learning_rate=stage.learning_rate,
        weight_decay=about.weight_decay,
        max_grad_norm=about.max_grad_norm,
        warmup_steps=stage.warmup_steps,
        lr_scheduler_type=stage.lr_scheduler_type,
        num_train_epochs=stage.epochs,
        max_steps=stage.max_steps,
        bf16=about.bf16,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps",
        eval_on_start=checkpoint is None,  # the log says where the stage began
        eval_steps=about.eval_steps,
        save_strategy="steps",
        save_steps=about.eval_steps,  # what validation chooses has to be there
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{stage.best_by}",
        greater_is_better=stage.best_by.startswith("accuracy"),
        logging_steps=about.logging_steps,
        logging_nan_inf_filter=False,
        predict_with_generate=True,
        generation_max_length=longest + 8,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=about.dataloader_workers,
        accelerator_config={"split_batches": True, "dispatch_batches": False},
        ddp_find_unused_parameters=False,
        report_to=about.report_to or "none",
        project=recipe.name,  # trackio's; the default is "huggingface"
        run_name=f"{recipe.name}/{stage.name}",
        disable_tqdm=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several for one process would be `DataParallel`: `accelerate launch` is for them
    trainer = DualSLMTrainer(
        model=model,
        args=arguments,
        stage=stage,
        train_dataset=dataset,
        eval_dataset=items,
        data_collator=collator,
        evaluation_collator=TrainingCollator(processor, store, with_prompts=True),
        processing_class=processor,
        compute_metrics=reply_metrics(items, processor, recipe.data.read_aloud),
        callbacks=[_Curves(folder)],
    )
    del model.config.use_cache  # the stock trainer writes it there, and every checkpoint would tell it
    trainer.train(resume_from_checkpoint=checkpoint)
    # The best checkpoint is in the model now, and was evaluated when it was written.
    done = [e for e in trainer.state.log_history if "eval_loss" in e and e["step"] == trainer.state.best_global_step]
    figures = done[-1] if done else trainer.evaluate()
    if PartialState().is_main_process:
        write_json(folder / "log.json", trainer.state.log_history)
        plot_log(trainer.state.log_history, folder / "curves.png")
    return [{"stage": stage.name, **{k: v for k, v in figures.items() if isinstance(v, (int, float))}}]


def plot_log(history: list[dict], path: Path) -> None:
    """Losses, token accuracies and reply metrics over steps, a colour for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    panels = (
        ("loss of a token", r"(?:eval_)?loss(?:_(?P<task>\w+))?"),
        ("token accuracy", r"(?:eval_)?token_accuracy_(?P<task>\w+)"),
        ("replies on validation", r"eval_(?:accuracy_)?(?P<task>\w+)"),
    )
    replies = [f"accuracy_{task}" for task in TASKS] + ["wer", "unparsed"]
    lines = {}
    for axis, (title, pattern) in zip(axes, panels, strict=True):
        for name in sorted({name for entry in history for name in entry}):
            found = re.fullmatch(pattern, name)
            if not found or (axis is axes[2] and name.removeprefix("eval_") not in replies):
                continue
            task = found["task"] or "all"
            colour = f"C{TASKS.index(task)}" if task in TASKS else {"all": "black", "wer": "teal"}.get(task, "grey")
            points = [(e["step"], e[name]) for e in history if name in e]
            style = "--" if name.startswith("eval_") else "-"
            (line,) = axis.plot(*zip(*points, strict=True), style, color=colour, linewidth=2 if task == "all" else 1.2)
            lines.setdefault(task, line)
        axis.set(title=title + " (dashed: validation)" * (axis is not axes[2]), xlabel="step")
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside right center")
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------------------
# The whole
# --------------------------------------------------------------------------------------------------------------------


def environment(data: Data) -> dict:
    """What a run was made with."""
    packages = ("torch", "transformers", "accelerate", "datasets", "safetensors", "dual-slm")
    return {
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: version(name) for name in packages},
        "data": {"rows": data.fingerprint, "train": len(data.train), "validation": len(data.validation)},
    }


def _fit_config(model) -> None:
    """Pieces and words are as many as the corpus has, whatever the recipe asks for."""
    soft = getattr(model.linguistic_adapter, "soft_tokens", None)
    if soft is not None:
        model.config.linguistic_ctc_vocab_size = len(soft.token_ids)
    if model.config.linguistic_adapter_type == "letters":
        lexicon = model.linguistic_adapter.lexicon
        model.config.linguistic_lexicon_size = len(lexicon.counts)
        model.config.linguistic_lexicon_pairs = len(lexicon.pairs)


def finish(folder: Path, model, processor, log: list[dict]) -> None:
    """Writes `final/`: complete or not there at all."""
    _fit_config(model)
    final, scratch = folder / "final", folder / "final.part"
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    processor.save_pretrained(scratch)
    write_json(scratch / "training_log.json", log)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(scratch, final)


def restore(model, folder: Path) -> None:
    """The adapters of a finished stage, into a model that has its backbones already."""
    state = load_file(folder / "final" / "model.safetensors")
    wrong = set(model.state_dict()) - set(model.frozen_keys()) ^ set(state)
    if wrong:
        raise ValueError(f"{folder / 'final'} does not fit the recipe's adapters: {', '.join(sorted(wrong)[:5])}.")
    put(model, state)
    _fit_config(model)


def fit_dtype(recipe: Recipe) -> Recipe:
    """The recipe in float32 where it asks for bfloat16 of a CPU that crawls in it."""
    asked = recipe.train.bf16 or recipe.model.dtype == "bfloat16"
    if torch.cuda.is_available() or not asked or fast_dtype("bfloat16") == "bfloat16":
        return recipe
    return replace(recipe, model=replace(recipe.model, dtype="float32"), train=replace(recipe.train, bf16=False))


def run(recipe: Recipe, output: str | Path, resume: bool = False) -> Path:
    """Runs a recipe; returns the checkpoint's folder.

    Args:
        recipe: what to do.
        output: the run's folder. It must be new, unless `resume`, which goes on with a run of the same recipe.

    Raises:
        FileExistsError, ValueError: the folder holds a run already, or one of another recipe.
    """
    # The other processes wait while the first one synthesises, aligns and computes features: longer than the default allows.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    if recipe.train.batch_size % state.num_processes:
        raise ValueError(
            f"train.batch_size {recipe.train.batch_size} is no multiple of the {state.num_processes} processes."
        )
    output = Path(output)
    kept = output / "recipe.yaml"
    if state.is_main_process and kept.is_file():
        if not resume:
            raise FileExistsError(f"{output} holds a run already: --resume goes on with it, or name another --output.")
        if kept.read_text(encoding="utf-8") != recipe.to_yaml():
            raise ValueError(f"the recipe is not the one of {kept}: go on by --recipe {kept}, or repeat its --set.")
    with state.main_process_first():
        asked, recipe = recipe, fit_dtype(recipe)
        model, processor = make_model(recipe)
        check_stage_0(recipe, model.config)
        output.mkdir(parents=True, exist_ok=True)
        if state.is_main_process:  # what is refused so far has not begun
            write_text(kept, asked.to_yaml())
        data = load_data(recipe, output, model.config, state.device)
        about = environment(data) | {"dtype": recipe.model.dtype}
        known = output / "environment.json"
        if known.is_file() and json.loads(known.read_text(encoding="utf-8"))["data"] != about["data"]:
            raise ValueError(
                f"the tables are not those that {known} tells of, or another version wrote it: a run goes on with its own "
                "data. Delete that file to go on all the same."
            )
        store = FeatureStore(output / "features", model.config, recipe.data.feature_bits)
        if state.is_main_process:
            write_json(known, about)
        options = {"skip_damaged": recipe.data.skip_damaged, "device": state.device}
        data.train = store.build(data.train, model, processor, **options)
        data.words = store.build(data.words, model, processor, **options)
        data.validation = store.build(data.validation, model, processor, **options)
    log: list[dict] = []
    sharded = recipe.train.shard_llm and state.num_processes > 1
    if not sharded:  # whose LLM no single device holds
        model.to(state.device)
    if recipe.warm_start.enabled:
        folder = output / "stage-0"
        with state.main_process_first():
            if not (folder / "final" / "config.json").is_file():
                log += warm_start(recipe, folder, model, processor, store, data)
                finish(folder, model, processor, log)
            else:
                restore(model, folder)
                log += json.loads((folder / "final" / "training_log.json").read_text(encoding="utf-8"))
    if sharded:
        shard_llm(model)
        model.to(state.device)  # the rest
    teacher = None
    if any(stage.objective != "ce" for stage in recipe.stages):
        rows = [row for row in data.train if "dialogue" in tasks_of(row)]
        if not rows:
            raise ValueError("an objective with kl learns from dialogues, and no training row has a response.")
        talk = StageRecipe(name="teacher", tasks={"dialogue": 1.0})
        every = StageDataset(rows, talk, recipe.train.seed, recipe.train.positional_randomness)
        samples = {
            (row["corpus"], row["id"], row.get("augment")): every.item(row, "dialogue").sample for row in every.rows
        }
        scores = score_targets(list(samples.values()), model, DualSLMCollator(processor))
        teacher = dict(zip(samples, scores, strict=True)).get
    for number, stage in enumerate(recipe.stages, 1):
        folder = output / f"stage-{number}-{stage.name}"
        if (folder / "final" / "config.json").is_file():
            restore(model, folder)
            log = json.loads((folder / "final" / "training_log.json").read_text(encoding="utf-8"))
            continue
        print(f"stage {number}, {stage.name}", flush=True)
        log = log + run_stage(recipe, stage, folder, model, processor, store, data, resume, teacher)
        if state.is_main_process:
            finish(folder, model, processor, log)
        state.wait_for_everyone()
    if state.is_main_process:
        finish(output, model, processor, log)
    state.wait_for_everyone()
    return output / "final"


def plan(recipe: Recipe, output: str | Path) -> str:
    """What a run would do: rows, steps, memory and hours, without doing it."""
    recipe = fit_dtype(recipe)
    if recipe.model.start_from:
        config = DualSLMConfig.from_pretrained(recipe.model.start_from)
        ids = {"audio_model_id": config.audio_model_id, "text_model_id": config.text_model_id}
        recipe = replace(recipe, model=replace(recipe.model, **ids))
    lines = [f"recipe {recipe.name}: {recipe.model.audio_model_id} + {recipe.model.text_model_id}"]
    rows = [row for row in read_table(*recipe.data.tables) if row["audio"]] if recipe.data.tables else []
    if rows and recipe.data.histories:
        rows = list(lend_histories(rows, read_table(*recipe.data.histories), recipe.train.seed))
    if recipe.data.synthesise_hours:
        lines.append(f"data      {recipe.data.synthesise_hours} h to synthesise")
    train = sum(1 + recipe.data.copies(row) for row in rows if row["split"] == "train")
    hours = sum(row["duration"] or 0 for row in rows) / 3600
    if rows:
        lines.append(f"data      {train:,} training clips with augmented copies, {hours:.2f} h of audio in all splits")
    more_hours = 0.0
    if recipe.warm_start.enabled:
        steps = " + ".join(map(str, recipe.warm_start.steps))
        more = read_table(*recipe.warm_start.tables) if recipe.warm_start.tables else []
        more = [row for row in more if row["audio"] and row["split"] == "train"]
        more_hours = sum(row["duration"] or 0 for row in more) / 3600
        also = f", on {len(more):,} clips ({more_hours:.2f} h) more" if more else ""
        lines.append(f"stage 0   {steps} CTC steps, {recipe.warm_start.caption_steps} caption steps{also}")
    used = [row for row in rows if row["split"] in ("train", "validation")]
    if recipe.data.align_responses and any(stage.tasks.get("dialogue") for stage in recipe.stages):
        count = sum(row["response_complete"] is None and bool(row["transcript"]) for row in used)
        lines.append(f"align     {count:,} rows are answered by the LLM")
    if not rows:  # about 4 s a clip
        train = int(recipe.data.synthesise_hours * 900 * 0.85)
        rows = [{"transcript": "x" * 50, "history": [], "response": "x" * 100, "split": "train"}]
    from transformers import AutoConfig

    audio = AutoConfig.from_pretrained(resolve_backbone(recipe.model.audio_model_id))
    fields = adapter_defaults(recipe.model) | recipe.model.config
    store = FeatureStore(Path(output) / "features", DualSLMConfig(audio.to_dict(), **fields), recipe.data.feature_bits)
    seconds = sum((row["duration"] or 0) * (1 + recipe.data.copies(row)) for row in used) + 3600 * more_hours
    seconds = seconds or 3600 * recipe.data.synthesise_hours
    size = seconds * FRAMES_PER_SECOND * store.layers * store.width * store.bits / 8
    lines.append(
        f"disk      about {size / 2**30:,.2f} GiB of features ({store.layers} of the encoder's layers, data.feature_bits)"
    )
    text = AutoConfig.from_pretrained(resolve_backbone(recipe.model.text_model_id)).get_text_config()
    rate, total = matrix_rate(recipe.model.dtype), 0.0
    letters = [
        len(r["transcript"] or "") + sum(len(t["content"]) for t in r["history"]) + len(r["response"] or "")
        for r in rows
    ]
    positions = np.array(letters) / 4 + 70
    if recipe.model.adapters == "paper":  # the others leave as many positions as there are words
        heard = 50 / recipe.model.config.get("linguistic_downsample_rate", 5)  # a second
        positions = positions + heard * np.array([r.get("duration") or 4.0 for r in rows])
    tokens, longest = positions.mean(), positions.max()
    for number, stage in enumerate(recipe.stages, 1):
        per_epoch = train // recipe.train.batch_size
        steps = (
            stage.max_steps
            if stage.max_steps > 0
            else int(stage.epochs * per_epoch / recipe.train.gradient_accumulation_steps)
        )
        flops = steps * recipe.train.batch_size * positions_floor(int(tokens), 20, text)
        total += flops / rate
        lines.append(
            f"stage {number}   {stage.name}: {steps:,} steps of {recipe.train.batch_size}, floor {flops / rate / 60:,.1f} min"
        )
    item = {"float32": 4, "auto": 4}.get(recipe.model.dtype, 2)
    layer = 0.5625 if recipe.model.load_in_4bit else item  # bytes a weight; NF4 keeps a float32 for each 64
    size = positions_floor(1, 0, text) / 4 * layer + text.vocab_size * text.hidden_size * item
    eager = eager_fits(recipe.train.batch_size, longest, longest, text, item)
    activations = activation_bytes(recipe.train.batch_size, longest, text, item, eager)
    if recipe.train.activation_checkpointing:
        activations /= 12
    lines.append(
        f"memory    LLM {size / 2**30:.1f} GiB, activations about {activations / 2**30:.1f} GiB in the longest batch "
        f"({recipe.train.batch_size} of {longest:.0f} positions)"
    )
    lines.append(
        f"time      about {total / 3600:.2f} h or more, at {rate / 1e12:.2f} TFLOPS measured here; expect 1.5 to 2 times that"
    )
    lines.append(f"output    {output}")
    return "\n".join(lines)


def matrix_rate(dtype: str = "auto") -> float:
    """FLOPs a second of a square matrix product here, best of five."""
    import time

    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
