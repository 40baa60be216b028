"""The tables of the released checkpoints, from the folders of real speech and metadata that they were trained on.

    python -m dual_slm.training.released --data DATA --out TABLES
    cd TABLES && dual-slm train --recipe slm-smollm2-135m --output RUN
    python -m dual_slm.training.released --release RUN --out model_cards/dual-slm-smollm2-135m

and with `--commercial` and the recipe `slm-smollm2-135m-commercial` those without data whose licence forbids commercial use.

No speaker of a validation or test clip is trained on, and no sentence or dialogue of theirs but what these corpora let all
of their speakers say: RAVDESS's two sentences, VCTK's passage, digits.
TESS is left out: its licence forbids derivatives. What was made is not made again.
"""

import argparse
import gzip
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file

from .alignment import Aligner, AlignmentConfig, align_rows
from .attributes import Thresholds, label_row, measure_rows, write_thresholds
from .backbones import fast_dtype
from .corpora import dailytalk, styletalk
from .corpora.folder import read, read_folder
from .corpora.schema import Report, check_rows, read_table, share, write_table
from .corpora.synthesis import ENGINES, build, build_nonspeech
from .journal import Journal, write_text
from .warm_start import normalize

# Energy is cut by tertiles of RAVDESS's and LibriSpeech's training clips: by TextrolSpeech's borders 93 % of RAVDESS is
# low. Pitch and tempo have TextrolSpeech's.
THRESHOLDS = Thresholds(energy=(0.01274, 0.03689))
MOOD = (
    "You are a caring friend. Your friend sounds {emotion}. Answer in one or two short sentences, and react to the {emotion} "
    "mood first."
)
STYLES = {  # StyleTalk's -> emotions that say it (None: read speech), and in how many voices each such turn comes
    "neutral": (("neutral", None), 2),
    "friendly": (("calm", "happy", None), 2),
    "cheerful": (("happy",), 8),
    "sad": (("sad",), 12),
    "unfriendly": (("angry", "disgust"), 4),
}
SYNTHETIC_VOICES = 3_000  # synthetic clips that are measured, to teach how a voice sounds; all teach words
FOLDERS = ("librispeech_subset", "librispeech_4spk", "vctk_subset", "asterisk_prompts", "read_misc", "ravdess")
FOLDERS += ("fsdd_subset", "dailytalk_samples")
NOT_COMMERCIAL = {"ravdess", "piper"}  # CC BY-NC-SA; a voice that began from recordings for research


def held_out_dialogues(data: Path) -> set[str]:
    """DailyTalk's dialogues that a clip here is a turn of: all of these clips are test."""
    return {Path(row["audio"]).stem.split("_d")[-1] for row in read_folder(data / "dailytalk_samples")}


