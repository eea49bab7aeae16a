"""One thread for each of the processes that run the tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing here may reach for the network: what is missing has to be said at once.
os.environ["HF_HUB_OFFLINE"] = "1"
