"""Stage 0's rows, the validation's items, the replies' figures and the curves of a stage."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from world import world

from dual_slm.training.build import make_model
from dual_slm.training.corpora.row import Variant
from dual_slm.training.corpora.table import read_table, write_table
from dual_slm.training.data import load_data
from dual_slm.training.dataset import StageDataset
from dual_slm.training.err import Sources
from dual_slm.training.features import FeatureStore
from dual_slm.training.recipe import StageRecipe, load_recipe
from dual_slm.training.stages import Run, own_clips, plot_log, reply_metrics, run_stage_0, validation_items


@pytest.fixture(scope="module")
def small(tiny_backbones, tmp_path_factory):
    """(processor, rows) of a small world."""
    folder = tmp_path_factory.mktemp("small")
    recipe = load_recipe(str(world(folder, tiny_backbones, clips=12)))
    return make_model(recipe)[1], list(read_table(folder / "t.parquet"))


def test_own_clips_are_each_clip_and_each_copy_once(small):
    _, rows = small
    copy = rows[0].replace(variant=Variant(copy=1))
    again, lent = rows[0].replace(id="again"), rows[1].replace(id="lent", voice_only=True)
    found = own_clips([*rows[:2], copy, again, lent])  # the first row of a clip, in the place of the last one
    assert found == [rows[1], copy, rows[0]]


def test_a_clip_that_lends_its_voice_teaches_no_words(tiny_backbones, tmp_path, monkeypatch):
    """`voice_only` rows: their words are others, so they are text in every stage, and no target of CTC or ASR. The flag
    survives the tables, and the alignment that a recipe asks for."""
    recipe = load_recipe(str(world(tmp_path, tiny_backbones)))
    (table,) = recipe.data.tables
    words = {"corpus": "lent", "transcript": "hello lazy fox", "response": None, "response_complete": None}
    lent = [row.replace(**words, id=f"{row.id}/v", voice_only=True) for row in read_table(table)]
    write_table(lent, tmp_path / "lent.parquet")
    recipe.data.tables, recipe.data.align_responses = [table, str(tmp_path / "lent.parquet")], True
    recipe.data.alignment = {"max_new_tokens": 6}
    model, processor = make_model(recipe)
    data = load_data(recipe, tmp_path / "run", model.config)
    rows = [row for row in data.train if row.corpus == "lent"]
    assert len(rows) == len(data.train) / 2
    for stage in recipe.stages:
        stage.tasks = {"asr": 3, "emotion": 1, "dialogue": 1}
        dataset = StageDataset(rows, stage, seed=1)
        items = [dataset[epoch, index] for epoch in range(3) for index in range(len(rows))]
        assert {item.sources for item in items} == {Sources("speech", "transcript", True, False)}
        assert "asr" not in {item.sample.task for item in items}
    store = FeatureStore(tmp_path / "features", model.config)
    store.build(data.train + data.validation, model, processor)
    heard = {}
    for name in ("train_letters", "train_captions"):

        def spy(model, store, rows, *args, name=name):
            heard[name] = rows
            return []

        monkeypatch.setattr(f"dual_slm.training.stages.{name}", spy)
    run_stage_0(Run(recipe, model, processor, store, data), tmp_path)
    for rows in heard.values():  # the lent clips are there once, with their own words
        assert [row.corpus for row in rows] == ["c"] * 18
    assert set(heard) == {"train_letters", "train_captions"}


def test_a_corpus_in_other_letters_is_refused_with_its_cure(tiny_backbones, tmp_path, capsys):
    recipe = load_recipe(str(world(tmp_path, tiny_backbones)))
    model, processor = make_model(recipe)
    data = load_data(recipe, tmp_path / "run", model.config)
    run = Run(recipe, model, processor, FeatureStore(tmp_path / "features", model.config), data)
    data.train = [row.replace(transcript="добрый день") for row in data.train]
    with pytest.raises(ValueError, match=r"no transcript is in the letters .* which words are spelled in"):
        run_stage_0(run, tmp_path)
    assert "18 transcripts have figures or letters" in capsys.readouterr().out


def test_validation_asks_the_tasks_in_turn_and_hears_both_branches(small):
    _, rows = small
    stage = StageRecipe(name="s", err_stage="disentangle", tasks={"asr": 1, "emotion": 1})
    dataset = StageDataset(rows, stage, seed=0)
    items = validation_items(dataset, rows, 7)
    assert len(items) == 7 and len(validation_items(dataset, rows, 7, multiple=3)) == 6
    assert {item.sources[:2] for item in items} == {("speech", "speech")}
    assert sorted(item.sample.task for item in items) == ["asr"] * 4 + ["emotion"] * 3
    durations = [item.sample.duration for item in items]
    assert durations == sorted(durations)
    again = validation_items(dataset, rows[::-1], 7)  # whatever the order of the tables
    assert {item.row.id for item in again} == {item.row.id for item in items}


def test_validation_asks_the_tasks_of_each_corpus_in_turn(small):
    _, rows = small
    table = [*rows, *(row.replace(corpus="d") for row in rows)]
    tasks = {"c": {"asr": 1}, "d": {"emotion": 0.01, "gender": 2}}
    dataset = StageDataset(table, StageRecipe(name="s", tasks=tasks), seed=0)
    items = validation_items(dataset, table, 9)
    asked = Counter((item.row.corpus, item.sample.task) for item in items)
    assert asked == {("c", "asr"): 3, ("d", "emotion"): 3, ("d", "gender"): 3}


def test_replies_become_figures_of_their_tasks(small, capsys):
    processor, rows = small
    dataset = StageDataset(rows, StageRecipe(name="s", tasks={"asr": 1, "emotion": 1}), seed=0)
    items = [dataset.item(rows[0], "asr"), dataset.item(rows[0], "emotion"), dataset.item(rows[1], "emotion")]
    replies = ["the quick dog", "happy", "fox"]
    ids = [processor.tokenizer(reply)["input_ids"] for reply in replies]
    longest = max(map(len, ids))
    filled = np.array([row + [-100] * (longest - len(row)) for row in [*ids, ids[0]]])  # another process repeats one
    figures = reply_metrics(items, processor, 1, SimpleNamespace(predictions=filled))
    assert figures == {"accuracy_emotion": 0.5, "unparsed": 0.5, "wer": pytest.approx(1 / 3)}
    assert capsys.readouterr().out.count("reply:") == 1


def test_curves_of_a_stage_are_drawn(tmp_path):
    log = [{"step": n, "loss": 2.0 / n, "loss_asr": 1.0, "token_accuracy_asr": 0.1 * n} for n in (1, 2)]
    log.append({"step": 2, "eval_loss": 1.5, "eval_wer": 0.4, "eval_accuracy_emotion": 0.5, "eval_runtime": 3.0})
    plot_log(log, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
