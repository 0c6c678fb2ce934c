from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis.strategies import builds, integers, lists, sampled_from

from llava_scale.config.data import DataConfig, SourceConfig
from llava_scale.data.loader import open_stream
from llava_scale.errors import CheckpointError, ConfigError, SampleError, ShardError
from tests.data.streams import (
    COUNTER,
    TRANSFORM,
    LetterEncoder,
    MemoryDataset,
    RampCounter,
    byte_encoder,
    keys,
    memory_stream,
    same_rows,
    shard_stream,
    take,
    write_shards,
)

relaxed = settings(deadline=None, max_examples=25)
datasets = builds(MemoryDataset, lengths=lists(integers(2, 64), min_size=4, max_size=50), shard_size=integers(1, 20))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards", 60)


def used(batches):
    return [key for batch in batches for row in batch.rows for key in row.keys]


def joined(batches_of_ranks):
    """The global batches: the rows of all ranks, in the order of the ranks."""
    return [[row.keys for batch in step for row in batch.rows] for step in zip(*batches_of_ranks, strict=True)]


@relaxed
@given(dataset=datasets, rows=integers(1, 6), workers=integers(0, 3), seed=integers(0, 99), block=integers(1, 9))
def test_every_sample_comes_exactly_once_an_epoch(cache, dataset, rows, workers, seed, block):
    with memory_stream(
        [dataset], cache, rows_per_step=rows, num_workers=workers, seed=seed, block_size=block
    ) as stream:
        steps = stream.steps_per_epoch()
        seen = used(take(stream, 2 * steps))
    for epoch in range(len(seen) // len(dataset)):
        assert len(set(seen[epoch * len(dataset) : (epoch + 1) * len(dataset)])) == len(dataset)
    assert len(seen) >= 2 * len(dataset) - 2 * rows * 32


@relaxed
@given(
    sources=lists(datasets, min_size=1, max_size=3),
    world=sampled_from([2, 3, 4, 12]),
    workers=integers(0, 3),
    change=integers(-2, 2),
)
def test_global_batches_are_the_same_for_any_number_of_ranks_and_workers(cache, sources, world, workers, change):
    for number, dataset in enumerate(sources):
        dataset.name = f"source{number}"
        dataset.images = [number % 2 for number in range(len(dataset))]
        dataset.indexes.clear()
    options = {"rows_per_step": 12, "counter": RampCounter(12, change)}
    alone = take(memory_stream(sources, cache, **options), 5)
    ranks = []
    for rank in range(world):
        with memory_stream(sources, cache, rank=rank, world_size=world, num_workers=workers, **options) as stream:
            ranks.append(take(stream, 5))
    assert all(len(batch.rows) == 12 // world for rank in ranks for batch in rank)
    assert joined(ranks) == keys(alone)


@relaxed
@given(
    sources=lists(datasets, min_size=1, max_size=3),
    cut=integers(0, 9),
    workers=integers(0, 2),
    mode=sampled_from(["tokens", "samples"]),
)
def test_a_resumed_stream_continues_exactly_with_other_ranks_and_workers(cache, sources, cut, workers, mode):
    for number, dataset in enumerate(sources):
        dataset.name = f"source{number}"
    options = {"rows_per_step": 4, "mode": mode, "samples_per_row": 3}
    whole = take(memory_stream(sources, cache, **options), cut + 4)
    with memory_stream(sources, cache, num_workers=2, **options) as stream:
        if cut:
            take(stream, cut)
        state = json.loads(json.dumps(stream.state_dict()))
    ranks = []
    for rank in range(2):
        with memory_stream(sources, cache, rank=rank, world_size=2, num_workers=workers, **options) as resumed:
            resumed.load_state_dict(state)
            ranks.append(take(resumed, 4))
    assert joined(ranks) == keys(whole[cut:])
    assert [batch.step for batch in ranks[0]] == list(range(cut, cut + 4))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_real_shards_resume_to_the_last_bit(shards, cache, num_workers):
    with shard_stream(shards, cache, num_workers=num_workers) as stream:
        take(stream, 3)
        state = stream.state_dict()
        expected = take(stream, 5)
    with shard_stream(shards, cache, num_workers=2 - num_workers) as resumed:
        resumed.load_state_dict(state)
        assert same_rows(take(resumed, 5), expected)


def test_the_state_is_the_same_on_every_rank_and_counts_used_batches_only(shards, cache):
    states = []
    for rank in range(4):
        with shard_stream(
            shards, cache, rows_per_step=4, rank=rank, world_size=4, num_workers=rank, prefetch_rows=5
        ) as stream:
            take(stream, 2)
            states.append(stream.state_dict())
    assert all(state == states[0] for state in states)
    assert states[0]["step"] == 2


def test_an_iteration_broken_off_goes_on_where_it_stopped(shards, cache):
    with shard_stream(shards, cache, num_workers=2) as stream, shard_stream(shards, cache) as other:
        assert same_rows(take(stream, 2) + take(stream, 3), take(other, 5))


def test_a_second_iteration_ends_the_first(shards, cache):
    stream = shard_stream(shards, cache)
    first = iter(stream)
    next(first)
    second = iter(stream)
    assert next(second).step == 1
    assert next(first, None) is None


def test_the_state_is_small_however_far_the_stream_looks_ahead(cache):
    dataset = MemoryDataset(lengths=[20] * 9000, shard_size=1000)
    stream = memory_stream([dataset], cache, row_length=4096, lookahead_rows=32, block_size=64, shuffle_blocks=16)
    take(stream, 3)
    state = stream.state_dict()
    assert len(json.dumps(state)) < 10_000


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 5}, "seed was 0 and is 5"),
        ({"rows_per_step": 8}, "rows_per_step was 4 and is 8"),
        ({"row_length": 60}, "row_length was 64 and is 60"),
        ({"shuffle": False}, "block_size"),
        ({"counter": RampCounter(5)}, "token counts"),
        ({"holdout": 0.25}, "holdout"),
    ],
)
def test_a_state_of_another_stream_is_refused(cache, changed, named):
    dataset = MemoryDataset(lengths=[9] * 30)
    state = memory_stream([dataset], cache, rows_per_step=4).state_dict()
    with pytest.raises(CheckpointError, match=named):
        memory_stream([dataset], cache, **{"rows_per_step": 4, **changed}).load_state_dict(state)


