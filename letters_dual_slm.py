"""What is said by character CTC: a small network over encoder frames, a beam search, and an n-gram lexicon (ours).

The search is our own because it travels to the Hub with the checkpoint, without a compiled dependency.
"""

import collections
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from .adapters_dual_slm import AdaptedWords, concatenate_frames
from .encoder_dual_slm import length_mask
from .tokens_dual_slm import encode_pieces, read_vocabulary

logger = logging.get_logger(__name__)

MAX_BIGRAMS = 200_000  # 12 bytes each in the checkpoint
_LEAST_LETTER = math.log(0.01)  # letters below this probability are skipped, which bounds the search in noise


class LetterAdapter(nn.Module):
    """What is said, by character CTC with k outputs for k concatenated frames.

    k frames concatenated -> linear -> ReLU -> convolutions over time -> k outputs. A beam search over the words and
    bigrams of a [`Lexicon`] decodes them, and the LLM reads its own tokens of these words. Character CTC alone trains
    this adapter, since no gradient passes the search.
    """

    certainty = 0.7  # scales the logits, which are overconfident, so that the language model is weighed against them

    def __init__(self, config: PreTrainedConfig):
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
        self.hotwords: dict[str, list[int]] = {}  # expected words -> their tokens

    def words(self) -> "Words":
        """The lexicon and the hotwords, indexed for the search."""
        return self.lexicon.read(self.alphabet, self.hotwords)

    def output_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Placeholders of clips of so many frames; their words need fewer."""
        return -(-lengths // self.rate)

    def logits(self, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """One output a frame, the blank last: (A, T, C), (A,) -> (A, ceil(T / k) k, letters + 1)."""
        states = concatenate_frames(states, lengths, self.rate)
        hidden = nn.functional.relu(self.linear_1(self.norm(states)))
        mask = length_mask(self.output_lengths(lengths), hidden.shape[1])[..., None]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.letters(self.dropout(hidden)).reshape(len(hidden), -1, len(self.alphabet) + 1)

    @torch.no_grad()
    def forward(self, states: torch.Tensor, lengths: torch.Tensor, embedding: nn.Module) -> AdaptedWords:
        """The encoder's last layer (A, T, C) and (A,) real frames -> the LLM's embeddings of the words."""
        log_probs = (self.certainty * self.logits(states, lengths).float()).log_softmax(-1).cpu()
        sizes, words = self.output_lengths(lengths).tolist(), self.words()
        heard = [
            words.tokens(self.search(clip[: size * self.rate], words), size)
            for clip, size in zip(log_probs, sizes, strict=True)
        ]
        counts = torch.tensor([len(ids) for ids in heard], device=states.device)
        tokens = torch.tensor([i for ids in heard for i in ids], dtype=torch.long, device=states.device)
        return AdaptedWords(embedding(tokens).to(states.dtype), counts, tokens)

    def search(self, log_probs: torch.Tensor, words: "Words") -> str:
        """The most likely text of one clip by prefix beam search: letters by CTC, words by the lexicon.

        Args:
            log_probs: (T', letters + 1), the blank last.
            words: see `words`; read once for all clips.
        """
        blank = len(self.alphabet)
        # Text -> log-probability that it ends in a blank, and in a letter; the score of its finished words.
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
            beams = self._prune(grown, words)
        ends = {}
        for text, (in_blank, in_letter, score) in beams.items():
            before, word = _last_words(text)
            ends[text] = _log_add(in_blank, in_letter) + score + (words.score(before, word) if word else 0.0)
        return max(ends, key=ends.__getitem__).strip()

    def _prune(self, beams: dict[str, tuple[float, float, float]], words: "Words") -> dict:
        """The best `beam_width` texts, where an unfinished word counts as the best word that begins so."""
        if len(beams) <= self.beam_width:
            return beams
        ranks = {}
        for text, (in_blank, in_letter, score) in beams.items():
            _, word = _last_words(text)
            ranks[text] = _log_add(in_blank, in_letter) + score + (words.best(word) if word else 0.0)
        return {text: beams[text] for text in sorted(ranks, key=ranks.__getitem__, reverse=True)[: self.beam_width]}


def _last_words(text: str) -> tuple[str, str]:
    """The word before the last space and the one behind it; each is empty where there is no word."""
    head, _, last = text.rpartition(" ")
    return head.rpartition(" ")[2], last


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))


class ConvolutionLayer(nn.Module):
    """x + relu(convolution(norm(x))) over time, where padding counts as zero."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Conv1d(width, width, 5, padding=2, groups=8)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(A, T, W) and (A, T, 1), true at real positions -> (A, T, W)."""
        inner = self.norm(states) * mask.to(states.dtype)
        return states + nn.functional.relu(self.convolution(inner.transpose(1, 2)).transpose(1, 2))


class Lexicon(nn.Module):
    """Words and bigrams with their counts, the LLM's tokens of each word, and subwords that spell any other word.

    Buffers:
        spellings: (size, 20) uint8, letters of the alphabet counted from 1, 0 past the end. A row that begins with a
            space is a word or begins one; any other row continues a word.
        counts: (size,) int32, how often a text has the word; 0 for a subword.
        token_ids: (size, 4) int32, the LLM's tokens, -1 past the end. A longer word has none: subwords spell it.
        pairs: (bigrams, 3) int32, rows of the first and of the second word, and their count.
    """

    longest, most = 20, 4  # letters and tokens of a row
    spellings: torch.Tensor
    counts: torch.Tensor
    token_ids: torch.Tensor
    pairs: torch.Tensor

    def __init__(self, size: int, bigrams: int = 0):
        super().__init__()
        self.register_buffer("spellings", torch.zeros(size, self.longest, dtype=torch.uint8))
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int32))
        self.register_buffer("token_ids", torch.full((size, self.most), -1, dtype=torch.int32))
        self.register_buffer("pairs", torch.zeros(bigrams, 3, dtype=torch.int32))
        self._read: tuple = ([], None, None)  # buffers and hotwords that the words were made of, and the words

    def rows(self, alphabet: str) -> list[tuple[str, int, list[int]]]:
        """(spelling, count, token ids) of each row."""
        rows = zip(self.spellings.tolist(), self.counts.tolist(), self.token_ids.tolist(), strict=True)
        return [
            ("".join(alphabet[i - 1] for i in letters if i), count, [i for i in ids if i >= 0])
            for letters, count, ids in rows
        ]

    def known(self, alphabet: str) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
        """The words and the bigrams, each with its count."""
        return self._known(self.rows(alphabet))

    def _known(self, rows: list[tuple[str, int, list[int]]]) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
        words = {spelling[1:]: count for spelling, count, _ in rows if count}
        return words, {(rows[a][0][1:], rows[b][0][1:]): count for a, b, count in self.pairs.tolist()}

    def read(self, alphabet: str, hotwords: dict[str, list[int]]) -> "Words":
        """The rows as they are now and the hotwords, indexed; made again only when one of them has changed."""
        before, expected, words = self._read
        now = [buffer.cpu() for buffer in self.buffers()]
        if words is None or expected != hotwords or not all(map(torch.equal, before, now)):
            rows = self.rows(alphabet)
            words = Words({spelling: ids for spelling, _, ids in rows if ids}, *self._known(rows), hotwords)
            self._read = ([buffer.clone() for buffer in now], dict(hotwords), words)
        return words


