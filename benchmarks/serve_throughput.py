"""Answers a second: ours in one running batch, and over HTTP, beside transformers.generate one by one.

The same checkpoint, questions and pictures; greedy, so that every way must give the same answers, which is checked.
Rounds are interleaved and ratios are of a round's own times. On a machine that is busy with other work the ratio of CPU
time, clients included, is the one to look at.

    python benchmarks/serve_throughput.py --rounds 5
    python benchmarks/serve_throughput.py --checkpoint RUN/final --questions 64 --max-new-tokens 64
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava_scale.config import ModelConfig
from llava_scale.model import build_model
from llava_scale.serving.batch import answer_file
from llava_scale.serving.engine import Engine, GenerationRequest, load_engine
from llava_scale.serving.http import running_server
from llava_scale.serving.prompts import decode_pictures
from llava_scale.serving.server import ServerSettings
from llava_scale.types import Turn

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
ASKED = (
    "what color is it?",
    "describe the picture",
    "how many objects are there in the middle of the picture?",
    "is it?",
)


def tiny_engine() -> Engine:
    """The tiny preset with weights that make its answers differ."""
    model, processor = build_model(ModelConfig(preset="tiny"), chat_template="native", seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed_tokens" not in name:
                parameter.mul_(4.0)
    return Engine(model, processor)


def make_questions(count: int, folder: Path) -> list[dict[str, Any]]:
    """``count`` questions, three of four with a picture of their own."""
    questions: list[dict[str, Any]] = []
    for number in range(count):
        record: dict[str, Any] = {"id": str(number), "question": f"{number}: {ASKED[number % len(ASKED)]}"}
        if number % 4:
            path = folder / f"{number}.png"
            picture = Image.new("RGB", (64, 48), COLORS[number % len(COLORS)])
            picture.putpixel((number % 64, number % 48), (1, 2, 3))
            picture.save(path)
            record["image"] = path.name
        questions.append(record)
    return questions


def one_by_one(engine: Engine, questions: list[dict[str, Any]], folder: Path, length: int) -> list[str]:
    """``generate`` of transformers, a question at a time."""
    answers = []
    for record in questions:
        pictures = [folder / record["image"]] if "image" in record else []
        request = GenerationRequest(turns=(Turn("user", record["question"]),), media={"image": pictures})
        prompt = engine.prompt(request, length)
        pixels = decode_pictures(prompt, engine.processor)
        ids = engine.model.generate(
            input_ids=torch.tensor([prompt.input_ids]),
            attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.long),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=list(engine.processor.chat_encoder.eos_ids),
            pad_token_id=engine.processor.tokenizer.pad_token_id,
            **({"pixel_values": torch.stack(pixels)} if pixels else {}),
        )[0, len(prompt.input_ids) :]
        answers.append(engine.decode(ids.tolist()).strip())
    return answers


def by_run(engine: Engine, questions: list[dict[str, Any]], folder: Path, length: int, batch: int) -> list[str]:
    """What ``llava-scale run`` does."""
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    target.unlink(missing_ok=True)
    source.write_text("".join(json.dumps(record) + "\n" for record in questions))
    answer_file(engine, source, target, model_name="m", batch_size=batch, max_new_tokens=length)
    return [json.loads(line)["answer"] for line in target.read_text().splitlines()]


def by_http(url: str, questions: list[dict[str, Any]], folder: Path, length: int, clients: int) -> list[str]:
    """As many clients as fit into the batch, each with one request at a time."""

    def ask(record: dict[str, Any]) -> str:
        parts: list[dict[str, Any]] = []
        if "image" in record:
            data = base64.b64encode((folder / record["image"]).read_bytes()).decode()
            parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        parts.append({"type": "text", "text": record["question"]})
        body = {"model": "m", "messages": [{"role": "user", "content": parts}], "max_tokens": length}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, questions))


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="the tiny preset if left out")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    engine = load_engine(options.checkpoint) if options.checkpoint else tiny_engine()
    times: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, length = Path(name), options.max_new_tokens
        questions = make_questions(options.questions, folder)
        settings = ServerSettings(model_name="m", max_batch=options.batch, max_queue=options.questions)
        with running_server(engine, settings, port=0) as url:
            ways = {
                "transformers.generate, one by one": lambda: one_by_one(engine, questions, folder, length),
                "run": lambda: by_run(engine, questions, folder, length, options.batch),
                "serve over HTTP": lambda: by_http(url, questions, folder, length, options.batch),
            }
            answers = {way: call() for way, call in ways.items()}  # warm-up, and the answers to compare
            for _ in range(options.rounds):
                for way, call in ways.items():
                    start, used = time.perf_counter(), time.process_time()
                    call()
                    times.setdefault(way, []).append(time.perf_counter() - start)
                    cpu.setdefault(way, []).append(time.process_time() - used)
    first = next(iter(answers))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {options.questions} questions of up to "
          f"{length} new tokens, batch {options.batch}, {options.rounds} rounds")  # fmt: skip
    for way, seconds in times.items():
        ratios = [base / own for base, own in zip(times[first], seconds, strict=True)]
        cpu_ratios = [base / own for base, own in zip(cpu[first], cpu[way], strict=True)]
        same = sum(one == other for one, other in zip(answers[first], answers[way], strict=True))
        print(f"{way:36} {options.questions / statistics.median(seconds):7.1f} answers/s   ratio {spread(ratios)}   "
              f"by CPU time {spread(cpu_ratios)}   "
              f"same answers: {same}/{options.questions}")  # fmt: skip


if __name__ == "__main__":
    main()
