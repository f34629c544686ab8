"""Settings every test shares."""

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Kernels for a GPU are interpreted, which has to be said before graphdiff, and so Triton, is imported.
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples on every machine and run: a failure here is a failure for everybody.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60, print_blob=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error::graphdiff.ConvergenceWarning")
