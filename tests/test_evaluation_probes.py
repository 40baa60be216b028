"""Classifiers of replies."""

from evaluated import figure, records_of, system_of

from dual_slm.training.evaluation.evaluate import evaluate

pytest_plugins = ["evaluation_fixtures"]


def feeling(query) -> str:
    """Replies to the mood that it is told of or hears."""
    paralinguistic, _ = query.sources()
    if paralinguistic == "none":
        return "I see, thank you for telling me."
    return {"happy": "What wonderful news!", "sad": "I am so sorry to hear it."}[query.voice.emotion]


def test_replies_to_two_styles_are_told_apart_where_the_system_hears_them(data, tmp_path):
    """Taught by replies to the training speakers' text twins alone; the same words without the voice are chance."""
    result = evaluate("feeling", [str(data)], tmp_path / "a", ["style"], system=system_of(feeling))
    place = ("style", "acted", "emotion by the reply")
    assert figure(result, *place, "P&L", "accuracy")["value"] == 1
    assert figure(result, *place, "caption and text", "accuracy")["value"] == 1
    assert figure(result, *place, "L only", "accuracy")["value"] == 0.5
    asked = records_of(tmp_path / "a", "style")
    assert {r["label"] for r in asked} == {"happy", "sad"} and {r["corpus"] for r in asked} == {"acted"}
    assert not any("training" in r["condition"] for r in asked)

    def deaf(query):
        return "I see." if query.sources()[0] == "speech" else feeling(query)

    result = evaluate("deaf", [str(data)], tmp_path / "b", ["style"], system=system_of(deaf))
    assert figure(result, *place, "P&L", "accuracy")["value"] == 0.5
