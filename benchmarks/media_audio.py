"""Sound: filter banks beside the reference formulation, BEATs beside plain attention, decoding beside real time.

    python benchmarks/media_audio.py --rounds 5

One thread, the processor's time, ways in turn. The reference filter bank is ``torchaudio.compliance.kaldi.fbank``;
plain attention is the formulation of the official BEATs code (all logits, position bias repeated for every clip).
"""

from __future__ import annotations

import functools
import importlib.util
import io
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from common import machine, parser, save, table
from torch import Tensor

from llava_scale.data.audio import AudioTransform
from llava_scale.data.prepare import MediaOptions, prepare
from llava_scale.towers import beats
from llava_scale.towers.beats import BeatsTower
from llava_scale.towers.beats_config import BeatsConfig
from llava_scale.towers.fbank import Fbank

LAYERS = 3
FILES = {
    "mp3 44.1 kHz stereo": ("mp3", "libmp3lame", 44_100, 2),
    "m4a 44.1 kHz stereo": ("ipod", "aac", 44_100, 2),
    "flac 44.1 kHz stereo": ("flac", "flac", 44_100, 2),
    "opus 48 kHz mono": ("ogg", "libopus", 48_000, 1),
    "mp3 16 kHz mono": ("mp3", "libmp3lame", 16_000, 1),
    "flac 16 kHz mono": ("flac", "flac", 16_000, 1),
}


def make_sound(container: str, codec: str, rate: int, channels: int, seconds: int) -> bytes:
    """Tones with noise."""
    noise = np.random.default_rng(0)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=rate, layout="stereo" if channels == 2 else "mono")
        size = stream.codec_context.frame_size or 4096
        resampler = av.AudioResampler(stream.codec_context.format.name, stream.layout.name, rate, frame_size=size)
        time_s = np.arange(rate) / rate
        for second in range(seconds):
            wave = 0.4 * np.sin(2 * np.pi * (200 + 7 * second) * time_s) + noise.normal(0, 0.05, rate)
            block = np.ascontiguousarray(np.stack([wave] * channels), dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=stream.layout.name)
            frame.sample_rate = rate
            for part in resampler.resample(frame):
                part.pts = None
                output.mux(stream.encode(part))
        output.mux(stream.encode())
    return buffer.getvalue()


def plain_attention(self: Any, x: Tensor, bias: Tensor | None, hidden: Tensor | None) -> Tensor:
    """Attention as the official code writes it."""
    batch, tokens, width = x.shape
    heads, size = self.config.encoder_attention_heads, self.config.head_dim
    scale = 32.0
    query = self.q_proj(x) * size**-0.5 / scale
    flat = [
        part.view(batch, tokens, heads, size).transpose(1, 2).reshape(batch * heads, tokens, size)
        for part in (query, self.k_proj(x), self.v_proj(x))
    ]
    logits = torch.bmm(flat[0], flat[1].transpose(1, 2))
    logits = (logits - logits.max(dim=-1, keepdim=True)[0]) * scale
    if hidden is not None:
        logits = (logits.view(batch, heads, tokens, tokens) + hidden).view(batch * heads, tokens, tokens)
    repeated = bias[None].repeat(batch, 1, 1, 1).view(batch * heads, tokens, tokens)
    layer = flat[0].view(batch, heads, tokens, size) * scale / size**-0.5
    gates = torch.sigmoid(self.grep_linear(layer).view(batch, heads, tokens, 2, 4).sum(-1))
    update, reset = gates.chunk(2, dim=-1)
    gate = (update * (reset * self.grep_a - 1.0) + 2.0).view(batch * heads, tokens, 1)
    probabilities = torch.softmax((logits + gate * repeated).float(), dim=-1).type_as(logits)
    out = torch.bmm(probabilities, flat[2]).view(batch, heads, tokens, size)
    return self.out_proj(out.transpose(1, 2).reshape(batch, tokens, width))


