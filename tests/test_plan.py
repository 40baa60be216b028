"""What a run would do, without doing it."""

import hashlib
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from world import world

from dual_slm.training.dataset import StageDataset
from dual_slm.training.plan import plan, plan_rows
from dual_slm.training.recipe import load_recipe


def test_the_plan_of_the_released_recipe_knows_letters(tiny_backbones, tmp_path):
    told = plan(load_recipe(str(world(tmp_path, tiny_backbones))), tmp_path / "run")
    assert "stage 0   8 CTC steps, 8 caption steps" in told
    assert "data      18 training rows with augmented and cut copies, 0.01 h of audio in all splits" in told
    assert "stage 2   disentangle: 6 steps of 4" in told
    assert told.endswith(f"output    {tmp_path / 'run'}") and not (tmp_path / "run").exists()


def test_the_plan_of_a_papers_recipe_tells_hours_at_the_rate_of_this_machine(tiny_backbones, tmp_path):
    settings = ["model.adapters=paper", "model.config={}", "warm_start.enabled=false", "stages.0.caption_share=0"]
    recipe = load_recipe(str(world(tmp_path, tiny_backbones)), settings)
    hours, rate = re.search(r"about ([\d.]+) h or more, at ([\d.]+) TFLOPS", plan(recipe, tmp_path)).groups()
    assert float(rate) > 0 and float(hours) < 0.1  # a toy


def test_the_plan_of_a_corpus_to_synthesise_needs_no_table(tiny_backbones, tmp_path):
    settings = ["data.tables=[]", "data.synthesise_hours=0.5", "stages.0.max_steps=-1", "stages.0.epochs=2"]
    told = plan(load_recipe(str(world(tmp_path, tiny_backbones)), settings), tmp_path / "run")
    assert "data      0.5 h to synthesise" in told and "training rows" not in told
    assert "stage 1   joint: 190 steps of 4" in told  # 900 clips an hour, of which 85 % are for training


STYLETALK = [
    "data.tables=[styletalk.parquet]",
    "data.cut_histories=true",
    "data.align_responses=true",
    "stages.0.tasks={styletalk: {dialogue: 1, emotion: 0.5}}",
    "stages.0.max_steps=-1",
    "stages.0.epochs=3",
    "stages.1.tasks={tempo: 3, emotion: 1}",
    "stages.2.tasks={styletalk: {dialogue: 1}}",
]


def test_a_table_that_is_not_there_counts_with_the_public_size_of_its_corpus(tiny_backbones, tmp_path, monkeypatch):
    """1,838 rows and a cut copy of each: 3,676 dialogues, 1,838 emotions; 3 epochs of 1,378 batches of 4."""
    monkeypatch.chdir(tmp_path)
    told = plan(load_recipe(str(world(tmp_path, tiny_backbones)), STYLETALK), "run").splitlines()
    assert "data      nominal sizes, no table: styletalk.parquet" in told
    assert "align     3,676 rows are answered by the LLM" in told
    (start,) = (n for n, line in enumerate(told) if line.startswith("stage 1   joint: 4,134 steps of 4, floor"))
    assert [line.split() for line in told[start + 1 : start + 5]] == [
        ["an", "epoch", "styletalk", "all"],
        ["dialogue", "3,676", "3,676"],
        ["emotion", "1,838", "1,838"],
        ["all", "5,514", "5,514"],
    ]
    (second,) = (n for n, line in enumerate(told) if line.startswith("stage 2   disentangle"))
    assert [line.split() for line in told[second + 2 : second + 4]] == [
        ["tempo", "2,757", "2,757"],
        ["emotion", "919", "919"],
    ]
    # Of the rows half are cut, to none, one or two of three turns: 5 of 6 dialogues have context.
    (last,) = (n for n, line in enumerate(told) if line.startswith("stage 3   holistic"))
    share = re.fullmatch(r" +of 2,000 drawn instances ([\d.]+)% have context \(earlier turns\)", told[last + 4])
    assert abs(float(share[1]) - 500 / 6) < 3
    positions = re.fullmatch(r" +first speech embedding at token (\d+) \(least\), .*, (\d+) \(most\)", told[last + 5])
    assert int(positions[1]) < 30 and int(positions[2]) > 100  # by the tokenizer, which is there
    with pytest.raises(FileNotFoundError, match=r"mine\.parquet does not exist"):
        plan(load_recipe(str(tmp_path / "recipe.yaml"), ["data.tables=[mine.parquet]"]), "run")


