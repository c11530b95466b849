"""Figures about a network that is passed in, and pictures of them."""
