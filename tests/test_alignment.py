"""Targets by the frozen LLM: replies to text twins, and the teacher of the KL objective."""

import signal
import subprocess
import sys
import time

import pytest
from test_tasks import HISTORY, row

from dual_slm.training.alignment import Aligner, AlignmentConfig, align_rows, fault_of, without_asides
from dual_slm.training.corpora.checks import Report
from dual_slm.training.corpora.table import write_table
from dual_slm.training.files import Journal


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
        output = aligner.model.generate(**ids, max_new_tokens=12, do_sample=False)
        output = output[0, ids["input_ids"].shape[1] :].tolist()
        ended = [place for place, token in enumerate(output) if token in aligner.ends]
        answer = journal.values[aligner.key(prompt)]
        assert answer["complete"] == bool(ended)
        whole = output[: ended[0]] if ended else output
        assert answer["reply"] == aligner.tokenizer.decode(whole, skip_special_tokens=True).strip()


def test_a_row_keeps_what_alignment_does_not_answer(tiny_backbones, tmp_path):
    """A reply that is no target is no response; a row without words passes; both are counted."""
    aligner = Aligner(tiny_backbones[1], AlignmentConfig())
    rows, journal, report = [row(name, system="Be kind.") for name in "abc"], Journal(tmp_path / "j"), Report()
    rows[1:] = [rows[1].replace(transcript="the fox"), rows[2].replace(transcript=None)]
    answers = ("(smiles) I am glad.", "As an AI, I cannot hear.")
    for r, reply in zip(rows, answers, strict=False):
        journal.add({aligner.key(aligner.prompt(r)[1]): {"reply": reply, "complete": False}})
    found = list(align_rows(rows, aligner, journal, report))
    assert found[0] == rows[0].replace(response="I am glad.", response_complete=False)
    assert found[1] == rows[1].replace(response=None, response_complete=None)
    assert found[2] == rows[2]
    assert [kind.split(",")[0] for kind in report] == [
        "response cut by the length limit (its end is not trained)",
        "aside in brackets",
        "refusal",
        "row without a transcript",
    ]


def test_the_mood_is_told_in_the_place_of_the_caption(tiny_backbones):
    """The LLM reads the emotion in a system prompt; the row keeps the one that it is trained under."""
    aligner = Aligner(tiny_backbones[1], AlignmentConfig(mood="Your friend sounds {emotion}."))
    sad = row("1", transcript="the quick fox", emotion="sad", caption="(sad voice)", system="Be kind.")
    system, prompt = aligner.prompt(sad)
    assert system == "Be kind."
    assert "Your friend sounds sad." in prompt and "the quick fox" in prompt
    assert "Be kind." not in prompt and "(sad voice)" not in prompt
    _, unknown = aligner.prompt(sad.replace(emotion=None))
    assert "Be kind." in unknown and "sounds" not in unknown and "(sad voice)" not in unknown
    for wrong in ("Your friend is sad.", "Your friend sounds {emotion} and {name}."):
        with pytest.raises(ValueError, match="it must hold"):
            AlignmentConfig(mood=wrong)


@pytest.mark.slow
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
