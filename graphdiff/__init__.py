"""Diffusion on graphs for PyTorch: exact solves with certified errors, and learned cascades of walks."""