def sentences(data: Path) -> Iterator[str]:
    """Texts to speak: LibriSpeech train-clean-100, DailyTalk and StyleTalk, without what is held out."""
    metadata, report = data / "metadata", Report()
    held_out = {
        row["speaker"].split("_")[-1]
        for folder in ("librispeech_subset", "read_misc")
        for row in read_folder(data / folder)
        if row["split"] != "train" and row["speaker"]
    }
    speakers = (metadata / "LibriSpeech/SPEAKERS.TXT").read_text(encoding="utf-8").splitlines()
    allowed = {line.split("|")[0].strip() for line in speakers if "| train-clean-100" in line} - held_out
    texts = []
    with gzip.open(metadata / "LibriSpeech/transcripts_all.txt.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            name, text = line.split(" ", 1)
            if name.split("-")[0] in allowed:
                texts.append(text)
    held_out = held_out_dialogues(data)
    dialogues = dailytalk.read(metadata / "DailyTalk", report)
    texts += [r["transcript"] for r in dialogues if r["split"] == "train" and r["dialogue"] not in held_out]
    for row in styletalk.read(metadata / "StyleTalk", report):
        if row["split"] == "train":
            texts += [row["transcript"], row["response"]]
    return (" ".join(text.lower().split()) for text in texts if len(text.split()) >= 3)


def histories(data: Path) -> Iterator[dict]:
    """DailyTalk's dialogues as text alone."""
    held_out = held_out_dialogues(data)
    for row in dailytalk.read(data / "metadata/DailyTalk", Report()):
        if row["dialogue"] not in held_out:
            yield row | {"audio": None}


def recorded(data: Path, folders: list[str]) -> dict[str, list[dict]]:
    """Rows of the folders. LibriSpeech is in several of them: who trains in one is no validation speaker in another, and
    a clip that is in two is taken once."""
    tables = {folder: list(read(data / folder, Report())) for folder in folders}
    trained = {row["speaker"] for rows in tables.values() for row in rows if row["split"] == "train"} - {None}
    seen: set[tuple[str, str]] = set()
    for folder, rows in tables.items():
        new = [row for row in rows if (row["corpus"], row["id"]) not in seen]
        seen |= {(row["corpus"], row["id"]) for row in new}
        moved = [row["split"] == "validation" and row["speaker"] in trained for row in new]
        tables[folder] = [row | {"split": "train"} if m else row for row, m in zip(new, moved, strict=True)]
    return tables


def labelled(rows: Iterable[dict], table: Path) -> None:
    """Measures, labels and writes rows."""
    if not table.is_file():
        rows = (
            row | {"transcript": row["transcript"].lower()} if row["transcript"].isupper() else row for row in rows
        )
        report, journal = Report(), Journal(f"{table}.measured.jsonl")
        measured = measure_rows(list(check_rows(rows, report)), journal, report)
        count = write_table((label_row(row, {"all": THRESHOLDS}) for row in measured), table)
        journal.remove()
        print(f"{count:,} rows in {table}" + (f"\n{report}" if report else ""), flush=True)


def styled_dialogues(data: Path, clips: list[dict]) -> Iterator[dict]:
    """StyleTalk's turns and its answers to them, in voices of RAVDESS and of read speech: the corpus tells the style of a
    turn and has no audio here, so clips of that emotion and split lend their voices, each corpus as often (a model that
    RAVDESS's voices alone talk to answers all others with a description); a style that no clip has is left out. About half
    of the rows have no history. Half of its test turns are spoken by validation speakers, half by test speakers; a training
    turn that is a test turn word for word is left out."""
    rows = list(styletalk.read(data / "metadata/StyleTalk", Report()))
    held_out = [normalize(row["transcript"]) for row in rows if row["split"] == "test"]
    lending: dict[tuple[str, str], dict[str, list[dict]]] = {}  # (split, style) -> corpus -> clips
    for clip in clips:
        for style, (emotions, _) in STYLES.items():
            if clip["emotion"] in emotions:
                lending.setdefault((clip["split"], style), {}).setdefault(clip["corpus"], []).append(clip)
    for row in rows:
        split = "train" if row["split"] == "train" else "validation" if share(row["dialogue"]) < 0.5 else "test"
        if split == "train" and normalize(row["transcript"]) in held_out:
            continue
        corpora, copies = lending.get((split, row["emotion"])), STYLES[row["emotion"]][1]
        if corpora is None:
            continue
        history = row["history"]
        history = history[1:] if history and history[0]["role"] != "user" else history
        for copy in range(copies if split == "train" else 1):
            name = f"{row['id']}/{copy}"
            able = corpora[sorted(corpora)[int(share(name, 2) * len(corpora))]]
            voice = able[int(share(name) * len(able))]
            words = {"transcript": row["transcript"], "response": row["response"], "response_complete": True}
            words["history"] = history if share(name, 1) < 0.5 else []
            yield voice | words | {"id": name, "corpus": "styletalk-voice", "voice_only": True}


def moods(clips: list[dict], texts: dict[str, list[str]], journal: Journal) -> Iterator[dict]:
    """The frozen LLM's replies to words of DailyTalk in RAVDESS's voices, told the mood (captions it answers by talking about
    them), cut behind their last sentence. It is sorry for a loss whatever the mood: where the voice is not sad, such a
    reply is left out, and with it most of the angry, fearful, disgusted, surprised and neutral ones."""
    rows = []
    for split, said in texts.items():
        said = sorted((text for text in said if 4 <= len(text.split()) <= 14), key=share)
        able = sorted((clip for clip in clips if clip["split"] == split), key=lambda row: share(row["id"]))
        for number, row in enumerate(able + able):
            text = said[number * len(said) // (2 * len(able))]
            rows.append(row | {"id": f"{row['id']}/{number}", "corpus": "ravdess-voice", "transcript": text})
    config = AlignmentConfig(max_new_tokens=40, repetition_penalty=1.1, batch_size=32, mood=MOOD)
    report, aligner = Report(), Aligner("smollm2-135m-instruct", config, dtype=fast_dtype("bfloat16"))
    for row in align_rows(rows, aligner, journal, report):
        reply = re.match(r".*[.!?]", row["response"] or "", re.DOTALL)
        if reply and (row["emotion"] == "sad" or "your loss" not in reply[0]):
            said = {"response": reply[0], "response_complete": True, "voice_only": True}
            yield row | said | {"id": f"{row['id']}/mood", "corpus": "ravdess-voice-mood"}
    print(report, flush=True)


def release(run: Path, card: Path) -> None:
    """A run's `final` as a folder of model_cards, the large matrices in half precision: all are loaded in float32."""
    tensors = load_file(run / "final/model.safetensors")
    large = {name for name, t in tensors.items() if t.numel() > 2**18 and t.ndim > 1 and t.is_floating_point()}
    tensors = {name: t.half() if name in large else t for name, t in tensors.items()}
    card.mkdir(parents=True, exist_ok=True)
    for file in (run / "final").iterdir():
        if file.name != "model.safetensors":
            shutil.copyfile(file, card / file.name)
    save_file(tensors, card / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folders of real speech")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the tables, or of model_cards with --release"
    )
    parser.add_argument(
        "--release", type=Path, default=None, metavar="RUN", help="a finished run, to be put into --out"
    )
    parser.add_argument("--hours", type=float, default=8.0, help="of synthesised speech")
    parser.add_argument("--seed", type=int, default=1, help="of the synthesis")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), help="whose voices speak")
    parser.add_argument("--commercial", action="store_true", help=f"without {' and '.join(sorted(NOT_COMMERCIAL))}")
    args = parser.parse_args()
    if args.release:
        release(args.release, args.out)
        return
    if args.data is None:
        parser.error("--data is needed")
    data, out = args.data.resolve(), args.out.resolve()
    left_out = NOT_COMMERCIAL if args.commercial else set()
    folders = [name for name in FOLDERS if name not in left_out]
    engines = tuple(name for name in args.engines if name not in left_out)
    out.mkdir(parents=True, exist_ok=True)
    write_thresholds({"all": THRESHOLDS}, out / "thresholds.json")
    if not all((out / f"{folder}.parquet").is_file() for folder in folders):
        for folder, rows in recorded(data, folders).items():
            labelled(rows, out / f"{folder}.parquet")
    if not (out / "dailytalk.parquet").is_file():
        write_table(histories(data), out / "dailytalk.parquet")
    if not (out / "nonspeech/metadata.jsonl").is_file():
        build_nonspeech(out / "nonspeech", 400, args.seed)
    if not (out / "nonspeech.parquet").is_file():
        write_table(check_rows(read(out / "nonspeech", Report()), Report()), out / "nonspeech.parquet")
    if not (out / "sentences.txt").is_file():  # what is spoken, and the words that letters are spelled into
        write_text(out / "sentences.txt", "\n".join(sentences(data)) + "\n")
    if not (out / "synthetic/metadata.jsonl").is_file():
        build(list(sentences(data)), out / "synthetic", args.hours, args.seed, engines=engines)
    spoken = list(read(out / "synthetic", Report()))
    labelled(spoken[:SYNTHETIC_VOICES], out / "synthetic.parquet")
    if not (out / "styletalk_voice.parquet").is_file():
        clips = list(read_table(*(out / f"{name}.parquet" for name in (*folders, "synthetic"))))
        write_table(styled_dialogues(data, clips), out / "styletalk_voice.parquet")
    if "ravdess" in folders and not (out / "moods.parquet").is_file():
        acted = [row for row in read_table(out / "ravdess.parquet") if row["split"] != "test"]
        turns = [row for row in read_table(out / "dailytalk.parquet") if row["transcript"]]
        texts = {s: [t["transcript"] for t in turns if t["split"] == s] for s in ("train", "validation")}
        journal = Journal(out / "moods.replies.jsonl")
        write_table(moods(acted, texts, journal), out / "moods.parquet")
    if not (out / "synthetic_words.parquet").is_file():
        write_table(check_rows(spoken[SYNTHETIC_VOICES:], Report()), out / "synthetic_words.parquet")


if __name__ == "__main__":
    main()
