"""The stages of a run: stage 0 without the LLM, then each stage through it, with its log, curves and checkpoint."""

import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import EvalPrediction, TrainerCallback

from ..letters_dual_slm import lexicon_rows
from ..modeling_dual_slm import DualSLMForConditionalGeneration
from ..processing_dual_slm import DualSLMProcessor
from .build import take_linguistic
from .collator import Item, TrainingCollator
from .corpora.row import Row
from .data import Data
from .dataset import StageDataset
from .err import heard_sources
from .features import FeatureStore
from .files import atomic, read_json, write_json
from .forward import load_state
from .labels import TASKS
from .parsing import score
from .recipe import Recipe, StageRecipe
from .spelling import caption_targets
from .tasks import label_sets, tasks_of
from .text import bigram_counts, hash_uniform, normalize, spelled_out, word_counts
from .trainer import DualSLMTrainer, last_checkpoint
from .warm_start import Descent, Log, read_labels, train_captions, train_letters, train_queries


@dataclass
class Run:
    """What all stages of a run share."""

    recipe: Recipe
    model: DualSLMForConditionalGeneration
    processor: DualSLMProcessor
    store: FeatureStore
    data: Data


def run_stage_0(run: Run, folder: Path) -> Log:
    """Teaches the adapters without the LLM: words by CTC and captions, or the labels of the query adapter."""
    if run.model.config.paralinguistic_adapter_type == "query":
        return _teach_queries(run, folder)
    log = _teach_words(run, folder) if run.model.linguistic_adapter is not None else []
    return log + _teach_captions(run, folder)


def own_clips(rows: list[Row]) -> list[Row]:
    """Rows whose transcript is what their clip says, each clip and each augmented copy of it once."""
    own = [row for row in reversed(rows) if not row.voice_only]
    return list({(row.audio, row.variant.copy): row for row in own}.values())[::-1]


