"""Attention of packed rows by one kernel for sequences: a reference on the CPU takes the place of the kernel."""

import collections
import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from minitrain.batch import Document, collate
from minitrain.model import attention, varlen
from minitrain.model.policy import Policy
from tests.conftest import random_llama
from tests.tensors import close

pytestmark = pytest.mark.numeric
CPU = torch.device("cpu")


def documents(*lengths: int, shared: int = 0) -> list[Document]:
    """Documents of random tokens; those after the first begin with `shared` tokens of it."""
    generator = torch.Generator().manual_seed(sum(lengths))
    made = []
    for length in lengths:
        ids = torch.randint(3, 64, (length,), generator=generator, dtype=torch.int32)
        n = min(shared, length - 1) if made else 0
        ids[:n] = made[0].ids[:n] if made else ids[:n]
        made.append(Document(ids, (torch.arange(length) > max(n, 0)).to(torch.uint8), n))
    return made


ROWS = {
    "one row": [documents(7, 1, 12, 5)],
    "two rows with padding": [documents(9, 4), documents(3, 2, 1)],
    "shared prompts": [documents(9, 6, 8, shared=4)],
    "shared prompts and padding": [documents(9, 6, 8, shared=4), documents(5, 5, shared=2)],
}


def reference_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What FlashAttention computes, a sequence at a time: causal from the bottom right of the scores."""
    assert (query.shape[1] == key.shape[1]) or enable_gqa
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert int(cu_seq_q.diff().max()) == max_q and int(cu_seq_k.diff().max()) == max_k
    assert int(cu_seq_q[-1]) == len(query) and int(cu_seq_k[-1]) == len(key) == len(value)
    left, right = window_size
    assert right == 0
    rows = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
        k, v = (
            t[cu_seq_k[i] : cu_seq_k[i + 1]].repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value)
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) * (query.shape[-1] ** -0.5 if scale is None else scale)
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        allowed = (distance >= 0) & ((distance <= left) | (left < 0))
        rows.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v))
    return torch.cat(rows)


@pytest.fixture
def kernel(monkeypatch):
    """The reference in the place of the kernel, in float64 and on the CPU; counts its calls."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return reference_kernel(*args, **kwargs)

    monkeypatch.setattr(varlen, "is_supported", lambda device, dtype: True)
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32, torch.float64))
    monkeypatch.setattr(varlen, "_kernel", {"call": counted, "repeats_heads": False})
    return calls


def states(batch, heads: int, kv_heads: int, size: int = 8, value_size: int = 8):
    generator, (rows, columns) = torch.Generator().manual_seed(0), batch.labels.shape

    def random(heads, size):
        tensor = torch.randn(rows, heads, columns, size, generator=generator, dtype=torch.float64)
        return tensor.requires_grad_()

    return random(heads, size), random(kv_heads, size), random(kv_heads, value_size)


def attend(batch, tensors, mask, **kwargs):
    """Outputs at tokens that are not padding, and the gradients."""
    module = torch.nn.Module()
    module.num_key_value_groups = tensors[0].shape[1] // tensors[1].shape[1]
    output, _ = attention.documents_attention(module, *tensors, mask, **kwargs)
    real = output[batch.doc_ids >= 0]  # [tokens, heads, d]
    weights = torch.linspace(-1, 1, real.numel(), dtype=real.dtype).view(real.shape)
    return real, torch.autograd.grad((real * weights).sum(), tensors)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 8), (4, 2, 8), (4, 1, 12), (2, 2, 264)])
def test_the_kernel_equals_groups(kernel, rows, window, heads, kv_heads, size):
    """Values and gradients; sizes of heads that the kernel does not have use a mask."""
    batch = collate(rows, 0)
    tensors = states(batch, heads, kv_heads, size, size)
    options = {"scaling": 0.3, "sliding_window": window}
    want = attend(batch, tensors, attention.as_mask(batch.layout), **options)
    got = attend(batch, tensors, varlen.as_mask(batch.sequences), **options)
    assert len(kernel) == (size == 8)
    close(got[0], want[0], 1e-10)
    for a, b in zip(got[1], want[1], strict=True):
        close(a, b, 1e-10)


def test_values_of_another_size_use_a_mask(kernel):
    batch = collate(ROWS["shared prompts and padding"], 0)
    tensors = states(batch, 4, 2, 8, 16)
    want = attend(batch, tensors, attention.as_mask(batch.layout))
    close(attend(batch, tensors, varlen.as_mask(batch.sequences))[0], want[0], 1e-10)
    assert not kernel


def test_dropout_is_applied(kernel):
    batch = collate(ROWS["one row"], 0)
    tensors, mask = states(batch, 4, 4), varlen.as_mask(batch.sequences)
    plain, dropped = (attend(batch, tensors, mask, dropout=p)[0] for p in (0.0, 0.5))
    assert len(kernel) == 1 and not torch.allclose(plain, dropped)


def test_heads_are_repeated_for_an_older_kernel(kernel, monkeypatch):
    """torch 2.11 has no `enable_gqa`."""
    batch = collate(ROWS["shared prompts"], 0)
    tensors, mask = states(batch, 4, 2), varlen.as_mask(batch.sequences)
    want = attend(batch, tensors, mask)
    monkeypatch.setitem(varlen._kernel, "repeats_heads", True)
    got = attend(batch, tensors, mask)
    assert kernel[0]["enable_gqa"] and "enable_gqa" not in kernel[1]
    for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        close(a, b, 1e-12)


