"""Memory that is used again."""

import gc

import torch

from llava_scale.data.memory import empty


def test_memory_is_used_again_only_when_no_view_of_it_is_left():
    first = empty((3, 5, 7), torch.uint8)
    place = first.data_ptr()
    view = first.permute(2, 0, 1)[1:]
    del first
    gc.collect()
    view.fill_(9)
    second = empty((3, 5, 7), torch.uint8)
    assert second.data_ptr() != place
    second.fill_(1)
    assert (view == 9).all()
    del view
    gc.collect()
    assert empty((3, 5, 7), torch.uint8).data_ptr() == place


def test_shapes_and_types_are_as_asked():
    for shape, dtype in (((2, 3), torch.float32), ((4,), torch.uint8), ((0, 3), torch.uint8), ((1, 2, 3), torch.int64)):
        tensor = empty(shape, dtype)
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
