"""Encoder features of clips, computed once and kept on disk: the frozen encoder does not run again in training.

A clip is known by its audio's content; a folder of shards by the encoder, its padding and what the adapters read. Shards
are safetensors, memory-mapped when read; each appears complete or not at all, so an interrupted build goes on.
"""

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..modeling_dual_slm import DualSLMForConditionalGeneration
from ..processing_dual_slm import DualSLMProcessor, load_audio
from .attributes import Thresholds, classify, load_pyworld, pitch_track
from .backbones import cpu_has_bfloat16
from .corpora.synthesis import degrade

FRAMES_PER_SECOND = 50
SHARD = 512  # clips


def load_row(row: dict, sampling_rate: int = 16_000) -> np.ndarray:
    """The samples of a row. `row["augment"]`, a seed, asks for another speed, room, line and gain of the same clip, with
    `row["revoice"]` for another voice in the place of the speed; `row["loudness"]`, a mean RMS (full scale 1), for the clip
    at that level."""
    samples = load_audio(row["audio"], target_rate=sampling_rate)
    if row.get("loudness") is not None:
        samples = samples * np.float32(row["loudness"] / max(float(np.sqrt(np.mean(samples**2))), 1e-6))
    if row.get("augment") is None:
        return samples
    import soxr

    change, rng = _change(row)
    if row.get("revoice"):
        samples = other_voice(samples, sampling_rate, *change)
    else:
        samples = soxr.resample(samples, sampling_rate * change.tempo, sampling_rate)
    return degrade(samples, rng).astype(np.float32)


class _Change(NamedTuple):
    """Factors of an augmented copy: formants and pitch (> 1: higher), tempo (> 1: faster)."""

    formants: float
    pitch: float
    tempo: float


def _change(row: dict) -> tuple[_Change, np.random.Generator]:
    """What is changed in an augmented copy, and the draws of what else is done to it. Another speed changes all alike."""
    rng = np.random.default_rng([row["augment"], *hashlib.sha256(row["id"].encode()).digest()[:8]])
    if row.get("revoice"):
        return _Change(*(float(np.exp(rng.uniform(-most, most))) for most in (0.18, 0.35, 0.12))), rng
    return _Change(*[float(np.exp(rng.uniform(-0.14, 0.14)))] * 3), rng


def other_voice(samples: np.ndarray, sampling_rate: int, formants: float, pitch: float, tempo: float) -> np.ndarray:
    """The clip by WORLD (pyworld) with its formants and its pitch moved and its tempo changed by these factors: (samples,)
    -> (samples / tempo,). How it is said stays; who one hears is another."""
    pyworld = load_pyworld()
    samples = samples.astype(np.float64)
    f0, times = pitch_track(samples, sampling_rate)
    envelope = np.log(pyworld.cheaptrick(samples, f0, times, sampling_rate))
    noise = pyworld.d4c(samples, f0, times, sampling_rate)
    bins = np.arange(envelope.shape[1])  # what was at a frequency is at `formants` times it
    envelope, noise = (np.array([np.interp(bins / formants, bins, frame) for frame in x]) for x in (envelope, noise))
    period = pyworld.default_frame_period / tempo
    return pyworld.synthesize(f0 * pitch, np.exp(envelope), noise, sampling_rate, period)


def augmented(row: dict, copy: int, thresholds: Thresholds | None = None, revoice: bool = False) -> dict:
    """Row of the augmented copy number `copy`: words and emotion stay; pitch and tempo follow the change where they were
    measured and `thresholds` are known; what is not known of it any more (energy, caption, and with `revoice` the gender) is
    null."""
    row = row | {"augment": copy, "caption": None} | dict.fromkeys(("pitch", "tempo", "energy", "energy_rms"))
    if revoice:
        row |= {"revoice": True, "gender": None}
    change = _change(row)[0]
    if row["pitch_hz"] is not None:
        row["pitch_hz"] *= change.pitch
    if row["seconds_per_word"] is not None:
        row["seconds_per_word"] /= change.tempo
    if thresholds is not None:
        row |= classify({"pitch": row["pitch_hz"], "tempo": row["seconds_per_word"]}, thresholds)
    return row


