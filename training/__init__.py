"""Everything that does not travel to the Hub: backbones, corpora, training, evaluation and the command line."""

from .. import register_auto_classes

register_auto_classes()
