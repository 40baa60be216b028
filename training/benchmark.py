"""`dual-slm benchmark reply`: what a spoken turn costs, part by part, beside the bare LLM on the same words as text."""

import statistics
import time

import numpy as np
import torch

from ..processing_dual_slm import load_audio
from .backbones import DEMO_CLIP, DEMO_TRANSCRIPT

PARTS = ("features", "encoder", "adapters", "prefill")


def _clip(seconds: float, rate: int) -> np.ndarray:
    """The demo clip, cut or repeated to so many seconds."""
    samples = load_audio(DEMO_CLIP, target_rate=rate)
    return np.resize(samples, int(seconds * rate))


@torch.inference_mode()
def _spoken(model, processor, samples: np.ndarray, new_tokens: int) -> dict[str, float]:
    times, start = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        times[name], start = now - start, now

    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "audio", "audio": samples}]}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
    )
    lap("features")
    states, lengths = model.encode_audio(
        inputs["input_features"], inputs["input_features_mask"], inputs["audio_num_chunks"]
    )
    lap("encoder")
    audio = model.adapt_audio(states, lengths, inputs["audio_branches"])
    lap("adapters")
    device = model.get_input_embeddings().weight.device
    prompt = {"input_ids": inputs["input_ids"].to(device), "audio_features": audio}
    model.generate(**prompt, max_new_tokens=1, do_sample=False)
    lap("prefill")
    model.generate(**prompt, max_new_tokens=1 + new_tokens, min_new_tokens=1 + new_tokens, do_sample=False)
    lap("generation")
    return times


@torch.inference_mode()
def _typed(model, processor, text: str, new_tokens: int) -> dict[str, float]:
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=True, return_dict=True, add_generation_prompt=True
    ).to(model.get_input_embeddings().weight.device)
    llm, times = model.language_model, {}
    for name, tokens in (("prefill", 1), ("generation", 1 + new_tokens)):
        start = time.perf_counter()
        llm.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times[name] = time.perf_counter() - start
    return times


@torch.inference_mode()
def _padded_encoder(model, processor, samples: np.ndarray) -> float:
    """Seconds of the encoder on the same clip padded to 30 s, as Whisper was trained."""
    kept = model.config.encoder_padding, processor.encoder_padding
    model.config.encoder_padding = processor.encoder_padding = "max_length"
    try:
        features = processor.extract_features([samples])
        start = time.perf_counter()
        model.encode_audio(**features)
        return time.perf_counter() - start
    finally:
        model.config.encoder_padding, processor.encoder_padding = kept


def benchmark_reply(model, processor, seconds: float = 4.0, repeats: int = 7, new_tokens: int = 32) -> dict:
    """Medians over `repeats`, the spoken and the typed turn in turn, after one warm-up of both."""
    samples = _clip(seconds, processor.sampling_rate)
    words = DEMO_TRANSCRIPT.read_text().strip()
    spoken, typed = [], []
    for round_ in range(repeats + 1):
        ours = _spoken(model, processor, samples, new_tokens)
        ours["padded_encoder"] = _padded_encoder(model, processor, samples)
        bare = _typed(model, processor, words, new_tokens)
        if round_:
            spoken.append(ours)
            typed.append(bare)

    def median(rows: list[dict], value) -> float:
        return statistics.median(value(row) for row in rows)

    def first(row: dict) -> float:
        return sum(row.get(part, 0.0) for part in PARTS)

    def rate(row: dict) -> float:
        return new_tokens / max(row["generation"] - row["prefill"], 1e-9)

    ratios = [first(a) / first(b) for a, b in zip(spoken, typed, strict=True)]
    return {
        "clip_seconds": seconds,
        "threads": torch.get_num_threads(),
        "device": str(model.get_input_embeddings().weight.device),
        "spoken": {
            "seconds_to_first_token": median(spoken, first),
            "tokens_per_second": median(spoken, rate),
            "padded_encoder": median(spoken, lambda row: row["padded_encoder"]),
            "parts": {part: median(spoken, lambda row, part=part: row[part]) for part in PARTS},
        },
        "text": {"seconds_to_first_token": median(typed, first), "tokens_per_second": median(typed, rate)},
        "first_token_ratio": statistics.median(ratios),
    }


def show(result: dict) -> str:
    spoken, text = result["spoken"], result["text"]
    lines = [
        f"{result['clip_seconds']:g} s of speech, {result['threads']} threads, {result['device']}",
        f"{'':22}{'speech':>10}{'as text':>10}",
        f"{'s to first token':22}{spoken['seconds_to_first_token']:10.3f}{text['seconds_to_first_token']:10.3f}"
        f"   ratio {result['first_token_ratio']:.2f}",
        f"{'tokens per second':22}{spoken['tokens_per_second']:10.1f}{text['tokens_per_second']:10.1f}",
        "to the first token:",
    ]
    total = sum(spoken["parts"].values())
    lines += [f"  {part:20}{value:10.3f}{value / total:10.0%}" for part, value in spoken["parts"].items()]
    padded, encoder = spoken["padded_encoder"], spoken["parts"]["encoder"]
    lines.append(f"encoder on the clip padded to 30 s: {padded:.3f} s, {padded / encoder:.1f} times the real length")
    return "\n".join(lines)
