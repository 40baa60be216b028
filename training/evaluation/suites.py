"""The suites: what is asked, and what the replies are held to.

hearing         what the branches hear before the LLM, of every clip: no reply is asked for
asr             the paper's Table III, with the cascade and the true text beside it
attributes      its Table I, with pitch within gender and emotion at equal loudness
meld            its Table II
conversation    its Table IV (judges.py)
disentanglement both branches, one, none; the swap test (the voice of one clip, the words of another)
style           the same words said in two emotions: whether the replies differ, by a classifier of the text twins' replies
context         the same turn, and its text twin, after 0 to 12 turns; facts told in text and asked for by voice; instructions
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from ..attributes import MEASURED, Thresholds, classify
from ..backbones import ASSETS
from ..corpora.schema import share
from ..prompts import PROMPTS
from ..tasks import ATTRIBUTES, Sample, make_sample, parse_transcript, tasks_of
from ..warm_start import nothing_said
from .metrics import score, word_errors
from .systems import CONDITIONS, Query

ASSET = yaml.safe_load((ASSETS / "evaluation.yaml").read_text(encoding="utf-8"))
SMALL_TALK = (ASSETS / "small_talk.txt").read_text(encoding="utf-8").splitlines()
TURNS = (0, 2, 6, 12)
LOUDNESS = 0.05  # RMS that clips are brought to where loudness must not tell the emotion
SILENCE = "no speech, nothing heard"  # clips that say nothing: silence, noise, music
EQUAL = ", equal loudness"
STYLES = ("happy", "sad")
TAUGHT = ", training speakers"
LIMITS = {"context": 24, "conversation": 48, "style": 128}  # rows of a corpus and task, where a suite is costly
MAX_NEW_TOKENS = {"dialogue": 80}  # others: see `_room`


@dataclass
class Bench:
    """What the suites draw from.

    Args:
        rows: with audio, or with text alone; of the split that is evaluated.
        choices: as `tasks.label_sets` of the whole tables.
        conditions: that the system can be asked under.
        transcribe: row -> what Whisper's own decoder heard, for the cascade; `None` where there is none.
        speak: sentence -> a row that says it; `None` where no voice is installed.
        limit: rows of a corpus and task.
        seed: of every draw.
        words_as_text: the system has no linguistic adapter: its linguistic branch is the transcript.
        facts: attributes that prompts tell in words.
        tasks: that the system was made for; others are not asked.
        train: rows of the training split: probes and the classifier of `style` learn from them.
    """

    rows: list[dict]
    choices: dict[tuple[str, str], list[str]]
    conditions: tuple[str, ...]
    transcribe: Callable[[dict], str] | None = None
    speak: Callable[[str], dict] | None = None
    limit: int | None = None
    seed: int = 0
    words_as_text: bool = False
    facts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("asr", *ATTRIBUTES)
    train: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, task: str, limit: int | None = None, fit: Callable[[dict], bool] = bool) -> list[dict]:
        """Rows of a task, in an order that (seed, id) draws; at most `limit` of each corpus."""
        limits = [n for n in (limit, self.limit) if n is not None]
        taken: dict[str, int] = defaultdict(int)
        found = []
        for row in sorted(self.rows, key=lambda row: share(row["id"], self.seed)):
            if task in tasks_of(row) and fit(row) and (not limits or taken[row["corpus"]] < min(limits)):
                taken[row["corpus"]] += 1
                found.append(row)
        return found

    def clips(self, task: str, limit: int | None = None) -> list[dict]:
        """Rows with audio of a task that the system knows; for words, of corpora that have more than a handful of
        sentences."""
        if task not in self.tasks:
            return []
        if task != "asr":
            return self.take(task, limit, lambda row: row["audio"] is not None)
        texts = defaultdict(list)
        for row in self.rows:
            if row["transcript"] and row["audio"] and not nothing_said(row["transcript"]):
                texts[row["corpus"]].append(normal(row))
        able = {corpus for corpus, said in texts.items() if len(set(said)) > len(said) / 4}
        for corpus in sorted(set(texts) - able):
            self.notes.append(f"{corpus} has a handful of sentences and says nothing about words.")
        return self.take(
            task, limit, lambda r: r["audio"] is not None and r["corpus"] in able and not nothing_said(r["transcript"])
        )

    def silent_clips(self) -> list[dict]:
        """Rows whose transcript says that nobody speaks."""
        return self.take("asr", fit=lambda row: row["audio"] is not None and nothing_said(row["transcript"]))

    def query(self, suite: str, condition: str, sample: Sample, row: dict, voice: dict | None = None) -> Query | None:
        """The sample under a condition; `None` where the row or the system cannot be asked so."""
        base = condition.split(",")[0]
        how, what = CONDITIONS["P&L" if base == "swap" else base]
        if base not in self.conditions and base != "swap":
            return None
        if self.words_as_text and what == "speech":
            what = "transcript"
            if base == "swap" and voice is not None:  # the words of the other clip, as text
                sample = _with_words(sample, row)
        *earlier, turn = sample.messages
        content = []
        for part in turn["content"]:
            if part["type"] == "audio":
                if base == "cascade":
                    heard = self.transcribe(row) if self.transcribe and row["audio"] else None
                    if heard is None:
                        return None
                    part = part | {"transcript": heard}
                    what = "transcript" if heard.strip() else "none"
                if "speech" in (how, what) and row["audio"] is None:
                    return None
                if (how == "caption" and not part.get("caption")) or (
                    what == "transcript" and not part.get("transcript")
                ):
                    return None
                part = part | {"paralinguistic": how, "linguistic": what}
            content.append(part)
        sample = replace(sample, messages=[*earlier, turn | {"content": content}])
        return Query(suite, condition, sample, row, voice or row, _room(sample))

    def sample(self, row: dict, task: str) -> Sample:
        return make_sample(row, task, self.choices, self.seed, facts=self.facts)

    def queries(self, suite: str, conditions: Iterable[str], task: str, rows: list[dict]) -> Iterator[Query]:
        for row in rows:
            sample = self.sample(row, task)
            found = (self.query(suite, condition, sample, row) for condition in conditions)
            yield from (query for query in found if query is not None)


def _with_words(sample: Sample, row: dict) -> Sample:
    *earlier, turn = sample.messages
    content = [p | {"transcript": row["transcript"]} if p["type"] == "audio" else p for p in turn["content"]]
    return replace(sample, messages=[*earlier, turn | {"content": content}])


def _room(sample: Sample) -> int:
    """Tokens that a reply may take: for words about twice of what the fastest speech needs."""
    if sample.task == "asr":
        return 24 + int(8 * (sample.duration or 5.0)) // 16 * 16
    return MAX_NEW_TOKENS.get(sample.task, 24)


def relabel(row: dict, thresholds: Thresholds | None) -> dict:
    """The row with pitch, energy and tempo by a checkpoint's own borders, where the table has what was measured."""
    if thresholds is None:
        return row
    found = classify({name: row[column] for name, column in MEASURED.items()}, thresholds)
    return row | {name: label for name, label in found.items() if label and row[name]}


