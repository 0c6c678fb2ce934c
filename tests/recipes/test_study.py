"""The study of compressors: its runs are what their names say, on equal samples, and can be stopped."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import yaml

from llava_scale.compressors import token_count
from llava_scale.config import load_config

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "configs" / "study"
SIDES = {"synthetic": 6, "tuxpaint": 7}
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "tuxpaint")]


def runs(study):
    settings = yaml.safe_load((STUDY / f"{study}_runs.yaml").read_text())
    return {name: load_config(STUDY / f"{study}.yaml", overrides) for name, overrides in settings.items()}


def tokens_of(config, study):
    side = SIDES[study]
    if study == "synthetic":
        side = side * config.model.image_size // 144
    else:
        side = side * config.model.vision_tower_kwargs["image_size"] // 224
    section = config.model.compressor
    return side * side if section is None else token_count(section, num_blocks=2).num_tokens((1, side, side), None)


@pytest.mark.parametrize("study", list(SIDES))
def test_runs_that_are_compared_leave_equally_many_tokens(study):
    counts = defaultdict(set)
    for name, config in runs(study).items():
        counts[tokens_of(config, study)].add(name)
    half, few = (18, 9) if study == "synthetic" else (25, 16)
    assert {"merge_r50", "merge_r50_no_ramp", "original_r50", "drop_r50", "random_r50", "uniform_r50"} <= counts[half]
    last = "r75" if study == "synthetic" else "r68"
    assert {
        "qformer",
        "pixel_shuffle",
        "stc",
        *(f"{kind}_{last}" for kind in ("merge", "random", "uniform", "image")),
    } <= (counts[few])
    assert counts[SIDES[study] ** 2] == {"base"}


@pytest.mark.parametrize("study", list(SIDES))
def test_runs_differ_in_the_model_alone(study):
    found = runs(study)
    base = found["base"]
    for name, config in found.items():
        assert config.data == base.data, name
        same = (config.train.steps, config.train.learning_rate, config.train.stage)
        assert same == (base.train.steps, base.train.learning_rate, "align"), name


def test_questions_are_of_the_kind_that_their_task_names(tmp_path):
    from study_questions import GROUPS, suits, write_questions

    records = json.loads(write_questions(tmp_path, per_task=2).read_text())
    tasks = [task for group in GROUPS.values() for task in group]
    assert sorted(record["task"] for record in records) == sorted(2 * tasks)
    assert all((tmp_path / record["image"]).is_file() for record in records)
    again = json.loads(write_questions(tmp_path, per_task=2).read_text())
    assert again == records
    from llava_scale.data.toy.scenes import Thing

    small, large = Thing("red", "ring", "small", 0), Thing("blue", "ring", "large", 1)
    assert suits("color of a small thing", (small, small))
    assert not suits("color of a small thing", (small, large))
    assert not suits("shape of one of three", (small, large))


def test_the_remembering_tower_gives_the_towers_features_and_computes_them_once(tmp_path, monkeypatch):
    from efficientnet_tower import EfficientNetLite0
    from remembering_tower import RememberingTower

    torch.manual_seed(0)
    tower = RememberingTower(memory=str(tmp_path), image_size=64)
    pictures = torch.randn(3, 3, 64, 64)
    wanted = EfficientNetLite0.forward(tower, pictures).detach()
    assert torch.equal(tower(pictures[[0, 1, 0]]), wanted[[0, 1, 0]].half().float())
    (tmp_path / "64.keys").open("ab").write(b"half a key")  # as a run that was killed leaves it
    again = RememberingTower(memory=str(tmp_path), image_size=64)
    again.load_state_dict(tower.state_dict())
    assert torch.equal(again(pictures), wanted.half().float())
    assert (tmp_path / "64.keys").stat().st_size == 3 * 16

    monkeypatch.setattr(EfficientNetLite0, "forward", None)
    assert torch.equal(RememberingTower(memory=str(tmp_path), image_size=64)(pictures), wanted.half().float())


def test_captions_have_no_roles_but_examples_before_the_picture():
    from study_compression import CAPTIONS

    from llava_scale.data.chat import ChatEncoder
    from llava_scale.types import Turn
    from tests.data.test_chat import make_tokenizer

    encoder = ChatEncoder(make_tokenizer(CAPTIONS), "native")
    turns = [Turn("system", "A dog.\nA cat."), Turn("user", "<image>"), Turn("assistant", "A frog.")]
    encoded = encoder.encode(turns)
    assert encoder.render_prompt(turns[:2]) == "A dog.\nA cat.\n<image>"
    texts = encoder.token_texts(encoded.input_ids)
    learned = [text for text, counts in zip(texts, encoded.supervised, strict=True) if counts]
    assert "".join(learned) == "A frog.\n"


def test_the_language_model_of_the_captions_is_a_copy_with_their_template(tmp_path):
    from study_compression import CAPTIONS, with_template

    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "chat_template.jinja").write_text("roles")
    made = with_template(source, tmp_path / "study" / "model")
    assert (made / "config.json").read_text() == "{}"
    assert (made / "chat_template.jinja").read_text() == CAPTIONS
    assert (source / "chat_template.jinja").read_text() == "roles"
    (made / "config.json").write_text("kept")
    assert (with_template(source, made) / "config.json").read_text() == "kept"


def test_losses_are_compared_seed_by_seed(tmp_path):
    from study_table import read_study, table_of

    losses = {"seed0": {"base": 3.0, "merge_r50": 3.25, "pool": 3.5}, "seed1": {"base": 2.0, "merge_r50": 2.125}}
    for seed, runs_ in losses.items():
        for name, loss in runs_.items():
            folder = tmp_path / seed / name
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps({"loss": loss, "tokens": 25}))
    lines = {line.split(" | ")[0].strip("| "): line for line in table_of(read_study(tmp_path)).splitlines()}
    assert "| +0.188 (+0.125 to +0.250) | 2 |" in lines["merge_r50"]
    assert "| +0.500 | 1 |" in lines["pool"]  # not against the other seed's lower loss
    assert "| +0.000 | 2 |" in lines["base"]


@pytest.mark.slow
def test_the_study_keeps_finished_runs_and_writes_its_tables(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    import study_compression

    few = ["--out", str(tmp_path), "--samples", "60", "--questions", "1", "--parts-steps", "2", "--steps", "2"]
    names = ["base", "merge_r50", "original_r50", "qformer", "image_r75", "stc"]
    monkeypatch.setattr(sys, "argv", ["study", "synthetic", *few, "--only", *names])
    study_compression.main()
    assert capsys.readouterr().out.count(" s\n") == 2 * len(names)
    study_compression.main()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "argv", ["study", "table", "--out", str(tmp_path), "--results", str(tmp_path / "results")])
    study_compression.main()
    table = (tmp_path / "results" / "compression.md").read_text()
    study_compression.main()
    assert (tmp_path / "results" / "compression.md").read_text() == table
    assert all(f"| {name} |" in table for name in names)
    assert (tmp_path / "results" / "compression-synthetic.png").is_file()
    logs = [json.loads(line) for line in (tmp_path / "synthetic/seed0/base/log.jsonl").read_text().splitlines()]
    others = (tmp_path / "synthetic/seed0/qformer/log.jsonl").read_text().splitlines()
    assert logs[0]["supervised_tokens"] == json.loads(others[0])["supervised_tokens"]  # the same samples


def test_tables_replace_their_own_text_alone(tmp_path):
    from study_table import insert

    page = tmp_path / "compression.md"
    page.write_text("# Results\n\nBefore.\n\n<!-- begin synthetic -->\nold\n<!-- end synthetic -->\n\nAfter.\n")
    insert(page, "synthetic", "| new |\n")
    insert(page, "tuxpaint", "| other |\n")
    insert(page, "tuxpaint", "| other |\n")
    text = page.read_text()
    assert text.startswith("# Results\n\nBefore.\n\n<!-- begin synthetic -->\n\n| new |\n")
    assert "old" not in text
    assert text.index("After.") < text.index("| other |")
    assert text.count("| other |") == 1
