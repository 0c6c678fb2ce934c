from __future__ import annotations

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_scale.errors import CheckpointError, ConfigError, SampleError, ShapeError
from llava_scale.towers.audio_base import join_features
from llava_scale.towers.beats import Beats, BeatsTower, official_valid_tokens, relative_buckets
from llava_scale.towers.beats_checkpoint import load_beats, official_checkpoint
from llava_scale.towers.beats_config import BeatsConfig, BeatsFrontend
from tests.towers.loudness import assert_same_loudness

FOLDER = Path(__file__).parent.parent / "data" / "audio"
CHECKPOINTS = ("released_layout", "prenorm", "finetuned")
TINY = BeatsConfig(
    encoder_layers=2,
    encoder_embed_dim=32,
    encoder_ffn_embed_dim=48,
    encoder_attention_heads=4,
    embed_dim=16,
    layer_norm_first=False,
    deep_norm=True,
    conv_bias=False,
    conv_pos=16,
    conv_pos_groups=4,
    relative_position_embedding=True,
    num_buckets=32,
    max_distance=64,
    gru_rel_pos=True,
)


def arrays(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


INPUT = arrays("beats_input")
WAVES = INPUT["wave_i16"].float() / 32768
FEATURES = INPUT["fbank_norm"]
"""The official ones: what a processor rounds differently in near-empty filters is not the model's difference."""
OFFICIAL_MEAN, OFFICIAL_DEVIATION = 15.41663, 6.55582
CLIPS = [wave[:length] for wave, length in zip(WAVES, INPUT["lengths"].tolist(), strict=True)]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def official(request):
    """A loaded checkpoint, what the official code computes with it, and its forward."""
    tower = load_beats(FOLDER / f"beats_tiny_{request.param}.pt")
    run = tower.model.probabilities if request.param == "finetuned" else tower.model
    return tower, arrays(f"beats_tiny_{request.param}"), run


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return BeatsTower(TINY).eval()


def sounds(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(length, generator=generator) - 0.5 for length in lengths]


def close(found, expected, atol=2e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_features_equal_the_official_ones():
    found, expected = (
        features * 2 * OFFICIAL_DEVIATION + OFFICIAL_MEAN for features in (BeatsFrontend().features(WAVES), FEATURES)
    )
    assert_same_loudness(found, expected)


@torch.no_grad()
def test_outputs_equal_the_official_ones_with_its_mask_and_without(official):
    _, expected, run = official
    valid = official_valid_tokens(INPUT["padding_mask"], 198, 96)
    assert torch.equal(valid, ~expected["patch_padding_mask"])
    close(run(FEATURES, valid), expected["out_masked"])
    close(run(FEATURES), expected["out_nomask"])


@torch.no_grad()
def test_clips_of_a_padded_batch_equal_the_official_clips_alone(official):
    tower, expected, run = official
    batch = join_features([tower.frontend(clip) for clip in CLIPS])
    for row, (values, clip) in enumerate(zip(FEATURES, CLIPS, strict=True)):
        num_frames = tower.frontend.bank.num_frames(len(clip))
        batch.values[row, :num_frames] = values[:num_frames]
    x, valid = tower(batch.values, batch.lengths)
    assert valid.sum(1).tolist() == [96, 64, 24]
    if run == tower.model:
        for number in (0, 1, 2):
            if f"alone{number}" in expected:
                close(x[number][valid[number]][None], expected[f"alone{number}"])
    else:
        close(run(batch.values, valid)[2:], expected["alone2"])


@torch.no_grad()
def test_the_official_mask_does_not_keep_clips_apart():
    tower = load_beats(FOLDER / "beats_tiny_released_layout.pt")
    valid = official_valid_tokens(INPUT["padding_mask"], 198, 96)
    assert valid.sum(1).tolist() == [96, 65, 30]
    x = tower.model(tower.frontend.features(WAVES), valid)
    assert (x[2, :24] - arrays("beats_tiny_released_layout")["alone2"][0]).abs().max() > 0.5


def test_gradients_equal_the_official_ones_with_its_decay_per_layer():
    model = load_beats(FOLDER / "beats_tiny_released_layout.pt").model
    out = model(FEATURES, official_valid_tokens(INPUT["padding_mask"], 198, 96))
    (out * torch.cos(0.01 * torch.arange(out.numel())).view_as(out)).sum().backward()
    named = dict(model.named_parameters())
    expected = arrays("beats_tiny_grads")
    assert len(expected) == 8
    for name, gradient in expected.items():
        assert (named[name].grad - gradient).norm() / gradient.norm() < 1e-4, name


def test_relative_positions_fall_into_the_official_buckets():
    expected = arrays("beats_misc")
    buckets = relative_buckets(expected["rel_pos"], num_buckets=320, max_distance=800)
    assert torch.equal(buckets, expected["bucket_320_800"])


@torch.no_grad()
def test_the_position_bias_equals_the_official_one():
    expected = arrays("beats_misc")
    attention = Beats(replace(TINY, num_buckets=320, max_distance=800)).encoder.layers[0].self_attn
    attention.relative_attention_bias.weight.copy_(expected["relative_weight"])
    assert torch.equal(attention.position_bias(24), expected["bias_24"])


def test_the_released_model_has_the_released_names_shapes_and_size():
    layout = json.loads((FOLDER / "beats_released_layout.json").read_text())
    with torch.device("meta"):
        tower = BeatsTower(BeatsConfig.from_dict(layout["released_cfg"]))
    weights = official_checkpoint(tower)["model"]
    assert {name: list(value.shape) for name, value in weights.items()} == layout["released_state_dict"]
    assert sum(parameter.numel() for parameter in tower.parameters()) == layout["released_params"]
    assert tower.num_tokens(torch.tensor([160_000, 480_000])).tolist() == [496, 3 * 496]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_survive_a_round_trip(name, tmp_path):
    original = torch.load(FOLDER / f"beats_tiny_{name}.pt", weights_only=True)
    written = official_checkpoint(load_beats(FOLDER / f"beats_tiny_{name}.pt"))
    assert written["model"].keys() == original["model"].keys()
    assert all(torch.equal(value, original["model"][key]) for key, value in written["model"].items())
    assert original["cfg"].items() <= written["cfg"].items()
    assert written.get("label_dict") == original.get("label_dict")


def test_unknown_fields_of_the_cfg_and_foreign_prefixes_are_kept_apart(tmp_path):
    content = torch.load(FOLDER / "beats_tiny_prenorm.pt", weights_only=True)
    content["cfg"]["mask_prob"] = 0.75
    content["model"] = {f"model.audio_tower.{name}": value for name, value in content["model"].items()}
    torch.save(content, tmp_path / "beats.pt")
    tower = load_beats(tmp_path / "beats.pt")
    assert tower.model.config.extra == {"mask_prob": 0.75}
    assert official_checkpoint(tower)["cfg"]["mask_prob"] == 0.75


def break_cfg(content):
    del content["cfg"]


def break_flag(content):
    del content["cfg"]["deep_norm"]


def break_weight(content):
    del content["model"]["encoder.layers.1.fc1.bias"]


def break_name(content):
    content["model"]["encoder.layers.9.fc1.bias"] = torch.zeros(1)


def break_shape(content):
    content["model"]["encoder.layers.1.fc1.bias"] = torch.zeros(3)


def break_table(content):
    content["model"]["encoder.layers.1.self_attn.relative_attention_bias.weight"] += 1


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (break_cfg, "must hold 'cfg' and 'model'"),
        (break_flag, "deep_norm"),
        (break_weight, r"lacks encoder\.layers\.1\.fc1\.bias"),
        (break_name, r"has unknown encoder\.layers\.9\.fc1\.bias"),
        (break_shape, "size mismatch for encoder.layers.1.fc1.bias"),
        (break_table, "share one table"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(breaking, message, tmp_path):
    content = torch.load(FOLDER / "beats_tiny_released_layout.pt", weights_only=True)
    content["model"] = {name: value.clone() for name, value in content["model"].items()}
    breaking(content)
    torch.save(content, tmp_path / "beats.pt")
    with pytest.raises(CheckpointError, match=message):
        load_beats(tmp_path / "beats.pt")


class Evil:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def test_files_that_carry_code_or_are_no_checkpoint_are_refused(tmp_path, capsys):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"cfg": Evil(), "model": {}}))
    (tmp_path / "torn.pt").write_bytes((FOLDER / "beats_tiny_prenorm.pt").read_bytes()[:5000])
    for name in ("evil.pt", "torn.pt", "missing.pt"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_beats(tmp_path / name)
    assert capsys.readouterr().out == ""


@torch.no_grad()
@given(lengths=st.lists(st.integers(1, 40_000), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_sounds_of_mixed_lengths_equal_themselves_alone(tiny, lengths):
    waves = sounds(*lengths)
    together = tiny.encode(join_features([tiny.frontend(wave) for wave in waves]))
    alone = [tiny.encode(tiny.frontend(wave)) for wave in waves]
    close(together, torch.cat(alone), atol=1e-4)


@torch.no_grad()
def test_predicted_token_counts_are_produced():
    rng = np.random.default_rng(0)
    tower = BeatsTower(replace(TINY, encoder_layers=1), window_seconds=2.0).eval()
    lengths = [1, 399, 400, 2_799, 2_800, 5_359, 5_360, 31_999, 32_000, 32_001, *rng.integers(1, 90_000, 990).tolist()]
    predicted = tower.num_tokens(torch.tensor(lengths)).tolist()
    for length, promised in zip(lengths, predicted, strict=True):
        windows = tower.frontend(torch.zeros(length))
        counts = tower.frontend.window_tokens(windows.lengths)
        assert int(counts.sum()) == promised > 0
        assert windows.values.shape[1] // 16 * 8 == int(counts.max())
    for length in lengths[:12]:
        assert len(tower.encode(tower.frontend(torch.zeros(length)))) == tower.frontend.num_tokens(length)


@torch.no_grad()
def test_long_sounds_are_windows_of_ten_seconds(tiny):
    (wave,) = sounds(16_000 * 23)
    windows = tiny.frontend(wave)
    assert windows.lengths.tolist() == [160_000, 160_000, 48_000]
    parts = [tiny.encode(tiny.frontend(part)) for part in wave.split(160_000)]
    close(tiny.encode(windows), torch.cat(parts), atol=1e-4)
    assert tiny.frontend.num_tokens(16_000 * 600) == 60 * 496
    assert tiny.max_seconds == 10.0


@torch.no_grad()
def test_sounds_below_one_patch_are_filled_up_with_silence(tiny):
    (wave,) = sounds(1_600)
    assert tiny.frontend.num_tokens(1_600) == 8
    filled = torch.cat([wave, torch.zeros(1_200)])
    close(tiny.encode(tiny.frontend(wave)), tiny.encode(tiny.frontend(filled)))


def test_sounds_without_samples_are_refused(tiny):
    for ask in (lambda: tiny.frontend(torch.zeros(0)), lambda: tiny.frontend.num_tokens(0)):
        with pytest.raises(SampleError, match="no samples"):
            ask()


def test_stereo_is_refused(tiny):
    with pytest.raises(ShapeError, match="one channel"):
        tiny.frontend(torch.zeros(2, 16_000))


@torch.no_grad()
def test_a_clip_without_any_valid_token_stays_finite(tiny):
    features = tiny.frontend.features(torch.stack(sounds(8_000, 8_000)))
    valid = torch.tensor([[True] * 24, [False] * 24])
    assert tiny.model(features, valid).isfinite().all()


def test_a_frozen_tower_stays_in_evaluation_mode_and_a_tuned_one_drops_layers():
    torch.manual_seed(0)
    tower = BeatsTower(replace(TINY, encoder_layerdrop=1.0, dropout=0.5))
    windows = tower.frontend(sounds(8_000)[0])
    tower.requires_grad_(False).train()
    assert torch.equal(tower.encode(windows), tower.encode(windows))
    tower.requires_grad_(True).train()
    assert not torch.equal(tower.encode(windows), tower.encode(windows))


def test_sixteen_bit_weights_take_float32_features(tiny):
    tower = BeatsTower(TINY).to(torch.bfloat16).eval()
    tower.load_state_dict(tiny.state_dict())
    windows = tiny.frontend(sounds(16_000)[0])
    assert windows.values.dtype == torch.float32
    x = tower.encode(windows)
    assert x.dtype == torch.bfloat16
    assert (x.float() - tiny.encode(windows)).abs().mean() < 0.05


def test_the_frontend_travels_to_workers_and_tells_its_settings_apart(tiny):
    frontend = pickle.loads(pickle.dumps(tiny.frontend))
    assert frontend == tiny.frontend
    assert BeatsFrontend(80_000).fingerprint() != frontend.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"encoder_attention_heads": 5},
        {"activation_fn": "glu"},
        {"layer_norm_first": True},
        {"relative_position_embedding": False},
    ],
)
def test_configs_that_contradict_themselves_are_refused(change):
    with pytest.raises(ConfigError):
        replace(TINY, **change)


def test_classes_of_a_pre_trained_checkpoint_are_refused(tiny):
    with pytest.raises(ConfigError, match="only pre-trained"):
        tiny.model.probabilities(torch.zeros(1, 16, 128))


def test_a_cfg_goes_through_a_plain_dict():
    assert BeatsConfig.from_dict({key: value for key, value in asdict(TINY).items() if key != "extra"}) == TINY
