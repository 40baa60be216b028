"""LLM judges of conversations (the paper's Table IV): any causal LM, or any OpenAI-style endpoint.

Every call is kept in a journal, so that nothing is lost to a kill, a time-out or a bad answer. Controls (a reply to another
conversation, an empty one) are judged with the rest: a judge that does not score them lower says nothing.
"""

import json
import random
import re
import time
from typing import Protocol

from tqdm import tqdm

from ..attributes import describe
from ..journal import Journal
from .suites import ASSET

ATTEMPTS = 3
CONTROLS = ("control: another reply", "control: empty reply")
EMPTY = "..."


class Judge(Protocol):
    """Text -> text."""

    name: str

    def complete(self, prompts: list[str], seed: int) -> list[str | None]:
        """An answer to each prompt; `None` where none came. `seed` 0 is greedy, others draw."""


class LocalJudge:
    """A causal LM of transformers, by Hub id, folder or the name of a pip-hosted backbone."""

    def __init__(self, name: str, dtype: str = "auto", device: str = "cpu", max_new_tokens: int = 256):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ...modeling_dual_slm import name_in_errors, resolve_backbone

        self.name, self.max_new_tokens = name, max_new_tokens
        with name_in_errors(name):
            folder = resolve_backbone(name)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device)

    def complete(self, prompts: list[str], seed: int) -> list[str | None]:
        import torch

        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            for prompt in prompts
        ]
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 0.7} if seed else {"do_sample": False}
        with torch.inference_mode():
            output = self.model.generate(**inputs.to(self.model.device), max_new_tokens=self.max_new_tokens, **options)
        return self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class RemoteJudge:
    """An OpenAI-style endpoint (vLLM, llama.cpp, `transformers serve`, a provider): `http://host:port/v1#model`.

    The key is $OPENAI_API_KEY. Time-outs, 429 and 5xx are tried again with growing pauses; then the answer is `None`. If
    nobody has answered anything by then, not even with an error, it is a `ConnectionError`.

    Args:
        patience: seconds that the first pause takes.
    """

    def __init__(self, url: str, timeout: float = 120.0, attempts: int = 5, patience: float = 1.0):
        import os

        from huggingface_hub import InferenceClient

        base, _, model = url.partition("#")
        if not model:
            raise ValueError(f"{url}: name the model behind a #, for example http://localhost:8000/v1#my-model.")
        self.name, self.model = url, model
        self.attempts, self.patience = attempts, patience
        self.reached = False
        self.client = InferenceClient(base_url=base, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=timeout)

    def complete(self, prompts: list[str], seed: int) -> list[str | None]:
        return [self._ask(prompt, seed) for prompt in prompts]

    def _ask(self, prompt: str, seed: int) -> str | None:
        failure = None
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.patience * 2 ** (attempt - 1))
            try:
                answer = self.client.chat_completion(
                    [{"role": "user", "content": prompt}],
                    model=self.model,
                    max_tokens=256,
                    temperature=0.7 if seed else 0.0,
                    seed=seed,
                )
                self.reached = True
                return answer.choices[0].message.content or ""
            except Exception as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                if status is not None and status < 500 and status not in (408, 409, 429):
                    raise ValueError(f"the judge {self.name} refuses with status {status}: {error}") from error
                # Time-outs, broken connections, 429, 5xx and answers that are no JSON: again, a little later.
                self.reached, failure = self.reached or status is not None, error
        if not self.reached:
            raise ConnectionError(f"the judge {self.name} cannot be reached: {failure}")
        return None


def load_judge(name: str, **options) -> Judge:
    """A URL with a model behind a #, or a causal LM."""
    return RemoteJudge(name) if "://" in name else LocalJudge(name, **options)


# --------------------------------------------------------------------------------------------------------------------
# Prompts and answers
# --------------------------------------------------------------------------------------------------------------------


def prompt_for(about: dict, conversation: dict, replies: dict[str, str]) -> str:
    """One judge's prompt for numbered replies to a conversation (`history`, `turn`, `style`)."""
    history = "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in conversation["history"])
    numbered = "\n".join(f"Response {number}: {reply}" for number, reply in replies.items())
    return about["prompt"].format(
        history=history or "(nothing yet)",
        turn=conversation["turn"],
        style=conversation["style"] or "in an unknown tone",
        reply=next(iter(replies.values())),
        replies=numbered,
    )


