"""Settings every test shares."""

import os

from hypothesis import settings

# The same examples on every machine and run: a failure here is a failure for everybody.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60, print_blob=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
