from __future__ import annotations

import json
import shutil
import time

from llava_scale.training.health import Health


def test_a_heartbeat_tells_the_last_step(tmp_path):
    health = Health(tmp_path / "health", rank=3, heartbeat_s=1e-9, stuck_after_s=0)
    for step in (4, 5):
        health.beat(step)
    sign = json.loads((tmp_path / "health" / "rank-00003.json").read_text())
    assert sign["step"] == 5
    assert abs(sign["time"] - time.time()) < 60
    health.close()


def test_beats_in_quick_succession_cost_no_writes(tmp_path):
    health = Health(tmp_path, rank=0, heartbeat_s=1000, stuck_after_s=0)
    health.beat(1)
    health.beat(2)
    assert json.loads((tmp_path / "rank-00000.json").read_text())["step"] == 1


def test_a_stuck_process_leaves_its_stacks_and_a_lively_one_nothing(tmp_path):
    health = Health(tmp_path, rank=0, heartbeat_s=0, stuck_after_s=0.05)
    health.beat(1)
    deadline = time.monotonic() + 30
    while not (tmp_path / "stacks-00000.txt").stat().st_size and time.monotonic() < deadline:
        time.sleep(0.01)
    health.close()
    assert "test_a_stuck_process_leaves_its_stacks" in (tmp_path / "stacks-00000.txt").read_text()
    quick = Health(tmp_path / "quick", rank=0, heartbeat_s=0, stuck_after_s=1000)
    quick.beat(1)
    quick.close()
    assert list((tmp_path / "quick").iterdir()) == []


def test_a_folder_that_is_gone_stops_no_run(tmp_path, caplog):
    health = Health(tmp_path / "health", rank=0, heartbeat_s=1e-9, stuck_after_s=1000)
    health.beat(1)
    shutil.rmtree(tmp_path / "health")
    health.beat(2)
    health.beat(3)
    health.close()
    assert [record.message.split(":")[0] for record in caplog.records] == [f"no signs of life in {tmp_path / 'health'}"]


def test_without_either_nothing_is_made(tmp_path):
    health = Health(tmp_path / "health", rank=0, heartbeat_s=0, stuck_after_s=0)
    health.beat(1)
    health.close()
    assert not (tmp_path / "health").exists()