# --------------------------------------------------------------------------------------------------------------------
# Suites: bench -> queries
# --------------------------------------------------------------------------------------------------------------------


def asr(bench: Bench, suite: str = "asr", conditions=("P&L", "L only", "cascade", "text")) -> list[Query]:
    return list(bench.queries(suite, conditions, "asr", bench.clips("asr")))


def attributes(bench: Bench, suite: str = "attributes", conditions=("P&L", "P only")) -> list[Query]:
    found = []
    for task in ATTRIBUTES:
        rows = [row for row in bench.clips(task) if row["corpus"] != "meld"]
        found += bench.queries(suite, conditions, task, rows)
        if task == "emotion" and suite == "attributes":
            for query in bench.queries(suite, conditions, task, rows):
                level = query.row | {"loudness": LOUDNESS}
                found.append(replace(query, condition=query.condition + EQUAL, row=level, voice=level))
    return found


def meld(bench: Bench) -> list[Query]:
    rows = bench.take("emotion", fit=lambda row: row["corpus"] == "meld")
    return list(bench.queries("meld", ("P&L", "P only", "L only", "text"), "emotion", rows))


def conversation(bench: Bench) -> list[Query]:
    """Dialogues where there are any; else single turns with an emotion, else any spoken turn."""
    said = [row for row in bench.rows if row["transcript"]]
    rows = [row for row in said if row["history"] or row["response"]]
    rows = rows or [row for row in said if row["emotion"]] or said
    chosen = replace(bench, rows=[row | {"response": row["response"] or "(open)"} for row in rows])
    rows = chosen.take("dialogue", LIMITS["conversation"])
    return list(
        chosen.queries("conversation", ("P&L", "L only", "text", "caption and text", "cascade"), "dialogue", rows)
    )


