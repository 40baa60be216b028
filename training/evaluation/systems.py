"""What is evaluated: anything that answers conversations. A checkpoint, a file of replies, another speech LLM.

A new system is a class with `name`, `conditions` and `reply(queries)`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from ...processing_dual_slm import SOURCES
from ..backbones import transcriber
from ..collator import DualSLMCollator
from ..features import FeatureStore, load_row
from ..tasks import Sample

# Condition -> (source of the paralinguistic branch, of the linguistic one). "cascade" is the text that Whisper's own
# decoder heard, "text" the true one.
CONDITIONS = {
    "P&L": ("speech", "speech"),
    "P only": ("speech", "none"),
    "L only": ("none", "speech"),
    "none": ("none", "none"),
    "text": ("none", "transcript"),
    "caption and text": ("caption", "transcript"),
    "cascade": ("none", "transcript"),
}


@dataclass(frozen=True)
class Query:
    """One conversation that is asked for a reply.

    Args:
        suite, condition: where it belongs; `condition` is a key of `CONDITIONS`, perhaps with a remark behind a comma.
        sample: conversation with the sources of its branches set, and what the reply is held to.
        row: whose words are heard.
        voice: whose voice is heard: the same row but in the swap test.
        max_new_tokens: the reply is cut there.
    """

    suite: str
    condition: str
    sample: Sample
    row: dict
    voice: dict
    max_new_tokens: int

    @property
    def key(self) -> str:
        """The same for the same question, whichever suite asks it and whenever."""
        clips = f"{self.row['corpus']}/{self.row['id']}/{self.voice['corpus']}/{self.voice['id']}"
        room = (
            f"/{self.max_new_tokens}" if self.sample.task == "dialogue" else ""
        )  # two suites ask for replies to a turn
        return f"{self.condition}/{self.sample.task}/{clips}{room}"

    def sources(self) -> tuple[str, str]:
        """Of the spoken turn."""
        part = spoken(self.sample)
        return part.get("paralinguistic", "speech"), part.get("linguistic", "speech")


def spoken(sample: Sample) -> dict:
    """The spoken part of the last turn."""
    return next(part for part in sample.messages[-1]["content"] if part["type"] == "audio")


class System(Protocol):
    """Answers queries."""

    name: str
    conditions: tuple[str, ...]  # that it can be asked under

    def reply(self, queries: list[Query]) -> Iterator[tuple[Query, str]]:
        """Each query with its reply, in any order, as they are ready; a query may be left out."""


class Checkpoint:
    """A checkpoint of this package, with the encoder's features of each clip computed once.

    Args:
        model, processor: of the checkpoint.
        folder: where the features are kept.
        batch_size: conversations at a time.
    """

    def __init__(self, model, processor, folder: str | Path, name: str = "", batch_size: int = 32):
        self.model, self.processor, self.name, self.batch_size = model, processor, name, batch_size
        self.conditions = tuple(CONDITIONS)
        self.words_as_text = model.linguistic_adapter is None
        self.store = FeatureStore(folder, model.config)

    def prepare(self, rows: list[dict]) -> None:
        """Encodes the clips of rows that are not encoded yet."""
        self.store.build(rows, self.model, self.processor)

    def features(self, voices: list[dict], rows: list[dict]):
        """The adapters' outputs: the paralinguistic one's of `voices`, the linguistic one's of `rows`."""
        found = {}
        for side, (branch, clips) in enumerate((("paralinguistic", voices), ("linguistic", rows))):
            if not clips:
                continue
            states, lengths = self.store.batch(clips)
            heard = torch.zeros(len(clips), 2, dtype=torch.long)
            heard[:, side] = 1
            pooled = torch.stack([self.store.get(c, "pooled") for c in clips]) if self.store.pools else None
            features = self.model.adapt_audio(states, lengths, heard, pooled)
            found |= {name: value for name, value in features.items() if name.startswith(branch)}
        return type(features)(**found) if found else None

    @torch.inference_mode()
    def hear(self, rows: list[dict]) -> list[dict]:
        """`heard` and `attributes` of each clip: before the LLM, or where the adapter spells no captions, the attributes by
        the probability that the LLM gives each label."""
        result = []
        if self.processor.attribute_questions:
            for row in tqdm(rows, desc="probabilities", unit=" clips"):
                part = {"type": "audio", "num_frames": self.store.length(row), "transcript": row["transcript"]}
                found = self.processor.ask_attributes(self.model, part, self.features([row], []))
                result.append({"heard": None, "attributes": found})
            return result
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            result += self.processor.decode_audio(self.features(part, part))
        return result

    def _batches(self, queries: list[Query], size: Callable[[Query], tuple], what: str) -> Iterator[list[Query]]:
        """Of similar size; those in which nothing is heard apart, as an LLM may have LoRA for the others alone."""
        groups = [[q for q in queries if ("speech" in q.sources()) == heard] for heard in (True, False)]
        groups = [sorted(group, key=size) for group in groups]
        step = self.batch_size
        parts = [group[start : start + step] for group in groups for start in range(0, len(group), step)]
        yield from tqdm(parts, desc=what, unit=" batches")

    @torch.inference_mode()
    def reply(self, queries: list[Query]) -> Iterator[tuple[Query, str]]:
        for part in self._batches(queries, lambda q: (q.max_new_tokens, q.sample.duration or 0.0), "replies"):
            inputs = self.processor.apply_chat_template(
                [self._conversation(query) for query in part],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            ).to(self.model.device)
            output = self.model.generate(
                **inputs,
                audio_features=self._heard(part),
                max_new_tokens=max(q.max_new_tokens for q in part),
                do_sample=False,
            )
            for query, ids in zip(part, output[:, inputs["input_ids"].shape[1] :], strict=True):
                yield query, self.processor.decode(ids[: query.max_new_tokens], skip_special_tokens=True).strip()

    @torch.inference_mode()
    def losses(self, queries: list[Query]) -> Iterator[tuple[Query, tuple[float, int]]]:
        """Of each query the loss of the right answer in nats, all its tokens together, and how many these are: it tells
        systems apart whose replies are both wrong."""
        collator = DualSLMCollator(self.processor)
        for part in self._batches(queries, lambda q: (q.sample.task, q.sample.duration or 0.0), "losses"):
            batch = collator([replace(q.sample, messages=self._conversation(q)) for q in part])
            batch = {name: value.to(self.model.device) for name, value in batch.items()}
            output = self.model(**batch, audio_features=self._heard(part), only_targets=True)
            losses, counts = -output.target_log_probs().sum(-1), (output.labels != -100).sum(-1)
            for query, loss, count in zip(part, losses.tolist(), counts.tolist(), strict=True):
                yield query, (round(loss, 4), count)

    def _heard(self, queries: list[Query]):
        """The adapters' outputs for the branches of the queries that come from speech."""
        sources = [query.sources() for query in queries]
        voices = [q.voice for q, (how, _) in zip(queries, sources, strict=True) if how == "speech"]
        rows = [q.row for q, (_, what) in zip(queries, sources, strict=True) if what == "speech"]
        return self.features(voices, rows)

    def _conversation(self, query: Query) -> list[dict]:
        """The messages with the length of the clip in place of its audio."""
        *earlier, turn = query.sample.messages
        content = []
        for part in turn["content"]:
            if part["type"] == "audio":
                part = {key: value for key, value in part.items() if key != "path"}
                if "speech" in query.sources():
                    part["num_frames"] = self.store.length(
                        query.row if query.sources()[1] == "speech" else query.voice
                    )
            content.append(part)
        return [*earlier, turn | {"content": content}]

    def prompt(self, query: Query) -> str:
        """What the LLM is given: text as text, and `<|audio|>` for what the adapters say."""
        sources = dict(zip(SOURCES, query.sources(), strict=True))
        *earlier, turn = query.sample.messages
        content = []
        for part in turn["content"]:
            if part["type"] == "audio":
                said = [part[name] if name in ("caption", "transcript") else "" for name in sources.values()]
                if "speech" in sources.values():
                    said.insert(0 if sources["paralinguistic"] == "speech" else 1, "\0")
                part = {"type": "text", "text": " ".join(text for text in said if text)}
            content.append(part)
        text = self.processor.apply_chat_template([*earlier, turn | {"content": content}], add_generation_prompt=True)
        return text.replace("\0", "<|audio|>")


