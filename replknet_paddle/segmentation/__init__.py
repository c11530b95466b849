"""Semantic segmentation: UPerNet over RepLKNet, its data, its metrics and its inference.

Training and evaluation run on `replknet_paddle.engine`, with the parts that `task.py` names.
"""
