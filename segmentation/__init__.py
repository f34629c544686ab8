"""DifNet and its baselines on Pascal VOC and Context, built on graphdiff's walks."""
