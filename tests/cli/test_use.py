from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import subprocess
import sys
import tarfile
import termios

import pytest
from PIL import Image
from typer.testing import CliRunner

from llava_scale.cli import build_app
from llava_scale.cli.terminal_chat import talk
from llava_scale.config import ModelConfig
from llava_scale.errors import CheckpointError, ConfigError, SampleError
from llava_scale.model import build_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "final"
    model, processor = build_model(ModelConfig(preset="tiny"), chat_template="native", seed=3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (30, 20), "red").save(path)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def invoke(*arguments: object, **options):
    done = CliRunner().invoke(build_app(), [str(argument) for argument in arguments], **options)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def write_shard(folder):
    folder.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "blue").save(buffer, format="JPEG")
    with tarfile.open(folder / "shard-00000.tar", "w") as tar:
        for i in range(6):
            turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"blue {i}"}]
            record = {"id": str(i), "conversations": turns, "task": "caption"}
            for ext, data in (("json", json.dumps(record).encode()), ("jpg", buffer.getvalue())):
                info = tarfile.TarInfo(f"{i}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def test_chat_answers_one_question_about_a_picture(checkpoint, picture):
    done = invoke("chat", checkpoint, "what is it?", "--image", picture, "--max-new-tokens", 5)
    assert done.exit_code == 0
    assert done.stdout.strip()
    assert invoke("chat", checkpoint, "what is it?", "--image", picture, "--max-new-tokens", 5).stdout == done.stdout


def test_a_conversation_goes_on_after_mistakes(checkpoint, picture, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    lines = ["/image nowhere.png", f"/image {tmp_path / 'text.png'}", "/imag x", "/image", f"/image '{picture}'"]
    lines += [
        "what is it?",
        "<image> what?",
        "",
        "/help",
        f"/save {tmp_path / 'talk.json'}",
        "/save",
        "/reset",
        f"/save {tmp_path / 'no.json'}",
    ]
    lines += [f"/audio {picture}", "/video"]
    done = invoke("chat", checkpoint, "--max-new-tokens", 4, input="\n".join(lines) + "\n")
    assert done.exit_code == 0
    assert "error: cannot read nowhere.png: No such file or directory" in done.stdout
    assert "text.png" in done.stdout
    assert "unknown command '/imag'; did you mean '/image'?" in done.stdout
    assert "error: /image needs the path of a picture" in done.stdout
    assert "picture 1 for the next question" in done.stdout
    assert "(30 x 20)" in done.stdout
    assert "error: has 1 <image> placeholder but 0 images" in done.stdout
    assert "Ctrl-C stops an answer." in done.stdout
    assert "forgotten" in done.stdout
    assert "error: /save needs the name of a file" in done.stdout
    assert "error: there is no conversation to save yet" in done.stdout
    assert "error: /video needs the path of a video" in done.stdout
    assert not (tmp_path / "no.json").exists()
    (sample,) = json.loads((tmp_path / "talk.json").read_text())
    assert sample["image"] == str(picture)
    assert sample["conversations"][0] == {"from": "human", "value": "<image>\nwhat is it?"}
    assert f"error: {picture}: " in done.stdout


class FakeSession:
    waiting: dict = {}  # noqa: RUF012

    def __init__(self, pieces):
        self.pieces = pieces
        self.asked = []

    def ask(self, text):
        self.asked.append(text)
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def keyboard(*lines):
    waiting = iter(lines)

    def read(prompt):
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(capsys):
    session = FakeSession(["It is", KeyboardInterrupt()])
    talk(session, keyboard("first", "second", "/exit", "never"))
    assert session.asked == ["first", "second"]
    assert capsys.readouterr().out.count("It is (stopped)") == 2


def test_ctrl_c_at_the_prompt_tells_how_to_leave_and_ctrl_d_leaves(capsys):
    session = FakeSession([])
    talk(session, keyboard(KeyboardInterrupt(), "hello"))
    shown = capsys.readouterr().out
    assert "(Ctrl-D leaves)" in shown
    assert "(no answer)" in shown


def test_run_answers_a_file_and_goes_on(checkpoint, picture, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": i, "image": "a.png", "question": f"what is it {i}?"} for i in range(3)]
    source.write_text("\n".join(map(json.dumps, lines)) + "\nbroken\n")
    done = invoke("run", checkpoint, source, target, "--max-new-tokens", 4)
    assert done.exit_code == 1
    assert "3 of 4 lines answered" in done.stdout
    assert "line 4: is not JSON" in done.stderr
    again = invoke("run", checkpoint, source, target, "--max-new-tokens", 4, "--allow-bad", 1)
    assert again.exit_code == 0
    assert "0 of 4 lines answered, 3 were there already" in again.stdout
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert [answer.get("id") for answer in answers] == [0, 1, 2, None]
    fresh = invoke("run", checkpoint, source, target, "--max-new-tokens", 4, "--allow-bad", 1, "--overwrite")
    assert "3 of 4 lines answered:" in fresh.stdout
    assert [json.loads(line) for line in target.read_text().splitlines()] == answers


def test_run_never_overwrites_its_input(checkpoint, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"question": "hi"}\n')
    with pytest.raises(ConfigError, match="is the input too"):
        invoke("run", checkpoint, source, source, "--overwrite")
    with pytest.raises(ConfigError, match="holds lines that are no answers"):
        invoke("run", checkpoint, source, source)
    assert source.read_text() == '{"question": "hi"}\n'


def test_eval_prints_scores_and_writes_json_and_page(checkpoint, tmp_path):
    out = tmp_path / "eval"
    options = ("--ranking", 6, "--out", out, "--max-new-tokens", 4)
    done = invoke("eval", checkpoint, "--data", write_shard(tmp_path / "shards"), *options)
    assert done.exit_code == 0
    assert "held-out loss" in done.stdout
    assert "6 pictures among 6: top 1" in done.stdout
    result = json.loads((out / "eval.json").read_text())
    assert result["blind"]["image"]["value"] == pytest.approx(1 / 6)
    assert result["ranking"]["num_candidates"] == 6
    assert "data:image/jpeg;base64," in (out / "eval.html").read_text()


def test_report_compares_run_folders(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "lr": 0.1}\n')
    done = invoke("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert done.exit_code == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_wrong_places_are_refused_with_what_to_do(checkpoint, tmp_path, picture):
    with pytest.raises(CheckpointError, match=r"the model of this run is .*final"):
        invoke("chat", checkpoint.parent, "hi")
    with pytest.raises(CheckpointError, match="holds no model"):
        invoke("chat", tmp_path / "nothing", "hi")
    with pytest.raises(SampleError, match=r"cannot read .*none\.png"):
        invoke("chat", checkpoint, "hi", "--image", tmp_path / "none.png")
    with pytest.raises(ConfigError, match="top_p has no effect"):
        invoke("chat", checkpoint, "hi", "--top-p", 0.5)


@pytest.mark.slow
def test_ctrl_c_in_a_real_terminal_stops_the_answer_only(checkpoint):
    command = [sys.executable, "-c", "from llava_scale.cli import main; main()", "chat", str(checkpoint)]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "4000"], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    try:
        read_until(ours, b"> ")
        os.write(ours, b"hello\n")
        read_until(ours, b"hello\r\n")
        read_more(ours)
        os.write(ours, b"\x03")
        assert b"(stopped)" in read_until(ours, b"> ")
        os.write(ours, b"/help\n")
        assert b"Ctrl-C stops an answer." in read_until(ours, b"> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(ours)


def read_more(terminal: int) -> bytes:
    ready, _, _ = select.select([terminal], [], [], 120)
    assert ready, "nothing came within two minutes"
    return os.read(terminal, 4096)


def read_until(terminal: int, mark: bytes) -> bytes:
    seen = b""
    while mark not in seen:
        seen += read_more(terminal)
    return seen
