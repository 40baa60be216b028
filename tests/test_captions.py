"""Captions as tokens of the LLM: written, spelled and read they are the same."""

import pytest
import torch

from dual_slm.captions_dual_slm import CaptionSlots


def test_captions_as_text_and_as_slots_are_the_same_tokens(letters):
    """The embeddings that the adapter is taught are those of the caption written out: text and speech are twins."""
    _, processor = letters
    slots = processor.caption_slots
    caption = processor.caption({"gender": "male", "emotion": "happy"})
    spelled = [slots.token_ids[i] for i in slots.targets({"gender": "male", "emotion": "happy"})]
    text = processor.decode([t for t in spelled if processor.decode([t]) != " "])
    assert text.replace(" ", "") == caption.replace(" ", "")


def test_reading_slots_inverts_spelling_them(letters):
    _, processor = letters
    slots = processor.caption_slots
    for gender in ("female", "male"):
        for emotion in ("neutral", "happy", "sad"):
            target = torch.tensor(slots.targets({"gender": gender, "emotion": emotion}))
            logits = 20.0 * torch.nn.functional.one_hot(target, len(slots.token_ids))
            read = slots.read(logits)
            assert max(read["gender"], key=read["gender"].get) == gender
            assert max(read["emotion"], key=read["emotion"].get) == emotion
            assert sum(read["emotion"].values()) == pytest.approx(1.0, abs=1e-5)
    unknown = slots.targets({"gender": None, "emotion": "sad"})
    assert unknown[slots.fields["gender"]] == [-100] * len(slots.spelling["gender"]["male"])


def test_labels_must_fit_the_template(letters):
    _, processor = letters
    with pytest.raises(ValueError, match="the template has the fields"):
        CaptionSlots(processor.tokenizer, "({gender})", {"age": ["old"]})
