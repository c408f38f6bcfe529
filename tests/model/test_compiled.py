"""compile=true: how many graphs and recompilations blocks need, how many of their calls run compiled, and the numbers.

The backend counts and runs the operations that dynamo has traced, which takes no compiler.
"""

import functools

import pytest
import torch
import torch._dynamo
from transformers import DynamicCache

from minitrain.batch import Document, collate
from minitrain.model import attention, lora
from minitrain.model.compiled import compile_blocks
from minitrain.model.decoder import find_blocks
from minitrain.model.policy import Policy
from minitrain.model.quantize import quantize_model
from minitrain.model.recompute import checkpoint_activations
from minitrain.training.optim import autocast_weights
from minitrain.training.optimizers import round_to
from tests.conftest import random_llama
from tests.tensors import close, shaken

pytestmark = pytest.mark.numeric
LAYERS = 6
PACKED = [[[7, 5, 9, 2]], [[17, 6, 4]], [[30, 3, 11, 8, 2]], [[4, 3, 21]]]  # batches of rows of lengths
PADDED = [[[7], [9]], [[19], [8], [3]], [[12], [2]], [[23], [21]]]


class Counter:
    """A backend of torch.compile that counts graphs, and calls of them."""

    def __init__(self):
        self.graphs, self.calls, self.nodes = 0, 0, set()

    def __call__(self, module, inputs):
        self.graphs += 1
        self.nodes |= {str(node.target) for m in module.modules() for node in getattr(m, "graph", module.graph).nodes}

        def run(*args):
            self.calls += 1
            return module.forward(*args)

        return run


@pytest.fixture
def counter(monkeypatch):
    """Counts what torch.compile compiles."""
    torch._dynamo.reset()
    backend = Counter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    with torch._dynamo.config.patch(recompile_limit=8):
        yield backend
    torch._dynamo.reset()


def batch(rows: list[list[int]], shared: int = 0):
    """Rows of documents of these lengths; the second document begins with `shared` tokens of the first."""
    generator = torch.Generator().manual_seed(sum(map(sum, rows)))
    documents = []
    for row in rows:
        ids = [torch.randint(3, 64, (length,), generator=generator, dtype=torch.int32) for length in row]
        begins = [shared if number == 1 else 0 for number in range(len(row))]
        for n, one in zip(begins, ids, strict=True):
            one[:n] = ids[0][:n]
        masks = [(torch.arange(len(one)) > n).to(torch.uint8) for n, one in zip(begins, ids, strict=True)]
        documents.append([Document(*fields) for fields in zip(ids, masks, begins, strict=True)])
    return collate(documents, 0)


def make_policy(kind: str) -> Policy:
    """A policy with LoRA, DoRA or activation checkpointing, if `kind` names them."""
    torch.manual_seed(0)
    model = random_llama(num_hidden_layers=LAYERS, hidden_size=32, num_key_value_heads=2)
    attention.attend_by_document(model)
    if "lora" in kind or "dora" in kind:
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if name.endswith(("q_proj", "down_proj")):
                lora.adapt(module, lora.LoRASettings(4, 2.0, 0.0, "dora" in kind))
        shaken(model)
    if "checkpoint" in kind or "selective" in kind:
        checkpoint_activations(model, "selective" if "selective" in kind else "full")
    return Policy(model.train())


def numbers(policy: Policy, given) -> list[torch.Tensor]:
    """The logps of a batch, and the gradients of all that is trained."""
    policy.zero_grad()
    logps = policy(given).logps
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return [logps.detach(), *(p.grad.clone() for p in policy.parameters() if p.requires_grad)]


def compiled(policy: Policy) -> list[str]:
    """Compile a policy's blocks, and return the list of its warnings."""
    warnings = []
    compile_blocks(find_blocks(policy.model), warnings.append)
    return warnings


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("packed", "full"),
        ("padded", "full"),
        ("packed", "checkpoint"),
        ("packed", "lora, checkpoint"),
        ("packed", "lora, selective"),
        ("padded", "lora"),
        ("padded", "dora, checkpoint"),
    ],
)
def test_graphs_and_calls(counter, layout, kind):
    """A block is one graph without breaks, batches of other lengths need no other graph, and every call is compiled."""
    plain, policy = make_policy(kind), make_policy(kind)
    warnings = compiled(policy)
    graphs, rows = [], PACKED if layout == "packed" else PADDED
    for number, lengths in enumerate(rows):
        given, before = batch(lengths), counter.calls
        for got, want in zip(numbers(policy, given), numbers(plain, given), strict=True):
            close(got, want)
        assert counter.calls - before == LAYERS, number
        graphs.append(counter.graphs)
    # The input of the first block has no gradient if the embeddings are frozen.
    assert graphs == [1 + ("lora" in kind or "dora" in kind)] * len(rows)
    assert not warnings and not torch._dynamo.utils.counters["graph_break"]
    if layout == "packed":
        assert any("attend_in_groups" in name for name in counter.nodes)
    if "lora" in kind:
        assert "autograd_function_apply" in counter.nodes


def test_shared_prompts(counter):
    plain, policy = make_policy("full"), make_policy("full")
    compiled(policy)
    for lengths in PACKED:
        given = batch(lengths, shared=2)
        for got, want in zip(numbers(policy, given), numbers(plain, given), strict=True):
            close(got, want)
    assert counter.calls == LAYERS * len(PACKED)