class Replies:
    """Replies of any other system, as JSON Lines: `id`, `task`, `reply`, and `corpus` where ids of corpora collide.

    What the file does not answer is not asked.

    Raises:
        ValueError: a line without these.
    """

    def __init__(self, path: str | Path):
        self.name, self.conditions = Path(path).stem, ("P&L",)
        self.replies: dict[tuple, str] = {}
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                self.replies[record["id"], record["task"], record.get("corpus")] = record["reply"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: a reply is one JSON object with id, task and reply ({error})."
                ) from None

    def prepare(self, rows: list[dict]) -> None:
        pass

    def reply(self, queries: list[Query]) -> Iterator[tuple[Query, str]]:
        for query in queries:
            found = None
            for corpus in (None, query.row["corpus"]):
                found = self.replies.get((query.row["id"], query.sample.task, corpus), found)
            if found is not None and query.condition == "P&L":
                yield query, found

    def prompt(self, query: Query) -> str:
        return ""


class Qwen2Audio:
    """Qwen2-Audio (or another audio LLM with its processor's interface) through transformers: the whole clip, one at a time.

    Args:
        name: Hub id or folder.
    """

    def __init__(self, name: str, dtype="auto", device: str = "cpu"):
        from transformers import AutoModelForMultimodalLM, AutoProcessor

        self.name, self.conditions = name, ("P&L",)
        self.processor = AutoProcessor.from_pretrained(name)
        self.model = AutoModelForMultimodalLM.from_pretrained(name, dtype=dtype).to(device).eval()

    def prepare(self, rows: list[dict]) -> None:
        pass

    def conversation(self, query: Query) -> list[dict]:
        """Qwen2-Audio's own chat format."""
        messages = []
        for message in query.sample.messages:
            content = message["content"]
            if not isinstance(content, str):
                content = [
                    {"type": "audio", "audio_url": part["path"]} if part["type"] == "audio" else part
                    for part in content
                ]
            messages.append({"role": message["role"], "content": content})
        return messages

    def _batches(self, queries: list[Query], size: Callable[[Query], tuple], what: str) -> Iterator[list[Query]]:
        """Of similar size; those in which nothing is heard apart, as an LLM may have LoRA for the others alone."""
        groups = [[q for q in queries if ("speech" in q.sources()) == heard] for heard in (True, False)]
        groups = [sorted(group, key=size) for group in groups]
        step = self.batch_size
        parts = [group[start : start + step] for group in groups for start in range(0, len(group), step)]
        yield from tqdm(parts, desc=what, unit=" batches")

    @torch.inference_mode()
    def reply(self, queries: list[Query]) -> Iterator[tuple[Query, str]]:
        rate = self.processor.feature_extractor.sampling_rate
        for query in tqdm(queries, desc="replies", unit=" conversations"):
            inputs = self.processor(
                text=self.prompt(query), audio=[load_row(query.row, rate)], sampling_rate=rate, return_tensors="pt"
            ).to(self.model.device)
            output = self.model.generate(**inputs, max_new_tokens=query.max_new_tokens, do_sample=False)
            yield (
                query,
                self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(),
            )

    def prompt(self, query: Query) -> str:
        return self.processor.apply_chat_template(self.conversation(query), add_generation_prompt=True, tokenize=False)


