"""``python -m llava_scale`` is ``llava-scale``."""

from __future__ import annotations

from llava_scale.cli import main

if __name__ == "__main__":
    main()
