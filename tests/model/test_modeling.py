from __future__ import annotations

import pytest
import torch

from llava_scale.errors import ConfigError, ShapeError
from llava_scale.model import row_inputs
from tests.model.parts import packed_row, picture_sample, pictures


@pytest.fixture
def row(tiny):
    """Two samples with a picture and one of text."""
    model, _ = tiny
    samples = [
        picture_sample(model, [5], [7, 8, 9]),
        picture_sample(model, [10, 11], [12, 13]),
        ([20, 21, 22], [20, 21, 22]),
    ]
    return samples, pictures(model, 2)


def alone(samples, pixels, number):
    """Row of one sample of ``row``."""
    return packed_row([samples[number]], pixels[number : number + 1] if number < 2 else None)


def packed_logits(model, row):
    inputs = row_inputs(row)
    del inputs["labels"]
    with torch.no_grad():
        return model(**inputs).logits[0]


def test_the_loss_of_a_row_is_the_mean_over_all_its_supervised_tokens(tiny, row):
    (model, _), (samples, pixels) = tiny, row
    packed = packed_row(samples, pixels)
    assert packed.num_supervised == 3 + 2 + 2  # nothing predicts the first token of the text sample
    sums = [model(**row_inputs(alone(samples, pixels, number)), num_items_in_batch=1).loss for number in range(3)]
    loss = model(**row_inputs(packed)).loss
    assert torch.allclose(loss, sum(sums) / 7, rtol=1e-5)
    scaled = model(**row_inputs(packed), num_items_in_batch=torch.tensor(70)).loss
    assert torch.allclose(scaled, loss / 10, rtol=1e-5)


def test_a_packed_sample_gets_the_loss_that_transformers_computes(tiny, row):
    (model, _), (samples, pixels) = tiny, row
    ids, labels = (torch.tensor(values)[None] for values in samples[0])
    ours = model(**row_inputs(alone(samples, pixels, 0))).loss
    output = model(input_ids=ids, labels=labels, pixel_values=pixels[:1])
    reference = torch.nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:])
    assert torch.allclose(ours, reference, rtol=1e-5)
    assert torch.allclose(output.loss, reference, rtol=1e-5)


def test_changing_one_sample_leaves_its_neighbours_bit_equal(tiny, row):
    (model, _), (samples, pixels) = tiny, row
    borders = packed_row(samples, pixels).cu_seq_lens.tolist()
    before = packed_logits(model, packed_row(samples, pixels))
    other = pixels.clone()
    other[1] = 255 - other[1]
    after = packed_logits(model, packed_row(samples, other))
    assert torch.equal(before[: borders[1]], after[: borders[1]])
    assert not torch.equal(before[borders[1] : borders[2]], after[borders[1] : borders[2]])
    assert torch.equal(before[borders[2] :], after[borders[2] :])


def test_the_loss_does_not_depend_on_the_chunk(tiny, row):
    (model, _), (samples, pixels) = tiny, row
    inputs = row_inputs(packed_row(samples, pixels))
    losses = [float(model(**inputs, loss_chunk=chunk).loss.detach()) for chunk in (1, 3, 2048)]
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert losses[1] == pytest.approx(losses[2], rel=1e-6)


def test_only_supervised_positions_reach_the_head(tiny, row):
    (model, _), (samples, pixels) = tiny, row
    shapes = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, args, _o: shapes.append(args[0].shape[0]))
    output = model(**row_inputs(packed_row(samples, pixels)))
    hook.remove()
    assert shapes == [7]
    assert output.logits is None


def test_training_reaches_every_parameter(tiny, row):
    (model, _), (samples, pixels) = tiny, row
    model.train()
    model(**row_inputs(packed_row(samples, pixels))).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_text_only_row_touches_every_trainable_parameter_with_zero(tiny, row):
    (model, _), (samples, pixels) = tiny, row
    model.train()
    calls = []
    hook = model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    model(**row_inputs(alone(samples, pixels, 2))).loss.backward()
    hook.remove()
    assert not calls
    for part in (model.vision_tower, model.projector):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_a_text_only_row_can_be_trained_on_while_only_the_projector_is_trainable(tiny, row):
    (model, _), (samples, pixels) = tiny, row
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    model(**row_inputs(alone(samples, pixels, 2))).loss.backward()
    assert all(parameter.grad is not None for parameter in model.projector.parameters())
    assert all(parameter.grad is None for parameter in model.vision_tower.parameters())


