"""Optimizer, its parameter groups, the learning-rate schedule and the average of the weights."""
