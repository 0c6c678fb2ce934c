from __future__ import annotations

import pytest

from llava_scale.errors import ConfigError
from llava_scale.training.parallel import Ranks
from llava_scale.training.process_group import open_ranks
from tests.distributed import jobs
from tests.distributed.processes import run_ranks


def test_the_others_hear_what_the_first_one_found_or_failed_at():
    first, second = run_ranks(2, jobs.first_decides)
    assert first == ["rank 0", "ConfigError: no such thing", "ZeroDivisionError: oh"]
    assert second[0] == "rank 0"
    assert second[1] == "PeerError: rank 0 stopped: ConfigError: no such thing"
    assert second[2] == "PeerError: rank 0 stopped: ZeroDivisionError: oh"


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_a_lone_process_joins_nobody(environment):
    with open_ranks(environment, device="cpu", timeout_s=1) as ranks:
        assert ranks == Ranks()


def test_a_launcher_that_forgets_something_is_told_what():
    with (
        pytest.raises(ConfigError, match=r"WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT are not set.*torchrun"),
        open_ranks({"RANK": "0", "WORLD_SIZE": "2"}, device="cpu", timeout_s=1),
    ):
        pass


def test_ranks_that_built_different_weights_are_noticed_before_they_are_sharded():
    for message in run_ranks(2, jobs.different_weights, "fsdp2"):
        assert "built different weights" in message
