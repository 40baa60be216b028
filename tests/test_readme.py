"""Runs every code block of README.md as it is written, and checks its length, links and sentences.

Python blocks run in order in one process, bash blocks in order in one shell each, all in one temporary folder. A block
behind `<!-- not run: REASON -->` is left out. The folder holds what the README says the reader brings: `question.wav` and
a folder `recordings` with the `metadata.csv` shown there. `dual-slm` is this checkout's.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dual_slm.training.files import DEMO_CLIP

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "training/README.md", "training/RESULTS.md"]
DOCUMENTS += ["model_cards/README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("model_cards/*/README.md"))]


def blocks(kind: str) -> list[str]:
    """Blocks of a language that are meant to run."""
    return [m["body"] for m in BLOCK.finditer(README) if m["kind"] == kind and not m["reason"]]


def prose(text: str) -> list[str]:
    """Sentences of a Markdown document: no front matter, code, tables, headings, comments or link targets."""
    text = re.sub(r"\A---\n.*?^---$", "", text, flags=re.M | re.S)
    text = re.sub(r"<!-- (recipe keys|commands|evaluation[^>]*) -->.*?<!-- end[^>]* -->", "", text, flags=re.S)
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", text, flags=re.M | re.S)
    text = re.sub(r"^(\||#|    ).*$", "", text, flags=re.M)
    text = re.sub(r"\]\([^)]*\)|`", "", text)
    text = re.sub(r"^ *([-*]|\d+\.) ", "\n\n", text, flags=re.M)
    ends = re.compile(r'(?<=[.!?:])[*")]*\s+(?=[A-Z0-9*"\[])')
    return [sentence for part in re.split(r"\n\s*\n", text) for sentence in ends.split(part.strip()) if sentence]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """The reader's folder, with the reader's files."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recordings").mkdir()
    (metadata,) = blocks("text")
    (folder / "recordings/metadata.csv").write_text(metadata, encoding="utf-8")
    import soundfile

    samples, rate = soundfile.read(DEMO_CLIP)
    for name in ("question.wav", "recordings/hello.wav"):
        soundfile.write(folder / name, samples, rate)
    (folder / "bin").mkdir()
    command = folder / "bin/dual-slm"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dual_slm.training.cli "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    return folder


def run(command: list[str], folder: Path) -> str:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {
        "PATH": path,
        "OMP_NUM_THREADS": "1",
    }  # threads that wait for each other crawl on a busy machine
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command[-1]}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.mark.slow
def test_python_blocks_run(desk):
    program = "\n".join(blocks("python"))
    out = run([sys.executable, "-c", program], desk)
    assert "which was the big news of the day" in out
    assert (desk / "my-adapters/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the blocks are for a POSIX shell")
def test_bash_blocks_run(desk):
    out = "".join(run(["bash", "-euc", block], desk) for block in blocks("bash"))
    # `reply` twice and `hear` of the released checkpoint, `reply` of the trial
    assert len(re.findall(r"^attributes +gender \w+ \(\d+%\), pitch ", out, re.MULTILINE)) == 4, out
    assert (desk / "runs/trial/final/model.safetensors").is_file()
    assert (desk / "report/report.html").is_file()


def test_few_blocks_are_left_out_and_each_says_why():
    found = list(BLOCK.finditer(README))
    assert {m["kind"] for m in found} <= {"bash", "python", "text", "bibtex"}
    assert sum(bool(m["reason"]) for m in found) <= 2


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (path.parent / target).exists(), f"{name} links to {target}, which does not exist."


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_sentence_is_over_40_words(name):
    for sentence in prose((ROOT / name).read_text(encoding="utf-8")):
        words = [word for word in sentence.split() if re.search(r"\w", word)]
        assert len(words) <= 40, f"{name}: {len(words)} words: {sentence}"


def test_paths_in_the_layout_exist():
    layout = README[README.index("## Layout") : README.index("## Citation")]
    for cell in re.findall(r"^\| (.*?) \|", layout, flags=re.M):
        folder = Path()
        for name in re.findall(r"`([\w./]+)`", cell):
            folder = Path(name).parent if "/" in name.rstrip("/") else folder
            assert (ROOT / name).exists() or (ROOT / folder / name).exists(), name
