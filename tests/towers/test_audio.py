from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    AudioFlamingo3EncoderConfig,
    ClapAudioConfig,
    ClapConfig,
    ClapModel,
    CLIPConfig,
    Data2VecAudioConfig,
    HubertConfig,
    ParakeetEncoderConfig,
    Qwen2AudioEncoderConfig,
    UniSpeechConfig,
    UniSpeechSatConfig,
    Wav2Vec2BertConfig,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig

from llava_scale.errors import CheckpointError, ConfigError, SampleError, ShapeError
from llava_scale.towers.audio import (
    TransformersAudioTower,
    audio_config_of,
    join_features,
    load_audio_tower,
)
from llava_scale.towers.audio_families import FAMILIES

WHISPER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
LAYERS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
WAVES = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, **LAYERS}
CLAP = {"patch_embeds_hidden_size": 16, "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 8], "hidden_size": 128}
DECODER = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "vocab_size": 50}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
CONFIGS = {
    "whisper": WhisperConfig(num_mel_bins=80, **WHISPER, **DECODER, **SPECIAL),
    "qwen2_audio": Qwen2AudioEncoderConfig(num_mel_bins=128, **WHISPER),
    "audio flamingo 3": AudioFlamingo3EncoderConfig(num_mel_bins=128, **LAYERS),
    "qwen2.5-omni": Qwen2_5OmniAudioEncoderConfig(num_mel_bins=128, output_dim=24, **WHISPER),
    "wav2vec2": Wav2Vec2Config(**WAVES),
    "wav2vec2 large": Wav2Vec2Config(feat_extract_norm="layer", do_stable_layer_norm=True, **WAVES),
    "hubert": HubertConfig(**WAVES),
    "wavlm": WavLMConfig(**WAVES),
    "data2vec": Data2VecAudioConfig(**WAVES),
    "unispeech": UniSpeechConfig(**WAVES),
    "unispeech-sat": UniSpeechSatConfig(**WAVES),
    "w2v-bert": Wav2Vec2BertConfig(**LAYERS),
    "parakeet": ParakeetEncoderConfig(num_mel_bins=80, subsampling_conv_channels=8, **LAYERS),
    "ast": ASTConfig(**LAYERS),
    "clap": ClapAudioConfig(**CLAP),
    "clap with fusion": ClapAudioConfig(enable_fusion=True, **CLAP),
}
SECONDS = {"whisper": 50, "qwen2_audio": 25, "audio flamingo 3": 25, "qwen2.5-omni": 25, "parakeet": 12.5}
"""Tokens a second where that is exact for whole seconds."""


@pytest.fixture(scope="module", params=CONFIGS)
def tower(request):
    torch.manual_seed(0)
    built = TransformersAudioTower(CONFIGS[request.param]).eval()
    built.name = request.param
    return built


def sounds(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(length, generator=generator) - 0.5 for length in lengths]


def test_every_family_is_tested():
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


@torch.no_grad()
def test_sounds_of_mixed_lengths_equal_themselves_alone(tower):
    rate = tower.sample_rate
    waves = sounds(int(1.03 * rate), 7, int(2.51 * rate), rate // 3)
    together = tower.encode(join_features([tower.frontend(wave) for wave in waves]))
    alone = [tower.encode(tower.frontend(wave)) for wave in waves]
    assert [len(part) for part in alone] == tower.num_tokens(torch.tensor([len(wave) for wave in waves])).tolist()
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)
    assert together.shape[1] == tower.hidden_size


@torch.no_grad()
def test_predicted_token_counts_are_produced(tower):
    rng = np.random.default_rng(1)
    least = tower.frontend.min_samples
    lengths = [1, least, least + 1, *rng.integers(least, 2 * tower.sample_rate, 6).tolist()]
    for length in lengths:
        assert len(tower.encode(tower.frontend(torch.zeros(length) + 0.01))) == tower.frontend.num_tokens(length)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@torch.no_grad()
def test_a_thousand_predicted_token_counts_are_produced(tower):
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 3 * tower.sample_rate, 1_000).tolist()
    for start in range(0, 1_000, 8):
        part = lengths[start : start + 8]
        windows = join_features([tower.frontend(torch.zeros(length) + 0.01) for length in part])
        _, valid = tower(windows.values, windows.lengths)
        assert valid.sum(1).tolist() == [tower.frontend.num_tokens(length) for length in part]


@torch.no_grad()
def test_long_sounds_are_windows(tower):
    length = int(tower.frontend.window_samples * 1.3)
    (wave,) = sounds(length)
    windows = tower.frontend(wave)
    assert windows.lengths.tolist() == [tower.frontend.window_samples, length - tower.frontend.window_samples]
    assert len(tower.encode(windows)) == tower.frontend.num_tokens(length)
    ten_minutes = 600 * tower.sample_rate
    assert tower.frontend.num_tokens(ten_minutes) == pytest.approx(
        600 * tower.frontend.num_tokens(10 * tower.sample_rate) / 10, rel=0.06
    )


def test_tokens_a_second_are_those_of_the_family(tower):
    if tower.name in SECONDS:
        assert tower.frontend.num_tokens(8 * tower.sample_rate) == SECONDS[tower.name] * 8


