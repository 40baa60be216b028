"""What a run would do, without doing it."""

import re

from world import world

from dual_slm.training.plan import plan
from dual_slm.training.recipe import load_recipe


def test_the_plan_of_the_released_recipe_knows_letters(tiny_backbones, tmp_path):
    told = plan(load_recipe(str(world(tmp_path, tiny_backbones))), tmp_path / "run")
    assert "stage 0   8 CTC steps, 8 caption steps" in told
    assert "data      18 training clips with augmented copies, 0.01 h of audio in all splits" in told
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
    assert "data      0.5 h to synthesise" in told and "training clips" not in told
    assert "stage 1   joint: 190 steps of 4" in told  # 900 clips an hour, of which 85 % are for training
