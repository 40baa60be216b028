"""Keeps the frozen encoder's features of clips on disk, so that training does not run the encoder again.

The content of its audio identifies a clip. The encoder, its padding and the inputs of the adapters identify a folder of
shards. A shard is a memory-mapped safetensors file, written whole or not at all, so an interrupted build can go on.
The store is our own because `datasets` caches by position in a table, and tables share clips.
"""

import copy
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..configuration_dual_slm import DualSLMConfig
from ..modeling_dual_slm import DualSLMForConditionalGeneration
from ..processing_dual_slm import DualSLMProcessor
from .augmentation import load_clip
from .corpora.row import Row
from .files import atomic
from .hardware import cpu_has_bfloat16

FRAMES_PER_SECOND = 50
SHARD = 512  # clips
BATCH = 32  # clips that the encoder reads together


def _read_clips(processor: DualSLMProcessor, rows: list[Row]) -> tuple[dict | None, list[Row], list[str]]:
    """The encoder's inputs, the rows that they are of, and the errors of the clips that cannot be read."""
    clips, kept, faults = [], [], []
    for row in rows:
        try:
            clips.append(load_clip(row, processor.sampling_rate))
            kept.append(row)
        except (ValueError, OSError) as error:  # noqa: PERF203
            faults.append(f"{row.id}: {error}")
    return (dict(processor.extract_features(clips)) if clips else None), kept, faults


