"""Rows of a table -> conversations with targets (paper, section III-B), and replies -> labels.

What is drawn for a sample (wording, order of choices, length of the history) is a function of (seed, epoch, id) alone.
"""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .attributes import describe
from .prompts import PROMPTS

ATTRIBUTES = tuple(PROMPTS["attributes"])
KINDS = {"asr": "linguistic", "dialogue": "dual"} | dict.fromkeys(ATTRIBUTES, "paralinguistic")
TASKS = tuple(KINDS)


@dataclass(frozen=True)
class Sample:
    """One conversation with its target.

    Args:
        id: of the row.
        task: one of `TASKS`; its `kind` is linguistic, paralinguistic or dual.
        messages: chat messages, the last of which is the user's spoken turn.
        target: what the assistant should answer.
        complete: the target is whole, so its end is trained too.
        label, choices: of a paralinguistic task.
        duration: of the clip in seconds, where known.
    """

    id: str
    task: str
    messages: list[dict]
    target: str
    complete: bool = True
    label: str | None = None
    choices: list[str] = field(default_factory=list)
    duration: float | None = None

    @property
    def kind(self) -> str:
        return KINDS[self.task]


def tasks_of(row: dict) -> list[str]:
    """The tasks that a row has a target for; whose words are not those of its clip (`voice_only`) is no ASR task."""
    found = ["asr"] if row["transcript"] and not row["voice_only"] else []
    found += [name for name in ATTRIBUTES if row[name] is not None]
    return found + (["dialogue"] if row["response"] and row["transcript"] else [])


def label_sets(rows: Iterable[dict]) -> dict[tuple[str, str], list[str]]:
    """The labels that occur, for each (corpus, attribute): the choices of its tasks."""
    sets: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for name in ATTRIBUTES:
            if row[name] is not None:
                sets.setdefault((row["corpus"], name), set()).add(row[name])
    return {key: sorted(labels) for key, labels in sets.items()}


def make_sample(
    row: dict,
    task: str,
    choices: dict[tuple[str, str], list[str]],
    seed: int = 0,
    epoch: int = 0,
    positional_randomness: bool = True,
    facts: Iterable[str] = (),
) -> Sample:
    """The conversation of a row for a task, with its target.

    The instruction stands in the system prompt or, by chance and always behind a history, in the spoken turn itself. The
    history of an ASR or attribute task is cut to a random length (positional randomness, section III-C); that of a
    dialogue is the one its response answers, cut beforehand (`cut_histories`). Without `positional_randomness` there is
    no history, and always the first instruction, in the system prompt.

    `facts` are attributes that the prompt of another attribute's task tells in words, where they are known (EmoSLLM).
    """
    draw = random.Random(f"{seed}/{epoch}/{row['id']}/{task}")
    spoken = spoken_part(row)
    if task == "dialogue":
        system = row["system"]
        if system is None:
            system = system_prompt(row, seed) if positional_randomness else PROMPTS["dialogue"]["systems"][0]
        history = row["history"] if positional_randomness else []
        content, target, complete = [spoken], row["response"], row["response_complete"] is not False
        return _sample(row, task, system, history, content, target, complete=complete)

    if task == "asr":
        group = draw.choice(PROMPTS["asr"]) if positional_randomness else PROMPTS["asr"][0]
        label, options = None, []
        values = {"transcript": row["transcript"]}
    else:
        group, label = PROMPTS["attributes"][task], row[task]
        options = list(choices[row["corpus"], task])
        draw.shuffle(options)
        values = {"label": label, "choices": ", ".join(options)}
    if positional_randomness:
        instruction, answer = draw.choice(group["instructions"]), draw.choice(group["answers"])
        history = row["history"][draw.randint(0, len(row["history"])) :]
        in_turn = bool(history) or draw.random() < 0.5
    else:
        instruction, answer, history, in_turn = group["instructions"][0], group["answers"][0], [], False
    instruction = instruction.format(**values)
    told = {name: row[name] for name in facts if name != task} if task in ATTRIBUTES else {}
    told = describe(told, random.Random(f"{seed}/{epoch}/facts/{row['id']}"))
    content = [spoken, *([{"type": "text", "text": told}] if told else [])]
    content += [{"type": "text", "text": instruction}] if in_turn else []
    system = None if in_turn else instruction
    return _sample(row, task, system, history, content, answer.format(**values), label=label, choices=options)


def _sample(row: dict, task: str, system: str | None, history: list, content: list, target: str, **more) -> Sample:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": turn["role"], "content": turn["content"]} for turn in history]
    messages.append({"role": "user", "content": content})
    return Sample(row["id"], task, messages, target, duration=row["duration"], **more)


