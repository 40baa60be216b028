"""What a checkpoint answers, in the tasks it was trained on, with both branches, one of them, or after a long history.

    python -m dual_slm.training.evaluation.replies CKPT --data TABLE --limit 48

Every prompt is drawn by (seed, id), so two checkpoints are asked the same.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..backbones import ASSETS
from ..corpora.schema import read_table, share
from ..tasks import ATTRIBUTES, Sample, label_sets, make_sample, parse_label, parse_transcript, tasks_of
from ..warm_start import normalize

SMALL_TALK = (ASSETS / "small_talk.txt").read_text(encoding="utf-8").splitlines()
# Sources of (paralinguistic, linguistic), and turns of small talk before the spoken one.
CONDITIONS = {
    "P&L": ("speech", "speech", 0),
    "P only": ("speech", "none", 0),
    "L only": ("none", "speech", 0),
    "P&L after 12 turns": ("speech", "speech", 12),
}


def conditioned(sample: Sample, paralinguistic: str, linguistic: str, turns: int) -> Sample:
    """The sample with other sources of its branches, and so many turns of small talk before its spoken turn."""
    history = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(SMALL_TALK[:turns])]
    *earlier, turn = sample.messages
    sources = {"paralinguistic": paralinguistic, "linguistic": linguistic}
    content = [part | sources if part["type"] == "audio" else part for part in turn["content"]]
    return replace(sample, messages=[*earlier, *history, turn | {"content": content}])


def ask(model, processor, samples: list[Sample], max_new_tokens: int = 32, batch_size: int = 32) -> list[str]:
    """Greedy replies, batches of similar length."""
    order = sorted(range(len(samples)), key=lambda i: samples[i].duration or 0.0)
    replies = [""] * len(samples)
    for start in tqdm(range(0, len(order), batch_size), desc="replies", unit=" batches", leave=False):
        part = order[start : start + batch_size]
        inputs = processor.apply_chat_template(
            [samples[i].messages for i in part], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        for i, ids in zip(part, output[:, inputs["input_ids"].shape[1] :], strict=True):
            replies[i] = processor.decode(ids, skip_special_tokens=True).strip()
    return replies


def evaluate_replies(
    model, processor, rows: list[dict], choices, conditions=CONDITIONS, limit: int = 48, seed: int = 0
):
    """For each condition and task: accuracy (WER for asr), share of unparsed replies, number of samples.

    Args:
        rows: of one split; `limit` of each corpus a task.
        choices: as `tasks.label_sets` of the whole table.
    """
    import jiwer

    samples = []
    for task in ("asr", *ATTRIBUTES):
        taken: dict[str, int] = defaultdict(int)
        # RAVDESS has two sentences and says nothing about words.
        able = [r for r in rows if task in tasks_of(r) and not (task == "asr" and r["corpus"] == "ravdess")]
        able.sort(key=lambda row: share(row["id"], seed))
        for row in able:
            if taken[row["corpus"]] < limit:
                taken[row["corpus"]] += 1
                samples.append((row, make_sample(row, task, choices, seed)))
    result = {}
    for name, (how, what, turns) in conditions.items():
        asked = [conditioned(sample, how, what, turns) for _, sample in samples]
        replies = ask(model, processor, asked)
        figures: dict[str, dict[str, list]] = defaultdict(
            lambda: {"right": [], "unparsed": [], "said": [], "heard": []}
        )
        for (row, sample), reply in zip(samples, replies, strict=True):
            found = figures[sample.task]
            if sample.task == "asr":
                found["said"].append(" ".join(normalize(row["transcript"])))
                found["heard"].append(" ".join(normalize(parse_transcript(reply))))
            else:
                label = parse_label(reply, sample.choices)
                found["right"].append(label == sample.label)
                found["unparsed"].append(label is None)
        result[name] = {
            task: {"wer": jiwer.wer(f["said"], f["heard"]), "n": len(f["said"])}
            if task == "asr"
            else {
                "accuracy": sum(f["right"]) / len(f["right"]),
                "unparsed": sum(f["unparsed"]) / len(f["right"]),
                "n": len(f["right"]),
            }
            for task, f in figures.items()
        }
    return result


def main() -> None:
    from ... import DualSLMForConditionalGeneration, DualSLMProcessor

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", nargs="+", required=True, help="tables of `dual-slm corpus`")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=48, help="rows of each corpus a task")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", default=None, help="JSON file")
    args = parser.parse_args()
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = DualSLMForConditionalGeneration.from_pretrained(args.checkpoint, dtype=dtype)
    processor = DualSLMProcessor.from_pretrained(args.checkpoint)
    table = list(read_table(*args.data))
    rows = [row for row in table if row["split"] == args.split and row["audio"]]
    result = evaluate_replies(model, processor, rows, label_sets(table), limit=args.limit)
    for name, figures in result.items():
        shown = [f"{t} {f.get('wer', f.get('accuracy')):.1%}" for t, f in figures.items()]
        print(f"{name:20} " + ", ".join(shown))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