def whisper_decoder(folder: str) -> Callable[[dict], str]:
    """The words of a row by Whisper's own decoder, the first half of the cascade."""
    transcribe = transcriber(folder)
    return lambda row: transcribe(load_row(row))


def load_system(name: str, folder: str | Path, **options) -> System:
    """A file of replies (`.jsonl`), a checkpoint of this package, or another audio LLM.

    Args:
        folder: where features are kept.
        options: `dtype`, `device` and `trust_remote_code` of a model.
    """
    from transformers import AutoConfig

    from ... import DualSLMProcessor, register_auto_classes
    from ...modeling_dual_slm import name_in_errors

    if name.endswith(".jsonl"):
        return Replies(name)
    register_auto_classes()
    trusted = options.pop("trust_remote_code", False)
    with name_in_errors(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trusted)
    if config.model_type == "qwen2_audio":
        return Qwen2Audio(name, **options)
    if config.model_type != "dual_slm":
        raise ValueError(
            f"{name} is a {config.model_type}; evaluated are checkpoints of this package, Qwen2-Audio, and files of "
            "replies (.jsonl) of any other system."
        )
    from transformers import AutoModelForMultimodalLM

    device = options.get("device", "cpu")
    with name_in_errors(name):
        model = AutoModelForMultimodalLM.from_pretrained(
            name,
            dtype=options.get("dtype", "auto"),
            device_map=None if device == "cpu" else {"": device},
            trust_remote_code=trusted,
        )
        processor = DualSLMProcessor.from_pretrained(name)
    return Checkpoint(model, processor, folder, Path(name).name)