def test_sequences():
    """Padding counts as documents, so that every token is computed."""
    sequences = collate([documents(3, 2), documents(4)], 0).sequences
    assert sequences.table.tolist() == [0, 3, 5, 9, 10] * 2 and sequences[1:] == (4, 4, 4)
    assert collate([], 0).sequences.table.tolist() == [0, 2, 0, 2]


def test_sequences_with_shared_prompts():
    sequences = collate([documents(5, 4, shared=2)], 0).sequences
    assert sequences.table.tolist() == [0, 5, 7, 0, 5, 9, 0, 1, 2, 3, 4, 0, 1, 5, 6] and sequences[1:] == (2, 5, 5)
    assert sequences.table.dtype == torch.int32


def test_sequences_of_parts_are_their_own():
    """A part of a batch does not have the sequences of the batch."""
    batch = collate([documents(5, 4)], 0)
    assert batch.sequences.count == 2
    assert batch.with_row_per_document(torch.arange(4)[None], torch.tensor([4])).sequences.table.tolist() == [
        0,
        4,
        0,
        4,
    ]


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_policy_with_the_kernel(kernel, rows, monkeypatch):
    """The logps and gradients of a model are those of documents in groups."""
    policy, batch = packed_policy(), collate(rows, 0)
    got = logps_and_gradients(policy, batch)
    assert len(kernel) == 2
    monkeypatch.setattr(varlen, "is_supported", lambda device, dtype: False)
    for a, b in zip(got, logps_and_gradients(policy, batch), strict=True):
        close(a, b, 1e-5)
    assert len(kernel) == 2


def packed_policy(**config) -> Policy:
    model = random_llama(hidden_size=32, **config)
    attention.attend_by_document(model)
    return Policy(model)


def logps_and_gradients(policy, batch):
    policy.zero_grad()
    logps = policy(batch).logps
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return [logps.detach(), *(parameter.grad.clone() for parameter in policy.parameters())]


@pytest.mark.parametrize("rows", [ROWS["one row"], ROWS["two rows with padding"], [documents(6)]], ids=str)
def test_flash_attention_of_transformers_gets_the_lengths(monkeypatch, rows):
    """It would wait for the device in each layer to find them in `position_ids`."""
    lengths = []

    def flash(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, **kwargs):
        lengths.append(cu_seq_lens_q)
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
        sizes = cu_seq_lens_q, kwargs["cu_seq_lens_k"], kwargs["max_length_q"], kwargs["max_length_k"]
        assert mask is None and type(sizes[2]) is type(sizes[3]) is int
        output = reference_kernel(q, k, v, *sizes, scale=scaling, window_size=(-1, 0), enable_gqa=True)
        return output.unflatten(0, (query.shape[0], -1)), None

    policy, batch = packed_policy(), collate(rows, 0)
    want = logps_and_gradients(policy, batch)
    AttentionInterface.register("flash_attention_2", flash)
    monkeypatch.setattr(policy.model.config, "_attn_implementation_internal", "flash_attention_2")
    try:
        got = logps_and_gradients(policy, batch)
    finally:
        del AttentionInterface._global_mapping["flash_attention_2"]
    assert len(lengths) == 2
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-5)


class Kernels(TorchDispatchMode):
    """Counts operations that would be kernels of a device."""

    FREE = ("detach", "_unsafe_view", "empty", "empty_like", "new_empty")

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2].partition(".")[0]
        self.names[name] += not function.is_view and name not in self.FREE
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("shared", "packed", "most"), [(0, True, 1.1), (4, True, 1.1), (0, False, 1.0)])
def test_kernels_of_a_layer(monkeypatch, shared, packed, most):
    """A layer of a packed row needs at most 10% more kernels than a padded batch with FlashAttention."""
    kernel = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    if "enable_gqa" not in inspect.signature(kernel).parameters:
        pytest.skip("this torch has an older kernel")
    monkeypatch.setattr(varlen, "is_supported", lambda device, dtype: True)
    monkeypatch.setattr(varlen, "_kernel", {"call": kernel, "repeats_heads": False})
    for module in (attention, varlen):  # autocast does not know the meta device
        monkeypatch.setattr(module, "autocast_dtype", lambda tensor: tensor.dtype)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash_attention)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)

    def count(layers: int) -> int:
        policy = packed_policy(num_hidden_layers=layers).to("meta", torch.bfloat16)
        given = documents(9, 6, 8, shared=shared)
        batch = collate([given] if packed else [[document] for document in given], 0).to(torch.device("meta"))
        with Kernels() as kernels:
            policy.hidden_states(batch).sum().backward()
        name = "_varlen_attn" if packed else "_scaled_dot_product_flash_attention"
        assert kernels.names[name] == kernels.names[f"{name}_backward"] == layers
        return kernels.names.total()

    assert count(3) - count(2) <= 109 * most


def flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The kernel that CUDA selects; torch without CUDA cannot select it."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


def test_only_cuda_has_the_kernel():
    assert not varlen.is_supported(CPU, torch.bfloat16)
    assert not varlen.is_supported(torch.device("cuda"), torch.float32)
