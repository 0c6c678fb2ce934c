from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llava_scale.data.collate import RowBuilder, instruction_of
from llava_scale.data.dataset import open_dataset
from llava_scale.data.lengths import UNREADABLE
from llava_scale.data.planner import PlannedSample, RowPlan
from llava_scale.errors import SampleError, ShapeError, ShardError
from llava_scale.types import IGNORE_INDEX, Turn
from tests.data.streams import (
    COUNTER,
    TRANSFORM,
    LetterEncoder,
    MemoryDataset,
    RampCounter,
    byte_encoder,
    grey,
    picture,
    write_shards,
)

MARKER = LetterEncoder().placeholder_ids["image"]


def make_builder(dataset, **options):
    options = {"row_length": 64, "transforms": {"image": grey}, "counter": RampCounter(4)} | options
    return RowBuilder(datasets=[dataset], encoder=LetterEncoder(), **options)


def plan(*numbers, lengths=None, step=0, rejected=()):
    lengths = lengths or [0] * len(numbers)
    samples = tuple(PlannedSample(0, number, length) for number, length in zip(numbers, lengths, strict=True))
    return RowPlan(0, step, samples, tuple(PlannedSample(0, number, UNREADABLE) for number in rejected))


def test_samples_lie_end_to_end_with_restarting_positions():
    dataset = MemoryDataset(lengths=[3, 2], images=[1, 0])
    row = make_builder(dataset).build(plan(0, 1)).row
    assert row.input_ids.tolist() == [1, 2, 3, MARKER, MARKER, MARKER, MARKER, 1, 2]
    assert row.labels.tolist() == [IGNORE_INDEX, 2, 3] + [IGNORE_INDEX] * 5 + [2]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert row.cu_seq_lens.tolist() == [0, 7, 9]
    assert (row.input_ids.dtype, row.cu_seq_lens.dtype) == (torch.int64, torch.int32)
    assert row.num_supervised == 3
    assert row.keys == ("memory/0", "memory/1")
    assert row.step == 0


def test_media_come_in_order_with_their_grids_counts_and_instructions():
    dataset = MemoryDataset(lengths=[3, 2, 2], images=[2, 0, 1])
    row = make_builder(dataset).build(plan(0, 1, 2)).row
    assert row.pixel_values.shape == (3, 3, 2, 2)
    assert row.pixel_values.dtype == torch.uint8
    assert row.image_num_tokens == (4, 4, 4)
    assert row.image_grids == ((1, 1, 4),) * 3
    assert row.instructions == ("xxxii", "xxxii", "xxi")
    assert row.num_visual_tokens == 12


def test_counts_follow_the_step_and_evaluation_has_its_own():
    dataset = MemoryDataset(lengths=[3], images=[1])
    builder = make_builder(dataset, counter=RampCounter(4, 2, final=9))
    assert builder.build(plan(0, step=5)).row.image_num_tokens == (14,)
    assert builder.build(plan(0, step=None)).row.image_num_tokens == (9,)


def test_pictures_equal_the_transform_and_lie_channels_last(tmp_path):
    dataset = open_dataset(str(write_shards(tmp_path / "shards", 6)), cache_dir=str(tmp_path))
    builder = RowBuilder(
        datasets=[dataset],
        encoder=byte_encoder(),
        counter=COUNTER,
        transforms={"image": TRANSFORM},
        row_length=4096,
    )
    row = builder.build(plan(0, 3, 5)).row
    assert torch.equal(row.pixel_values[1], TRANSFORM(picture(colour=(5, 90, 90))))
    assert row.pixel_values.is_contiguous(memory_format=torch.channels_last)
    assert row.keys == ("k0", "k3", "k5")
    assert row.image_num_tokens == (6, 6)
    assert (row.labels[row.input_ids == byte_encoder().placeholder_ids["image"]] == IGNORE_INDEX).all()


def test_a_bad_sample_is_left_out_and_reported():
    dataset = MemoryDataset(lengths=[3, -1, 2])
    built = make_builder(dataset).build(plan(0, 1, 2))
    assert built.row.keys == ("memory/0", "memory/2")
    assert [(bad.shard, bad.key, bad.reason) for bad in built.row.skipped] == [
        ("memory-00000.tar", "memory/1", "its json cannot be read")
    ]
    assert [outcome.skipped is not None for outcome in built.outcomes] == [False, True, False]


def test_a_picture_that_cannot_be_decoded_names_its_sample(tmp_path):
    dataset = open_dataset(str(write_shards(tmp_path / "shards", 6, broken=(1,))), cache_dir=str(tmp_path))
    builder = RowBuilder(
        datasets=[dataset],
        encoder=byte_encoder(),
        counter=COUNTER,
        transforms={"image": TRANSFORM},
        row_length=4096,
    )
    row = builder.build(plan(0, 1, 2)).row
    assert row.keys == ("k0", "k2")
    assert [(bad.shard, bad.key) for bad in row.skipped] == [("shard-00000.tar", "k1")]
    assert len(row.pixel_values) == 2


