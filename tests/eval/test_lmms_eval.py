from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import wave
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_scale.config import ModelConfig
from llava_scale.errors import ConfigError, SampleError
from llava_scale.eval.choosing import Chooser
from llava_scale.eval.lmms_eval import Answering, check_arguments, question_of_messages
from llava_scale.model import build_model
from tests.eval.conftest import picture


@dataclass
class Request:
    args: tuple


def image(color="red"):
    return Image.new("RGB", (20, 16), color)


DOCS = {"task": {"test": [{"picture": image(), "question": "What?"}, {"picture": image("blue"), "question": "And?"}]}}


def echo(asked):
    def generate(longest):
        def answers(questions):
            asked.extend((question, longest) for question in questions)
            return [
                SampleError("no") if "And" in q.turns[-1].text else f"it is {q.modality}. END more" for q in questions
            ]

        return answers

    return generate


def messages(doc):
    content = [{"type": "text", "text": "Look:"}, {"type": "image", "url": doc["picture"]},
               {"type": "text", "text": doc["question"]}]  # fmt: skip
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]


def test_messages_become_turns_with_placeholders_and_encoded_media():
    question = question_of_messages(messages(DOCS["task"]["test"][0]), key="k")
    assert [(turn.role, turn.text) for turn in question.turns] == [
        ("system", "Be brief."), ("user", "Look:<image>\nWhat?"),
    ]  # fmt: skip
    assert Image.open(BytesIO(question.media["image"][0])).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(SampleError, match="role 'tool' is not known"):
        question_of_messages([{"role": "tool", "content": "x"}], key="k")
    with pytest.raises(SampleError, match="cannot read none"):
        question_of_messages([{"role": "user", "content": [{"type": "image", "url": "none.png"}]}], key="k")


def test_answers_end_at_the_texts_that_end_them_and_come_in_order(tiny, caplog):
    asked = []
    answering = Answering(echo(asked), Chooser(*tiny, with_letters=False), DOCS)
    settings = [{"max_new_tokens": 5, "until": ["END"]}, {"until": "\n\n"}, {}]
    requests = [
        Request(("ctx", messages, fields, number, "task", "test"))
        for number, fields in zip((0, 1, 0), settings, strict=True)
    ]
    with caplog.at_level(logging.WARNING):
        assert answering.generate_until(requests, chat=True) == ["it is image.", "", "it is image. END more"]
    assert "task/test/1 cannot be answered: no" in caplog.text
    assert [longest for _, longest in asked] == [5, 128, 128]


def test_simple_requests_put_media_before_the_text(tiny):
    asked = []
    answering = Answering(echo(asked), Chooser(*tiny, with_letters=False), DOCS)
    sound = {"array": np.sin(np.arange(1600) / 9), "sampling_rate": 16000}
    cases = [("What?", [image(), image()]), ("a <image> b", [[image()]]), ("<image> x", None), ("hear", [sound])]
    for text, media in cases:
        answering.generate_until([Request((text, {}, lambda doc, media=media: media, 0, "task", "test"))], chat=False)
    texts = [question.turns[0].text for question, _ in asked]
    assert texts == ["<image>\n<image>\nWhat?", "a <image> b", " x", "<audio>\nhear"]
    with wave.open(BytesIO(asked[-1][0].media["audio"][0])) as file:
        assert (file.getframerate(), file.getnframes(), file.getnchannels()) == (16000, 1600, 1)


def test_continuations_of_a_document_are_scored_together(tiny):
    calls = []

    class Counting(Chooser):
        def __call__(self, item):
            calls.append(item.choices)
            return super().__call__(item)

    answering = Answering(echo([]), Counting(*tiny, with_letters=False), DOCS)
    visual = lambda doc: [doc["picture"]]  # noqa: E731
    requests = [Request(("What?", f" {text}", visual, number, "task", "test"))
                for number in (0, 1) for text in ("red", "green", "blue")]  # fmt: skip
    found = answering.loglikelihood(requests)
    assert calls == [("red", "green", "blue")] * 2
    assert len(found) == 6
    assert all(loss > 0 and not greedy for loss, greedy in found)
    (single,) = answering.loglikelihood(
        [Request(("What?", lambda doc: "it is image. END more", visual, 0, "task", "test"))]
    )
    assert single[1]


def test_arguments_that_nobody_reads_are_refused():
    check_arguments({"max_batch_size": None})
    with pytest.raises(ConfigError, match="unknown batchsize"):
        check_arguments({"batchsize": 3})


