"""What is asked of the model, and its way to token ids and pixels: the same as in training."""

from __future__ import annotations

import hashlib
import io
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image, ImageOps

from llava_scale.data.collate import instruction_of
from llava_scale.data.decoding import decode_medium, medium_info
from llava_scale.data.expansion import MediaBlock, expanded, media_blocks
from llava_scale.data.records import VIDEO_AUDIO, parse_record
from llava_scale.errors import SampleError
from llava_scale.types import MEDIA_KINDS, AudioFeatures, Clip, EncodedMedium, MediaInfo, MediaKind, Turn

if TYPE_CHECKING:
    from torch import Tensor

    from llava_scale.model import LlavaScaleProcessor


@dataclass(frozen=True, slots=True)
class CutMedium:
    """A clip of a video or sound.

    Attributes:
        file: The encoded file or its local path.
        clip: Its seconds that are used.
    """

    file: bytes | str | Path
    clip: Clip


Medium = bytes | str | Path | Image.Image | CutMedium | EncodedMedium
"""An encoded file, its local path, a Pillow image, a clip of a file, or a medium as a sample holds it."""

PROBED_AS: dict[MediaKind, str] = {"image": "png", "video": "mp4", "audio": "wav"}
"""Any extension of each kind: what is inside a file is found out from its content."""

Change = Literal["", "blank", "shuffle"]
"""What is done to media after they are decoded, to see what they contribute."""

_SILENCE_RATE = 16_000
_MASK = (1 << 62) - 1
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A conversation that waits for an answer.

    Attributes:
        turns: Messages; the last one is the user's. Media of a kind that the text never mentions go before the first
            message of the user.
        media: Per kind the media, in the order of their placeholders.
        change: ``blank`` leaves pictures and frames of one colour and silent sounds: what text alone gives;
            ``shuffle`` brings the frames of each video into another order, always the same for the same file.
        video_audio: The sound track of each video is a sound of the request, before those in ``media``; in the text it
            stands right behind its video, unless that places sounds itself.
    """

    turns: tuple[Turn, ...]
    media: Mapping[MediaKind, Sequence[Medium]] = field(default_factory=dict)
    change: Change = ""
    video_audio: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A request as token ids, with its media still encoded.

    Attributes:
        input_ids: Token ids; each medium's placeholder repeated to its number of tokens.
        media: Kind, encoded file and header of each medium, in order of appearance.
        media_spans: First position and number of positions of each medium, in order of appearance; time stamps
            between frames belong to it. A video and its sound that take turns have the same span.
        question: The user's turns without placeholders, for models that read them beside the pictures.
        num_features: Tokens that all media had before compression.
        num_media_tokens: Tokens that they have in the text.
        change: As of the request.
        signature: One number a position: its token id, or for media what they look like to the model. Two prompts
            whose signatures begin alike begin with the same keys and values.
    """

    input_ids: list[int]
    media: tuple[tuple[MediaKind, EncodedMedium, MediaInfo], ...] = ()
    media_spans: tuple[tuple[int, int], ...] = ()
    question: str = ""
    num_features: int = 0
    num_media_tokens: int = 0
    change: Change = ""
    signature: tuple[int, ...] = ()

    @property
    def pictures(self) -> tuple[bytes, ...]:
        """Encoded pictures in order of appearance."""
        return tuple(medium.data for kind, medium, _ in self.media if kind == "image")


def make_prompt(request: GenerationRequest, processor: LlavaScaleProcessor) -> Prompt:
    """Tokenise a request as training did; media are probed, not decoded.

    Raises:
        SampleError: turns out of order, placeholders and media that differ in number, a medium that cannot be read or
            that the model does not take.
    """
    media = {kind: [_encoded(medium) for medium in request.media.get(kind, ())] for kind in MEDIA_KINDS}
    if request.video_audio:
        media["audio"] = [*media["video"], *media["audio"]]
    counts = {kind: len(items) for kind, items in media.items()}
    turns = place_media(request.turns, counts, video_audio=request.video_audio)
    waiting = {kind: iter(items) for kind, items in media.items()}
    encoder, counter = processor.chat_encoder, processor.token_counter
    kind_of = {token_id: kind for kind, token_id in encoder.placeholder_ids.items()}
    ids = encoder.encode_prompt(turns)
    places = [place for place, token_id in enumerate(ids) if token_id in kind_of]
    found: list[tuple[MediaKind, EncodedMedium, MediaInfo]] = []
    for place in places:
        kind = kind_of[ids[place]]
        medium = next(waiting[kind])
        found.append((kind, medium, medium_info(kind, medium)))
    counted = [(kind, counter.count(info, step=None)) for kind, _, info in found]
    blocks = media_blocks(places, counted, encoder.placeholder_ids)
    question = instruction_of(turns)
    look = f"{processor.compressor}\n{question if processor.reads_questions else ''}\n{request.change}"
    signature, spans = _signature(ids, blocks, found, look)
    return Prompt(
        input_ids=expanded(ids, blocks),
        media=tuple(found),
        media_spans=spans,
        question=question,
        num_features=sum(prod(tokens.grid) for _, tokens in counted),
        num_media_tokens=sum(tokens.num_tokens for _, tokens in counted),
        change=request.change,
        signature=signature,
    )