def parse_scores(answer: str | None, about: dict, numbers: list[str]) -> dict[str, dict[str, float]] | None:
    """Scores of each numbered reply; `None` unless the answer holds exactly one JSON object with every criterion of every
    reply as a number within the scale."""
    if answer is None:
        return None
    start, end = answer.find("{"), answer.rfind("}")
    try:
        value = json.loads(answer[start : end + 1])
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    if not about["together"]:
        value = {numbers[0]: value}
    low, high = about["scale"]
    result = {}
    for number in numbers:
        scores = value.get(number)
        if not isinstance(scores, dict):
            return None
        found = [scores.get(criterion) for criterion in about["criteria"]]
        if any(isinstance(s, bool) or not isinstance(s, (int, float)) or not low <= s <= high for s in found):
            return None
        result[number] = dict(zip(about["criteria"], map(float, found), strict=True))
    return result


def style_of(row: dict) -> str:
    """How a turn is said, for a judge who reads: the row's caption, or its labels in words."""
    caption = row["caption"] or describe(row, random.Random(f"caption/{row['id']}")) or ""
    return re.sub(r"^[(\[]|[)\]]$", "", caption).strip()


def judge(
    judge: Judge,
    records: list[dict],
    rows: dict[tuple[str, str], dict],
    journal: Journal,
    seed: int = 0,
    batch_size: int = 16,
) -> list[dict]:
    """Scores of the replies of a conversation suite and of two controls for each conversation.

    Args:
        records: of the suite `conversation`.
        rows: (corpus, id) -> row.
        journal: answers so far.

    Returns:
        Records with `judge`, `condition`, `metric` ("CS content" ...) and `value`, `None` where no answer could be parsed.
    """
    talks: dict[tuple[str, str], dict[str, str]] = {}
    owner = {}
    for record in records:
        talks.setdefault((record["corpus"], record["id"]), {})[record["condition"]] = record["reply"]
        owner[record["corpus"], record["id"]] = record
    names = sorted(talks)
    for place, name in enumerate(names):
        if len(names) > 1:
            talks[name][CONTROLS[0]] = next(iter(talks[names[(place + 1) % len(names)]].values()))
        talks[name][CONTROLS[1]] = EMPTY
    jobs = []
    for scale, about in ASSET["judges"].items():
        for name in names:
            row = rows[name]
            talk = {"history": row["history"], "turn": row["transcript"], "style": style_of(row)}
            order = list(talks[name])
            random.Random(f"{seed}/{name}").shuffle(order)  # no system is always read first
            for group in [order] if about["together"] else [[condition] for condition in order]:
                numbered = {str(n): talks[name][condition] or EMPTY for n, condition in enumerate(group, 1)}
                key = f"{judge.name}/{ASSET['version']}/{scale}/{'/'.join(name)}/{'|'.join(group)}"
                jobs.append((key, scale, name, group, prompt_for(about, talk, numbered)))
    scores: dict[str, dict | None] = {}

    def read(attempt: int) -> None:
        for key, scale, _, group, _ in jobs:
            if scores.get(key) is None:
                answer = journal.values.get(f"{key}#{attempt}")
                scores[key] = parse_scores(answer, ASSET["judges"][scale], [str(n + 1) for n in range(len(group))])

    for attempt in range(ATTEMPTS):
        read(attempt)  # what an earlier run was told
    for attempt in range(ATTEMPTS):
        todo = [j for j in jobs if scores[j[0]] is None and f"{j[0]}#{attempt}" not in journal.values]
        for start in tqdm(range(0, len(todo), batch_size), desc=f"judge, attempt {attempt + 1}", unit=" batches"):
            part = todo[start : start + batch_size]
            answers = judge.complete([job[4] for job in part], seed=attempt)
            answered = {f"{j[0]}#{attempt}": a for j, a in zip(part, answers, strict=True) if a is not None}
            journal.add(answered)  # what did not come is asked for again by the next run
        read(attempt)
    found = []
    for key, scale, name, group, _ in jobs:
        for number, condition in enumerate(group, 1):
            for criterion in ASSET["judges"][scale]["criteria"]:
                value = None if scores[key] is None else scores[key][str(number)][criterion]
                record = {"suite": "conversation", "task": "dialogue", "judge": judge.name, "condition": condition}
                record |= {"corpus": name[0], "id": name[1], "speaker": owner[name]["speaker"]}
                found.append(record | {"metric": f"{scale} {criterion}", "value": value})
    return found
