from __future__ import annotations

import io
import pickle
import struct
import zlib

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from llava_scale.data import jpeg
from llava_scale.data.media import ImageTransform, decode_image, probe
from llava_scale.errors import ConfigError, SampleError, ShapeError
from llava_scale.types import MediaInfo

MAX = 10_000_000
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with grain: what bicubic resizing and JPEG meet in photographs."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def quadrants() -> Image.Image:
    """16 x 8 pixels: red, green over blue, white."""
    image = Image.new("RGB", (16, 8), RED)
    image.paste(GREEN, (8, 0, 16, 4))
    image.paste(BLUE, (0, 4, 8, 8))
    image.paste(WHITE, (8, 4, 16, 8))
    return image


def decode(data: bytes) -> torch.Tensor:
    return decode_image(data, max_pixels=MAX)


def colour(data: bytes, row: int = 0, col: int = 0) -> tuple[int, ...]:
    return tuple(decode(data)[:, row, col].tolist())


@pytest.fixture(params=["simplejpeg", "pillow"])
def jpeg_decoder(request, monkeypatch):
    if request.param == "pillow":
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    return request.param


# --- decoding: each kind of picture has a stated outcome ---


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 60}])
def test_simplejpeg_and_pillow_give_the_same_pixels(monkeypatch, options):
    pytest.importorskip("simplejpeg")
    data = encoded(photo(123, 77), "JPEG", **options)
    fast = decode(data)
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    slow = decode(data)
    assert fast.shape == (3, 77, 123)
    assert (fast.int() - slow.int()).abs().max() <= 1


def test_a_png_comes_back_exactly_and_channels_last():
    image = photo(20, 10)
    pixels = decode(encoded(image))
    assert pixels.dtype == torch.uint8
    assert pixels.stride() == (1, 60, 3)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_pillow_does(format, orientation, jpeg_decoder):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    data = encoded(quadrants(), format, exif=exif, **options)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    pixels = decode(data).permute(1, 2, 0).numpy()
    assert pixels.shape == np.asarray(wanted).shape
    assert np.abs(pixels.astype(int) - np.asarray(wanted)).max() <= 2
    info = probe(format.lower(), data)
    assert (info.width, info.height) == wanted.size == ((16, 8) if orientation < 5 else (8, 16))


def test_a_damaged_exif_block_leaves_the_picture_as_it_is():
    for block in (
        b"",
        b"garbage",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\0\x09",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    ):
        assert jpeg.exif_orientation(block) == jpeg.UPRIGHT
    data = encoded(quadrants(), "JPEG", exif=b"Exif\0\0II*\0\xff\0\0\0")
    assert decode(data).shape == (3, 8, 16)


def test_transparency_is_laid_on_white():
    rgba = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (255, 0, 0, 255))
    rgba.putpixel((2, 0), (255, 0, 0, 128))
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        data = encoded(rgba, format, **options)
        assert colour(data, 0, 0) == WHITE
        assert colour(data, 0, 1) == RED
        assert colour(data, 0, 2) == (255, 127, 127)
    grey_alpha = Image.new("LA", (2, 1), (0, 0))
    grey_alpha.putpixel((1, 0), (0, 255))
    assert colour(encoded(grey_alpha)) == WHITE
    assert colour(encoded(grey_alpha), 0, 1) == (0, 0, 0)


def test_palettes_become_rgb_with_and_without_a_transparent_entry():
    palette = quadrants().quantize(4)
    assert colour(encoded(palette)) == RED
    assert colour(encoded(palette), 7, 15) == WHITE
    clear = palette.getpixel((0, 0))
    for format in ("PNG", "GIF"):
        data = encoded(palette, format, transparency=clear)
        assert colour(data) == WHITE
        assert colour(data, 0, 15) == GREEN


