from __future__ import annotations

import json

import pytest

from llava_scale.errors import ConfigError, SampleError
from llava_scale.serving.batch import answer_file


class EchoEngine:
    """Answers with the question in capitals; counts what it was asked."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.batch_sizes: list[int] = []
        self._fail_after = fail_after

    def try_generate(self, requests, *, batch_size, **_):
        self.batch_sizes.append(batch_size)
        answers = []
        for request in requests:
            if self._fail_after is not None and len(self.asked) >= self._fail_after:
                raise KeyboardInterrupt
            text = request.turns[-1].text
            missing = [path for path in request.media["image"] if not path.is_file()]
            self.asked.append(text)
            answers.append(SampleError(f"cannot read {missing[0].name}") if missing else text.upper())
        return answers


@pytest.fixture
def source(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    path = tmp_path / "in.jsonl"
    lines = [{"id": f"q{i}", "question": f"number {i}?", "image": "a.png"} for i in range(20)]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_answered_in_order_with_its_question(source, tmp_path):
    progress = []
    target = tmp_path / "new" / "out.jsonl"
    outcome = answer_file(
        EchoEngine(), source, target, model_name="m", batch_size=1, on_progress=lambda *a: progress.append(a)
    )
    lines = read(target)
    assert [line["id"] for line in lines] == [f"q{i}" for i in range(20)]
    assert lines[3] == {
        "line": 4, "id": "q3", "image": "a.png", "question": "number 3?", "model": "m", "answer": "NUMBER 3?",
    }  # fmt: skip
    assert (outcome.num_lines, outcome.num_kept, outcome.num_answered, outcome.errors) == (20, 0, 20, ())
    assert progress == [(0, 20), (16, 20), (20, 20)]


def test_a_cut_run_goes_on_where_it_was(source, tmp_path):
    target = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_file(EchoEngine(fail_after=18), source, target, model_name="m", batch_size=1)
    with target.open("a") as out:
        out.write('{"line": 17, "id": "q16", "ans')
    engine = EchoEngine()
    outcome = answer_file(engine, source, target, model_name="m", batch_size=1)
    assert (outcome.num_kept, outcome.num_answered) == (16, 4)
    assert engine.asked == [f"number {i}?" for i in range(16, 20)]
    assert [line["line"] for line in read(target)] == list(range(1, 21))


def test_bad_lines_carry_their_error_and_are_tried_again(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = ["no json", "[1]", "{}", '{"question": ""}', '{"question": "a", "image": 3}', '{"question": "b"}']
    texts += ['{"question": "c", "conversations": []}', '{"conversations": [{"from": "cat", "value": "d"}]}']
    texts += ['{"question": "late", "image": ["late.png"]}', '{"question": "last"}']
    source.write_text("\n".join(texts))
    outcome = answer_file(EchoEngine(), source, target, model_name="m")
    assert [number for number, _ in outcome.errors] == [1, 2, 3, 4, 5, 7, 8, 9]
    messages = dict(outcome.errors)
    assert "is not JSON" in messages[1]
    assert "must be a JSON object" in messages[2]
    assert "exactly one of 'question' and 'conversations'" in messages[3]
    assert "late.png" in messages[9]
    (tmp_path / "late.png").write_bytes(b"x")
    engine = EchoEngine()
    outcome = answer_file(engine, source, target, model_name="m")
    assert engine.asked == ["late"]
    assert (outcome.num_kept, outcome.num_answered, len(outcome.errors)) == (2, 1, 7)
    assert [line["line"] for line in read(target)] == list(range(1, 11))
    assert read(target)[8]["answer"] == "LATE"


def test_conversations_are_answered_after_their_history(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes?"}, {"from": "human", "value": "name?"}]
    source.write_text(json.dumps({"conversations": talk}))
    answer_file(EchoEngine(), source, target, model_name="m")
    assert read(target)[0]["answer"] == "NAME?"
    assert read(target)[0]["conversations"] == talk


def test_answers_of_another_model_or_to_other_questions_are_never_mixed_in(source, tmp_path):
    target = tmp_path / "out.jsonl"
    answer_file(EchoEngine(), source, target, model_name="m")
    with pytest.raises(ConfigError, match="another model; choose another file"):
        answer_file(EchoEngine(), source, target, model_name="n")
    source.write_text(source.read_text().replace("number 3?", "what else?"))
    with pytest.raises(ConfigError, match="input line 4 answers another question"):
        answer_file(EchoEngine(), source, target, model_name="m")


def test_a_file_that_holds_no_answers_is_not_touched(source, tmp_path):
    target = tmp_path / "notes.txt"
    target.write_text("my notes\n")
    with pytest.raises(ConfigError, match="holds lines that are no answers"):
        answer_file(EchoEngine(), source, target, model_name="m")
    assert target.read_text() == "my notes\n"


def test_a_missing_input_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*in\.jsonl: No such file"):
        answer_file(EchoEngine(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", model_name="m")


def test_picture_paths_are_relative_to_the_media_root(source, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    outcome = answer_file(EchoEngine(), source, tmp_path / "out.jsonl", model_name="m", media_root=folder)
    assert len(outcome.errors) == 20
    (folder / "a.png").write_bytes(b"x")
    assert answer_file(EchoEngine(), source, tmp_path / "out.jsonl", model_name="m", media_root=folder).errors == ()