def test_workers_prefetch_and_budget_may_change_on_resume(cache):
    dataset = MemoryDataset(lengths=[9] * 30)
    state = memory_stream([dataset], cache).state_dict()
    memory_stream(
        [dataset], cache, num_workers=3, prefetch_rows=9, max_bad_in_a_row=5, max_bad_fraction=0.5
    ).load_state_dict(state)


def test_evaluation_uses_each_sample_once_with_equal_counts_on_every_rank(shards, cache):
    ranks = []
    for rank in range(3):
        with shard_stream(
            shards, cache, rows_per_step=3, rank=rank, world_size=3, split="eval", holdout=0.4, num_workers=1
        ) as stream:
            ranks.append(list(stream))
            assert keys(ranks[-1]) == keys(list(stream))  # starts over each time
            expected = stream.num_samples
            assert stream.steps_per_epoch() == len(ranks[-1])
    assert len({len(batches) for batches in ranks}) == 1
    seen = [key for batches in ranks for key in used(batches)]
    assert len(seen) == len(set(seen)) == expected
    assert all(row.step is None for batches in ranks for batch in batches for row in batch.rows)


def test_training_never_sees_what_is_held_out(shards, cache):
    with shard_stream(shards, cache, split="eval", holdout=0.3) as stream:
        held_out = set(used(list(stream)))
    with shard_stream(shards, cache, holdout=0.3) as stream:
        trained = set(used(take(stream, 2 * stream.steps_per_epoch())))
        assert stream.num_samples == 60 - len(held_out)
    assert held_out
    assert not trained & held_out
    assert len(trained | held_out) == 60


def test_evaluation_order_does_not_depend_on_the_seed(shards, cache):
    first, second = (shard_stream(shards, cache, split="eval", holdout=0.4, seed=seed) for seed in (1, 2))
    assert keys(list(first)) == keys(list(second))


def test_an_interrupted_evaluation_may_be_resumed(shards, cache):
    stream = shard_stream(shards, cache, split="eval", holdout=0.9, rows_per_step=1)
    whole = list(stream)
    take(stream, 2)
    state = stream.state_dict()
    resumed = shard_stream(shards, cache, split="eval", holdout=0.9, rows_per_step=1)
    resumed.load_state_dict(state)
    assert same_rows(list(resumed), whole[2:])


def test_bad_samples_are_left_out_listed_and_counted(tmp_path):
    folder = write_shards(tmp_path / "shards", 60, broken=(1, 20, 45))
    log = tmp_path / "skipped.jsonl"
    with shard_stream(folder, tmp_path, skipped_log=log, num_workers=2) as stream:
        batches = take(stream, stream.steps_per_epoch())
        counters = stream.counters["shards"]
    assert set(used(batches)) == {f"k{number}" for number in range(60)} - {"k1", "k20", "k45"}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted((line["shard"], line["key"]) for line in lines) == [
        ("shard-00000.tar", "k1"),
        ("shard-00002.tar", "k20"),
        ("shard-00004.tar", "k45"),
    ]
    assert all(line["reason"] and batches[line["step"]] for line in lines)
    assert (counters.samples, counters.skipped, counters.epochs) == (60, 3, 1.0)


def test_too_many_bad_samples_stop_the_run_with_a_name(tmp_path):
    folder = write_shards(tmp_path / "shards", 60, broken=tuple(range(60)))
    stream = shard_stream(folder, tmp_path, max_bad_in_a_row=5, num_workers=2)
    with pytest.raises(SampleError, match=r"shard-0000\d\.tar: sample 'k\d+'.*samples in a row"):
        take(stream, 100)
    stream.close()


def test_unreadable_records_alone_stop_the_run_too(cache):
    dataset = MemoryDataset(lengths=[-1] * 30, name="bad")
    with pytest.raises(SampleError, match=r"bad/\d+.*data\.max_bad_in_a_row=7"):
        take(memory_stream([dataset], cache, max_bad_in_a_row=7), 50)