def test_a_row_without_usable_samples_keeps_ranks_aligned_at_zero_loss():
    row = make_builder(MemoryDataset(lengths=[-1])).build(plan(0)).row
    assert row.input_ids.shape == (2,)
    assert row.num_supervised == 0
    assert row.cu_seq_lens.tolist() == [0, 2]
    assert len(row.skipped) == 1
    assert make_builder(MemoryDataset(lengths=[1])).build(plan()).row.skipped == ()


def test_samples_rejected_by_the_plan_are_reported_first_with_their_reason():
    built = make_builder(MemoryDataset(lengths=[3, -1])).build(plan(0, rejected=(1,)))
    assert [outcome.skipped is not None for outcome in built.outcomes] == [True, False]
    assert built.row.skipped[0].reason == "its json cannot be read"


def test_a_sample_longer_than_the_row_is_an_error_that_says_what_to_do():
    built = make_builder(MemoryDataset(lengths=[65])).build(plan(0))
    assert "65 tokens do not fit in a row of 64" in built.row.skipped[0].reason
    assert "data.truncate=text" in built.row.skipped[0].reason


def test_text_is_cut_only_where_it_may_be_and_media_never():
    dataset = MemoryDataset(lengths=[70, 70, 10], images=[0, 1, 1])
    builder = make_builder(dataset, truncate=True)
    built = builder.build(plan(0))
    assert (len(built.row.input_ids), built.outcomes[0].truncated) == (64, True)
    assert "would cut media tokens" in builder.build(plan(1)).row.skipped[0].reason
    assert "would cut media" in replace(builder, row_length=12).build(plan(2)).row.skipped[0].reason


def test_cutting_must_leave_something_to_learn():
    class LastOnly(LetterEncoder):
        def encode(self, turns):
            encoded = super().encode(turns)
            last = len(encoded.input_ids)
            return replace(encoded, answers=((last - 1, last),))

    builder = replace(make_builder(MemoryDataset(lengths=[70]), truncate=True), encoder=LastOnly())
    assert "no supervised token" in builder.build(plan(0)).row.skipped[0].reason


def test_a_kind_of_media_without_a_transform_is_an_error_of_the_sample():
    built = make_builder(MemoryDataset(lengths=[3], images=[1]), transforms={}).build(plan(0))
    assert "takes no image" in built.row.skipped[0].reason


def test_lengths_that_differ_from_the_plan_are_a_fault_of_the_shard():
    with pytest.raises(ShardError, match="planned with 7 text tokens and has 3"):
        make_builder(MemoryDataset(lengths=[3])).build(plan(0, lengths=[7]))
    with pytest.raises(ShardError, match="changed"):
        make_builder(MemoryDataset(lengths=[3])).build(plan(rejected=(0,)))


def test_pictures_of_different_shapes_are_refused():
    sizes = iter([2, 3])
    builder = make_builder(
        MemoryDataset(lengths=[3], images=[2]),
        transforms={"image": lambda data: torch.zeros(3, next(sizes), 2, dtype=torch.uint8)},
    )
    with pytest.raises(ShapeError, match="different shapes"):
        builder.build(plan(0))


def test_a_row_of_several_data_sets_keeps_its_order():
    first, second = MemoryDataset(lengths=[3, 4], name="a"), MemoryDataset(lengths=[2, 5], name="b")
    builder = replace(make_builder(first), datasets=[first, second])
    samples = (PlannedSample(1, 1, 0), PlannedSample(0, 0, 0), PlannedSample(1, 0, 0))
    assert builder.build(RowPlan(0, 0, samples)).row.keys == ("b/1", "a/0", "b/0")


def test_instructions_are_the_human_turns_without_placeholders():
    turns = (
        Turn("system", "Be kind."),
        Turn("user", "<image>\nWhat is it?"),
        Turn("assistant", "A cat."),
        Turn("user", "<image><video>"),
        Turn("user", " Colour? "),
    )
    assert instruction_of(turns) == "What is it?\nColour?"


def test_one_error_of_a_transform_does_not_touch_its_neighbours():
    def transform(data):
        raise SampleError("damaged picture")

    dataset = MemoryDataset(lengths=[3, 4], images=[1, 0])
    row = make_builder(dataset, transforms={"image": transform}).build(plan(0, 1)).row
    assert row.keys == ("memory/1",)
    assert row.input_ids.tolist() == [1, 2, 3, 4]
