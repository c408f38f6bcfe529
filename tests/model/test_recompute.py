"""Recomputation: the numbers of a plain backward pass, and which operations run twice."""

from collections import Counter

import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode

from minitrain import ConfigError, load_config
from minitrain.model.decoder import find_blocks
from minitrain.model.recompute import checkpoint_activations
from tests.conftest import random_llama
from tests.messages import raises
from tests.model.test_packed_hybrids import CONFIGS, documents, model_of, packed, policy_of

pytestmark = pytest.mark.numeric
MODES = ("full", "selective", 2)
LORA = ("lora.rank=4", "lora.init=gaussian", "packing=true")


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.name().partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))

    def of(self, *words: str) -> int:
        return sum(n for name, n in self.counts.items() if any(word in name for word in words))


def step_of(trainer):
    _, batches = next(trainer.train_loader.steps())
    loss = trainer.forward_backward(batches).loss
    return loss, {name: p.grad.clone() for name, p in trainer.policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("packing=true", "gradient_accumulation_steps=2"),
        LORA,
        (*LORA, "lora.dropout=0.3"),
        ("model.policy_dtype=bfloat16", "packing=true"),
        ("freeze_layers=[0,embeddings]",),
        ("loss.name=dft", "model.attn_implementation=eager"),
    ],
    ids=str,
)
def test_gradients_are_those_without_recomputation(make_trainer, options):
    """To the bit, since the same operations run, also with frozen weights and with dropout."""
    torch.manual_seed(0)
    loss, wanted = step_of(make_trainer("exp_name=none", *options))
    for mode in MODES:
        got_loss, got = step_of(make_trainer(f"activation_checkpointing={mode}", f"exp_name=ac-{mode}", *options))
        assert got_loss == loss and got.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert torch.equal(got[name], gradient), (mode, name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mode", ["selective", 2])
def test_hybrids_in_groups_of_documents(name, mode):
    policy, docs = policy_of(model_of(name)), documents()
    wanted = packed(policy, [docs])
    checkpoint_activations(policy.model, mode)
    got = packed(policy, [docs])
    assert torch.equal(got[0], wanted[0]) and got[1].keys() == wanted[1].keys()
    for parameter, gradient in wanted[1].items():
        torch.testing.assert_close(got[1][parameter], gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_that_share_weights(dtype):
    """The cast of a shared weight that autocast keeps from the first block is made again for the second one."""
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**shape))
    blocks = find_blocks(model)
    for name, child in blocks[0].named_children():
        setattr(blocks[1], name, child)

    def gradients():
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    wanted = gradients()
    checkpoint_activations(model, "selective")
    for got, gradient in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-6)


# (products of a block with its head: 7 forward and 14 backward; the last product of a block is never needed again)
@pytest.mark.parametrize(
    ("mode", "again", "attention_again"), [("none", 0, 0), ("full", 4 * 6, 4), ("selective", 0, 0), (2, 2 * 6, 2)]
)
def test_which_operations_run_again(mode, again, attention_again):
    """full: all but the last product; selective: norms and activations, and no product and no attention."""
    model = random_llama(num_hidden_layers=4)
    if mode != "none":
        checkpoint_activations(model, mode)
    with Operations() as forward:
        hidden = model.model(input_ids=torch.arange(3, 30)[None], use_cache=False).last_hidden_state
    with Operations() as backward:
        hidden.sum().backward()
    assert forward.of("aten::mm", "aten::addmm") == 4 * 7
    assert backward.of("aten::mm", "aten::addmm") == 4 * 14 + again
    names = [name for name in backward.counts if "scaled_dot_product" in name and "backward" not in name]
    assert sum(backward.counts[name] for name in names) == attention_again
    assert backward.of("aten::rsqrt") == {"none": 0, 2: 4}.get(mode, 8)


def test_the_state_of_generators_is_saved_only_with_dropout(make_trainer, monkeypatch):
    """In the first step each block finds out; after it, only random ones save it."""
    for dropout, saved in ((0.0, 0), (0.3, 2)):
        options = ("activation_checkpointing=full", "lora.rank=4", f"lora.dropout={dropout}", f"exp_name=d{dropout}")
        trainer = make_trainer(*options, "loss.name=sft")
        step_of(trainer)
        calls = []
        with monkeypatch.context() as patch:
            counted = lambda states=torch.get_rng_state, calls=calls: calls.append(1) or states()  # noqa: E731
            patch.setattr(torch, "get_rng_state", counted)
            _, batches = next(trainer.train_loader.steps())
            trainer.policy(batches[0])
        assert len(calls) == saved


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("true", "full"),
        ("false", "none"),
        ("null", "none"),
        ("None", "none"),
        ("selective", "selective"),
        ("3", 3),
        ("'3'", 3),
    ],
)
def test_ways_to_write_it(given, wanted):
    base = {"model": {"name_or_path": "tiny"}, "datasets": ["example/data/skills-train.jsonl"]}
    assert load_config(base, [f"activation_checkpointing={given}"]).activation_checkpointing == wanted


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("0", "out-of-range"),
        ("-1", "out-of-range"),
        ("some", "not-a-choice"),
        ("[full]", "wrong-type"),
        ("1.5", "wrong-type"),
    ],
)
def test_what_is_refused(given, code, wording):
    base = {"model": {"name_or_path": "tiny"}, "datasets": ["example/data/skills-train.jsonl"]}
    with raises(ConfigError, code, "activation_checkpointing") as error:
        load_config(base, [f"activation_checkpointing={given}"])
    wording(str(error.value))


@pytest.mark.slow(minutes=2)
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_compiled_blocks(mode):
    """One graph for all blocks, and the gradients of blocks that are compiled without recomputation."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    def gradients(mode):
        torch._dynamo.reset()
        counters.clear()
        model = random_llama(num_hidden_layers=3)
        if mode != "none":
            checkpoint_activations(model, mode)
        for block in find_blocks(model):
            block.forward = torch.compile(block.forward, dynamic=True)
        model.model(input_ids=torch.arange(3, 30)[None], use_cache=False).last_hidden_state.square().sum().backward()
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
        return [p.grad for p in model.parameters()]

    for got, wanted in zip(gradients(mode), gradients("none"), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
