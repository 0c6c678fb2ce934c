from __future__ import annotations

import json
import threading
from dataclasses import dataclass, replace

import pytest

from llava_scale.data.dataset import open_dataset
from llava_scale.errors import CheckpointError, SampleError
from llava_scale.eval import task_data
from llava_scale.eval.answer_cache import AnswerCache, checkpoint_digest
from llava_scale.eval.likelihood import RowMaker, rank_captions
from llava_scale.eval.task_file import parse_task
from llava_scale.eval.task_result import write_tasks
from llava_scale.eval.task_runner import TaskRunner
from llava_scale.training.parallel import Ranks
from llava_scale.viz.task_page import write_tasks_page


@pytest.fixture(autouse=True)
def own_index_cache(shards, monkeypatch):
    monkeypatch.setattr(task_data, "open_dataset", lambda path: open_dataset(path, cache_dir=shards[1]))


def task_of(shards, **fields):
    tree = {"name": "colors", "data": str(shards[0]), "scorer": "exact_match", **fields}
    return parse_task(tree, origin="test")


def red(asked):
    def generate(longest):
        def answers(questions):
            asked.extend((question.key, longest) for question in questions)
            return [SampleError("too long") if q.gold == "yes" else "red" for q in questions]

        return answers

    return generate


def runner(tiny, generate, **fields):
    model, processor = tiny
    return TaskRunner(model=model, processor=processor, generate=generate, **fields)


def test_answers_are_scored_and_what_cannot_be_asked_is_listed(tiny, shards):
    asked = []
    result = runner(tiny, red(asked)).run(task_of(shards, where={"task": "color"}, max_new_tokens=7))
    assert len(asked) == 32
    assert asked[0][1] == 7
    assert len(result.skipped) == 12  # the questions whose answer is yes
    assert (result.num_samples, result.scores["exact_match"].num_items) == (16, 20)
    assert result.scores["exact_match"].value == pytest.approx(4 / 20)
    assert len(result.examples) == 20
    assert result.examples[0].pictures[0].startswith(b"\xff\xd8")


