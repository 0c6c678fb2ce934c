"""Text and media to model inputs, and everything the data layer needs of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from llava_scale.compressors import token_count
from llava_scale.compressors.blocks import find_blocks
from llava_scale.data.audio import AudioTransform
from llava_scale.data.chat import ChatEncoder
from llava_scale.data.containers import MediaLimits, PartialPolicy
from llava_scale.data.expansion import expanded, media_blocks
from llava_scale.data.media import ImageTransform
from llava_scale.data.sampling import FrameSampling
from llava_scale.data.video import VideoTransform
from llava_scale.errors import ConfigError, ShapeError
from llava_scale.model.audible import audio_section, audio_token_count
from llava_scale.model.media_inputs import Picture, Sound, SoundTransform, Video, flatten, read_media
from llava_scale.model.tokens import MediaCounter, TimeStamps, check_sound_order, frames_per_slot
from llava_scale.model.visual import compressor_section
from llava_scale.towers.audio_description import build_audio_frontend
from llava_scale.towers.instruction import encode_questions, longest_question
from llava_scale.types import PLACEHOLDERS, MediaKind, MediaTokens

if TYPE_CHECKING:
    from llava_scale.config import DataConfig
    from llava_scale.model.configuration import LlavaScaleConfig
    from llava_scale.model.modeling import LlavaScaleForConditionalGeneration
    from llava_scale.towers import VisionTower
    from llava_scale.towers.audio_base import AudioFrontend
    from llava_scale.towers.instruction import Encoded

MAX_IMAGE_PIXELS = 100_000_000

QUESTIONS = "question_tokenizer"
"""Folder of the instruction tower's tokenizer in a checkpoint."""

