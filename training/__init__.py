"""What stays on this machine: backbones, corpora, training, evaluation and the command line."""
