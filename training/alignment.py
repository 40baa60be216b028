"""Targets of behaviour alignment: what the frozen LLM answers to the text twin of a spoken conversation.

Paper, section III-B: "aligning the responses of the SLM with responses of the underlying LLM given equivalent inputs,
typically the speech input and its styled transcript".
"""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..modeling_dual_slm import fingerprint, name_in_errors, resolve_backbone
from .collator import DualSLMCollator
from .corpora.schema import Report
from .journal import Journal
from .prompts import PROMPTS
from .tasks import Sample, spoken_part, system_prompt, text_twin


@dataclass(frozen=True)
class AlignmentConfig:
    """How responses are generated. A change of any field is another response."""

    max_new_tokens: int = 96
    temperature: float = 0.0  # 0 is greedy
    repetition_penalty: float = 1.0  # a small LLM that runs in circles needs about 1.1
    batch_size: int = 16
    seed: int = 0
    # A system prompt that tells the LLM the {emotion} in the place of captions, which a small LLM talks about.
    mood: str | None = None

    def __post_init__(self):
        if self.mood is not None and set(re.findall(r"{(.*?)}", self.mood)) != {"emotion"}:
            raise ValueError(f"mood is {self.mood!r}; it must hold {{emotion}}, and nothing else in braces.")


class Aligner:
    """A causal LM that answers text twins in batches of similar length.

    Args:
        model_id: a Hub id, a local folder, or a name of `dual-slm backbones`.
        config: how to generate.
        dtype, device, revision: of the LLM.
    """

    def __init__(
        self, model_id: str, config: AlignmentConfig, dtype="auto", device="cpu", revision: str | None = None
    ):
        source = resolve_backbone(model_id)
        with name_in_errors(model_id):
            self.tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            self.model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=dtype).to(device).eval()
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{model_id} has no chat template: alignment needs an instruct model.")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        self.config = config
        how = {name: value for name, value in asdict(config).items() if value is not None}
        settings = [fingerprint(source, revision=revision), str(self.model.dtype), how]
        self.identity = json.dumps(settings, sort_keys=True)
        self.tokens, self.seconds = 0, 0.0

    def prompt(self, row: dict) -> tuple[str | None, str]:
        """The system prompt that a row is trained under, and what the LLM is asked: the rendered text twin, or with `mood`
        the transcript, and the emotion in a system prompt of its own."""
        system = told = row["system"] or system_prompt(row, self.config.seed)
        spoken = spoken_part(row)
        if self.config.mood is not None:
            spoken.pop("caption", None)
            told = self.config.mood.format(emotion=row["emotion"]) if row["emotion"] else system
        chat = [{"role": "system", "content": told}] if told else []
        chat += [{"role": turn["role"], "content": turn["content"]} for turn in row["history"]]
        chat.append({"role": "user", "content": [spoken]})
        text = self.tokenizer.apply_chat_template(text_twin(chat), add_generation_prompt=True, tokenize=False)
        return system, text

    def key(self, prompt: str) -> str:
        """Everything that a response is a function of."""
        return hashlib.sha256(f"{self.identity}\n{prompt}".encode()).hexdigest()[:24]

    @torch.inference_mode()
    def generate(self, prompts: list[str], seed: int = 0) -> list[dict]:
        """`reply` and `complete` (it ended by itself) for each prompt."""
        inputs = self.tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        options = {"do_sample": self.config.temperature > 0, "max_new_tokens": self.config.max_new_tokens}
        options["repetition_penalty"] = self.config.repetition_penalty
        if options["do_sample"]:
            torch.manual_seed(seed)
            options["temperature"] = self.config.temperature
        else:
            options |= {"temperature": None, "top_p": None, "top_k": None}
        started = time.perf_counter()
        output = self.model.generate(**inputs, **options, pad_token_id=self.tokenizer.pad_token_id)
        self.seconds += time.perf_counter() - started
        results = []
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((place for place, token in enumerate(row) if token in self.ends), None)
            self.tokens += len(row) if end is None else end + 1
            text = self.tokenizer.decode(row[:end], skip_special_tokens=True).strip()
            results.append({"reply": text, "complete": end is not None})
        return results


def without_asides(reply: str) -> str:
    """The reply without stage directions in brackets, which a small LLM writes in the manner of the caption."""
    text = re.sub(r"\s*(\([^()]{1,80}\)|\[[^\[\]]{1,80}\]|[(\[][^()\[\]]{0,80}$)", "", reply)
    return re.sub(r"[ \t]+", " ", text).strip()


