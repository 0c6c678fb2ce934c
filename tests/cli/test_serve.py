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
from llava_scale.config import ModelConfig
from llava_scale.errors import ConfigError
from llava_scale.model import build_model

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")


def test_hosts_are_checked_before_the_model_is_loaded(tmp_path):
    done = CliRunner().invoke(build_app(), ["serve", str(tmp_path), "--allow-url", "https://x/"])
    assert isinstance(done.exception, ConfigError)
    assert "takes host names" in str(done.exception)


@pytest.mark.slow
def test_a_checkpoint_is_served_until_ctrl_c(tmp_path):
    folder = tmp_path / "final"
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
            assert re.match(rf"final at http://127\.0\.0\.1:{port}/v1", line)
            body = {"model": "final", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
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
