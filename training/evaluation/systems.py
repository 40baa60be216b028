"""The systems that can be evaluated: a checkpoint of this package, a file of replies, a cascade, or Qwen2-Audio.

A new system is a class with the members of [`System`].
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

from ... import register_auto_classes
from ...backbones_dual_slm import name_in_errors, resolve_backbone
from ...modeling_dual_slm import DualSLMAudioFeatures, DualSLMForConditionalGeneration
from ...processing_dual_slm import DualSLMProcessor
from ...templates_dual_slm import fit_messages
from ...turns_dual_slm import AUDIO_MARK
from ..alignment import Aligner, AlignmentConfig
from ..augmentation import load_clip
from ..backbones import transcriber
from ..batches import batched
from ..collator import DualSLMCollator
from ..corpora.row import Row
from ..features import FeatureStore
from ..forward import adapt_cached, forward_targets
from ..tasks import Sample, text_twin

# Condition -> source of the paralinguistic and of the linguistic branch. "cascade" takes the output of Whisper's decoder,
# "text" the reference transcript.
CONDITIONS: dict[str, tuple[str, str]] = {
    "P&L": ("speech", "speech"),
    "P only": ("speech", "none"),
    "L only": ("none", "speech"),
    "none": ("none", "none"),
    "text": ("none", "transcript"),
    "caption and text": ("caption", "transcript"),
    "cascade": ("none", "transcript"),
}
BATCH_SIZE = 32  # conversations or clips
EXAMPLE = "cascade:whisper-base+smollm2-135m-instruct"


@dataclass(frozen=True)
class Query:
    """One conversation that a system is asked to answer."""

    suite: str  # that asks
    condition: str  # "swap" or a key of `CONDITIONS`, perhaps followed by a comma and a remark
    sample: Sample  # the conversation, with the sources of both branches, and its target
    row: Row  # whose words are heard
    voice: Row  # whose voice is heard; it differs from `row` only in the swap test
    max_new_tokens: int  # of the reply

    @property
    def key(self) -> str:
        """Key of the journal: equal for the same question in any suite and any run."""
        parts = [self.condition, self.sample.task, *self.row.key, *self.voice.key]
        if self.sample.task == "dialogue":  # two suites ask for the reply to the same turn, with different lengths
            parts.append(str(self.max_new_tokens))
        return "/".join(parts)

    def sources(self) -> tuple[str, str]:
        """Sources of the paralinguistic and the linguistic branch."""
        part = self.sample.spoken
        return part.get("paralinguistic", "speech"), part.get("linguistic", "speech")


class System(Protocol):
    """Answers queries. `conditions` are those that it can be asked under."""

    name: str
    conditions: tuple[str, ...]

    def prepare(self, rows: list[Row]) -> None:
        """Is called with the rows of all clips before they are used."""

    def reply(self, queries: list[Query]) -> Iterator[tuple[Query, str]]:
        """Yields each query with its reply, in any order; a query may be left out."""
        ...

    def prompt(self, query: Query) -> str:
        """The text that the LLM is given, for the report."""
        return ""


class Checkpoint(System):
    """A checkpoint of this package. The encoder's features of each clip are computed once and stored in `folder`."""

    def __init__(
        self, model: DualSLMForConditionalGeneration, processor: DualSLMProcessor, folder: str | Path, name: str = ""
    ):
        self.model, self.processor, self.name = model, processor, name
        self.conditions = tuple(CONDITIONS)
        self.words_as_text = model.linguistic_adapter is None
        self.store = FeatureStore(folder, model.config)

    def prepare(self, rows: list[Row]) -> None:
        self.store.build(rows, self.model, self.processor)

    def features(self, voices: list[Row], rows: list[Row]) -> DualSLMAudioFeatures | None:
        """Outputs of the paralinguistic adapter for `voices` and of the linguistic adapter for `rows`."""
        found = {}
        for branch, clips, heard in (("paralinguistic", voices, (1, 0)), ("linguistic", rows, (0, 1))):
            if clips:
                pooled = torch.stack([self.store.get(clip, "pooled") for clip in clips]) if self.store.pools else None
                branches = torch.tensor([heard] * len(clips))
                features = adapt_cached(self.model, *self.store.batch(clips), branches, pooled)
                found |= {name: value for name, value in features.items() if name.startswith(branch)}
        return DualSLMAudioFeatures(**found) if found else None

    @torch.inference_mode()
    def hear(self, rows: list[Row]) -> list[dict]:
        """What the adapters hear in each clip: `heard` (words) and `attributes` (probabilities of labels).

        If the paralinguistic adapter has no caption slots, the LLM gives the probabilities.
        """
        if not self.processor.attribute_questions:
            found = (self.processor.decode_audio(self.features(part, part)) for part in batched(rows, BATCH_SIZE))
            return [clip for part in found for clip in part]
        result = []
        for row in tqdm(rows, desc="probabilities", unit=" clips"):
            part = {"type": "audio", "num_frames": self.store.length(row), "transcript": row.transcript}
            found = self.processor.ask_attributes(self.model, part, self.features([row], []))
            result.append({"heard": None, "attributes": found})
        return result

    @torch.inference_mode()
    def reply(self, queries: list[Query]) -> Iterator[tuple[Query, str]]:
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        for part in self._batches(queries, lambda q: (q.max_new_tokens, q.sample.duration or 0.0), "replies"):
            conversations = [self._with_length(query).messages for query in part]
            inputs: Any = self.processor.apply_chat_template(conversations, **options)
            inputs, longest = inputs.to(self.model.device), max(q.max_new_tokens for q in part)
            heard = self._heard(part)
            output = self.model.generate(**inputs, audio_features=heard, max_new_tokens=longest, do_sample=False)
            for query, ids in zip(part, output[:, inputs["input_ids"].shape[1] :], strict=True):
                yield query, self.processor.decode(ids[: query.max_new_tokens], skip_special_tokens=True).strip()

    @torch.inference_mode()
    def losses(self, queries: list[Query]) -> Iterator[tuple[Query, tuple[float, int]]]:
        """Loss of the right answer to each query (nats, summed over its tokens), and the number of these tokens.

        The answer loss tells two systems apart even if both replies are wrong.
        """
        collator = DualSLMCollator(self.processor)
        for part in self._batches(queries, lambda q: (q.sample.task, q.sample.duration or 0.0), "losses"):
            batch = collator([self._with_length(query) for query in part])
            batch = {name: value.to(self.model.device) for name, value in batch.items()}
            output = forward_targets(self.model, **batch, audio_features=self._heard(part))
            losses, counts = -output.target_log_probs().sum(-1), (output.labels != -100).sum(-1)
            for query, loss, count in zip(part, losses.tolist(), counts.tolist(), strict=True):
                yield query, (round(loss, 4), count)

    def prompt(self, query: Query) -> str:
        """The LLM's prompt, with `<|audio|>` for the embeddings of the adapters."""
        part = query.sample.spoken
        # Speech is "\0" at first, because the processor refuses `<|audio|>` in a text; both branches share it.
        texts = ["\0" if source == "speech" else part.get(source) for source in query.sources()]
        sample = query.sample.with_spoken(type="text", text=" ".join(filter(None, texts)).replace("\0 \0", "\0"))
        text = str(self.processor.apply_chat_template(sample.messages, add_generation_prompt=True))
        return text.replace("\0", AUDIO_MARK)

    def _batches(self, queries: list[Query], size: Callable[[Query], tuple], title: str) -> Iterator[list[Query]]:
        """Batches of similar size, of queries with or without speech, so that the latter are the bare LLM's own calls."""
        parts = []
        for heard in (True, False):
            parts += batched(sorted((q for q in queries if ("speech" in q.sources()) == heard), key=size), BATCH_SIZE)
        yield from tqdm(parts, desc=title, unit=" batches")

    def _heard(self, queries: list[Query]) -> DualSLMAudioFeatures | None:
        """The adapters' outputs for the branches whose source is speech."""
        voices = [query.voice for query in queries if query.sources()[0] == "speech"]
        return self.features(voices, [query.row for query in queries if query.sources()[1] == "speech"])

    def _with_length(self, query: Query) -> Sample:
        """The sample with the number of encoder frames instead of the path of the audio."""
        frames = None
        if "speech" in query.sources():
            frames = self.store.length(query.row if query.sources()[1] == "speech" else query.voice)
        return query.sample.with_spoken(path=None, num_frames=frames)