def test_a_missing_shard_is_fatal_and_named(tmp_path):
    folder = write_shards(tmp_path / "shards", 60)
    stream = shard_stream(folder, tmp_path, num_workers=2)
    take(stream, 1)
    (folder / "shard-00002.tar").unlink()
    fresh = shard_stream(folder, tmp_path)
    assert len(fresh._datasets[0]) == 50
    (folder / "shard-00003.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=r"shard-0000[23]"):
        take(stream, 60)
    stream.close()


def test_the_mixture_follows_its_weights_and_counts_by_name(cache):
    sources = [MemoryDataset(lengths=[9] * 40, name="a"), MemoryDataset(lengths=[9] * 10, name="b")]
    stream = memory_stream(sources, cache, weights=[3.0, 1.0])
    seen = Counter(key[0] for key in used(take(stream, 20)))
    counters = stream.counters
    assert seen == {name: counters[name].samples for name in "ab"}
    assert seen["a"] / seen["b"] == pytest.approx(3, abs=0.4)
    assert counters["b"].epochs > counters["a"].epochs


def test_text_that_is_cut_is_counted(cache):
    dataset = MemoryDataset(lengths=[80, 10])
    stream = memory_stream([dataset], cache, truncate="text")
    batches = take(stream, stream.steps_per_epoch())
    assert max(len(row.input_ids) for batch in batches for row in batch.rows) == 64
    assert stream.counters["memory"].truncated >= 1


def test_steps_per_epoch_is_exact_for_small_data(cache):
    dataset = MemoryDataset(lengths=[number % 37 + 2 for number in range(400)], shard_size=100)
    for options in ({}, {"mode": "samples", "samples_per_row": 3}):
        stream = memory_stream([dataset], cache, rows_per_step=3, **options)
        steps = stream.steps_per_epoch()
        seen = used(take(stream, steps))
        assert set(seen[:400]) == {f"memory/{number}" for number in range(400)}
        assert set(used(take(memory_stream([dataset], cache, rows_per_step=3, **options), steps - 1))) != set(
            seen[:400]
        )


def test_steps_per_epoch_is_estimated_well_for_large_data(cache, monkeypatch):
    lengths = [number * 7919 % 37 + 2 for number in range(3000)]
    dataset = MemoryDataset(lengths=lengths, images=[n % 2 for n in range(3000)], shard_size=500)
    for counter in (RampCounter(6), RampCounter(30, -1)):
        stream = memory_stream([dataset], cache, lookahead_rows=32, counter=counter)
        exact = stream.steps_per_epoch()
        monkeypatch.setattr("llava_scale.data.stream_plan._PLANNED_EXACTLY", 0)
        assert stream.steps_per_epoch() == pytest.approx(exact, rel=0.03)
        monkeypatch.undo()


def test_held_out_samples_of_many_shards_are_extrapolated(cache, monkeypatch):
    dataset = MemoryDataset(lengths=[5] * 3000, shard_size=10)
    stream = memory_stream([dataset], cache, holdout=0.2)
    exact = stream.num_samples
    monkeypatch.setattr("llava_scale.data.estimate._COUNTED_SHARDS", 100)
    assert stream.num_samples == pytest.approx(exact, rel=0.05)


def open_config(config: DataConfig, **options):
    options = {"rows_per_step": 4, "seed": 0} | options
    return open_stream(config, encoder=byte_encoder(), counter=COUNTER, image_transform=TRANSFORM, **options)


def test_ranks_that_do_not_divide_the_rows_are_refused(shards):
    config = DataConfig(sources=(SourceConfig(path=str(shards)),))
    with pytest.raises(ConfigError, match=r"train\.rows_per_step=4 cannot be divided among 3 ranks"):
        open_config(config, world_size=3)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_nothing_to_stream_is_a_config_error(split):
    with pytest.raises(ConfigError, match="sources"):
        open_config(DataConfig(), split=split)


def test_two_data_sets_of_one_name_are_refused(shards):
    source = SourceConfig(path=str(shards))
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.name"):
        open_config(DataConfig(sources=(source, source)))


def test_a_held_out_share_that_leaves_nothing_is_refused(cache):
    stream = memory_stream([MemoryDataset(lengths=[5])], cache, holdout=0.999_999_999)
    with pytest.raises(ConfigError, match=r"data\.holdout"):
        take(stream, 1)


def test_evaluation_data_sets_of_their_own_are_used(shards, tmp_path):
    other = write_shards(tmp_path / "other", 8)
    config = DataConfig(
        sources=(SourceConfig(path=str(shards)),),
        eval_sources=(SourceConfig(path=str(other)),),
        cache_dir=str(tmp_path),
        num_workers=0,
    )
    assert sorted(used(list(open_config(config, split="eval")))) == sorted(f"k{number}" for number in range(8))


def test_letters_encode_as_the_helpers_promise():
    dataset = MemoryDataset(lengths=[3], images=[2])
    assert LetterEncoder().encode(dataset.turns(0)).input_ids == [1, 2, 3, 9, 9]