def test_a_plan_without_the_hub_says_what_is_unknown(tiny_backbones, tmp_path, monkeypatch):
    """The configurations of the paper's two backbones are known, those of others are not; no file is fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe, hub = str(world(tmp_path, tiny_backbones)), [*STYLETALK, "model.adapters=paper", "model.config={}"]
    hub += ["warm_start.enabled=false", "stages.0.caption_share=0", "model.dtype=bfloat16"]
    known = ["model.text_model_id=Qwen/Qwen2.5-7B-Instruct", "model.audio_model_id=openai/whisper-large-v3"]
    told = plan(load_recipe(recipe, [*hub, *known]), "run")
    assert "memory    LLM " in told and "estimated at four letters a token" in told
    # 1,838 clips of 3.5 s on average, at 50 frames of 1,280 numbers of 16 bits: 0.77 GiB. A cut copy has no clip of its own.
    assert "disk      about 0.77 GiB of features (1 of the encoder's layers" in told
    none = ["model.text_model_id=no/llm", "model.audio_model_id=no/encoder"]
    told = plan(load_recipe(recipe, [*hub, *none]), "run")
    assert "memory    and time are unknown: no configuration of no/llm could be read" in told
    assert "disk      unknown: no configuration of no/encoder could be read" in told
    assert "time unknown" in told and "3,676" in told


ATTRIBUTE_TASKS = ("gender", "pitch", "tempo", "energy", "emotion")


@pytest.fixture(scope="module")
def nominal():
    """The rows of the paper's recipes at nominal sizes: their data sections are one."""
    qwen, llama = (load_recipe(name) for name in ("slm-qwen2.5-7b", "slm-llama3.1-8b"))
    assert qwen.data == llama.data and not any(Path(table).exists() for table in qwen.data.tables)
    return plan_rows(qwen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slm-qwen2.5-7b", "slm-llama3.1-8b"])
def test_the_papers_recipes_ask_each_corpus_for_the_papers_tasks(name, nominal):
    """Section IV-A: ASR on LibriSpeech, attributes on TextrolSpeech, emotion also on MELD, dialogues on the other two.

    The numbers are counted by hand from the sizes of the corpora.
    """
    recipe = load_recipe(name)
    joint, disentangle, holistic = (StageDataset(nominal.train, stage, 0, choices={}) for stage in recipe.stages)
    stage_1 = {("textrolspeech", task): 236_220 for task in ATTRIBUTE_TASKS}
    stage_1 |= {("librispeech", "asr"): 281_241, ("meld", "emotion"): 9_989}
    assert joint.instances() == disentangle.instances() == stage_1
    assert len(joint) == 281_241 + 5 * 236_220 + 9_989 == 1_472_330
    # DailyTalk: each training turn, and a copy of each but the first of a dialogue. A dialogue's hash is its split.
    hashes = [hashlib.sha256(f"0/dailytalk/{number}".encode()).digest()[:8] for number in range(2_541)]
    kept = [number for number, digest in enumerate(hashes) if int.from_bytes(digest, "big") / 2**64 >= 0.1]
    turns = sum(10 if number < 23_773 - 9 * 2_541 else 9 for number in kept)
    # 1,838 rows of StyleTalk, all with a history. Of others 2.5 %, 0.6 % and 5 %.
    stage_3 = {("styletalk", "dialogue"): 2 * 1_838, ("dailytalk", "dialogue"): 2 * turns - len(kept)}
    stage_3 |= {("textrolspeech", task): 1_417 for task in ATTRIBUTE_TASKS}
    stage_3 |= {("librispeech", "asr"): 7_031, ("meld", "emotion"): 499}
    assert holistic.instances() == stage_3 and stage_3["dailytalk", "dialogue"] == 40_425
    dual = 3_676 + 40_425
    assert dual / len(holistic) == pytest.approx(0.75, abs=0.005)  # the portion that is our choice


@pytest.mark.slow
def test_in_the_papers_epochs_each_row_meets_each_of_its_tasks_once(nominal):
    stages = load_recipe("slm-qwen2.5-7b").stages
    sizes = Counter(row.corpus for row in nominal.train)
    for group in StageDataset(nominal.train, stages[0], 0, choices={}).exposures:
        for epoch in (0, 2):
            met, visits = zip(*(group.at(epoch, number) for number in range(group.places)), strict=True)
            assert len(set(met)) == group.places and set(visits) == {epoch}
            assert {nominal.train[index].corpus for index in met} == {group.corpus}
            assert group.places == sizes[group.corpus]
    tenth = replace(stages[0], tasks={"librispeech": {"asr": 0.1}, "meld": {"emotion": 0.1}})
    for group in StageDataset(nominal.train, tenth, 0, choices={}).exposures:
        met = Counter(group.at(epoch, number)[0] for epoch in range(10) for number in range(group.places))
        rest = len(group.order) % 10  # 281,241 and 9,989 are no multiples of ten: 28,124 and 999 an epoch
        assert len(met) >= len(group.order) - rest and set(met.values()) <= {1, 2}
        assert sum(met.values()) == 10 * round(0.1 * len(group.order))
