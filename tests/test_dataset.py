"""Training sets of a stage: items that depend on (seed, epoch, row) alone, and batches of similar size."""

from collections import Counter
from dataclasses import replace

import pytest

from dual_slm.training.corpora.row import Row, Variant, make_row
from dual_slm.training.dataset import BucketSampler, StageDataset, balance
from dual_slm.training.recipe import StageRecipe
from dual_slm.training.tasks import label_sets, make_sample

EMOTIONS = ("happy", "sad", "sad", "sad")


def rows(count: int = 12, **changes) -> list[Row]:
    known = {"corpus": "c", "split": "train", "audio": "x.wav", "transcript": "the fox", "response": "hello"}
    return [
        make_row(id=str(n), gender=("female", "male")[n % 2], emotion=EMOTIONS[n % 4], **known).replace(**changes)
        for n in range(count)
    ]


def stage(**changes) -> StageRecipe:
    tasks = {"asr": 1, "emotion": 1, "gender": 1, "dialogue": 1}
    return StageRecipe(**({"name": "s", "err_stage": "holistic", "tasks": tasks} | changes))


def test_sources_balance_and_facts_of_a_stage():
    emotion = {"tasks": {"emotion": 1.0}, "err_stage": "disentangle", "linguistic_source": "transcript"}
    data = StageDataset(rows(), stage(**emotion, balanced=True), seed=0)
    assert Counter(row.emotion for row in data.rows) == {"happy": 9, "sad": 9}
    drawn = Counter(data[epoch, n].sources[:2] for epoch in range(60) for n in range(len(data)))
    assert set(drawn) == {("speech", "transcript"), ("speech", "none")}
    assert drawn["speech", "none"] / sum(drawn.values()) == pytest.approx(1 / 3, abs=0.08)
    silent = StageDataset(rows(), stage(tasks={"emotion": 1.0}, paralinguistic_source="none"), seed=0)
    assert {silent[0, n].sources[0] for n in range(len(silent))} == {"none"}
    choices = {("c", "emotion"): ["happy", "sad"], ("c", "gender"): ["female", "male"]}
    told = make_sample(rows()[0], "emotion", choices, facts=["gender", "emotion"])
    texts = " ".join(part.get("text", "") for part in told.messages[-1]["content"])
    assert "woman" in texts or "female" in texts
    assert "happy" not in texts.replace("happy, sad", "").replace("sad, happy", "")  # the answer is never told


def test_balanced_rows_stand_in_a_fixed_order():
    """Rows without an emotion come last, whatever the order of the table."""
    table = [*rows(4), make_row(id="none", corpus="c", split="train")]
    found = [(row.id, row.emotion) for row in balance(table, 0)]
    assert [emotion for _, emotion in found] == ["happy"] * 3 + ["sad"] * 3 + [None] * 3
    assert found == [(row.id, row.emotion) for row in balance(table[::-1], 0)]


def test_a_stage_repeats_the_rows_of_a_rare_corpus():
    rare = [row.replace(id=f"rare {row.id}", corpus="rare") for row in rows(2)]
    dataset = StageDataset([*rows(), *rare], stage(repeat={"rare": 3}), seed=1)
    counts = Counter(row.id for row in dataset.rows)
    assert all(counts[row.id] == 1 for row in rows()) and all(counts[row.id] == 3 for row in rare)
    first = [n for n, row in enumerate(dataset.rows) if row is rare[0]]
    assert [dataset.copies[n] for n in first] == [0, 1, 2]
    items = [[dataset[epoch, n].sample for epoch in range(9)] for n in first]
    assert items[0] != items[1] != items[2]


def test_a_stage_without_rows_for_its_tasks_is_refused():
    with pytest.raises(ValueError, match="stage s: no row has a target for any of dialogue"):
        StageDataset(rows(response=None), stage(tasks={"dialogue": 1}), seed=0)
    with pytest.raises(ValueError, match="stage s: no row has a target for any of c: dialogue, d: asr"):
        StageDataset(rows(response=None), stage(tasks={"c": {"dialogue": 1}, "d": {"asr": 1}}), seed=0)