class _Batches(torch.utils.data.Dataset):
    """Loads and extracts in worker processes; one item is one batch, or what is wrong with one of its clips."""

    def __init__(self, batches: list[list[dict]], processor: DualSLMProcessor):
        self.batches, self.processor = batches, processor

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[dict | None, list[int], list[str]]:
        if torch.utils.data.get_worker_info() is not None:
            torch.set_num_threads(1)
        clips, kept, faults = [], [], []
        for place, row in enumerate(self.batches[index]):
            try:
                clips.append(load_row(row, self.processor.sampling_rate))
                kept.append(place)
            except (ValueError, OSError) as error:  # noqa: PERF203
                faults.append(f"{row['id']}: {error}")
        return (dict(self.processor.extract_features(clips)) if clips else None), kept, faults


class FeatureStore:
    """Features of any clips for the adapters of one model: `frames` (T, C), the encoder's last layer, and where the
    paralinguistic adapter reads nothing but statistics, these as `pooled` (L, 2 C or 3 C); where it mixes layers frame by
    frame, `frames` is (L, T, C).

    Args:
        folder: where the shards of all encoders are kept.
        config: of the model.
        bits: 16, or 8 with a scale for each channel of a clip (half the disk).
    """

    def __init__(self, folder: str | Path, config, bits: int = 16):
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
        self._open: dict[str, object] = {}
        self._hashes: dict[tuple, str] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as shard:
                names = list(shard.keys())
        except SafetensorError as error:
            raise ValueError(
                f"the feature shard {path} is damaged ({error}). Delete it: only its clips are computed again."
            ) from None
        for name in names:
            clip, _, kind = name.partition(".")
            if kind == "frames":
                self._shards[clip] = path.name

    def key(self, row: dict) -> str:
        """The clip of a row, by the content of its file."""
        place = (row["audio"], row.get("augment"), row.get("revoice"), row.get("loudness"))
        place += (row["id"],) if row.get("augment") is not None else ()  # the id is what its change is drawn by
        if place not in self._hashes:
            digest = hashlib.sha256(Path(row["audio"]).read_bytes())
            if row.get("loudness") is not None:
                digest.update(f"/loudness {row['loudness']}".encode())
            if row.get("augment") is not None:
                digest.update(f"/{row['id']}/{row['augment']}{'/voice' if row.get('revoice') else ''}".encode())
            self._hashes[place] = digest.hexdigest()[:32]
        return self._hashes[place]

    def __contains__(self, row: dict) -> bool:
        return self.key(row) in self._shards

    def missing(self, rows: list[dict]) -> list[dict]:
        """One row for each clip that is not there yet."""
        todo = {self.key(row): row for row in rows if row not in self}
        return list(todo.values())

    def size(self, rows: list[dict]) -> int:
        """About how many bytes the missing clips will take."""
        seconds = sum(row.get("duration") or 5.0 for row in self.missing(rows))
        return int(seconds * FRAMES_PER_SECOND * self.layers * self.width * self.bits / 8)

    def build(
        self,
        rows: list[dict],
        model: DualSLMForConditionalGeneration,
        processor: DualSLMProcessor,
        skip_damaged: bool = False,
        workers: int = 2,
        device: torch.device | str | None = None,
    ) -> list[dict]:
        """Computes what is missing and returns the rows that have features: all, or with `skip_damaged` those whose audio
        could be read. The encoder runs on `device` (default: where it is), in bfloat16 where that is fast, batches of
        similar length at a time.

        Raises:
            OSError: the disk has no room for it, told before anything is computed.
            ValueError: a clip cannot be read (the row is named), unless `skip_damaged`.
        """
        todo = self.missing(rows)
        if not todo:
            return rows
        self.folder.mkdir(parents=True, exist_ok=True)
        need, free = self.size(rows), shutil.disk_usage(self.folder).free
        print(f"features of {len(todo):,} clips: about {need / 2**20:,.0f} MiB in {self.folder}", flush=True)
        if need > free:
            raise OSError(
                f"the features need about {need / 2**20:,.0f} MiB in {self.folder}, {free / 2**20:,.0f} MiB are free. Free "
                "some, or keep them in 8 bits (data.feature_bits: 8)."
            )
        todo.sort(key=lambda row: row.get("duration") or os.path.getsize(row["audio"]))
        # Shards hold clips of all lengths, so that one is not all of the long ones.
        count = -(-len(todo) // SHARD)
        tower = model.audio_tower
        device = torch.device(device or tower.device)
        if device.type != "cpu" or cpu_has_bfloat16():
            model.audio_tower = copy.deepcopy(tower).to(
                device, torch.bfloat16
            )  # a copy: there is no way back from bfloat16
        bad = []
        try:
            for number in tqdm(range(count), desc="encoder features", unit=" shards"):
                bad += self._build_shard(todo[number::count], model, processor, skip_damaged, workers)
        finally:
            model.audio_tower = tower
        for fault in bad:
            print(f"left out, its audio cannot be read: {fault}", flush=True)
        return [row for row in rows if row in self] if bad else rows

    def _build_shard(self, rows: list[dict], model, processor, skip_damaged: bool, workers: int) -> list[str]:
        batches = [rows[i : i + 32] for i in range(0, len(rows), 32)]
        loader = torch.utils.data.DataLoader(_Batches(batches, processor), batch_size=None, num_workers=workers)
        tensors, bad = {}, []
        for batch, (item, kept, faults) in zip(batches, loader, strict=True):
            if faults and not skip_damaged:
                raise ValueError(
                    f"audio that cannot be read: {faults[0]} Repair it, or skip such rows (skip_damaged)."
                )
            bad += faults
            if item is None:
                continue
            with torch.inference_mode():
                states, lengths = model.encode_audio(**item, all_layers=model.config.paralinguistic_layer_mix)
                pooled = model.paralinguistic_adapter.pool(states, lengths).cpu() if self.pools else None
                states, lengths = states.cpu(), lengths.cpu()
            for place, index in enumerate(kept):
                clip = self.key(batch[index])
                frames = states[place, :, : lengths[place]] if self.all_layers else states[place, -1, : lengths[place]]
                if self.bits == 8:
                    scale = frames.abs().amax(dim=-2, keepdim=True).clamp(min=1e-8) / 127
                    tensors[f"{clip}.scale"] = scale.contiguous()
                    tensors[f"{clip}.frames"] = (frames / scale).round().to(torch.int8).contiguous()
                else:
                    tensors[f"{clip}.frames"] = frames.half().contiguous()
                if pooled is not None:
                    tensors[f"{clip}.pooled"] = pooled[place].contiguous()
        if tensors:
            name = hashlib.sha256("".join(sorted(tensors)).encode()).hexdigest()[:16]
            path = self.folder / f"{name}.safetensors"
            scratch = path.with_suffix(f".part{os.getpid()}")
            try:
                save_file(tensors, scratch)
                os.replace(scratch, path)
            except SafetensorError as error:
                raise OSError(f"the feature shard {path} was not written ({error}). Is the disk full?") from None
            finally:
                scratch.unlink(missing_ok=True)
            self._index(path)
        return bad

    def get(self, row: dict, kind: str = "frames") -> torch.Tensor:
        """`frames` or `pooled` of a row's clip, float32.

        Raises:
            ValueError: the clip was never built, or its shard is damaged.
        """
        clip = self.key(row)
        if clip not in self._shards:
            raise ValueError(
                f"{row['id']}: no features of {row['audio']}; the file has changed since they were built."
            )
        name = self._shards[clip]
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        shard = self._open[name]
        tensor = shard.get_tensor(f"{clip}.{kind}").float()
        if self.bits == 8 and kind == "frames":
            tensor = tensor * shard.get_tensor(f"{clip}.scale")
        return tensor

    def batch(self, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, L, T, C) states and (A,) lengths of the rows' clips, as `encode_audio` gives them."""
        frames = [self.get(row) for row in rows]
        return pad_frames([f if self.all_layers else f[None] for f in frames])

    def length(self, row: dict) -> int:
        """Frames of a row's clip."""
        clip = self.key(row)
        name = self._shards[clip]
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name].get_slice(f"{clip}.frames").get_shape()[-2]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}


def pad_frames(frames: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., T, C) each -> (A, ..., T, C) float32 and (A,) lengths."""
    lengths = torch.tensor([f.shape[-2] for f in frames])
    longest = int(lengths.max())
    return torch.stack([torch.nn.functional.pad(f, (0, 0, 0, longest - f.shape[-2])) for f in frames]), lengths
