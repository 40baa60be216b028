"""What an installation holds: modules, assets and few dependencies. Asks setuptools itself, without a network."""

import ast
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import setuptools
from setuptools.command.build_py import build_py

import dual_slm

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def options() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def packed() -> set[str]:
    """Files of a wheel, relative to the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        distribution = setuptools.Distribution({"script_name": "setup.py"})
        distribution.parse_config_files(["setup.cfg"])
        command = build_py(distribution)
        command.finalize_options()
        modules = [Path(file) for _, _, file in command.find_all_modules()]
        data = [Path(folder, name) for _, folder, _, names in command.data_files for name in names]
    return {path.as_posix() for path in [*modules, *data]}


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_a_wheel_holds_every_module_and_no_test(packed):
    modules = [*ROOT.glob("*.py"), *(ROOT / "training").rglob("*.py")]
    expected = {path.relative_to(ROOT).as_posix() for path in modules}
    assert {name for name in packed if name.endswith(".py")} == expected


def test_a_wheel_holds_the_assets_and_the_recipes(packed):
    folders = [ROOT / "training" / name for name in ("assets", "recipes")]
    expected = {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.iterdir()}
    assert expected == {name for name in packed if not name.endswith(".py")}
    assert any(name.endswith(".jinja") for name in packed)


def test_few_packages_are_needed_to_run(options):
    assert len(lines(options["options"]["install_requires"])) <= 6
    assert set(options["options.extras_require"]) == {"train", "eval", "serve", "4bit", "dev"}


def test_every_package_that_is_imported_is_declared(options):
    """Also those that are imported inside functions."""
    required = lines(options["options"]["install_requires"])
    for extra in options["options.extras_require"].values():
        required += lines(extra)
    declared = {re.split(r"[\[<>=!]", name)[0].replace("-", "_").lower() for name in required}
    other_names = {"scikit_learn": "sklearn", "piper_tts": "piper", "hibari_tts": "hibari", "pyyaml": "yaml"}
    declared |= {other_names.get(name, name) for name in declared}
    # What torch, transformers and piper bring along.
    declared |= {"numpy", "huggingface_hub", "safetensors", "tokenizers", "tqdm", "yaml", "scipy", "onnxruntime"}
    missing = {}
    for path in [*ROOT.glob("*.py"), *(ROOT / "training").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(str(node.module))
            for name in {name.split(".")[0] for name in names} - declared - sys.stdlib_module_names - {"dual_slm"}:
                missing.setdefault(name, path.relative_to(ROOT).as_posix())
    assert not missing


def test_version_and_citation_agree():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {dual_slm.__version__}\n" in citation


def test_the_checks_of_the_house_are_configured():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert tools["ruff"]["line-length"] == 119
    assert tools["pyright"]["typeCheckingMode"] == "basic"
    assert "training" in tools["pyright"]["include"]
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("make test")
