"""The wordings of tasks, answers and captions: `assets/prompts.yaml`, a data file with a version."""

import yaml

from .files import ASSETS

PROMPTS = yaml.safe_load((ASSETS / "prompts.yaml").read_text(encoding="utf-8"))
