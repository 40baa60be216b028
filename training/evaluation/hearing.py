"""What the two branches hear, before the LLM: word error rate of `heard` and accuracy of the attributes.

    python -m dual_slm.training.evaluation.hearing model_cards/dual-slm-smollm2-135m --data ../shared/data

Speakers of the test splits only. Intervals are 95 % bootstrap intervals over speakers.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..attributes import Thresholds, classify, measure
from ..corpora.folder import read_folder
from ..features import load_row

ASR_CORPORA = ("librispeech_subset", "vctk_subset", "read_misc")
ATTRIBUTE_CORPORA = ("ravdess", "librispeech_subset")


def bootstrap(
    groups: dict[str, list], figure: Callable[[list], float], draws: int = 1000, seed: int = 0
) -> list[float]:
    """95 % interval of `figure` over resampled speakers; `groups` maps a speaker to its items."""
    rng = np.random.default_rng(seed)
    speakers = list(groups)
    values = []
    for _ in range(draws):
        drawn = rng.choice(len(speakers), len(speakers))
        values.append(figure([item for i in drawn for item in groups[speakers[i]]]))
    return [float(v) for v in np.nanquantile(values, [0.025, 0.975])]


def listen(model, processor, rows: list[dict], seconds: float = 60.0) -> list[dict]:
    """`heard` and `attributes` of each row, in batches of about `seconds` of audio."""
    clips = [load_row(row, processor.sampling_rate) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(clips[i]))
    result: list[dict] = [{}] * len(rows)
    size = max(1, int(seconds * processor.sampling_rate / max(len(c) for c in clips)))
    for start in tqdm(range(0, len(order), size), desc="listening", leave=False):
        batch = order[start : start + size]
        inputs = processor.extract_features([clips[i] for i in batch])
        with torch.inference_mode():
            heard = processor.decode_audio(model.get_audio_features(**inputs))
        for i, item in zip(batch, heard, strict=True):
            result[i] = item
    return result


def word_error_rate(pairs: list[tuple[str, str]]) -> float:
    """Of (said, heard) pairs, already normalised."""
    import jiwer

    return jiwer.wer([said for said, _ in pairs], [heard for _, heard in pairs])


def evaluate_asr(model, processor, rows: list[dict], whisper: str | None = None) -> dict:
    """WER with Whisper's English normaliser, and of Whisper's own decoder on the same clips if its folder is given."""
    from whisper_normalizer.english import EnglishTextNormalizer

    from ..backbones import transcriber

    normalize = EnglishTextNormalizer()
    systems = {"heard": [item["heard"] for item in listen(model, processor, rows)]}
    if whisper is not None:
        transcribe = transcriber(whisper)
        systems["whisper_decoder"] = [transcribe(load_row(row)) for row in tqdm(rows, desc="Whisper", leave=False)]
    result: dict = {"clips": len(rows), "speakers": len({row["speaker"] for row in rows})}
    for name, texts in systems.items():
        groups = defaultdict(list)
        for row, text in zip(rows, texts, strict=True):
            groups[row["speaker"]].append((normalize(row["transcript"]), normalize(text)))
        pairs = [pair for group in groups.values() for pair in group]
        result[name] = {"wer": word_error_rate(pairs), "interval": bootstrap(groups, word_error_rate)}
    result["examples"] = [
        {"said": row["transcript"].lower(), "heard": text}
        for row, text in list(zip(rows, systems["heard"], strict=True))[:8]
    ]
    return result


def true_attributes(row: dict, samples: np.ndarray, rate: int, thresholds: Thresholds) -> dict[str, str | None]:
    """Gender and emotion of the table; pitch, energy and tempo measured in this very clip."""
    return {
        "gender": row["gender"],
        "emotion": row["emotion"],
        **classify(measure(samples, rate, row["transcript"]), thresholds),
    }


def evaluate_attributes(model, processor, rows: list[dict], thresholds: Thresholds) -> dict:
    """Accuracy, unweighted accuracy and the majority class of each attribute."""
    heard = listen(model, processor, rows)
    truth = [
        true_attributes(r, load_row(r), processor.sampling_rate, thresholds) for r in tqdm(rows, desc="measuring")
    ]
    result: dict = {"clips": len(rows), "speakers": len({row["speaker"] for row in rows})}
    for name in processor.attribute_labels:
        groups = defaultdict(list)
        for row, item, true in zip(rows, heard, truth, strict=True):
            if true[name] is not None:
                probabilities = item["attributes"][name]
                groups[row["speaker"]].append((true[name], max(probabilities, key=probabilities.get)))
        pairs = [pair for group in groups.values() for pair in group]
        if not pairs:
            continue
        counts = defaultdict(int)
        for true, _ in pairs:
            counts[true] += 1
        result[name] = {
            "accuracy": _accuracy(pairs),
            "interval": bootstrap(groups, _accuracy),
            "unweighted": _unweighted(pairs),
            "majority": max(counts.values()) / len(pairs),
            "counts": dict(counts),
        }
    return result


def _accuracy(pairs: list[tuple[str, str]]) -> float:
    return sum(true == said for true, said in pairs) / len(pairs) if pairs else math.nan


def _unweighted(pairs: list[tuple[str, str]]) -> float:
    classes = {true for true, _ in pairs}
    return sum(_accuracy([pair for pair in pairs if pair[0] == c]) for c in classes) / len(classes)


def evaluate_hearing(
    model, processor, data: Path, thresholds: Thresholds, whisper: str | None, split: str = "test"
) -> dict:
    """The figures of the card: WER on read speech, attributes on RAVDESS, speakers of `split` only."""
    asr = {}
    for folder in ASR_CORPORA:
        rows = [r for r in read_folder(data / folder) if r["split"] == split and r["transcript"]]
        if rows:
            asr[folder] = evaluate_asr(model, processor, rows, whisper)
    attributes = {}
    for folder in ATTRIBUTE_CORPORA:
        rows = [r for r in read_folder(data / folder) if r["split"] == split]
        attributes[folder] = evaluate_attributes(model, processor, rows, thresholds)
    return {"split": split, "asr": asr, "attributes": attributes}


def table(result: dict) -> str:
    """The figures as Markdown."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f}"

    def interval(entry: dict) -> str:
        low, high = entry["interval"]
        return f"{percent(low)}–{percent(high)}"

    lines = [
        "| words: WER %, lower is better | clips / speakers | heard | 95 % interval | Whisper base's own decoder |",
        "|---|---|---|---|---|",
    ]
    for folder, entry in result["asr"].items():
        decoder = percent(entry["whisper_decoder"]["wer"]) if "whisper_decoder" in entry else ""
        lines.append(
            f"| {folder} | {entry['clips']} / {entry['speakers']} | {percent(entry['heard']['wer'])} | "
            f"{interval(entry['heard'])} | {decoder} |"
        )
    for corpus, entry in result["attributes"].items():
        head = f"| {corpus}, {entry['clips']} clips of {entry['speakers']} speakers: accuracy %"
        lines += ["", head + " | heard | 95 % interval | unweighted | majority class |", "|---|---|---|---|---|"]
        for name, figures in entry.items():
            if isinstance(figures, dict):
                lines.append(
                    f"| {name} | {percent(figures['accuracy'])} | {interval(figures)} | "
                    f"{percent(figures['unweighted'])} | {percent(figures['majority'])} |"
                )
    return "\n".join(lines)


def main() -> None:
    from ... import DualSLMForConditionalGeneration, DualSLMProcessor
    from ...modeling_dual_slm import resolve_backbone

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument(
        "--encoder-padding",
        choices=["max_length", "real"],
        default=None,
        help="encode otherwise than the checkpoint was trained, to see what that costs",
    )
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    model = DualSLMForConditionalGeneration.from_pretrained(args.checkpoint)
    processor = DualSLMProcessor.from_pretrained(args.checkpoint)
    if args.encoder_padding is not None:
        model.config.encoder_padding = processor.encoder_padding = args.encoder_padding
    thresholds = Thresholds(**(model.config.attribute_thresholds or {}))
    whisper = resolve_backbone(model.config.audio_model_id)
    result = evaluate_hearing(model, processor, args.data, thresholds, whisper, args.split)
    print(table(result))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
