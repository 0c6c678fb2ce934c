from __future__ import annotations

import io
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_scale.data.toy.encoding import encode_video
from llava_scale.errors import ConfigError
from llava_scale.viz.token_maps import MergeMap, open_source
from llava_scale.viz.tokens import draw_attention, draw_merges, draw_windows

pytest.importorskip("matplotlib")


@cache
def looker(text):
    return open_source(recipe(), ["model.preset=tiny", "model.image_size=96", f"model.compressor={text}"])


@cache
def recipe():
    path = Path(tempfile.mkdtemp()) / "recipe.yaml"
    path.write_text("name: figures\n")
    return path


@pytest.fixture
def picture_file(tmp_path):
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    pixels[:20, :20], pixels[25:, 10:30] = (200, 30, 30), (30, 30, 200)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def frames_of(looking, path, num_frames=1):
    picture = looking.picture(path)
    return torch.cat([picture.roll(shift, dims=3) for shift in range(0, 24 * num_frames, 24)])


def size_of(png):
    return Image.open(io.BytesIO(png)).size


def test_merge_maps_are_the_compressors_own_at_each_ratio(picture_file):
    looking = looker("{type: token_merging, ratio: 0.5}")
    frames = frames_of(looking, picture_file)
    maps = looking.merges(frames, [0.25, 0.75])
    assert [len(one.anchors) for one in maps] == [12, 4]
    assert [one.title for one in maps] == [
        "token_merging, ratio 0.25: 16 to 12 tokens",
        "token_merging, ratio 0.75: 16 to 4 tokens",
    ]
    own = looking.model.visual_tokens(frames, 1)
    assert own.tokens.shape[1] == 8  # as before
    (as_it_is,) = looking.merges(frames)
    assert as_it_is.group.tolist() == own.group[0].tolist()
    assert as_it_is.anchors.tolist() == own.positions[0].tolist()


@pytest.mark.parametrize(
    "kind", ["random_prune", "uniform_prune", "divprune", "visionzip", "tome", "pixel_shuffle", "pool"]
)
def test_whatever_has_groups_is_drawn(kind, picture_file):
    looking = looker(f"{{type: {kind}}}")
    frames = frames_of(looking, picture_file)
    png = draw_merges(frames.permute(0, 2, 3, 1).numpy(), looking.merges(frames))
    assert size_of(png) == (1240, 700)


def test_clips_tell_how_many_tokens_each_frame_kept(picture_file):
    looking = looker("{type: temporal_prune, ratio: 0.6}")
    frames = frames_of(looking, picture_file, 3)
    maps = looking.merges(frames, [0.3, 0.6])
    assert maps[1].kept_per_frame.tolist()[0] == 16  # the first frame stays whole
    assert maps[1].kept_per_frame.sum() == len(maps[1].anchors) == 20
    width, height = size_of(draw_merges(frames.permute(0, 2, 3, 1).numpy(), maps))
    assert width > height


def test_groups_have_colours_and_dropped_patches_are_dark():
    from llava_scale.viz.tokens import _painted

    picture = np.full((56, 56, 3), 200, dtype=np.uint8)
    merge_map = MergeMap(title="", grid=(1, 2, 2), group=np.array([0, 0, 1, -1]), anchors=np.array([0, 2]))
    shown = _painted(picture, merge_map, 0).astype(int)
    merged, alone, dropped = shown[14, 14], shown[42, 14], shown[42, 42]
    assert np.ptp(merged) > 60
    assert alone.tolist() == [200, 200, 200]
    assert dropped.max() < 80


def test_windows_are_the_compressors_own():
    windows, grid = looker("{type: qformer, num_queries: 3, window: 7}").windows()
    assert grid == (1, 4, 4)
    assert windows == [range(7), range(4, 11), range(9, 16)]
    over_clip, grid = looker("{type: qformer, num_queries: 3, window: 8, scope: clip}").windows(2)
    assert grid == (2, 4, 4)
    assert over_clip[-1] == range(21, 32)
    assert size_of(draw_windows(over_clip, grid)) == (1680, 1080)
    assert size_of(draw_windows([range(3)], (1, 4, 4))) == (1680, 1080)  # tokens that none sees


