from __future__ import annotations

import base64
import io
import json
import os
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from llava_scale.serving.engine import Engine, GenerationRequest
from llava_scale.types import Turn

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from llava_scale.serving.http import running_server  # noqa: E402
from llava_scale.serving.server import ServerSettings  # noqa: E402

MODEL = "tiny"
ENDLESS = 3000


@pytest.fixture(scope="module")
def engine(lively_parts):
    return Engine(*lively_parts)


@pytest.fixture(scope="module")
def url(engine):
    settings = ServerSettings(model_name=MODEL, max_batch=8, max_queue=40, max_body_mb=12, max_new_tokens=ENDLESS)
    with running_server(engine, settings, port=0) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(autouse=True)
def server_stays_up(url):
    yield
    assert get(f"{url}/health")[1] == b'{"status":"ok"}'


def get(address, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as response:
        return response.status, response.read()


def picture(data: bytes, kind="image/png"):
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def ask(client, *messages, **options):
    return client.chat.completions.create(model=MODEL, messages=list(messages), **{"max_tokens": 8, **options})


def said(completion):
    return completion.choices[0].message.content


def metric(url, name):
    lines = get(f"{url}/metrics")[1].decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_a_conversation_of_three_turns_about_a_picture(client, engine, png):
    messages = [user(picture(png("red")), text("what color is it?"))]
    turns = (Turn("user", "<image>\nwhat color is it?"),)
    for question in ("and the shape?", "sure?", None):
        completion = ask(client, *messages)
        request = GenerationRequest(turns=turns, media={"image": [png("red")]})
        assert said(completion) == engine.generate([request], max_new_tokens=8)[0]
        assert completion.usage.prompt_tokens == len(engine.prompt(request, 8).input_ids)
        if question is not None:
            messages += [{"role": "assistant", "content": said(completion)}, {"role": "user", "content": question}]
            turns = (*turns, Turn("assistant", said(completion)), Turn("user", question))
    assert len(turns) == 5


def test_a_streamed_answer_is_the_answer_in_pieces(client, png):
    messages = [user(picture(png("blue")), text("what is it?"))]
    whole = ask(client, *messages, max_tokens=20)
    chunks = list(ask(client, *messages, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == said(whole)
    assert len(pieces) > 3
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_32_clients_at_once_each_get_their_own_answer(client, engine, png):
    colors = ("red", "green", "blue", "yellow")
    cases = [(f"{n}: what is it?", png(colors[n % 4]) if n % 3 else None, 4 + n % 9) for n in range(32)]
    expected = []
    for words, data, length in cases:
        media = {"image": [data]} if data else {}
        turn = Turn("user", f"<image>\n{words}" if data else words)
        expected += engine.generate([GenerationRequest(turns=(turn,), media=media)], max_new_tokens=length)
    assert len(set(expected)) > 24

    def call(case):
        words, data, length = case
        return said(ask(client, user(*([picture(data)] if data else []), text(words)), max_tokens=length))

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(call, cases)) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_frees_its_place(url, engine, monkeypatch, stream):
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", None)
    before, written = (
        metric(url, 'llava_scale_requests_total{status="499"}'),
        metric(url, 'llava_scale_tokens_total{kind="answer"}'),
    )
    sock = post(url, {"messages": [user(text("hello"))], "max_tokens": ENDLESS, "stream": stream})
    wait_for(lambda: metric(url, "llava_scale_running") == 1)
    sock.close()
    wait_for(lambda: metric(url, 'llava_scale_requests_total{status="499"}') == before + 1)
    wait_for(lambda: metric(url, "llava_scale_running") == 0)
    assert metric(url, 'llava_scale_tokens_total{kind="answer"}') - written < ENDLESS


def post(url, fields):
    """A request on a socket of its own, whose answer nobody has read yet."""
    body = json.dumps({"model": MODEL, **fields}).encode()
    sock = connect(url)
    sock.sendall(head(f"Content-Length: {len(body)}") + body)
    return sock


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def head(*lines):
    first = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join([*first, *lines, "", ""]).encode()


def test_a_body_of_ten_megabytes_is_read(client, engine):
    pixels = random.Random(0).randbytes(1570 * 1570 * 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (1570, 1570), pixels).save(buffer, format="PNG", compress_level=0)
    data = buffer.getvalue()
    assert 9.5e6 < len(base64.b64encode(data)) < 11e6
    request = GenerationRequest(turns=(Turn("user", "<image>\nwhat?"),), media={"image": [data]})
    assert said(ask(client, user(picture(data), text("what?")))) == engine.generate([request], max_new_tokens=8)[0]


@pytest.mark.parametrize("header", [f"Content-Length: {10**9}", "Transfer-Encoding: chunked"])
def test_a_body_of_a_gigabyte_is_refused_without_being_kept(url, header):
    psutil = pytest.importorskip("psutil")
    process = psutil.Process(os.getpid())
    before, piece, sent = process.memory_info().rss, b"x" * 1_000_000, 0
    framed = piece if "Length" in header else b"%x\r\n%s\r\n" % (len(piece), piece)
    with connect(url) as sock:
        sock.sendall(head(header))
        answer = b""
        sock.settimeout(0.05)
        while b"\r\n\r\n" not in answer and sent < 1000:
            try:
                sock.settimeout(20)
                sock.sendall(framed)
                sent += 1
                sock.settimeout(0.01)
                answer += sock.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                sock.settimeout(20)
                answer += sock.recv(65536)
                break
    assert answer.startswith(b"HTTP/1.1 413")
    assert sent < 100
    assert process.memory_info().rss - before < 100e6


def test_the_openai_client_is_told_that_its_request_is_too_long(client):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, user(picture(b"x" * 10_000_000), text("what?")))
    assert caught.value.status_code == 413
    assert caught.value.code == "request_too_large"


def image_url(address):
    return user({"type": "image_url", "image_url": {"url": address}}, text("what?"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("data:image/png;base64,@@@@", "malformed base64"),
        ("data:image/png;base64,", "the medium is empty"),
        ("data:image/png,abc", "must begin with data:image/...;base64,"),
        ("data:text/html;base64,aGk=", "must begin with data:image/...;base64,"),
        ("data:image/png;base64,aGVsbG8=", "picture"),
        ("file:///etc/passwd", "files are not"),
        ("FILE:/etc/passwd", "files are not"),
        ("/etc/passwd", "files are not"),
        ("../../../etc/passwd", "files are not"),
        ("http://169.254.169.254/latest/meta-data/", "only data: URLs"),
        ("https://169.254.169.254/latest/meta-data/", "is not allowed"),
        ("https://localhost/", "is not allowed"),
        ("https://[::1]/", "is not allowed"),
        ("https://2852039166/", "is not allowed"),
        ("https://a@b.example/", "no user name"),
        ("https://exa mple.org/", "percent-encoded"),
        ("https://example.org:99999/", "cannot be read"),
        ("", "only data: URLs"),
    ],
)
def test_what_may_not_be_read_is_refused(client, address, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        ask(client, image_url(address))
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/v1/../../etc/passwd", "/%2e%2e/etc/passwd", "/v1/models/..%2f..%2fetc", "//"]
)
def test_tricks_with_the_path_find_nothing(url, path):
    with connect(url) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"root:" not in answer


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b"{}", 400, "model: Field required"),
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [user({"type": "smell"})]}, 400, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "must end with a message of the user"),
        ({"temperature": 3}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": ENDLESS + 1}, 400, "max_tokens must be at most 3000"),
        ({"n": 2}, 400, "this value of 'n' is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "'tools' is not supported"),
        ({"max_toknes": 3}, 400, "unknown parameter 'max_toknes'"),
        ({"model": "other"}, 404, "only 'tiny'"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "more than the model's"),
        ({"messages": [user(*[text("<image> <image>")])]}, 400, "2 <image> placeholders but 0 images"),
        ({"messages": [user(*[picture(b"x")] * 33)]}, 400, "at most 32"),
        ({"messages": [user({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,aGVsbG8="}})]}, 400, ""),
        ({"messages": [user({"type": "input_audio", "input_audio": {"data": "aGVsbG8=", "format": "wav"}})]}, 400, ""),
        ({"messages": [{"role": "system", "content": [picture(b"x")]}]}, 400, "only messages of the user hold media"),
        ({"messages": [user({"type": "image_url", "image_url": "data:x"})]}, 400, "content.0.image_url: Input"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content: "),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_used_are_told_why(url, body, status, message):
    if isinstance(body, dict):
        body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **body}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == status
    assert message in json.load(caught.value)["error"]["message"]


def test_messages_one_after_the_other_are_one_on_several_lines(client, png):
    apart = [{"role": "system", "content": "Be kind."}, {"role": "developer", "content": "Be short."},
             user(picture(png("red"))), user(text("what is it?"))]  # fmt: skip
    joined = [{"role": "system", "content": "Be kind.\nBe short."}, user(picture(png("red")), text("what is it?"))]
    one, other = ask(client, *apart), ask(client, *joined)
    assert (said(one), one.usage) == (said(other), other.usage)


def test_base64_on_several_lines_is_read(client, png):
    wrapped = base64.encodebytes(png("red")).decode()
    assert wrapped.count("\n") > 1
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{wrapped}"}}
    assert said(ask(client, user(part, text("what?")))) == said(ask(client, user(picture(png("red")), text("what?"))))


def test_other_methods_and_content_types_are_refused(url):
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(f"{url}/v1/chat/completions")
    assert caught.value.code == 405
    request = urllib.request.Request(f"{url}/v1/chat/completions", b"{}", {"Content-Type": "text/plain"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == 415


def test_an_answer_ends_at_a_stop_text_and_at_its_length(client):
    message = {"role": "user", "content": "hello"}
    whole = said(ask(client, message, max_tokens=30))
    stop = whole[len(whole) // 2 :][:3]
    cut = ask(client, message, max_tokens=30, stop=[stop])
    assert said(cut) == whole.split(stop)[0].rstrip()
    assert cut.choices[0].finish_reason == "stop"
    short = ask(client, message, max_completion_tokens=2, max_tokens=None)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 2)


def test_draws_are_repeatable_by_seed(client):
    message = {"role": "user", "content": "hello"}
    answers = [said(ask(client, message, temperature=1.5, top_p=0.95, seed=seed)) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "llava-scale"
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        client.models.retrieve("other")


def test_more_requests_than_there_is_room_for_are_sent_away(engine, monkeypatch):
    settings = ServerSettings(model_name=MODEL, max_batch=1, max_queue=0, max_new_tokens=ENDLESS)
    with running_server(engine, settings, port=0) as url:
        with post(url, {"messages": [user(text("hello"))], "max_tokens": ENDLESS}):
            wait_for(lambda: metric(url, "llava_scale_running") == 1)
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                with pytest.raises(openai.RateLimitError) as caught:
                    ask(client, {"role": "user", "content": "hi"})
                assert caught.value.response.headers["retry-after"] == "1"
        wait_for(lambda: metric(url, "llava_scale_running") == 0)


def test_a_client_that_sends_too_slowly_is_sent_away(engine):
    settings = ServerSettings(model_name=MODEL, body_timeout_s=0.2)
    with running_server(engine, settings, port=0) as url, connect(url) as sock:
        sock.sendall(head("Content-Length: 1000") + b"{")
        assert sock.recv(65536).startswith(b"HTTP/1.1 408")


def test_a_model_that_fails_is_a_server_error_and_the_next_request_works(url, client, engine, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(engine.model, "logits", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            ask(client, {"role": "user", "content": "hello"})
    assert said(ask(client, {"role": "user", "content": "hello"}))


def test_ending_the_server_ends_what_runs(engine):
    before = set(threading.enumerate())
    settings = ServerSettings(model_name=MODEL, max_new_tokens=ENDLESS)
    with running_server(engine, settings, port=0) as url:
        sock = post(url, {"messages": [user(text("hello"))], "max_tokens": ENDLESS, "stream": True})
        wait_for(lambda: metric(url, "llava_scale_running") == 1)
    with sock:
        assert b"".join(iter(lambda: sock.recv(65536), b"")).startswith(b"HTTP/1.1 200")
    names = {thread.name for thread in set(threading.enumerate()) - before}
    assert "llava-scale-worker" not in names
    assert "llava-scale-http" not in names
