"""Attention of documents that share a long prefix: the values and gradients of each document alone, and less work."""

import pytest
import torch

from minitrain.model.attention import as_mask, documents_attention

pytestmark = pytest.mark.numeric

PREFIX, OWN = 20, (5, 3, 7, 1, 6)
# An example of five documents with one prefix, one of two with a short prefix, and a document alone.
SPANS = [[0, 0, PREFIX + OWN[0], 0, 0]]
for n in OWN[1:]:
    SPANS.append([0, SPANS[-1][2], SPANS[-1][2] + n, 0, PREFIX])
SPANS += [[0, 42, 54, 0, 0], [0, 54, 64, 42, 45], [1, 0, 30, 0, 0]]


class Layer(torch.nn.Module):
    is_causal, num_key_value_groups = True, 2


def alone(q, k, v, window):
    """Return the output of each document, with its prefix before it, in one dense product."""
    output = torch.zeros_like(q.transpose(1, 2))  # [R, T, heads, d]
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    for row, start, stop, prefix, prefix_stop in SPANS:
        columns = torch.tensor([*range(prefix, prefix_stop), *range(start, stop)])
        distance = torch.arange(len(columns))[:, None] - torch.arange(len(columns))
        scores = q[row][:, columns] @ k[row][:, columns].transpose(1, 2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
        result = scores.softmax(-1) @ v[row][:, columns]  # [heads, t, d]
        output[row, start:stop] = result.transpose(0, 1)[prefix_stop - prefix :]
    return output


@pytest.mark.parametrize("window", [None, 9])
def test_outputs_and_gradients_are_those_of_each_document_alone(window):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 64, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    weights = torch.randn(2, 64, 4, 8, generator=generator, dtype=torch.float64)
    mask = as_mask(torch.tensor(SPANS))
    found, _ = documents_attention(Layer(), q, k, v, mask, sliding_window=window)
    want = alone(q, k, v, window or 64)
    torch.testing.assert_close(found, want)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), (q, k, v)),
        torch.autograd.grad((want * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_a_prefix_has_queries_in_one_document(monkeypatch):
    """Documents that are mostly a prefix have no queries for it: three of 27 columns with padding have 7 each."""
    sizes = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(query, *args, **kwargs):
        sizes.append(tuple(query.shape[::2]))
        return real(query, *args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", counted)
    q, k, v = (torch.randn(2, heads, 64, 8) for heads in (4, 2, 2))
    documents_attention(Layer(), q, k, v, as_mask(torch.tensor(SPANS)))
    assert (3, 7) in sizes and sum(rows * columns for rows, columns in sizes) <= 30 + 25 + 2 * 13 + 3 * 7 + 2