_OF_TEMPLATE = ("tokenizer", "chat_template_name", "chat_template")


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
        video: Fields of ``model.video``: how frames of videos are chosen.
        audio: Hearing part of the model's config; None for a model that does not hear.
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
        video: dict[str, Any] | None = None,
        audio: dict[str, Any] | None = None,
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
        self.video = dict(video or {})
        self.audio = audio
        self.vision_num_blocks = vision_num_blocks
        self.question_length = question_length
        self.question_tokenizer: PreTrainedTokenizerBase | None = None
        self.partial: PartialPolicy = "forbid"
        self.media_limits = MediaLimits()
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
            video=config.video,
            audio=config.audio,
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
        own = (name for name in signature(LlavaScaleProcessor).parameters if name not in _OF_TEMPLATE)
        kept = {name: getattr(self, name) for name in own}
        processor = LlavaScaleProcessor(self.tokenizer, **kept, chat_template_name=chat_template_name)
        processor.question_tokenizer = self.question_tokenizer
        processor.partial, processor.media_limits = self.partial, self.media_limits
        return processor

    def set_limits(self, data: DataConfig) -> None:
        """Take from a run's settings which media are too large or too damaged; checkpoints do not keep that."""
        self.max_image_pixels, self.partial = data.max_image_pixels, data.partial
        self.media_limits = replace(self.media_limits, max_seconds=data.max_media_seconds)

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
    def video_transform(self) -> VideoTransform:
        """Encoded videos to uint8 squares."""
        names = (field.name for field in fields(FrameSampling))
        chosen = {name: self.video[name] for name in names if name in self.video}
        sampling, limits = FrameSampling(**chosen), self.media_limits
        return VideoTransform(image=self.image_transform, sampling=sampling, partial=self.partial, limits=limits)

    @cached_property
    def time_stamps(self) -> TimeStamps | None:
        """Times as token ids, for models that read them between frames."""
        return TimeStamps.of(self.chat_encoder.inner_ids) if self.video.get("timestamps") else None

    @cached_property
    def audio_frontend(self) -> AudioFrontend | None:
        """What makes features of sounds; None for a model that does not hear."""
        return None if self.audio is None else build_audio_frontend(self.audio["tower"])

    @property
    def media_transforms(self) -> dict[MediaKind, Any]:
        """Per kind that the model takes the way from an encoded file to its input, for the loader."""
        transforms: dict[MediaKind, Any] = {"image": self.image_transform, "video": self.video_transform}
        frontend = self.audio_frontend
        if frontend is not None:
            sound = AudioTransform(sample_rate=frontend.sample_rate, partial=self.partial, limits=self.media_limits)
            transforms["audio"] = SoundTransform(sound, frontend)
        return transforms

    @property
    def token_counter(self) -> MediaCounter:
        """Token counts of media."""
        rows, cols = self.image_grid
        section = compressor_section(self.compressor)
        interleave = self.video.get("sound_order") == "interleave"
        if interleave:
            check_sound_order(audio_section(self.audio))
        return MediaCounter(
            rows=rows,
            cols=cols,
            num_tokens=self.image_num_tokens,
            compressor=None if section is None else token_count(section, num_blocks=self.vision_num_blocks),
            sampling=self.video_transform.sampling,
            frontend=self.audio_frontend,
            audio_compressor=audio_token_count(self.audio),
            stamps=self.time_stamps,
            interleave=interleave,
            slot=frames_per_slot(section) if self.time_stamps or interleave else 1,
        )

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs that this makes."""
        questions = ["instruction_ids", "instruction_mask"] if self.reads_questions else []
        sounds = [] if self.audio is None else ["audio_values", "audio_lengths", "audio_grids"]
        pixels = ["pixel_values", "pixel_values_videos", "video_grids"]
        return ["input_ids", "attention_mask", *pixels, *sounds, *questions]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Picture | Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
        videos: Video | Sequence[Video] | Sequence[Sequence[Video]] | None = None,
        audio: Sound | Sequence[Sound] | Sequence[Sequence[Sound]] | None = None,
        *,
        instructions: Sequence[str] | None = None,
        sampling_rate: int = 0,
        add_special_tokens: bool = False,
        return_tensors: str = "pt",
        padding: bool = True,
        **unsupported: Any,
    ) -> BatchFeature:
        """Inputs of ``generate`` and ``forward`` for one prompt or a batch of them.

        Args:
            text: Prompts with one placeholder for each medium, rendered with the chat template.
            images: One picture, the pictures of all prompts in order of appearance, or a list for each prompt.
            videos: The same of videos.
            audio: The same of sounds.
            instructions: Question of each prompt, for models that read them: the user's turns without placeholders.
                Without them the whole prompt is read, its special tokens left out.
            sampling_rate: Of sounds given as samples; 0 for that of the audio tower. Files know theirs.
            add_special_tokens: Let the tokenizer add its own; the chat templates hold all that training saw.
            return_tensors: ``pt`` is what there is.
            padding: Rows of unequal length are always padded, on the left.
            **unsupported: Truncation and what else other processors take is refused.

        Returns:
            ``input_ids`` and ``attention_mask`` ``(B, S)``; with pictures ``pixel_values`` uint8 ``(I, 3, H, W)``; with
            videos ``pixel_values_videos`` uint8 ``(F, 3, H, W)`` and ``video_grids`` ``(V, 3)``; with sounds
            ``audio_values``, ``audio_lengths`` and ``audio_grids``; and, for models that read questions,
            ``instruction_ids`` and ``instruction_mask`` ``(I + V, L)``.

        Raises:
            ShapeError: the numbers of placeholders and media differ.
            ConfigError: an argument that this model has no use for.
            SampleError: a medium that cannot be decoded, or that the model does not take.
        """
        refused = sorted(name for name, value in unsupported.items() if value not in (None, False, "left"))
        if refused or return_tensors != "pt" or not padding:
            raise ConfigError(f"the processor does not take {', '.join(refused) or 'this return_tensors or padding'}")
        if text is None:
            raise ConfigError("the processor needs text; for pictures alone give '<image>'")
        prompts = [text] if isinstance(text, str) else list(text)
        encoded = self.tokenizer(prompts, add_special_tokens=add_special_tokens)["input_ids"]
        given: dict[MediaKind, list[Any]] = {
            "image": flatten(images),
            "video": flatten(videos),
            "audio": flatten(audio),
        }
        for kind, items in given.items():
            self._check_number(kind, encoded, len(items))
        media = read_media(self, given, sampling_rate=sampling_rate)
        features: dict[str, Tensor] = self._pad([self._expand(ids, media.tokens) for ids in encoded])
        features |= media.tensors
        features |= self.question_inputs(self._questions_of(encoded, instructions))
        return BatchFeature(features)

    def _check_number(self, kind: MediaKind, encoded: Sequence[list[int]], number: int) -> None:
        token_id = self.chat_encoder.placeholder_ids[kind]
        found = sum(ids.count(token_id) for ids in encoded)
        if found != number:
            name = "pictures" if kind == "image" else f"media of kind {kind}"
            raise ShapeError(
                f"the prompts hold {found} {PLACEHOLDERS[kind]} placeholders, but {number} {name} were given"
            )

    def _multimodal_inputs_from_conversations(
        self, conversations: Sequence[Any], audio_loading_params: dict[str, Any], load_audio_from_video: bool = False
    ) -> tuple[list[Any], list[Any], list[Any], dict[str, Any]]:
        """Media of conversations as they are given, for ``apply_chat_template``; files are read by our own decoders."""
        if load_audio_from_video:
            raise ConfigError("load_audio_from_video is not taken; add the video as an audio entry of its own")
        batch: dict[str, list[Any]] = {"image": [], "video": [], "audio": []}
        for conversation in conversations:
            found: dict[str, list[Any]] = {kind: [] for kind in batch}
            for message in conversation:
                content = message.get("content") or []
                for block in content if isinstance(content, list | tuple) else []:
                    kind = block.get("type")
                    if kind in found:
                        found[kind] += [block[name] for name in (kind, "url", "path") if block.get(name) is not None]
            for kind, items in found.items():
                batch[kind].append(items)
        sounds = batch["audio"] if any(batch["audio"]) else []
        return batch["image"], batch["video"], sounds, {}

    def _questions_of(self, encoded: Sequence[list[int]], instructions: Sequence[str] | None) -> list[str]:
        """The question of each picture's prompt, then of each video's."""
        if not self.reads_questions:
            return []
        if instructions is None:
            instructions = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in encoded]
        if len(instructions) != len(encoded):
            raise ShapeError(f"{len(encoded)} prompts need as many instructions, got {len(instructions)}")
        return [
            question
            for kind in ("image", "video")
            for question, ids in zip(instructions, encoded, strict=True)
            for _ in range(ids.count(self.chat_encoder.placeholder_ids[kind]))
        ]

    def _expand(self, ids: Sequence[int], tokens: Mapping[MediaKind, Iterator[MediaTokens]] | None = None) -> list[int]:
        """Put the tokens of media, taken from ``tokens``, into the places of their placeholders; pictures need none."""
        kind_of = {token_id: kind for kind, token_id in self.chat_encoder.placeholder_ids.items()}
        picture = self.token_counter.visual(1, step=None)
        places = [place for place, token in enumerate(ids) if token in kind_of]
        kinds = [kind_of[ids[place]] for place in places]
        media = [(kind, picture if kind == "image" or tokens is None else next(tokens[kind])) for kind in kinds]
        return expanded(ids, media_blocks(places, media, self.chat_encoder.placeholder_ids))

    def _pad(self, rows: list[list[int]]) -> dict[str, Tensor]:
        longest = max(map(len, rows))
        input_ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for number, ids in enumerate(rows):
            input_ids[number, longest - len(ids) :] = torch.tensor(ids, dtype=torch.long)
            attention_mask[number, longest - len(ids) :] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}
