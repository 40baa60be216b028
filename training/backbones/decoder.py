"""Whisper's own decoder: it checks a converted Whisper, and gives the words to checkpoints without a linguistic adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer


# Not transformers' ASR pipeline: merging its chunks drops a sentence that is said again in the next 30 s, and its long form
# decodes timestamps and hears other words.
def transcriber(folder: str | Path, device: str = "cpu") -> Callable[[np.ndarray], str]:
    """The greedy decoder of the Whisper in `folder`, for clips at 16 kHz; it takes 30 s at a time."""
    model: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device)
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    multilingual = getattr(model.generation_config, "is_multilingual", False)
    options: dict[str, Any] = {"language": "en", "task": "transcribe"} if multilingual else {}

    def transcribe(audio: np.ndarray) -> str:
        chunks = [audio[start : start + extractor.n_samples] for start in range(0, len(audio), extractor.n_samples)]
        features = extractor(chunks, sampling_rate=16_000, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(features.input_features.to(device), **options)
        return " ".join(text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True))

    return transcribe
