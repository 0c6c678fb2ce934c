"""Puts the examples' folders on the import path, as running their scripts does."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
for folder in (EXAMPLES, EXAMPLES / "tuxpaint"):
    sys.path.insert(0, str(folder))
