"""LLM judges of conversations (paper, Table IV): any causal LM, or any OpenAI-compatible endpoint.

A wording is an entry of `judges` in assets/evaluation.yaml: CS and EGS are those of the cited papers. EGS shows a judge the
"optional responses" of one turn together. These are the replies of the systems that are compared, and nothing else.
A reply under another condition than P&L, and each control, has a prompt of its own.

The controls are a reply to another conversation, and an empty one. A judge that does not score them lower is useless.
A journal keeps every answer, so that an interrupted run goes on.
"""

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from tqdm import tqdm

from ..attributes import describe
from ..batches import batched
from ..corpora.row import Row
from ..endpoint import read_endpoint
from ..files import Journal
from .context import ASSET

ATTEMPTS, MAX_NEW_TOKENS = 3, 256
CONTROLS = ("control: another reply", "control: empty reply")
EMPTY = "..."
CITED = ("CS", "EGS")  # wordings of the papers that the paper cites (section IV-B)
SYSTEM = "system: "  # begins the condition of another system's replies


class Judge(Protocol):
    """Answers prompts."""

    name: str

    def complete(self, prompts: list[str], seed: int) -> list[str | None]:
        """An answer to each prompt; `None` if none came. Seed 0 is greedy, other seeds sample."""
        ...


class LocalJudge:
    """A causal LM of transformers, by Hub id, folder or the name of a pip-hosted backbone."""

    def __init__(self, name: str, dtype: str = "auto", device: str = "cpu"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ...backbones_dual_slm import name_in_errors, resolve_backbone

        self.name = name
        with name_in_errors(name):
            folder = resolve_backbone(name)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
            self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        self.model.to(device)

    def complete(self, prompts: list[str], seed: int) -> list[str | None]:
        import torch

        talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = self.tokenizer.apply_chat_template(talks, add_generation_prompt=True, tokenize=False)
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 0.7} if seed else {"do_sample": False}
        with torch.inference_mode():
            output = self.model.generate(**inputs.to(self.model.device), max_new_tokens=MAX_NEW_TOKENS, **options)
        return self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class RemoteJudge:
    """An OpenAI-compatible endpoint (vLLM, llama.cpp, `transformers serve`, a provider): `http://host:port/v1#model`.

    The environment variable OPENAI_API_KEY holds the key. The client retries time-outs, 429 and 5xx with growing pauses.

    Args:
        timeout: of one request, in seconds.

    Raises:
        ValueError: the URL names no model, or the endpoint refuses the request.
        ConnectionError: the endpoint has never answered, not even with an error.
    """

    def __init__(self, url: str, timeout: float = 120.0, max_retries: int = 4):
        import openai

        base, self.model, key = read_endpoint(url)
        self.name, self.reached = url, False
        self.client = openai.OpenAI(base_url=base, api_key=key, timeout=timeout, max_retries=max_retries)

    def complete(self, prompts: list[str], seed: int) -> list[str | None]:
        return [self._ask(prompt, seed) for prompt in prompts]

    def _ask(self, prompt: str, seed: int) -> str | None:
        import openai

        messages: Any = [{"role": "user", "content": prompt}]
        options = {"max_tokens": MAX_NEW_TOKENS, "temperature": 0.7 if seed else 0.0, "seed": seed}
        try:
            answer = self.client.chat.completions.create(messages=messages, model=self.model, **options)
        except openai.APIStatusError as error:
            self.reached = True
            if error.status_code < 500 and error.status_code not in (408, 409, 429):
                raise ValueError(f"the judge {self.name} refuses with status {error.status_code}: {error}") from error
            return None
        except openai.APIConnectionError as error:
            if not self.reached:
                cause = error.__cause__ or error
                raise ConnectionError(f"the judge {self.name} cannot be reached: {cause}") from error
            return None
        except ValueError:  # the body is no JSON
            answer = None
        self.reached = True
        choices = getattr(answer, "choices", None)  # the client returns other bodies as they are
        return (choices[0].message.content or "") if choices else None


def load_judge(name: str, dtype: str = "auto", device: str = "cpu") -> Judge:
    """Loads a causal LM; a URL with a model behind a # is an endpoint."""
    return RemoteJudge(name) if "://" in name else LocalJudge(name, dtype, device)


def prompt_for(about: dict[str, Any], row: Row, replies: dict[str, str]) -> str:
    """The prompt of a wording for numbered replies to the turn of a row."""
    lines = [f"{about['roles'].get(turn['role'], turn['role'])}: {turn['content']}" for turn in row.history]
    context = "\n".join([*lines, f"{about['roles']['user']}: {row.transcript}"])
    caption = row.caption or describe(row, random.Random(f"caption/{row.id}")) or ""  # for a judge that reads
    return about["prompt"].format(
        history="\n".join(lines) or "(nothing yet)",
        turn=row.transcript,
        context=context,
        instruction=context if lines else row.transcript,
        style=re.sub(r"^[(\[]|[)\]]$", "", caption).strip() or "in an unknown tone",
        reply=next(iter(replies.values())),
        replies="\n".join(about.get("numbered", "{reply}").format(number=n, reply=r) for n, r in replies.items()),
    )