def fault_of(reply: str, row: dict) -> str | None:
    """Why a reply is no target: it is empty, refuses, speaks about the form of its input, or repeats the user or itself."""
    text = reply.strip().lower()
    if not re.search(r"\w", text):
        return "empty reply"
    for kind, name in (("refused", "refusal"), ("gives_away", "reply about the transcript or the caption")):
        if any(re.search(pattern, text) for pattern in PROMPTS[kind]):
            return name
    said = re.sub(r"\W+", " ", row["transcript"].lower()).strip()
    if re.sub(r"\W+", " ", text).strip() == said:
        return "reply that repeats the user"
    words = re.findall(r"[\w']+", text)
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    if len(grams) > 2 * len(set(grams)):  # most of it was said before
        return "reply that runs in circles"
    return None


def align_rows(rows: Iterable[dict], aligner: Aligner, journal: Journal, report: Report) -> Iterator[dict]:
    """The rows with `system`, `response` and `response_complete` by the frozen LLM; with a `mood` that is what the
    response was given under, and `system` what it is trained under.

    A row whose reply is no target has a null response and is counted; so is a row without a transcript, which passes as
    it is. Batches are planned over the whole table, and one that a kill left half done is made again as a whole: the
    result of a resumed run is that of an uninterrupted one, byte for byte.
    """
    rows = list(rows)
    asked = {place: aligner.prompt(row) for place, row in enumerate(rows) if row["transcript"]}
    keys = {place: aligner.key(prompt) for place, (_, prompt) in asked.items()}
    prompts = {keys[place]: prompt for place, (_, prompt) in asked.items()}  # equal prompts are answered once
    lengths = {
        key: len(aligner.tokenizer(prompt, add_special_tokens=False)["input_ids"]) for key, prompt in prompts.items()
    }
    plan = sorted(prompts, key=lambda key: (lengths[key], key))
    size = aligner.config.batch_size
    batches = [plan[start : start + size] for start in range(0, len(plan), size)]
    todo = [batch for batch in batches if any(key not in journal.values for key in batch)]
    bar = tqdm(total=sum(map(len, todo)), desc="alignment", unit=" replies")
    for batch in reversed(todo):  # the longest first: what does not fit into memory shows at once
        replies = aligner.generate([prompts[key] for key in batch], seed=int(batch[0][:8], 16))
        journal.add(dict(zip(batch, replies, strict=True)))
        bar.update(len(batch))
    bar.close()
    for place, row in enumerate(rows):
        if place not in asked:
            report.add("row without a transcript, not aligned", row["id"])
            yield row
            continue
        answer = journal.values[keys[place]]
        reply = without_asides(answer["reply"])
        fault = fault_of(reply, row)
        if fault is not None:
            report.add(f"{fault}, no response", f"{row['id']}: {answer['reply'][:80]!r}")
            yield row | {"response": None, "response_complete": None}
            continue
        if not answer["complete"]:
            report.add("response cut by the length limit (its end is not trained)", row["id"])
        if reply != answer["reply"]:
            report.add("aside in brackets, cut out of the response", answer["reply"][:80])
        yield row | {"system": asked[place][0], "response": reply, "response_complete": answer["complete"]}


# --------------------------------------------------------------------------------------------------------------------
# The teacher of the KL objective
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()  # not inference_mode: layers that are shared out keep what they gather
def score_targets(samples: list[Sample], model, collator: DualSLMCollator, k: int = 32, batch_size: int = 8) -> list:
    """The frozen LLM's `k` most likely tokens at each token of a target, given the text twin of its conversation.

    Args:
        samples: dialogues with their targets.
        model: whose `language_model` is the teacher.

    Returns:
        For each sample ((n, k) token ids, (n, k) log-probabilities).
    """
    scores: list = [None] * len(samples)
    order = sorted(range(len(samples)), key=lambda place: sum(len(str(m["content"])) for m in samples[place].messages))
    for start in tqdm(range(0, len(order), batch_size), desc="teacher", unit=" batches"):
        part = order[start : start + batch_size]
        batch = collator([replace(samples[place], messages=text_twin(samples[place].messages)) for place in part])
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, only_targets=True)
        counts = (output.labels != -100).sum(-1).tolist()
        for place, logits in zip(part, output.logits.split(counts), strict=True):
            best = logits.float().log_softmax(-1).topk(k)
            scores[place] = (best.indices.cpu(), best.values.cpu())
    return scores
