from __future__ import annotations

import pytest
import torch
from PIL import Image

from llava_scale.errors import ConfigError, SampleError
from llava_scale.serving.engine import Engine, GenerationRequest, choose_device, load_engine
from llava_scale.serving.sampling import Sampling
from llava_scale.types import Turn


def ask(text: str, *pictures, history: tuple[Turn, ...] = ()) -> GenerationRequest:
    return GenerationRequest(turns=(*history, Turn("user", text)), media={"image": pictures})


@pytest.fixture
def requests(png):
    said = (Turn("user", "<image>\nwhat shape is it?"), Turn("assistant", "a star"))
    return [
        ask("hello"),
        ask("what color is the large shape at the left of the picture?", png("red")),
        ask("<image> and <image> which is it?", png("red"), png("blue")),
        ask("and the color?", png("green"), history=said),
        ask("count the objects", png("blue")),
    ]


def test_a_batch_answers_as_its_requests_do_alone(engine, requests):
    alone = [engine.generate([request], max_new_tokens=12)[0] for request in requests]
    assert len(set(alone)) == len(alone)
    for batch_size in (2, 3, 8):
        assert engine.generate(requests, max_new_tokens=12, batch_size=batch_size) == alone


def test_no_requests_give_no_answers(engine):
    assert engine.generate([]) == []


def test_drawn_answers_do_not_depend_on_the_batch_but_on_the_seed(engine, requests):
    options = {"max_new_tokens": 8, "temperature": 0.9, "top_p": 0.95}
    together = engine.generate(requests, seed=1, batch_size=5, **options)
    assert engine.generate(requests, seed=1, batch_size=2, **options) == together
    assert engine.generate(requests, seed=2, batch_size=5, **options) != together


def test_drawing_leaves_the_global_random_state_alone(engine):
    state = torch.get_rng_state()
    engine.generate([ask("hello")], max_new_tokens=3, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_prompt_is_what_training_saw(engine, png):
    seen = {}

    def remember(_module, _args, kwargs):
        seen.setdefault("first", kwargs)

    handle = engine.model.register_forward_pre_hook(remember, with_kwargs=True)
    engine.generate([ask("what color?", png("red"))], max_new_tokens=1)
    handle.remove()
    encoder = engine.processor.chat_encoder
    turns = (Turn("user", "<image>\nwhat color?"), Turn("assistant", "red"))
    trained = encoder.encode(turns)
    prompt = [i for i, supervised in zip(trained.input_ids, trained.supervised, strict=True) if not supervised]
    image_id, per_picture = encoder.placeholder_ids["image"], engine.processor.image_num_tokens
    expected = [j for i in prompt for j in [i] * (per_picture if i == image_id else 1)]
    assert seen["first"]["input_ids"].tolist() == [expected]
    assert torch.equal(seen["first"]["pixel_values"][0], engine.processor.image_transform(png("red")))


def test_pictures_come_as_bytes_paths_and_pillow_images(engine, png, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png("red"))
    forms = [
        png("red"),
        path,
        str(path),
        Image.new("RGB", (40, 30), "red"),
        Image.new("CMYK", (40, 30), (0, 255, 255, 0)),
    ]
    answers = engine.generate([ask("what is it?", form) for form in forms], max_new_tokens=8)
    assert set(answers[:4]) == {answers[0]}
    assert len(answers) == 5


def test_an_answer_ends_where_training_ended_answers(engine, requests, monkeypatch):
    ids = list(engine.tokens(engine.answer(engine.prompt(requests[0], 6), 6, Sampling())))
    assert engine._end_ids == tuple(engine.processor.chat_encoder.eos_ids)
    monkeypatch.setattr(engine, "_end_ids", (ids[3],))
    ended = list(engine.tokens(engine.answer(engine.prompt(requests[0], 6), 6, Sampling())))
    assert ended == ids[: ids.index(ids[3])]


def test_streamed_pieces_are_the_answer(engine, requests):
    whole = engine.generate(requests, max_new_tokens=12)
    for request, answer in zip(requests, whole, strict=True):
        pieces = list(engine.stream(request, max_new_tokens=12))
        assert "".join(pieces) == answer
        assert len(pieces) > 1


def test_a_stream_that_is_closed_stops_the_work(engine):
    calls = []
    handle = engine.model.register_forward_hook(lambda *_: calls.append(1))
    stream = engine.stream(ask("hello"), max_new_tokens=2000)
    next(stream)
    stream.close()
    handle.remove()
    assert len(calls) < 500


def test_an_error_while_streaming_reaches_the_reader(engine, monkeypatch):
    monkeypatch.setattr(engine.model, "logits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(engine.stream(ask("hello")))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask("<image> <image> which?", Image.new("RGB", (4, 4))), "2 <image> placeholders but 1 image"),
        (ask("<image> what?"), "1 <image> placeholder but 0 images"),
        (ask("what?", "nowhere/a.jpg"), "cannot read nowhere/a.jpg: No such file"),
        (ask("what?", b"no picture"), "picture"),
        (GenerationRequest(turns=(Turn("assistant", "hi"),)), "must end with a message of the user"),
        (GenerationRequest(turns=()), "must end with a message of the user"),
        (GenerationRequest(turns=(Turn("user", "listen"),), media={"audio": (b"x",)}), "audio"),
        (ask("word " * 5000), "more than the model's 4,096"),
    ],
)
def test_an_unusable_request_says_why_and_leaves_the_others_alone(engine, request_, message):
    good = ask("hello")
    outcomes = engine.try_generate([request_, good], max_new_tokens=4)
    assert isinstance(outcomes[0], SampleError)
    assert message in str(outcomes[0])
    assert outcomes[1] == engine.generate([good], max_new_tokens=4)[0]
    with pytest.raises(SampleError):
        engine.generate([good, request_], max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"temperature": 1, "top_p": 0}, "top_p must be in"),
        ({"top_p": 0.5}, "no effect at temperature 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(engine, options, message):
    with pytest.raises(ConfigError, match=message):
        engine.generate([ask("hello")], **options)


def test_a_saved_checkpoint_answers_the_same(engine, requests, tmp_path):
    engine.model.save_pretrained(tmp_path)
    engine.processor.save_pretrained(tmp_path)
    loaded = load_engine(tmp_path, device="cpu")
    assert isinstance(loaded, Engine)
    assert loaded.generate(requests[:3], max_new_tokens=8) == engine.generate(requests[:3], max_new_tokens=8)


def test_unknown_devices_and_types_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown device"):
        choose_device("abacus")
    with pytest.raises(ConfigError, match="is not there"):
        choose_device("cuda:99")
    with pytest.raises(ConfigError, match="unknown dtype"):
        load_engine(tmp_path, dtype="int3")
