"""The rows of a recipe: splits, audio, responses, augmented copies, and the digest by which a run knows its data."""

from pathlib import Path

import pytest
from world import world

from dual_slm.training.build import make_model
from dual_slm.training.corpora.table import read_table, write_table
from dual_slm.training.data import environment, load_data
from dual_slm.training.recipe import load_recipe


@pytest.fixture
def recipe(tiny_backbones, tmp_path):
    return load_recipe(str(world(tmp_path, tiny_backbones)))


@pytest.fixture
def config(recipe):
    return make_model(recipe)[0].config


def rewrite(recipe, change) -> None:
    """The recipe's table with `change` applied to each row."""
    (table,) = recipe.data.tables
    write_table([change(row) for row in read_table(table)], table)


def test_rows_are_split_and_copied_and_their_digest_is_that_of_their_content(recipe, config, tmp_path, capsys):
    recipe.data.augment, recipe.data.revoice = {"c": 1, "none": 2}, {"c": 1}
    data = load_data(recipe, tmp_path / "run", config)
    assert "augment, revoice or repeat names: none" in capsys.readouterr().out
    plain = data.train[:18]
    assert [row.id for row in plain] == [str(n) for n in range(18)] and len(data.validation) == 6
    assert [row.clip for row in data.train[18:]] == [("c", row.id, copy) for row in plain for copy in (1, 2)]
    assert {(row.variant.copy, row.variant.revoiced) for row in data.train[18:]} == {(1, False), (2, True)}
    (tmp_path / "more.txt").write_text("the foxes\n", encoding="utf-8")
    assert environment(data)["data"] == {"rows": data.fingerprint, "train": 54, "validation": 6}
    recipe.data.augment = {}
    assert load_data(recipe, tmp_path / "run", config).fingerprint == data.fingerprint
    recipe.warm_start.lexicon = [str(tmp_path / "more.txt")]
    more = load_data(recipe, tmp_path / "run", config)
    assert more.lines == ["the foxes"] and more.fingerprint != data.fingerprint
    rewrite(recipe, lambda row: row.replace(emotion="happy"))
    assert load_data(recipe, tmp_path / "run", config).fingerprint not in {data.fingerprint, more.fingerprint}


def test_tables_of_one_split_are_refused(recipe, config, tmp_path):
    rewrite(recipe, lambda row: row.replace(split="train"))
    with pytest.raises(ValueError, match="the tables have rows of train, and training needs train and validation"):
        load_data(recipe, tmp_path / "run", config)


def test_audio_that_is_gone_is_told_and_left_out_if_asked(recipe, config, tmp_path, capsys):
    Path(tmp_path / "3.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 audio files are gone since .*3\.wav of the row 3"):
        load_data(recipe, tmp_path / "run", config)
    recipe.data.skip_damaged = True
    assert "3" not in {row.id for row in load_data(recipe, tmp_path / "run", config).train}
    assert "left out, its audio is gone: 3" in capsys.readouterr().out


def test_labels_that_a_checkpoint_cannot_name_are_told(recipe, config, tmp_path, capsys):
    rewrite(recipe, lambda row: row.replace(emotion="frustrated" if row.id == "3" else row.emotion))
    load_data(recipe, tmp_path / "run", config)
    told = "will not be taught the emotion frustrated: model.config.attribute_labels has neutral, happy, sad"
    assert told in capsys.readouterr().out


def test_the_llm_answers_only_what_it_has_not_answered(recipe, config, tmp_path):
    """A reply that `dual-slm align` made stays, test rows are left alone, and rows of two corpora that have the same id get
    their own replies; a row keeps everything else."""
    (table,) = recipe.data.tables
    rows = list(read_table(table))
    unanswered = {"corpus": "open", "response": None, "response_complete": None}
    others = [row.replace(**unanswered, transcript=f"the fox number {row.id}") for row in rows]
    test = [row.replace(**unanswered | {"corpus": "test", "split": "test"}) for row in rows]
    write_table([*others, *test], tmp_path / "open.parquet")
    recipe.data.tables, recipe.data.align_responses = [table, str(tmp_path / "open.parquet")], True
    recipe.data.alignment = {"max_new_tokens": 6}
    data = load_data(recipe, tmp_path / "run", config)
    found = {row.key: row for row in data.train + data.validation}
    assert len(found) == 2 * len(rows)
    own = [row for row in rows if row.response_complete is not None]
    assert all(found["c", row.id] == row for row in own)
    for other in read_table(tmp_path / "open.parquet")[: len(rows)]:
        answered = found["open", other.id]
        given = {name: getattr(answered, name) for name in ("system", "response", "response_complete")}
        assert other.replace(**given) == answered
    answers = {row.response for row in found.values() if row.corpus == "open"}
    assert len(answers - {"hello to the fox", None}) > 2
    assert {row.corpus for row in read_table(tmp_path / "run" / "responses.parquet")} == {"open"}
