"""Tables: what they give back, and what they refuse."""

import errno
import gc

import pytest

from dual_slm.training.corpora.row import Row, make_row
from dual_slm.training.corpora.table import read_table, write_table

pytestmark = pytest.mark.usefixtures("table_cache")


def line(number: int, **more) -> Row:
    return make_row(id=str(number), corpus="c", split="train", transcript=f"text {number}", **more)


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def test_a_table_gives_back_what_was_written(tmp_path):
    full = line(
        1, duration=0.5, turn=0, history=[message("user", "a"), message("assistant", "b\nc")], response_complete=False
    )
    rows = [full, line(2), *(line(n) for n in range(3, 1_503))]
    assert write_table(iter(rows), tmp_path / "new" / "a.parquet") == 1_502
    assert write_table([line(9_999, gender="male")], tmp_path / "b.parquet") == 1
    both = read_table(tmp_path / "new" / "a.parquet", tmp_path / "b.parquet")
    assert list(both) == [*rows, line(9_999, gender="male")]
    assert both[1_500:] == [rows[1_500], rows[1_501], both[-1]]
    assert both[0].history == [message("user", "a"), message("assistant", "b\nc")] and both[1].history == []
    assert both[0].response_complete is False and both[1].response_complete is None
    write_table([line(9_999, gender="female")], tmp_path / "b.parquet")  # not read from an older cache
    assert read_table(tmp_path / "b.parquet")[0].gender == "female"


def test_what_is_no_table_is_named(tmp_path):
    write_table([line(n) for n in range(50)], tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "text": b"id,split\n1,train\n", "empty": b""}.items():
        (tmp_path / f"{name}.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.parquet is no table, or it is damaged"):
            read_table(tmp_path / "whole.parquet", tmp_path / f"{name}.parquet")
    dataset = read_table(tmp_path / "whole.parquet").dataset
    dataset.remove_columns(["emotion", "turn"]).to_parquet(tmp_path / "less.parquet")
    with pytest.raises(ValueError, match=r"less\.parquet: no column emotion, turn; "):
        read_table(tmp_path / "less.parquet")
    older = dataset.remove_columns(["voice_only", "subset"])  # columns that tables did not always have
    older.to_parquet(tmp_path / "older.parquet")
    assert list(read_table(tmp_path / "older.parquet")) == [line(n) for n in range(50)]
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet does not exist: `dual-slm corpus read`"):
        read_table(tmp_path / "gone.parquet")


@pytest.mark.parametrize(
    ("count", "fault", "message"),
    [
        (1_500, RuntimeError, "half-way"),
        (0, ValueError, r"a\.parquet: there are no rows"),
        (2_500, OSError, r"a\.parquet was not written .*no space left on the disk"),
    ],
)
def test_a_table_that_cannot_be_written_leaves_the_older_one(tmp_path, count, fault, message):
    def rows():
        yield from (line(n) for n in range(count))
        if fault is RuntimeError:
            raise RuntimeError("half-way")

    path = tmp_path / "a.parquet"
    write_table([line(1)], path)
    before = path.read_bytes()
    if fault is OSError:
        (tmp_path / "a.parquet.part").symlink_to("/dev/full")
    with pytest.raises(fault, match=message) as raised:
        write_table(rows(), path)
    assert fault is not OSError or raised.value.errno == errno.ENOSPC
    del raised
    gc.collect()  # Arrow formats the writer's error as it goes; within another module's import CPython 3.11 trips on that
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.parquet"]


def test_two_tables_may_not_hold_the_same_row(tmp_path):
    """Replies, labels and splits are kept by corpus and id: two clips of one name would get each other's."""
    for name in "ab":
        write_table([line(1, audio=f"{name}.wav")], tmp_path / f"{name}.parquet")
    write_table([line(1).replace(corpus="other")], tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"1 rows are in two tables, .*a\.parquet and .*b\.parquet, the first is '1'"):
        read_table(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert len(read_table(tmp_path / "a.parquet", tmp_path / "c.parquet")) == 2
