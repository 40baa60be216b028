"""Corpus readers: each on a tree in the corpus's own layout, on its real metadata, and on damaged files."""

import collections
import csv
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from conftest import SHARED_DATA, tone
from dual_slm.training.corpora import CORPORA, reader
from dual_slm.training.corpora.checks import Report, check_rows
from dual_slm.training.corpora.row import Row
from dual_slm.training.corpora.table import read_table, write_table
from dual_slm.training.corpora.textrolspeech import speaker_of
from dual_slm.training.stats import leaks
from dual_slm.training.text import split_by

pytestmark = pytest.mark.usefixtures("table_cache")

DATA = SHARED_DATA
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real metadata is not at {DATA}")
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


def sound(path: Path, seconds: float = 0.5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds), 16_000)


def table(path: Path, header: str, *records: tuple, quoting: int = csv.QUOTE_MINIMAL) -> None:
    """A csv file; a lone surrogate in a value becomes the byte that it stands for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, quoting=quoting).writerows([header.split(","), *records])


def read(name: str, root: Path, keep_text: bool = False, **options) -> tuple[dict[str, Row], Report]:
    report = Report()
    rows = list(check_rows(reader(name)(root, report, **options), report, keep_text, root / "sound"))
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: row for row in rows}, report


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


# ---- small trees in the corpora's own layouts ------------------------------------------------------------------------


def librispeech(root):
    speakers = ";ID  |SEX| SUBSET           |MINUTES| NAME\n19   | F | train-clean-100  | 25.19 | Kara | Shallenberg\n"
    for subset, speaker in (("train-clean-100", "19"), ("dev-clean", "1272"), ("extra", "7")):
        chapter = root / "LibriSpeech" / subset / speaker / "198"
        sound(chapter / f"{speaker}-198-0000.flac")
        sound(chapter / f"{speaker}-198-0001.flac", 0.25)
        lines = f"{speaker}-198-0000 NORTHANGER ABBEY\n{speaker}-198-0001 THIS LITTLE WORK'S END\n"
        (chapter / f"{speaker}-198.trans.txt").write_text(lines)
    (root / "LibriSpeech" / "SPEAKERS.TXT").write_text(speakers + "1272 | M | dev-clean        |  8.06 | John Doe\n")


MELD = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"


def meld(root):
    def said(number, text, speaker, emotion, dialogue, utterance):
        return number, text, speaker, emotion, "neutral", dialogue, utterance, 8, 21, "00:16:16,059", "00:16:21,731"

    turns = [
        said(1, "You\udc92re late,  Ren\udce9.", "Ross", "joy", 0, 0),
        said(2, "Iâ€™m not… â€œYou’re early.â€\x9d", "Ren\udce9", "anger", 0, 1),
        said(3, "Well.", "Ross", "neutral", 0, 2),
        said(4, "Mixed: it’s, it\udc92s.", "Ross", "surprise", 0, 3),
        said(5, "Bye.", "Ross", "sadness", 0, 5),
        said(6, "Bye!", "René", "fear", 0, 6),
        said(7, "Next day.", "Ross", "disgust", 1, 0),
    ]
    table(root / "train_sent_emo.csv", MELD, *turns)
    table(root / "dev_sent_emo.csv", MELD, said(1, "What?", "Monica", "surprise", 0, 0))
    table(root / "test_sent_emo.csv", MELD, said(1, "Push!", "Joey", "neutral", 0, 0))


STYLETALK = "diag_id,context,curr_audio_id,res_audio_id,curr_text,res_text,"
STYLETALK += "curr_emotion,curr_speed,curr_volume,res_emotion,res_speed,res_volume"


def styletalk(root):
    styles = ("friendly", "slow", "quiet", "cheerful", "fast", "loud")
    book = "A : I loved it! B : Oh, that's fantastic! Should I read it? A : It’s worth the read."
    trip = "B : I booked a trip. A : Oh wow! B : We deserve it."
    train = ("book_1", book, "book_1/c_2.wav", "book_1/r_2.wav", "B: I'll add it.  ", "  Awesome!", *styles)
    test = ("book_2", book, "book_2/c_0.wav", "book_2/r_0.wav", "B: Maybe.  ", "  Do.", *styles)
    other = ("trip_3", trip, "trip_3/c_0.wav", "trip_3/r_0.wav", "A: When do we leave?  ", "  Friday!", *styles)
    twice = ("trip_4", trip, "trip_4/c_0.wav", "trip_4/r_0.wav", "B: So there.  ", "  Yes.", *styles)
    table(root / "train.csv", STYLETALK, train, twice)
    table(root / "eval.csv", STYLETALK, test, other)
    for record in (train, twice, test, other):
        sound(root / "audio" / record[2])
        sound(root / "audio" / record[3], 0.25)


def dailytalk(root):
    turns = [(0, 1, "what’s that?", "no emotion"), (1, 0, "a budget.", "happiness"), (2, 0, "for may.", "sadness")]
    turns += [(4, 1, "why?", "surprise"), (5, 0, "why not.", "anger")]
    about = {}
    for number, speaker, text, emotion in turns:
        name = root / "dailytalk" / "data" / "0" / f"{number}_{speaker}_d0"
        sound(name.with_suffix(".wav"))
        name.with_suffix(".txt").write_text(f"{text}\n", encoding="utf-8")
        about[str(number)] = {"emotion": emotion, "act": "question", "topic": "work"}
    (root / "dailytalk" / "metadata.json").write_text(json.dumps({"0": about}))


def ravdess(root):
    for name in ("03-01-06-02-02-01-02", "03-01-08-01-01-02-15", "03-01-01-01-01-01-17", "03-02-01-01-01-01-02"):
        sound(root / f"Actor_{name[-2:]}" / f"{name}.wav")


def cremad(root):
    people = [(1001, 51, "Male", "Caucasian", "Not Hispanic"), (1002, 21, "Female", "Caucasian", "Not Hispanic")]
    table(root / "VideoDemographics.csv", "ActorID,Age,Sex,Race,Ethnicity", *people, quoting=csv.QUOTE_NONNUMERIC)
    names = [(1, "1001_IEO_HAP_LO"), (2, "1002_DFA_DIS_XX")]
    table(root / "SentenceFilenames.csv", "Stimulus_Number,Filename", *names, quoting=csv.QUOTE_NONNUMERIC)
    for _, name in names:
        sound(root / "AudioWAV" / f"{name}.wav")


TEXTROL = "num,wav_fp,item_name,gender,pitch,tempo,energy,emotion,style_prompt,content_prompt"
VCCM = "item_name,dur,pitch,energy,gender,emotion,spk,txt,style_prompt"


READ, ACTED = "4965_27768_000059_000002", "CREMA-D-AudioWAV-1060_IWL_FEA_XX"


def textrolspeech(root):
    read_aloud = (0, f"libritts/{READ}.wav", READ, "F", "high", "low", "normal", "nan", "Slow, it’s.")
    table(root / "caption" / "random_train.csv", TEXTROL, (*read_aloud, "“Don’t,” she said."))
    acted = (ACTED, "high", "normal", "low", "M", "fear", "CREMA-D-1060", "A new clock", "Fast.")
    table(root / "vccm.csv", VCCM, acted)
    sound(root / "libritts" / f"{READ}.wav")
    sound(root / "emotion" / "deep" / f"{ACTED}.wav", 0.25)


def folder(root):
    sound(root / "clips" / "a.wav")
    rows = [{"file": "clips/a.wav", "text": "the fox", "emotion": "joy", "speaker": "ann", "intensity": "strong"}]
    rows.append({"text": "no sound", "split": "test", "emotion": "", "speaker": "bob", "turn": 3})
    (root / "metadata.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))


def iemocap(root):
    for session in (1, 2, 3):
        name, folder = f"Ses0{session}F_impro01", root / f"Session{session}"
        turns = [(f"{name}_F000", "Excuse me."), (f"{name}_M000", "Your forms?"), (f"{name}_F001", "Yeah.")]
        said = [f"{turn} [006.2901-008.2357]: {text}" for turn, text in turns]
        put(folder / "dialog" / "transcriptions" / f"{name}.txt", "\n".join([*said, "M: mhm"]))
        labels = zip(turns, ("neu", "fru", "exc"), strict=True)
        lines = [f"[6.2901 - 8.2357]\t{turn}\t{label}\t[2.5, 2.5, 2.5]\nC-E1:\tx;\t()" for (turn, _), label in labels]
        put(
            folder / "dialog" / "EmoEvaluation" / f"{name}.txt",
            "% [START_TIME - END_TIME] ...\n\n" + "\n\n".join(lines),
        )
        for turn, _ in turns:
            sound(folder / "sentences" / "wav" / name / f"{turn}.wav")


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


READERS = (librispeech, meld, styletalk, dailytalk, ravdess, cremad, textrolspeech, iemocap, folder)
TREES = {f.__name__: f for f in READERS}
BOOK = [assistant("I loved it!"), user("Oh, that's fantastic! Should I read it?"), assistant("It's worth the read.")]
TRIP = [assistant("I booked a trip."), user("Oh wow!"), assistant("We deserve it.")]
TURNED = [user("I booked a trip."), assistant("Oh wow!"), user("We deserve it.")]  # B speaks twice in a row
LATE, EARLY, WHAT = "You're late, René.", "I'm not... \"You're early.\"", "what's that?"
# Columns, and what they hold in a row.
EXPECTED = {
    "librispeech": {
        "transcript speaker gender split subset duration": None,
        "19-198-0000": ("northanger abbey", "librispeech_19", "female", "train", "train-clean-100", 0.5),
        "1272-198-0001": ("this little work's end", "librispeech_1272", "male", "validation", "dev-clean", 0.25),
    },
    "meld": {
        "transcript speaker emotion split dialogue turn history": None,
        "train/dia0_utt0": (LATE, "Ross", "happy", "train", "train/0", 0, []),
        "train/dia0_utt1": (EARLY, "René", "angry", "train", "train/0", 1, [assistant(LATE)]),
        "train/dia0_utt3": (
            *("Mixed: it's, it's.", "Ross", "surprised", "train", "train/0", 3),
            [user(LATE), assistant(EARLY), user("Well.")],
        ),
        "train/dia0_utt5": ("Bye.", "Ross", "sad", "train", "train/0", 5, []),
        "train/dia0_utt6": ("Bye!", "René", "fearful", "train", "train/0", 6, [assistant("Bye.")]),
        "train/dia1_utt0": ("Next day.", "Ross", "disgust", "train", "train/1", 0, []),
        "validation/dia0_utt0": ("What?", "Monica", "surprised", "validation", "validation/0", 0, []),
        "test/dia0_utt0": ("Push!", "Joey", "neutral", "test", "test/0", 0, []),
    },
    "styletalk": {
        "transcript response split emotion tempo energy history": None,
        "book_1/c_2": ("I'll add it.", "Awesome!", "train", "friendly", "slow", "low", BOOK),
        "trip_3/c_0": ("When do we leave?", "Friday!", "test", "friendly", "slow", "low", TRIP),
        "trip_4/c_0": ("So there.", "Yes.", "train", "friendly", "slow", "low", TURNED),
    },
    "dailytalk": {
        "transcript gender emotion turn response history": None,
        "0_1_d0": (WHAT, "female", None, 0, "a budget.", []),
        "1_0_d0": ("a budget.", "male", "happy", 1, None, [assistant(WHAT)]),
        "2_0_d0": ("for may.", "male", "sad", 2, None, [assistant(WHAT), user("a budget.")]),
        "4_1_d0": ("why?", "female", "surprised", 4, "why not.", []),
        "5_0_d0": ("why not.", "male", "angry", 5, None, [assistant("why?")]),
    },
    "ravdess": {
        "transcript emotion speaker gender split": None,
        "03-01-06-02-02-01-02": ("Dogs are sitting by the door.", "fearful", "ravdess_02", "female", "train"),
        "03-01-08-01-01-02-15": ("Kids are talking by the door.", "surprised", "ravdess_15", "male", "validation"),
        "03-01-01-01-01-01-17": ("Kids are talking by the door.", "neutral", "ravdess_17", "male", "test"),
    },
    "cremad": {
        "transcript emotion speaker gender": None,
        "1001_IEO_HAP_LO": ("It's eleven o'clock.", "happy", "cremad_1001", "male"),
        "1002_DFA_DIS_XX": ("Don't forget a jacket.", "disgust", "cremad_1002", "female"),
    },
    "textrolspeech": {
        "transcript caption gender pitch tempo energy emotion speaker": None,
        READ: ('"Don\'t," she said.', "Slow, it's.", "female", "high", "slow", "normal", None, "librispeech_4965"),
        ACTED: ("A new clock", "Fast.", "male", "normal", "fast", "low", "fearful", "cremad_1060"),
    },
    "iemocap": {
        "transcript emotion split speaker gender history": None,
        "Ses01F_impro01_F001": (
            "Yeah.",
            "happy",
            "test",
            "iemocap_1F",
            "female",
            [user("Excuse me."), assistant("Your forms?")],
        ),
        "Ses01F_impro01_M000": ("Your forms?", None, "test", "iemocap_1M", "male", [assistant("Excuse me.")]),
        "Ses02F_impro01_F000": ("Excuse me.", "neutral", "validation", "iemocap_2F", "female", []),
        "Ses03F_impro01_F000": ("Excuse me.", "neutral", "train", "iemocap_3F", "female", []),
    },
    "folder": {
        "transcript emotion split duration turn": None,
        "root/clips/a.wav": ("the fox", "happy", "train", 0.5, None),
        "root/3": ("no sound", None, "test", None, 3),
    },
}
COUNTED = {"librispeech": {"subset": 1}, "styletalk": {"gap": 1}, "dailytalk": {"gap": 1}, "ravdess": {"song": 1}}
COUNTED["iemocap"] = {"usual four": 3}
COUNTED["meld"] = {"gap": 1, "missing audio, kept": 9}


@pytest.mark.parametrize("name", CORPORA)
def test_each_corpus_in_its_own_layout(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    TREES[name](root)
    rows, report = read(name, root, keep_text=name == "meld")
    (columns, _), *expected = EXPECTED[name].items()
    for key, values in expected:
        assert {c: getattr(rows[key], c) for c in columns.split()} == dict(
            zip(columns.split(), values, strict=True)
        ), key
    for row in rows.values():
        assert row.corpus == ("root" if name == "folder" else name)
        assert row.duration in ((0.5, 0.25) if row.audio else (None,))
        assert row.audio is None or Path(row.audio).stem == row.id.split("/")[-1].removesuffix(".wav")
    counted = COUNTED.get(name, {})
    assert len(report) == len(counted)
    for kind, count in counted.items():
        assert [n for text, n in report.items() if kind in text] == [count]
    write_table(rows.values(), tmp_path / "t.parquet")  # nothing in them that a table cannot hold
    assert list(read_table(tmp_path / "t.parquet")) == list(rows.values())


def test_styletalk_with_its_roles_reversed(tmp_path):
    styletalk(tmp_path)
    rows, _ = read("styletalk", tmp_path, role_reversed=True)
    assert set(rows) == {"book_1/c_2", "trip_4/c_0", "book_2/c_0", "book_2/r_0", "trip_3/c_0", "trip_3/r_0"}
    row = rows["book_2/r_0"]
    flipped = [assistant(turn["content"]) if turn["role"] == "user" else user(turn["content"]) for turn in BOOK]
    assert row.history == [*flipped, assistant("Maybe.")]
    assert (row.transcript, row.response, row.corpus) == ("Do.", None, "styletalk_reversed")
    assert (row.emotion, row.tempo, row.energy, row.duration) == ("cheerful", "fast", "high", 0.25)
    assert rows["trip_3/r_0"].history[-2:] == [user("We deserve it."), assistant("When do we leave?")]


def test_dailytalk_says_the_same_from_its_lines(tmp_path):
    dailytalk(tmp_path)
    rows, _ = read("dailytalk", tmp_path)
    turns = [
        {"utterance_idx": row.turn, "basename": name, "speaker": int(row.speaker[-1]), "text": row.transcript}
        | {"emotion": row.emotion or "none"}
        for name, row in rows.items()
    ]
    lines = tmp_path / "dailytalk" / "dailytalk_dialogs.jsonl"
    lines.write_text(json.dumps({"dialog_idx": 0, "turns": turns}) + "\n")
    assert read("dailytalk", tmp_path)[0] == rows
    for file in (lines, lines.with_name("metadata.json")):
        file.write_text(file.read_text()[:80])
        with pytest.raises(ValueError, match=rf"{file.name}: not JSON .* cut off"):
            read("dailytalk", tmp_path)
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither metadata\.json nor"):
        read("dailytalk", tmp_path)


def test_textrolspeech_speakers_are_in_the_names():
    items = {"1001_IEO_HAP_LO": "cremad/1001", "MEAD-M026-audio-surprised-level_1-013": "mead/M026"}
    items |= {"(ESD)-Emotion Speech Dataset-0020-Happy-0020_000746": "esd/0020", "p225_003_mic1": "vctk/p225"}
    items |= {"4965_27768_000059_000002": "libritts/4965", "OAF_back_angry": "tess/OAF", "DC_a01": "savee/DC"}
    assert {item: "/".join(speaker_of(item)) for item in items} == items
    assert speaker_of("recording 7") is None


def test_textrolspeech_keeps_a_speaker_of_both_kinds_of_csv_in_one_split(tmp_path):
    items = [(n, f"{n}_IWL_FEA_XX") for n in range(1001, 1041)]
    new = [(0, f"{i}.wav", i, "M", "low", "low", "low", "fear", "Slow.", "Words.") for _, i in items]
    old = [(f"CREMA-D-AudioWAV-{i}", *new[0][4:7], "M", "fear", f"CREMA-D-{n}", "Words.", "Slow.") for n, i in items]
    table(tmp_path / "new.csv", TEXTROL, *new)
    table(tmp_path / "old.csv", VCCM, *old)
    table(tmp_path / "notes.csv", "day,done", ("monday", "nothing"))
    rows, report = read("textrolspeech", tmp_path, keep_text=True)
    assert report["csv that is no table of captions, left out"] == 1
    assert len(rows) == 80
    for _, item in items:
        assert rows[item].split == rows[f"CREMA-D-AudioWAV-{item}"].split
    assert collections.Counter(row.split for row in rows.values()) == {"train": 72, "validation": 4, "test": 4}


# ---- real metadata ---------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize(
    ("name", "folder", "options", "splits"),
    [
        ("styletalk", "metadata/StyleTalk", {}, {"train": 1838, "test": 858}),
        ("styletalk", "metadata/StyleTalk", {"role_reversed": True}, {"train": 1838, "test": 858 + 858}),
        ("meld", "metadata/MELD", {}, {"train": 9989, "validation": 1109, "test": 2610}),
        ("dailytalk", "metadata/DailyTalk", {}, 23_773),
        ("cremad", "metadata/CREMA-D", {}, 7_442),
        ("textrolspeech", "metadata/TextrolSpeech", {}, 4_186),  # 126 of them are in two of its files
        ("ravdess", "ravdess", {}, {"train": 840, "validation": 120, "test": 240}),
    ],
)
def test_real_metadata(name, folder, options, splits):
    report = Report()
    rows = list(reader(name)(DATA / folder, report, **options))
    assert (len(rows) if isinstance(splits, int) else collections.Counter(row.split for row in rows)) == splits
    unit = {"dailytalk": "dialogue", "meld": "id", "styletalk": "id"}.get(name, "speaker")
    seen = collections.defaultdict(set)
    for row in rows:
        seen[getattr(row, unit)].add(row.split)
        text = json.dumps([row.transcript, row.caption, row.history, row.response], ensure_ascii=False)
        assert not set(text) & set("’‘â€\u0092\ufffd") and "nan" != row.emotion != "no emotion"
        assert row.transcript and all(a["role"] != b["role"] for a, b in itertools.pairwise(row.history))
    assert all(len(found) == 1 for found in seen.values())
    if name in ("dailytalk", "cremad"):
        assert len(seen) == {"dailytalk": 2541, "cremad": 91}[name]
        held = collections.Counter(split for found in seen.values() for split in found)
        expected = {"dailytalk": 0.05, "cremad": 0.1}[name]
        assert all(0.5 * expected < held[split] / len(seen) < 1.5 * expected for split in ("validation", "test"))
    if name == "meld":
        (gaps,) = report.values()
        assert gaps == sum(row.turn > 0 and not row.history for row in rows) > 0
    else:
        assert not report
    if name == "ravdess":  # the one whose sound is there, too
        assert all(1 < row.duration < 8 for row in read(name, DATA / folder)[0].values())


@needs_data
def test_real_styletalk_reversed_roles():
    root = DATA / "metadata" / "StyleTalk"
    rows = {row.id: row for row in reader("styletalk")(root, Report(), role_reversed=True)}
    with open(root / "eval.csv", encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    for record in records:
        said, answer = (rows[record[f"{turn}_audio_id"].removesuffix(".wav")] for turn in ("curr", "res"))
        same = record["context"].strip()[0] == record["curr_text"][0]  # who speaks here began the dialogue
        assert said.history[0]["role"] == ("user" if same else "assistant")
        assert answer.history[0]["role"] == ("assistant" if same else "user")
        assert answer.history[-1] == assistant(said.transcript)
        assert [t["content"] for t in answer.history[:-1]] == [t["content"] for t in said.history]
        assert (answer.transcript, answer.response) == (said.response, None)
        assert said.history[-1]["role"] == "assistant"
    assert sum(record["curr_text"].startswith("A") for record in records) > 0


# ---- what can be broken ----------------------------------------------------------------------------------------------


def test_no_audio_at_all_is_an_error_that_names_the_remedy(tmp_path):
    cremad(tmp_path)
    shutil.rmtree(tmp_path / "AudioWAV")
    with pytest.raises(FileNotFoundError, match=r"none of the 2 .*1001_IEO_HAP_LO\.wav.*--allow-missing-audio"):
        read("cremad", tmp_path)
    assert len(read("cremad", tmp_path, keep_text=True)[0]) == 2
    with pytest.raises(ValueError, match=r"'cremadd'; there are librispeech, .*cremad"):
        reader("cremadd")


@pytest.mark.parametrize("name", [name for name in CORPORA if name != "folder"])
def test_an_empty_root_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "column"),
    [
        ("styletalk", "eval.csv", "res_text"),
        ("meld", "train_sent_emo.csv", "Speaker"),
        ("cremad", "SentenceFilenames.csv", "Filename"),
        ("textrolspeech", "vccm.csv", "style_prompt"),
    ],
)
def test_a_csv_without_a_column_or_cut_off_is_named(tmp_path, name, file, column):
    TREES[name](tmp_path)
    file = tmp_path / file
    whole = file.read_bytes()
    start = whole.rstrip().rfind(b"\n") + 1
    for end in (start + 2, start + 10):  # within the last record
        file.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=rf"{file.name}.* cut off\?"):
            read(name, tmp_path, keep_text=True)
    file.write_bytes(whole.replace(column.encode(), b"x", 1))
    with pytest.raises(ValueError, match=rf"{file.name}: no column {column}; it has "):
        read(name, tmp_path, keep_text=True)


# ---- video -----------------------------------------------------------------------------------------------------------


@needs_ffmpeg
def test_meld_sound_is_extracted_once_and_broken_clips_are_counted(tmp_path, monkeypatch):
    meld(tmp_path)
    clips = tmp_path / "train_splits"
    clips.mkdir()
    soundfile.write(tmp_path / "tone.wav", np.stack([tone(0.5)] * 2, 1), 16_000)
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "color=black:s=64x64:d=0.5"]
    stereo = ["-i", tmp_path / "tone.wav", "-ar", "44100", "-c:a", "aac"]
    subprocess.run([*command, *stereo, clips / "dia0_utt0.mp4"], check=True)
    for number in (1, 2, 5):
        shutil.copy(clips / "dia0_utt0.mp4", clips / f"dia0_utt{number}.mp4")
    whole = (clips / "dia0_utt0.mp4").read_bytes()
    (clips / "dia0_utt2.mp4").write_bytes(whole[: len(whole) // 2])
    subprocess.run([*command, clips / "dia0_utt3.mp4"], check=True)  # a picture without sound

    rows, report = read("meld", tmp_path)
    kept = ["train/dia0_utt0", "train/dia0_utt1", "train/dia0_utt5"]
    assert list(rows) == kept
    damaged, missing = (next(k for k in report if k.startswith(kind)) for kind in ("damaged", "missing"))
    assert (report[damaged], report.first[damaged]) == (2, str(clips / "dia0_utt2.mp4"))
    assert (report[missing], report.first[missing]) == (4, str(clips / "dia0_utt6.mp4"))
    for row in rows.values():
        samples, rate = soundfile.read(row.audio)
        assert (rate, samples.ndim, Path(row.audio).suffix) == (16_000, 1, ".flac")
        assert row.duration == len(samples) / rate == pytest.approx(0.5, abs=0.1)
        assert np.sqrt(np.mean(samples**2)) == pytest.approx(np.sqrt(np.mean(tone(0.5) ** 2)), rel=0.2)
    assert not list(tmp_path.rglob("*.part"))

    first, second, _ = (Path(rows[name].audio) for name in kept)
    second.unlink()
    scratch = second.with_name(second.name + ".part")
    scratch.write_bytes(b"fLaC cut off")  # killed on the way
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")}
    assert read("meld", tmp_path) == (rows, report)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert second.read_bytes() == first.read_bytes()

    second.unlink()
    scratch.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"dia0_utt1\.flac: no space left") as full:
        read("meld", tmp_path)
    assert full.value.errno == errno.ENOSPC
    assert first.exists() and not second.exists() and not scratch.is_symlink()

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="ffmpeg is missing: `apt-get install ffmpeg`"):
        read("meld", tmp_path)


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_a_split_is_a_function_of_the_name_alone(tmp_path):
    def splits(actors):
        table(tmp_path / "VideoDemographics.csv", "ActorID,Sex", *((actor, "Male") for actor in actors))
        table(tmp_path / "SentenceFilenames.csv", "Filename", *((f"{actor}_IEO_HAP_LO",) for actor in actors))
        return {row.speaker: row.split for row in read("cremad", tmp_path, keep_text=True)[0].values()}

    every, some = splits(range(1001, 1092)), splits(range(1091, 1000, -3))
    assert set(some.values()) == {"train", "validation", "test"}
    assert some == {speaker: every[speaker] for speaker in some}

    code = "from dual_slm.training.text import split_by; print([split_by(str(n), 3) for n in range(99)])"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str([split_by(str(n), 3) for n in range(99)])


def test_a_person_in_two_corpora_has_one_name(tmp_path):
    """CREMA-D's actors and LibriSpeech's readers (as LibriTTS) are in TextrolSpeech too: a leak between them is found."""
    cremad(tmp_path / "cremad")
    librispeech(tmp_path / "librispeech")
    items = ("1001_IEO_HAP_LO", "19_198_000059_000002")
    rows = [
        (n, f"{item}.wav", item, "F", "low", "low", "low", "nan", "Slow.", "Words.") for n, item in enumerate(items)
    ]
    table(tmp_path / "textrolspeech" / "new.csv", TEXTROL, *rows)
    found = {
        name: read(name, tmp_path / name, keep_text=True)[0] for name in ("cremad", "librispeech", "textrolspeech")
    }
    again = [row.replace(split="test") for row in found.pop("textrolspeech").values()]
    others = [row.replace(split="train") for rows in found.values() for row in rows.values()]
    (leak,) = leaks(others + again)[0]
    assert leak == "2 x speaker in several splits, such as 'cremad_1001' in train and test"