def lexicon_rows(
    tokenizer: Any, words: Mapping[str, int], bigrams: Mapping[tuple[str, str], int], alphabet: str
) -> dict[str, torch.Tensor]:
    """The buffers of a [`Lexicon`], from the LLM's tokenizer and the counts of words and bigrams.

    They hold the words that are short enough, every token of the LLM that consists of letters, which spell all other
    words, and the bigrams of these words that occur more than once.

    Raises:
        ValueError: the tokenizer cannot spell a letter, or needs too many tokens for it.
    """
    entries = _lexicon_entries(tokenizer, words, alphabet)
    letter_ids = {letter: i for i, letter in enumerate(alphabet, 1)}
    spellings = torch.zeros(len(entries), Lexicon.longest, dtype=torch.uint8)
    token_ids = torch.full((len(entries), Lexicon.most), -1, dtype=torch.int32)
    for row, (spelling, (_, ids)) in enumerate(entries.items()):
        spellings[row, : len(spelling)] = torch.tensor([letter_ids[letter] for letter in spelling])
        token_ids[row, : len(ids)] = torch.tensor(ids)
    counts = torch.tensor([count for count, _ in entries.values()], dtype=torch.int32)
    row_of = {spelling[1:]: row for row, spelling in enumerate(entries) if counts[row]}
    often = {bigram: count for bigram, count in bigrams.items() if count > 1 and row_of.keys() >= set(bigram)}
    ordered = sorted(often.items(), key=lambda item: (-item[1], item[0]))[:MAX_BIGRAMS]
    pairs = torch.tensor([(row_of[a], row_of[b], n) for (a, b), n in ordered], dtype=torch.int32).reshape(-1, 3)
    return {"spellings": spellings, "counts": counts, "token_ids": token_ids, "pairs": pairs}


