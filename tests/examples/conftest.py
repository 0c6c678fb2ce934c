"""Puts the Tux Paint example's folder on the import path, as running its script does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "tuxpaint"))