def _signature(
    ids: Sequence[int],
    blocks: Sequence[MediaBlock],
    media: Sequence[tuple[MediaKind, EncodedMedium, MediaInfo]],
    look: str,
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Signature and media spans of a prompt; a video and its sound in turn look like one medium."""
    signature: list[int] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for block in blocks:
        signature += ids[start : block.place]
        start = block.place + block.num_media
        inside = media[len(spans) : len(spans) + block.num_media]
        spans += [(len(signature), len(block.ids))] * block.num_media
        looks = [_look(medium, f"{kind}\n{look}") for kind, medium, _ in inside]
        signature += [looks[0] if len(looks) == 1 else -1 - (hash(tuple(looks)) >> 1 & _MASK)] * len(block.ids)
    return (*signature, *ids[start:]), tuple(spans)


def load_media(prompt: Prompt, processor: LlavaScaleProcessor) -> Callable[[int], dict[str, Any]]:
    """Decode the media of ``prompt``; returns their arguments of the model, for the tokens from a position on.

    Raises:
        SampleError: one cannot be decoded.
    """
    transforms = processor.media_transforms
    loaded = []
    for (kind, medium, info), (start, _) in zip(prompt.media, prompt.media_spans, strict=True):
        if kind == "audio" and prompt.change == "blank":
            medium, info = EncodedMedium(_silence(info.duration_s)), replace(info, clip=None)
        made = transforms[kind](medium.data) if kind == "image" else decode_medium(medium, info, transforms[kind])
        if kind != "audio" and prompt.change:
            made = _changed(made, medium.data, prompt.change, processor.image_transform.background)
        grid = processor.token_counter.count(info, step=None).grid
        loaded.append((start, kind, made, grid))
    question = processor.question_inputs([prompt.question]) if loaded else {}

    def inputs(first: int) -> dict[str, Any]:
        rest = {kind: [(x, grid) for at, of, x, grid in loaded if of == kind and at >= first] for kind in MEDIA_KINDS}
        made: dict[str, Any] = {}
        if rest["image"]:
            made["pixel_values"] = torch.stack([picture for picture, _ in rest["image"]])
        if rest["video"]:
            made["pixel_values_videos"] = torch.cat([video.data for video, _ in rest["video"]])
            made["video_grids"] = [grid for _, grid in rest["video"]]
        if rest["audio"]:
            windows = AudioFeatures.joined([sound for sound, _ in rest["audio"]])
            made |= {"audio_values": windows.values, "audio_lengths": windows.lengths}
            made["audio_grids"] = [grid for _, grid in rest["audio"]]
        number = len(rest["image"]) + len(rest["video"])
        return made | ({name: value.expand(number, -1) for name, value in question.items()} if number else {})

    return inputs


def _changed(made: Any, data: bytes, change: Change, background: tuple[int, int, int]) -> Any:
    """A decoded picture, uint8 ``(3, H, W)``, or video, as ``change`` says."""
    pixels: Tensor = made if isinstance(made, torch.Tensor) else made.data
    if change == "blank":
        pixels = pixels.new_tensor(background)[:, None, None].expand_as(pixels).contiguous()
    elif pixels.ndim == 4:
        seed = int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "little")
        pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))]
    return pixels if isinstance(made, torch.Tensor) else replace(made, data=pixels)


def _silence(seconds: float) -> bytes:
    """A WAV file without a sound."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_SILENCE_RATE)
        file.writeframes(bytes(2 * round(seconds * _SILENCE_RATE)))
    return buffer.getvalue()


def place_media(
    turns: Sequence[Turn], counts: Mapping[MediaKind, int], *, video_audio: bool = False
) -> tuple[Turn, ...]:
    """Give media without a placeholder their place, by the rules for samples in a data set.

    Args:
        turns: The conversation, ending with the user.
        counts: Media of each kind.
        video_audio: Sound tracks of the videos are among the sounds.

    Raises:
        SampleError: the conversation does not end with the user, or breaks a rule of ``data.records.parse_record``.
    """
    if not turns or turns[-1].role != "user":
        raise SampleError("the conversation must end with a message of the user, which is answered")
    messages = [{"from": turn.role, "value": turn.text} for turn in turns]
    # the rules are for whole conversations: lend them the answer that is still to come
    messages.append({"from": "assistant", "value": "?"})
    return parse_record({"conversations": messages, VIDEO_AUDIO: video_audio}, counts)[:-1]


def decode_pictures(prompt: Prompt, processor: LlavaScaleProcessor) -> list[Tensor]:
    """Pictures of a prompt as training sees them, each uint8 ``(3, H, W)``.

    Raises:
        SampleError: one cannot be decoded.
    """
    transform = processor.image_transform
    return [transform(data) for data in prompt.pictures]


def _look(medium: EncodedMedium, setting: str) -> int:
    """Number below zero, so that it is no token's, for a medium as the model sees it under a compressor or question."""
    key = hashlib.blake2b(f"{medium.clip} {medium.times_s}\n{setting}".encode()).digest()
    digest = hashlib.blake2b(medium.data, digest_size=8, key=key).digest()
    return -1 - (int.from_bytes(digest, "little") >> 1)


def _encoded(medium: Medium) -> EncodedMedium:
    if isinstance(medium, EncodedMedium):
        return medium
    if isinstance(medium, Image.Image):
        return EncodedMedium(_png(medium))
    file, clip = (medium.file, medium.clip) if isinstance(medium, CutMedium) else (medium, None)
    if isinstance(file, bytes):
        return EncodedMedium(file, clip=clip)
    try:
        return EncodedMedium(Path(file).read_bytes(), clip=clip)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SampleError(f"cannot read {file}: {reason}") from None


def _png(picture: Image.Image) -> bytes:
    upright = ImageOps.exif_transpose(picture)
    if upright.mode not in _PNG_MODES:
        upright = upright.convert("RGB")
    buffer = io.BytesIO()
    upright.save(buffer, format="PNG", compress_level=0)
    return buffer.getvalue()