def _lexicon_entries(tokenizer: Any, words: Mapping[str, int], alphabet: str) -> dict[str, tuple[int, list[int]]]:
    """Spelling -> (count, token ids), sorted by spelling. A space begins a spelling that begins a word."""
    letters, unknown = set(alphabet[1:]), getattr(tokenizer, "unk_token_id", None)
    entries: dict[str, tuple[int, list[int]]] = {}
    for spelling, number in read_vocabulary(tokenizer).items():
        if spelling and letters.issuperset(spelling.removeprefix(" ")) and number != unknown:
            entries[spelling] = (0, [number])
    needed = [*alphabet[1:], *([] if " " in entries else [f" {letter}" for letter in alphabet[1:]])]
    single = [spelling for spelling in needed if spelling not in entries]
    for spelling, ids in zip(single, encode_pieces(tokenizer, single), strict=True):
        if not ids or unknown in ids or len(ids) > Lexicon.most:  # a byte-level tokenizer may need several
            raise ValueError(
                f"this tokenizer spells the letter {spelling!r} in the tokens {ids}; a lexicon needs 1 to {Lexicon.most} "
                "known ones. Take another LLM, or other linguistic_letters."
            )
        entries[spelling] = (0, ids)
    said = [word for word in words if letters.issuperset(word)]
    for word, ids in zip(said, encode_pieces(tokenizer, [f" {word}" for word in said]), strict=True):
        entries[f" {word}"] = (words[word], ids if len(ids) <= Lexicon.most and unknown not in ids else [])
    return {spelling: row for spelling, row in sorted(entries.items()) if len(spelling) <= Lexicon.longest}


class Words:
    """A bigram language model over the rows of a [`Lexicon`], and how the LLM spells each word.

    Bigrams are smoothed by absolute discounting (Ney, Essen and Kneser 1994). A hotword scores above all words of the
    lexicon, an unknown word by its length. The constants were chosen on validation speakers; a fifth more or less of
    any of them makes little difference.
    """

    weight, bonus, strange, letter, expected, discount = 0.6, 2.5, -6.0, -1.1, 1.0, 0.75

    def __init__(
        self,
        ids: dict[str, list[int]],
        counts: dict[str, int],
        bigrams: dict[tuple[str, str], int],
        hotwords: dict[str, list[int]],
    ):
        self.ids = ids | {" " + word: ids for word, ids in hotwords.items()}
        self.hotwords, total = hotwords, sum(counts.values())
        self.unigrams = {word: count / total for word, count in counts.items()}
        followed: dict[str, int] = collections.Counter()
        kept: dict[str, float] = collections.defaultdict(float)
        for (before, _), count in bigrams.items():
            followed[before] += count
            kept[before] += count - self.discount
        # A word is followed as often as it is said. Any word may follow with the mass that the bigrams leave.
        said = {before: max(count, counts[before]) for before, count in followed.items()}
        self.left = {before: 1 - kept[before] / said[before] for before in said}
        self.bigrams = {pair: (count - self.discount) / said[pair[0]] for pair, count in bigrams.items()}
        self.begun: dict[str, float] = {}
        for word in {**counts, **hotwords}:
            score = self._known("", word)
            for end in range(1, len(word) + 1):
                self.begun[word[:end]] = max(score, self.begun.get(word[:end], -math.inf))

    def _known(self, before: str, word: str) -> float:
        if word in self.hotwords:
            return self.expected
        unigram = self.unigrams.get(word)
        if unigram is None:
            return -math.inf
        return self.weight * math.log(self.bigrams.get((before, word), 0.0) + self.left.get(before, 1.0) * unigram)

    def score(self, before: str, word: str) -> float:
        """Score of a whole word behind another one, which is empty at the start."""
        return self.bonus + max(self._known(before, word), self.strange + self.letter * len(word))

    def best(self, beginning: str) -> float:
        """Score of the best word that begins so."""
        return self.bonus + max(self.begun.get(beginning, -math.inf), self.strange + self.letter * len(beginning))

    def tokens(self, text: str, limit: int | None = None) -> list[int]:
        """The LLM's tokens of a text, of as many words as fit into `limit` tokens."""
        tokens: list[int] = []
        for word in text.split():
            spelled = self.spell(word)
            if limit is not None and len(tokens) + len(spelled) > limit:
                logger.warning_once(f"no room for {word!r} and what follows: {limit} positions for {text!r}")
                break
            tokens += spelled
        return tokens

    def spell(self, word: str) -> list[int]:
        """The LLM's tokens of a word; the longest matching subwords if it is not in the lexicon.

        Raises:
            ValueError: no subword begins with one of its letters.
        """
        rest, tokens = " " + word, []
        while rest:
            size = next((n for n in range(len(rest), 0, -1) if rest[:n] in self.ids), 0)
            if not size:
                raise ValueError(
                    f"{word!r} cannot be spelled: the lexicon of {len(self.ids)} rows has no piece for {rest[0]!r}. "
                    "Stage 0 of training fills it."
                )
            tokens += self.ids[rest[:size]]
            rest = rest[size:]
        return tokens
