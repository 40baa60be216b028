"""What this machine does fast, and what fits into it: number formats, attention kernels, memory, sharding."""

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel

TRIM_EVERY = 10  # steps between two calls of `trim_heap`
EAGER_LIMIT = 4 * 2**30  # bytes of attention weights that a batch may keep


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has matrix products in bfloat16 (AVX-512, or Arm's BF16)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fast_dtype(dtype: str, file: TextIO | None = None) -> str:
    """`dtype`, or float32 if this CPU is slow in a half-width `dtype`. `file` (stdout) is told of the change."""
    if dtype not in ("bfloat16", "float16") or cpu_has_bfloat16():
        return dtype
    told = f"this CPU is a hundred times slower in {dtype} than in float32 (no AVX-512): float32 it is"
    print(told, file=file, flush=True)
    return "float32"


def fast_autocast(device: torch.device) -> torch.autocast:
    """bfloat16 matrix products where they are fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or cpu_has_bfloat16())


def matrix_rate(dtype: str = "auto") -> float:
    """FLOPs a second of a square matrix product on this machine, best of six."""
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        torch.matmul(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def positions_floor(tokens: int, targets: int, config: PreTrainedConfig, constant: int = 0) -> float:
    """Least FLOPs of one training step through a frozen LLM: the forward pass and the gradient of its input.

    A weight costs two FLOPs at each position in either pass. Attention's own products are left out.

    Args:
        tokens: real positions of the batch, without padding.
        targets: positions of the output layer.
        constant: positions before the speech, which need no gradient.
    """
    width, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    attention = width * head * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layers = config.num_hidden_layers * (attention + 3 * width * inner)
    return (4.0 * tokens - 2.0 * constant) * layers + 4.0 * targets * width * config.vocab_size


def activation_bytes(rows: int, positions: float, config: PreTrainedConfig, item: int, eager: bool) -> float:
    """Bytes that the backward pass through a frozen LLM keeps, with `item` bytes for a number.

    For each position and layer these are the norms, queries and keys (7 times the width) and the three products of the
    feed-forward part; eager attention keeps its weights too.
    """
    kept = rows * positions * config.num_hidden_layers * item * (7 * config.hidden_size + 3 * config.intermediate_size)
    return kept + (weight_bytes(rows, positions, positions, config, item) if eager else 0)


def weight_bytes(rows: int, queries: float, keys: float, config: PreTrainedConfig, item: int) -> float:
    """Bytes that eager attention keeps for its backward pass: each weight once, and once more in float32."""
    return (item + 4) * rows * queries * keys * config.num_hidden_layers * config.num_attention_heads


def eager_fits(rows: int, queries: float, keys: float, config: PreTrainedConfig, item: int) -> bool:
    """Whether a batch gets eager attention: on a CPU, if its weights stay below `EAGER_LIMIT`."""
    return not torch.cuda.is_available() and weight_bytes(rows, queries, keys, config, item) <= EAGER_LIMIT


@contextmanager
def fitted_attention(llm: PreTrainedModel) -> Iterator[None]:
    """Within it, each pass through the LLM on a CPU takes the attention kernel that suits its size.

    The backward pass of the fused kernel is slow there: a step takes 1.6 times as long (`benchmark train`). The eager
    kernel keeps every attention weight, which is gigabytes for a 73 s clip, so long batches take the fused one.
    """

    def fit(_, args, kwargs) -> None:
        embeds, mask = kwargs["inputs_embeds"], kwargs["attention_mask"]
        rows, queries, _ = embeds.shape
        fits = eager_fits(rows, queries, mask.shape[-1], llm.config, embeds.element_size())
        attention = "eager" if fits and torch.is_grad_enabled() else "sdpa"
        if llm.config._attn_implementation != attention:
            llm.set_attn_implementation(attention)

    if torch.cuda.is_available():  # one kernel for all sizes
        yield
        return
    with llm.get_decoder().register_forward_pre_hook(fit, with_kwargs=True):
        yield


def trim_heap() -> None:
    """Returns freed memory to the system, which the setting of `allocator.py` keeps in the heap.

    Batches of many lengths leave holes there that no other batch fits into: gigabytes after a hundred steps.
    """
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def checkpoint_activations(model) -> None:
    """Keeps only the inputs of the LLM's layers and computes their activations again in the backward pass."""
    # transformers renamed the method between 5.17 and 5.23
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


def is_sharded(model) -> bool:
    """Whether the LLM's layers are shared among the processes, so that all of them must run each pass."""
    return any(isinstance(module, FSDPModule) for module in model.get_decoder().layers)


def shard_llm(model) -> None:
    """Shares each decoder layer of the frozen LLM among the processes (FSDP 2), which gather it while it runs.

    Raises:
        ValueError: the LLM has LoRA.
    """
    if model.config.lora_config is not None:
        raise ValueError("train.shard_llm is for an LLM without LoRA, and this one has it: leave it out.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A group of its own: in DDP's, gathers of layers and sums of gradients would wait for each other.
    mesh = DeviceMesh.from_group(torch.distributed.new_group(), device)  # pyright: ignore[reportArgumentType]
    layers = model.get_decoder().layers
    for layer in layers:
        # Each layer is an FSDP root, which by default stays gathered from its first forward pass to the backward one.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    kept = sum(parameter.to_local().nbytes for parameter in layers.parameters())
    whole = sum(parameter.nbytes for parameter in layers.parameters())
    if torch.distributed.get_rank() == 0:
        print(f"the LLM's layers: {kept / 2**20:,.2f} of {whole / 2**20:,.2f} MiB in each process", flush=True)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, model.frozen_keys())
