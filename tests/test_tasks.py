"""From rows to conversations with targets."""

import pytest

from dual_slm.training.corpora.row import Row, make_row
from dual_slm.training.labels import KINDS
from dual_slm.training.tasks import cut_histories, label_sets, lend_histories, make_sample, tasks_of, text_twin

HISTORY = [
    {"role": "assistant", "content": "How was the exam?"},
    {"role": "user", "content": "I got the results."},
    {"role": "assistant", "content": "And?"},
]
CHOICES = {("test", "emotion"): ["angry", "happy", "sad"], ("test", "gender"): ["female", "male"]}
CHOICES["test", "tempo"] = ["fast", "normal", "slow"]


def row(name: str = "a", **more) -> Row:
    values = {"corpus": "test", "split": "train", "transcript": "i passed it", "gender": "female", "tempo": "slow"}
    return make_row(id=name, **(values | {"emotion": "sad", "response": "Well done.", "history": HISTORY} | more))


def test_kinds_are_the_papers_three():
    assert set(KINDS.values()) == {"linguistic", "paralinguistic", "dual"}
    assert label_sets([row(), row(emotion="happy")])["test", "emotion"] == ["happy", "sad"]


def test_a_row_has_the_tasks_that_it_has_targets_for():
    assert tasks_of(row()) == ["asr", "gender", "tempo", "emotion", "dialogue"]
    assert tasks_of(row(voice_only=True)) == ["gender", "tempo", "emotion", "dialogue"]
    assert tasks_of(row(transcript=None, gender=None, emotion=None, tempo=None)) == []


def test_a_draw_is_a_function_of_seed_epoch_and_id():
    again = [make_sample(row(), "emotion", CHOICES, seed=1, epoch=2) for _ in range(2)]
    assert again[0] == again[1]
    drawn = {str(make_sample(row(), "emotion", CHOICES, seed=1, epoch=epoch).messages) for epoch in range(30)}
    assert len(drawn) > 10
    assert len({tuple(make_sample(row(n), "emotion", CHOICES).choices) for n in "abcdefghijklmnopqrst"}) == 6


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


def test_the_spoken_part_is_rewritten_and_nothing_else():
    sample = make_sample(row(audio="a.wav", caption="(sad voice)", history=[]), "emotion", CHOICES, epoch=1)
    changed = sample.with_spoken(path=None, linguistic="none", transcript="other words")
    assert changed.spoken == {
        "type": "audio",
        "transcript": "other words",
        "caption": "(sad voice)",
        "linguistic": "none",
    }
    assert sample.spoken["path"] == "a.wav"  # the sample itself stays as it was
    assert changed.with_spoken(**sample.spoken, linguistic=None) == sample


def test_cut_histories_are_ends_of_the_whole_one():
    rows = list(cut_histories([row(str(n)) for n in range(40)] + [row("none", history=[])]))
    assert len(rows) == 81
    cuts = [r for r in rows if "/last" in r.id]
    assert {len(r.history) for r in cuts} == {0, 1, 2}
    assert all(r.history == HISTORY[len(HISTORY) - len(r.history) :] for r in cuts)


def test_a_history_is_lent_within_a_split_to_rows_without_a_conversation():
    alone = [row(str(n), history=[], response=None) for n in range(20)]
    dialogues = [row(f"d{n}", history=[{"role": "user", "content": str(n)}, *HISTORY]) for n in range(3)]
    lent = list(lend_histories([*alone, row("own")], dialogues, longest=4))
    assert {r.history[0]["content"] for r in lent[:-1]} == {"0", "1", "2"}
    assert lent[-1] == row("own")
    with pytest.raises(ValueError, match="no dialogue of the split test has a history that t could borrow"):
        list(lend_histories([row("t", split="test", history=[], response=None)], dialogues))


def test_a_text_twin_says_caption_and_words():
    sample = make_sample(row(caption="(sad voice)", history=[]), "dialogue", CHOICES)
    assert text_twin(sample.messages)[-1] == {"role": "user", "content": "(sad voice) i passed it"}
