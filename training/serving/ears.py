"""Encoder and adapters of a checkpoint, without the layers of its LLM: clips in, positions, attributes and words out."""

import hashlib
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...audio_dual_slm import load_audio
from ...modeling_dual_slm import DualSLMAudioFeatures
from ..labels import best_labels

if TYPE_CHECKING:
    from ...modeling_dual_slm import DualSLMForConditionalGeneration
    from ...processing_dual_slm import DualSLMProcessor

BATCH_CLIPS, BATCH_SECONDS = 16, 60.0  # of one pass through the encoder, padding included
UNSURE = 0.5  # the best label has to be more probable than all others together


@dataclass(frozen=True)
class Heard:
    """What one clip says and how.

    Args:
        features: both branches of the clip, as [`DualSLMAudioFeatures`] of one clip.
        words: `None` without character CTC.
        attributes: attribute -> probability of each label; `None` where the adapter spells no captions.
        num_frames: encoder frames, from which the processor counts placeholders.
        seconds: length of the clip.
    """

    features: DualSLMAudioFeatures
    words: str | None
    attributes: dict[str, dict[str, float]] | None
    num_frames: int
    seconds: float

    def select(self, paralinguistic: bool, linguistic: bool) -> DualSLMAudioFeatures:
        """The features of the branches that listen."""
        kept = {"paralinguistic": paralinguistic, "linguistic": linguistic}
        names = [f.name for f in fields(DualSLMAudioFeatures) if kept[f.name.partition("_")[0]]]
        return DualSLMAudioFeatures(**{name: getattr(self.features, name) for name in names})

    def positions(self) -> tuple[torch.Tensor, list[int | None]]:
        """What stands for the clip in a prompt: (n, D) embeddings, and the LLM's token of each that is one."""
        found = self.features
        parts = [found.paralinguistic_embeds, found.linguistic_embeds]
        embeds = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts if part is not None])
        none: list[int | None] = [None]
        words = [] if found.linguistic_token_ids is None else found.linguistic_token_ids.tolist()
        return embeds, none * (len(embeds) - len(words)) + words

    def labels(self) -> dict[str, str]:
        """The most probable label of each attribute, or "unsure"."""
        known = self.attributes or {}
        best = best_labels(known)
        return {name: label if known[name][label] > UNSURE else "unsure" for name, label in best.items()}

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the names of `dual-slm reply --json`."""
        return {"heard": self.words, "attributes": self.labels() or None, "probabilities": self.attributes}


class Ears:
    """Hears clips in batches on one thread of its own, and remembers the newest ones.

    Args:
        model ([`DualSLMForConditionalGeneration`]): whole, or loaded with `ears_only`.
        processor ([`DualSLMProcessor`]): of the same checkpoint.
        cache_bytes: how much the remembered clips may take.
    """

    def __init__(
        self, model: "DualSLMForConditionalGeneration", processor: "DualSLMProcessor", cache_bytes: int = 128_000_000
    ):
        self.model, self.processor, self.cache_bytes = model, processor, cache_bytes
        self.hits = self.misses = self.cached_bytes = 0
        self._cache: OrderedDict[bytes, Heard] = OrderedDict()
        self._waiting: queue.Queue[tuple[np.ndarray, Future[Heard]] | None] = queue.Queue()
        self._next: tuple[np.ndarray, Future[Heard]] | None = None  # did not fit into the last batch
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="ears", daemon=True)
        self._thread.start()

    def submit(self, audio: Any) -> "Future[Heard]":
        """Puts a clip in the queue. A future that is cancelled before its turn costs nothing.

        Args:
            audio: any audio of `load_audio`.
        """
        future: Future[Heard] = Future()
        self._waiting.put((load_audio(audio, target_rate=self.processor.sampling_rate), future))
        return future

    def hear(self, clips: Iterable[Any]) -> list[Heard]:
        """Hears clips, and waits for them."""
        return [future.result() for future in [self.submit(clip) for clip in clips]]

    def close(self) -> None:
        """Ends the thread once what is queued has been heard."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while not self._closed:
            batch = [(clip, future) for clip, future in self._take() if future.set_running_or_notify_cancel()]
            if not batch:
                continue
            try:
                for (_, future), heard in zip(batch, self._hear([clip for clip, _ in batch]), strict=True):
                    future.set_result(heard)
            except Exception as error:  # handed to whoever waits
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)

    def _take(self) -> "list[tuple[np.ndarray, Future[Heard]]]":
        """What is waiting, as long as it fits into one pass."""
        batch, longest = [], 0
        item, self._next = self._next or self._waiting.get(), None
        while item is not None:
            longest = max(longest, len(item[0]))
            if batch and longest * (len(batch) + 1) > BATCH_SECONDS * self.processor.sampling_rate:
                self._next = item
                return batch
            batch.append(item)
            if len(batch) == BATCH_CLIPS or self._waiting.empty():
                return batch
            item = self._waiting.get()
        self._closed = True
        return batch

    def _hear(self, clips: list[np.ndarray]) -> list[Heard]:
        keys = [hashlib.sha256(clip.tobytes()).digest() for clip in clips]
        unknown = {key: clip for key, clip in zip(keys, clips, strict=True) if key not in self._cache}
        self.misses += len(unknown)
        self.hits += len(clips) - len(unknown)
        found = {key: self._cache[key] for key in keys if key in self._cache}
        if unknown:
            found |= dict(zip(unknown, self._encode(list(unknown.values())), strict=True))
        for key in dict.fromkeys(keys):
            self._remember(key, found[key])
        return [found[key] for key in keys]

    @torch.no_grad()
    def _encode(self, clips: list[np.ndarray]) -> list[Heard]:
        processor = self.processor
        inputs: dict[str, Any] = processor.extract_features(clips)
        has_words = processor.linguistic_adapter_type != "none"
        inputs["audio_branches"] = torch.tensor([[1, int(has_words)]] * len(clips))
        features = self.model.get_audio_features(**inputs)
        shown, rows = processor.decode_audio(features), _split(features, len(clips))
        return [
            Heard(
                features=row,
                words=each["heard"],
                attributes=each["attributes"],
                num_frames=processor.num_frames(len(clip)),
                seconds=len(clip) / processor.sampling_rate,
            )
            for clip, each, row in zip(clips, shown, rows, strict=True)
        ]

    def _remember(self, key: bytes, heard: Heard) -> None:
        if key not in self._cache:
            self.cached_bytes += _size(heard)
        self._cache[key] = heard
        self._cache.move_to_end(key)
        while self.cached_bytes > self.cache_bytes:
            self.cached_bytes -= _size(self._cache.popitem(last=False)[1])


def _size(heard: Heard) -> int:
    tensors = (getattr(heard.features, f.name) for f in fields(heard.features))
    return 1000 + sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _split(features: DualSLMAudioFeatures, count: int) -> list[DualSLMAudioFeatures]:
    """The features of a batch whose branches all listen, clip by clip, in memory of their own."""
    lengths = features.linguistic_lengths
    parts: dict[str, list[Any]] = {}
    for name in (f.name for f in fields(DualSLMAudioFeatures)):
        tensor = getattr(features, name)
        flat = name in ("linguistic_embeds", "linguistic_token_ids")
        if tensor is not None:
            pieces = tensor.split(lengths.tolist() if flat and lengths is not None else 1)
            parts[name] = [piece.clone() for piece in pieces]
    return [DualSLMAudioFeatures(**{name: pieces[n] for name, pieces in parts.items()}) for n in range(count)]
