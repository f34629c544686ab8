"""Figures of what a model does: `python -m segmentation.figures --help`."""
