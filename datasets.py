"""The datasets, as PaddleViT's users import them: `from datasets import get_dataset`."""

from replknet_paddle.data.dataset import ListDataset, get_dataloader, get_dataset

__all__ = ["ListDataset", "get_dataloader", "get_dataset"]
