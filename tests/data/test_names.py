from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis.strategies import characters, text

from llava_scale.data.names import escape_key, media_suffix, parse_suffix, split_member, unescape_key

KEYS = text(characters(), min_size=1, max_size=12)
NASTY = text("a./%2E_\\\n\x00é\ud800", min_size=1, max_size=8)


@given(KEYS | NASTY)
def test_an_escaped_key_is_legal_and_comes_back(key):
    stored = escape_key(key)
    assert split_member(f"{stored}.0.jpg") == (stored, "0.jpg")
    assert unescape_key(stored) == key
    stored.encode()  # plain UTF-8
    assert ".." not in stored
    assert not stored.startswith(("/", "__"))


@given(KEYS | NASTY, KEYS | NASTY)
def test_distinct_keys_stay_distinct(first, second):
    assert (escape_key(first) == escape_key(second)) == (first == second)


def test_plain_keys_are_stored_as_they_are():
    for key in ("000123", "coco/train2017/000000000009", "日本-語", "a b"):
        assert escape_key(key) == key


def test_foreign_keys_that_we_could_not_have_written_are_left_alone():
    for stored in ("100%", "a%zz", "a%2e", "%41", "a%FF"):
        assert unescape_key(stored) == stored


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("./d.x/a.0.JPG", ("d.x/a", "0.jpg")),
        ("a.0.frame001.jpg", ("a", "0.frame001.jpg")),
        ("noext", None),
        (".hidden", None),
        ("d/._a.jpg", None),
        ("d/", None),
    ],
)
def test_keys_end_at_the_first_dot_of_the_file_name(name, expected):
    assert split_member(name) == expected


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        ("jpg", ("image", "jpg", 0, -1)),
        ("12.png", ("image", "png", 12, -1)),
        ("mp4", ("video", "mp4", 0, -1)),
        ("1.frame007.jpg", ("video", "jpg", 1, 7)),
        ("frame3.webp", ("video", "webp", 0, 3)),
        ("0.frame001.mp4", None),
        ("txt", None),
        ("seg.png", None),
        ("json", None),
    ],
)
def test_suffixes_tell_what_a_member_is(suffix, expected):
    assert parse_suffix(suffix) == expected


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("frame", [-1, 0, 1234])
def test_written_suffixes_are_understood(count, number, frame):
    kind = "image" if frame < 0 else "video"
    found = parse_suffix(media_suffix(kind, "jpg", number, frame, count=count))
    assert found == (kind, "jpg", number, frame)