def test_answers_are_kept_and_found_again_by_model_task_and_content(tiny, shards, tmp_path):
    asked = []
    run = runner(tiny, red(asked), digest="m1", cache=tmp_path).run
    task = task_of(shards, where={"task": "text"})
    first = run(task)
    assert (len(asked), first.num_cached) == (4, 0)
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], lines[-1][: len(lines[-1]) // 2]]))  # killed while writing
    again = run(task)
    assert (len(asked), again.num_cached) == (5, 3)
    assert again.scores == first.scores
    assert run(task).num_cached == 4
    assert run(replace(task, scorer="anls")).num_cached == 4  # the same answers, scored otherwise
    assert run(replace(task, prompt="{question} Now.")).num_cached == 0
    assert run(replace(task, max_new_tokens=3)).num_cached == 0
    assert runner(tiny, red(asked), digest="m2", cache=tmp_path).run(task).num_cached == 0


def test_choices_are_made_by_likelihood_as_caption_ranking_does(tiny, shards, dataset):
    model, processor = tiny
    task = task_of(shards, scorer="ranking", where={"task": "caption"}, candidates=4)
    result = runner(tiny, red([])).run(task)
    assert result.scores["top1"].num_items == 8
    numbers = [item.number for item in result.items]
    rows = [RowMaker(dataset, processor, max_length=1000).row([number])[0] for number in numbers]
    everything = replace(task, candidates=99)
    ranked = rank_captions(model, rows, num_candidates=99)
    assert runner(tiny, red([])).run(everything).scores["top1"].value == ranked.top1.value
    summed = replace(everything, normalise="sum")
    assert runner(tiny, red([])).run(summed).scores["top1"].value == ranked.sum_top1.value


def test_letters_can_be_chosen_instead_of_texts(tiny, tmp_path):
    records = [{"question": "Which?", "choices": ["red", "green", "blue"], "answer": "B"}]
    (tmp_path / "r.json").write_text(json.dumps(records))
    task = parse_task(
        {"data": str(tmp_path / "r.json"), "scorer": "multiple_choice", "answer_with": "letter",
         "prompt": "{question}\n{choices}"}, origin="t",
    )  # fmt: skip
    result = runner(tiny, red([])).run(task)
    texts = runner(tiny, red([])).run(replace(task, answer_with="text"))
    assert len(result.responses[0].scores) == 3
    assert result.responses[0].scores != texts.responses[0].scores


@dataclass(frozen=True)
class Together(Ranks):
    """Ranks that are threads of this process."""

    board: tuple = ()

    def gather(self, value):
        values, barrier = self.board
        barrier.wait(timeout=60)
        values[self.rank] = value
        barrier.wait(timeout=60)
        return list(values)

    def total(self, count):
        return sum(self.gather(count))


@pytest.mark.parametrize("fields", [{}, {"scorer": "ranking", "where": {"task": "caption"}}])
def test_several_processes_find_what_one_finds(tiny, shards, tmp_path, fields):
    task = task_of(shards, **fields)
    alone = runner(tiny, red([])).run(task)
    board, asked, results = ([None] * 3, threading.Barrier(3)), [[], [], []], [None] * 3
    lock = threading.Lock()

    def work(rank):
        ranks = Together(rank=rank, size=3, board=board)

        def locked(longest):
            def answers(questions):
                with lock:
                    return red(asked[rank])(longest)(questions)

            return answers

        results[rank] = runner(tiny, locked, ranks=ranks, cache=tmp_path).run(task)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    for result in results:
        assert result.scores == alone.scores
        assert result.scored.points == alone.scored.points
        assert result.skipped == alone.skipped
    assert results[0].examples == alone.examples
    if not fields:
        assert all(0 < len(part) < 52 for part in asked)
    assert len(list(tmp_path.glob("*.jsonl"))) == 3
    assert runner(tiny, red([]), cache=tmp_path).run(task).num_cached == len(alone.items)


def test_nothing_to_score_says_why(tiny, shards, tmp_path):
    with pytest.raises(SampleError, match=r"no sample can be used, none has \{'task': 'colour'\}"):
        runner(tiny, red([])).run(task_of(shards, where={"task": "colour"}))
    (tmp_path / "r.json").write_text(json.dumps([{"question": "?"}]))
    with pytest.raises(SampleError, match="this one because: needs 'conversations'"):
        runner(tiny, red([])).run(task_of(shards, data=str(tmp_path / "r.json")))


def test_results_are_written_with_pictures_answers_and_a_page(tiny, shards, tmp_path):
    ranking = task_of(shards, name="rank it", scorer="ranking", where={"task": "caption"})
    results = [runner(tiny, red([])).run(task) for task in (task_of(shards, examples=6), ranking)]
    target = write_tasks(results, tmp_path / "out", checkpoint="c", digest="d")
    content = json.loads(target.read_text())
    assert [task["name"] for task in content["tasks"]] == ["colors", "rank it"]
    shown = content["tasks"][0]["examples"]
    assert len(shown) == 6
    assert all((target.parent / name).is_file() for example in shown for name in example["pictures"])
    lines = [json.loads(line) for line in (target.parent / "answers-rank_it.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert len(lines[0]["scores"]) == 8
    page = write_tasks_page(target.parent).read_text()
    assert "rank it" in page
    assert "data:image/jpeg;base64," in page
    assert "too long" in page
    with pytest.raises(CheckpointError, match=r"tasks\.json is missing"):
        write_tasks_page(tmp_path)


def test_a_digest_names_the_content_of_a_checkpoint(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "a" / "card.json").write_text("written later")
    assert checkpoint_digest(tmp_path / "a") == checkpoint_digest(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"Weights")
    assert checkpoint_digest(tmp_path / "a") != checkpoint_digest(tmp_path / "b")
    with pytest.raises(CheckpointError, match="holds no weights"):
        checkpoint_digest(tmp_path)


def test_without_a_folder_nothing_is_kept(shards):
    cache = AnswerCache(None, "m", task_of(shards))
    cache.close()