def parse_scores(answer: str | None, about: dict[str, Any], numbers: list[str]) -> dict[str, dict[str, float]] | None:
    """Scores of each numbered reply.

    Returns:
        `None` unless the answer holds exactly one JSON object with every criterion of every reply as a number within
        the scale.
    """
    answer = answer or ""
    try:
        value = json.loads(answer[answer.find("{") : answer.rfind("}") + 1])
        value = value if about["together"] else {numbers[0]: value}
        scores = {n: {criterion: value[n][criterion] for criterion in about["criteria"]} for n in numbers}
    except (ValueError, KeyError, TypeError):
        return None
    low, high = about["scale"]
    for found in scores.values():
        if any(type(score) not in (int, float) or not low <= score <= high for score in found.values()):
            return None
    return {number: {name: float(score) for name, score in found.items()} for number, found in scores.items()}


@dataclass(frozen=True)
class Job:
    """One prompt of a judge."""

    key: str  # of the journal, without the number of the attempt
    wording: str  # CS, EGS ...
    talk: tuple[str, str]  # (corpus, id) of the conversation
    conditions: list[str]  # of the replies, in the order of the prompt
    prompt: str


def make_jobs(
    judge: Judge,
    records: list[dict],
    rows: dict[tuple[str, str], Row],
    seed: int = 0,
    wordings: Iterable[str] = CITED,
) -> list[Job]:
    """All prompts for the replies and the controls of each conversation; see [`judge`]."""
    talks: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for record in records:
        talks[record["corpus"], record["id"]][record["condition"]] = record["reply"]
    names = sorted(talks)
    for place, name in enumerate(names):
        others = (other for other in [*names[place + 1 :], *names[:place]] if _unlike(rows[other], rows[name]))
        if other := next(others, None):
            talks[name][CONTROLS[0]] = next(iter(talks[other].values()))
        talks[name][CONTROLS[1]] = EMPTY
    jobs = []
    for wording in wordings:
        about = ASSET["judges"][wording]
        for name in names:
            for group in _groups(talks[name], about["together"], random.Random(f"{seed}/{'/'.join(name)}")):
                prompt = prompt_for(
                    about, rows[name], {str(n): talks[name][c] or EMPTY for n, c in enumerate(group, 1)}
                )
                digest = hashlib.sha256(prompt.encode()).hexdigest()[:12]
                key = f"{judge.name}/{ASSET['version']}/{wording}/{'/'.join(name)}/{'|'.join(group)}/{digest}"
                jobs.append(Job(key, wording, name, group, prompt))
    return jobs


def _groups(replies: Iterable[str], together: bool, draw: random.Random) -> Iterator[list[str]]:
    """The conditions of each prompt: those of the compared systems together in random order, if the wording says so."""
    compared = [condition for condition in replies if condition == "P&L" or condition.startswith(SYSTEM)]
    if together and compared:
        yield draw.sample(compared, len(compared))  # no system is always read first
    yield from ([condition] for condition in replies if not together or condition not in compared)


def _unlike(first: Row, second: Row) -> bool:
    """Whether a reply to the one is no reply to the other. StyleTalk has the same turn in several styles."""
    same = first.dialogue is not None and first.dialogue == second.dialogue
    return not same and first.transcript != second.transcript


def judge(
    judge: Judge,
    records: list[dict],
    rows: dict[tuple[str, str], Row],
    journal: Journal,
    seed: int = 0,
    wordings: Iterable[str] = CITED,
) -> list[dict]:
    """Scores the replies of the suite `conversation`, and two controls for each conversation.

    An answer that cannot be parsed is asked for again, up to `ATTEMPTS` times.

    Args:
        rows: by (corpus, id).
        journal: the answers of this run and of earlier ones.
        seed: of the order of replies in a prompt.
        wordings: keys of `judges` in assets/evaluation.yaml.

    Returns:
        Records with `judge`, `condition`, `metric` ("CS content" ...) and `value`: `None` if no answer could be parsed.
    """
    jobs = make_jobs(judge, records, rows, seed, wordings)

    def scores(job: Job) -> dict[str, dict[str, float]] | None:
        answers = (journal.values.get(f"{job.key}#{attempt}") for attempt in range(ATTEMPTS))
        numbers = [str(number + 1) for number in range(len(job.conditions))]
        parsed = (parse_scores(answer, ASSET["judges"][job.wording], numbers) for answer in answers)
        return next(filter(None, parsed), None)

    for attempt in range(ATTEMPTS):
        todo = [job for job in jobs if f"{job.key}#{attempt}" not in journal.values and scores(job) is None]
        for part in tqdm(batched(todo, 16), desc=f"judge, attempt {attempt + 1}", unit=" batches"):
            answers = judge.complete([job.prompt for job in part], seed=attempt)
            # The next run asks again for an answer that did not come.
            journal.add({f"{j.key}#{attempt}": a for j, a in zip(part, answers, strict=True) if a is not None})
    speakers = {(record["corpus"], record["id"]): record["speaker"] for record in records}
    found = []
    for job in jobs:
        parsed, (corpus, name) = scores(job), job.talk
        for number, condition in enumerate(job.conditions, 1):
            entry = {"suite": "conversation", "task": "dialogue", "judge": judge.name, "condition": condition}
            entry |= {"corpus": corpus, "id": name, "speaker": speakers[job.talk]}
            for criterion in ASSET["judges"][job.wording]["criteria"]:
                value = parsed and parsed[str(number)][criterion]
                found.append(entry | {"metric": f"{job.wording} {criterion}", "value": value})
    return found