def released(layers: int) -> BeatsTower:
    """BEATs of the released width with fewer layers."""
    config = BeatsConfig(
        encoder_layers=layers, encoder_embed_dim=768, encoder_ffn_embed_dim=3072, encoder_attention_heads=12,
        embed_dim=512, layer_norm_first=False, deep_norm=True, conv_bias=False, conv_pos=128, conv_pos_groups=16,
        relative_position_embedding=True, num_buckets=320, max_distance=800, gru_rel_pos=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return BeatsTower(config).eval()


@functools.cache
def kaldi() -> Any:
    """``torchaudio.compliance.kaldi`` alone: it is plain Python, and the rest only fits one version of torch."""
    found = importlib.util.find_spec("torchaudio")
    if found is None or found.origin is None:
        raise ImportError("not installed")
    sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))
    path = Path(found.origin).parent / "compliance" / "kaldi.py"
    spec = importlib.util.spec_from_file_location("kaldi", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference_fbank(wave: Tensor) -> Tensor:
    """Kaldi's filter bank as BEATs calls it."""
    return kaldi().fbank(wave[None] * 2**15, num_mel_bins=128, sample_frequency=16_000, frame_length=25, frame_shift=10)


def against(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each way, run in turn."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for turn in range(rounds):
        for name in ways if turn % 2 == 0 else reversed(ways):
            start = time.process_time()
            ways[name]()
            found[name].append(time.process_time() - start)
    return found


def line(what: str, runs: dict[str, list[float]]) -> list[str]:
    """Medians and the ratio of the second way to the first, run by run."""
    (first, own), (second, other) = runs.items()
    ratios = [b / a for a, b in zip(own, other, strict=True)]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    shown = [f"{1e3 * statistics.median(values):.1f}" for values in (own, other)]
    return [what, f"{first} {shown[0]} ms", f"{second} {shown[1]} ms", ratio]


@torch.no_grad()
def compare(rounds: int) -> tuple[list[list[str]], dict[str, Any]]:
    """Filter banks and BEATs."""
    rows, results = [], {}
    wave = torch.randn(160_000, generator=torch.Generator().manual_seed(0)) * 0.1
    bank = Fbank()
    try:
        off = float((bank(wave) - reference_fbank(wave)).abs().max())
        runs = against({"ours": lambda: bank(wave), "torchaudio": lambda: reference_fbank(wave)}, rounds * 5)
        rows.append(line(f"filter bank of 10 s, {off:.1e} off", runs))
        results["fbank"] = runs
    except (ImportError, OSError) as error:
        print(f"torchaudio: skipped: {error}")
    tower = released(LAYERS)
    batch = torch.stack([tower.frontend.features(wave)] * 2)
    own = beats._Attention.forward

    def plain() -> Tensor:
        beats._Attention.forward = plain_attention
        try:
            return tower.model(batch)
        finally:
            beats._Attention.forward = own

    off = float((plain() - tower.model(batch)).abs().max())
    runs = against({"ours": lambda: tower.model(batch), "plain": plain}, rounds)
    rows.append(line(f"BEATs, {LAYERS} layers, 2 x 10 s, {off:.1e} off", runs))
    results["beats"] = runs
    return rows, results


def decoding(rounds: int, seconds: int) -> tuple[list[list[str]], dict[str, list[float]]]:
    """Whole files and a clip out of the middle."""
    rows, results = [], {}
    how = AudioTransform()
    for name, file in FILES.items():
        data = make_sound(*file, seconds)
        middle = seconds / 2
        ways = {
            "whole": lambda data=data: how(data),
            "clip": lambda data=data, middle=middle: how(data, start_s=middle, end_s=middle + 30),
        }
        runs = against(ways, rounds)
        real_time = [seconds / value for value in runs["whole"]]
        shown = f"{statistics.median(real_time):,.0f} ({min(real_time):,.0f}-{max(real_time):,.0f})"
        rows.append([name, shown, f"{1e3 * statistics.median(runs['clip']):.0f}"])
        results |= {f"{name} {key}": value for key, value in runs.items()}
    return rows, results


def stored(rounds: int, seconds: int) -> list[list[str]]:
    """Sounds that `data pack --audio-rate 16000` stored, against decoding the files that they come from."""
    rows, how = [], AudioTransform()
    for name in ("mp3 44.1 kHz stereo", "m4a 44.1 kHz stereo", "opus 48 kHz mono"):
        data = make_sound(*FILES[name], seconds)
        prepared = prepare("audio", 0, data, MediaOptions(audio_rate=16_000))
        assert prepared is not None
        kept = prepared.media[0].data
        ways = {"stored": lambda kept=kept: how(kept), "file": lambda data=data: how(data)}
        rows.append(line(f"{seconds} s, {name}", against(ways, rounds)))
    return rows


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "")
    options.add_argument("--seconds", type=int, default=300)
    args = options.parse_args()
    torch.set_num_threads(1)
    rows, results = compare(args.rounds)
    print(machine())
    print(table(["what", "first", "second", "second against first"], rows))
    print(table(["sound", "first", "second", "second against first"], stored(args.rounds, 30)))
    decoded, more = decoding(args.rounds, args.seconds)
    print(table([f"{args.seconds} s of sound to 16 kHz", "times real time (CPU)", "30 s clip, CPU ms"], decoded))
    save(args.json, {**results, **more})


if __name__ == "__main__":
    main()
