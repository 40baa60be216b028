"""Makes the tables of the released checkpoints from folders of real speech and metadata, and their model cards.

    python -m dual_slm.training.released --data DATA --out TABLES
    cd TABLES && dual-slm train --recipe letters-whisper-base --output words
    dual-slm train --recipe slm-smollm2-135m --output RUN
    python -m dual_slm.training.released --release RUN --tables TABLES --data DATA --out model_cards/dual-slm-smollm2-135m

With `--commercial` and the recipe `slm-smollm2-135m-commercial`, data is left out whose licence forbids commercial use.

The splits are speaker-disjoint. No sentence or dialogue of a validation or test clip is trained on, except what a corpus
lets all of its speakers say: RAVDESS's two sentences, VCTK's passage, digits. A release with words of held-out speakers is
refused, see `provenance`. TESS is left out because its licence forbids derivatives. Tables that exist are not made again.
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
from .corpora import dailytalk, styletalk
from .corpora.checks import Report, check_rows
from .corpora.folder import read, read_folder
from .corpora.nonspeech import build_nonspeech
from .corpora.row import Row
from .corpora.synthesis import build
from .corpora.table import read_table, write_table
from .corpora.voices import ENGINES
from .files import Journal, read_lines, write_text
from .hardware import fast_dtype
from .provenance import SAME_WORDS, check_release, held_out_texts, write_overlap
from .text import hash_uniform, word_tuple

# Energy is cut by tertiles of RAVDESS's and LibriSpeech's training clips: by TextrolSpeech's borders 93 % of RAVDESS is
# low. Pitch and tempo have TextrolSpeech's.
THRESHOLDS = Thresholds(energy=(0.01274, 0.03689))
MOOD = (
    "You are a caring friend. Your friend sounds {emotion}. Answer in one or two short sentences, and react to the {emotion} "
    "mood first."
)
STYLES = {  # StyleTalk's -> emotions whose voices speak it (None: read speech), and in how many voices each turn comes
    "neutral": (("neutral", None), 2),
    "friendly": (("calm", "happy", None), 2),
    "cheerful": (("happy",), 8),
    "sad": (("sad",), 12),
    "unfriendly": (("angry", "disgust"), 4),
}
SYNTHETIC_VOICES = 3_000  # synthetic clips that are measured, to teach how a voice sounds; all teach words
FOLDERS = ("librispeech_subset", "librispeech_4spk", "vctk_subset", "asterisk_prompts", "read_misc", "ravdess")
FOLDERS += ("fsdd_subset", "dailytalk_samples")
TESTS = ("librispeech_test_clean",)  # folders of test speakers alone
NOT_COMMERCIAL = {"ravdess", "piper"}  # CC BY-NC-SA; a voice that began from recordings for research
ROOT = Path(__file__).resolve().parents[1]  # of the repository, with the modules that a checkpoint needs


def held_out_dialogues(data: Path) -> set[str]:
    """DailyTalk's dialogues that have a clip among the samples, which are all test clips."""
    return {Path(str(row.audio)).stem.split("_d")[-1] for row in read_folder(data / "dailytalk_samples")}


def sentences(data: Path) -> list[str]:
    """Texts to speak and to count, from an allowlist: what speakers with a training clip say, and text corpora.

    These are LibriSpeech train-clean-100, DailyTalk and StyleTalk. A text that is held out is left out.
    """
    texts, held_out = texts_by_use(data)
    known = set(map(word_tuple, held_out))
    long = (" ".join(text.lower().split()) for text in texts if len(text.split()) >= 3)
    return [text for text in dict.fromkeys(long) if word_tuple(text) not in known]