class FeatureStore:
    """Features of clips for the adapters of one model, in 16 bits, or in 8 with a scale for each channel of a clip.

    `frames` are the encoder's last layer (T, C), or all layers (L, T, C) if the paralinguistic adapter mixes them frame
    by frame. `pooled` are statistics (L, 2 C or 3 C), kept if the paralinguistic adapter reads nothing else.
    """

    def __init__(self, folder: str | Path, config: DualSLMConfig, bits: int = 16):
        if bits not in (8, 16):
            raise ValueError(f"features are kept in 16 or 8 bits, not {bits}.")
        self.pools = config.reads_statistics
        self.all_layers = config.paralinguistic_layer_mix and not self.pools
        identity = [config.audio_model_fingerprint, config.encoder_padding, self.pools, self.all_layers]
        identity += [config.paralinguistic_layer_mix, bits, config.paralinguistic_pooling]
        self.folder = Path(folder) / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self.bits, self.width = bits, config.audio_hidden_size
        self.layers = config.audio_num_layers if self.all_layers else 1
        self._shards: dict[str, str] = {}  # clip -> shard
        self._open: dict[str, Any] = {}
        self._hashes: dict[tuple[Path, str], str] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}

    def __contains__(self, row: Row) -> bool:
        return self.key(row) in self._shards

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as shard:
                names = shard.keys()
        except SafetensorError as error:
            raise ValueError(
                f"the feature shard {path} is damaged ({error}). Delete it: only its clips are computed again."
            ) from None
        self._shards |= {name.removesuffix(".frames"): path.name for name in names if name.endswith(".frames")}

    def key(self, row: Row) -> str:
        """Identifies the clip of a row by the content of its file and by its variant."""
        if row.audio is None:
            raise ValueError(f"{row.id} has no audio: only rows with audio have features.")
        path, suffix = Path(row.audio), row.variant.digest_suffix(row.id)
        if (path, suffix) not in self._hashes:
            self._hashes[path, suffix] = hashlib.sha256(path.read_bytes() + suffix.encode()).hexdigest()[:32]
        return self._hashes[path, suffix]

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """One row for each clip without features."""
        return list({self.key(row): row for row in rows if row not in self}.values())

    def build(
        self,
        rows: Sequence[Row],
        model: DualSLMForConditionalGeneration,
        processor: DualSLMProcessor,
        skip_damaged: bool = False,
        workers: int = 2,
        device: torch.device | str | None = None,
    ) -> list[Row]:
        """Computes the missing features, and returns the rows that have features.

        Args:
            device: runs the encoder, in bfloat16 where that is fast. Default: the encoder's own.

        Raises:
            OSError: the disk has too little space; told before anything is computed.
            ValueError: a clip cannot be read, and `skip_damaged` is false.
        """
        rows = list(rows)
        todo = self.missing(rows)
        if not todo:
            return rows
        self._check_space(todo)
        todo.sort(key=lambda row: row.duration or Path(str(row.audio)).stat().st_size)
        count = -(-len(todo) // SHARD)
        tower = model.audio_tower
        target = torch.device(device or tower.device)
        if target.type != "cpu" or cpu_has_bfloat16():
            # A copy, because the encoder's weights could not be restored from bfloat16.
            model.audio_tower = copy.deepcopy(tower).to(target, torch.bfloat16)
        read, bad = functools.partial(_read_clips, processor), []
        try:
            for number in tqdm(range(count), desc="encoder features", unit=" shards"):
                shard: Any = todo[number::count]  # of all lengths, so that no shard takes much longer
                loader = DataLoader(shard, BATCH, collate_fn=read, num_workers=workers)
                bad += self._build_shard(loader, model, skip_damaged)
        finally:
            model.audio_tower = tower
        for fault in bad:
            print(f"left out, its audio cannot be read: {fault}", flush=True)
        return [row for row in rows if row in self]

    def _check_space(self, rows: list[Row]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        seconds = sum(row.duration or 5.0 for row in rows)
        need = int(seconds * FRAMES_PER_SECOND * self.layers * self.width * self.bits / 8)
        free = shutil.disk_usage(self.folder).free
        print(f"features of {len(rows):,} clips: about {need / 2**20:,.0f} MiB in {self.folder}", flush=True)
        if need > free:
            raise OSError(
                f"the features need about {need / 2**20:,.0f} MiB in {self.folder}, {free / 2**20:,.0f} MiB are free. Free "
                "some, or keep them in 8 bits (data.feature_bits: 8)."
            )

    def _build_shard(
        self, loader: DataLoader, model: DualSLMForConditionalGeneration, skip_damaged: bool
    ) -> list[str]:
        """Writes the features of these clips to one shard, and returns the errors of clips that cannot be read."""
        tensors, bad = {}, []
        for inputs, kept, faults in loader:
            if faults and not skip_damaged:
                raise ValueError(
                    f"audio that cannot be read: {faults[0]} Repair it, or skip such rows (skip_damaged)."
                )
            bad += faults
            if inputs is not None:
                tensors |= self._encode(inputs, kept, model)
        if tensors:
            name = hashlib.sha256("".join(sorted(tensors)).encode()).hexdigest()[:16]
            path = self.folder / f"{name}.safetensors"
            try:
                with atomic(path, f".part{os.getpid()}") as scratch:
                    save_file(tensors, scratch)
            except SafetensorError as error:
                raise OSError(f"the feature shard {path} was not written ({error}). Is the disk full?") from None
            self._index(path)
        return bad

    @torch.inference_mode()
    def _encode(self, inputs: dict, rows: list[Row], model: DualSLMForConditionalGeneration) -> dict[str, Tensor]:
        """The tensors of one batch as a shard names them."""
        tensors = {}
        states, lengths = model.encode_audio(**inputs, all_layers=model.config.paralinguistic_layer_mix)
        if self.pools:
            pooled = model.paralinguistic_adapter.pool(states, lengths).cpu()
            tensors = {f"{self.key(row)}.pooled": clip.contiguous() for row, clip in zip(rows, pooled, strict=True)}
        for row, clip, length in zip(rows, states.cpu(), lengths.tolist(), strict=True):
            frames, name = clip[:, :length] if self.all_layers else clip[-1, :length], self.key(row)
            if self.bits == 8:
                scale = frames.abs().amax(dim=-2, keepdim=True).clamp(min=1e-8) / 127
                tensors[f"{name}.scale"] = scale.contiguous()
                tensors[f"{name}.frames"] = (frames / scale).round().to(torch.int8).contiguous()
            else:
                tensors[f"{name}.frames"] = frames.half().contiguous()
        return tensors

    def _shard(self, row: Row) -> tuple[Any, str]:
        """The open shard of a row's clip, and the clip's key."""
        clip = self.key(row)
        if clip not in self._shards:
            raise ValueError(f"{row.id}: no features of {row.audio}; the file has changed since they were built.")
        name = self._shards[clip]
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name], clip

    def get(self, row: Row, kind: str = "frames") -> Tensor:
        """`frames` or `pooled` of a row's clip, float32."""
        shard, clip = self._shard(row)
        tensor = shard.get_tensor(f"{clip}.{kind}").float()
        return tensor * shard.get_tensor(f"{clip}.scale") if self.bits == 8 and kind == "frames" else tensor

    def length(self, row: Row) -> int:
        """Number of frames of a row's clip."""
        shard, clip = self._shard(row)
        return shard.get_slice(f"{clip}.frames").get_shape()[-2]

    def batch(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """States (A, L, T, C) and lengths (A,) of the rows' clips, as `encode_audio` gives them."""
        return pad_frames([self.get(row) if self.all_layers else self.get(row)[None] for row in rows])


def pad_frames(frames: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pads (..., T, C) each to one (A, ..., T, C), and returns it with the lengths (A,)."""
    lengths = torch.tensor([f.shape[-2] for f in frames])
    longest = int(lengths.max())
    return torch.stack([pad(f, (0, 0, 0, longest - f.shape[-2])) for f in frames]), lengths
