"""`dual-slm train`."""

import argparse

from .common import add_command


def register(subparsers) -> None:
    parser = add_command(subparsers, "train", train)
    parser.add_argument("--recipe", help="a recipe of the package, or a YAML file")
    parser.add_argument("--output", metavar="DIR", help="the run's folder")
    text = "change keys of the recipe, for example stages.0.learning_rate=1e-4"
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help=text)
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    parser.add_argument("--dry-run", action="store_true", help="print the plan: tasks by corpus, steps, memory, hours")
    parser.add_argument("--list", action="store_true", help="list the recipes")


def train(args: argparse.Namespace) -> None:
    """Run a recipe: features, warm start, stages, checkpoint."""
    from ..files import RECIPES

    if args.list:
        for path in sorted(RECIPES.glob("*.yaml")):
            print(f"{path.stem:30} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
        return
    if not args.recipe or not (args.output or args.dry_run):
        raise ValueError("--recipe NAME_OR_FILE and --output DIR are needed (--list shows the recipes there are).")
    from ..recipe import load_recipe

    recipe = load_recipe(args.recipe, args.set)
    if args.dry_run:
        from ..plan import plan

        print(plan(recipe, args.output or f"runs/{recipe.name}"))
        return
    from ..run import run

    print(run(recipe, args.output, resume=args.resume))