def texts_by_use(data: Path) -> tuple[list[str], list[str]]:
    """Texts that may be spoken and counted, and texts of held-out clips, speakers and dialogues."""
    metadata, report = data / "metadata", Report()
    rows = [row for clips in recorded(data, [*FOLDERS, *TESTS]).values() for row in clips]
    texts, others = _librispeech_texts(metadata / "LibriSpeech", {row.speaker for row in rows if row.split == "train"})
    held_out, missing = [*others, *held_out_texts(rows)], held_out_dialogues(data)
    for row in dailytalk.read(metadata / "DailyTalk", report):
        keep = row.split == "train" and row.dialogue not in missing
        (texts if keep else held_out).append(str(row.transcript))
    for row in styletalk.read(metadata / "StyleTalk", report):
        (texts if row.split == "train" else held_out).extend([str(row.transcript), str(row.response)])
    return texts, held_out


def _librispeech_texts(folder: Path, speakers: set[str | None]) -> tuple[list[str], list[str]]:
    """The transcripts of train-clean-100 by these speakers, and those of all other speakers."""
    lines = (folder / "SPEAKERS.TXT").read_text(encoding="utf-8").splitlines()
    clean = {line.split("|")[0].strip() for line in lines if "| train-clean-100" in line}
    texts, others = [], []
    with gzip.open(folder / "transcripts_all.txt.gz", "rt", encoding="utf-8") as file:
        for name, text in (line.split(" ", 1) for line in file):
            number = name.split("-")[0]
            if f"librispeech_{number}" not in speakers:
                others.append(text.strip())
            elif number in clean:
                texts.append(text.strip())
    return texts, others


def histories(data: Path) -> Iterator[Row]:
    """DailyTalk's dialogues as text alone."""
    held_out = held_out_dialogues(data)
    rows = dailytalk.read(data / "metadata/DailyTalk", Report())
    yield from (row.replace(audio=None) for row in rows if row.dialogue not in held_out)


def recorded(data: Path, folders: list[str]) -> dict[str, list[Row]]:
    """Rows of each folder.

    LibriSpeech is in several folders. A clip that is in two is taken once, and a validation speaker of one folder who is
    a training speaker of another becomes a training speaker. A training clip with the words of a held-out clip is left
    out, but for corpora that let all of their speakers say the same.
    """
    tables = {folder: list(read(data / folder, Report())) for folder in folders}
    trained = {row.speaker for rows in tables.values() for row in rows if row.split == "train"} - {None}
    seen: set[tuple[str, str]] = set()
    for folder, rows in tables.items():
        new = [row for row in rows if row.key not in seen]
        seen |= {row.key for row in new}
        moved = [row.split == "validation" and row.speaker in trained for row in new]
        tables[folder] = [row.replace(split="train") if m else row for row, m in zip(new, moved, strict=True)]
    held_out = set(map(word_tuple, held_out_texts(row for rows in tables.values() for row in rows))) - {()}
    for folder, rows in tables.items():
        leaky = [
            row.split == "train" and row.corpus not in SAME_WORDS and word_tuple(row.transcript or "") in held_out
            for row in rows
        ]
        tables[folder] = [row for row, out in zip(rows, leaky, strict=True) if not out]
    return tables


def labelled(rows: Iterable[Row], table: Path) -> None:
    """Measures, labels and writes rows unless the table exists; transcripts in capitals become lower case."""
    if table.is_file():
        return
    rows = (row.replace(transcript=t.lower()) if (t := row.transcript) and t.isupper() else row for row in rows)
    report, journal = Report(), Journal(f"{table}.measured.jsonl")
    measured = measure_rows(list(check_rows(rows, report)), journal, report)
    count = write_table((label_row(row, {"all": THRESHOLDS}) for row in measured), table)
    journal.remove()
    print(f"{count:,} rows in {table}" + (f"\n{report}" if report else ""), flush=True)


