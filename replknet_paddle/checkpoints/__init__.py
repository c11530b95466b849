"""Checkpoints: readers that run no code, writers, conversion, and the run folders they live in."""
