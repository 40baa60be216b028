"""Rows: what they refuse, and how they and their variants are told apart."""

import pytest

from dual_slm.training.corpora.row import COLUMNS, Row, Variant, make_row


def test_rows_refuse_what_is_no_column_and_need_an_id():
    with pytest.raises(ValueError, match=r"unknown columns \['mood'\]"):
        make_row(id="a", corpus="c", split="train", mood="x")
    with pytest.raises(ValueError, match="a row needs id"):
        make_row(corpus="c", split="train", transcript="x")


def test_values_take_the_type_and_the_name_of_their_column():
    row = make_row(id=7, corpus="c", split="train", emotion="joy", turn="2", voice_only="TRUE", caption="")
    assert (row.id, row.emotion, row.turn, row.voice_only, row.caption) == ("7", "happy", 2, True, None)
    assert row.key == ("c", "7") and row.label("emotion") == "happy" and row.label("asr") is None
    assert list(row.to_dict()) == list(COLUMNS) and Row(**row.to_dict()) == row


def test_each_variant_of_a_clip_has_features_of_its_own():
    """The suffixes are part of the names under which features are kept."""
    assert Variant().digest_suffix("a") == ""
    assert Variant(loudness=0.05).digest_suffix("a") == "/loudness 0.05"
    assert Variant(copy=2).digest_suffix("a") == "/a/2"
    assert Variant(copy=2, revoiced=True, loudness=0.05).digest_suffix("a") == "/loudness 0.05/a/2/voice"
    row = make_row(id="a", corpus="c", split="train").replace(variant=Variant(copy=2))
    assert row.clip == ("c", "a", 2)
