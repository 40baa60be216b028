"""Speaker-disjoint cross-validation."""

import pytest

from dual_slm.training.cli import main
from dual_slm.training.corpora.folds import cross_validated
from dual_slm.training.corpora.row import Row, make_row
from dual_slm.training.corpora.table import read_table, write_table
from dual_slm.training.labels import SPLITS
from dual_slm.training.stats import leaks

pytestmark = pytest.mark.usefixtures("table_cache")


def line(number: int, **more) -> Row:
    return make_row(id=str(number), corpus="c", split="train", transcript=f"text {number}", **more)


def test_in_a_cross_validation_each_speaker_is_unheard_once_and_the_test_never_heard(tmp_path, capsys):
    women, men = ("ann", "dot", "eve", "fay", "ivy"), ("bob", "cid", "gus", "hal")
    people = sorted([(name, "female") for name in women] + [(name, "male") for name in men])
    rows = [
        line(10 * n + clip, speaker=name, gender=gender).replace(split="test" if name == "ivy" else "train")
        for n, (name, gender) in enumerate(people)
        for clip in range(2)
    ]
    write_table(rows, tmp_path / "all.parquet")
    main(["corpus", "folds", str(tmp_path / "all.parquet"), "--folds", "4", "--out", str(tmp_path / "folds")])
    assert "fold-4.parquet: train " in capsys.readouterr().out
    tests = []
    for number in range(1, 5):
        fold = list(read_table(tmp_path / f"folds/fold-{number}.parquet"))
        assert len(fold) == 16 and not leaks(fold)[0]
        of = {split: {(row.speaker, row.gender) for row in fold if row.split == split} for split in SPLITS}
        assert len(of["validation"]) == 1 and len(of["train"]) == 5
        assert {gender for _, gender in of["test"]} == {"female", "male"}
        tests += of["test"]
    assert sorted(tests) == people[:-1]

    with pytest.raises(ValueError, match="9 folds of 8 speakers"):
        next(cross_validated(rows, 9))
    with pytest.raises(ValueError, match="1 has no speaker: folds are by speaker"):
        next(cross_validated([line(1, speaker=None)], 3))
