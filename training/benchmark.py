"""Measures a spoken reply beside the LLM's reply to the same text, and a training step beside its lower bound."""

import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import soundfile
import torch

from ..audio_dual_slm import load_audio
from ..modeling_dual_slm import DualSLMForConditionalGeneration
from ..processing_dual_slm import DualSLMProcessor
from .collator import DualSLMCollator, TrainingCollator
from .corpora.row import Row, make_row
from .dataset import BUCKET_SPAN, BucketSampler, StageDataset
from .features import FeatureStore
from .files import DEMO_CLIP, DEMO_TRANSCRIPT
from .forward import adapt_cached, forward_targets
from .hardware import fitted_attention, matrix_rate, positions_floor
from .recipe import StageRecipe

PARTS = ("features", "encoder", "adapters", "prefill")
TURNS = 10  # in a conversation


def _clip(seconds: float, rate: int) -> np.ndarray:
    """The demo clip, cut or repeated to this length."""
    return np.resize(load_audio(DEMO_CLIP, target_rate=rate), int(seconds * rate))


def _now() -> float:
    """Time in seconds, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _prompt(processor, content):
    chat = [{"role": "user", "content": content}]
    return processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)


@contextmanager
def _padded_clips(model, processor) -> Iterator[None]:
    """Within it, clips are padded to 30 s, the length that Whisper was trained on."""
    padding = model.config.encoder_padding
    model.config.encoder_padding = processor.encoder_padding = "max_length"
    try:
        yield
    finally:
        model.config.encoder_padding = processor.encoder_padding = padding


@torch.inference_mode()
def _spoken(model, processor, samples: np.ndarray, new_tokens: int) -> dict[str, float]:
    laps = [_now()]
    inputs = _prompt(processor, [{"type": "audio", "audio": samples}])
    laps.append(_now())
    features = [inputs[name] for name in ("input_features", "input_features_mask", "audio_num_chunks")]
    states, lengths = model.encode_audio(*features)
    laps.append(_now())
    audio = model.adapt_audio(states, lengths, inputs["audio_branches"])
    laps.append(_now())
    prompt = {"input_ids": inputs["input_ids"].to(model.get_input_embeddings().weight.device), "audio_features": audio}
    for tokens in (1, 1 + new_tokens):
        model.generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        laps.append(_now())
    times = dict(zip((*PARTS, "generation"), np.diff(laps).tolist(), strict=True))
    with _padded_clips(model, processor):
        padded = processor.extract_features([samples])
        start = _now()
        model.encode_audio(**padded)
        return times | {"padded_encoder": _now() - start}


@torch.inference_mode()
def _typed(model, processor, text: str, new_tokens: int) -> dict[str, float]:
    inputs = _prompt(processor, text).to(model.get_input_embeddings().weight.device)
    laps = [_now()]
    for tokens in (1, 1 + new_tokens):
        model.language_model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        laps.append(_now())
    return {"prefill": laps[1] - laps[0], "generation": laps[2] - laps[1]}


def _turns(model, processor, samples: np.ndarray, count: int, new_tokens: int) -> list[float]:
    """Seconds to the first token of each of `count` spoken turns of one conversation."""
    conversation, times, tokens = processor.conversation(model), [], []

    def watch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens.append(_now())
        return scores

    options = {"logits_processor": [watch], "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    for _ in range(count):
        tokens.clear()
        start = _now()
        conversation.say(audio=samples, **options)
        times.append(tokens[0] - start)
    return times


def benchmark_reply(model, processor, seconds: float = 4.0, repeats: int = 7, new_tokens: int = 32) -> dict:
    """Times spoken and typed turns alternately, after one warm-up of both, then conversations of `TURNS` spoken turns.

    Returns:
        Medians over `repeats`.
    """
    samples = _clip(seconds, processor.sampling_rate)
    words = DEMO_TRANSCRIPT.read_text().strip()
    spoken, typed = [], []
    for _ in range(repeats + 1):
        spoken.append(_spoken(model, processor, samples, new_tokens))
        typed.append(_typed(model, processor, words, new_tokens))
    del spoken[0], typed[0]
    talks = [_turns(model, processor, samples, TURNS, new_tokens) for _ in range(max(1, repeats // 2))]

    def median(rows: list[dict], value) -> float:
        return statistics.median(value(row) for row in rows)

    def first(row: dict) -> float:
        return sum(row.get(part, 0.0) for part in PARTS)

    def speed(rows: list[dict]) -> dict[str, float]:
        rate = median(rows, lambda row: new_tokens / max(row["generation"] - row["prefill"], 1e-9))
        return {"seconds_to_first_token": median(rows, first), "tokens_per_second": rate}

    parts = {part: median(spoken, itemgetter(part)) for part in PARTS}
    return {
        "clip_seconds": seconds,
        "threads": torch.get_num_threads(),
        "device": str(model.get_input_embeddings().weight.device),
        "spoken": speed(spoken) | {"padded_encoder": median(spoken, itemgetter("padded_encoder")), "parts": parts},
        "text": speed(typed),
        "first_token_ratio": statistics.median(first(a) / first(b) for a, b in zip(spoken, typed, strict=True)),
        "turns": [statistics.median(turn) for turn in zip(*talks, strict=True)],
        "last_turn_ratio": statistics.median(talk[-1] / talk[0] for talk in talks),
    }


def show(result: dict) -> str:
    """The result of `benchmark_reply` for people."""
    spoken, text, turns, name = result["spoken"], result["text"], result["turns"], "seconds_to_first_token"
    parts, padded, total = spoken["parts"], spoken["padded_encoder"], sum(spoken["parts"].values())
    return "\n".join(
        [
            f"{result['clip_seconds']:g} s of speech, {result['threads']} threads, {result['device']}",
            f"{'':22}{'speech':>10}{'as text':>10}",
            f"{'s to first token':22}{spoken[name]:10.3f}{text[name]:10.3f}   ratio {result['first_token_ratio']:.2f}",
            f"{'tokens per second':22}{spoken['tokens_per_second']:10.1f}{text['tokens_per_second']:10.1f}",
            "to the first token:",
            *(f"  {part:20}{value:10.3f}{value / total:10.0%}" for part, value in parts.items()),
            f"encoder on the clip padded to 30 s: {padded:.3f} s, {padded / parts['encoder']:.1f} times the real length",
            f"a conversation, s to the first token: turn 1 {turns[0]:.3f}, turn {len(turns)} {turns[-1]:.3f}, "
            f"ratio {result['last_turn_ratio']:.2f}",
        ]
    )


class _TrainingSteps:
    """Training steps of one model, timed: as training does them, and unoptimised."""

    PHASES = ("collate", "adapters", "LLM forward and loss", "backward", "optimiser")

    def __init__(
        self, model: DualSLMForConditionalGeneration, processor: DualSLMProcessor, store: FeatureStore, rows: list[Row]
    ):
        self.model, self.processor = model, processor
        stage = StageRecipe(name="benchmark", err_stage="disentangle", tasks={"asr": 1, "emotion": 1})
        self.dataset = StageDataset(rows, stage, 0)
        self.joint = StageDataset(rows, replace(stage, err_stage="joint"), 0)  # every branch from speech
        self.collator, self.plain = TrainingCollator(processor, store), DualSLMCollator(processor)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        half = next(model.language_model.parameters()).dtype == torch.bfloat16
        self.autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=half)

    def fast(self, keys: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """One step.

        Returns:
            Seconds of each phase; real positions, targets, and positions without a backward pass.
        """
        laps = [_now()]
        batch = self.collator([self.dataset[key] for key in keys])
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items() if name != "task_ids"}
        laps.append(_now())
        with self.autocast:
            states, lengths, branches = (batch.pop(f"audio_{name}") for name in ("states", "lengths", "branches"))
            pooled, trained = batch.pop("audio_pooled", None), batch.pop("audio_trained")
            audio = adapt_cached(self.model, states, lengths, branches, pooled, trained)
            laps.append(_now())
            with fitted_attention(self.model.language_model):
                output = forward_targets(self.model, **batch, audio_features=audio)
            assert output.logits is not None and output.labels is not None
            known = output.labels != -100
            loss = torch.nn.functional.cross_entropy(output.logits.float(), output.labels[known])
        laps.append(_now())
        loss.backward()
        laps.append(_now())
        self._update()
        laps.append(_now())
        return np.diff(laps), np.array([output.num_positions, int(known.sum()), output.num_constant_positions])

    def slow(self, keys: list[tuple[int, int]]) -> float:
        """Seconds of one unoptimised step.

        Clips are padded to 30 s and encoded in the step; attention is fused; logits are computed at all positions.
        """
        self.model.language_model.set_attn_implementation("sdpa")
        with _padded_clips(self.model, self.processor):
            start = _now()
            samples = [self.joint[key].sample for key in keys]
            batch = {name: tensor.to(self.model.device) for name, tensor in self.plain(samples).items()}
            with self.autocast:
                loss = self.model(**batch).loss
            loss.backward()
            self._update()
            return _now() - start

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def _training_rows(folder: Path, count: int, rate: int) -> list[Row]:
    """Rows of the demo clip, repeated to 2 to 14 s, after up to six turns."""
    draw, rows, text = random.Random(0), [], DEMO_TRANSCRIPT.read_text(encoding="utf-8").strip()
    for n in range(count):
        seconds, path = draw.uniform(2, 14), folder / f"{n}.flac"
        soundfile.write(path, _clip(seconds, rate), rate)
        history = [{"role": r, "content": text} for r in ("user", "assistant") * 3][: 2 * draw.randint(0, 3)]
        words = " ".join((text.split() * 5)[: int(seconds * 3)])
        known = {"id": str(n), "corpus": "b", "split": "train", "audio": str(path), "duration": seconds}
        known |= {"caption": "(sad voice)", "emotion": ("sad", "happy")[n % 2]}
        rows.append(make_row(**known, history=history, transcript=words))
    return rows


def _bare_step(model: DualSLMForConditionalGeneration, rows: int, length: int, repeats: int = 4) -> float:
    """Seconds of the LLM's own forward and backward pass, best of `repeats`: no padding, one target in each row."""
    llm, best = model.language_model, float("inf")
    weight = llm.get_input_embeddings().weight
    device, half = weight.device, weight.dtype == torch.bfloat16
    embeds = torch.randn(rows, length, weight.shape[1], dtype=weight.dtype, device=device, requires_grad=True)
    mask = torch.ones(rows, length, dtype=torch.long, device=device)
    for _ in range(repeats):
        start = _now()
        with fitted_attention(llm), torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=1).logits
            logits[:, -1].float().log_softmax(-1)[:, 0].sum().backward()
        best = min(best, _now() - start)
    return best