def spoken_part(row: dict) -> dict:
    """The content part of the row's turn: its audio, and the texts that can stand in for it. A row without audio has
    the texts as its sources."""
    part = {"type": "audio", "path": row["audio"], "transcript": row["transcript"], "caption": row["caption"]}
    if row["caption"] is None:
        part["caption"] = describe(row, random.Random(f"caption/{row['id']}"))
    if row["audio"] is None:
        part["linguistic"] = "transcript" if part["transcript"] else "none"
        part["paralinguistic"] = "caption" if part["caption"] else "none"
    return {key: value for key, value in part.items() if value is not None}


def system_prompt(row: dict, seed: int = 0) -> str | None:
    """The system prompt of a row's dialogue: its response answers under it, so it is the same in every epoch."""
    draw = random.Random(f"{seed}/system/{row['id']}")
    prompts = PROMPTS["dialogue"]
    return None if draw.random() < prompts["none_share"] else draw.choice(prompts["systems"])


def cut_histories(rows: Iterable[dict], seed: int = 0) -> Iterator[dict]:
    """Each row, and one more with a shorter history where it has one: the paper's extra samples (section IV-A)."""
    for row in rows:
        yield row
        if row["history"]:
            length = random.Random(f"{seed}/cut/{row['id']}").randrange(len(row["history"]))
            history = row["history"][len(row["history"]) - length :]
            # The corpus's own response stays: it answers the same turn.
            yield row | {"id": f"{row['id']}/last{length}", "history": history}


def lend_histories(rows: list[dict], dialogues: Iterable[dict], seed: int = 0, longest: int = 12) -> Iterator[dict]:
    """Rows of read speech have no conversation: each such row gets the earlier turns of a dialogue, as text.

    So the positional randomness of ASR and attribute tasks (section III-C), and any conversation of more than one turn,
    can be trained on corpora of single turns. Rows that have a history or a response keep theirs.

    Args:
        dialogues: rows with histories; a row borrows from its own split. At most the last `longest` turns are lent.

    Raises:
        ValueError: no dialogue of a split that needs one.
    """
    known: dict[str, list[list[dict]]] = {}
    for row in dialogues:
        if row["history"] and row["history"][0]["role"] == "user":
            known.setdefault(row["split"], []).append(row["history"])
    for row in rows:
        if row["history"] or row["response"]:
            yield row
            continue
        if row["split"] not in known:
            raise ValueError(f"no dialogue of the split {row['split']} has a history that {row['id']} could borrow.")
        history = random.Random(f"{seed}/lend/{row['id']}").choice(known[row["split"]])
        yield row | {"history": history[-longest:]}


def text_twin(messages: list[dict]) -> list[dict]:
    """The same conversation as text: in each spoken turn the caption and the transcript stand for the two branches."""
    twin = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            pieces = []
            for part in content:
                if part["type"] == "audio":
                    pieces.append(" ".join(part[k].strip() for k in ("caption", "transcript") if part.get(k)))
                else:
                    pieces.append(part["text"])
            content = "\n".join(pieces)
        twin.append({"role": message["role"], "content": content})
    return twin


# --------------------------------------------------------------------------------------------------------------------
# Parsers
# --------------------------------------------------------------------------------------------------------------------


# What each attribute is called: "high pitch" says nothing about the energy.
_NOUNS = {
    "gender": "gender|sex",
    "pitch": "pitch(?:ed)?",
    "tempo": "tempo|speed|pace|rate",
    "energy": "energy|volume|loudness",
    "emotion": "emotions?|feelings?|mood",
}
_DENIED = re.compile(r"(\bnot|n't|\bneither|\bnor|\brather than|\binstead of)\s+(\w+\s+)?$")


def parse_label(reply: str, choices: Iterable[str], task: str | None = None) -> str | None:
    """The one label that a reply names, by itself or a synonym (`prompts.yaml`); `None` ("unparsed") if it names none or
    several. Labels that are denied, or said of another attribute than the `task`'s, do not count."""
    others = "|".join(nouns for name, nouns in _NOUNS.items() if task is not None and name != task)
    behind = rf"(?!\w|[ -](?:{others})\b)" if others else r"(?!\w)"
    found, text = set(), reply.lower()
    for label in choices:
        names = "|".join(re.escape(name) for name in (label, *PROMPTS["synonyms"].get(label, ())))
        for match in re.finditer(rf"(?<![\w-])(?:{names}){behind}(?!-(?!pitch|energy|tempo))", text):
            if not _DENIED.search(text[: match.start()]):
                found.add(label)
    return found.pop() if len(found) == 1 else None


_QUOTED = re.compile(
    r"^[^\"]*?\b(?:says?|said|is|transcript)\b[^\"]{0,20}\"(.*)\"\s*\.?\s*$", re.DOTALL | re.IGNORECASE
)


def parse_transcript(reply: str) -> str:
    """The words of an ASR reply: what stands in quotation marks if the reply is a sentence about it, else all of it."""
    reply = reply.strip()
    if quoted := _QUOTED.match(reply):
        return quoted[1].strip()
    return reply.strip('"').strip()