def test_the_labels_that_a_prompt_offers_are_those_of_all_speakers():
    women = [row for row in rows() if row.gender == "female"]
    asked = StageDataset(women, stage(tasks={"gender": 1}), seed=1, choices=label_sets(rows()))
    assert sorted(asked.item(women[0], "gender").sample.choices) == ["female", "male"]


def test_a_teacher_is_asked_for_the_copy_of_a_dialogue():
    asked, copy = [], replace(rows()[0], variant=Variant(copy=2))
    dataset = StageDataset([copy], stage(), seed=0, teacher=asked.append)
    for task in ("dialogue", "asr"):
        assert dataset.item(copy, task).teacher is None
    assert asked == [("c", "0", 2)]


def test_batches_hold_rows_whose_histories_are_cut_to_similar_lengths():
    """Sizes are those of the epoch: a history that is cut away does not count."""
    long = [{"role": r, "content": "the quick brown fox and the lazy dog"} for r in ("user", "assistant")] * 4
    dataset = StageDataset(rows(history=long), stage(tasks={"asr": 1}), seed=1)
    for epoch in (0, 1):
        for index in range(len(dataset)):
            sample = dataset[epoch, index].sample
            kept = sum(len(m["content"]) for m in sample.messages if isinstance(m["content"], str))
            assert kept <= dataset.size(index, epoch) <= kept + 400
    assert [dataset.size(i, 0) for i in range(len(dataset))] != [dataset.size(i, 1) for i in range(len(dataset))]


def test_draws_do_not_depend_on_who_asks():
    dataset = StageDataset(rows(), stage(), seed=1)
    again = StageDataset(rows(), stage(), seed=1)
    order = list(range(len(dataset)))
    assert [dataset[2, i] for i in order] == [again[2, i] for i in reversed(order)][::-1]
    assert [dataset[2, i] for i in order] != [dataset[3, i] for i in order]
    batches = []
    for epoch in (0, 0, 1):
        sampler = BucketSampler(dataset, 4, seed=5)
        sampler.set_epoch(epoch)
        batches.append(list(sampler))
    assert batches[0] == batches[1]
    assert batches[0] != batches[2]
    for epoch, found in ((0, batches[0]), (1, batches[2])):
        assert sorted(key for batch in found for key in batch) == [(epoch, i) for i in range(12)]
    with pytest.raises(ValueError, match="a batch of 99 is larger than the 12 rows"):
        BucketSampler(dataset, 99, seed=0)


def test_every_batch_has_its_share_of_each_kind_of_task():
    """Sorted by length alone, batches would be all of one kind: words are asked for in longer answers."""
    dataset = StageDataset(rows(60), stage(tasks={"asr": 1, "emotion": 1}), seed=1)
    batches = list(BucketSampler(dataset, 6, seed=5))
    kinds = [Counter(dataset[key].sample.kind for key in batch) for batch in batches]
    share = sum((Counter(found) for found in kinds), Counter())
    assert len(batches) == 10
    for found in kinds:
        assert all(abs(found[kind] - count / 10) <= 1 for kind, count in share.items())


def mapped(**changes) -> StageRecipe:
    tasks = {"c": {"asr": 1, "gender": 2, "emotion": 0.25}, "d": {"emotion": 1}}
    return stage(**({"tasks": tasks} | changes))


def two_corpora() -> list[Row]:
    """12 rows of "c" and 10 of "d", which have every kind of target."""
    return [*rows(12), *(row.replace(corpus="d") for row in rows(10))]


