"""`dual-slm benchmark`: what a spoken turn costs beside the bare LLM, and what the data paths cost."""

import json
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ..processing_dual_slm import load_audio
from .backbones import DEMO_CLIP, DEMO_TRANSCRIPT

PARTS = ("features", "encoder", "adapters", "prefill")
TURNS = 10  # of a conversation


def _clip(seconds: float, rate: int) -> np.ndarray:
    """The demo clip, cut or repeated to so many seconds."""
    samples = load_audio(DEMO_CLIP, target_rate=rate)
    return np.resize(samples, int(seconds * rate))


def _now() -> float:
    """Seconds, when all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def _spoken(model, processor, samples: np.ndarray, new_tokens: int) -> dict[str, float]:
    times, start = {}, _now()

    def lap(name: str) -> None:
        nonlocal start
        now = _now()
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
        start = _now()
        llm.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        times[name] = _now() - start
    return times


@torch.inference_mode()
def _padded_encoder(model, processor, samples: np.ndarray) -> float:
    """Seconds of the encoder on the same clip padded to 30 s, as Whisper was trained."""
    kept = model.config.encoder_padding, processor.encoder_padding
    model.config.encoder_padding = processor.encoder_padding = "max_length"
    try:
        features = processor.extract_features([samples])
        start = _now()
        model.encode_audio(**features)
        return _now() - start
    finally:
        model.config.encoder_padding, processor.encoder_padding = kept


def _turns(model, processor, samples: np.ndarray, count: int, new_tokens: int) -> list[float]:
    """Seconds to the first token of each of `count` spoken turns of one conversation."""
    conversation, times = processor.conversation(model), []
    for _ in range(count):
        start, first = _now(), []

        def watch(ids: torch.Tensor, scores: torch.Tensor, first: list[float] = first) -> torch.Tensor:
            if not first:
                first.append(_now())
            return scores

        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        conversation.say(audio=samples, logits_processor=[watch], **length)
        times.append(first[0] - start)
    return times


def benchmark_reply(model, processor, seconds: float = 4.0, repeats: int = 7, new_tokens: int = 32) -> dict:
    """Medians over `repeats`, the spoken and the typed turn in turn, after one warm-up of both; then conversations of
    `TURNS` spoken turns."""
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

    talks = [_turns(model, processor, samples, TURNS, new_tokens) for _ in range(max(1, repeats // 2))]

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
        "turns": [statistics.median(turn) for turn in zip(*talks, strict=True)],
        "last_turn_ratio": statistics.median(talk[-1] / talk[0] for talk in talks),
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
    turns = result["turns"]
    lines.append(
        f"a conversation, s to the first token: turn 1 {turns[0]:.3f}, turn {len(turns)} {turns[-1]:.3f}, ratio "
        f"{result['last_turn_ratio']:.2f}"
    )
    return "\n".join(lines)


def benchmark_corpus(rows: int = 20_000, batch_size: int = 16) -> dict[str, float]:
    """A folder's metadata -> table -> tasks -> padded batches of text: seconds, and how the memory grows on the way.

    The rows are made up, without audio, with dialogues of 0 to 6 turns before the spoken one.
    """
    from transformers import AutoProcessor

    from .. import register_auto_classes
    from .cli import default_checkpoint
    from .collator import DualSLMCollator
    from .corpora.folder import read
    from .corpora.schema import Report, check_rows, read_table, write_table
    from .corpora.synthesis import read_texts
    from .tasks import label_sets, make_sample, tasks_of

    register_auto_classes()
    draw, sentences = random.Random(0), read_texts(None)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with open(root / "metadata.jsonl", "w", encoding="utf-8") as file:
            for number in range(rows):
                roles = ("user", "assistant") * 3
                history = [{"role": r, "content": draw.choice(sentences)} for r in roles[: 2 * draw.randint(0, 3)]]
                row = {"id": str(number), "text": draw.choice(sentences), "response": draw.choice(sentences)}
                row |= {"emotion": draw.choice(["happy", "sad", "angry"]), "tempo": draw.choice(["slow", "fast"])}
                file.write(json.dumps(row | {"history": history}) + "\n")
        collator = DualSLMCollator(AutoProcessor.from_pretrained(default_checkpoint()))
        started = time.perf_counter()
        report = Report()
        write_table(check_rows(read(root, report), report), root / "t.parquet")
        read_seconds = time.perf_counter() - started
        table = read_table(root / "t.parquet")
        choices, tokens, memory, batch = label_sets(table), 0, [], []
        for row in table:
            tasks = tasks_of(row)
            batch.append(make_sample(row, tasks[int(row["id"]) % len(tasks)], choices))
            if len(batch) == batch_size:
                tokens += collator(batch)["input_ids"].numel()
                batch = []
                memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        seconds = time.perf_counter() - started
    return {
        "rows": rows,
        "seconds": seconds,
        "of them for read and table": read_seconds,
        "tokens, padding included": tokens,
        "peak MiB after a tenth of the batches": memory[len(memory) // 10],
        "peak MiB after all": memory[-1],
    }


def benchmark_align(rows: int = 48) -> dict[str, float]:
    """Tokens a second of `align` in batches of similar length, beside plain `generate` one by one, in one run."""
    from .alignment import Aligner, AlignmentConfig
    from .corpora.schema import make_row
    from .corpora.synthesis import read_texts

    aligner = Aligner("smollm2-135m-instruct", AlignmentConfig(max_new_tokens=48))
    texts = [
        make_row(id=str(n), corpus="x", split="train", transcript=t) for n, t in enumerate(read_texts(None)[:rows])
    ]
    prompts = sorted((aligner.prompt(row)[1] for row in texts), key=len)
    figures = {}
    for name, size in (("one by one", 1), ("batches of 16", 16), ("batches of 32", 32)):
        aligner.tokens, aligner.seconds = 0, 0.0
        for start in range(0, rows if size > 1 else rows // 4, size):
            aligner.generate(prompts[start : start + size])
        figures[f"tokens/s, {name}"] = aligner.tokens / aligner.seconds
    figures["ratio of 16 to one by one"] = figures["tokens/s, batches of 16"] / figures["tokens/s, one by one"]
    return figures


def _bare_step(model, rows: int, length: int, repeats: int = 4) -> float:
    """Seconds of the LLM's own pass forward and back to its input, one target a row, without adapters or padding."""
    from .trainer import fitted_attention

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


