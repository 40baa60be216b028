"""The two adapters of the paper (arXiv 2508.08095, section III-A), EmoSLLM's QPMapper, and soft tokens.

Shapes: A clips, T encoder frames (50 Hz), L encoder layers, C width of the encoder, N `num_paralinguistic_tokens`,
D width of the LLM, V caption tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from .captions_dual_slm import CaptionSlots
from .encoder_dual_slm import length_mask


class AdaptedWords(NamedTuple):
    """What a linguistic adapter makes of A clips.

    Args:
        embeds: (M, D), the embeddings of all clips one after the other.
        lengths: (A,), embeddings of each clip; they add up to M.
        token_ids: (M,), the LLM's token behind each embedding; `None` where the embeddings are free vectors.
    """

    embeds: torch.Tensor
    lengths: torch.Tensor
    token_ids: torch.Tensor | None = None


def masked_adaptive_average(states: torch.Tensor, lengths: torch.Tensor, size: int) -> torch.Tensor:
    """`nn.AdaptiveAvgPool1d` over the real frames of each clip: (A, T, C), (A,) -> (A, size, C).

    Output n of a clip of length l is the mean of its frames floor(n l / size) .. ceil((n + 1) l / size) - 1.
    """
    steps = torch.arange(size, device=states.device)
    start = (steps * lengths[:, None]) // size  # (A, size)
    end = -((-(steps + 1) * lengths[:, None]) // size)
    time = torch.arange(states.shape[1], device=states.device)
    weight = ((time >= start[..., None]) & (time < end[..., None])).to(states.dtype)  # (A, size, T)
    return (weight @ states) / weight.sum(-1, keepdim=True)


def masked_statistics(states: torch.Tensor, lengths: torch.Tensor, dynamics: bool = False) -> torch.Tensor:
    """Mean and standard deviation over the real frames: (A, L, T, C), (A,) -> (A, L, 2 C).

    With `dynamics` the mean absolute step between frames is added, which tells fast from slow speech: (A, L, 3 C).
    """
    mask = length_mask(lengths, states.shape[2]).to(states.dtype)[:, None, :, None]
    count = lengths.to(states.dtype)[:, None, None]
    mean = (states * mask).sum(2) / count
    variance = ((states - mean[:, :, None]) ** 2 * mask).sum(2) / count
    parts = [mean, (variance + 1e-8).sqrt()]
    if dynamics:
        steps = (states[:, :, 1:] - states[:, :, :-1]).abs() * mask[:, :, 1:]
        parts.append(steps.sum(2) / (count - 1).clamp(min=1))
    return torch.cat(parts, dim=-1)


def concatenate_frames(states: torch.Tensor, lengths: torch.Tensor, rate: int) -> torch.Tensor:
    """Concatenates every `rate` frames (eq. 5): (A, T, C), (A,) -> (A, ceil(T / rate), rate C).

    Zeros fill up a tail of fewer frames, so that nothing is dropped.
    """
    states = states * length_mask(lengths, states.shape[1]).to(states.dtype)[..., None]
    states = nn.functional.pad(states, (0, 0, 0, -states.shape[1] % rate))
    return states.reshape(states.shape[0], -1, rate * states.shape[2])


def _transformer_layers(config: PreTrainedConfig, width: int, norm_first: bool = False) -> nn.ModuleList:
    return nn.ModuleList(
        nn.TransformerEncoderLayer(
            width,
            config.paralinguistic_num_heads,
            dim_feedforward=config.paralinguistic_intermediate_size or 4 * width,
            dropout=config.paralinguistic_dropout,
            batch_first=True,
            norm_first=norm_first,
        )
        for _ in range(config.paralinguistic_num_layers)
    )


class ParalinguisticAdapter(nn.Module):
    """How it is said: a whole utterance -> N embeddings (section III-A, eq. 4).

    The paper's adapter is a transformer layer, adaptive average pooling over time and a linear layer. Other fields of
    the config mix encoder layers, pool statistics, add slot vectors, and express the outputs as soft tokens.
    """

    statistics_mean: torch.Tensor
    statistics_scale: torch.Tensor

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.num_tokens, self.pooling = config.num_paralinguistic_tokens, config.paralinguistic_pooling
        width, out = config.audio_hidden_size, config.text_config.hidden_size
        origin = config.caption_origin  # of a ported adapter, which keeps the shapes that its first LLM gave it
        if origin is not None:
            self.num_tokens, out = origin["num_tokens"], origin["hidden_size"]
        self.layers = _transformer_layers(config, width)
        self.layer_weights = None
        self.statistics = {"statistics": 2, "dynamics": 3}.get(self.pooling, 0)  # of each channel
        self.concat = config.paralinguistic_layer_concat
        if config.paralinguistic_layer_mix and not self.concat:  # softmax over L
            mixtures = self.num_tokens if self.statistics else 1
            self.layer_weights = nn.Parameter(torch.zeros(config.audio_num_layers, mixtures))
        pooled = width
        if self.statistics:
            # Residual streams have a few huge dimensions, so stage 0 measures how to standardise each statistic.
            pooled, rows = self.statistics * width, config.audio_num_layers if config.paralinguistic_layer_mix else 1
            self.register_buffer("statistics_mean", torch.zeros(rows, pooled))
            self.register_buffer("statistics_scale", torch.ones(rows, pooled))
            pooled *= rows if self.concat else 1
        hidden = config.paralinguistic_hidden_size
        self.hidden = nn.Linear(pooled, hidden) if hidden else None
        self.dropout = nn.Dropout(config.paralinguistic_dropout)
        inner = hidden or pooled
        self.slot_vectors = None
        if config.paralinguistic_slot_vectors:
            self.slot_vectors = nn.Parameter(torch.zeros(self.num_tokens, inner))
        self.output = nn.Linear(inner, out)
        self.soft_tokens = self.residual = None
        if config.paralinguistic_soft_vocab_size:
            self.soft_tokens = (SoftTokens if origin is None else PortedTokens)(config)
        if config.paralinguistic_soft_residual:
            self.residual = SoftResidual(inner, config.text_config.hidden_size)

    def pool(self, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Everything before the linear part, which training caches.

        (A, L, T, C), (A,) -> (A, N, P); with statistics (A, L, P), not mixed yet.
        """
        if self.statistics and not self.layers:
            return masked_statistics(states, lengths, self.statistics == 3)
        if self.layer_weights is not None:
            states = torch.einsum("l,altc->atc", self.layer_weights.mean(1).softmax(0), states)
        else:
            states = states[:, -1]
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=~length_mask(lengths, states.shape[1]))
        if self.statistics:
            return masked_statistics(states[:, None], lengths, self.statistics == 3)
        return masked_adaptive_average(states, lengths, self.num_tokens)

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """What `pool` returned -> outputs (A, N, D), before soft tokens."""
        return self.output(self._inner(pooled))

    def _inner(self, pooled: torch.Tensor) -> torch.Tensor:
        """Input of the output layer, (A, N, P)."""
        if self.statistics:
            pooled = (pooled - self.statistics_mean) / self.statistics_scale
            if self.concat:
                pooled = pooled.flatten(1)[:, None].expand(-1, self.num_tokens, -1)
            elif self.layer_weights is not None and pooled.shape[1] == len(self.layer_weights):
                pooled = torch.einsum("ln,alp->anp", self.layer_weights.softmax(0), pooled)
            else:
                pooled = pooled[:, -1:].expand(-1, self.num_tokens, -1)
        states = pooled if self.hidden is None else self.hidden(pooled)
        if self.slot_vectors is not None:
            states = states + self.slot_vectors
        if self.hidden is not None:
            states = self.dropout(nn.functional.gelu(states))
        return states

    def embed(self, pooled: torch.Tensor, embedding: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `pool` returned -> what `forward` returns."""
        inner = self._inner(pooled)
        outputs = self.output(inner)
        if self.soft_tokens is None:
            return outputs, None
        rows = self.soft_tokens.rows(embedding)
        logits = self.soft_tokens.logits(outputs, rows)
        embeds = self.soft_tokens.mix(logits, rows, embedding)
        if self.residual is not None:
            embeds = embeds + self.residual(self.soft_tokens.align(inner))
        return embeds, logits

    def forward(
        self, states: torch.Tensor, lengths: torch.Tensor, embedding: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            states: (A, L, T, C), outputs of the encoder's layers, the last one last; L is 1 without a layer mix.
            lengths: (A,), real frames.
            embedding: the LLM's input embedding.

        Returns:
            (A, N, D) embeddings, and with soft tokens the logits (A, N, V) over the caption tokens.
        """
        return self.embed(self.pool(states, lengths), embedding)


class QueryAdapter(nn.Module):
    """How it is said, by EmoSLLM's QPMapper (arXiv 2508.14130), with the interface of [`ParalinguisticAdapter`].

    Learned queries and the frames pass the transformer layers together. A linear layer maps the queries to the LLM.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        width = config.paralinguistic_hidden_size or 768
        self.layer_weights = None
        if config.paralinguistic_layer_mix:
            self.layer_weights = nn.Parameter(torch.zeros(config.audio_num_layers, 1))
        self.norm = nn.LayerNorm(config.audio_hidden_size)
        self.input = nn.Linear(config.audio_hidden_size, width)
        self.queries = nn.Parameter(torch.zeros(config.num_paralinguistic_tokens, width))
        self.layers = _transformer_layers(config, width, norm_first=True)
        for layer in self.layers:  # dropout on attention weights would take half of a step on a CPU
            layer.self_attn.dropout = 0.0  # pyright: ignore
        self.output = nn.Linear(width, config.text_config.hidden_size)

    def mix(self, states: torch.Tensor) -> torch.Tensor:
        """Mixture of the encoder's layers: (A, L, T, C) -> (A, T, C)."""
        if self.layer_weights is None:
            return states[:, -1]
        return torch.einsum("l,altc->atc", self.layer_weights[:, 0].softmax(0), states)

    def read(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Queries after the transformer layers: (A, T, C), (A,) -> (A, N, D)."""
        frames = self.input(self.norm(frames))
        queries = self.queries.expand(len(frames), -1, -1)
        padding = ~length_mask(lengths, frames.shape[1])
        padding = torch.cat([padding.new_zeros(queries.shape[:2]), padding], dim=1)
        states = torch.cat([queries, frames], dim=1)
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=padding)
        return self.output(states[:, : queries.shape[1]])

    def forward(
        self, states: torch.Tensor, lengths: torch.Tensor, embedding: nn.Module | None = None
    ) -> tuple[torch.Tensor, None]:
        """(A, L, T, C) layers of the encoder and (A,) real frames -> (A, N, D) embeddings, and no logits."""
        return self.read(self.mix(states), lengths), None


class LinguisticAdapter(nn.Module):
    """What is said: k frames concatenated -> linear -> ReLU -> linear, at 50 / k Hz (section III-A, eq. 5)."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.rate = config.linguistic_downsample_rate
        width = self.rate * config.audio_hidden_size
        self.norm = nn.LayerNorm(width) if config.linguistic_input_norm else nn.Identity()
        self.linear_1 = nn.Linear(width, config.linguistic_hidden_size)
        self.dropout = nn.Dropout(config.linguistic_dropout)
        self.linear_2 = nn.Linear(config.linguistic_hidden_size, config.text_config.hidden_size)

    def output_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Embeddings of clips of so many frames."""
        return -(-lengths // self.rate)

    def forward(self, states: torch.Tensor, lengths: torch.Tensor, embedding: nn.Module | None = None) -> AdaptedWords:
        """The encoder's last layer (A, T, C) and (A,) real frames -> embeddings of all clips."""
        hidden = nn.functional.relu(self.linear_1(self.norm(concatenate_frames(states, lengths, self.rate))))
        outputs, sizes = self.linear_2(self.dropout(hidden)), self.output_lengths(lengths)
        return AdaptedWords(outputs[length_mask(sizes, outputs.shape[1])], sizes)


class SoftResidual(nn.Linear):
    """A free vector that is added to each soft token and starts at zero.

    It is a class of its own because transformers calls `_init_weights` only for modules with parameters of their own.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class SoftTokens(nn.Module):
    """Expresses vectors in the LLM's own tokens: their logits are products with frozen embedding rows (ours).

    Buffers:
        token_ids: (V,), the LLM's tokens that are used.
        keys: (V, D), their embedding rows, kept so that the adapter can be read without its LLM. Zero in checkpoints
            of earlier versions.
    """

    token_ids: torch.Tensor
    keys: torch.Tensor

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        size, origin = config.paralinguistic_soft_vocab_size, config.caption_origin
        width = config.text_config.hidden_size if origin is None else origin["hidden_size"]
        self.register_buffer("token_ids", torch.zeros(size, dtype=torch.long))
        self.register_buffer("keys", torch.zeros(size, width))
        self.scale = nn.Parameter(torch.ones(()))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        state_dict.setdefault(f"{prefix}keys", self.keys)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def choose(self, token_ids: list[int] | torch.Tensor, embedding: nn.Module) -> None:
        """Takes these tokens of an LLM, and keeps their embedding rows."""
        self.token_ids = torch.as_tensor(token_ids, device=self.token_ids.device)
        self.keys = self.embed(self.token_ids, embedding)

    def embed(self, token_ids: torch.Tensor, embedding: Any) -> torch.Tensor:
        """Embedding rows of tokens, (..., D), without a gradient to the LLM."""
        # The module is called, since Gemma's embedding scales what it looks up.
        return embedding(token_ids.to(embedding.weight.device)).detach().to(self.scale)

    def rows(self, embedding: nn.Module) -> torch.Tensor:
        """Embedding rows of the tokens, (V, D)."""
        return self.embed(self.token_ids, embedding)

    def logits(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(..., D) outputs and (V, D) rows -> (..., V)."""
        return self.scale * (outputs @ rows.T)

    def mix(self, logits: torch.Tensor, rows: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        """(A, N, V) logits -> (A, N, D) embeddings."""
        return logits.softmax(-1) @ rows

    def align(self, inner: torch.Tensor) -> torch.Tensor:
        """The adapter's hidden states -> those behind each embedding, (A, N, P)."""
        return inner


class PortedTokens(SoftTokens):
    """Soft tokens of an adapter that learned with another LLM (`dual-slm port`).

    Its logits are products with that LLM's rows, the `keys`. They say how probable each label is, and the embeddings
    are this LLM's tokens of the labels, mixed by these probabilities.

    Buffers:
        token_ids: (1 + labels, N), this LLM's tokens of the caption's fixed text and of each label, -1 elsewhere.
        sources: (N,), the adapter's output that has the same part of the caption as each embedding.
    """

    sources: torch.Tensor

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.heard = CaptionSlots.from_layout(config.caption_origin["slots"], config.attribute_labels)
        size = (1 + sum(map(len, self.heard.spelling.values())), config.num_paralinguistic_tokens)
        self.token_ids = torch.zeros(size, dtype=torch.long)
        self.register_buffer("sources", torch.zeros(size[1], dtype=torch.long))

    def rows(self, embedding: nn.Module) -> torch.Tensor:
        return self.keys

    def mix(self, logits: torch.Tensor, rows: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        tokens = self.embed(self.token_ids.clamp(min=0), embedding) * (self.token_ids >= 0).to(self.scale)[..., None]
        labels = [torch.cat(list(self.heard.probabilities(clip).values())) for clip in logits]
        return tokens[0] + torch.einsum("ak,knd->and", torch.stack(labels).to(tokens), tokens[1:])

    def align(self, inner: torch.Tensor) -> torch.Tensor:
        return inner[:, self.sources]