def test_an_epoch_meets_each_row_with_each_task_of_its_corpus():
    dataset = StageDataset(two_corpora(), mapped(), seed=1)
    assert len(dataset) == 12 + 24 + 3 + 10
    assert dataset.instances() == {("c", "asr"): 12, ("c", "gender"): 24, ("c", "emotion"): 3, ("d", "emotion"): 10}
    for epoch in (0, 1, 7):
        items = [dataset[epoch, index] for index in range(len(dataset))]
        met = Counter((item.row.corpus, item.sample.task, item.row.id) for item in items)
        assert {met["c", "asr", str(n)] for n in range(12)} == {1}
        assert {met["c", "gender", str(n)] for n in range(12)} == {2}
        assert {met["d", "emotion", str(n)] for n in range(10)} == {1}
        assert max(met["c", "emotion", str(n)] for n in range(12)) == 1


def test_parts_of_an_epoch_meet_all_rows_evenly():
    """A quarter of 12 rows: four epochs meet each once. A tenth of 25 rows is 2: after 25 epochs each was met twice."""
    for size, exposure, epochs, times in ((12, 0.25, 4, 1), (12, 0.25, 8, 2), (20, 0.1, 10, 1), (25, 0.1, 25, 2)):
        dataset = StageDataset(rows(size), mapped(tasks={"c": {"emotion": exposure}}), seed=3)
        met = Counter(dataset[e, i].row.id for e in range(epochs) for i in range(len(dataset)))
        assert met == {str(n): times for n in range(size)}
    parts = {
        task: {StageDataset(rows(12), mapped(tasks={"c": {task: 0.25}}), seed=3)[0, i].row.id for i in range(3)}
        for task in ("asr", "gender", "emotion")
    }
    assert len(set(map(frozenset, parts.values()))) > 1  # each task leaves out others


def test_visits_of_a_row_are_drawn_apart_and_do_not_depend_on_who_asks():
    def sources(dataset: StageDataset, index: int) -> list:
        return [dataset[epoch, index].sources for epoch in range(40)]

    tasks = {"c": {"gender": 2, "emotion": 1}}
    dataset = StageDataset(rows(), mapped(tasks=tasks, err_stage="disentangle"), seed=1)
    again = StageDataset(rows(), mapped(tasks=tasks, err_stage="disentangle"), seed=1)
    keys = [(epoch, index) for epoch in range(3) for index in range(len(dataset))]
    assert [dataset[key] for key in keys] == [again[key] for key in reversed(keys)][::-1]
    first, second, emotion = 0, 12, 24  # two visits and another task of the same row
    assert {dataset[0, place].row.id for place in (first, second, emotion)} == {"0"}
    assert sources(dataset, first) != sources(dataset, second) and sources(dataset, first) != sources(dataset, emotion)
    drawn = Counter(dataset[epoch, i].sources[1] for epoch in range(60) for i in range(len(dataset)))
    assert {source: count / sum(drawn.values()) for source, count in drawn.items()} == {
        source: pytest.approx(1 / 3, abs=0.03) for source in ("speech", "transcript", "none")
    }


def test_batches_of_mapped_tasks_hold_each_instance_once_and_their_share_of_each_kind():
    tasks = {"c": {"asr": 1, "gender": 1, "emotion": 1}}
    dataset = StageDataset(rows(60), mapped(tasks=tasks), seed=1)
    batches = list(BucketSampler(dataset, 6, seed=5))
    assert sorted(key for batch in batches for key in batch) == [(0, index) for index in range(180)]
    kinds = [Counter(dataset[key].sample.kind for key in batch) for batch in batches]
    assert {kind["linguistic"] for kind in kinds} <= {1, 2, 3} and len(batches) == 30


def test_shares_of_tasks_are_expected_instances():
    """Each row of "c" draws one of ASR (2 of 3) and gender (1 of 3); a row without a gender has ASR alone."""
    table = [*rows(6), *(row.replace(id=f"x{row.id}", gender=None) for row in rows(3))]
    found = StageDataset(table, stage(tasks={"asr": 2, "gender": 1}), seed=0).instances()
    assert found == {("c", "asr"): pytest.approx(7), ("c", "gender"): pytest.approx(2)}
