"""The audio encoders of transformers: how each family is fed, what it returns, and how many tokens that is.

One row a family in ``FAMILIES``. Encoders that take only a window of fixed length return features of the silence behind
a sound too; those are dropped, so that a sound costs tokens for its own length. Features of patches over time and
frequency are put in the order of time.

Legend: ``W`` windows, ``S`` samples, ``T`` frames, ``N`` tokens, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_scale.towers.audio_base import tokens_valid
from llava_scale.towers.fbank import Fbank

Settings = Mapping[str, Any]
"""Fields of a model's config or of a feature extractor."""

_HOP = 160
_WHISPER_FRAMES = 3_000
_AST_BANK = Fbank(window="hanning", scale=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of encoders.

    Attributes:
        module: Module of transformers that defines the model.
        model: Its class.
        extractor: Class of the feature extractor.
        defaults: The extractor's settings by the model's config, for checkpoints that come without.
        seconds: Longest window.
        min_samples: Shortest window, by the model's config.
        features: (extractor, samples) -> features of one window, ``(T, ...)``.
        tokens: (model's config, samples of windows) -> tokens of each.
        run: (model, features ``(W, T, ...)``, samples of windows, tokens of windows) -> ``(W, N, D)``.
        width: Width of the features by the model's config.
        part: Prefix of the encoder's weights in checkpoints that hold more, as a regular expression; or none.
    """

    module: str
    model: str
    extractor: str
    defaults: Callable[[Settings], dict[str, Any]]
    seconds: float
    min_samples: Callable[[Settings], int]
    features: Callable[[Any, Tensor], Tensor]
    tokens: Callable[[Settings, Tensor], Tensor]
    run: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    width: Callable[[Settings], int]
    part: str = ""


def _ceil_div(x: Tensor, divisor: int) -> Tensor:
    return (x + divisor - 1).div(divisor, rounding_mode="floor")


def _extract(extractor: Any, wave: Tensor, field: str, **how: Any) -> Tensor:
    found = extractor(wave.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt", **how)
    values: Tensor = found[field][0]
    return values.float()


def _mel(config: Settings) -> dict[str, Any]:
    return {"feature_size": config["num_mel_bins"]}


# Whisper and what was built on it: 3,000 mel frames of 30 s.


def _whisper_features(extractor: Any, wave: Tensor) -> Tensor:
    return _extract(extractor, wave, "input_features", padding="max_length").T


def _whisper_tokens(config: Settings, lengths: Tensor) -> Tensor:
    return _ceil_div(lengths, 2 * _HOP).clamp(max=config["max_source_positions"])


def _whisper_run(model: Any, values: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
    hidden: Tensor = model(values.transpose(1, 2).to(model.dtype)).last_hidden_state
    return hidden


def _pooled_tokens(config: Settings, lengths: Tensor) -> Tensor:
    """Two convolutions' and a pooling's worth: 25 a second."""
    return _ceil_div(_ceil_div(lengths, _HOP), 2).div(2, rounding_mode="floor")


def _qwen2_audio_run(model: Any, values: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
    heard = tokens_valid(_ceil_div(_ceil_div(lengths, _HOP), 2), model.config.max_source_positions)
    hidden_keys = torch.zeros(heard.shape, dtype=model.dtype, device=values.device).masked_fill_(~heard, -torch.inf)
    mask = hidden_keys[:, None, None].expand(-1, 1, heard.shape[1], -1)
    hidden: Tensor = model(values.transpose(1, 2), attention_mask=mask).last_hidden_state
    return hidden


def _flamingo_run(model: Any, values: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
    mask = tokens_valid(_ceil_div(lengths, _HOP), values.shape[1])
    features = values.transpose(1, 2).to(model.dtype)
    hidden: Tensor = model(features, input_features_mask=mask).last_hidden_state
    return hidden


def _omni_features(extractor: Any, wave: Tensor) -> Tensor:
    whole = functional.pad(wave, (0, -len(wave) % _HOP))
    return _extract(extractor, whole, "input_features", padding=True).T


def _omni_run(model: Any, values: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
    frames = _ceil_div(lengths, _HOP)
    packed = values[tokens_valid(frames, values.shape[1])].T.to(model.dtype)
    flat = model(packed, feature_lens=frames).last_hidden_state
    padded: Tensor = flat.new_zeros(len(tokens), int(tokens.max()), flat.shape[-1])
    padded[tokens_valid(tokens, padded.shape[1])] = flat
    return padded


# wav2vec 2.0 and its kin: the samples themselves.


def _wave_features(extractor: Any, wave: Tensor) -> Tensor:
    return _extract(extractor, wave, "input_values")


def _conv_tokens(config: Settings, lengths: Tensor) -> Tensor:
    for kernel, stride in zip(config["conv_kernel"], config["conv_stride"], strict=True):
        lengths = (lengths - kernel).div(stride, rounding_mode="floor") + 1
    return lengths


def _conv_field(config: Settings) -> int:
    field = 1
    for kernel, stride in zip(reversed(config["conv_kernel"]), reversed(config["conv_stride"]), strict=True):
        field = (field - 1) * stride + kernel
    return field


def _by_length(model: Any, values: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
    """Windows of equal length together, without padding: padding changes the features of these models."""
    parts: dict[int, Tensor] = {}
    for length in sorted(set(lengths.tolist())):
        rows = (lengths == length).nonzero()[:, 0]
        hidden = model(values[rows, :length].to(model.dtype)).last_hidden_state
        parts |= dict(zip(rows.tolist(), hidden, strict=True))
    widest = max(len(part) for part in parts.values())
    padded = [functional.pad(parts[row], (0, 0, 0, widest - len(parts[row]))) for row in range(len(values))]
    return torch.stack(padded)


# Mel frames of any number, with a mask.


def _bert_features(extractor: Any, wave: Tensor) -> Tensor:
    frames = 1 + (len(wave) - 400) // _HOP
    return _extract(extractor, wave, "input_features")[: frames // 2]


def _bert_tokens(config: Settings, lengths: Tensor) -> Tensor:
    return ((lengths - 400).div(_HOP, rounding_mode="floor") + 1).div(2, rounding_mode="floor")


def _masked_run(model: Any, values: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
    mask = tokens_valid(tokens, values.shape[1])
    hidden: Tensor = model(values.to(model.dtype), attention_mask=mask.long()).last_hidden_state
    return hidden


def _parakeet_features(extractor: Any, wave: Tensor) -> Tensor:
    return _extract(extractor, wave, "input_features")[: len(wave) // _HOP]


def _parakeet_tokens(config: Settings, lengths: Tensor) -> Tensor:
    frames = lengths.div(_HOP, rounding_mode="floor")
    kernel, stride = config["subsampling_conv_kernel_size"], config["subsampling_conv_stride"]
    for _ in range(int(config["subsampling_factor"]).bit_length() - 1):
        frames = (frames + (kernel - 1) // 2 * 2 - kernel).div(stride, rounding_mode="floor") + 1
    return frames


def _parakeet_run(model: Any, values: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
    mask = tokens_valid(lengths.div(_HOP, rounding_mode="floor"), values.shape[1])
    hidden: Tensor = model(values.to(model.dtype), attention_mask=mask).last_hidden_state
    return hidden


# Patches over time and frequency.


def _ast_features(extractor: Any, wave: Tensor) -> Tensor:
    bank = _AST_BANK(wave)
    bank = functional.pad(bank, (0, 0, 0, extractor.max_length - len(bank)))
    normalised: Tensor = (bank - extractor.mean) / (2 * extractor.std)
    return normalised


def _ast_grid(config: Settings) -> tuple[int, int]:
    """Patches over frequency and over time."""
    patch = config["patch_size"]
    across = (config["num_mel_bins"] - patch) // config["frequency_stride"] + 1
    return across, (config["max_length"] - patch) // config["time_stride"] + 1


def _ast_tokens(config: Settings, lengths: Tensor) -> Tensor:
    across, along = _ast_grid(config)
    frames = (lengths - 400).div(_HOP, rounding_mode="floor") + 1
    heard = (frames - config["patch_size"]).div(config["time_stride"], rounding_mode="floor") + 1
    counted: Tensor = heard.clamp(1, along) * across
    return counted


def _ast_run(model: Any, values: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
    hidden = model(values.to(model.dtype)).last_hidden_state[:, 2:]  # behind the class and distillation tokens
    patches: Tensor = hidden.unflatten(1, _ast_grid(model.config.to_dict())).transpose(1, 2).flatten(1, 2)
    return patches


def _clap_features(extractor: Any, wave: Tensor) -> Tensor:
    channels = _extract(extractor, wave, "input_features", max_length=extractor.nb_max_samples)
    return channels.transpose(0, 1)  # time first


def _clap_grid(config: Settings) -> tuple[int, int]:
    """Features over frequency and over time."""
    ratio = config["spec_size"] // config["num_mel_bins"]
    side = config["spec_size"] // config["patch_stride"][0] // 2 ** (len(config["depths"]) - 1)
    return side // ratio, side * ratio


def _clap_tokens(config: Settings, lengths: Tensor) -> Tensor:
    across, along = _clap_grid(config)
    return _ceil_div(lengths * along, 480_000).clamp(1, along) * across


def _clap_run(model: Any, values: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
    fits = torch.zeros(len(values), 1, dtype=torch.bool, device=values.device)
    hidden = model(values.transpose(1, 2).to(model.dtype), is_longer=fits).last_hidden_state
    patches: Tensor = hidden.permute(0, 3, 2, 1).flatten(1, 2)
    return patches


def _of(*keys: str) -> Callable[[Settings], int]:
    return lambda config: int(next(config[key] for key in keys if key in config))


def _exactly(samples: int) -> Callable[[Settings], int]:
    return lambda config: samples


def _whisper_kin(module: str, model: str, part: str, **how: Any) -> Family:
    row: dict[str, Any] = {
        "extractor": "WhisperFeatureExtractor",
        "defaults": _mel,
        "seconds": _WHISPER_FRAMES * _HOP / 16_000,
        "min_samples": _exactly(3 * _HOP),
        "features": _whisper_features,
        "tokens": _pooled_tokens,
        "width": _of("d_model", "hidden_size"),
    }
    return Family(module=module, model=model, part=part, **(row | how))


def _wave_kin(module: str, model: str) -> Family:
    return Family(
        module=module,
        model=model,
        extractor="Wav2Vec2FeatureExtractor",
        defaults=lambda config: {"do_normalize": config.get("feat_extract_norm") != "group"},
        seconds=30.0,
        min_samples=_conv_field,
        features=_wave_features,
        tokens=_conv_tokens,
        run=_by_length,
        width=_of("hidden_size"),
    )


FAMILIES: dict[str, Family] = {
    "whisper": _whisper_kin(
        "whisper", "WhisperEncoder", r"^(model\.)?encoder\.", tokens=_whisper_tokens, run=_whisper_run
    ),
    "qwen2_audio_encoder": _whisper_kin(
        "qwen2_audio", "Qwen2AudioEncoder", r"^(model\.)?audio_tower\.", run=_qwen2_audio_run
    ),
    "audioflamingo3_encoder": _whisper_kin(
        "audioflamingo3", "AudioFlamingo3Encoder", r"^(model\.)?audio_tower\.", run=_flamingo_run
    ),
    "qwen2_5_omni_audio_encoder": _whisper_kin(
        "qwen2_5_omni",
        "Qwen2_5OmniAudioEncoder",
        r"^(thinker\.)?audio_tower\.",
        features=_omni_features,
        run=_omni_run,
        width=_of("output_dim"),
    ),
    "wav2vec2": _wave_kin("wav2vec2", "Wav2Vec2Model"),
    "hubert": _wave_kin("hubert", "HubertModel"),
    "wavlm": _wave_kin("wavlm", "WavLMModel"),
    "data2vec-audio": _wave_kin("data2vec", "Data2VecAudioModel"),
    "unispeech": _wave_kin("unispeech", "UniSpeechModel"),
    "unispeech-sat": _wave_kin("unispeech_sat", "UniSpeechSatModel"),
    "wav2vec2-bert": Family(
        module="wav2vec2_bert",
        model="Wav2Vec2BertModel",
        extractor="SeamlessM4TFeatureExtractor",
        defaults=lambda config: {},
        seconds=30.0,
        min_samples=_exactly(400 + 2 * _HOP),
        features=_bert_features,
        tokens=_bert_tokens,
        run=_masked_run,
        width=_of("hidden_size"),
    ),
    "parakeet_encoder": Family(
        module="parakeet",
        model="ParakeetEncoder",
        extractor="ParakeetFeatureExtractor",
        defaults=_mel,
        seconds=30.0,
        min_samples=_exactly(8 * _HOP),
        features=_parakeet_features,
        tokens=_parakeet_tokens,
        run=_parakeet_run,
        width=_of("hidden_size"),
        part=r"^encoder\.",
    ),
    "audio-spectrogram-transformer": Family(
        module="audio_spectrogram_transformer",
        model="ASTModel",
        extractor="ASTFeatureExtractor",
        defaults=lambda config: {"max_length": config["max_length"]},
        seconds=10.255,
        min_samples=_exactly(400 + 15 * _HOP),
        features=_ast_features,
        tokens=_ast_tokens,
        run=_ast_run,
        width=_of("hidden_size"),
    ),
    "clap_audio_model": Family(
        module="clap",
        model="ClapAudioModel",
        extractor="ClapFeatureExtractor",
        defaults=lambda config: {} if config["enable_fusion"] else {"truncation": "rand_trunc"},
        seconds=10.0,
        min_samples=_exactly(480),
        features=_clap_features,
        tokens=_clap_tokens,
        run=_clap_run,
        width=lambda config: int(config["patch_embeds_hidden_size"] * 2 ** (len(config["depths"]) - 1)),
        part=r"^audio_model\.",
    ),
}
"""Families by the ``model_type`` of the encoder's config."""


def build(family: Family, config: Any) -> nn.Module:
    """The encoder with random weights; parts that only pre-training uses are left out."""
    model: nn.Module = model_class(family)._from_config(config)
    return model


def model_class(family: Family) -> Any:
    """The class of transformers, imported on demand: all of them together take seconds."""
    from importlib import import_module

    return getattr(import_module(f"transformers.models.{family.module}.modeling_{_file(family)}"), family.model)


def _file(family: Family) -> str:
    return "data2vec_audio" if family.module == "data2vec" else family.module