def test_one_bit_and_grey_pictures_become_rgb(jpeg_decoder):
    bits = Image.new("1", (9, 3), 1)
    assert colour(encoded(bits)) == WHITE
    for format in ("PNG", "JPEG"):
        assert colour(encoded(Image.new("L", (9, 3), 77), format)) == (77, 77, 77)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    for format in ("PNG", "TIFF"):
        values = np.array([[0, 257, 32_896, 65_535]], dtype=np.uint16)
        data = encoded(Image.fromarray(values), format)
        assert decode(data)[0].tolist() == [[0, 1, 128, 255]]
        assert decode(data)[2].tolist() == [[0, 1, 128, 255]]


def test_sixteen_bit_colour_png_keeps_its_high_byte():
    row = b"\0" + struct.pack(">6H", 65_535, 0, 32_896, 257, 65_535, 0)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert colour(data, 0, 0) == (255, 0, 128)
    assert colour(data, 0, 1) == (1, 255, 0)


def test_cmyk_jpegs_become_rgb(jpeg_decoder):
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(np.subtract(colour(data), RED)).max() <= 3
    assert probe("jpg", data) == MediaInfo(kind="image", width=16, height=16, num_frames=1)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_picture_is_taken(format):
    frames = [Image.new("RGB", (6, 4), RED), Image.new("RGB", (6, 4), BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert colour(data) == RED
    assert probe(format.lower(), data).num_frames == 1


def test_the_format_is_told_by_the_bytes_not_the_name():
    assert probe("jpg", encoded(quadrants(), "PNG")).width == 16
    assert ImageTransform(4)(encoded(quadrants(), "BMP")).shape == (3, 4, 4)


# --- broken and hostile pictures ---


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_truncated_picture_is_a_sample_error_that_says_so(format, keep, jpeg_decoder):
    data = encoded(photo(64, 48), format)
    with pytest.raises(SampleError, match=r"damaged|unreadable|not a readable picture") as caught:
        decode(data[: int(len(data) * keep)])
    assert len(str(caught.value)) < 300


def test_things_that_are_no_pictures_are_sample_errors():
    for data, message in (
        (b"", "empty picture file"),
        (b"<html>404</html>", r"not a readable picture \(16 bytes starting 3c 68 74 6d"),
        (b"\xff\xd8\xff", "not a readable picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable picture"),
    ):
        with pytest.raises(SampleError, match=message):
            decode(data)
        with pytest.raises(SampleError, match=message):
            probe("jpg", data)


def test_floating_point_pictures_are_refused():
    with pytest.raises(SampleError, match="floating-point"):
        decode(encoded(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF"))
    with pytest.raises(SampleError, match="32-bit picture with values outside"):
        decode(encoded(Image.fromarray(np.full((2, 2), -5, dtype=np.int32)), "TIFF"))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_picture_beyond_the_pixel_limit_is_refused_before_it_is_decoded(format, jpeg_decoder):
    data = encoded(Image.new("RGB", (300, 200)), format)
    header_only = data[: len(data) * 3 // 4]  # decoding this would say damaged, not too large
    with pytest.raises(SampleError, match="300 x 200 pixels exceeds the limit of 59999"):
        decode_image(header_only, max_pixels=59_999)
    with pytest.raises(SampleError, match=r"raise data\.max_image_pixels"):
        ImageTransform(8, max_pixels=59_999)(data)
    assert decode_image(data, max_pixels=60_000).shape == (3, 200, 300)


def test_a_long_thin_picture_needs_no_memory_for_its_square():
    for size in ((30_000, 2), (2, 30_000)):
        pixels = ImageTransform(32, background=BLUE)(encoded(Image.new("RGB", size, BLUE)))
        assert pixels.shape == (3, 32, 32)
        assert (pixels == torch.tensor(BLUE)[:, None, None]).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bit_flips_give_a_picture_or_a_sample_error(data):
    format = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]))
    content = bytearray(encoded(photo(40, 24), format))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(2, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        pixels = decode(bytes(content))
    except SampleError:
        return
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3


# --- the transform ---


def expand_to_square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """LLaVA's ``pad``, in Pillow."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def processed_levels(processor: object, image: Image.Image) -> torch.Tensor:
    """What the processor gives, back on the scale 0 to 255."""
    values = processor(image, return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    return (values * std + mean) * 255


CLIP = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
CLIP_STRETCHED = CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False)
SIGLIP = SiglipImageProcessorPil(size={"height": 48, "width": 48})


@pytest.mark.parametrize("size", [(160, 120), (120, 160), (161, 97), (90, 90), (31, 20), (20, 31), (300, 7), (7, 300)])
@pytest.mark.parametrize(
    ("processor", "aspect"), [(CLIP, "pad"), (CLIP_STRETCHED, "resize"), (SIGLIP, "pad"), (SIGLIP, "resize")]
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_the_transform_is_within_two_levels_of_the_official_processors(size, processor, aspect, format):
    data = encoded(photo(*size), format)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    background = tuple(int(255 * mean) for mean in processor.image_mean)
    if aspect == "pad":
        image = expand_to_square(image, background)
    wanted = processed_levels(processor, image)
    ours = ImageTransform(48, aspect, background)(data).float()
    error = (ours - wanted).abs()
    assert error.max() <= (2.001 if size[1] <= 8 * size[0] else 4.001)
    assert error.mean() <= (0.02 if min(size) >= 20 else 0.25)


@pytest.mark.parametrize("aspect", ["pad", "resize"])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (400, 400)])
def test_scaled_jpeg_decoding_stays_close(size, aspect, jpeg_decoder):
    data = encoded(photo(*size), "JPEG")
    scaled = ImageTransform(48, aspect)
    assert scaled.reduction(*size) == 4
    whole = ImageTransform(48, aspect, jpeg_scaling=False)
    error = (scaled(data).int() - whole(data).int()).abs().float()
    assert 0 < error.mean() < 0.75
    assert error.max() <= 6


def test_jpegs_are_shrunk_only_where_twice_the_size_and_the_geometry_remain():
    pad, stretch = ImageTransform(50), ImageTransform(50, "resize")
    assert pad.reduction(199, 150) == 1
    assert pad.reduction(200, 152) == 2
    assert pad.reduction(201, 152) == 1  # 100.5 pixels would shift the picture
    assert pad.reduction(200, 150) == 1  # so would a bar of 12.5
    assert pad.reduction(4000, 3008) == 8
    assert stretch.reduction(4000, 160) == 1
    assert stretch.reduction(4000, 400) == 4
    assert ImageTransform(50, jpeg_scaling=False).reduction(4000, 3008) == 1


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([2, 4, 8]))
@settings(max_examples=25, deadline=None)
def test_both_decoders_shrink_to_the_same_pixels(width, height, factor):
    pytest.importorskip("simplejpeg")
    width, height = factor * max(1, width // factor), factor * max(1, height // factor)
    data = encoded(photo(width, height), "JPEG")
    header = jpeg.jpeg_header(data)
    assert header == (width, height, 1)
    fast = jpeg.decode_jpeg(data, header, reduction=factor)
    image = Image.open(io.BytesIO(data))
    image.draft(image.mode, (width // factor, height // factor))
    slow = np.array(image.convert("RGB"))
    assert fast.shape == slow.shape == (height // factor, width // factor, 3)
    assert np.abs(fast.astype(int) - slow).max() <= 1


def test_the_picture_is_centred_and_the_bars_have_the_background():
    for size, bar in (((40, 20), (slice(None), 0)), ((20, 40), (slice(None), slice(None), 0))):
        pixels = ImageTransform(40, "pad", (1, 2, 3))(encoded(Image.new("RGB", size, WHITE)))
        assert (pixels[bar] == torch.tensor([1, 2, 3])[:, None]).all()
        assert pixels[:, 20, 20].tolist() == [255, 255, 255]


def test_pixels_and_files_are_fitted_alike():
    image = photo(50, 30)
    transform = ImageTransform(24)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    wanted = transform(encoded(image))
    assert torch.equal(transform.from_tensor(pixels), wanted)
    assert torch.equal(transform.from_tensor(pixels.contiguous()), wanted)


def test_fitting_pixels_of_the_right_size_returns_a_copy():
    pixels = torch.zeros(24, 24, 3, dtype=torch.uint8).permute(2, 0, 1)
    fitted = ImageTransform(24).from_tensor(pixels)
    fitted += 1
    assert not pixels.any()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_buffer_of_the_caller_is_filled_in_place(layout):
    data = encoded(photo(50, 30))
    transform = ImageTransform(24)
    batch = torch.zeros(3, 3, 24, 24, dtype=torch.uint8).contiguous(memory_format=layout)
    returned = transform(data, out=batch[1])
    assert returned.data_ptr() == batch[1].data_ptr()
    assert torch.equal(batch[1], transform(data))
    assert not batch[0].any()
    assert not batch[2].any()


def test_buffers_and_pixels_of_the_wrong_kind_are_refused():
    transform = ImageTransform(24)
    with pytest.raises(ShapeError, match=r"out must be uint8 \(3, 24, 24\), got torch.float32"):
        transform(encoded(quadrants()), out=torch.zeros(3, 24, 24))
    with pytest.raises(ShapeError, match=r"got torch.uint8 \(24, 24, 3\)"):
        transform.from_tensor(torch.zeros(24, 24, 3, dtype=torch.uint8))
    with pytest.raises(ShapeError):
        transform.from_tensor(torch.zeros(3, 0, 4, dtype=torch.uint8))


def test_a_transform_pickles_and_checks_its_settings():
    transform = ImageTransform(24, "resize", (1, 2, 3), 99)
    assert pickle.loads(pickle.dumps(transform)) == transform
    with pytest.raises(ConfigError, match="did you mean 'pad'"):
        ImageTransform(24, "padd")
    with pytest.raises(ConfigError, match="positive"):
        ImageTransform(0)
    with pytest.raises(ConfigError, match="0 to 255"):
        ImageTransform(24, background=(0, 0, 256))


# --- probing ---


def make_clip(container: str, codec: str, *, frames: int = 5, sound: bool = False) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 40 * number, dtype=np.uint8), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def make_sound(container: str, codec: str, seconds: float = 1.0) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=16_000, layout="mono")
        samples = (np.sin(np.arange(int(16_000 * seconds)) / 9) * 9_000).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 16_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def test_a_video_is_probed_from_its_container():
    info = probe("mp4", make_clip("mp4", "libx264"))
    assert (info.kind, info.width, info.height, info.num_frames) == ("video", 32, 16, 5)
    assert info.duration_s == pytest.approx(0.5, abs=0.01)
    counted = probe("WEBM", make_clip("webm", "libvpx-vp9"))  # its header does not tell
    assert counted.num_frames == 5
    assert counted.duration_s == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("ext", "container", "codec"), [("wav", "wav", "pcm_s16le"), ("flac", "flac", "flac")])
def test_a_sound_is_probed_from_its_container(ext, container, codec):
    info = probe(ext, make_sound(container, codec, 1.5))
    assert info.kind == "audio"
    assert info.duration_s == pytest.approx(1.5, abs=0.05)


def test_containers_that_cannot_be_used_are_sample_errors(tmp_path):
    for ext, data, message in (
        ("mp4", b"", "empty video file"),
        ("mp4", bytes(range(256)) * 8, "unreadable video file"),
        ("mp4", make_clip("mp4", "libx264")[:200], "unreadable video file"),
        ("mp3", make_clip("mp4", "libx264"), "audio file without sound"),
        ("mp4", make_sound("wav", "pcm_s16le"), "video file without pictures"),
        ("xyz", b"1", "unknown media extension 'xyz'"),
        ("jpgg", b"1", "did you mean 'jpg'"),
    ):
        with pytest.raises(SampleError, match=message):
            probe(ext, data)


def test_playlists_that_name_other_files_are_not_followed(tmp_path):
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(make_clip("mp4", "libx264"))
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{secret}\n#EXT-X-ENDLIST\n"
    concat = f"ffconcat version 1.0\nfile {secret}\n"
    for playlist in (hls, concat):
        with pytest.raises(SampleError, match="unreadable video file"):
            probe("mp4", playlist.encode())
