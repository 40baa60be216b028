"""The suites: each makes the queries of one question, from an [`EvaluationContext`].

hearing         what the adapters hear in every clip, before the LLM; no reply is asked for
asr             paper, Table III; beside it the cascade and the reference transcript
attributes      paper, Table I; also pitch within each gender, and emotion at equal loudness
meld            paper, Table II
conversation    paper, Table IV (judges.py)
disentanglement both branches, one, or none; and the swap test: the voice of one clip, the words of another
style           the same words in two emotions: a classifier tells whether the replies differ
air-bench, voicebench   questions of public benchmarks in local folders (benchmarks.py)
context         the same turn after 0 to 12 earlier turns, as speech and as text; facts and instructions
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from ..corpora.row import Row
from ..files import ASSETS
from ..labels import ATTRIBUTES
from ..prompts import PROMPTS
from ..tasks import Message, Sample
from ..text import hash_uniform
from .benchmarks import BENCHMARKS
from .context import ASSET, EvaluationContext, lowered
from .systems import Query

SMALL_TALK = (ASSETS / "small_talk.txt").read_text(encoding="utf-8").splitlines()
TURNS = (0, 2, 6, 12)
LOUDNESS = 0.05  # mean RMS of the clips at equal loudness, where loudness cannot tell the emotion
EQUAL = ", equal loudness"
STYLES = ("happy", "sad")
TAUGHT = ", training speakers"
LIMITS = {"context": 24, "style": 128}  # rows of a corpus and task, for costly suites


def asr(
    context: EvaluationContext, suite: str = "asr", conditions: tuple[str, ...] = ("P&L", "L only", "cascade", "text")
) -> list[Query]:
    return list(context.queries(suite, conditions, "asr", context.clips("asr")))


def attributes(
    context: EvaluationContext, suite: str = "attributes", conditions: tuple[str, ...] = ("P&L", "P only")
) -> list[Query]:
    found: list[Query] = []
    for task in ATTRIBUTES:
        rows = [row for row in context.clips(task) if row.corpus != "meld"]
        queries = list(context.queries(suite, conditions, task, rows))
        found += queries
        if task == "emotion" and suite == "attributes":
            for query in queries:
                level = at_equal_loudness(query.row)
                found.append(replace(query, condition=query.condition + EQUAL, row=level, voice=level))
    return found


def at_equal_loudness(row: Row) -> Row:
    return row.replace(variant=replace(row.variant, loudness=LOUDNESS))


def meld(context: EvaluationContext) -> list[Query]:
    rows = context.take("emotion", fit=lambda row: row.corpus == "meld")
    return list(context.queries("meld", ("P&L", "P only", "L only", "text"), "emotion", rows))


def conversation(context: EvaluationContext) -> list[Query]:
    """Dialogues if there are any, else single turns with an emotion, else any spoken turns."""
    said = [row for row in context.rows if row.transcript]
    rows = [row for row in said if row.history or row.response] or [row for row in said if row.emotion] or said
    chosen = replace(context, rows=[row.replace(response=row.response or "(open)") for row in rows])
    conditions = ("P&L", "L only", "text", "caption and text", "cascade")
    return list(chosen.queries("conversation", conditions, "dialogue", chosen.take("dialogue")))


def disentanglement(context: EvaluationContext) -> list[Query]:
    name, conditions = "disentanglement", ("P&L", "P only", "L only", "none")
    found = asr(context, name, conditions) + attributes(context, name, conditions)
    if "P only" not in context.conditions:
        context.notes.append("the system has no branches: no swap test.")
        return found
    others = [row for row in context.rows if row.audio and row.transcript]
    for task in ("asr", *ATTRIBUTES):
        for row in context.clips(task):
            # The reply must follow `row`. The other branch hears another speaker's clip with another answer.
            unlike = [other for other in others if other.speaker != row.speaker and _differs(other, row, task)]
            if unlike:
                other = random.Random(f"{context.seed}/swap/{task}/{row.id}").choice(unlike)
                words, voice = (row, other) if task == "asr" else (other, row)
                found += context.ask(name, ["swap"], context.sample(row, task), words, voice)
    return found


def _differs(first: Row, second: Row, task: str) -> bool:
    if task == "asr":
        return lowered(first) != lowered(second)
    return first.label(task) not in (None, second.label(task))


def context(context: EvaluationContext) -> list[Query]:
    return [*_late_turns(context), *_instructions(context), *_facts(context)]


def _late_turns(context: EvaluationContext) -> Iterator[Query]:
    """ASR and attributes after several turns of small talk. "caption and text" shows what the LLM can do by itself."""
    for task in ("asr", *ATTRIBUTES):
        for row in context.clips(task, LIMITS["context"]):
            sample = context.sample(row.replace(history=[]), task)
            *earlier, turn = sample.messages
            for turns in TURNS:
                late = replace(sample, messages=[*earlier, *_alternate(SMALL_TALK[:turns]), turn])
                conditions = [f"{condition}, after {turns} turns" for condition in ("P&L", "caption and text")]
                yield from context.ask("context", conditions, late, row)


def _instructions(context: EvaluationContext) -> Iterator[Query]:
    """System prompts; a regular expression tells from the reply whether it follows them."""
    for number, row in enumerate(context.clips("asr", LIMITS["context"])):
        asked = ASSET["instructions"][number % len(ASSET["instructions"])]
        messages = [{"role": "system", "content": asked["text"]}]
        yield from _open_question(context, row, "instruction", messages, asked["kept"])


def _facts(context: EvaluationContext) -> Iterator[Query]:
    """Facts that the user tells in text, then small talk, then a spoken question about the fact."""
    if context.speak is None:
        context.notes.append("facts were not asked for: no voice is installed (pip install piper-tts).")
        return
    for fact in ASSET["facts"]:
        told = _alternate([fact["told"], ASSET["fact_thanks"], *SMALL_TALK[:6]])
        yield from _open_question(context, context.speak(fact["question"]), "fact", told, fact["answer"])


def _alternate(texts: list[str]) -> list[Message]:
    """A conversation of these texts; the user begins."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def _open_question(
    context: EvaluationContext, row: Row, task: str, earlier: list[Message], target: str
) -> Iterator[Query]:
    """The row's words after earlier messages, as speech and as text; `target` is a regular expression."""
    part = {"type": "audio", "path": row.audio, "transcript": row.transcript}
    sample = Sample(row.id, task, [*earlier, {"role": "user", "content": [part]}], target, duration=row.duration)
    for query in context.ask("context", ("P&L", "text"), sample, row):
        yield replace(query, max_new_tokens=48)


