from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_scale.model import load_model
from llava_scale.training.export import export_checkpoint
from llava_scale.training.parallel import Ranks
from tests.distributed import jobs
from tests.distributed.processes import run_ranks

FSDP2 = {"strategy": "fsdp2"}


def assert_same_numbers(found, expected, tolerance=1e-6):
    assert len(found) == len(expected) > 1
    for line, wanted in zip(found, expected, strict=True):
        exact = [key for key in line if key not in ("loss", "grad_norm")]
        assert {key: line[key] for key in exact} == {key: wanted[key] for key in exact}
        assert line["loss"] == pytest.approx(wanted["loss"], rel=tolerance)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=20 * tolerance)


def assert_same_weights(left, right):
    left, right = (load_model(f"{tree['train']['output_dir']}/final")[0].state_dict() for tree in (left, right))
    assert left.keys() == right.keys()
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 2e-5


@pytest.mark.parametrize(
    "kinds",
    [
        ({"strategy": "ddp"}, FSDP2),
        pytest.param(
            ({**FSDP2, "reshard_after_forward": False}, {**FSDP2, "reduce_every_row": True}, {**FSDP2, "replicas": 2}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_compute_what_one_computes(make_tree, kinds):
    settings = {"eval_rows": 5, "steps": 3, "data": {"holdout": 0.2}}
    alone = make_tree("alone", **settings)
    jobs.train(Ranks(), alone)
    trees = [make_tree(str(number), **settings, parallel=kind) for number, kind in enumerate(kinds)]
    ranks = run_ranks(2, jobs.train_all, [(tree, {}) for tree in trees])
    rows = [found["rows"] for found in (*ranks[0], *ranks[1])]
    assert all(part["with"] and part["without"] for part in rows), "no row without a picture: nothing was tested"
    assert ranks[0][0]["samples"] == ranks[1][0]["samples"] == jobs.trained_lines(alone)[-1]["samples"]
    for tree in trees:
        assert_same_numbers(jobs.trained_lines(tree), jobs.trained_lines(alone))
        assert jobs.held_out_losses(tree) == pytest.approx(jobs.held_out_losses(alone), rel=1e-6)
        assert_same_weights(tree, alone)


@pytest.mark.parametrize("in_background", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_continues_at_another_number_of_processes_sharded_or_not(make_tree, in_background):
    whole = make_tree("whole", steps=7)
    jobs.train(Ranks(), whole)
    tree = make_tree("moved", steps=7, parallel=FSDP2, async_checkpoint=in_background)
    first = run_ranks(2, jobs.train_all, [(tree, {"stop_after": 2})])
    assert [part[0]["stopped_by"] for part in first] == [15, 15]
    assert first[0][0]["steps"] == first[1][0]["steps"] <= 3
    alone = jobs.train(Ranks(), tree, resume=True, stop_after=4)
    assert alone["steps"] == 4
    ddp = {**tree, "train": {**tree["train"], "parallel": {"strategy": "ddp"}}}
    options = {"resume": True}
    second = run_ranks(2, jobs.train_all, [(ddp, {**options, "stop_after": 5}), (tree, options)])
    assert [part[-1]["steps"] for part in second] == [7, 7]
    assert_same_numbers(jobs.trained_lines(tree), jobs.trained_lines(whole))
    assert_same_weights(tree, whole)


@pytest.mark.slow
def test_a_frozen_language_model_is_sharded_or_whole_and_learns_the_same(make_tree):
    alone = make_tree("alone", stage="align", trainable={}, steps=2, gradient_checkpointing=True)
    jobs.train(Ranks(), alone)
    kinds = [FSDP2, {**FSDP2, "shard_frozen": False}, {"strategy": "ddp"}]
    trees = [make_tree(str(number), **{**alone["train"], "parallel": kind}) for number, kind in enumerate(kinds)]
    for number, tree in enumerate(trees):
        tree["train"]["output_dir"] = alone["train"]["output_dir"] + str(number)
    run_ranks(2, jobs.train_all, [(tree, {}) for tree in trees])
    for tree in trees:
        assert_same_numbers(jobs.trained_lines(tree), jobs.trained_lines(alone))


@pytest.mark.slow
@pytest.mark.parametrize(
    "compressor",
    [
        {"type": "qformer", "num_queries": 4, "window": 5, "instruction_tower": ""},
        {"type": "token_merging", "ratio": 0.5, "warmup_steps": 0},
    ],
    ids=["qformer", "token_merging"],
)
def test_compressors_take_part_also_where_a_rank_has_text_only(make_tree, compressor):
    settings = {"steps": 3, "model": {"compressor": compressor}, "stage": "instruct"}
    alone = make_tree("alone", **settings)
    jobs.train(Ranks(), alone)
    trees = [make_tree(kind, parallel={"strategy": kind}, **settings) for kind in ("ddp", "fsdp2")]
    ranks = run_ranks(2, jobs.train_all, [(tree, {}) for tree in trees])
    assert all(found["rows"]["without"] for found in (*ranks[0], *ranks[1]))
    for tree in trees:
        assert_same_numbers(jobs.trained_lines(tree), jobs.trained_lines(alone))


def of_all_media(shards):
    """Settings of a run that sees and hears, in rows of one sample."""
    return {
        "data": {"sources": [{"path": str(shards)}], "packing": {"mode": "samples", "samples_per_row": 1}},
        "model": {"audio_tower": "tiny"},
        "stage": "instruct_av",
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_with_different_kinds_of_media_compute_what_one_computes(make_tree, all_media):
    settings = of_all_media(all_media) | {"steps": 5, "rows_per_step": 8}  # every sample once
    alone = make_tree("alone", **settings)
    jobs.train(Ranks(), alone)
    trees = [make_tree(name, parallel={"strategy": name}, **settings) for name in ("ddp", "fsdp2")]
    ranks = run_ranks(2, jobs.train_all, [(tree, {}) for tree in trees])
    met = {kind for found in (ranks[0][0], ranks[1][0]) for kind, number in found["rows"].items() if number}
    assert met == {"with", "without", "image", "video", "audio"}
    for tree in trees:
        assert_same_numbers(jobs.trained_lines(tree), jobs.trained_lines(alone))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("media", ["pictures", "all media"])
def test_fifty_steps_of_one_two_and_four_processes_agree(make_tree, all_media, media):
    settings = {"steps": 50, "learning_rate": 2e-4} | (of_all_media(all_media) if media == "all media" else {})
    alone = make_tree("alone", **settings)
    jobs.train(Ranks(), alone)
    kinds = {"ddp": {"strategy": "ddp"}, "fsdp2": FSDP2}
    for size in (2, 4):
        both = {f"{name}{size}": kind for name, kind in kinds.items()}
        if size == 4:
            both["hsdp"] = {**FSDP2, "replicas": 2}
        trees = [make_tree(name, parallel=kind, **settings) for name, kind in both.items()]
        run_ranks(size, jobs.train_all, [(tree, {}) for tree in trees], timeout_s=600)
        for tree in trees:
            assert_same_numbers(jobs.trained_lines(tree), jobs.trained_lines(alone))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_one_and_four_processes_take_turns(make_tree):
    whole = make_tree("whole", steps=9)
    jobs.train(Ranks(), whole)
    tree = make_tree("moved", steps=9, parallel=FSDP2)
    run_ranks(2, jobs.train_all, [(tree, {"stop_after": 2})])
    jobs.train(Ranks(), tree, resume=True, stop_after=5)
    hybrid = {**tree, "train": {**tree["train"], "parallel": {**FSDP2, "replicas": 2}}}
    run_ranks(4, jobs.train_all, [(hybrid, {"resume": True, "stop_after": 6}), (tree, {"resume": True})])
    assert_same_numbers(jobs.trained_lines(tree), jobs.trained_lines(whole))


@pytest.mark.slow
def test_a_sharded_checkpoint_is_exported_by_one_process(make_tree, tmp_path):
    tree = make_tree("run", steps=2, parallel=FSDP2)
    run_ranks(2, jobs.train_all, [(tree, {})])
    export_checkpoint(Path(tree["train"]["output_dir"]), tmp_path / "run" / "exported")
    final, exported = (load_model(tmp_path / "run" / name)[0].state_dict() for name in ("final", "exported"))
    assert all(torch.equal(final[name], exported[name]) for name in final)
