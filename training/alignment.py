"""Makes the targets of behaviour alignment: the frozen LLM's answers to text twins (paper, section III-B)."""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..backbones_dual_slm import fingerprint, name_in_errors, resolve_backbone
from ..modeling_dual_slm import DualSLMForConditionalGeneration
from ..templates_dual_slm import fit_messages
from ..tokens_dual_slm import encode
from .batches import batched
from .collator import DualSLMCollator, Teacher
from .corpora.checks import Report
from .corpora.row import Row
from .files import Journal
from .forward import forward_targets
from .prompts import PROMPTS
from .tasks import Sample, conversation, spoken_part, system_prompt, text_twin


@dataclass(frozen=True)
class AlignmentConfig:
    """How responses are generated. A change of any field makes new responses."""

    max_new_tokens: int = 96
    temperature: float = 0.0  # greedy
    repetition_penalty: float = 1.0  # a small LLM that repeats itself needs about 1.1
    batch_size: int = 16
    seed: int = 0
    # System prompt that tells the LLM the {emotion} instead of a caption, which a small LLM talks about.
    mood: str | None = None

    def __post_init__(self):
        if self.mood is not None and set(re.findall(r"{(.*?)}", self.mood)) != {"emotion"}:
            raise ValueError(f"mood is {self.mood!r}; it must hold {{emotion}}, and nothing else in braces.")


class Aligner:
    """A causal LM that answers text twins: a Hub id, a local folder, or a name of `dual-slm backbones`."""

    def __init__(self, model_id: str, config: AlignmentConfig, dtype="auto", device="cpu", revision=None):
        source = resolve_backbone(model_id)
        with name_in_errors(model_id):
            self.tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            model: Any = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=dtype)
            self.model = model.to(device).eval()
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{model_id} has no chat template: alignment needs an instruct model.")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        self.config, self.tokens, self.seconds = config, 0, 0.0
        settings = {name: value for name, value in asdict(config).items() if value is not None}
        identity = [fingerprint(source, revision=revision), str(self.model.dtype), settings]
        self.identity = json.dumps(identity, sort_keys=True)

    def prompt(self, row: Row) -> tuple[str | None, str]:
        """The system prompt that a row is trained under, and the rendered text twin that the LLM answers.

        With `mood` the twin has the transcript alone, and a system prompt that tells the emotion.
        """
        system = told = row.system or system_prompt(row, self.config.seed)
        spoken = spoken_part(row)
        if self.config.mood is not None:
            spoken.pop("caption", None)
            told = self.config.mood.format(emotion=row.emotion) if row.emotion else system
        twin = fit_messages(text_twin(conversation(told, row.history, [spoken])), self.tokenizer)
        return system, self.tokenizer.apply_chat_template(twin, add_generation_prompt=True, tokenize=False)

    def key(self, prompt: str) -> str:
        """Identifies everything that a response depends on."""
        return hashlib.sha256(f"{self.identity}\n{prompt}".encode()).hexdigest()[:24]

    @torch.inference_mode()
    def generate(self, prompts: list[str], seed: int = 0) -> list[dict]:
        """`reply` and `complete` (the LLM ended it) for each prompt."""
        padded = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        inputs = self.tokenizer(prompts, add_special_tokens=False, **padded).to(self.model.device)
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.config.temperature > 0:
            torch.manual_seed(seed)
            options = {"do_sample": True, "temperature": self.config.temperature}
        options |= {n: getattr(self.config, n) for n in ("max_new_tokens", "repetition_penalty")}
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


def fault_of(reply: str, row: Row) -> str | None:
    """Why a reply cannot be a target: it is empty, refuses, speaks about its input, or repeats the user or itself."""
    text = reply.strip().lower()
    if not re.search(r"\w", text):
        return "empty reply"
    for kind, name in (("refused", "refusal"), ("gives_away", "reply about the transcript or the caption")):
        if any(re.search(pattern, text) for pattern in PROMPTS[kind]):
            return name
    if re.findall(r"\w+", text) == re.findall(r"\w+", (row.transcript or "").lower()):
        return "reply that repeats the user"
    words = re.findall(r"[\w']+", text)
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    if len(grams) > 2 * len(set(grams)):  # more than half are repetitions
        return "reply that runs in circles"
    return None


def align_rows(rows: Iterable[Row], aligner: Aligner, journal: Journal, report: Report) -> Iterator[Row]:
    """Yields the rows with `system`, `response` and `response_complete` by the frozen LLM.

    A row without a transcript stays as it is. A row whose reply cannot be a target has no response. The report counts both.
    """
    rows = list(rows)
    asked = [aligner.prompt(row) if row.transcript else None for row in rows]
    _answer({aligner.key(pair[1]): pair[1] for pair in asked if pair}, aligner, journal)
    for row, pair in zip(rows, asked, strict=True):
        if pair is None:
            report.add("row without a transcript, not aligned", row.id)
            yield row
            continue
        system, prompt = pair
        answer = journal.values[aligner.key(prompt)]
        reply = without_asides(answer["reply"])
        if fault := fault_of(reply, row):
            report.add(f"{fault}, no response", f"{row.id}: {answer['reply'][:80]!r}")
            yield row.replace(response=None, response_complete=None)
            continue
        if not answer["complete"]:
            report.add("response cut by the length limit (its end is not trained)", row.id)
        if reply != answer["reply"]:
            report.add("aside in brackets, cut out of the response", answer["reply"][:80])
        yield row.replace(system=system, response=reply, response_complete=answer["complete"])


def _answer(prompts: dict[str, str], aligner: Aligner, journal: Journal) -> None:
    """Adds the answers that the journal lacks; equal prompts have one key and are answered once.

    Batches are planned over all prompts, and a batch that a kill cut short is made again as a whole. So a resumed run
    gives the same bytes as an uninterrupted one.
    """
    plan = sorted(prompts, key=lambda key: (len(encode(aligner.tokenizer, prompts[key])), key))
    batches = batched(plan, aligner.config.batch_size)
    todo = [batch for batch in batches if not journal.values.keys() >= set(batch)]
    with tqdm(total=sum(map(len, todo)), desc="alignment", unit=" replies") as bar:
        for batch in reversed(todo):  # the longest first, so that too little memory shows at once
            replies = aligner.generate([prompts[key] for key in batch], seed=int(batch[0][:8], 16))
            journal.add(dict(zip(batch, replies, strict=True)))
            bar.update(len(batch))


@torch.no_grad()  # not inference_mode: sharded layers keep the weights that they gather
def score_targets(
    samples: list[Sample], model: DualSLMForConditionalGeneration, collator: DualSLMCollator, k: int = 32, batch_size=8
) -> list[Teacher]:
    """The teachers of KL: the frozen LLM's `k` most likely tokens at each target token of the dialogues' text twins."""
    scores: dict[int, Teacher] = {}
    order = sorted(range(len(samples)), key=lambda place: sum(len(str(m["content"])) for m in samples[place].messages))
    for part in tqdm(batched(order, batch_size), desc="teacher", unit=" batches"):
        batch = collator([replace(samples[place], messages=text_twin(samples[place].messages)) for place in part])
        inputs: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in batch.items()}
        output = forward_targets(model, **inputs)
        counts = (output.labels != -100).sum(-1).tolist()
        for place, logits in zip(part, output.logits.split(counts), strict=True):
            best = logits.float().log_softmax(-1).topk(k)
            scores[place] = (best.indices.cpu(), best.values.cpu())
    return [scores[place] for place in range(len(samples))]
