from __future__ import annotations

import dataclasses
import io
import os
import re
import socket
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_scale.cli.demo import draw_map
from llava_scale.config import load_config
from llava_scale.errors import ConfigError
from llava_scale.model import build_model
from llava_scale.serving.chat import AnswerSettings
from llava_scale.serving.demo import Demo, build_page, launch
from llava_scale.serving.engine import Engine, GenerationRequest
from llava_scale.types import Turn

CHROMIUM = Path("/usr/bin/chromium")
SETTINGS = AnswerSettings(max_new_tokens=8)


def make_engine(compressor, *fields):
    fields = ["model.preset=tiny", *([f"model.compressor={compressor}"] if compressor else []), *fields]
    model, processor = build_model(load_config(None, fields).model, chat_template="native", seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed_tokens" not in name:
                parameter.mul_(4.0)
    return Engine(model, processor)


@pytest.fixture
def engine():
    return make_engine("{type: token_merging, ratio: 0.5}")


@pytest.fixture
def picture(png, tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(png("red", (300, 200)))
    return str(path)


@pytest.fixture
def clip(sight_and_sound, tmp_path):
    """Files of a video and of a sound."""
    files = [tmp_path / "video.mp4", tmp_path / "audio.wav"]
    for file, data in zip(files, sight_and_sound(1), strict=True):
        file.write_bytes(data)
    return [str(file) for file in files]


@pytest.fixture
def hearing():
    sounds = ("model.audio_tower=tiny", "model.audio_compressor={type: pool, window: [1, 1, 4]}")
    return make_engine("{type: token_merging, ratio: 0.5}", *sounds)


def fake_map(pixels, grid, group, anchors):
    buffer = io.BytesIO()
    Image.new("RGB", (len(group), len(anchors))).save(buffer, format="PNG")
    return buffer.getvalue()


def ask(demo, text, files=(), history=(), session=None, ratio=None):
    return list(demo.answer({"text": text, "files": list(files)}, list(history), session, ratio))


def test_an_answer_grows_and_ends_with_counts_and_a_map(engine, picture):
    steps = ask(Demo(engine, SETTINGS, fake_map), "what is it?", [picture], ratio=0.5)
    answers = [history[-1]["content"] for history, *_ in steps]
    assert len(set(answers)) > 2
    assert all(later.startswith(earlier) for earlier, later in pairwise(answers))
    history, session, table, merge_map = steps[-1]
    assert [message["role"] for message in history] == ["user", "user", "assistant"]
    assert "| media, before compression | 4 |" in table
    assert "| media, as the model reads them | 2 (50% fewer) |" in table
    assert merge_map.size == (4, 2)
    assert session.turns[-1].text == answers[-1]


def test_a_video_and_a_sound_are_asked_about(hearing, clip, picture):
    demo = Demo(hearing, SETTINGS, fake_map)
    *_, (history, session, table, merge_map) = ask(demo, "which one sounds?", clip, ratio=0.5)
    video, sound = (Path(file).read_bytes() for file in clip)
    request = GenerationRequest(turns=(Turn("user", "<video>\n<audio>\nwhich one sounds?"),),
                                media={"video": [video], "audio": [sound]})  # fmt: skip
    assert history[-1]["content"] == hearing.generate([request], max_new_tokens=8)[0]
    assert [message["content"].get("path") for message in history[:2]] == clip
    prompt = hearing.prompt(request, 8)
    assert f"| media, before compression | {prompt.num_features:,} |" in table
    assert "fewer" in table
    assert merge_map is None
    *_, (_, session, _, merge_map) = ask(demo, "and in this?", [picture], history, session)
    assert merge_map is not None
    assert {kind: len(items) for kind, items in session.media.items()} == {"image": 1, "video": 1, "audio": 1}


def test_a_sound_for_a_model_that_does_not_hear_is_said(engine, clip):
    ((history, *_),) = ask(Demo(engine, SETTINGS, fake_map), "what?", clip[1:])
    assert "the sample holds audio" in history[-1]["content"]


@pytest.mark.parametrize("kind", ["token_merging", "uniform_prune", "tome"])
def test_the_ratio_is_changed_between_answers(kind, png):
    engine, fresh = make_engine(f"{{type: {kind}, ratio: 0.5}}"), make_engine(f"{{type: {kind}, ratio: 0.0}}")
    request = GenerationRequest(turns=(Turn("user", "what is it?"),), media={"image": [png("red", (90, 60))]})
    half = engine.generate([request], max_new_tokens=8)
    num_tokens = len(engine.prompt(request, 8).input_ids)
    engine.set_ratio(0.0)
    assert (engine.ratio, len(engine.prompt(request, 8).input_ids)) == (0.0, num_tokens + 2)
    assert engine.generate([request], max_new_tokens=8) == fresh.generate([request], max_new_tokens=8)
    engine.set_ratio(0.5)
    assert engine.generate([request], max_new_tokens=8) == half


def test_a_conversation_is_read_again_under_another_ratio(engine, picture):
    demo = Demo(engine, SETTINGS, fake_map)
    *_, (history, session, _, _) = ask(demo, "what is it?", [picture], ratio=0.5)
    *_, (history, session, table, _) = ask(demo, "sure?", (), history, session, ratio=0.0)
    assert "| media, as the model reads them | 4 |" in table
    request = GenerationRequest(turns=session.turns[:-1], media={"image": [Path(picture).read_bytes()]})
    assert history[-1]["content"] == engine.generate([request], max_new_tokens=8)[0]


def test_what_cannot_be_asked_is_said_and_nothing_waits(engine, tmp_path, picture):
    demo = Demo(engine, SETTINGS, fake_map)
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    odd = tmp_path / "notes.txt"
    odd.write_text("words")
    for text, files, message in (
        ("", [], "write a question"),
        ("", [picture], "write a question to go with the files"),
        ("what?", [picture, str(bad)], "bad.png"),
        ("what?", [str(odd)], "notes.txt is no picture, video or sound"),
    ):
        ((history, session, table, _),) = ask(demo, text, files)
        assert message in history[-1]["content"]
        assert str(tmp_path) not in history[-1]["content"]
        assert (session.waiting, table) == ({}, "")


def test_a_failing_model_is_said(engine, monkeypatch):
    monkeypatch.setattr(engine.model, "logits", lambda *_: 1 / 0)
    ((history, *_),) = ask(Demo(engine, SETTINGS, fake_map), "hello")
    assert "the model failed" in history[-1]["content"]


def test_models_without_a_ratio_have_none_to_change():
    engine = make_engine("")
    assert engine.ratio is None
    with pytest.raises(ConfigError, match="removes no share"):
        engine.set_ratio(0.5)
    with pytest.raises(ConfigError, match=r"must be in \[0, 1\)"):
        make_engine("{type: uniform_prune}").set_ratio(1.0)


def test_settings_stay_as_they_are():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SETTINGS.max_new_tokens = 3


def test_the_page_in_a_real_browser(hearing, picture, clip, tmp_path):
    pytest.importorskip("gradio", reason="the extra [demo] is not installed")
    pytest.importorskip("matplotlib", reason="the extra [demo] is not installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there (apt install chromium)")
    shots = Path(os.environ.get("DEMO_SHOTS", tmp_path))
    page = build_page(hearing, SETTINGS, draw_map, title="tiny")
    url = launch(page, host="127.0.0.1", port=free_port(), max_file_mb=1, block=False)
    try:
        with api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
            for width in (1280, 390):
                visit(api, browser.new_page(viewport={"width": width, "height": 900}), url, picture, clip, shots)
            browser.close()
    finally:
        page.close()


def visit(api, tab, url, picture, clip, shots):
    """One visitor: asks about a picture, moves the slider, asks about a video and a sound, begins anew."""
    errors = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    requests = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(url)
    api.expect(tab.locator("#counts")).to_contain_text("Token counts appear", timeout=60_000)
    tab.set_input_files("#question input[type=file]", picture)
    api.expect(tab.locator("#question img")).to_be_visible(timeout=60_000)
    tab.locator("#question textarea").fill("what color is it?")
    tab.locator("#question textarea").press("Enter")
    api.expect(tab.locator("#counts")).to_contain_text("50% fewer", timeout=120_000)
    api.expect(tab.locator("#map img")).to_be_visible(timeout=60_000)
    api.expect(tab.locator("#chat")).to_contain_text("what color is it?")
    assert tab.locator("#chat .bot").count() >= 1
    tab.screenshot(path=shots / f"demo-{tab.viewport_size['width']}.png", full_page=True)
    tab.locator("#ratio input[type=number]").fill("0")
    tab.locator("#ratio input[type=number]").press("Enter")
    tab.locator("#question textarea").fill("sure?")
    tab.locator("#question textarea").press("Enter")
    api.expect(tab.locator("#counts")).not_to_contain_text("fewer", timeout=120_000)
    api.expect(tab.locator("#question textarea")).to_have_value("")
    tab.set_input_files("#question input[type=file]", clip)
    api.expect(tab.locator("#question").get_by_role("listitem")).to_have_count(2, timeout=60_000)
    tab.locator("#question textarea").fill("which one sounds?")
    tab.locator("#question textarea").press("Enter")
    api.expect(tab.locator("#chat video")).to_be_visible(timeout=120_000)
    api.expect(tab.locator("#chat")).to_contain_text("which one sounds?")
    api.expect(tab.locator("#chat audio")).to_have_count(1)
    assert not any(button.is_visible() for button in tab.get_by_title("Share").all()), "files could leave the page"
    api.expect(tab.locator("#counts")).to_contain_text("fewer", timeout=120_000)
    tab.screenshot(path=shots / f"demo-{tab.viewport_size['width']}-video.png", full_page=True)
    wide = tab.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth + 1")
    assert not wide, "the page is wider than the screen"
    tab.locator("#reset").click()
    api.expect(tab.locator("#chat")).not_to_contain_text("what color is it?", timeout=60_000)
    assert not errors
    foreign = [address for address in requests if re.match(r"https?://", address) and not address.startswith(url)]
    tab.screenshot(path=shots / f"demo-{tab.viewport_size['width']}-new.png")
    assert foreign == [], "the page loads something from elsewhere"
    tab.close()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
