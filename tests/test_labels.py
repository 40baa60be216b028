"""The closed sets agree with the data files that use them."""

from dual_slm.training.labels import ATTRIBUTE_LABELS, ATTRIBUTES, CAPTION_TEMPLATE, EMOTIONS, KINDS, LEVELS, MEASURED
from dual_slm.training.prompts import PROMPTS


def test_attributes_are_those_of_the_prompts_and_the_caption():
    assert tuple(PROMPTS["attributes"]) == ATTRIBUTES == tuple(ATTRIBUTE_LABELS)
    assert set(KINDS) == {"asr", "dialogue", *ATTRIBUTES} and {"asr", "dialogue"} < set(PROMPTS)
    assert all(f"{{{name}}}" in CAPTION_TEMPLATE for name in ATTRIBUTES)
    assert set(MEASURED) < set(LEVELS) < set(ATTRIBUTES)
    assert not set(EMOTIONS.values()) - set(ATTRIBUTE_LABELS["emotion"])