def disentanglement(bench: Bench) -> list[Query]:
    name, conditions = "disentanglement", ("P&L", "P only", "L only", "none")
    found = asr(bench, name, conditions) + attributes(bench, name, conditions)
    if "P only" not in bench.conditions:
        bench.notes.append("the system has no branches: no swap test.")
        return found
    others = [row for row in bench.rows if row["audio"] and row["transcript"]]
    for task in ("asr", *ATTRIBUTES):
        for row in bench.clips(task):
            # The row has what the reply must follow. The other branch hears another speaker's clip, one that differs in it.
            unlike = [r for r in others if r["speaker"] != row["speaker"] and _differs(r, row, task)]
            if not unlike:
                continue
            other = random.Random(f"{bench.seed}/swap/{task}/{row['id']}").choice(unlike)
            words, voice = (row, other) if task == "asr" else (other, row)
            query = bench.query(name, "swap", bench.sample(row, task), words, voice)
            found += [query] if query else []
    return found


def _differs(a: dict, b: dict, task: str) -> bool:
    return normal(a) != normal(b) if task == "asr" else a[task] not in (None, b[task])


def normal(row: dict) -> str:
    return (row["transcript"] or "").lower()


def context(bench: Bench) -> list[Query]:
    found = []
    for task in ("asr", *ATTRIBUTES):
        for row in bench.clips(task, LIMITS["context"]):
            sample = bench.sample(row | {"history": []}, task)
            for turns in TURNS:
                late = after(sample, small_talk(turns))
                for condition in ("P&L", "caption and text"):  # the second: what the LLM can do by itself
                    query = bench.query("context", f"{condition}, after {turns} turns", late, row)
                    found += [query] if query else []
    rows = bench.clips("asr", LIMITS["context"])
    for number, row in enumerate(rows):
        asked = ASSET["instructions"][number % len(ASSET["instructions"])]
        part = {"type": "audio", "path": row["audio"], "transcript": row["transcript"]}
        messages = [{"role": "system", "content": asked["text"]}, {"role": "user", "content": [part]}]
        sample = Sample(row["id"], "instruction", messages, asked["kept"], duration=row["duration"])
        for condition in ("P&L", "text"):
            query = bench.query("context", condition, sample, row)
            found += [replace(query, max_new_tokens=48)] if query else []
    if bench.speak is None:
        bench.notes.append("facts were not asked for: no voice is installed (pip install piper-tts).")
        return found
    for fact in ASSET["facts"]:
        row = bench.speak(fact["question"])
        part = {"type": "audio", "path": row["audio"], "transcript": row["transcript"]}
        told = [
            {"role": "user", "content": fact["told"]},
            {"role": "assistant", "content": ASSET["fact_thanks"]},
            *small_talk(6),
        ]
        messages = [*told, {"role": "user", "content": [part]}]
        sample = Sample(row["id"], "fact", messages, fact["answer"], duration=row["duration"])
        for condition in ("P&L", "text"):
            query = bench.query("context", condition, sample, row)
            found += [replace(query, max_new_tokens=48)] if query else []
    return found


def style(bench: Bench) -> list[Query]:
    """Replies to clips that say the same words in one of two emotions, and to the text twins of training clips."""
    said: dict[tuple, set] = defaultdict(set)
    for row in bench.rows:
        if row["audio"] and row["transcript"] and row["emotion"] in STYLES:
            said[row["corpus"], normal(row)].add(row["emotion"])
    able = {place for place, emotions in said.items() if len(emotions) == len(STYLES)}
    if not able:
        bench.notes.append(f"style: no words are said in both emotions ({', '.join(STYLES)}).")
        return []
    taught = {row["emotion"] for row in bench.train if (row["corpus"], normal(row)) in able}
    if not taught.issuperset(STYLES) or "caption and text" not in bench.conditions:
        bench.notes.append(
            "style: no training rows, or a system that takes no text, so nothing teaches the classifier."
        )
        return []
    system = PROMPTS["dialogue"]["systems"][0]
    found = []
    for rows, conditions in (
        (bench.rows, ("P&L", "L only", "caption and text")),
        (bench.train, ("caption and text" + TAUGHT,)),
    ):
        rows = [r for r in rows if r["emotion"] in STYLES and r["transcript"] and (r["corpus"], normal(r)) in able]
        asked = [row | {"history": [], "system": system, "response": "(open)"} for row in rows]
        chosen = replace(bench, rows=asked).take("dialogue", LIMITS["style"])
        found += bench.queries("style", conditions, "dialogue", chosen)
    return [replace(query, max_new_tokens=40) for query in found]


