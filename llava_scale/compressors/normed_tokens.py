"""What queries look at: tokens with their norm and positions, made as a whole only where that is cheaper.

Legend: ``B`` media, ``Q`` queries, ``N`` tokens, ``D`` their width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from llava_scale.compressors.normed_attention import normed_attention, normed_means
from llava_scale.compressors.positions import sincos_position
from llava_scale.compressors.window_attention import Windows
from llava_scale.types import Grid

ABSORB_FROM = 8
"""Work of projecting all tokens over that of letting queries meet them as they are, from which the latter is done
(measured on a CPU: equal at 2, 2.5 times faster at 18)."""


def absorbs(num_tokens: int, head_width: int, windows: Windows) -> bool:
    """Whether queries should meet the tokens as they are instead of projected ones (see ``ABSORB_FROM``)."""
    seen = min(2 * max(map(len, windows)), num_tokens)
    return num_tokens * head_width > ABSORB_FROM * len(windows) * seen


@dataclass
class NormedTokens:
    """What queries look at, made when somebody asks for it.

    Attributes:
        x: ``(B, N, D)`` as they come from the tower.
        norm: Goes before everything.
        grid: Frames, rows and columns for the positions in the keys; None for keys without.
    """

    x: Tensor
    norm: nn.LayerNorm
    grid: Grid | None
    _values: Tensor | None = field(default=None, init=False)
    _keys: Tensor | None = field(default=None, init=False)

    @property
    def values(self) -> Tensor:
        """Normalised tokens."""
        if self._values is None:
            self._values = self.norm(self.x)
        return self._values

    @property
    def keys(self) -> Tensor:
        """Normalised tokens with their positions."""
        if self.grid is None:
            return self.values
        if self._keys is None:
            self._keys = self.values + sincos_position(self.grid, self.x.shape[2], like=self.values)
        return self._keys

    def attend(self, queries: Tensor, windows: Windows) -> Tensor:
        """What ``queries``, ``(B, Q, D)``, collect of the values in their windows by their products with the keys.

        Neither values nor keys are made: their norm's weights go into the queries and into what is collected.
        """
        placed, grid = (None, (1, 1, self.x.shape[1])) if self.grid is None else (queries, self.grid)
        return self._weighed(
            normed_attention(queries * self.norm.weight, placed, self.x, grid, windows, eps=self.norm.eps)
        )

    def means(self, windows: Windows) -> Tensor:
        """Mean of the values in each window, ``(B, Q, D)``, without making them."""
        return self._weighed(normed_means(self.x, windows, eps=self.norm.eps))

    def _weighed(self, normed: Tensor) -> Tensor:
        return normed * self.norm.weight + self.norm.bias
