"""Turns the rows of a table into conversations with targets (paper, section III-B).

Each draw (wording, order of choices, length of the history) is a function of the seed, the epoch and the row's id.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .attributes import describe
from .corpora.row import Row
from .labels import ATTRIBUTES, KINDS
from .prompts import PROMPTS

Message = dict[str, Any]  # a chat message: role, and content as a text or a list of parts
LabelSets = Mapping[tuple[str, str], Sequence[str]]  # (corpus, attribute) -> labels


@dataclass(frozen=True)
class Sample:
    """One conversation with its target."""

    id: str  # of the row
    task: str  # one of `TASKS`
    messages: list[Message]  # the last one is the user's spoken turn
    target: str
    complete: bool = True  # False: the target was cut, so its end is not trained
    label: str | None = None  # of a paralinguistic task
    choices: list[str] = field(default_factory=list)
    duration: float | None = None  # of the clip, in seconds

    @property
    def kind(self) -> str:
        return KINDS[self.task]

    @property
    def spoken(self) -> dict:
        """The audio part of the last turn."""
        return next(part for part in self.messages[-1]["content"] if part["type"] == "audio")

    def with_spoken(self, **changes) -> "Sample":
        """The sample with changed keys in the audio part of its last turn; a value of `None` removes the key."""
        spoken = {key: value for key, value in (self.spoken | changes).items() if value is not None}
        *earlier, turn = self.messages
        content = [spoken if part["type"] == "audio" else part for part in turn["content"]]
        return replace(self, messages=[*earlier, turn | {"content": content}])


def tasks_of(row: Row) -> list[str]:
    """The tasks that a row has a target for. A `voice_only` row, whose clip says other words, has no ASR task."""
    found = ["asr"] if row.transcript and not row.voice_only else []
    found += [name for name in ATTRIBUTES if row.label(name) is not None]
    return found + (["dialogue"] if row.response and row.transcript else [])


def label_sets(rows: Iterable[Row]) -> dict[tuple[str, str], list[str]]:
    """The labels that occur, for each (corpus, attribute): the choices of its tasks."""
    sets: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for name in ATTRIBUTES:
            if (label := row.label(name)) is not None:
                sets.setdefault((row.corpus, name), set()).add(label)
    return {key: sorted(labels) for key, labels in sets.items()}


def make_sample(
    row: Row,
    task: str,
    choices: LabelSets,
    seed: int = 0,
    epoch: int = 0,
    positional_randomness: bool = True,
    facts: Iterable[str] = (),
) -> Sample:
    """Makes the conversation of a row for a task, with its target.

    The instruction is in the system prompt or, by chance and always after a history, in the spoken turn. The history of
    an ASR or attribute task is cut to a random length (positional randomness; paper, section III-C).

    Args:
        choices: see [`label_sets`].
        positional_randomness: without it there is no history, and the first instruction is in the system prompt.
        facts: attributes that the prompt of another attribute's task tells in words, if they are known (EmoSLLM).
    """
    if task == "dialogue":  # its history was cut beforehand, see `cut_histories`
        system = row.system
        if system is None:
            system = system_prompt(row, seed) if positional_randomness else PROMPTS["dialogue"]["systems"][0]
        messages = conversation(system, row.history if positional_randomness else [], [spoken_part(row)])
        complete = row.response_complete is not False
        return Sample(row.id, task, messages, row.response or "", complete, duration=row.duration)
    draw = random.Random(f"{seed}/{epoch}/{row.id}/{task}")
    options = [] if task == "asr" else list(choices[row.corpus, task])
    if task == "asr":
        group = draw.choice(PROMPTS["asr"]) if positional_randomness else PROMPTS["asr"][0]
    else:
        group = PROMPTS["attributes"][task]
        draw.shuffle(options)
    if positional_randomness:
        instruction, answer = draw.choice(group["instructions"]), draw.choice(group["answers"])
        history = row.history[draw.randint(0, len(row.history)) :]
        in_turn = bool(history) or draw.random() < 0.5
    else:
        instruction, answer, history, in_turn = group["instructions"][0], group["answers"][0], [], False
    values = {"transcript": row.transcript, "label": row.label(task), "choices": ", ".join(options)}
    instruction, target = instruction.format(**values), answer.format(**values)
    known = {name: row.label(name) for name in facts if name != task} if task in ATTRIBUTES else {}
    told = describe(known, random.Random(f"{seed}/{epoch}/facts/{row.id}"))
    texts = [told, instruction if in_turn else None]
    content = [spoken_part(row), *({"type": "text", "text": text} for text in texts if text)]
    messages = conversation(None if in_turn else instruction, history, content)
    return Sample(row.id, task, messages, target, label=row.label(task), choices=options, duration=row.duration)


def conversation(system: str | None, history: Iterable[Message], content: list[dict]) -> list[Message]:
    """The messages of a conversation that ends in a user's turn of several parts."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *map(dict, history), {"role": "user", "content": content}]


