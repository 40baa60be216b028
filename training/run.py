"""Makes the released checkpoint `dual-slm-smollm2-135m` again, from raw audio to the card.

    python -m dual_slm.training.run --data ../shared/data --work runs/smollm2 --output model_cards/dual-slm-smollm2-135m

Synthetic speech and encoder features are kept in `--work` and not made again; the training itself starts anew.
"""

import argparse
import collections
import csv
import gzip
import json
import re
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoFeatureExtractor, AutoTokenizer

from .. import DualSLMForConditionalGeneration, DualSLMProcessor
from ..configuration_dual_slm import WARM_START_ADAPTERS
from ..modeling_dual_slm import resolve_backbone
from ..processing_dual_slm import CaptionSlots
from .attributes import Thresholds
from .backbones import ASSETS, fetch_backbone
from .corpora.folder import read_folder
from .corpora.synthesis import build
from .evaluation.hearing import evaluate_hearing, table
from .features import FeatureCache
from .warm_start import Speller, caption_targets, normalize, train_linguistic, train_paralinguistic

CAPTION_TEMPLATE = "({gender} voice, {pitch} pitch, {tempo} tempo, {energy} energy, {emotion} emotion)"
ATTRIBUTE_LABELS = {
    "gender": ["female", "male"],
    "pitch": ["low", "normal", "high"],
    "tempo": ["slow", "normal", "fast"],
    "energy": ["low", "normal", "high"],
    "emotion": ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"],
}
# Real corpora and how many augmented copies of each clip are added. TESS is left out: its licence forbids derivatives.
LINGUISTIC = {"librispeech_subset": 3, "librispeech_4spk": 3, "vctk_subset": 3, "asterisk_prompts": 1, "read_misc": 3}
LINGUISTIC |= {"fsdd_subset": 0}
PARALINGUISTIC = {
    "ravdess": 4,
    "librispeech_subset": 1,
    "librispeech_4spk": 0,
    "vctk_subset": 2,
    "asterisk_prompts": 0,
}
PARALINGUISTIC_SYNTHETIC = 1_500  # clips


