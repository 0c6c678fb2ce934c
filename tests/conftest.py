"""Settings that hold for every test."""

from __future__ import annotations

import os

# Two test processes share the machine: more threads than cores would make them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
