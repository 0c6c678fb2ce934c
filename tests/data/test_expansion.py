from __future__ import annotations

import numpy as np

from llava_scale.data.expansion import expanded, media_blocks, with_media
from llava_scale.types import IGNORE_INDEX, MediaTokens, TokenPart

IDS = {"image": 100, "video": 101, "audio": 102}
VIDEO = MediaTokens(grid=(3, 1, 2), num_tokens=6, parts=tuple(TokenPart(time, 2, (7, 8)) for time in (0.0, 1.9, 2.0)))
SOUND = MediaTokens(grid=(1, 1, 5), num_tokens=5, parts=(TokenPart(0.0, 2), TokenPart(2.0, 2), TokenPart(4.0, 1)))


def test_time_stamps_stand_before_their_frames_and_are_not_supervised():
    ids, labels = np.array([1, 101, 2, 3]), np.array([-100, -100, 2, 3])
    found, supervised = with_media(ids, labels, [1], [("video", VIDEO)], IDS)
    frame = [7, 8, 101, 101]
    assert found.tolist() == [1, *frame, *frame, *frame, 2, 3]
    assert supervised.tolist() == [IGNORE_INDEX] * 13 + [2, 3]
    assert VIDEO.num_positions == 12


def test_a_sound_right_behind_a_video_takes_turns_with_it():
    blocks = media_blocks([1, 2], [("video", VIDEO), ("audio", SOUND)], IDS)
    frame = [7, 8, 101, 101]
    assert [(block.place, block.num_media) for block in blocks] == [(1, 2)]
    assert blocks[0].ids == [*frame, *frame, 102, 102, *frame, 102, 102, 102]
    assert expanded([1, 101, 102, 2], blocks) == [1, *blocks[0].ids, 2]


def test_a_sound_elsewhere_stays_whole():
    for places, kinds in (([1, 3], ("video", "audio")), ([1, 2], ("audio", "video"))):
        media = [(kind, VIDEO if kind == "video" else SOUND) for kind in kinds]
        blocks = media_blocks(places, media, IDS)
        assert [block.num_media for block in blocks] == [1, 1]
        assert [102] * 5 in [block.ids for block in blocks]


def test_positions_are_as_many_in_turn_as_one_after_the_other():
    blocks = media_blocks([0, 1], [("video", VIDEO), ("audio", SOUND)], IDS)
    assert len(blocks[0].ids) == VIDEO.num_positions + SOUND.num_positions


def test_pictures_beside_them_are_one_run():
    picture = MediaTokens(grid=(1, 2, 2), num_tokens=4)
    ids, labels = np.array([100, 101, 102, 9]), np.array([-100, -100, -100, 9])
    found, supervised = with_media(
        ids, labels, [0, 1, 2], [("image", picture), ("video", VIDEO), ("audio", SOUND)], IDS
    )
    assert found[:4].tolist() == [100] * 4
    assert len(found) == 4 + 12 + 5 + 1 == len(supervised)
    plain, same = with_media(np.array([5, 100, 9]), np.array([-100, 3, 9]), [1], [("image", picture)], IDS)
    assert plain.tolist() == [5, 100, 100, 100, 100, 9]
    assert same.tolist() == [-100] * 5 + [9]