@torch.no_grad()
def test_features_follow_the_sound_in_time(tower):
    """A click changes the features around its own time more than far away."""
    rate = tower.sample_rate
    (wave,) = sounds(8 * rate)
    clicked = wave.clone()
    clicked[6 * rate : 6 * rate + rate // 5] = torch.sin(torch.arange(rate // 5) * 0.3)
    change = (tower.encode(tower.frontend(clicked)) - tower.encode(tower.frontend(wave))).norm(dim=1)
    number = len(change)
    assert change[int(0.74 * number) : int(0.79 * number)].mean() > change[: number // 2].mean()


def test_gradients_reach_the_weights_when_tuned_and_frozen_towers_stay_as_they_are(tower):
    windows = tower.frontend(sounds(tower.sample_rate)[0])
    tower.requires_grad_(False).train()
    assert not tower.model.training
    assert torch.equal(tower.encode(windows), tower.encode(windows))
    tower.requires_grad_(True).train()
    assert tower.model.training
    tower.eval()
    tower.encode(windows).square().sum().backward()
    with_gradient = [name for name, parameter in tower.named_parameters() if parameter.grad is not None]
    assert len(with_gradient) > 0.5 * len(list(tower.parameters()))
    tower.zero_grad(set_to_none=True)


@torch.no_grad()
def test_sixteen_bit_weights_take_float32_features(tower):
    windows = tower.frontend(sounds(tower.sample_rate)[0])
    assert windows.values.dtype == torch.float32
    half = TransformersAudioTower(CONFIGS[tower.name]).to(torch.bfloat16).eval()
    assert half.encode(windows).dtype == torch.bfloat16


def test_the_frontend_travels_to_workers(tower):
    frontend = pickle.loads(pickle.dumps(tower.frontend))
    assert frontend == tower.frontend
    assert frontend.fingerprint() == tower.frontend.fingerprint()
    (wave,) = sounds(tower.sample_rate)
    torch.testing.assert_close(frontend(wave).values, tower.frontend(wave).values)


def test_features_are_those_of_the_official_extractors():
    (wave,) = sounds(16_000 * 3)
    for name, extractor in (("whisper", WhisperFeatureExtractor(feature_size=80)), ("ast", ASTFeatureExtractor())):
        mine = TransformersAudioTower(CONFIGS[name]).frontend(wave).values[0]
        official = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt")
        expected = official["input_features"][0].T if name == "whisper" else official["input_values"][0]
        # Without torchaudio, transformers' own filter bank stands in for Kaldi's: 1.6e-2 off.
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5 if name == "whisper" else 2e-2)


def test_sounds_without_samples_and_unknown_encoders_are_refused(tower):
    with pytest.raises(SampleError, match="no samples"):
        tower.frontend(torch.zeros(0))
    with pytest.raises(ConfigError, match="no audio tower for 'clip'"):
        TransformersAudioTower(CLIPConfig())


def test_an_encoder_that_breaks_its_promise_is_an_error():
    broken = TransformersAudioTower(CONFIGS["wav2vec2"]).eval()
    windows = broken.frontend(sounds(16_000)[0])
    broken.model = _Short(broken.model)
    with pytest.raises(ShapeError, match="returned"):
        broken(windows.values, windows.lengths)


class _Short(torch.nn.Module):
    """Loses the last feature."""

    dtype = torch.float32

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        found = self.inner(*args, **kwargs)
        found.last_hidden_state = found.last_hidden_state[:, :-1]
        return found


def test_a_shorter_window_may_be_chosen():
    short = TransformersAudioTower(CONFIGS["wav2vec2"], window_seconds=5.0)
    assert short.max_seconds == 5.0
    assert short.frontend(torch.zeros(16_000 * 12)).lengths.tolist() == [80_000, 80_000, 32_000]


def saved_models(folder):
    """Checkpoints of whole models around the encoder, and the encoder's own features for a sound."""
    torch.manual_seed(0)
    whisper = WhisperModel(CONFIGS["whisper"])
    wav2vec2 = Wav2Vec2Model(CONFIGS["wav2vec2"])
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    clap = ClapModel(ClapConfig(audio_config=CONFIGS["clap"].to_dict(), text_config=text, projection_dim=16))
    parts = {"whisper": (whisper, whisper.encoder), "wav2vec2": (wav2vec2, wav2vec2), "clap": (clap, clap.audio_model)}
    for name, (model, part) in parts.items():
        model.save_pretrained(folder / name)
        yield name, folder / name, part.eval()


@torch.no_grad()
def test_encoders_are_loaded_out_of_larger_models(tmp_path):
    for name, folder, part in saved_models(tmp_path):
        loaded = load_audio_tower(str(folder))
        expected = TransformersAudioTower(audio_config_of(str(folder))).eval()
        expected.model.load_state_dict(part.state_dict())
        windows = loaded.frontend(sounds(loaded.sample_rate)[0])
        assert torch.equal(loaded.encode(windows), expected.encode(windows)), name
        assert not loaded.training


def test_extractor_settings_beside_the_weights_are_used(tmp_path):
    Wav2Vec2Model(CONFIGS["wav2vec2"]).save_pretrained(tmp_path)
    from transformers import Wav2Vec2FeatureExtractor

    (wave,) = sounds(16_000)
    normalised = load_audio_tower(str(tmp_path)).frontend(wave).values
    assert normalised.std() == pytest.approx(float(wave.std()), rel=1e-3)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    normalised = load_audio_tower(str(tmp_path)).frontend(wave).values
    assert normalised.std() == pytest.approx(1.0, abs=1e-2)


def test_checkpoints_that_lack_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    Wav2Vec2Model(CONFIGS["wav2vec2"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layers.0.attention.k_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of Wav2Vec2Model.*k_proj"):
        load_audio_tower(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_audio_tower(str(tmp_path / "missing"))


def test_official_beats_files_are_audio_towers_too():
    from tests.towers.test_beats import FOLDER

    assert load_audio_tower(str(FOLDER / "beats_tiny_prenorm.pt")).max_seconds == 10.0