def styled_dialogues(data: Path, tables: list[Path]) -> Iterator[Row]:
    """StyleTalk's turns with its responses, in voices of RAVDESS and of read speech.

    The corpus names the style of a turn and has no audio here. So clips of that emotion and split lend their voices, each
    corpus equally often: a model that hears RAVDESS's voices alone in dialogues answers all others with a description.
    A style that no clip has is left out. About half of the rows have no history. Validation speakers speak half of the
    test turns, test speakers the other half. A training turn with the words of a test turn is left out.
    """
    rows = list(styletalk.read(data / "metadata/StyleTalk", Report()))
    held_out = {word_tuple(str(row.transcript)) for row in rows if row.split == "test"}
    lending: dict[tuple[str, str], dict[str, list[Row]]] = {}  # (split, style) -> corpus -> clips
    for clip in read_table(*tables):
        for style, (emotions, _) in STYLES.items():
            if clip.emotion in emotions:
                lending.setdefault((clip.split, style), {}).setdefault(clip.corpus, []).append(clip)
    for row in rows:
        style = str(row.emotion)
        split, copies = "train", STYLES[style][1]
        if row.split != "train":
            split, copies = "validation" if hash_uniform(str(row.dialogue)) < 0.5 else "test", 1
        corpora = lending.get((split, style))
        if corpora is None or (split == "train" and word_tuple(str(row.transcript)) in held_out):
            continue
        said = {"transcript": row.transcript, "response": row.response, "response_complete": True, "voice_only": True}
        history = row.history[1:] if row.history and row.history[0]["role"] != "user" else row.history
        for name in (f"{row.id}/{copy}" for copy in range(copies)):
            able = corpora[sorted(corpora)[int(hash_uniform(name, 2) * len(corpora))]]
            clip = able[int(hash_uniform(name) * len(able))].replace(id=name, corpus="styletalk-voice", **said)
            yield clip.replace(history=history if hash_uniform(name, 1) < 0.5 else [])