def style(context: EvaluationContext) -> list[Query]:
    """Replies to clips with the same words in one of two emotions, and to the training clips as text."""
    said = {(row.corpus, lowered(row), row.emotion) for row in context.rows if row.audio and row.transcript}
    able = {(corpus, words) for corpus, words, _ in said if said.issuperset((corpus, words, e) for e in STYLES)}
    if not able:
        context.notes.append(f"style: no words are said in both emotions ({', '.join(STYLES)}).")
        return []
    taught = {row.emotion for row in context.train if (row.corpus, lowered(row)) in able}
    if not taught.issuperset(STYLES) or "caption and text" not in context.conditions:
        why = "no training rows, or a system that takes no text, so nothing teaches the classifier."
        context.notes.append(f"style: {why}")
        return []
    system = PROMPTS["dialogue"]["systems"][0]
    found, asked = [], ("P&L", "L only", "caption and text")
    for rows, conditions in ((context.rows, asked), (context.train, ["caption and text" + TAUGHT])):
        rows = [row for row in rows if row.emotion in STYLES and (row.corpus, lowered(row)) in able]
        rows = [row.replace(history=[], system=system, response="(open)") for row in rows]
        chosen = replace(context, rows=rows).take("dialogue", LIMITS["style"])
        found += context.queries("style", conditions, "dialogue", chosen)
    return [replace(query, max_new_tokens=40) for query in found]


def benchmark(context: EvaluationContext, suite: str) -> list[Query]:
    """Questions of a public benchmark (benchmarks.py), as its authors ask them."""
    found, taken = [], Counter()
    for name, sample, row in sorted(context.questions, key=lambda q: hash_uniform(q[2].id, context.seed)):
        taken[name, sample.task, row.corpus] += 1
        if name == suite and (context.limit is None or taken[name, sample.task, row.corpus] <= context.limit):
            found += context.ask(suite, ("P&L", "P only", "L only", "cascade", "text"), sample, row)
    return [replace(query, max_new_tokens=BENCHMARKS[suite]) for query in found]


SUITES: dict[str, Callable[[EvaluationContext], list[Query]]] = {"hearing": lambda context: []}
SUITES |= {suite.__name__: suite for suite in (asr, attributes, meld, conversation, disentanglement, style, context)}
SUITES |= {name: partial(benchmark, suite=name) for name in BENCHMARKS}