@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_attention_is_the_modules_own_and_depends_on_the_question(scope, picture_file):
    looking = looker(f"{{type: qformer, num_queries: 3, window: 9, scope: {scope}}}")
    frames = frames_of(looking, picture_file, 2)
    asked, other = (looking.attention(frames, text, frame=1) for text in ("what color is it", "how many circles"))
    assert asked.weights.shape == (8, 3, 4, 4)
    assert asked.layer == 1
    assert not np.allclose(asked.weights, other.weights)
    both = asked.weights + (looking.attention(frames, "what color is it", frame=0).weights if scope == "clip" else 0)
    np.testing.assert_allclose(both.sum(axis=(2, 3)), 1.0, rtol=1e-5)
    png = draw_attention(frames[1].permute(1, 2, 0).numpy(), [asked, other], [0, 2], [1])
    assert size_of(png)[0] > size_of(png)[1]
    assert looking.model.compressor.layers[0].look.recorder is None


def test_checkpoints_are_looked_into_and_their_compressor_exchanged(tmp_path, picture_file):
    looking = looker("{type: token_merging, ratio: 0.5}")
    looking.model.save_pretrained(tmp_path / "model")
    looking.processor.save_pretrained(tmp_path / "model")
    loaded = open_source(tmp_path / "model")
    frames = frames_of(loaded, picture_file)
    assert loaded.merges(frames)[0].group.tolist() == looking.merges(frames)[0].group.tolist()
    other = open_source(tmp_path / "model", ["model.compressor={type: random_prune, ratio: 0.25}"])
    assert other.merges(frames)[0].title == "random_prune, ratio 0.25: 16 to 12 tokens"


def test_a_recipe_with_a_named_tower_needs_no_language_model(tmp_path, picture_file):
    from tests.model.parts import save_tower

    tower = save_tower(tmp_path / "tower")
    (tmp_path / "r.yaml").write_text(
        f"model: {{language_model: not/there, vision_tower: {tower}, compressor: {{type: token_merging, ratio: 0.5}}}}"
    )
    looking = open_source(tmp_path / "r.yaml")
    assert looking.merges(looking.picture(picture_file))[0].title.endswith("16 to 8 tokens")


def test_videos_come_at_equal_distances(tmp_path):
    frames = np.stack([np.full((48, 48, 3), 25 * number, dtype=np.uint8) for number in range(10)])
    (tmp_path / "clip.mp4").write_bytes(encode_video(frames))
    clip = looker("{type: pool}").clip(tmp_path / "clip.mp4", 2)
    assert clip.shape == (2, 3, 96, 96)
    assert clip[0].float().mean() < clip[1].float().mean()


def test_what_cannot_be_shown_is_said(picture_file, tmp_path):
    pool, queries = looker("{type: pool}"), looker("{type: qformer, num_queries: 3, window: 7}")
    frames = frames_of(pool, picture_file)
    with pytest.raises(ConfigError, match="of type pool has no ratio"):
        pool.merges(frames, [0.5])
    with pytest.raises(ConfigError, match="of type pool has no queries"):
        pool.windows()
    with pytest.raises(ConfigError, match="no groups of patches"):
        queries.merges(frames)
    with pytest.raises(ConfigError, match="2 layers and 1 frames, got layer 2"):
        queries.attention(frames, "", layer=2)
    with pytest.raises(ConfigError, match="less than 1, got 1"):
        looker("{type: token_merging, ratio: 0.5}").merges(frames, [1.0])
    with pytest.raises(ConfigError, match="cannot read"):
        pool.picture(tmp_path / "none.png")
    with pytest.raises(ConfigError, match="compresses no tokens"):
        open_source(recipe(), ["model.preset=tiny"])
