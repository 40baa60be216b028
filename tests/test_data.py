"""The rows of a recipe: splits, audio, responses, augmented copies, and the digest by which a run knows its data."""

from pathlib import Path

import pytest
from world import world

from dual_slm.training.build import make_model
from dual_slm.training.corpora.table import read_table, write_table
from dual_slm.training.data import cut_dialogues, environment, load_data
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


def with_second_table(recipe, folder: Path, **changes) -> None:
    """Adds the recipe's table once more, as the corpus "open" without answers."""
    (table,) = recipe.data.tables
    changes = {"corpus": "open", "response": None, "response_complete": None} | changes
    write_table([row.replace(**changes) for row in read_table(table)], folder / "open.parquet")
    recipe.data.tables = [table, str(folder / "open.parquet")]


def test_dialogues_are_cut_and_answered_in_their_corpora_alone(recipe, config, tmp_path):
    """Each training row of "c" with a history gets one copy, which the LLM answers even if it has answered the row."""
    with_second_table(recipe, tmp_path)
    recipe.data.cut_histories, recipe.data.align_responses = True, True
    recipe.data.alignment = {"max_new_tokens": 6}
    for stage in recipe.stages:
        stage.tasks = {"c": {"dialogue": 1}, "open": {"emotion": 1}}
    before = [row for row in read_table(*recipe.data.tables) if row.split == "train"]
    data = load_data(recipe, tmp_path / "run", config)
    cut = {row.id.split("/")[0]: row for row in data.train if "/last" in row.id}
    assert [row.key for row in data.train if "/last" not in row.id] == [row.key for row in before]
    assert set(cut) == {row.id for row in before if row.corpus == "c" and row.history} and len(cut) == 12
    for row in before:
        if row.corpus == "c" and row.history:
            length = len(cut[row.id].history)
            assert length < len(row.history) and cut[row.id].history == row.history[len(row.history) - length :]
    asked = {row.key for row in read_table(tmp_path / "run" / "responses.parquet")}
    unanswered = {row.key for row in before if row.corpus == "c" and row.response_complete is None}
    assert {corpus for corpus, _ in asked} == {"c"} and asked >= unanswered | {row.key for row in cut.values()}
    assert {row.response for row in data.train if row.corpus == "open"} == {None}
    rewrite_ids = [row.replace(id=f"{row.id}/last1") for row in before if row.corpus == "c"]
    with pytest.raises(ValueError, match=r"data\.cut_histories is true, and the row 1/last1 of c has been cut by"):
        list(cut_dialogues(rewrite_ids, recipe))


def test_a_corpus_or_target_that_no_training_row_has_is_refused(recipe, config, tmp_path):
    with_second_table(recipe, tmp_path, gender=None, split="validation")
    for tasks, message in (
        (
            {"c": {"asr": 1}, "open": {"asr": 1}},
            "stage joint: tasks has 'open', and no training row .*; there are c. Add",
        ),
        ({"c": {"asr": 1, "pitch": 1}}, "stage joint: no training row of c has a target for pitch. Label"),
    ):
        recipe.stages[0].tasks = tasks
        with pytest.raises(ValueError, match=message):
            load_data(recipe, tmp_path / "run", config)
