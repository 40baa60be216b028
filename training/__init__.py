"""Everything that does not travel to the Hub: backbones, corpora, training, evaluation and the command line."""