class Replies(System):
    """Replies of any other system, as JSON Lines: `reply`, and the `key` that `dual-slm evaluate --write-prompts` wrote.

    Without a key, `id` and `task` name the question, with `corpus` if an id is in two corpora, and with `condition` if it
    is not P&L. Questions without a reply in the file are left out.

    Raises:
        ValueError: a line lacks the reply, or the names of its question.
    """

    def __init__(self, path: str | Path):
        self.name, self.conditions = Path(path).stem, ("P&L",)
        self.replies: dict[Any, str] = {}
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                place = record.get("key")
                if place is None:
                    place = (record["id"], record["task"], record.get("corpus"), record.get("condition") or "P&L")
                self.replies[place] = record["reply"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                needed = "a reply is one JSON object with id, task and reply, or with key and reply"
                raise ValueError(f"{path}, line {number}: {needed} ({error}).") from None

    def reply(self, queries: list[Query]) -> Iterator[tuple[Query, str]]:
        for query in queries:
            id, task, corpus, condition = query.row.id, query.sample.task, query.row.corpus, query.condition
            places = (query.key, (id, task, corpus, condition), (id, task, None, condition))
            if found := [self.replies[place] for place in places if place in self.replies]:
                yield query, found[0]


class Qwen2Audio(System):
    """Qwen2-Audio through transformers, or another audio LLM whose processor has the same interface.

    Args:
        name: Hub id or folder.
    """

    def __init__(self, name: str, dtype: str = "auto", device: str = "cpu"):
        self.name, self.conditions = name, ("P&L",)
        self.processor = AutoProcessor.from_pretrained(name)
        self.model = AutoModelForMultimodalLM.from_pretrained(name, dtype=dtype).to(device).eval()

    @torch.inference_mode()
    def reply(self, queries: list[Query]) -> Iterator[tuple[Query, str]]:
        rate = self.processor.feature_extractor.sampling_rate
        for query in tqdm(queries, desc="replies", unit=" conversations"):
            clip, text = load_clip(query.row, rate), self.prompt(query)
            inputs = self.processor(text=text, audio=[clip], sampling_rate=rate, return_tensors="pt")
            inputs = inputs.to(self.model.device, self.model.dtype)  # the numbers of tokens stay integers
            output = self.model.generate(**inputs, max_new_tokens=query.max_new_tokens, do_sample=False)
            reply = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            yield query, reply.strip()

    def prompt(self, query: Query) -> str:
        sample = query.sample.with_spoken(audio_url=query.sample.spoken["path"], path=None)
        return self.processor.apply_chat_template(sample.messages, add_generation_prompt=True, tokenize=False)


class Cascade(System):
    """Whisper's own decoder, and an LLM that reads its words: `cascade:WHISPER+LLM`, each a Hub id, folder or backbone.

    Under "P&L" the LLM is asked about the words that Whisper hears, under "text" about the reference transcript.

    Raises:
        ValueError: the name has not two parts, or the LLM has no chat template.
    """

    def __init__(self, name: str, dtype: str = "auto", device: str = "cpu"):
        self.name, self.conditions = name, ("P&L", "text")
        whisper, plus, llm = name.removeprefix("cascade:").partition("+")
        if not (whisper and plus and llm):
            raise ValueError(f"{name!r} names no cascade; write cascade:WHISPER+LLM, like {EXAMPLE}.")
        self.llm = Aligner(llm, AlignmentConfig(), dtype, device)
        with name_in_errors(whisper):
            self.transcribe = transcriber(resolve_backbone(whisper), device)
        self.words: dict[tuple, str] = {}  # (clip, variant) -> what Whisper hears

    def hear(self, row: Row) -> str:
        """The words of a row's clip; each clip is transcribed once."""
        key = (row.key, row.variant)
        if key not in self.words:
            self.words[key] = self.transcribe(load_clip(row))
        return self.words[key]

    def reply(self, queries: list[Query]) -> Iterator[tuple[Query, str]]:
        for query in tqdm(queries, desc="words", unit=" clips"):
            self.prompt(query)
        ordered = sorted(queries, key=lambda q: (q.max_new_tokens, len(self.prompt(q))))
        for longest, alike in groupby(ordered, key=lambda q: q.max_new_tokens):
            self.llm.config = replace(self.llm.config, max_new_tokens=longest)
            for part in tqdm(batched(list(alike), BATCH_SIZE), desc="replies", unit=" batches"):
                answers = self.llm.generate([self.prompt(query) for query in part])
                yield from zip(part, (answer["reply"] for answer in answers), strict=True)

    def prompt(self, query: Query) -> str:
        words = self.hear(query.row) if query.sources()[1] == "speech" else query.sample.spoken["transcript"]
        twin = text_twin(query.sample.with_spoken(transcript=words or None, caption=None).messages)
        chat = fit_messages(twin, self.llm.tokenizer)
        return self.llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def load_system(
    name: str, folder: str | Path, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
) -> System:
    """Loads a file of replies (`.jsonl`), a cascade (`cascade:WHISPER+LLM`), a checkpoint of this package, or Qwen2-Audio.

    Args:
        folder: where features are stored.

    Raises:
        ValueError: a model of another type.
    """
    if name.endswith(".jsonl"):
        return Replies(name)
    if name.startswith("cascade:"):
        return Cascade(name, dtype, device)
    register_auto_classes()
    with name_in_errors(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if config.model_type == "qwen2_audio":
        return Qwen2Audio(name, dtype, device)
    if config.model_type != "dual_slm":
        raise ValueError(
            f"{name} is a {config.model_type}; evaluated are checkpoints of this package, Qwen2-Audio, cascades "
            "(cascade:WHISPER+LLM), and files of replies (.jsonl) of any other system."
        )
    options = {"device_map": None if device == "cpu" else {"": device}, "trust_remote_code": trust_remote_code}
    with name_in_errors(name):
        model = AutoModelForMultimodalLM.from_pretrained(name, dtype=dtype, **options)
        processor = DualSLMProcessor.from_pretrained(name)
    return Checkpoint(model, processor, folder, Path(name).name)
