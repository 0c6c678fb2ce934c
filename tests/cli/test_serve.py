from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from typer.testing import CliRunner

from llava_scale.cli import build_app
from llava_scale.cli.common import check_server, name_of
from llava_scale.config import ModelConfig
from llava_scale.errors import ConfigError, MissingExtraError
from llava_scale.model import build_model

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")


def test_hosts_are_checked_before_the_model_is_loaded(tmp_path):
    done = CliRunner().invoke(build_app(), ["serve", str(tmp_path), "--allow-url", "https://x/"])
    assert isinstance(done.exception, ConfigError)
    assert "takes host names" in str(done.exception)


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(command, tmp_path):
    if command == "demo":
        pytest.importorskip("gradio", reason="the extra [demo] is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(build_app(), [command, str(tmp_path), "--port", port])
    assert isinstance(done.exception, ConfigError)
    assert re.match(rf"cannot listen at 127\.0\.0\.1:{port}: .*choose another --host or --port", str(done.exception))


def test_a_missing_extra_is_told_before_the_model_is_loaded():
    with pytest.raises(MissingExtraError, match=r"llava-scale\[demo\]"):
        check_server("no_such_package_at_all", "demo", host="127.0.0.1", port=1)


def test_a_model_is_called_by_its_run_or_its_folder(tmp_path):
    assert name_of(tmp_path / "mine" / "final") == "mine"
    assert name_of(tmp_path / "llava") == "llava"


@pytest.mark.slow
def test_a_checkpoint_is_served_until_ctrl_c(tmp_path):
    folder = tmp_path / "mine" / "final"
    model, processor = build_model(ModelConfig(preset="tiny"), chat_template="native", seed=3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from llava_scale.cli import main; main()", "serve", str(folder)]
    with subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu"], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            assert re.match(rf"mine at http://127\.0\.0\.1:{port}/v1", line)
            body = {"model": "mine", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            for _ in range(1000):
                try:
                    with urllib.request.urlopen(request) as response:
                        answer = json.load(response)
                    break
                except ConnectionError:
                    continue
                except urllib.error.URLError:
                    continue
            assert answer["choices"][0]["message"]["role"] == "assistant"
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) in (0, -signal.SIGINT, 130)
        finally:
            process.kill()