def lmms_python():
    """An interpreter that has lmms-eval: LMMS_EVAL_PYTHON, or this one."""
    python = os.environ.get("LMMS_EVAL_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import lmms_eval"], capture_output=True, timeout=120, check=False)
    return python if found.returncode == 0 else ""


TASK = """
task: local_colors
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: KIND
doc_to_visual: !function utils.pictures
doc_to_text: "question"
doc_to_target: "answer"
process_results: !function utils.results
generation_kwargs: {max_new_tokens: 6, temperature: 0, do_sample: false}
metric_list:
  - metric: em
    aggregation: !function utils.mean
    higher_is_better: true
"""
UTILS = """
from PIL import Image
def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]
def results(doc, answers):
    return {"em": float(answers[0].strip().lower() == doc["answer"].strip().lower())}
def mean(values):
    return sum(values) / len(values)
"""
CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.pictures
doc_to_text: "question"
doc_to_target: "number"
doc_to_choice: "choices"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_lmms_eval_prints_the_score_that_our_eval_finds(tmp_path):
    python = lmms_python()
    if not python:
        pytest.skip("lmms-eval is not installed: pip install 'llava-scale[lmms]', or set LMMS_EVAL_PYTHON")
    model, processor = build_model(ModelConfig(preset="tiny"), chat_template="native", seed=3)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    records = make_records(tmp_path)
    ours = our_scores(tmp_path, records)
    found = {
        name: run_lmms(python, tmp_path, name, *options)
        for name, options in {"local_colors": (), "local_choices": ("--force_simple",)}.items()
    }
    assert found["local_colors"]["em,none"] == pytest.approx(ours["written"]) == 5 / 12
    assert found["local_choices"]["acc,none"] == pytest.approx(ours["chosen"])


def make_records(folder):
    colors = ("red", "green", "blue", "yellow")
    records = []
    for number in range(12):
        path = folder / f"{number}.png"
        path.write_bytes(picture(colors[number % 4], number))
        records.append({"id": f"q{number}", "image": str(path), "question": f"What color is number {number}?",
                        "answer": "none of them", "choices": list(colors), "number": number % 4})  # fmt: skip
    return records


def our_eval(folder, name):
    command = [sys.executable, "-c", "from llava_scale.cli import main; main()", "eval", "model"]
    subprocess.run([*command, "--tasks", f"{name}.yaml", "--out", f"out-{name}"], cwd=folder, check=True, timeout=250)
    return json.loads((folder / f"out-{name}" / "tasks.json").read_text())["tasks"][0]


def our_scores(folder, records):
    """Scores by our own command, after five of the answers were made right ones."""
    (folder / "r.json").write_text(json.dumps(records))
    (folder / "written.yaml").write_text("data: r.json\nscorer: exact_match\nmax_new_tokens: 6\n")
    (folder / "chosen.yaml").write_text("data: choices.json\nscorer: multiple_choice\n")
    our_eval(folder, "written")
    lines = (folder / "out-written/answers-written.jsonl").read_text().splitlines()
    for record, line in list(zip(records, map(json.loads, lines), strict=True))[:5]:
        record["answer"] = line["answer"]
        assert line["answer"]
    choices = [{**record, "answer": record["number"]} for record in records]
    (folder / "choices.json").write_text(json.dumps(choices))
    (folder / "r.json").write_text(json.dumps(records))
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    scores = {"written": "exact_match", "chosen": "accuracy"}
    return {name: our_eval(folder, name)["scores"][metric]["value"] for name, metric in scores.items()}


def run_lmms(python, folder, task, *options):
    place = folder / "tasks"
    place.mkdir(exist_ok=True)
    (place / "utils.py").write_text(UTILS)
    data = str(folder / "data.jsonl")
    (place / "local_colors.yaml").write_text(TASK.replace("DATA", data).replace("KIND", "generate_until"))
    (place / "local_choices.yaml").write_text(CHOICES.replace("DATA", data))
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "lmms_eval", "--model", "llava_scale", "--model_args", f"pretrained={folder / 'model'}"]
    command += [
        "--tasks",
        task,
        "--include_path",
        str(place),
        "--batch_size",
        "4",
        "--output_path",
        str(folder / "lmms"),
    ]
    done = subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, timeout=280, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(path.read_text()) for path in Path(folder / "lmms").rglob("*results.json")]
    scores = [item["results"][task] for item in results if task in item["results"]]
    assert scores, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return scores[-1]
