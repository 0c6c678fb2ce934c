from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).parents[2] / "scripts"


def slurm(tmp_path, exit_code):
    """Run the SLURM script with stand-ins for SLURM and the training; return it and what they were called with."""
    calls = tmp_path / "calls"
    stand_ins = {
        "scontrol": f'[ "$1" = show ] && echo node7 || echo "scontrol $*" >> {calls}',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; SLURM_PROCID=3 SLURM_LOCALID=1 exec "$@"',
        "llava-scale": f'echo "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $*" >> {calls}; exit {exit_code}',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "SLURM_NTASKS": "8"}
    command = ["bash", str(SCRIPTS / "slurm_train.sh"), "recipe.yaml", "train.steps=3"]
    environment["SLURM_JOB_NODELIST"] = "node[7-8]"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done, calls.read_text().splitlines()


def test_a_slurm_task_becomes_a_rank_and_a_preempted_job_requeues_itself(tmp_path):
    done, calls = slurm(tmp_path, exit_code=75)
    assert calls == [
        "3/8 1 node7 train recipe.yaml train.steps=3 train.stop_exit_code=75 --resume",
        "scontrol requeue 42",
    ]
    assert done.returncode == 0


@pytest.mark.parametrize("exit_code", [0, 2])
def test_a_finished_or_failed_job_is_not_requeued(tmp_path, exit_code):
    done, calls = slurm(tmp_path, exit_code)
    assert done.returncode == exit_code
    assert len(calls) == 1


@pytest.mark.parametrize(("name", "kind"), [("jobset", "JobSet"), ("pytorchjob", "PyTorchJob")])
def test_the_manifests_resume_and_ask_for_gpus(name, kind):
    (manifest,) = yaml.safe_load_all((SCRIPTS / f"kubernetes_{name}.yaml").read_text())
    assert manifest["kind"] == kind
    text = yaml.safe_dump(manifest)
    assert "--resume" in text
    assert "nvidia.com/gpu: 8" in text
