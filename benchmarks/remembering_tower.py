"""The frozen tower of the Tux Paint example, which computes the features of each picture once for all runs.

Training without a tower pass is what ``precompute`` gives a single run; a study has many over the same pictures.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from efficientnet_tower import EfficientNetLite0
from torch import Tensor

DIGEST = 16


class RememberingTower(EfficientNetLite0):
    """``EfficientNetLite0`` with its results on disk, by a digest of the pixels; in float16, whoever computes them.

    Args:
        weights: As for the tower.
        memory: Folder of what is remembered; one process at a time may write.
        image_size: Side of the square pictures in pixels, a multiple of 32.
    """

    def __init__(self, *, weights: str = "", memory: str, image_size: int = 224) -> None:
        super().__init__(weights=weights, image_size=image_size)
        folder = Path(memory)
        folder.mkdir(parents=True, exist_ok=True)
        self._keys, self._features = folder / f"{image_size}.keys", folder / f"{image_size}.float16"
        self._size = (image_size // 32) ** 2 * self.hidden_size
        self._places: dict[bytes, int] = {}

    @torch.no_grad()
    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return ``(B, N, D)``."""
        pixels = x_BCHW.float().contiguous().cpu().numpy()
        digests = [hashlib.blake2b(picture, digest_size=DIGEST).digest() for picture in pixels]
        if not self._places:
            self._read_keys()
        new = {digest: place for place, digest in enumerate(digests) if digest not in self._places}
        if new:
            self._append(list(new), super().forward(x_BCHW[list(new.values())]))
        stored = np.memmap(self._features, dtype=np.float16, mode="r").reshape(-1, self._size)
        found = torch.from_numpy(stored[[self._places[digest] for digest in digests]])
        return found.view(len(digests), -1, self.hidden_size).to(x_BCHW)

    def _append(self, digests: list[bytes], features: Tensor) -> None:
        """Features first, so that a key never stands for what is not there."""
        with self._features.open("ab") as file:
            file.write(features.to(torch.float16).cpu().numpy().tobytes())
        with self._keys.open("ab") as file:
            file.write(b"".join(digests))
        for digest in digests:
            self._places[digest] = len(self._places)

    def _read_keys(self) -> None:
        """Read what earlier runs left; what one of them wrote without finishing is cut off."""
        known = self._keys.read_bytes() if self._keys.exists() else b""
        count = min(len(known) // DIGEST, self._features.stat().st_size // (2 * self._size)) if known else 0
        for path, size in ((self._keys, DIGEST), (self._features, 2 * self._size)):
            path.touch()
            with path.open("r+b") as file:
                file.truncate(count * size)
        self._places = {known[place * DIGEST : (place + 1) * DIGEST]: place for place in range(count)}
