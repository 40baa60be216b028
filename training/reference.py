"""Writes the tables of recipe keys and of command-line options into training/README.md.

    python -m dual_slm.training.reference [--check]

The code is their source: the recipe's dataclasses, and the parsers of `dual-slm`. `--check` fails when the file is old.
"""

import argparse
import dataclasses
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

from .cli import build_parser
from .files import write_text

README = Path(__file__).parent / "README.md"


def recipe_keys() -> str:
    """A table of keys, types and defaults for each section of a recipe."""
    from . import recipe

    sections = {"model": recipe.ModelRecipe, "data": recipe.DataRecipe, "warm_start": recipe.WarmStartRecipe}
    sections |= {"train": recipe.TrainRecipe, "stages": recipe.StageRecipe}
    blocks = []
    for section, kind in sections.items():
        fields = {field.name: field for field in dataclasses.fields(kind)}
        rows = [
            (f"`{name}`", _type_name(fields[name].type), _default(fields[name]), fields[name].metadata.get("help", ""))
            for name in kind.__annotations__  # leaves out the many fields TrainRecipe inherits
        ]
        about = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        blocks.append(f"**`{section}`**: {about}\n\n" + _table(("key", "type", "default", "meaning"), rows))
    return "\n\n".join(blocks)


def commands() -> str:
    """A table of arguments for each command."""
    header = ("argument", "default", "meaning")
    return "\n\n".join(
        f"**`{parser.prog}`**: {parser.description}\n\n" + _table(header, [_argument(a) for a in _arguments(parser)])
        for parser in _leaves(build_parser())
    )


def _leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers without subcommands."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield parser
    for group in groups:
        for child in group.choices.values():
            yield from _leaves(child)


def _arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def _argument(action: argparse.Action) -> tuple[str, str, str]:
    name = action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
    parts = [action.help] if action.help else []
    if action.choices and not all(str(choice) in (action.help or "") for choice in action.choices):
        parts.append("one of " + ", ".join(f"`{choice}`" for choice in action.choices))
    if action.required and action.option_strings:
        parts.append("required")
    value = " ".join(action.default) if isinstance(action.default, list) else action.default
    return f"`{name}`", "" if value is None or value is False or value == "" else f"`{value}`", "; ".join(parts)


def _type_name(kind: object) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    text = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    return re.sub(r"\b(?:\w+\.)+", "", text)


def _default(field: dataclasses.Field) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    return "" if value is None or value == "" else f"`{value}`"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def render(text: str) -> str:
    """The README with both tables written anew between their markers."""
    for marker, table in (("recipe keys", recipe_keys()), ("commands", commands())):
        pattern = re.compile(f"(<!-- {marker} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{README} has no lines <!-- {marker} --> and <!-- end --> to write between.")
        text = pattern.sub(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", text)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dual_slm.training.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the tables are out of date")
    args = parser.parse_args(argv)
    before = README.read_text(encoding="utf-8")
    after = render(before)
    if not args.check:
        write_text(README, after)
    elif after != before:
        print(f"{README} is out of date: run python -m dual_slm.training.reference.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
