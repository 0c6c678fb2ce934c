"""Media embeddings into the positions of their placeholders; a count that does not fit is refused.

Legend: ``B`` rows, ``S`` tokens, ``N`` media tokens, ``D`` width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_scale.errors import ShapeError


def splice(embeds_BSD: Tensor, input_ids_BS: Tensor, placeholder_id: int, media_ND: Tensor, *, kind: str) -> Tensor:
    """Return ``embeds_BSD`` with row i of ``media_ND`` at the i-th position that holds ``placeholder_id``.

    Positions count row by row, left to right. On an accelerator the counts are compared there, without waiting for
    it; a mismatch then fails as a device assertion.

    Raises:
        ShapeError: the numbers of placeholders and media tokens differ.
    """
    is_media = input_ids_BS == placeholder_id
    check_count(is_media.sum(), media_ND.shape[0], kind=kind)
    return embeds_BSD.masked_scatter(is_media.unsqueeze(-1), media_ND.to(embeds_BSD.dtype))


def check_count(num_placeholders: Tensor | int, num_tokens: int, *, kind: str) -> None:
    """Refuse a row whose placeholders do not match the tokens that its media make.

    Raises:
        ShapeError: the numbers differ.
    """
    if isinstance(num_placeholders, Tensor) and num_placeholders.device.type != "cpu":
        torch._assert_async(num_placeholders == num_tokens)
        return
    found = int(num_placeholders)
    if found != num_tokens:
        raise ShapeError(
            f"the text holds {found} <{kind}> positions, but its {kind}s make {num_tokens} tokens; "
            f"every {kind} needs one <{kind}> placeholder, expanded by the processor to its number of tokens"
        )
