"""Files that are there as a whole or not at all."""

import os
import subprocess
import sys

import pytest

from dual_slm.training.files import Journal, atomic, read_json, write_json, write_text


def test_a_journal_gives_back_any_text(tmp_path):
    """Characters that Python takes for ends of lines, as they are in scraped text and in replies."""
    written = {"a\u2028b": "one\u0085two\u2029three\x0bfour", "next": ["\n"]}
    Journal(tmp_path / "j").add(written)
    assert Journal(tmp_path / "j").values == written


def test_a_journal_goes_on_behind_the_last_whole_line(tmp_path):
    journal = Journal(tmp_path / "new" / "j")
    journal.add({"a": 1, "b": {"c": None}})
    with open(journal.path, "ab") as file:
        file.write(b'["d", "cut o')
    again = Journal(journal.path)
    assert again.values == journal.values
    again.add({"d": 2})
    assert Journal(journal.path).values == {"a": 1, "b": {"c": None}, "d": 2}
    again.remove()
    assert not journal.path.exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failed_write_leaves_the_older_version_and_no_scratch(tmp_path, kind):
    path = tmp_path / "new" / "a.json"

    def write(scratch, content: str) -> None:
        if kind == "folder":
            scratch.mkdir()
            scratch = scratch / "inner"
        scratch.write_text(content)

    with atomic(path) as scratch:
        write(scratch, "older")
        assert not path.exists() and scratch.parent == path.parent
    with pytest.raises(KeyboardInterrupt), atomic(path) as scratch:
        write(scratch, "newer")
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == [path]
    assert (path / "inner" if kind == "folder" else path).read_text() == "older"


def test_what_a_kill_left_is_overwritten(tmp_path):
    (tmp_path / "a.part").mkdir()
    (tmp_path / "a.part" / "half").touch()
    write_text(tmp_path / "a", "whole")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_json_comes_back_as_it_was(tmp_path):
    value = {"ä": [1, None, "\u2028"], "b": {"c": 0.1}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_text(encoding="utf-8").startswith('{\n "ä": [\n')


def test_paths_and_labels_need_neither_torch_nor_transformers():
    code = "import sys; from dual_slm.training import allocator, files, labels\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=os.environ, check=True)