def sentences(data: Path) -> list[str]:
    """Texts to synthesise: LibriSpeech train-clean-100 without any speaker held out here, DailyTalk, StyleTalk train."""
    held_out = set()
    for folder in ("librispeech_subset", "librispeech_4spk", "read_misc"):
        for row in read_folder(data / folder):
            if row["split"] != "train" and row["speaker"]:
                held_out.add(row["speaker"].split("_")[-1])
    metadata = data / "metadata"
    speakers = (metadata / "LibriSpeech/SPEAKERS.TXT").read_text(encoding="utf-8").splitlines()
    allowed = {line.split("|")[0].strip() for line in speakers if "| train-clean-100" in line} - held_out
    texts = []
    with gzip.open(metadata / "LibriSpeech/transcripts_all.txt.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            name, text = line.split(" ", 1)
            if name.split("-")[0] in allowed:
                texts.append(text.strip().lower())
    for line in (metadata / "DailyTalk/dailytalk_dialogs.jsonl").read_text(encoding="utf-8").splitlines():
        texts += [turn["text"] for turn in json.loads(line)["turns"]]
    with open(metadata / "StyleTalk/train.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            texts += [re.sub(r"^[AB]\s*:\s*", "", row["curr_text"].strip()), row["res_text"].strip()]
    return [text for text in texts if len(text.split()) >= 3]


def augmented(rows: list[dict], copies: int) -> list[dict]:
    """The rows, and `copies` of each that `features.load_row` will change, every copy in its own way."""
    return rows + [row | {"augment": copy} for copy in range(1, copies + 1) for row in rows]


def training_rows(
    data: Path, synthetic: Path, recipe: dict[str, int], limit_synthetic: int | None = None
) -> list[dict]:
    rows = []
    for folder, copies in recipe.items():
        train = [row for row in read_folder(data / folder) if row["split"] == "train" and row["transcript"]]
        rows += augmented(train, copies)
    return rows + read_folder(synthetic)[:limit_synthetic]


def held_out_rows(data: Path, folder: str, split: str) -> list[dict]:
    return [row for row in read_folder(data / folder) if row["split"] == split and row["transcript"]]


def new_model() -> tuple[DualSLMForConditionalGeneration, DualSLMProcessor]:
    audio, text = "whisper-base", "smollm2-135m-instruct"
    for name in (audio, text):
        fetch_backbone(name)
    tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(text))
    slots = CaptionSlots(tokenizer, CAPTION_TEMPLATE, ATTRIBUTE_LABELS)
    fields = WARM_START_ADAPTERS | {
        "num_paralinguistic_tokens": slots.num_slots,
        "paralinguistic_soft_vocab_size": len(slots.token_ids),
        "caption_template": CAPTION_TEMPLATE,
        "attribute_labels": ATTRIBUTE_LABELS,
    }
    model = DualSLMForConditionalGeneration.from_backbones(audio, text, **fields)
    extractor = AutoFeatureExtractor.from_pretrained(resolve_backbone(audio))
    processor = DualSLMProcessor.from_config(model.config, extractor, tokenizer)
    model.paralinguistic_adapter.soft_tokens.token_ids = torch.tensor(slots.token_ids)
    return model, processor


def word_errors(model, cache: FeatureCache, processor: DualSLMProcessor) -> float:
    """WER of `heard` on cached clips, over bare lower-case words: the quick figure that training is watched by."""
    import jiwer

    said, heard = [], []
    adapter, embedding = model.linguistic_adapter, model.get_input_embeddings()
    with torch.inference_mode():
        for index, row in enumerate(cache.rows):
            frames = cache.get(index, "frames").float()[None]
            _, _, ids = adapter(frames, torch.tensor([frames.shape[1]]), embedding)
            said.append(" ".join(normalize(row["transcript"])))
            heard.append(" ".join(normalize(processor.decode(ids))))
    return jiwer.wer(said, heard)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=16.0, help="synthesised speech")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(500, 1700), help="CTC steps over 2,379 and 9,085 pieces"
    )
    parser.add_argument("--caption-steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.time()
    torch.manual_seed(args.seed)

    synthetic = args.work / "synthetic"
    texts = sentences(args.data)
    if not (synthetic / "metadata.jsonl").is_file():
        build(texts, synthetic, args.hours, args.seed)
    model, processor = new_model()
    features = args.work / "features"

    def cached(rows: list[dict], kind: str) -> FeatureCache:
        return FeatureCache(features, rows, kind, model.config).build(model, processor)

    frames = cached(training_rows(args.data, synthetic, LINGUISTIC), "frames")
    validation = cached(held_out_rows(args.data, "librispeech_subset", "validation"), "frames")
    words = collections.Counter(word for text in texts for word in normalize(text))
    tokenizer = processor.tokenizer
    log = []
    for index, (pieces, steps) in enumerate(zip((2_379, 9_085), args.steps, strict=True)):
        log += train_linguistic(
            model,
            frames,
            Speller(tokenizer, words, pieces),
            steps,
            seed=args.seed + index,
            evaluate=lambda _: {"validation_wer": round(word_errors(model, validation, processor), 4)},
        )
    # Forty minutes of work, should anything below fail.
    save_file(model.linguistic_adapter.state_dict(), args.work / "linguistic.safetensors")

    pooled = cached(
        training_rows(args.data, synthetic, PARALINGUISTIC, limit_synthetic=PARALINGUISTIC_SYNTHETIC), "pooled"
    )
    pooled_validation = cached(held_out_rows(args.data, "ravdess", "validation"), "pooled")
    energy = [pooled.get(i, "measured")[1].item() for i in range(len(pooled.rows))]
    thresholds = Thresholds(energy=tuple(round(float(q), 5) for q in np.quantile(energy, [1 / 3, 2 / 3])))
    model.config.attribute_thresholds = asdict(thresholds)
    targets = caption_targets(pooled, processor, thresholds)
    held_out = caption_targets(pooled_validation, processor, thresholds)
    log += train_paralinguistic(
        model,
        pooled,
        targets,
        args.caption_steps,
        seed=args.seed,
        evaluate=lambda _: slot_accuracy(model, pooled_validation, held_out, processor),
    )
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    about = {"seed": args.seed, "steps": args.steps, "hours": args.hours}
    about["minutes"] = round((time.time() - started) / 60)
    (args.output / "training_log.json").write_text(
        json.dumps({**about, "log": log}, indent=1) + "\n", encoding="utf-8"
    )
    write_card(args.output, args.data)


def slot_accuracy(model, cache: FeatureCache, targets: torch.Tensor, processor: DualSLMProcessor) -> dict[str, float]:
    """Accuracy of each attribute's first slot on cached clips: the quick figure that training is watched by."""
    pooled = torch.stack([cache.get(i, "pooled") for i in range(len(cache.rows))])
    with torch.inference_mode():
        adapter = model.paralinguistic_adapter
        rows = adapter.soft_tokens.rows(model.get_input_embeddings())
        best = adapter.soft_tokens.logits(adapter.project(pooled), rows).argmax(-1)
    figures = {}
    for name, place in processor.caption_slots.fields.items():
        known = targets[:, place.start] != -100
        figures[name] = round((best[known, place.start] == targets[known, place.start]).float().mean().item(), 4)
    return figures


def write_card(checkpoint: Path, data: Path) -> None:
    """Evaluates a checkpoint as a user loads it; writes evaluation.json and README.md (its text: assets/card.md) there."""
    model = DualSLMForConditionalGeneration.from_pretrained(checkpoint)
    processor = DualSLMProcessor.from_pretrained(checkpoint)
    thresholds = Thresholds(**model.config.attribute_thresholds)
    result = evaluate_hearing(model, processor, data, thresholds, resolve_backbone(model.config.audio_model_id))
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (checkpoint / "evaluation.json").write_text(text, encoding="utf-8")
    made = json.loads((checkpoint / "training_log.json").read_text(encoding="utf-8"))
    examples = [f"| {e['said']} | {e['heard']} |" for e in result["asr"]["librispeech_subset"]["examples"][:5]]
    linguistic = [entry for entry in made["log"] if entry["stage"] == "linguistic"]
    card = (ASSETS / "card.md").read_text(encoding="utf-8")
    card = card.format(
        table=table(result),
        examples="\n".join(examples),
        pitch="{:.1f} and {:.1f} Hz".format(*thresholds.pitch),
        energy="{:.4f} and {:.4f}".format(*thresholds.energy),
        tempo="{:.3f} and {:.3f} s a word".format(*thresholds.tempo),
        steps=" and ".join(str(steps) for steps in made["steps"]),
        final_loss=linguistic[-1]["loss"],
        **{name: made[name] for name in ("seed", "hours", "minutes")},
    )
    (checkpoint / "README.md").write_text(card, encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
