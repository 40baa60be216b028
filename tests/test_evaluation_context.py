"""The context of suites: which rows are taken, and which queries are possible."""

from dual_slm.training.corpora.row import Row
from dual_slm.training.evaluation.context import EvaluationContext
from dual_slm.training.evaluation.systems import CONDITIONS
from dual_slm.training.tasks import label_sets


def context_of(*rows: Row, **options) -> EvaluationContext:
    return EvaluationContext(list(rows), label_sets(rows), options.pop("conditions", tuple(CONDITIONS)), **options)


def row(name: str, **known) -> Row:
    return Row(**({"id": name, "corpus": "c", "split": "test", "audio": f"{name}.wav", "transcript": name} | known))


def test_a_limit_counts_the_rows_of_each_corpus():
    rows = [row(str(n), corpus="ab"[n % 2]) for n in range(10)]
    taken = context_of(*rows, limit=3).take("asr")
    assert sorted(r.corpus for r in taken) == ["a"] * 3 + ["b"] * 3
    assert taken == context_of(*reversed(rows), limit=3).take("asr")
    assert len(context_of(*rows, limit=3).take("asr", limit=1)) == 2


def test_few_sentences_and_silence_say_nothing_about_words():
    few = [row(str(n), corpus="few", transcript="the same words") for n in range(8)]
    context = context_of(*few, row("a"), row("b", transcript="(no speech)"))
    assert [r.id for r in context.clips("asr")] == ["a"]
    assert [r.id for r in context.silent_clips()] == ["b"]
    assert context.notes == ["few has a handful of sentences and says nothing about words."]


def test_conditions_that_cannot_be_asked_are_left_out():
    text = row("t", audio=None)
    context = context_of(text, transcribe=lambda row: "heard words")
    assert {q.condition for q in context.queries("s", CONDITIONS, "asr", [text])} == {"none", "text"}
    clip = row("c", caption="(sad voice)")
    found = {q.condition: q for q in context.queries("s", CONDITIONS, "asr", [clip])}
    assert set(found) == set(CONDITIONS)
    assert found["cascade"].sample.spoken["transcript"] == "heard words"
    assert context_of(clip, conditions=("P&L",)).query("s", "text", context.sample(clip, "asr"), clip) is None


def test_a_system_without_linguistic_adapter_gets_words_as_text():
    clip, other = row("c"), row("o")
    context = context_of(clip, other, words_as_text=True)
    sample = context.sample(clip, "asr")
    assert context.query("s", "P&L", sample, clip).sources() == ("speech", "transcript")
    assert context.query("s", "swap", sample, other, clip).sample.spoken["transcript"] == "o"
