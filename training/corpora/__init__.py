"""Corpora as rows of one schema."""
