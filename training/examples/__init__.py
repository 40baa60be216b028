"""Short scripts that show the Python API; each runs by `python -m dual_slm.training.examples.NAME`."""
