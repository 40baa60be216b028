"""Synthesised corpora."""

import json
import shutil

import numpy as np
import pytest

from dual_slm.training.corpora.row import Row, make_row
from dual_slm.training.corpora.synthesis import build, span

HISTORY = [{"role": "assistant", "content": "How was the exam?"}, {"role": "user", "content": "I got the results."}]


def row(number: int, transcript: str, split: str = "train", **more) -> Row:
    return make_row(id=str(number), corpus="test", split=split, transcript=transcript, **more)


def test_spans_are_runs_of_the_sentence():
    sentence = "one two three four five six seven eight nine ten"
    rng = np.random.default_rng(0)
    spans = [span(sentence, rng, 2, 5) for _ in range(50)]
    assert all(part in sentence and 2 <= len(part.split()) <= 5 for part in spans)
    assert len(set(spans)) > 10


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("espeak-ng")), reason="flite and espeak-ng are not installed"
)
def test_a_built_corpus_is_a_function_of_its_seed(tmp_path):
    """All engines of the default, one process or two, whole or resumed: the same bytes. A voice speaks rows of its own split
    alone, and what is there is not taken for what is asked for."""
    splits = ("train", "train", "train", "train", "validation", "test")
    texts = [
        row(n, f"this is sentence number {n}", split=splits[n % 6], tempo=("slow", "fast")[n % 2], history=HISTORY)
        for n in range(40)
    ]
    folders = [build(texts, tmp_path / name, seed=5, processes=n).parent for name, n in (("one", 1), ("two", 2))]
    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file())
    assert len(files) == 40 + 2 + 1  # clips, blocks, metadata
    assert all((folders[0] / f).read_bytes() == (folders[1] / f).read_bytes() for f in files)
    records = [json.loads(line) for line in (folders[0] / "metadata.jsonl").read_text().splitlines()]
    assert {"piper", "flite", "espeak-ng", "hibari"} == {r["speaker"].split("/")[0] for r in records}
    assert all(r["history"] == HISTORY for r in records)
    assert [r["split"] for r in records] == [text.split for text in texts]
    seconds = {t: np.mean([r["duration"] for n, r in enumerate(records) if n % 2 == t]) for t in (0, 1)}
    assert seconds[0] > 1.2 * seconds[1]
    voices = {}
    for r in records:
        voices.setdefault(r["speaker"].rsplit("/", 1)[0], set()).add(r["split"])
    assert all(len(splits) == 1 for splits in voices.values())
    for path in [next(folders[1].rglob("block-000032.json")), *folders[1].rglob("00003[3-9].flac")]:
        path.unlink()
    build(texts, folders[1], seed=5, processes=1)
    assert all((folders[0] / f).read_bytes() == (folders[1] / f).read_bytes() for f in files)
    for other in ({"seed": 6}, {"seed": 5, "engines": ("piper", "flite", "espeak-ng")}):
        with pytest.raises(ValueError, match="holds clips of another seed, other texts or engines"):
            build(texts, folders[1], processes=1, **other)
    with pytest.raises(
        ValueError, match="12 rows are of a split that no voice of hibari is for, the first is of 'validation'"
    ):
        build(texts, tmp_path / "none", engines=("hibari",))


def test_a_text_that_cannot_be_spoken_is_left_out(tmp_path):
    texts = [row(n, text) for n, text in enumerate(("...", "the lazy dog says hello"))]
    folder = build(texts, tmp_path / "c", processes=1, engines=("piper",)).parent
    (record,) = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert record["text"] == "the lazy dog says hello"
