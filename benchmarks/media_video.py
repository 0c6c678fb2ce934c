"""Frames of a video, decoded and fitted to the model's picture: ours beside decord and Megatron-Energon's decoder.

    python benchmarks/media_video.py --rounds 5

Every way takes the same frames (by index), one thread, from memory, and fits them with the same transform; the time
counted is the processor's. Videos: H.264, 640 x 360, 30 frames a second, a key frame every 30 and every 250. Frames
stored ahead of time (``data pack --video-frames``) are measured against decoding the same frames of the file.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from common import machine, parser, save, table

from llava_scale.data.media import ImageTransform
from llava_scale.data.prepare import MediaOptions, prepare
from llava_scale.data.records import join_frames
from llava_scale.data.sampling import FrameSampling, uniform_indices
from llava_scale.data.video import VideoTransform

RATE, WIDTH, HEIGHT = 30, 640, 360
FIT = ImageTransform(size=224)


def make_video(seconds: int, gop: int) -> bytes:
    """Panning texture with grain and a moving block: neither still nor noise."""
    rng = np.random.default_rng(0)
    world = rng.integers(0, 256, (HEIGHT // 8 + 2, (WIDTH + seconds * RATE * 2) // 8 + 2, 3), dtype=np.uint8)
    world = np.kron(world, np.ones((8, 8, 1), dtype=np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        with av.open(str(path), "w") as output:
            options = {"preset": "veryfast", "crf": "26", "bf": "3"}
            stream: Any = output.add_stream("libx264", rate=RATE, options=options)
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, "yuv420p", gop
            stream.codec_context.options = options
            for number in range(seconds * RATE):
                frame = world[:HEIGHT, number : number + WIDTH].copy()
                left = (number * 5) % (WIDTH - 80)
                frame[140:220, left : left + 80] = (220, 60, 40)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            output.mux(stream.encode())
        return path.read_bytes()


def fitted(frames: np.ndarray) -> torch.Tensor:
    """``(F, H, W, 3)`` -> what ours gives."""
    return torch.stack([FIT.from_tensor(torch.from_numpy(frame).permute(2, 0, 1)) for frame in frames])


def ours(data: bytes, number: int, indices: list[int]) -> torch.Tensor:
    """The package's way."""
    sampling = FrameSampling(scheme="uniform", num_frames=number, max_frames=number)
    return VideoTransform(image=FIT, sampling=sampling)(data).data


def with_decord(data: bytes, number: int, indices: list[int]) -> torch.Tensor:
    """decord, seeking to each frame."""
    import decord

    return fitted(decord.VideoReader(io.BytesIO(data), num_threads=1).get_batch(indices).asnumpy())


def with_energon(data: bytes, number: int, indices: list[int]) -> torch.Tensor:
    """Megatron-Energon's decoder, by index."""
    from megatron.energon.av import AVDecoder

    ranges = [(index, index) for index in indices]
    clips, _ = AVDecoder(io.BytesIO(data)).get_video_clips(ranges, video_unit="frames")
    return fitted(torch.cat([clip[:1] for clip in clips]).permute(0, 2, 3, 1).contiguous().numpy())


WAYS: dict[str, Callable[[bytes, int, list[int]], torch.Tensor]] = {
    "ours": ours,
    "decord": with_decord,
    "energon": with_energon,
}


def timed(way: str, data: bytes, number: int) -> tuple[float, torch.Tensor]:
    """Processor milliseconds and the frames."""
    indices = uniform_indices(len_of(data), number)
    start = time.process_time()
    frames = WAYS[way](data, number, indices)
    return 1e3 * (time.process_time() - start), frames


def stored(data: bytes, number: int, image_format: str, rounds: int) -> tuple[list[float], list[float]]:
    """Processor milliseconds of decoding the file, and of its frames as stored; in turn."""
    options = MediaOptions(image_size=FIT.size, video_frames=number, image_format=image_format)  # type: ignore[arg-type]
    found = prepare("video", 0, data, options)
    assert found is not None
    joined = join_frames([(medium.ext, medium.data) for medium in found.media])
    how = VideoTransform(image=FIT, sampling=FrameSampling(num_frames=number, max_frames=number))
    ways: tuple[Callable[[], Any], ...] = (lambda: how(data), lambda: how.stored(joined, found.times_s))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for way, spent in zip(ways, times, strict=True):
            start = time.process_time()
            way()
            spent.append(1e3 * (time.process_time() - start))
    return times


def stored_rows(data: bytes, gop: int, rounds: int, results: dict[str, list[float]]) -> list[list[str]]:
    """Lines of the second table."""
    rows = []
    for number in (8, 32):
        for image_format in ("jpeg", "ppm"):
            file, ready = stored(data, number, image_format, rounds)
            results |= {f"file {number} {gop} {image_format}": file, f"stored {number} {gop} {image_format}": ready}
            ratios = [a / b for a, b in zip(file, ready, strict=True)]
            shown = f"{statistics.median(ratios):.0f} ({min(ratios):.0f}-{max(ratios):.0f})"
            rows.append([image_format, str(number), str(gop), f"{statistics.median(ready):.1f}", shown])
    return rows


def len_of(data: bytes) -> int:
    """Frames of a video."""
    with av.open(io.BytesIO(data)) as container:
        return int(container.streams.video[0].frames)


def available() -> list[str]:
    """Ways whose library is there and works."""
    data, found = make_video(1, 10), []
    for way in WAYS:
        try:
            timed(way, data, 2)
            found.append(way)
        except Exception as error:
            print(f"{way}: skipped: {type(error).__name__}: {error}")
    return found


def main() -> None:
    """Measure all cells, the ways in turn."""
    options = parser(__doc__ or "")
    options.add_argument("--seconds", type=int, default=20)
    args = options.parse_args()
    torch.set_num_threads(1)
    ways = available()
    results: dict[str, list[float]] = {}
    rows, ready = [], []
    for gop in (30, 250):
        data = make_video(args.seconds, gop)
        ready += stored_rows(data, gop, args.rounds, results)
        for number in (8, 32):
            expected = timed("ours", data, number)[1].float()
            off = {way: float((timed(way, data, number)[1].float() - expected).abs().mean()) for way in ways}
            for turn in range(args.rounds):
                for way in ways if turn % 2 == 0 else reversed(ways):
                    results.setdefault(f"{way} {number} {gop}", []).append(timed(way, data, number)[0])
            for way in ways:
                own, base = results[f"{way} {number} {gop}"], results[f"ours {number} {gop}"]
                ratios = [a / b for a, b in zip(own, base, strict=True)]
                shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
                rows.append([way, str(number), str(gop), f"{statistics.median(own):.0f}", shown, f"{off[way]:.2f}"])
    print(machine())
    print(table(["way", "frames", "gop", "CPU ms", "time against ours", "mean level off"], rows))
    print(table(["stored as", "frames", "gop", "CPU ms", "times as fast as the file"], ready))
    save(args.json, results)


if __name__ == "__main__":
    main()
