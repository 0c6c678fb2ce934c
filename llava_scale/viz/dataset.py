"""HTML page of samples as the model gets them: pictures before and after the transform, tokens, loss mask."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from llava_scale.data.index import key_hash
from llava_scale.data.media import decode_image
from llava_scale.data.records import FRAMES_EXT, encoded_media
from llava_scale.errors import ConfigError, SampleError
from llava_scale.types import MEDIA_KINDS, PLACEHOLDERS
from llava_scale.viz.dataset_media import CSS, sound_figure, video_figure
from llava_scale.viz.page import number, page, picture, text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from llava_scale.data.chat import ChatEncoder
    from llava_scale.data.dataset import ShardedDataset
    from llava_scale.data.media import ImageTransform
    from llava_scale.data.video import VideoTransform
    from llava_scale.types import MediaInfo, MediaKind, MediaTokenCounter, Sample

_PREVIEW_SIDE = 560
_MAX_PIXELS = 100_000_000

_CSS = """
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;font-size:.86rem;color:var(--soft);margin:14px 0 0;align-items:center}
.samples{display:grid;gap:18px;margin-top:20px}
.sample{display:grid;grid-template-columns:minmax(0,5fr) minmax(0,7fr);gap:6px 24px}
.sample>.head,.sample>.wide{grid-column:1/-1}
.head{display:flex;flex-wrap:wrap;gap:2px 14px;align-items:baseline;border-bottom:1px solid var(--line);
padding-bottom:9px;margin-bottom:8px}
.head b{font-family:ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;font-size:.92rem;
overflow-wrap:anywhere}
.head span{font-size:.82rem;color:var(--soft)}
.media{display:flex;flex-direction:column;gap:14px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:10px;align-items:start}
.pair.alone{grid-template-columns:minmax(0,320px)}
.pair img{border:1px solid var(--line);border-radius:6px;background:#fff}
.pair .small img{image-rendering:pixelated}
figcaption{font-size:.78rem;color:var(--soft);margin-top:4px;line-height:1.35}
.tokens{font-family:ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;font-size:.84rem;line-height:1.9;
white-space:pre-wrap;overflow-wrap:anywhere;margin:0 0 9px;max-width:none}
.t{border-radius:3px;padding:1px 0;box-shadow:inset -1px 0 0 #cfd5de;background:#f3f5f8}
.t.on{background:#c9ecd8;box-shadow:inset -1px 0 0 #7fc4a0;color:#0b4d2f}
.t.special{color:#7a5ea8}
.t.on.special{color:#0b4d2f;font-weight:650}
.t .ctrl{opacity:.5}
.span{display:inline-block;background:#dbe7fd;color:#1d4ed8;border:1px solid #b6cdfa;border-radius:6px;padding:0 8px;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-size:.8rem;line-height:1.6;white-space:nowrap}
.turn{margin:0 0 10px}
.turn .who{display:block;font-size:.76rem;color:var(--soft)}
.turn .said{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.93rem}
.said.on{background:#c9ecd8;color:#0b4d2f;border-radius:4px;padding:1px 5px}
.bad{border-color:#f0b8b4}
.reason{color:var(--bad);background:var(--badbg);border-radius:6px;padding:8px 12px;font-size:.9rem;
overflow-wrap:anywhere}
@media(max-width:760px){.sample{grid-template-columns:minmax(0,1fr);gap:14px}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSide:
    """What is known of the model that the samples are shown for; every part may be missing.

    Attributes:
        name: Of the checkpoint or config, for the page's head.
        encoder: Conversation to token ids; without it, turns are shown as text.
        counter: Tokens of each medium; without it, media spans are shown without their lengths.
        transform: Pictures as the model sees them; without it, originals only.
        video: Videos as the model sees them; without it, frames spread over each.
        row_length: Longest sample in tokens; 0 sets no limit.
    """

    name: str = ""
    encoder: ChatEncoder | None = None
    counter: MediaTokenCounter | None = None
    transform: ImageTransform | None = None
    video: VideoTransform | None = None
    row_length: int = 0


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token, or all tokens of one medium, in the order of the model's input.

    Attributes:
        text: Text of the token; the placeholder for a medium.
        token_id: Its id.
        is_supervised: Whether the loss counts it.
        is_special: Whether it stands for itself in the tokenizer.
        kind: Kind of the medium, "" for text.
        num_tokens: Positions in the input; 0 where the counts are unknown.
        ordinal: Number of the medium among its kind, from 1.
        grid: Frames, rows and columns of the features behind a medium, or None where unknown.
    """

    text: str
    token_id: int
    is_supervised: bool = False
    is_special: bool = False
    kind: MediaKind | None = None
    num_tokens: int = 1
    ordinal: int = 0
    grid: tuple[int, int, int] | None = None


def view_tokens(sample: Sample, infos: Sequence[MediaInfo], model: ModelSide) -> list[TokenView]:
    """The input of the model for one sample, media as one entry each.

    Raises:
        SampleError: if the sample cannot be used with this model, as training would say.
    """
    encoder = model.encoder
    if encoder is None:
        return []
    encoded = encoder.encode(sample.turns)
    kinds = {token: kind for kind, token in encoder.placeholder_ids.items()}
    waiting = {kind: [info for info in infos if info.kind == kind] for kind in MEDIA_KINDS}
    seen = dict.fromkeys(MEDIA_KINDS, 0)
    views = []
    texts = encoder.token_texts(encoded.input_ids)
    for token, shown, on in zip(encoded.input_ids, texts, encoded.supervised, strict=True):
        kind = kinds.get(token)
        if kind is None or not waiting[kind]:
            views.append(TokenView(shown, token, on, encoder.is_special(token)))
            continue
        counted = model.counter.count(waiting[kind].pop(0), step=None) if model.counter else None
        seen[kind] += 1
        views.append(
            TokenView(
                PLACEHOLDERS[kind],
                token,
                kind=kind,
                num_tokens=counted.num_positions if counted else 0,
                ordinal=seen[kind],
                grid=counted.grid if counted else None,
            )
        )
    total = sum(view.num_tokens for view in views)
    if model.row_length and total > model.row_length:
        raise SampleError(f"{total} tokens do not fit in a row of {model.row_length} (data.packing.row_length)")
    return views


def choose_samples(dataset: ShardedDataset, num: int, keys: Sequence[str] = ()) -> list[int]:
    """Numbers of the samples with the given keys, else of ``num`` spread evenly over the data set.

    Raises:
        ConfigError: a key that no sample has.
    """
    if not keys:
        spread = np.linspace(0, len(dataset) - 1, min(num, len(dataset))).round()
        return [int(position) for position in np.unique(spread)]
    numbers: dict[str, int] = {}
    wanted = {key_hash(key): key for key in keys}
    hashes = np.array(list(wanted), dtype=np.uint64)
    for shard in range(dataset.num_shards):
        found = np.flatnonzero(np.isin(dataset.index(shard).key_hashes, hashes))
        for inside in found.tolist():
            sample_number = dataset.shard_range(shard)[inside]
            numbers.setdefault(dataset.key(sample_number), sample_number)
    missing = [key for key in keys if key not in numbers]
    if missing:
        raise ConfigError(f"{dataset.path} has no sample with the key {missing[0]!r}")
    return [numbers[key] for key in keys]


def write_samples_page(dataset: ShardedDataset, numbers: Sequence[int], out: str | Path, model: ModelSide) -> Path:
    """Write one self-contained page with the given samples; samples that cannot be used say why.

    Args:
        dataset: Where the samples are.
        numbers: Sample numbers, in the order of the page.
        out: HTML file; its folder is made.
        model: For which model they are shown.

    Returns:
        The file.
    """
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    cards = [_card(dataset, sample_number, model) for sample_number in numbers]
    subtitle = f"{len(cards):,} of {len(dataset):,} samples of {dataset.path}"
    if model.name:
        subtitle += f", for {model.name}"
    body = [_legend(model), '<div class="samples">', *cards, "</div>"]
    target.write_text(page(title=f"Samples of {dataset.name}", subtitle=subtitle, body=body, css=_CSS + CSS), "utf-8")
    return target


def _legend(model: ModelSide) -> str:
    if model.encoder is None:
        return '<div class="legend"><span><span class="said on">answers</span> are learned</span></div>'
    parts = [
        '<span><span class="t on">supervised</span> the loss counts these tokens</span>',
        '<span><span class="t">context</span> given, not learned</span>',
        '<span><span class="span">image</span> where its tokens go</span>',
        f"<span>template <b>{text(model.encoder.template)}</b></span>",
    ]
    if model.transform is not None:
        shape = f"{_size(model.transform.size, model.transform.size)}, {model.transform.aspect}"
        parts.append(f"<span>pictures <b>{shape}</b></span>")
    return f'<div class="legend">{"".join(parts)}</div>'


def _card(dataset: ShardedDataset, sample_number: int, model: ModelSide) -> str:
    shard, _ = dataset.locate(sample_number)
    where = f"<b>{text(dataset.key(sample_number))}</b><span>{text(dataset.shard_name(shard))}</span>"
    try:
        sample = dataset.sample(sample_number)
        infos = _with_clips(dataset.media_infos(sample_number), sample)
        views = view_tokens(sample, infos, model)
        media = "".join(_media(sample, infos, model))
    except SampleError as error:
        reason = f'<div class="reason wide">cannot be used: {text(error.reason)}</div>'
        return f'<article class="card sample bad"><div class="head">{where}</div>{reason}</article>'
    facts = _extra(sample) + _counts(views, model)
    side = "" if media else ' class="wide"'
    conversation = f"<div{side}>{_tokens(views) if views else _turns(sample)}</div>"
    pictures = f'<div class="media">{media}</div>' if media else ""
    return f'<article class="card sample"><div class="head">{where}{facts}</div>{pictures}{conversation}</article>'


def _with_clips(infos: Sequence[MediaInfo], sample: Sample) -> list[MediaInfo]:
    """What the index says of the media, and of clips where they lie."""
    media = encoded_media(sample)
    clips = [medium.clip for kind in MEDIA_KINDS for medium in media.get(kind, ())]
    return [replace(info, clip=clip) if clip else info for info, clip in zip(infos, clips, strict=True)]


def _extra(sample: Sample) -> str:
    """Short fields of the record beside the conversation, such as its task."""
    short = {name: value for name, value in sample.extra.items() if isinstance(value, str | int | float)}
    for kind in MEDIA_KINDS:
        short.pop(kind, None)  # file names at packing time
    return "".join(
        f"<span>{text(name)} {text(value)}</span>" for name, value in list(short.items())[:4] if len(str(value)) <= 40
    )


def _counts(views: Sequence[TokenView], model: ModelSide) -> str:
    if not views:
        return ""
    written = sum(1 for view in views if view.kind is None)
    supervised = sum(view.is_supervised for view in views)
    of_media = sum(view.num_tokens for view in views if view.kind is not None)
    shown = f"{written + of_media:,} tokens" if model.counter else f"{written:,} text tokens"
    detail = f"{written:,} text, {of_media:,} media, " if model.counter and of_media else ""
    return f"<span>{shown} ({detail}{supervised:,} supervised)</span>"


def _media(sample: Sample, infos: Sequence[MediaInfo], model: ModelSide) -> Iterator[str]:
    position = 0
    for kind in MEDIA_KINDS:
        for ordinal, (ext, data) in enumerate(sample.media.get(kind, ()), start=1):
            info = infos[position]
            position += 1
            if kind == "image":
                yield _picture_pair(ordinal, ext, data, info, model)
            else:
                show = _video if kind == "video" else _sound
                yield show(ordinal, ext, data, info, model)


def _picture_pair(ordinal: int, ext: str, data: bytes, info: MediaInfo, model: ModelSide) -> str:
    limit = model.transform.max_pixels if model.transform else _MAX_PIXELS
    caption = f"image {ordinal} as stored · {_describe(ext, data, info)}"
    original = _figure(_preview(decode_image(data, max_pixels=limit)), "image/jpeg", caption)
    if model.transform is None:
        return f'<div class="pair alone">{original}</div>'
    seen = model.transform(data)
    caption = f"as the model sees it · {_size(model.transform.size, model.transform.size)}"
    caption += _tokens_of(info, model)
    small = " small" if model.transform.size < 160 else ""
    return f'<div class="pair">{original}{_figure(_png(seen), "image/png", caption, small)}</div>'


def _video(ordinal: int, ext: str, data: bytes, info: MediaInfo, model: ModelSide) -> str:
    stored = "frames" if ext == FRAMES_EXT else _describe(ext, data, info)
    title = f"video {ordinal} ({stored})" + (f" from {info.clip[0]:g} s on" if info.clip else "")
    return video_figure(title, ext, data, info, model.video, _tokens_of(info, model))


def _sound(ordinal: int, ext: str, data: bytes, info: MediaInfo, model: ModelSide) -> str:
    title = f"sound {ordinal} ({_describe(ext, data, info)})"
    return sound_figure(title, ext, data, _tokens_of(info, model), clip=info.clip)


def _tokens_of(info: MediaInfo, model: ModelSide) -> str:
    """Features and tokens of a medium, for its caption; nothing where the model is not known."""
    if model.counter is None:
        return ""
    counted = model.counter.count(info, step=None)
    shown = f"{counted.grid[2]:,} features" if info.kind == "audio" else _grid(counted.grid)
    between = counted.num_positions - counted.num_tokens
    stamps = f" and {between:,} of time stamps" if between else ""
    return f" · {shown} → {counted.num_tokens:,} tokens{stamps}"


def _figure(data: bytes, mime: str, caption: str, css_class: str = "") -> str:
    image = picture(data, mime=mime, alt=caption)
    return f'<figure class="{css_class.strip()}">{image}<figcaption>{text(caption)}</figcaption></figure>'


def _describe(ext: str, data: bytes, info: MediaInfo) -> str:
    parts = [_size(info.width, info.height)] if info.width else []
    if info.kind != "image":
        parts += [f"{info.num_frames} frames"] if info.num_frames else []
        parts += [f"{info.duration_s:.1f} s"] if info.duration_s else []
    return ", ".join([*parts, ext, f"{number(len(data) / 1024)} KB"])


def _grid(grid: tuple[int, int, int]) -> str:
    frames, rows, cols = grid
    return _size(frames, rows, cols) if frames > 1 else _size(rows, cols)


def _size(*lengths: int) -> str:
    return "\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}".join(map(str, lengths))


def _preview(pixels: Tensor) -> bytes:
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def _png(pixels: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _turns(sample: Sample) -> str:
    parts = []
    for turn in sample.turns:
        said = text(turn.text)
        for kind, marker in PLACEHOLDERS.items():
            said = said.replace(text(marker), f'<span class="span">{kind}</span>')
        on = " on" if turn.role == "assistant" else ""
        parts.append(f'<p class="turn"><span class="who">{turn.role}</span><span class="said{on}">{said}</span></p>')
    return "".join(parts)


def _tokens(views: Sequence[TokenView]) -> str:
    """One paragraph for each question with its answer."""
    paragraphs = [""]
    for before, view in zip([None, *views], views, strict=False):
        if before is not None and before.is_supervised and not view.is_supervised:
            paragraphs.append("")
        paragraphs[-1] += _token(view)
    return "".join(f'<p class="tokens">{paragraph}</p>' for paragraph in paragraphs)


def _token(view: TokenView) -> str:
    if view.kind is not None:
        size = f" · {view.num_tokens:,} tokens" if view.num_tokens else ""
        return f'<span class="span" title="id {view.token_id}">{view.kind} {view.ordinal}{size}</span>'
    names = "t" + (" on" if view.is_supervised else "") + (" special" if view.is_special else "")
    shown = text(view.text).replace("\n", '<span class="ctrl">⏎</span>\n').replace("\t", '<span class="ctrl">⇥</span>')
    return f'<span class="{names}" title="id {view.token_id}">{shown}</span>'
