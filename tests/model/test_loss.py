from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llava_scale.model.loss import next_token_targets, summed_cross_entropy


def test_targets_are_the_next_supervised_tokens():
    labels = torch.tensor([[-100, 5, 6, -100, 7]])
    positions, targets = next_token_targets(labels)
    assert (positions.tolist(), targets.tolist()) == ([0, 1, 3], [5, 6, 7])


def test_the_first_token_of_a_packed_sample_is_nobodys_target():
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    positions, targets = next_token_targets(labels, torch.tensor([0, 2, 5], dtype=torch.int32))
    assert (positions.tolist(), targets.tolist()) == ([0, 2, 3], [2, 4, 5])


def test_rows_of_a_batch_do_not_run_into_each_other():
    positions, targets = next_token_targets(torch.tensor([[1, 2], [3, 4]]))
    assert (positions.tolist(), targets.tolist()) == ([0, 2], [2, 4])


def test_labels_are_left_as_they_are():
    labels = torch.tensor([[1, 2, 3]])
    next_token_targets(labels, torch.tensor([0, 1, 3]))
    assert labels.tolist() == [[1, 2, 3]]


def losses(chunk, *, num=37, width=8, vocab=50):
    torch.manual_seed(0)
    hidden = torch.randn(num, width, requires_grad=True)
    head = torch.nn.Linear(width, vocab, bias=False)
    targets = torch.randint(0, vocab, (num,))
    rows = []

    def counted(part):
        rows.append(part.shape[0])
        return head(part)

    loss = summed_cross_entropy(hidden, targets, counted, chunk=chunk)
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    return loss, expected, hidden, head, rows


@pytest.mark.parametrize("chunk", [1, 10, 36, 37, 1000])
def test_chunks_change_neither_loss_nor_gradients(chunk):
    loss, expected, hidden, head, rows = losses(chunk)
    assert torch.allclose(loss, expected)
    assert max(rows) <= chunk
    ours = torch.autograd.grad(loss, (hidden, head.weight))
    reference = torch.autograd.grad(expected, (hidden, head.weight))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, reference, strict=True))


def test_no_supervised_token_gives_a_zero_with_a_gradient():
    hidden = torch.randn(0, 4, requires_grad=True)
    loss = summed_cross_entropy(hidden, torch.empty(0, dtype=torch.long), torch.nn.Linear(4, 9), chunk=8)
    assert float(loss.detach()) == 0.0
    loss.backward()