def test_a_frozen_tower_runs_without_a_graph(tiny):
    model, _ = tiny
    model.vision_tower.requires_grad_(False)
    kept = []
    hook = model.vision_tower.register_forward_hook(lambda _m, _a, output: kept.append(output.requires_grad))
    tokens = model.get_image_features(pictures(model, 1))
    hook.remove()
    assert kept == [False]
    assert tokens.requires_grad


def test_activation_checkpointing_changes_no_gradient(tiny, row):
    (model, _), (samples, pixels) = tiny, row
    model.train()
    inputs = row_inputs(packed_row(samples, pixels))
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        if enable:
            model.gradient_checkpointing_enable()
        model(**inputs).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    model.gradient_checkpointing_disable()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_videos_are_frames_in_the_places_of_their_own_placeholder(tiny):
    model, _ = tiny
    frames = pictures(model, 3)
    as_images, _ = picture_sample(model, [5], [])
    ids = [as_images[0], *as_images[1:] * 3, 7]
    as_video = [model.config.video_token_id if token == model.config.image_token_id else token for token in ids]
    from_images = packed_logits(model, packed_row([(ids, ids)], frames))
    from_video = packed_logits(model, packed_row([(as_video, as_video)], pixel_values_videos=frames))
    assert torch.equal(from_images, from_video)


def test_placeholders_and_pictures_must_match(tiny, row):
    (model, processor), (samples, pixels) = tiny, row
    one = processor.image_num_tokens
    with pytest.raises(ShapeError, match=f"{2 * one} <image> positions, but its images make {one} tokens"):
        model(**row_inputs(packed_row(samples, pixels[:1])))
    with pytest.raises(ShapeError, match=f"{2 * one} <image> positions, but its images make 0 tokens"):
        model(**row_inputs(packed_row(samples)))


def test_packed_rows_take_no_mask_and_no_cache_and_need_positions(tiny, row):
    (model, _), (samples, pixels) = tiny, row
    inputs = row_inputs(packed_row(samples, pixels))
    with pytest.raises(ConfigError, match="no attention_mask and no cache"):
        model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
    with pytest.raises(ConfigError, match="no attention_mask and no cache"):
        model(**inputs, use_cache=True)
    with pytest.raises(ShapeError, match="position_ids that restart"):
        model(**{**inputs, "position_ids": None})


def test_inputs_embeds_replace_text_but_not_pictures(tiny):
    model, _ = tiny
    ids = torch.tensor([[5, 6, 7]])
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)
    with pytest.raises(ShapeError, match="exactly one of"):
        model(input_ids=ids, inputs_embeds=embeds)
    with pytest.raises(ShapeError, match="need input_ids"):
        model(inputs_embeds=embeds, pixel_values=pictures(model, 1))


def test_a_model_that_does_not_hear_refuses_sounds(tiny):
    row = packed_row([([5, 6], [5, 6])], audio_values=torch.zeros(1, 5), audio_lengths=torch.tensor([5]))
    with pytest.raises(ShapeError, match="does not hear"):
        tiny[0](**row_inputs(row))


def test_labels_and_offsets_may_stay_on_the_host(tiny, row):
    _, (samples, pixels) = tiny, row
    inputs = row_inputs(packed_row(samples, pixels), device="meta")
    places = {name: value.device.type for name, value in inputs.items() if value is not None}
    assert places == {
        "input_ids": "meta",
        "position_ids": "meta",
        "pixel_values": "meta",
        "labels": "cpu",
        "cu_seq_lens": "cpu",
    }


def test_a_packed_row_gives_the_same_under_other_attention_implementations(tiny, row):
    (model, _), (samples, pixels) = tiny, row
    packed = packed_logits(model, packed_row(samples, pixels))
    try:
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation({"text_config": implementation})
            assert model.config.text_config._attn_implementation == implementation
            assert torch.allclose(packed_logits(model, packed_row(samples, pixels)), packed, atol=1e-4)
    finally:
        model.set_attn_implementation({"text_config": "packed"})


def test_without_return_dict_outputs_are_a_tuple(tiny):
    model, _ = tiny
    logits = model(input_ids=torch.tensor([[5, 6]]), return_dict=False)[0]
    assert logits.shape == (1, 2, model.config.text_config.vocab_size)
