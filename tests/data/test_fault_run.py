"""A whole epoch from a server that fails all the time, over data with broken samples."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from llava_scale.config.data import DataConfig, PackingConfig, SourceConfig
from llava_scale.data.dataset import open_dataset
from llava_scale.data.loader import StreamingLoader
from llava_scale.data.store import RetryPolicy
from llava_scale.errors import SampleError
from tests.data.streams import COUNTER, TRANSFORM, byte_encoder, take, write_shards
from tests.data.web_server import serving

PATIENT = RetryPolicy(attempts=30, first_delay_s=0.0005, max_delay_s=0.004)
FAULTS = ["reset", "error", "short", "cut"]


def stream_from(url, cache, log, **options):
    config = DataConfig(
        sources=(SourceConfig(path=url, name="far"),),
        packing=PackingConfig(row_length=256, lookahead_rows=4),
        cache_dir=str(cache),
        num_workers=2,
        block_size=1,
        shuffle_blocks=500,
        **options,
    )
    return StreamingLoader(
        [open_dataset(url, name="far", cache_dir=str(cache), retry=PATIENT)],
        config,
        seed=0,
        rows_per_step=1,
        encoder=byte_encoder(),
        counter=COUNTER,
        transforms={"image": TRANSFORM},
        skipped_log=log,
    )


def run(tmp_path, num_samples, broken, **options):
    """Stream an epoch; return how often each key came, the list of bad samples, and how many faults there were."""
    folder = write_shards(tmp_path / "served", num_samples, shard_size=50, broken=broken)
    log = tmp_path / "skipped.jsonl"
    with serving(folder) as server:
        server.faults, server.fault_share = FAULTS, 0.6
        with stream_from(server.url, tmp_path / "cache", log, **options) as stream:
            batches = take(stream, stream.steps_per_epoch())
        faults = server.num_faults
    came = Counter(key for batch in batches for row in batch.rows for key in row.keys)
    return came, [json.loads(line) for line in log.read_text().splitlines()], faults


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_faults_and_two_percent_bad_samples_cost_nothing_but_the_bad_samples(tmp_path):
    broken = tuple(range(4, 1400, 50))
    broken = tuple(number - number % 4 for number in broken)  # every fourth, from 3 on, is text alone
    came, listed, faults = run(tmp_path, 1400, broken, max_bad_fraction=0.05)
    assert faults >= 1000
    good = {f"k{number}" for number in range(1400)} - {f"k{number}" for number in broken}
    assert {line["key"] for line in listed} == {f"k{number}" for number in broken}
    assert all(line["reason"] and line["shard"] for line in listed)
    assert {key: came[key] for key in good} == dict.fromkeys(good, 1)
    assert not set(came) - good


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_beyond_the_budget_the_run_stops_with_a_sample_s_name(tmp_path):
    with pytest.raises(SampleError, match=r"shard-\d+\.tar: sample 'k\d+'.*max_bad_fraction"):
        run(tmp_path, 1400, tuple(range(0, 1400, 4)), max_bad_fraction=0.02)
