"""training/PAPER.md: what it names exists, and the values that it states are those of the recipes and adapters."""

import ast
import functools
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from dual_slm import DualSLMConfig
from dual_slm.adapters_dual_slm import ParalinguisticAdapter, QueryAdapter
from dual_slm.configuration_dual_slm import FIELDS
from dual_slm.training.build import adapter_defaults
from dual_slm.training.recipe import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
LEDGER = (ROOT / "training/PAPER.md").read_text(encoding="utf-8")
STATUS = re.compile(r"\*(paper|ours|unspecified: our choice because .+|not as the paper yet: .+)\*")
REFERENCE = re.compile(r"`([\w./-]+\.(?:py|yaml)): ([\w.]+)`")


def tables() -> list[list[list[str]]]:
    """The rows of each table, the header first, without the line under it."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", LEDGER, flags=re.M):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found.append([rows[0], *rows[2:]])
    return found


CLAIMS = [row for header, *rows in tables() if header == ["claim", "code", "status"] for row in rows]
VALUES = [
    (recipe, row[0].strip("`"), row[1 + place])
    for header, *rows in tables()
    if header[0] == "key"
    for row in rows
    for place, recipe in enumerate(header[1:])
]


def number_or_text(cell: str) -> Any:
    """A cell as YAML reads it; YAML 1.1 takes 5e-5 for text."""
    value = yaml.safe_load(cell)
    return float(value) if isinstance(value, str) and re.fullmatch(r"\d+e-?\d+", value) else value


@functools.cache
def recipe_of(name: str) -> Recipe:
    return load_recipe(name)


def value_of(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key of a recipe, or of `config.` and a field of the model's configuration."""
    section, *way = key.split(".")
    if section == "config":
        defaults = {name: declared.default for name, declared in FIELDS.items()}
        defaults["initializer_range"] = DualSLMConfig.initializer_range
        value: Any = defaults | adapter_defaults(recipe.model) | recipe.model.config
    elif section == "train":
        value = vars(recipe.train)
    else:
        value = asdict(recipe.stages[int(way.pop(0))] if section == "stages" else getattr(recipe, section))
    for name in way:
        value = value[name]
    return value


@functools.cache
def names_in(path: Path) -> set[str]:
    """Functions, classes and variables of a module, methods as `Class.method`; keys of a YAML file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return set(yaml.safe_load(text))
    return _names(ast.parse(text).body)


def _names(body: list[ast.stmt], prefix: str = "") -> set[str]:
    names = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            names |= _names(node.body, f"{prefix}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_each_claim_names_code_that_exists_and_has_a_status():
    faults = []
    for claim, code, status in CLAIMS:
        references = REFERENCE.findall(code)
        if not references or REFERENCE.sub("", code).strip(", "):
            faults.append(f"{claim} The code is no list of `file: name`.")
        for file, name in references:
            if not (ROOT / file).is_file() or name not in names_in(ROOT / file):
                faults.append(f"{claim} {file} has no {name}.")
        if not STATUS.fullmatch(status):
            faults.append(f"{claim} The status is {status!r}.")
    assert not faults, "\n".join(faults)
    assert len(CLAIMS) > 80


def test_each_part_of_both_papers_has_claims():
    headings = re.findall(r"^## (.*)$", LEDGER, flags=re.M)
    for part in ("III-A", "III-B", "III-C", "IV-A", "IV-B", "IV-C", "EmoSLLM"):
        assert any(part in heading for heading in headings), part


@pytest.mark.parametrize(("recipe", "key", "cell"), [value for value in VALUES if value[0] != "paper"])
def test_a_stated_value_is_the_recipes(recipe, key, cell):
    assert value_of(recipe_of(recipe), key) == number_or_text(cell)


@pytest.mark.parametrize(("key", "cell"), [value[1:] for value in VALUES if value[0] == "paper" and value[2] != "-"])
def test_both_recipes_of_the_paper_have_its_value(key, cell):
    for recipe in ("slm-qwen2.5-7b", "slm-llama3.1-8b"):
        assert value_of(recipe_of(recipe), key) == number_or_text(cell)


def test_both_recipes_of_the_paper_differ_in_the_llm_alone():
    qwen, llama = (asdict(recipe_of(name)) for name in ("slm-qwen2.5-7b", "slm-llama3.1-8b"))
    for values in (qwen, llama):
        del values["name"], values["model"]["text_model_id"]
    assert qwen == llama


@pytest.mark.parametrize(("place", "adapter"), [(1, ParalinguisticAdapter), (2, QueryAdapter)])
def test_the_transformer_layers_are_as_stated(place, adapter):
    (rows,) = (rows for header, *rows in tables() if header[0] == "layer")
    stated = {row[0]: number_or_text(row[place]) for row in rows}
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2}
    config = DualSLMConfig(
        audio_config={"model_type": "whisper"} | sizes,
        text_config={"model_type": "llama", "hidden_size": 32},
        paralinguistic_hidden_size=16 if adapter is QueryAdapter else None,
    )
    module = adapter(config)
    (layer,) = module.layers
    found = {
        "norm before each part": layer.norm_first,
        "activation": layer.activation.__name__,
        "feed-forward width over width": layer.linear1.out_features // layer.linear1.in_features,
        "position embeddings": any("position" in name for name in module.state_dict()),
    }
    assert found == stated