def benchmark_train(model, processor, steps: int = 6, batch_size: int = 16) -> dict[str, float]:
    """A training step beside the unoptimised path and the floor, in one run.

    The clips are the demo clip repeated to 2 to 14 s, half of them ASR, half attribute tasks after up to six turns; as
    many rows as training sorts by length at a time, and `steps` of their batches at random.
    Unoptimised: the encoder on log-mel padded to 30 s in every step, PyTorch's fused attention, logits at every position,
    batches without buckets. Floor: `positions_floor` at this machine's matrix rate.
    """
    import dataclasses

    from .collator import DualSLMCollator, TrainingCollator
    from .corpora.schema import make_row
    from .features import FeatureStore
    from .recipe import StageRecipe
    from .run import matrix_rate
    from .trainer import BUCKET_SPAN, BucketSampler, StageDataset, fitted_attention, positions_floor

    draw, rate = random.Random(0), processor.sampling_rate
    device, dtype = model.device, next(model.language_model.parameters()).dtype
    text = DEMO_TRANSCRIPT.read_text(encoding="utf-8").strip()
    stage = StageRecipe(name="benchmark", err_stage="disentangle", tasks={"asr": 1, "emotion": 1})
    floor_rate = matrix_rate(str(dtype).removeprefix("torch."))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    times = dict.fromkeys(("collate", "adapters", "LLM forward and loss", "backward", "optimiser"), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        import soundfile

        rows = []
        for n in range(BUCKET_SPAN * batch_size):
            seconds = draw.uniform(2, 14)
            path = Path(folder) / f"{n}.flac"
            soundfile.write(path, _clip(seconds, rate), rate)
            history = [{"role": r, "content": text} for r in ("user", "assistant") * 3][: 2 * draw.randint(0, 3)]
            row = make_row(id=str(n), corpus="b", split="train", audio=str(path), duration=seconds, history=history)
            words = " ".join((text.split() * 5)[: int(seconds * 3)])
            rows.append(row | {"transcript": words, "caption": "(sad voice)", "emotion": ("sad", "happy")[n % 2]})
        store = FeatureStore(Path(folder) / "features", model.config)
        started = time.perf_counter()
        store.build(rows, model, processor)
        cache_seconds = time.perf_counter() - started
        dataset = StageDataset(rows, stage, 0)
        joint = StageDataset(rows, dataclasses.replace(stage, err_stage="joint"), 0)
        collator, plain = TrainingCollator(processor, store), DualSLMCollator(processor)
        model.train()

        def fast(keys) -> tuple[int, int, int]:
            laps = [_now()]
            batch = collator([dataset[key] for key in keys])
            batch.pop("task_ids")
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            laps.append(_now())
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                audio = model.adapt_audio(
                    *(batch.pop(name) for name in ("audio_states", "audio_lengths", "audio_branches")),
                    batch.pop("audio_pooled", None),
                    batch.pop("audio_trained"),
                )
                laps.append(_now())
                with fitted_attention(model.language_model):
                    output = model(**batch, audio_features=audio, only_targets=True)
                known = output.labels != -100
                loss = torch.nn.functional.cross_entropy(output.logits.float(), output.labels[known])
            laps.append(_now())
            loss.backward()
            laps.append(_now())
            optimizer.step()
            optimizer.zero_grad()
            laps.append(_now())
            for name, start, end in zip(times, laps, laps[1:], strict=False):
                times[name] += end - start
            return output.num_positions, int(known.sum()), output.num_constant_positions

        def slow(keys) -> None:
            batch = {name: tensor.to(device) for name, tensor in plain([joint[key].sample for key in keys]).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        buckets = list(BucketSampler(dataset, batch_size, 0))
        mixed = list(BucketSampler(dataset, batch_size, 0, bucketing=False))
        padding, attention = model.config.encoder_padding, model.language_model.config._attn_implementation
        fast_seconds, slow_seconds, positions, targets, constant = 0.0, 0.0, 0, 0, 0
        pairs, warm_up = list(zip(buckets[:steps], mixed[:steps], strict=True)), 1
        if device.type == "cuda":  # which takes memory and chooses kernels when it first sees a shape
            pairs, warm_up = 2 * pairs, len(pairs)
        for number, (ours, theirs) in enumerate(pairs):
            started = _now()
            done = fast(ours)
            middle = _now()
            model.config.encoder_padding = processor.encoder_padding = "max_length"
            model.language_model.set_attn_implementation("sdpa")
            again = _now()
            slow(theirs)
            end = _now()
            model.config.encoder_padding = processor.encoder_padding = padding
            if number < warm_up:
                times = dict.fromkeys(times, 0.0)
                continue
            fast_seconds, slow_seconds = fast_seconds + middle - started, slow_seconds + end - again
            positions, targets, constant = positions + done[0], targets + done[1], constant + done[2]
        measured, text_config = len(pairs) - warm_up, model.config.get_text_config()
        size = (batch_size, positions // measured // batch_size)
        bare = _bare_step(model, *size) * floor_rate / positions_floor(size[0] * size[1], size[0], text_config)
        model.language_model.set_attn_implementation(attention)
        model.eval()
    floor = positions_floor(positions, targets, text_config, constant) / floor_rate
    figures = {"seconds a step": fast_seconds / measured, "unoptimised seconds a step": slow_seconds / measured}
    figures |= {"times as fast as unoptimised": slow_seconds / fast_seconds, "times the floor": fast_seconds / floor}
    figures["the LLM alone, as many positions and no padding, times its floor"] = bare
    figures |= {f"share of {name} %": 100 * value / fast_seconds for name, value in times.items()}
    figures |= {"matrix rate TFLOPS": floor_rate / 1e12, "real positions a step": positions / measured}
    figures["of them without a backward pass"] = constant / measured
    return figures | {"once, for the cache, s": cache_seconds, "samples a step": batch_size}
