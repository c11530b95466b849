"""Figures about a network that is passed in: sizes and costs."""
