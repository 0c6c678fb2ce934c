"""What a model does with the tokens of one picture or clip, as plain arrays to draw from.

Legend: ``T`` frames, ``N`` tokens, ``M`` tokens that are left, ``H`` heads, ``Q`` queries, ``S`` side in pixels.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from llava_scale.compressors import Instruction, QueryCompressor, recorded_attention
from llava_scale.config import load_config
from llava_scale.config.compressor import RatioConfig
from llava_scale.data.sampling import FrameSampling
from llava_scale.data.video import VideoTransform
from llava_scale.errors import ConfigError
from llava_scale.model import build_model, load_model
from llava_scale.model.presets import tiny_text_config, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from llava_scale.model import LlavaScaleForConditionalGeneration, LlavaScaleProcessor
    from llava_scale.types import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeMap:
    """Which tokens became which.

    Attributes:
        title: Of the figure's part.
        grid: Frames, rows and columns of the tower's tokens.
        group: ``(N,)`` output that each token went into, -1 for none.
        anchors: ``(M,)`` place of each output.
    """

    title: str
    grid: Grid
    group: NDArray[np.int64]
    anchors: NDArray[np.int64]

    @property
    def kept_per_frame(self) -> NDArray[np.int64]:
        """Outputs whose anchor lies in each frame, ``(T,)``."""
        return np.bincount(self.anchors // (self.grid[1] * self.grid[2]), minlength=self.grid[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMap:
    """What the queries of one set look at, in one layer, for one question.

    Attributes:
        question: As asked; empty for none.
        layer: Number of the layer, from 0.
        frame: Frame that the tokens are of.
        weights: ``(H, Q, rows, columns)``, of the share that falls on this frame.
    """

    question: str
    layer: int
    frame: int
    weights: NDArray[np.float32]


class Looker:
    """A model, and what can be seen of its compressor.

    Args:
        model: In evaluation mode.
        processor: Its processor.
    """

    def __init__(self, model: LlavaScaleForConditionalGeneration, processor: LlavaScaleProcessor) -> None:
        self.model, self.processor = model.eval(), processor
        section = model.config.compressor
        if section is None:
            raise ConfigError(
                "this model compresses no tokens, so there is nothing to show; give a recipe instead, with "
                "model.compressor='{type: token_merging}'"
            )
        self.kind = str(section["type"])

    def picture(self, path: Path) -> Tensor:
        """``(1, 3, S, S)`` uint8, as the model gets it.

        Raises:
            ConfigError: no such file.
            SampleError: it cannot be decoded.
        """
        return self.processor.image_transform(_read(path))[None]

    def clip(self, path: Path, num_frames: int) -> Tensor:
        """``(T, 3, S, S)`` uint8: middles of ``num_frames`` equal parts of a video.

        Raises:
            ConfigError: no such file.
            SampleError: it cannot be decoded.
        """
        sampling = FrameSampling(scheme="uniform", num_frames=num_frames)
        return VideoTransform(image=self.processor.image_transform, sampling=sampling)(_read(path)).data

    @torch.no_grad()
    def merges(self, frames: Tensor, ratios: Sequence[float] = ()) -> list[MergeMap]:
        """Merge map at each of ``ratios``, or as the model is set up if there are none.

        Raises:
            ConfigError: the compressor has no ratio, or its tokens have no members.
        """
        section = self.model._section
        assert section is not None
        if ratios and not isinstance(section, RatioConfig):
            raise ConfigError(f"model.compressor of type {self.kind} has no ratio; leave --ratio out")
        if not ratios:  # as it is: a compressor that is put in anew would have lost its weights
            return [self._merge_map(frames, section)]
        maps = []
        try:
            for ratio in ratios:
                chosen = _with_ratio(section, ratio)
                self.model.set_compressor(chosen)
                maps.append(self._merge_map(frames, chosen))
        finally:
            self.model.set_compressor(section)
        return maps

    def _merge_map(self, frames: Tensor, section: Any) -> MergeMap:
        out = self.model.visual_tokens(frames, len(frames))
        if out.group is None:
            raise ConfigError(
                f"tokens of model.compressor of type {self.kind} are no groups of patches; use show attention for "
                "qformer, or a compressor that merges, prunes or pools"
            )
        grid = self._grid(frames)
        before, after = out.group.shape[1], out.tokens.shape[1]
        ratio = f", ratio {section.ratio:g}" if isinstance(section, RatioConfig) else ""
        title = f"{self.kind}{ratio}: {before:,} to {after:,} tokens"
        return MergeMap(title=title, grid=grid, group=out.group[0].numpy(), anchors=out.positions[0].numpy())

    def windows(self, num_frames: int = 1) -> tuple[list[range], Grid]:
        """Tokens that each query of one set sees, and the grid of what a set looks at.

        Raises:
            ConfigError: the compressor has no queries.
        """
        compressor = self._queries()
        grid = (num_frames if compressor.count.scope == "clip" else 1, *self.processor.image_grid)
        return list(compressor.windows(grid[0] * grid[1] * grid[2])), grid  # type: ignore[return-value]

    @torch.no_grad()
    def attention(self, frames: Tensor, question: str, *, layer: int = -1, frame: int = 0) -> AttentionMap:
        """What the queries look at.

        Args:
            frames: Picture or clip.
            question: The instruction; empty for none.
            layer: Layer; negative ones count from the last.
            frame: Frame that is looked at.

        Raises:
            ConfigError: the compressor has no queries, or there is no such layer or frame.
        """
        compressor, (num_frames, rows, cols) = self._queries(), self._grid(frames)
        asked = None
        if question and self.processor.reads_questions:
            encoded = self.processor.encode_questions([question])
            asked = self.model._read(encoded)
        with recorded_attention(compressor) as seen:
            self.model.visual_tokens(frames, num_frames, instruction=asked and Instruction(*asked))
        if not -len(seen) <= layer < len(seen) or not 0 <= frame < num_frames:
            raise ConfigError(f"there are {len(seen)} layers and {num_frames} frames, got layer {layer}, frame {frame}")
        weights = seen[layer]
        num_heads, num_queries, _ = weights.shape[1:]
        over_clip = compressor.count.scope == "clip"
        cells = weights[0 if over_clip else frame].reshape(num_heads, num_queries, -1, rows, cols)
        return AttentionMap(
            question=question,
            layer=layer % len(seen),
            frame=frame,
            weights=cells[:, :, frame if over_clip else 0].numpy(),
        )

    def _queries(self) -> QueryCompressor:
        if not isinstance(self.model.compressor, QueryCompressor):
            raise ConfigError(f"model.compressor of type {self.kind} has no queries; this figure is of type qformer")
        return self.model.compressor

    def _grid(self, frames: Tensor) -> Grid:
        rows, cols = self.processor.image_grid
        return len(frames), rows, cols


def open_source(source: str | Path, overrides: Sequence[str] = ()) -> Looker:
    """A checkpoint, or what a recipe would start from: its tower and compressor, trained as far as they are named.

    Args:
        source: Folder of a checkpoint, or recipe (YAML).
        overrides: ``key=value`` settings of a recipe. Those of a checkpoint are for its compressor.

    Raises:
        ConfigError: neither of both, or settings that do not fit.
        CheckpointError: the checkpoint cannot be loaded.
    """
    path = Path(source)
    if path.is_dir():
        if not overrides:
            return Looker(*load_model(path))
        config = load_config(None, [f"model.init_from={path}", *overrides])
        template = load_model(path)[1].chat_template_name
        return Looker(*build_model(config.model, chat_template=template, seed=0))
    config = load_config(path, overrides)
    model = config.model
    if model.preset or model.init_from:
        return Looker(*build_model(model, chat_template=config.data.chat_template, seed=config.seed))
    with tempfile.TemporaryDirectory() as folder:  # pictures do not need the language model: a small one will do
        tokenizer = tiny_tokenizer()
        AutoModelForCausalLM.from_config(tiny_text_config(len(tokenizer))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        small = replace(model, language_model=folder)
        return Looker(*build_model(small, chat_template="native", seed=config.seed))


def _with_ratio(section: Any, ratio: float) -> Any:
    if not 0.0 <= ratio < 1.0:
        raise ConfigError(f"a ratio is the share that is removed, at least 0 and less than 1, got {ratio:g}")
    return type(section)(**{item.name: getattr(section, item.name) for item in fields(section)} | {"ratio": ratio})


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
