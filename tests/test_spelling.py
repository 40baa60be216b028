"""What stage 0 teaches: transcripts as letters, captions as tokens, labels as embedding rows."""

import math

import pytest
import torch
from test_tasks import row

from conftest import LABELS
from dual_slm.configuration_dual_slm import ALPHABET
from dual_slm.training.spelling import (
    caption_targets,
    label_losses,
    label_rows,
    label_targets,
    spell_letters,
)


def test_texts_are_spelled_in_the_letters_of_the_alphabet():
    letters = spell_letters("It’s the LAZY-dog!", ALPHABET)
    assert "".join(ALPHABET[letter] for letter in letters) == "it's the lazy dog"
    assert spell_letters("(no speech)", ALPHABET) == []


def test_targets_are_those_of_known_labels_alone(letters):
    _, processor = letters
    rows = [row(emotion="happy"), row(emotion="bored", gender=None)]
    targets, slots = caption_targets(rows, processor), processor.caption_slots
    assert targets.shape == (2, slots.num_slots)
    text = processor.tokenizer.decode([slots.token_ids[place] for place in targets[0]])
    assert text.split() == ["(female", "voice,", "happy", "emotion)"]
    assert (targets[1] == -100).sum() == sum(place.stop - place.start for place in slots.fields.values())
    assert list(LABELS) == ["gender", "emotion"]
    assert label_targets(rows, processor).tolist() == [[0, 1], [-100, -100]]


def test_the_row_of_a_label_is_the_mean_of_its_tokens(letters):
    model, processor = letters
    weight = model.get_input_embeddings().weight
    rows = label_rows(model, processor)
    for name, labels in LABELS.items():
        assert rows[name].shape == (len(labels), weight.shape[1])
        ids = processor.tokenizer(f" {labels[-1]}", add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(rows[name][-1], weight[ids].mean(0))


def test_the_loss_of_labels_is_least_for_the_right_rows_and_nothing_where_none_is_known():
    anchors = [torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])]
    targets = torch.tensor([[0, 2], [1, -100], [-100, -100]])
    right = torch.stack([torch.stack([anchors[0][a], anchors[1][b]]) for a, b in ((0, 2), (1, 0), (0, 0))])
    losses = label_losses(right.repeat(1, 3, 1), targets, anchors)  # six outputs, dealt out to two attributes
    # No distance is left. The first attribute's entropy: logits 40 and 0, 5 % of it smoothed to both labels.
    assert losses[1].item() == pytest.approx(0.025 * 40, abs=1e-3)
    assert losses[2].item() == 0.0
    wrong = right.flip(1).repeat(1, 3, 1)
    assert (label_losses(wrong, targets, anchors)[:2] > losses[:2]).all()
    # Both labels of the first attribute are as likely, at the distance sqrt(2).
    half = torch.ones(1, 6, 2, requires_grad=True)
    (loss,) = label_losses(half, targets[1:2], anchors)
    assert loss.item() == pytest.approx(math.log(2) + 2 / 2)
    loss.backward()
    assert half.grad[0, ::2].any() and not half.grad[0, 1::2].any()