def spoken_part(row: Row) -> dict:
    """The content part of the row's turn: its audio, and the texts that can replace it (its sources without audio)."""
    part = {"type": "audio", "path": row.audio, "transcript": row.transcript, "caption": row.caption}
    if row.caption is None:
        part["caption"] = describe(row, random.Random(f"caption/{row.id}"))
    if row.audio is None:
        part["linguistic"] = "transcript" if part["transcript"] else "none"
        part["paralinguistic"] = "caption" if part["caption"] else "none"
    return {key: value for key, value in part.items() if value is not None}


def system_prompt(row: Row, seed: int = 0) -> str | None:
    """The system prompt of a row's dialogue. It is the same in every epoch, as the response answers under it."""
    draw, prompts = random.Random(f"{seed}/system/{row.id}"), PROMPTS["dialogue"]
    return None if draw.random() < prompts["none_share"] else draw.choice(prompts["systems"])


def cut_histories(rows: Iterable[Row], seed: int = 0) -> Iterator[Row]:
    """Yields each row and, if it has a history, a copy with a shorter one (the extra samples of the paper's section IV-A)."""
    for row in rows:
        yield row
        if row.history:
            yield cut_history(row, seed)


def cut_history(row: Row, seed: int = 0) -> Row:
    """A copy of a row with the last turns of its history, at least one fewer."""
    length = random.Random(f"{seed}/cut/{row.id}").randrange(len(row.history))
    # The corpus's own response stays: it answers the same turn.
    return row.replace(id=f"{row.id}/last{length}", history=row.history[len(row.history) - length :])


def lend_histories(rows: Iterable[Row], dialogues: Iterable[Row], seed: int = 0, longest: int = 12) -> Iterator[Row]:
    """Gives each row without a conversation the last earlier turns of a dialogue of its split, as text.

    So a corpus of single turns can train the positional randomness of ASR and attribute tasks (section III-C).
    """
    known: dict[str, list[list[Message]]] = {}
    for row in dialogues:
        if row.history and row.history[0]["role"] == "user":
            known.setdefault(row.split, []).append(row.history)
    for row in rows:
        if row.history or row.response:
            yield row
            continue
        if row.split not in known:
            raise ValueError(f"no dialogue of the split {row.split} has a history that {row.id} could borrow.")
        history = random.Random(f"{seed}/lend/{row.id}").choice(known[row.split])
        yield row.replace(history=history[-longest:])


def text_twin(messages: Iterable[Message]) -> list[Message]:
    """The same conversation as text: caption and transcript replace the two branches of each spoken turn."""

    def as_text(part: dict) -> str:
        texts = [part[name].strip() for name in ("caption", "transcript") if part.get(name)]
        return " ".join(texts) if part["type"] == "audio" else part["text"]

    twin = []
    for message in messages:
        content = message["content"]
        text = content if isinstance(content, str) else "\n".join(map(as_text, content))
        twin.append({"role": message["role"], "content": text})
    return twin