def test_generation_leaves_the_graphs(counter):
    """Blocks with a cache run in Python, so training after an evaluation that generates runs compiled."""
    policy = make_policy("full")
    warnings = compiled(policy)
    policy.eval()
    policy.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False)
    assert counter.graphs == counter.calls == 0
    with torch.no_grad():
        policy(batch(PACKED[0]))
    policy.train()
    before = counter.calls
    for lengths in PACKED:
        numbers(policy, batch(lengths))
    assert counter.calls - before == LAYERS * len(PACKED) and not warnings


def test_a_block_that_is_not_one_graph_is_reported(counter):
    """Once for all blocks of a class, with the reason; the numbers stay right."""
    plain, policy = make_policy("full"), make_policy("full")
    for block in find_blocks(policy.model):
        block.mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    warnings = compiled(policy)
    given = batch(PADDED[0])
    for got, want in zip(numbers(policy, given), numbers(plain, given), strict=True):
        close(got, want)
    assert len(warnings) == 1 and "LlamaDecoderLayer" in warnings[0] and "graph_break" in warnings[0]
    assert counter.calls > LAYERS  # the parts are compiled


def test_training_with_a_cache_is_reported(counter):
    """As with prefix tuning, whose blocks run in Python."""
    policy = make_policy("full")
    warnings = compiled(policy)
    for _ in range(2):
        policy.model(torch.tensor([[5, 6, 7]]), past_key_values=DynamicCache(config=policy.model.config))
    assert len(warnings) == 1 and "cache" in warnings[0] and not counter.graphs


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized_layers(counter, bits):
    """They are one operator each, and all blocks share a graph."""
    pytest.importorskip("bitsandbytes")

    def make() -> Policy:
        model = random_llama(num_hidden_layers=3, hidden_size=64)
        attention.attend_by_document(model)
        model.model.layers.requires_grad_(False)
        quantize_model(model, bits, torch.float32, torch.device("cpu"))
        checkpoint_activations(model)
        return Policy(model.train())

    plain, policy = make(), make()
    warnings = compiled(policy)
    for lengths in PACKED[:2]:
        given = batch(lengths)
        for got, want in zip(numbers(policy, given), numbers(plain, given), strict=True):
            close(got, want)
    assert (counter.graphs, counter.calls) == (1, 2 * 3) and not warnings


def test_the_limit_of_graphs_is_reported(counter, monkeypatch):
    """After it, other batches run in Python."""
    monkeypatch.setattr("minitrain.model.compiled.MAX_GRAPHS", 1)
    plain, policy = make_policy("full"), make_policy("full")
    warnings = compiled(policy)
    with torch._dynamo.config.patch(recompile_limit=1):
        for given in (batch(PADDED[0]), batch(PACKED[0])):
            for got, want in zip(numbers(policy, given), numbers(plain, given), strict=True):
                close(got, want)
    assert len(warnings) == 1 and counter.graphs == 1


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "value_size"), [(2, 2, 8), (4, 2, 8), (2, 2, 12)])
@pytest.mark.parametrize("shared", [0, 3])
def test_the_operator(window, heads, kv_heads, value_size, shared):
    """It passes torch's tests of operators, and has the values and gradients of attention without compiling."""
    given, generator = batch(PACKED[0], shared), torch.Generator().manual_seed(0)

    def random(heads, size):
        return torch.randn(1, given.labels.shape[1], heads, size, generator=generator, dtype=torch.float64)

    tensors = [random(heads, 8), random(kv_heads, 8), random(kv_heads, value_size)]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    torch.library.opcheck(attention.attend_in_groups, (*tensors, given.layout, 0.3, window))
    module = torch.nn.Module()
    module.num_key_value_groups = heads // kv_heads
    transposed = [tensor.transpose(1, 2) for tensor in tensors]
    mask = attention.as_mask(given.layout)
    want, _ = attention.documents_attention(module, *transposed, mask, scaling=0.3, sliding_window=window)
    got = attention.attend_in_groups(*tensors, given.layout, 0.3, window)
    close(got, want, 1e-10)
    weights = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((output * weights).sum(), tensors) for output in (got, want)]
    for one, other in zip(*gradients, strict=True):
        close(one, other, 1e-10)


@pytest.mark.slow
def test_inductor_gives_the_same_numbers():
    """What is compiled for the processor: packed with LoRA and activation checkpointing, and padded."""
    torch._dynamo.reset()
    plain, policy = make_policy("lora, checkpoint"), make_policy("lora, checkpoint")
    warnings = compiled(policy)
    for lengths in (*PACKED, *PADDED):
        given = batch(lengths)
        for got, want in zip(numbers(policy, given), numbers(plain, given), strict=True):
            close(got, want, 1e-4)
    assert not warnings


def test_gradients_of_another_dtype_divide_no_graph(counter):
    """Those of master weights in the optimizer, when a later micro-batch needs another graph."""
    policy = make_policy("full")
    for parameter in autocast_weights(policy.model):
        round_to(torch.bfloat16, parameter)
    warnings, sums = compiled(policy), []
    with torch.autocast("cpu", torch.bfloat16):
        for rows in (PACKED[0], PADDED[0]):
            policy(batch(rows)).logps.sum().backward()
            sums.append(policy.model.model.layers[0].mlp.up_proj.weight.grad.clone())
    assert not warnings and counter.graphs > 1
    assert sums[0].dtype == torch.float32 and not torch.equal(*sums)
