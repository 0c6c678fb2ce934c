"""Videos and sounds over HTTP, as files that were really encoded."""

from __future__ import annotations

import base64
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from llava_scale.config import load_config
from llava_scale.data.toy.encoding import SOUND_FILES, encode_sound
from llava_scale.data.toy.sounds import draw_sound, make_sound, render_sound
from llava_scale.model import build_model
from llava_scale.serving.engine import Engine, GenerationRequest
from llava_scale.serving.fetch import Fetcher
from llava_scale.types import Turn

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from llava_scale.serving.http import running_server  # noqa: E402
from llava_scale.serving.server import ServerSettings  # noqa: E402

MODEL = "av"
LENGTH = 8


@dataclass(frozen=True, kw_only=True)
class OneFile(Fetcher):
    """A host that has one file."""

    content: bytes = b""

    def fetch(self, url: str) -> bytes:
        return self.content if url == "https://media.example.org/clip.mp4" else super().fetch(url)


@pytest.fixture(scope="module")
def engine():
    fields = ["model.preset=tiny", "model.audio_tower=tiny", "model.compressor={type: pool, window: [2, 1, 1]}"]
    fields += ["model.audio_compressor={type: pool, window: [1, 1, 4]}"]
    model, processor = build_model(load_config(None, fields).model, chat_template="native", seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed_tokens" not in name:
                parameter.mul_(4.0)
    return Engine(model, processor)


@pytest.fixture(scope="module")
def clip(sight_and_sound):
    """A video with its sound as a track, and the sound as a file of its own."""
    return sight_and_sound(1)


@pytest.fixture(scope="module")
def url(engine, clip):
    fetcher = OneFile(content=clip[0])
    settings = ServerSettings(model_name=MODEL, max_batch=8, max_queue=40, fetcher=fetcher)
    with running_server(engine, settings, port=0) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def encoded(data):
    return base64.b64encode(data).decode()


def video(data, kind="video/mp4"):
    return {"type": "video_url", "video_url": {"url": f"data:{kind};base64,{encoded(data)}"}}


def sound(data, ext="wav"):
    return {"type": "input_audio", "input_audio": {"data": encoded(data), "format": ext}}


def sound_url(data, kind="audio/wav"):
    return {"type": "audio_url", "audio_url": {"url": f"data:{kind};base64,{encoded(data)}"}}


def ask(client, *parts, history=()):
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    messages = [*history, {"role": "user", "content": content}]
    return client.chat.completions.create(model=MODEL, messages=messages, max_tokens=LENGTH)


def said(completion):
    return completion.choices[0].message.content


def expected(engine, text, **media):
    turns = text if isinstance(text, tuple) else (Turn("user", text),)
    return engine.generate([GenerationRequest(turns=turns, media=media)], max_new_tokens=LENGTH)[0]


@pytest.mark.parametrize("ext", list(SOUND_FILES))
def test_sounds_of_each_format_are_heard(client, engine, ext):
    rng = random.Random(4)
    data = encode_sound(render_sound(draw_sound(rng, "train").notes, rng, 22_050, 2.0), ext, 22_050)
    answer = said(ask(client, sound(data, ext), "how many beeps?"))
    assert answer == expected(engine, "<audio>\nhow many beeps?", audio=[data])
    assert answer == said(ask(client, sound_url(data, f"audio/{ext}"), "how many beeps?"))
    assert answer != said(ask(client, "how many beeps?"))


def test_a_video_is_seen_and_its_sound_is_heard(client, engine, clip):
    seen, heard = clip
    completion = ask(client, video(seen), sound(heard), "which one?")
    assert said(completion) == expected(engine, "<video>\n<audio>\nwhich one?", video=[seen], audio=[heard])
    request = GenerationRequest(
        turns=(Turn("user", "<video>\n<audio>\nwhich one?"),), media={"video": [seen], "audio": [heard]}
    )
    assert completion.usage.prompt_tokens == len(engine.prompt(request, LENGTH).input_ids)
    own_track = said(ask(client, sound_url(seen, "video/mp4"), "which one?"))
    assert own_track == expected(engine, "<audio>\nwhich one?", audio=[seen])


def test_a_video_comes_by_url_from_a_host_that_is_allowed(client, clip):
    part = {"type": "video_url", "video_url": {"url": "https://media.example.org/clip.mp4"}}
    assert said(ask(client, part, "what moves?")) == said(ask(client, video(clip[0]), "what moves?"))
    for kind in ("video_url", "audio_url"):
        with pytest.raises(openai.BadRequestError, match="not allowed"):
            ask(client, {"type": kind, kind: {"url": "https://other.example.org/clip.mp4"}}, "what?")


def test_a_conversation_goes_from_video_to_sound_to_picture(client, engine, clip, png):
    seen, heard = clip
    parts = ((video(seen), "what moves?"), (sound(heard), "which sound?"))
    history, turns = [], ()
    for marks, own in zip(("<video>\nwhat moves?", "<audio>\nwhich sound?"), parts, strict=True):
        answer = said(ask(client, *own, history=history))
        content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in own]
        history += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        turns = (*turns, Turn("user", marks), Turn("assistant", answer))
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(png('red'))}"}}
    turns = (*turns, Turn("user", "<image>\nand this?"))
    media = {"video": [seen], "audio": [heard], "image": [png("red")]}
    assert said(ask(client, picture, "and this?", history=history)) == expected(engine, turns, **media)


def test_requests_of_all_kinds_at_once_get_their_own_answers(client, engine, sight_and_sound):
    cases = []
    for seed in range(4):
        seen, heard = sight_and_sound(seed)
        other = make_sound(random.Random(seed), "train", 1).media[0][2]
        cases += [
            ((video(seen), f"{seed}: what?"), {"video": [seen]}, f"<video>\n{seed}: what?"),
            ((sound(other), f"{seed}: what?"), {"audio": [other]}, f"<audio>\n{seed}: what?"),
            ((video(seen), sound(heard), "?"), {"video": [seen], "audio": [heard]}, "<video>\n<audio>\n?"),
            ((f"{seed}: hello",), {}, f"{seed}: hello"),
        ]
    wanted = [expected(engine, text, **media) for _, media, text in cases]
    assert len(set(wanted)) > 8
    with ThreadPoolExecutor(len(cases)) as pool:
        assert list(pool.map(lambda case: said(ask(client, *case[0])), cases)) == wanted


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (video(b"no video at all"), "video"),
        (video(b"x", "audio/wav"), "must begin with data:video/...;base64,"),
        (sound(b"no sound at all"), "sound|audio"),
        (sound_url(b"x", "image/png"), "must begin with data:audio/...;base64,"),
        ({"type": "audio_url", "audio_url": {"url": "file:///etc/passwd"}}, "files are not"),
        ({"type": "video_url", "video_url": {"url": "https://169.254.169.254/"}}, "not allowed"),
    ],
)
def test_what_is_no_video_and_no_sound_is_told(client, part, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, part, "what?")


def test_a_sound_cut_short_is_told_or_heard_as_far_as_it_goes(client, clip):
    for part in (video(clip[0][:200]), sound(clip[1][:20])):
        with pytest.raises(openai.BadRequestError):
            ask(client, part, "what?")
    assert said(ask(client, "hello"))


def test_a_model_that_does_not_hear_says_so(lively_parts, clip):
    with (
        running_server(Engine(*lively_parts), ServerSettings(model_name=MODEL), port=0) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="the sample holds audio"):
            ask(client, sound(clip[1]), "what?")
        assert said(ask(client, video(clip[0]), "what?"))
