"""Encoder features of a table, computed once and kept on disk: the frozen encoder does not run again in training.

Shards are safetensors, memory-mapped when read; a shard appears complete or not at all, so an interrupted run goes on
where it stopped.
"""

import copy
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..modeling_dual_slm import DualSLMForConditionalGeneration
from ..processing_dual_slm import DualSLMProcessor, load_audio
from .attributes import measure
from .corpora.synthesis import degrade


def load_row(row: dict, sampling_rate: int = 16_000) -> np.ndarray:
    """The samples of a row. `row["augment"]`, a seed, asks for another speed, room, line and gain of the same clip."""
    samples = load_audio(row["audio"], target_rate=sampling_rate)
    if row.get("augment") is None:
        return samples
    import soxr

    rng = np.random.default_rng([row["augment"], *hashlib.sha256(row["id"].encode()).digest()[:8]])
    samples = soxr.resample(samples, sampling_rate * np.exp(rng.uniform(-0.14, 0.14)), sampling_rate)
    return degrade(samples, rng).astype(np.float32)


class _Batches(torch.utils.data.Dataset):
    """Loads, measures and extracts in worker processes; one item is one batch."""

    def __init__(self, rows: list[dict], batches: list[list[int]], processor: DualSLMProcessor, measured: bool):
        self.rows, self.batches, self.processor, self.measured = rows, batches, processor, measured

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict:
        torch.set_num_threads(1)
        rows = [self.rows[i] for i in self.batches[index]]
        clips = [load_row(row, self.processor.sampling_rate) for row in rows]
        item = dict(self.processor.extract_features(clips))
        if self.measured:
            values = [
                measure(c, self.processor.sampling_rate, r["transcript"]) for c, r in zip(clips, rows, strict=True)
            ]
            names = ("pitch", "energy", "tempo")
            item["measured"] = torch.tensor([[np.nan if v[n] is None else v[n] for n in names] for v in values])
        return item


class FeatureCache:
    """What the adapters need of each row: `frames` (T, C) of the last layer for the linguistic one, or `pooled`
    statistics (L, 2 C) and the measured pitch, energy and tempo for the paralinguistic one.

    Args:
        folder: where shards are kept, in a subfolder named by the rows, the encoder and its padding.
        rows: the table.
        kind: "frames" or "pooled".
    """

    def __init__(self, folder: str | Path, rows: list[dict], kind: str, config):
        key = json.dumps(
            [[r["id"], r["audio"], r.get("augment")] for r in rows]
            + [kind, config.audio_model_fingerprint, config.encoder_padding, config.paralinguistic_layer_mix]
        )
        self.folder = Path(folder) / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.rows, self.kind = rows, kind
        self._open: dict[int, object] = {}

    def build(
        self, model: DualSLMForConditionalGeneration, processor: DualSLMProcessor, shard: int = 512
    ) -> "FeatureCache":
        """Computes the shards that are missing. The encoder runs in bfloat16, batches of similar length at a time."""
        self.shard = shard
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = [n for n in range(-(-len(self.rows) // shard)) if not self._path(n).is_file()]
        if not numbers:
            return self
        tower = model.audio_tower
        model.audio_tower = copy.deepcopy(tower).to(torch.bfloat16)  # a copy: there is no way back from bfloat16
        try:
            for number in tqdm(numbers, desc=f"{self.kind} of {len(self.rows)} clips", unit="shard"):
                self._build_shard(number, model, processor)
        finally:
            model.audio_tower = tower
        return self

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def _build_shard(self, number: int, model, processor) -> None:
        first = number * self.shard
        indices = range(first, min(first + self.shard, len(self.rows)))
        order = sorted(indices, key=lambda i: self.rows[i].get("duration") or os.path.getsize(self.rows[i]["audio"]))
        batches = [order[i : i + 32] for i in range(0, len(order), 32)]
        data = _Batches(self.rows, batches, processor, measured=self.kind == "pooled")
        loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2)
        tensors = {}
        for batch, item in zip(batches, loader, strict=True):
            measured = item.pop("measured", None)
            with torch.inference_mode():
                states, lengths = model.encode_audio(**item, all_layers=self.kind == "pooled")
                if self.kind == "pooled":
                    pooled = model.paralinguistic_adapter.pool(states, lengths)
            for place, index in enumerate(batch):
                if self.kind == "pooled":
                    tensors[f"{index}.pooled"] = pooled[place].contiguous()
                    tensors[f"{index}.measured"] = measured[place].contiguous()
                else:
                    tensors[f"{index}.frames"] = states[place, -1, : lengths[place]].half().contiguous()
        scratch = self._path(number).with_suffix(".part")
        save_file(tensors, scratch)
        os.replace(scratch, self._path(number))

    def get(self, index: int, name: str) -> torch.Tensor:
        number = index // self.shard
        if number not in self._open:
            self._open[number] = safe_open(self._path(number), framework="pt")
        return self._open[number].get_tensor(f"{index}.{name}")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}


def pad_frames(frames: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, C) each -> (A, T, C) float32 and (A,) lengths."""
    lengths = torch.tensor([len(f) for f in frames])
    return torch.nn.utils.rnn.pad_sequence(frames, batch_first=True).float(), lengths
