"""List files, class names, datasets, dataloaders and transforms."""
