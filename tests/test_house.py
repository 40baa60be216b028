"""The rules of the source tree: floors, sizes, duplicates, sentences, and READMEs that name what exists.

Every test collects all offenders before it fails.
"""

import ast
import functools
import graphlib
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = (
    16_550  # of the root's and of training's modules together: 460 are portable ears, 620 decode audio, 1,380 serve
)
MAX_FILE, MAX_CLASS, MAX_FUNCTION = 600, 350, 80  # lines
MAX_WORDS = 40  # in a sentence
BLOCK = 6  # lines that may not stand in two places

# Lowest floor first; a module imports from its own floor and from lower ones. Root modules are below all of these.
FLOORS = (
    ("files", "labels", "prompts", "text", "endpoint", "hardware", "allocator", "batches"),
    ("backbones", "corpora"),
    ("attributes", "augmentation"),
    ("tasks", "parsing", "err", "stats"),
    ("features", "spelling", "collator", "alignment", "forward", "overlap"),
    ("recipe", "warm_start"),
    ("dataset", "trainer", "provenance"),
    ("build", "data", "stages", "plan"),
    ("run",),
    ("evaluation", "serving", "benchmark", "released"),
    ("commands",),
    ("cli",),
    ("reference", "examples"),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

PACKAGE = sorted([*ROOT.glob("*.py"), *(ROOT / "training").rglob("*.py")])
TESTS = sorted((ROOT / "tests").glob("*.py"))
READMES = sorted(
    path
    for pattern in ("*.md", "training/**/*.md", "tests/**/*.md", "model_cards/*/README.md")
    for path in ROOT.glob(pattern)
)


@functools.cache
def source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(source(path), str(path))


def place(path: Path, line: int | None = None) -> str:
    return str(path.relative_to(ROOT)) + ("" if line is None else f":{line}")


def refuse(offenders: list[str]) -> None:
    if offenders:
        pytest.fail(f"{len(offenders)} offenders:\n" + "\n".join(offenders), pytrace=False)


# ---- imports


def module_name(path: Path) -> str:
    parts = ["dual_slm", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE}


@functools.cache
def imports(path: Path) -> tuple[tuple[str, int], ...]:
    """Modules of this package that a file imports, anywhere but under TYPE_CHECKING, with the line."""
    return tuple(dict.fromkeys(_imports(path)))


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for_types = {
        child
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree(path)):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                found = f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base
                if found in MODULES:
                    yield found, node.lineno


def floor(module: str) -> int | None:
    """-1 for a root module; None for a module without a floor."""
    parts = module.split(".")[1:]
    if parts[:1] != ["training"]:
        return -1
    return FLOOR.get(parts[1]) if len(parts) > 1 else -1


def test_nothing_imports_upward():
    offenders = [f"{place(path)} has no floor" for name, path in MODULES.items() if floor(name) is None]
    for name, path in MODULES.items():
        own = floor(name)
        for other, line in imports(path):
            upper = floor(other)
            if own is not None and upper is not None and upper > own:
                offenders.append(f"{place(path, line)} (floor {own}) imports {other} (floor {upper})")
            elif own == -1 and other.startswith("dual_slm.training"):
                offenders.append(f"{place(path, line)} imports {other}: the root needs no training")
    refuse(offenders)


def test_no_import_circle():
    graph = {name: {other for other, _ in imports(path) if other != name} for name, path in MODULES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("circle: " + " <- ".join(error.args[1]), pytrace=False)


def test_the_lowest_floor_and_the_command_line_import_no_torch():
    """At module level; functions may."""
    names = ["files", "labels", "prompts", "text", "allocator", "cli", "reference"]
    paths = [ROOT / "training" / f"{name}.py" for name in names] + [*(ROOT / "training" / "commands").glob("*.py")]
    offenders = []
    for path in paths:
        for node in tree(path).body:
            roots = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                roots.append(node.module or "")
            heavy = {name.split(".")[0] for name in roots} & {"torch", "transformers", "datasets"}
            offenders += [f"{place(path, node.lineno)} imports {name}" for name in heavy]
    refuse(offenders)


# ---- sizes


def test_files_classes_and_functions_are_short():
    offenders = []
    for path in [*PACKAGE, *TESTS]:
        lines = len(source(path).splitlines())
        if lines > MAX_FILE:
            offenders.append(f"{place(path)} has {lines} lines, at most {MAX_FILE}")
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                limit = MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > limit:
                    offenders.append(f"{place(path, node.lineno)} {node.name} has {lines} lines, at most {limit}")
    refuse(offenders)


def test_the_package_is_small():
    lines = {place(path): len(source(path).splitlines()) for path in PACKAGE}
    if sum(lines.values()) > MAX_LINES:
        largest = sorted(lines.items(), key=lambda item: -item[1])
        refuse([f"{sum(lines.values()):,} lines, at most {MAX_LINES:,}", *(f"{n:6} {name}" for name, n in largest)])


# ---- duplicates


def is_fixture(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any("fixture" in ast.unparse(decorator) for decorator in decorators)


def code_lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines of code, without imports, comments, blank lines, lone punctuation and fixtures."""
    left_out = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Import, ast.ImportFrom)) or is_fixture(node):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))  # pyright: ignore
    lines = []
    for number, line in enumerate(source(path).splitlines(), 1):
        text = " ".join(line.split())
        if number not in left_out and not text.startswith("#") and re.search(r"\w{2}", text):
            lines.append((number, text))
    return lines


def test_no_block_stands_twice():
    places = defaultdict(list)  # BLOCK lines -> (file, index of the first line)
    lines = {path: code_lines(path) for path in [*PACKAGE, *TESTS]}
    for path, numbered in lines.items():
        for start in range(len(numbered) - BLOCK + 1):
            places[tuple(text for _, text in numbered[start : start + BLOCK])].append((path, start))
    offenders, known = [], set()
    for found in places.values():
        for (first, i), (second, j) in itertools.pairwise(found):
            if first == second and j - i < BLOCK:
                continue
            if (first, i - 1, second, j - 1) not in known:  # else the run was named at its first line
                offenders.append(f"{place(first, lines[first][i][0])} and {place(second, lines[second][j][0])}")
            known.add((first, i, second, j))
    refuse(offenders)


# ---- sentences


def sentences(block: str) -> Iterator[str]:
    """The sentences of one paragraph, with inline code and links as single words."""
    text = re.sub(r"`[^`]*`", "code", " ".join(block.split()))
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    yield from re.split(r"(?<=[.!?])[\"')*_]*\s+", text)


def too_long(block: str) -> Iterator[str]:
    for sentence in sentences(block):
        words = len(re.findall(r"\S*\w\S*", sentence))
        if words > MAX_WORDS:
            yield f"{words} words: {sentence[:90]} ..."


def markdown_blocks(text: str) -> Iterator[str]:
    """Paragraphs, list items and table cells, without code, front matter and comments."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"^ *```.*?^ *```", "\n", text, flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |\d+\. |#|\|))", text):
        if paragraph.lstrip().startswith("|"):
            yield from paragraph.split("|")
        elif not paragraph.startswith("    "):  # else it is code
            yield paragraph


def docstring_blocks(text: str) -> Iterator[str]:
    """Paragraphs, entries (`name: ...`, `- ...`) and rows of aligned columns of a docstring."""
    yield from re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |[\w.*`, ]{1,60}: |[\w ]+:\n|\S+(?: \S+)* {2,}))", text)


def flat_string(node: ast.expr) -> str:
    """A string with a word for each value that is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join("x" if isinstance(part, ast.FormattedValue) else flat_string(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return flat_string(node.left) + flat_string(node.right)
    return ""


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Texts of errors and of helps, with their lines."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from ((node.lineno, flat_string(argument)) for argument in node.exc.args)
        elif isinstance(node, ast.keyword) and node.arg == "help":
            yield node.value.lineno, flat_string(node.value)
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            yield from (
                (v.lineno, flat_string(v)) for k, v in pairs if isinstance(k, ast.Constant) and k.value == "help"
            )


def test_no_sentence_of_the_sources_is_long():
    offenders = []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in [*PACKAGE, *TESTS]:
        for node in ast.walk(tree(path)):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            line = getattr(node, "lineno", 1)
            for block in docstring_blocks(text or ""):
                offenders += [f"{place(path, line)} {fault}" for fault in too_long(block)]
        for line, message in messages(path):
            offenders += [f"{place(path, line)} {fault}" for fault in too_long(message)]
    refuse(offenders)


def test_no_sentence_of_a_readme_is_long():
    refuse(
        [
            f"{place(path)} {fault}"
            for path in READMES
            for block in markdown_blocks(source(path))
            for fault in too_long(block)
        ]
    )


# ---- READMEs


def named_files(text: str) -> Iterator[str]:
    """Relative links, and paths in code that begin with a folder of this repository."""
    yield from (link for link in re.findall(r"\]\(([^)\s#]+)", text) if "://" not in link and "mailto:" not in link)
    yield from re.findall(r"(?<![\w/.-])(?:training|tests|\.ci|\.github)/[\w./-]*\w", text)
    yield from re.findall(r"(?<![\w/.-])model_cards/[\w./-]*\w", text)
    yield from re.findall(r"(?<![\w/.-])\w+_dual_slm\.py", text)


def test_readmes_name_files_that_exist():
    offenders = []
    for path in READMES:
        text = source(path)
        for name in dict.fromkeys(named_files(text)):
            if Path(name).stem == "mine":  # the reader's own
                continue
            if not (path.parent / name).exists() and not (ROOT / name).exists():
                offenders.append(f"{place(path)} names {name}")
        for name in dict.fromkeys(re.findall(r"\bdual_slm(?:\.\w+)+", text)):
            known = [
                part for part in (name, name.rpartition(".")[0]) if part in MODULES and part != "dual_slm.training"
            ]
            if not known:
                offenders.append(f"{place(path)} names the module {name}")
    refuse(offenders)