def benchmark_train(
    model: DualSLMForConditionalGeneration, processor: DualSLMProcessor, steps: int = 6, batch_size: int = 16
) -> dict[str, float]:
    """Times training steps beside unoptimised ones and the lower bound, in one run.

    Half of the samples are ASR, half attribute tasks. The lower bound is `positions_floor` at this machine's matrix rate.

    Args:
        steps: measured batches, out of as many as training sorts by length together.
    """
    config = model.config.get_text_config()
    floor_rate = matrix_rate(str(next(model.language_model.parameters()).dtype).removeprefix("torch."))
    attention = model.language_model.config._attn_implementation
    with tempfile.TemporaryDirectory() as folder:
        rows = _training_rows(Path(folder), BUCKET_SPAN * batch_size, processor.sampling_rate)
        store = FeatureStore(Path(folder) / "features", model.config)
        started = _now()
        store.build(rows, model, processor)
        cache_seconds = _now() - started
        training = _TrainingSteps(model, processor, store, rows)
        model.train()
        mixed = BucketSampler(training.dataset, batch_size, 0, bucketing=False)
        pairs = list(itertools.islice(zip(BucketSampler(training.dataset, batch_size, 0), mixed, strict=True), steps))
        warm_up = 1
        if model.device.type == "cuda":  # allocates memory and selects kernels at each new shape
            pairs, warm_up = 2 * pairs, len(pairs)
        done = [(*training.fast(ours), training.slow(theirs)) for ours, theirs in pairs][warm_up:]
    phases, counts, slow = (np.array(column) for column in zip(*done, strict=True))
    positions, targets, constant = counts.sum(0).tolist()
    fast_seconds = float(phases.sum())
    length = positions // len(done) // batch_size
    bare = (
        _bare_step(model, batch_size, length) * floor_rate / positions_floor(batch_size * length, batch_size, config)
    )
    model.language_model.set_attn_implementation(attention)
    model.eval()
    floor = positions_floor(positions, targets, config, constant) / floor_rate
    shares = zip(training.PHASES, phases.sum(0).tolist(), strict=True)
    return {
        "seconds a step": fast_seconds / len(done),
        "unoptimised seconds a step": float(slow.mean()),
        "times as fast as unoptimised": float(slow.sum()) / fast_seconds,
        "times the floor": fast_seconds / floor,
        "the LLM alone, as many positions and no padding, times its floor": bare,
        **{f"share of {name} %": 100 * seconds / fast_seconds for name, seconds in shares},
        "matrix rate TFLOPS": floor_rate / 1e12,
        "real positions a step": positions / len(done),
        "of them without a backward pass": constant / len(done),
        "once, for the cache, s": cache_seconds,
        "samples a step": batch_size,
    }