def _teach_queries(run: Run, folder: Path) -> Log:
    args, labels = run.recipe.warm_start, run.processor.attribute_labels or {}
    rows = [row for row in own_clips(run.data.train) if any(row.label(name) in labels[name] for name in labels)]
    heard = own_clips(run.data.validation)
    descent = Descent(
        args.caption_steps,
        args.learning_rate,
        seed=run.recipe.train.seed,
        evaluate=lambda _: read_labels(run.model, run.store, heard, run.processor),
        evaluate_every=min(100, max(1, args.caption_steps // 3)),
        checkpoint=folder / "queries.pt",
    )
    return train_queries(run.model, run.store, rows, run.processor, descent, fresh=not run.recipe.model.start_from)


def _teach_words(run: Run, folder: Path) -> Log:
    """The linguistic adapter's part of stage 0: character CTC, and a lexicon of the words and bigrams of all texts."""
    args, adapter, alphabet = run.recipe.warm_start, run.model.linguistic_adapter, run.model.config.linguistic_letters
    spoken = _spelled_rows(run.data.train + run.data.words, alphabet)
    heard = [row for row in own_clips(run.data.validation) if row.corpus != "ravdess"]
    heard = [row for row in heard if normalize(row.transcript or "", alphabet)]
    heard = [row for row in heard if spelled_out(str(row.transcript), alphabet)][:64]
    if args.linguistic_from:
        take_linguistic(run.model, Path(args.linguistic_from))
    # Each sentence counts once, however many clips and copies say it, so that "twice" means two sentences.
    said = [str(row.transcript) for row in spoken] + run.data.lines
    texts = list(dict.fromkeys(" ".join(normalize(text, alphabet)) for text in said))
    known, known_bigrams = map(Counter, adapter.lexicon.known(alphabet))
    words, bigrams = word_counts(texts, alphabet) | known, bigram_counts(texts, alphabet) | known_bigrams
    load_state(adapter.lexicon, lexicon_rows(run.processor.tokenizer, words, bigrams, alphabet))
    if not args.steps:  # the letters of `linguistic_from` stay as they are
        return []
    descent = Descent(
        args.steps,
        args.learning_rate,
        warmup=min(100, args.steps // 5),
        seed=run.recipe.train.seed,
        evaluate=lambda _: {"validation_wer": round(validation_wer(run, heard), 4)} if heard else {},
        evaluate_every=min(250, max(1, args.steps // 4)),
        checkpoint=folder / "linguistic-0.pt",
    )
    return train_letters(run.model, run.store, spoken, descent, args.frames_per_batch)


def _spelled_rows(rows: list[Row], alphabet: str) -> list[Row]:
    """The clips that can teach words: their transcripts are written in the alphabet alone."""
    clips = own_clips([row for row in rows if row.transcript])
    spelled = [row for row in clips if spelled_out(str(row.transcript), alphabet)]
    if odd := [str(row.transcript) for row in clips if not spelled_out(str(row.transcript), alphabet)]:
        told = f"{len(odd):,} transcripts have figures or letters that are none of {alphabet!r}, and teach no words"
        print(f"{told}; the first is {odd[0][:60]!r}", flush=True)
    if odd and not spelled:
        raise ValueError(
            f"no transcript is in the letters {alphabet!r}, which words are spelled in: name those of the language in "
            "model.config.linguistic_letters, or take model.adapters: paper and warm_start.enabled: false."
        )
    return spelled


def _teach_captions(run: Run, folder: Path) -> Log:
    """The paralinguistic adapter's part of stage 0: each output learns its token of the caption."""
    args, slots = run.recipe.warm_start, run.processor.caption_slots
    if slots is None:
        return []
    clips, heard = own_clips(run.data.train), own_clips(run.data.validation)
    targets = caption_targets(clips, run.processor)
    known = (targets != -100).sum(1) > len(slots.fixed)
    rows = [row for row, usable in zip(clips, known, strict=True) if usable]
    if not rows:
        print("no row has a label that the caption tells (dual-slm corpus label): the voice is not taught", flush=True)
    if not rows or not args.caption_steps:
        return []
    descent = Descent(
        args.caption_steps,
        seed=run.recipe.train.seed,
        evaluate=lambda _: slot_accuracy(run, heard, slots.fields),
        evaluate_every=min(250, max(1, args.caption_steps // 4)),
        checkpoint=folder / "paralinguistic.pt",
    )
    log = train_captions(run.model, run.store, rows, targets[known], descent)
    with torch.no_grad():
        run.model.paralinguistic_adapter.soft_tokens.scale.div_(args.caption_temperature)
    return log


@torch.inference_mode()
def validation_wer(run: Run, rows: list[Row]) -> float:
    """WER of the linguistic adapter on cached clips, over bare lower-case words."""
    import jiwer

    model, alphabet = run.model, run.model.config.linguistic_letters
    said, heard = [], []
    for row in rows:
        frames = run.store.get(row)[None].to(model.device)
        lengths = torch.tensor([frames.shape[1]], device=model.device)
        words = model.linguistic_adapter(frames, lengths, model.get_input_embeddings())
        said.append(" ".join(normalize(str(row.transcript), alphabet)))
        heard.append(" ".join(normalize(run.processor.decode(words.token_ids), alphabet)))
    return jiwer.wer(said, heard)


@torch.inference_mode()
def slot_accuracy(run: Run, rows: list[Row], fields: dict[str, slice]) -> dict[str, float]:
    """Accuracy of each attribute's first caption token on cached clips."""
    adapter = run.model.paralinguistic_adapter
    embeddings = adapter.soft_tokens.rows(run.model.get_input_embeddings())
    pooled = torch.stack([run.store.get(row, "pooled") for row in rows]).to(embeddings.device)
    best = adapter.soft_tokens.logits(adapter.project(pooled), embeddings).argmax(-1).cpu()
    targets, figures = caption_targets(rows, run.processor), {}
    for name, place in fields.items():
        known = targets[:, place.start] != -100
        if known.any():
            figures[name] = round((best == targets)[known, place.start].float().mean().item(), 4)
    return figures


def run_stage(run: Run, stage: StageRecipe, folder: Path, resume: bool, teacher: Callable | None = None) -> Log:
    """Trains one stage and returns its line of the training log; the model then has the best checkpoint's adapters.

    Args:
        resume: go on from the stage's last complete checkpoint.
        teacher: clip -> the frozen LLM's log-probabilities of its dialogue's target; see [`StageDataset`].
    """
    model, processor, data, train = run.model, run.processor, run.data, run.recipe.train
    world = PartialState().num_processes
    choices = label_sets(data.train + data.validation)  # the few validation speakers may not have all labels
    make_dataset = partial(StageDataset, positional_randomness=train.positional_randomness, choices=choices)
    asked = make_dataset(data.validation, stage, train.seed)
    items = validation_items(asked, data.validation, run.recipe.data.validation_rows, world)
    longest = max(len(processor.tokenizer(item.sample.target)["input_ids"]) for item in items)
    # Several processes would fill up an incomplete batch with clips that count twice, so theirs divides the items evenly.
    sizes = [size for size in range(world, train.batch_size + 1, world) if len(items) % size == 0]
    checkpoint = last_checkpoint(folder) if resume else None
    arguments = train.arguments(
        folder,
        stage,
        world,
        project=run.recipe.name,
        eval_batch_size=train.batch_size if world == 1 else max(sizes, default=world),
        generation_max_length=longest + 8,
        eval_on_start=checkpoint is None,
    )
    trainer = DualSLMTrainer(
        model=model,
        args=arguments,
        stage=stage,
        train_dataset=make_dataset(data.train, stage, train.seed, teacher=teacher),
        eval_dataset=items,
        data_collator=TrainingCollator(processor, run.store, captions=stage.caption_share > 0),
        evaluation_collator=TrainingCollator(processor, run.store, with_prompts=True),
        processing_class=processor,
        compute_metrics=partial(reply_metrics, items, processor, run.recipe.data.read_aloud),
        callbacks=[_Curves()],
    )
    # The stock trainer writes it there, and every checkpoint would tell it.
    del model.config.use_cache  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train(resume_from_checkpoint=checkpoint)
    # The best checkpoint is in the model now, and was evaluated when it was written.
    history, best = trainer.state.log_history, trainer.state.best_global_step
    done = [entry for entry in history if "eval_loss" in entry and entry["step"] == best]
    figures = done[-1] if done else trainer.evaluate()
    return [{"stage": stage.name, **{k: v for k, v in figures.items() if isinstance(v, (int, float))}}]


def validation_items(dataset: StageDataset, rows: list[Row], limit: int, multiple: int = 1) -> list[Item]:
    """At most `limit` validation items of the stage's tasks (of each corpus, if it maps them) in turn, sorted by duration.

    Both branches come from what the stage hears. The number of items is a `multiple` if there are enough.
    """
    rows = sorted(rows, key=lambda row: hash_uniform(row.id))  # mixes the corpora, whatever the order of the tables
    stage = dataset.stage
    able: dict[tuple[str, str], list[tuple[Row, str]]] = {}  # a turn for each task, or for each corpus and task
    for task in stage.task_names:
        for row in rows:
            if task in tasks_of(row) and stage.share(row.corpus, task) > 0:
                able.setdefault((row.corpus if stage.by_corpus else "", task), []).append((row, task))
    pairs = [pair for turn in zip_longest(*able.values()) for pair in turn if pair]
    items = []
    for row, task in pairs[: min(limit, len(pairs)) // multiple * multiple or limit]:
        item = dataset.item(row, task)
        items.append(replace(item, sources=heard_sources(stage.source_rules, item.row, item.sources)))
    return sorted(items, key=lambda item: item.sample.duration or 0.0)


def reply_metrics(
    items: list[Item], processor: DualSLMProcessor, read_aloud: int, prediction: EvalPrediction
) -> dict[str, float]:
    """WER, accuracy of each task and the share of unparsed replies to the `items`; prints `read_aloud` replies."""
    ids = np.where(prediction.predictions == -100, processor.tokenizer.pad_token_id, prediction.predictions)
    # Several processes fill up the last batch with the first items again.
    replies = processor.batch_decode(ids[: len(items)], skip_special_tokens=True)
    figures, errors, words = defaultdict(list), 0, 0
    for item, reply in zip(items, replies, strict=True):
        found = score(item.sample, reply, item.row.transcript)
        if "words" in found:
            errors, words = errors + found["errors"], words + found["words"]
        elif "label" in found:
            figures[f"accuracy_{item.sample.task}"].append(found["parsed"] == found["label"])
            figures["unparsed"].append(found["parsed"] is None)
    step = max(1, len(items) // max(1, read_aloud))
    for item, reply in list(zip(items, replies, strict=True))[::step][:read_aloud]:
        print(f"  {item.sample.task:>9}  wanted: {item.sample.target[:90]!r}")
        print(f"{'':>11}  reply:  {reply.strip()[:90]!r}", flush=True)
    means = {name: float(np.mean(values)) for name, values in figures.items()}
    return means | ({"wer": errors / words} if words else {})


class _Curves(TrainerCallback):
    """Keeps the stage's log and draws it, at every evaluation and at the end."""

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir))
            write_json(folder / "log.json", state.log_history)
            plot_log(state.log_history, folder / "curves.png")

    on_train_end = on_evaluate


_PANELS = (
    ("loss of a token (dashed: validation)", r"(?:eval_)?loss(?:_(?P<task>\w+))?"),
    ("token accuracy (dashed: validation)", r"(?:eval_)?token_accuracy_(?P<task>\w+)"),
    ("replies on validation", rf"eval_(?:accuracy_)?(?P<task>wer|unparsed|{'|'.join(TASKS)})"),
)
_COLOURS = {task: f"C{number}" for number, task in enumerate(TASKS)} | {"all": "black", "wer": "teal"}


def plot_log(history: Log, path: Path) -> None:
    """Losses, token accuracies and reply metrics over steps, a colour for each task."""
    from matplotlib.figure import Figure

    figure, lines = Figure(figsize=(16, 4.5), layout="constrained"), {}
    for axis, (title, pattern) in zip(figure.subplots(1, 3), _PANELS, strict=True):
        for name in sorted({name for entry in history for name in entry}):
            if not (found := re.fullmatch(pattern, name)):
                continue
            task, style = found["task"] or "all", "--" if name.startswith("eval_") else "-"
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            look = {"color": _COLOURS.get(task, "grey"), "linewidth": 2 if task == "all" else 1.2}
            (line,) = axis.plot(*zip(*points, strict=True), style, **look)
            lines.setdefault(task, line)
        axis.set(title=title, xlabel="step")
    if lines:
        figure.legend(list(lines.values()), list(lines), loc="outside right center")
    figure.savefig(path, dpi=100)


def is_finished(folder: Path) -> bool:
    """Whether `finish` has written the stage's checkpoint."""
    return (folder / "final" / "config.json").is_file()


def finish(run: Run, folder: Path, log: Log) -> None:
    """Writes the checkpoint `final/` into the folder, completely or not at all."""
    _fit_config(run.model)
    final = folder / "final"
    with atomic(final) as scratch:
        run.model.save_pretrained(scratch)
        run.processor.save_pretrained(scratch)
        write_json(scratch / "training_log.json", log)
        shutil.rmtree(final, ignore_errors=True)


def restore(run: Run, folder: Path) -> Log:
    """Loads the adapters of a finished stage into the model, and returns the training log up to its end.

    A checkpoint of other adapters is a ValueError.
    """
    final = folder / "final"
    state = load_file(final / "model.safetensors")
    wrong = (set(run.model.state_dict()) - set(run.model.frozen_keys())) ^ set(state)
    if wrong:
        raise ValueError(f"{final} does not fit the recipe's adapters: {', '.join(sorted(wrong)[:5])}.")
    load_state(run.model, state)
    _fit_config(run.model)
    return read_json(final / "training_log.json")


def _fit_config(model: DualSLMForConditionalGeneration) -> None:
    """The configuration has the size of the lexicon as the corpus made it."""
    if model.config.linguistic_adapter_type == "letters":
        lexicon = model.linguistic_adapter.lexicon
        model.config.linguistic_lexicon_size = len(lexicon.counts)
        model.config.linguistic_lexicon_pairs = len(lexicon.pairs)
