"""Semantic segmentation: UPerNet over RepLKNet, its data, its metrics and its inference.

Training and evaluation run on `replknet_paddle.engine`; `task.py` says with which parts.
"""
