"""Text and pictures to model inputs, and everything the data layer needs of the model."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from llava_scale.compressors import token_count
from llava_scale.compressors.blocks import find_blocks
from llava_scale.data.chat import ChatEncoder
from llava_scale.data.media import ImageTransform
from llava_scale.errors import ConfigError, ShapeError
from llava_scale.model.tokens import ImageTokenCounter
from llava_scale.model.visual import compressor_section
from llava_scale.towers.instruction import encode_questions, longest_question
from llava_scale.types import PLACEHOLDERS, MediaInfo

if TYPE_CHECKING:
    from llava_scale.model.configuration import LlavaScaleConfig
    from llava_scale.model.modeling import LlavaScaleForConditionalGeneration
    from llava_scale.towers import VisionTower
    from llava_scale.towers.instruction import Encoded

Picture = Union[Image.Image, str, Path, bytes, "np.ndarray[Any, Any]", Tensor]
"""A Pillow image, a local path, an encoded file, a uint8 array ``(H, W, 3)`` or a uint8 tensor ``(3, H, W)``."""

MAX_IMAGE_PIXELS = 100_000_000

QUESTIONS = "question_tokenizer"
"""Folder of the instruction tower's tokenizer in a checkpoint."""


class LlavaScaleProcessor(ProcessorMixin):
    """Turns prompts and pictures into the inputs of the model; saved and loaded with each checkpoint.

    Args:
        tokenizer: Of the language model, with the placeholders added.
        image_size: Side of the square picture in pixels.
        image_grid: Rows and columns of tower features of a picture.
        image_num_tokens: Features of a picture before compression.
        image_aspect_ratio: ``pad`` or ``resize``.
        image_mean: Per channel, of pixels in [0, 1]; its colour fills the padding.
        max_image_pixels: Larger pictures are refused before they are decoded.
        compressor: Fields of ``model.compressor``; None where all tokens stay.
        vision_num_blocks: Blocks of the vision tower, for compressors that work inside it.
        question_length: Tokens of a question that the instruction tower reads; 0 where none are read.
        chat_template_name: ``plain``, ``vicuna_v1`` or ``native``.
        native_chat_template: The language model's own template; the tokenizer's if None.
        chat_template: Written into checkpoints as transformers' chat template; made from ``chat_template_name``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int = 336,
        image_grid: Sequence[int] = (24, 24),
        image_num_tokens: int = 576,
        image_aspect_ratio: Literal["pad", "resize"] = "pad",
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        compressor: dict[str, Any] | None = None,
        vision_num_blocks: int = 0,
        question_length: int = 0,
        chat_template_name: str = "native",
        native_chat_template: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.image_size = image_size
        self.image_grid = tuple(image_grid)
        self.image_num_tokens = image_num_tokens
        self.image_aspect_ratio = image_aspect_ratio
        self.image_mean = tuple(image_mean)
        self.max_image_pixels = max_image_pixels
        self.compressor = compressor
        self.vision_num_blocks = vision_num_blocks
        self.question_length = question_length
        self.question_tokenizer: PreTrainedTokenizerBase | None = None
        self.chat_template_name = chat_template_name
        # The checkpoint's one template file holds the template of training; the tokenizer's own must survive that.
        self.native_chat_template = native_chat_template or tokenizer.chat_template
        tokenizer.chat_template = self.native_chat_template
        self.image_token = PLACEHOLDERS["image"]
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(tokenizer, chat_template=None)
        self.chat_template = chat_template or self.chat_encoder.jinja

    @classmethod
    def for_model(
        cls,
        model: LlavaScaleForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        question_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> LlavaScaleProcessor:
        """Processor with the sizes and the chat template of ``model``."""
        return cls.for_tower(model.config, model.vision_tower, tokenizer, question_tokenizer)

    @classmethod
    def for_tower(
        cls,
        config: LlavaScaleConfig,
        tower: VisionTower,
        tokenizer: PreTrainedTokenizerBase,
        question_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> LlavaScaleProcessor:
        """Processor of a model of which only the vision tower is there.

        Args:
            config: Of the model.
            tower: Its vision tower.
            tokenizer: Of the language model.
            question_tokenizer: Of the instruction tower, where there is one.
        """
        in_tower = config.compressor is not None and config.compressor["type"] == "tome"
        processor = cls(
            tokenizer,
            image_size=config.image_size,
            image_grid=tower.grid(config.image_size, config.image_size),
            image_num_tokens=tower.num_tokens,
            image_aspect_ratio=config.image_aspect_ratio,
            image_mean=config.image_mean,
            compressor=config.compressor,
            vision_num_blocks=len(find_blocks(tower)) if in_tower else 0,
            question_length=longest_question(question_tokenizer, config.instruction_config)
            if question_tokenizer
            else 0,
            chat_template_name=config.chat_template_name,
        )
        processor.question_tokenizer = question_tokenizer
        return processor

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> LlavaScaleProcessor:
        """Processor of a checkpoint, with the tokenizer of its instruction tower where there is one."""
        processor: LlavaScaleProcessor = super().from_pretrained(path, **kwargs)
        if processor.question_length:
            processor.question_tokenizer = AutoTokenizer.from_pretrained(path, **{**kwargs, "subfolder": QUESTIONS})
        return processor

    def save_pretrained(self, path: str | Path, **kwargs: Any) -> Any:
        """Write the processor, and the tokenizer of the instruction tower into a folder below."""
        if self.question_tokenizer is not None:
            self.question_tokenizer.save_pretrained(Path(path) / QUESTIONS)
        return super().save_pretrained(path, **kwargs)

    def with_template(self, chat_template_name: str) -> LlavaScaleProcessor:
        """The same processor for another chat template."""
        processor = LlavaScaleProcessor(
            self.tokenizer,
            image_size=self.image_size,
            image_grid=self.image_grid,
            image_num_tokens=self.image_num_tokens,
            image_aspect_ratio=self.image_aspect_ratio,
            image_mean=self.image_mean,
            max_image_pixels=self.max_image_pixels,
            compressor=self.compressor,
            vision_num_blocks=self.vision_num_blocks,
            question_length=self.question_length,
            chat_template_name=chat_template_name,
            native_chat_template=self.native_chat_template,
        )
        processor.question_tokenizer = self.question_tokenizer
        return processor

    @property
    def reads_questions(self) -> bool:
        """Whether the model wants to know the question that goes with a picture."""
        return self.question_length > 0

    def encode_questions(self, texts: Sequence[str]) -> Encoded:
        """Token ids and mask ``(number of texts, L)`` of questions, for the instruction tower."""
        assert self.question_tokenizer is not None, "this model reads no questions"
        return encode_questions(self.question_tokenizer, texts, self.question_length)

    def question_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Inputs of ``generate`` for the question that goes with each picture; none where none are read."""
        if not (self.reads_questions and texts):
            return {}
        ids, mask = self.encode_questions(texts)
        return {"instruction_ids": ids, "instruction_mask": mask}

    @cached_property
    def chat_encoder(self) -> ChatEncoder:
        """Conversations to token ids and loss masks, as in training."""
        return ChatEncoder(self.tokenizer, self.chat_template_name)

    @property
    def image_transform(self) -> ImageTransform:
        """Encoded pictures to uint8 squares."""
        red, green, blue = (int(255 * mean) for mean in self.image_mean)
        return ImageTransform(
            size=self.image_size,
            aspect=self.image_aspect_ratio,
            background=(red, green, blue),
            max_pixels=self.max_image_pixels,
        )

    @property
    def token_counter(self) -> ImageTokenCounter:
        """Token counts of media."""
        rows, cols = self.image_grid
        section = compressor_section(self.compressor)
        count = None if section is None else token_count(section, num_blocks=self.vision_num_blocks)
        return ImageTokenCounter(rows=rows, cols=cols, num_tokens=self.image_num_tokens, compressor=count)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs that this makes."""
        questions = ["instruction_ids", "instruction_mask"] if self.reads_questions else []
        return ["input_ids", "attention_mask", "pixel_values", *questions]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Picture | Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
        *,
        instructions: Sequence[str] | None = None,
        add_special_tokens: bool = False,
        return_tensors: str = "pt",
        padding: bool = True,
        **unsupported: Any,
    ) -> BatchFeature:
        """Inputs of ``generate`` and ``forward`` for one prompt or a batch of them.

        Args:
            text: Prompts with one ``<image>`` for each picture, rendered with the chat template.
            images: One picture, the pictures of all prompts in order of appearance, or a list for each prompt.
            instructions: Question of each prompt, for models that read them: the user's turns without placeholders.
                Without them the whole prompt is read, its special tokens left out.
            add_special_tokens: Let the tokenizer add its own; the chat templates hold all that training saw.
            return_tensors: ``pt`` is what there is.
            padding: Rows of unequal length are always padded, on the left.
            **unsupported: Other media and truncation are refused.

        Returns:
            ``input_ids`` and ``attention_mask`` ``(B, S)`` and, with pictures, ``pixel_values`` uint8
            ``(I, 3, H, W)`` and, for models that read questions, ``instruction_ids`` and ``instruction_mask``
            ``(I, L)``.

        Raises:
            ShapeError: the numbers of placeholders and pictures differ.
            ConfigError: an argument that this model has no use for.
        """
        refused = sorted(name for name, value in unsupported.items() if value not in (None, False, "left"))
        if refused or return_tensors != "pt" or not padding:
            raise ConfigError(f"the processor does not take {', '.join(refused) or 'this return_tensors or padding'}")
        if text is None:
            raise ConfigError("the processor needs text; for pictures alone give '<image>'")
        prompts = [text] if isinstance(text, str) else list(text)
        pictures = _flatten(images)
        encoded = self.tokenizer(prompts, add_special_tokens=add_special_tokens)["input_ids"]
        found = sum(ids.count(self.image_token_id) for ids in encoded)
        if found != len(pictures):
            raise ShapeError(
                f"the prompts hold {found} {self.image_token} placeholders, but {len(pictures)} pictures were given"
            )
        features: dict[str, Tensor] = self._pad([self._expand(ids) for ids in encoded])
        if pictures:
            features["pixel_values"] = torch.stack([self._picture(picture) for picture in pictures])
            features |= self.question_inputs(self._questions_of(encoded, instructions))
        return BatchFeature(features)

    def _questions_of(self, encoded: Sequence[list[int]], instructions: Sequence[str] | None) -> list[str]:
        """The question of each picture's prompt."""
        if not self.reads_questions:
            return []
        if instructions is None:
            instructions = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in encoded]
        if len(instructions) != len(encoded):
            raise ShapeError(f"{len(encoded)} prompts need as many instructions, got {len(instructions)}")
        return [
            question
            for question, ids in zip(instructions, encoded, strict=True)
            for _ in range(ids.count(self.image_token_id))
        ]

    def _expand(self, ids: Iterable[int]) -> list[int]:
        """Repeat each picture's placeholder to its number of tokens."""
        repeats = self.token_counter.count(MediaInfo(kind="image"), step=None).num_tokens
        return list(
            chain.from_iterable([token] * repeats if token == self.image_token_id else [token] for token in ids)
        )

    def _pad(self, rows: list[list[int]]) -> dict[str, Tensor]:
        longest = max(map(len, rows))
        input_ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for number, ids in enumerate(rows):
            input_ids[number, longest - len(ids) :] = torch.tensor(ids, dtype=torch.long)
            attention_mask[number, longest - len(ids) :] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _picture(self, picture: Picture) -> Tensor:
        """One picture as the uint8 square that training would have seen."""
        if isinstance(picture, str | Path):
            picture = Path(picture).read_bytes()
        if isinstance(picture, Image.Image):
            picture = _lossless(picture)
        if isinstance(picture, bytes):
            return self.image_transform(picture)
        if isinstance(picture, np.ndarray):
            picture = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            raise ShapeError(
                f"a picture must be uint8 RGB, (3, H, W) as a tensor or (H, W, 3) as an array, "
                f"got {picture.dtype} {tuple(picture.shape)}"
            )
        return self.image_transform.from_tensor(picture)


def _flatten(images: Any) -> list[Picture]:
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [picture for item in images for picture in _flatten(item)]


def _lossless(picture: Image.Image) -> bytes:
    """The picture as an encoded file, so that every kind of it is decoded by the same rules as in training."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
        upright = upright.convert("RGB")
    buffer = io.BytesIO()
    upright.save(buffer, format="PNG", compress_level=0)
    return buffer.getvalue()
