from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from llava_scale.data.media import decode_image
from llava_scale.errors import ConfigError, SampleError, ShapeError
from llava_scale.model import LlavaScaleProcessor
from llava_scale.model.presets import TINY
from llava_scale.types import MediaInfo, Turn

SIDE = TINY.image_size
ROWS = SIDE // TINY.patch_size
TOKENS = ROWS * ROWS


@pytest.fixture
def processor(tiny):
    return tiny[1]


def photo(width=30, height=50):
    """A picture without symmetry."""
    ramp = np.arange(width * height * 3, dtype=np.uint32).reshape(height, width, 3) * 7 % 251
    return Image.fromarray(ramp.astype(np.uint8))


def as_png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def test_each_placeholder_becomes_the_tokens_of_its_picture(processor):
    inputs = processor("what is <image> ?", images=photo())
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == processor.image_num_tokens == TOKENS
    assert inputs["attention_mask"].all()
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)
    assert inputs["pixel_values"].dtype == torch.uint8
    plain = [token for token in ids if token != processor.image_token_id]
    assert plain == processor.tokenizer("what is  ?", add_special_tokens=False)["input_ids"]


def test_prompts_of_unequal_length_are_padded_on_the_left(processor):
    inputs = processor(["yes", "what color is this ?"])
    short, long = inputs["attention_mask"].tolist()
    padding = len(long) - sum(short)
    assert padding > 0
    assert short == [0] * padding + [1] * sum(short)
    assert inputs["input_ids"][0, :padding].tolist() == [processor.tokenizer.pad_token_id] * padding
    assert "pixel_values" not in inputs


def test_a_picture_may_come_in_any_form(processor, tmp_path):
    picture = photo()
    array = np.array(picture)
    path = tmp_path / "photo.png"
    path.write_bytes(as_png(picture))
    expected = processor.image_transform(as_png(picture))
    assert torch.equal(decode_image(as_png(picture), max_pixels=10**6).permute(1, 2, 0), torch.from_numpy(array))
    forms = [picture, path, str(path), as_png(picture), array, torch.from_numpy(array).permute(2, 0, 1)]
    pixels = processor("<image>" * len(forms), images=forms)["pixel_values"]
    assert all(torch.equal(value, expected) for value in pixels)


def test_pillow_modes_follow_the_rules_of_decoding(processor):
    transparent = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert processor("<image>", images=transparent)["pixel_values"].unique().tolist() == [255]
    for mode in ("L", "P", "CMYK", "1", "LA", "HSV"):
        assert processor("<image>", images=photo().convert("RGB").convert(mode))["pixel_values"].shape == (
            1,
            3,
            SIDE,
            SIDE,
        )


def test_padding_has_the_mean_colour_of_the_tower(processor):
    pixels = processor("<image>", images=Image.new("RGB", (10, 64), "black"))["pixel_values"][0]
    assert pixels[:, 0, 0].tolist() == [int(255 * mean) for mean in processor.image_mean]
    assert pixels[:, 24, 24].tolist() == [0, 0, 0]


@pytest.mark.parametrize("images", [None, [photo()], [[photo()], [photo(), photo()]]])
def test_placeholders_and_pictures_must_match(processor, images):
    with pytest.raises(ShapeError, match="2 <image> placeholders, but"):
        processor(["a <image>", "b <image>"], images=images)


def test_nested_pictures_are_taken_in_order(processor):
    flat = [photo(10), photo(20), photo(30)]
    nested = processor(["<image>", "<image><image>"], images=[flat[:1], flat[1:]])
    assert torch.equal(nested["pixel_values"], processor("<image><image><image>", images=flat)["pixel_values"])


@pytest.mark.parametrize(
    "arguments",
    [
        {"truncation": True},
        {"return_tensors": "np"},
        {"padding": False},
        {"padding_side": "right"},
    ],
)
def test_what_it_cannot_do_is_refused(processor, arguments):
    with pytest.raises(ConfigError, match="does not take"):
        processor("hello", **arguments)


def test_text_is_required(processor):
    with pytest.raises(ConfigError, match="needs text"):
        processor(images=photo())


@pytest.mark.parametrize("picture", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), torch.zeros(3, 4, 4)])
def test_pixels_that_are_not_uint8_rgb_are_refused(processor, picture):
    with pytest.raises((ShapeError, ValueError, RuntimeError)):
        processor("<image>", images=picture)


def test_a_damaged_file_is_a_sample_error(processor):
    with pytest.raises(SampleError):
        processor("<image>", images=b"not a picture")


def conversation(picture):
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture},
                {"type": "text", "text": "what color is this ?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "text", "text": "and this ?"}, {"type": "image", "image": picture}]},
    ]


def test_the_chat_template_gives_what_training_saw(processor):
    inputs = processor.apply_chat_template(
        conversation(photo()), tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    turns = [
        Turn("user", "<image>\nwhat color is this ?"),
        Turn("assistant", "red"),
        Turn("user", "and this ?<image>"),
    ]
    expected = processor._expand(processor.chat_encoder.encode_prompt(turns))
    assert inputs["input_ids"][0].tolist() == expected
    assert inputs["pixel_values"].shape == (2, 3, SIDE, SIDE)


def test_conversations_come_in_batches(processor):
    batch = [conversation(photo()), conversation(photo())[:1]]
    inputs = processor.apply_chat_template(
        batch, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (3, 3, SIDE, SIDE)
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [2 * TOKENS, TOKENS]


@pytest.mark.parametrize("template", ["plain", "vicuna_v1", "native"])
def test_a_saved_processor_comes_back_equal(tiny, tmp_path, template):
    _, processor = tiny
    fields = {name: getattr(processor, name) for name in ("image_size", "image_grid", "image_num_tokens", "image_mean")}
    ours = LlavaScaleProcessor(processor.tokenizer, **fields, chat_template_name=template, image_aspect_ratio="resize")
    native = ours.tokenizer.chat_template
    ours.save_pretrained(tmp_path)
    loaded = LlavaScaleProcessor.from_pretrained(tmp_path)
    assert loaded.image_transform == ours.image_transform
    assert loaded.token_counter == ours.token_counter
    assert loaded.chat_template == ours.chat_template
    assert loaded.chat_encoder.fingerprint() == ours.chat_encoder.fingerprint()
    assert loaded.tokenizer.chat_template == native
    assert (tmp_path / "chat_template.jinja").read_text() == ours.chat_template
    assert torch.equal(loaded("a <image>", photo())["input_ids"], ours("a <image>", photo())["input_ids"])


def test_the_counter_is_plain_numbers(processor):
    counter = processor.token_counter
    assert pickle.loads(pickle.dumps(counter)) == counter
    tokens = counter.count(MediaInfo(kind="image", width=640, height=480), step=None)
    assert (tokens.grid, tokens.num_tokens) == ((1, ROWS, ROWS), TOKENS)
    with pytest.raises(SampleError, match="holds audio"):
        counter.count(MediaInfo(kind="audio", duration_s=1.0), step=3)


def test_the_counter_keeps_the_promise_of_the_model(tiny):
    model, processor = tiny
    tokens = model.get_image_features(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8))
    assert tokens.shape[1] == processor.image_num_tokens == model.vision_tower.num_tokens