def moods(tables: Path) -> Iterator[Row]:
    """Responses of the frozen LLM to sentences of DailyTalk in RAVDESS's voices, whose emotion the LLM is told.

    It is told the emotion and not a caption, because it answers captions by talking about them. A response is cut behind
    its last sentence. The LLM is sorry for a loss whatever the emotion: such a response is left out unless the voice is
    sad. With it go most of the angry, fearful, disgusted, surprised and neutral responses.
    """
    clips = sorted(read_table(tables / "ravdess.parquet"), key=lambda row: hash_uniform(row.id))
    turns = [row for row in read_table(tables / "dailytalk.parquet") if 4 <= len((row.transcript or "").split()) <= 14]
    rows = []
    for split in ("train", "validation"):
        texts = sorted((str(turn.transcript) for turn in turns if turn.split == split), key=hash_uniform)
        able = [clip for clip in clips if clip.split == split]
        for number, row in enumerate(able + able):
            text = texts[number * len(texts) // (2 * len(able))]
            rows.append(row.replace(id=f"{row.id}/{number}", corpus="ravdess-voice", transcript=text))
    config = AlignmentConfig(max_new_tokens=40, repetition_penalty=1.1, batch_size=32, mood=MOOD)
    report, aligner = Report(), Aligner("smollm2-135m-instruct", config, dtype=fast_dtype("bfloat16"))
    for row in align_rows(rows, aligner, Journal(tables / "moods.replies.jsonl"), report):
        reply = re.match(r".*[.!?]", row.response or "", re.DOTALL)
        if reply and (row.emotion == "sad" or "your loss" not in reply[0]):
            said = {"response": reply[0], "response_complete": True, "voice_only": True}
            yield row.replace(id=f"{row.id}/mood", corpus="ravdess-voice-mood", **said)
    print(report, flush=True)


def release(run: Path, card: Path) -> None:
    """Writes a run's `final` into a model card's folder, the large matrices in half precision (all load in float32).

    In `model_cards` of this repository, the modules of the model are links to those at its root. Elsewhere they are files.
    """
    tensors = load_file(run / "final/model.safetensors")
    large = {name for name, t in tensors.items() if t.numel() > 2**18 and t.ndim > 1 and t.is_floating_point()}
    tensors = {name: t.half() if name in large else t for name, t in tensors.items()}
    card.mkdir(parents=True, exist_ok=True)
    linked = card.resolve().parent == ROOT / "model_cards"
    for file in (run / "final").iterdir():
        if file.name == "model.safetensors":
            continue
        target = card / file.name
        target.unlink(missing_ok=True)  # a copy onto a link would overwrite the module itself
        if linked and file.suffix == ".py" and (ROOT / file.name).is_file():
            target.symlink_to(Path("../..", file.name))
        else:
            shutil.copyfile(file, target)
    save_file(tensors, card / "model.safetensors", metadata={"format": "pt"})


def _write_once(rows: Iterator[Row], table: Path) -> None:
    if not table.is_file():
        write_table(rows, table)


def make_tables(data: Path, out: Path, folders: list[str], engines: list[str], hours: float, seed: int) -> None:
    """Makes the tables in `out`, each unless it exists.

    Args:
        data: has the folders of real speech and `metadata`.
        engines, hours, seed: of the synthetic speech.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_thresholds({"all": THRESHOLDS}, out / "thresholds.json")
    wanted = [*folders, *TESTS]
    if not all((out / f"{folder}.parquet").is_file() for folder in wanted):
        for folder, rows in recorded(data, wanted).items():
            labelled(rows, out / f"{folder}.parquet")
    _write_once(histories(data), out / "dailytalk.parquet")
    if not (out / "nonspeech/metadata.jsonl").is_file():
        build_nonspeech(out / "nonspeech", 400, seed)
    _write_once(check_rows(read(out / "nonspeech", Report()), Report()), out / "nonspeech.parquet")
    if not (out / "sentences.txt").is_file():  # what is spoken, and what the decoding lexicon is made of
        write_text(out / "sentences.txt", "\n".join(sentences(data)) + "\n")
    if not (out / "synthetic/metadata.jsonl").is_file():
        build(read_lines([out / "sentences.txt"]), out / "synthetic", hours, seed, engines=engines)
    spoken = list(read(out / "synthetic", Report()))
    labelled(spoken[:SYNTHETIC_VOICES], out / "synthetic.parquet")
    clips = [out / f"{name}.parquet" for name in (*folders, "synthetic")]
    _write_once(styled_dialogues(data, clips), out / "styletalk_voice.parquet")
    if "ravdess" in folders:
        _write_once(moods(out), out / "moods.parquet")
    _write_once(check_rows(spoken[SYNTHETIC_VOICES:], Report()), out / "synthetic_words.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folders of real speech")
    text = "folder of the tables, or the model card with --release"
    parser.add_argument("--out", type=Path, required=True, help=text)
    parser.add_argument("--release", type=Path, metavar="RUN", help="a finished run, to be put into --out")
    parser.add_argument("--tables", type=Path, default=Path(), help="with --release: the folder of the run's tables")
    parser.add_argument("--hours", type=float, default=8.0, help="of synthesised speech")
    parser.add_argument("--seed", type=int, default=1, help="of the synthesis")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), help="whose voices speak")
    parser.add_argument("--commercial", action="store_true", help=f"without {' and '.join(sorted(NOT_COMMERCIAL))}")
    args = parser.parse_args()
    if args.release:
        tests = [args.tables / f"{folder}.parquet" for folder in TESTS]
        overlaps = check_release(args.release, args.tables, tests, texts_by_use(args.data)[1])
        release(args.release, args.out)
        write_overlap(args.out, overlaps)
        return
    left_out = NOT_COMMERCIAL if args.commercial else set()
    folders, engines = ([name for name in names if name not in left_out] for names in (FOLDERS, args.engines))
    make_tables(args.data.resolve(), args.out.resolve(), folders, engines, args.hours, args.seed)


if __name__ == "__main__":
    main()