def small_talk(turns: int) -> list[dict]:
    """So many turns about nothing, the user's first and the assistant's last."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(SMALL_TALK[:turns])]


def after(sample: Sample, history: list[dict]) -> Sample:
    """The sample with a history before its spoken turn."""
    *earlier, turn = sample.messages
    return replace(sample, messages=[*earlier, *history, turn])


SUITES: dict[str, Callable[[Bench], list[Query]]] = {
    "hearing": lambda bench: [],
    "asr": asr,
    "attributes": attributes,
    "meld": meld,
    "conversation": conversation,
    "disentanglement": disentanglement,
    "style": style,
    "context": context,
}


# --------------------------------------------------------------------------------------------------------------------
# Replies -> records
# --------------------------------------------------------------------------------------------------------------------


def record(query: Query, reply: str, prompt: str) -> dict:
    """One line of a suite's JSON Lines."""
    row, voice, sample = query.row, query.voice, query.sample
    owner = voice if sample.choices else row  # whom the reply is about
    kept = {
        "suite": query.suite,
        "condition": query.condition.removesuffix(EQUAL),
        "task": sample.task + (EQUAL if query.condition.endswith(EQUAL) else ""),
        "corpus": owner["corpus"],
        "id": owner["id"],
        "speaker": owner["speaker"] or owner["dialogue"] or owner["id"],
        "gender": owner["gender"],
        "audio": owner["audio"],
        "prompt": prompt,
        "reply": reply,
    }
    if query.condition == "swap":
        other = row if sample.choices else voice
        kept["other"] = {"id": other["id"], "label": other.get(sample.task), "transcript": other["transcript"]}
        if sample.task == "asr":
            errors, words = word_errors(other["transcript"], parse_transcript(reply))
            kept["other"] |= {"errors": errors, "words": words}
    if sample.task in ("fact", "instruction"):
        flags = re.IGNORECASE if sample.task == "fact" else 0
        return kept | {"value": float(bool(re.search(sample.target, reply, flags))), "wanted": sample.target}
    return kept | score(sample, reply, row["transcript"])


def direct(
    rows: list[dict], heard: list[dict], suite: str, condition: str = "heard", only: str | None = None
) -> Iterator[dict]:
    """Records of what the branches hear before the LLM: words by CTC, attributes by caption slots. `only` one attribute
    of clips brought to equal loudness."""
    for row, item in zip(rows, heard, strict=True):
        common = {"suite": suite, "condition": condition, "corpus": row["corpus"], "id": row["id"]}
        common |= {"speaker": row["speaker"] or row["id"], "gender": row["gender"], "audio": row["audio"]}
        if suite == "asr" and item["heard"] is not None and nothing_said(row["transcript"]):
            heard = item["heard"].strip()
            yield common | {"task": SILENCE, "reply": heard, "value": float(not heard), "wanted": row["transcript"]}
        elif suite == "asr" and item["heard"] is not None:
            errors, words = word_errors(row["transcript"], item["heard"])
            said = {"task": "asr", "said": row["transcript"], "heard": item["heard"]}
            yield common | said | {"reply": item["heard"], "errors": errors, "words": words}
        if suite == "attributes" and item["attributes"] is not None:
            for task, probabilities in item["attributes"].items():
                if row.get(task) in probabilities and only in (None, task):
                    best = max(probabilities, key=probabilities.get)
                    said = {"task": task + (EQUAL if only else ""), "label": row[task], "parsed": best}
                    said |= {"confidence": probabilities[best]}
                    yield common | said | {"reply": best, "choices": sorted(probabilities)}


def output(folder: Path, suite: str) -> Path:
    """Where a suite's records are written."""
    return folder / f"{suite}.jsonl"
