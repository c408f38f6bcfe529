"""FLOPs of a training step, against the counter of torch and closed forms, and the utilization in the log line."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, MistralConfig, MixtralConfig, MixtralForCausalLM

from minitrain.batch import Batch
from minitrain.model import flops as flops_module
from minitrain.model.flops import ModelFlops, count_flops, peak_flops, peak_of
from minitrain.model.matrices import matrix_sizes
from minitrain.training import metric_logger
from minitrain.training.metric_logger import train_line
from tests.conftest import metrics


def a_batch(trainer) -> Batch:
    return next(iter(trainer.train_loader.steps(0)))[1][0]


def counted(trainer, batch: Batch) -> dict[str, float]:
    """The FLOPs of the blocks, forward and backward, that torch counts, by operator."""
    with FlopCounterMode(display=False) as counter:
        trainer.policy.hidden_states(batch).sum().backward()
    return {str(operator).split(".")[-1]: n for operator, n in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("packing", ["true", "false"])
def test_products_of_the_blocks_are_those_that_torch_counts(make_trainer, packing):
    """Full tuning: 6 for each weight and token; padding is the batch's own."""
    trainer = make_trainer(f"packing={packing}", "total_batch_size=1", "model.attn_implementation=eager")
    batch, flops = a_batch(trainer), trainer.policy.flops
    counts = counted(trainer, batch)
    assert counts["mm"] == flops.token * batch.n_tokens
    if packing == "false":  # eager attention computes the full square, of which half is needed
        assert counts["bmm"] / 2 == ModelFlops(0, 0, flops.pair, flops.windows).of(batch)


def test_attention_counts_documents_and_not_rows(make_trainer):
    """6 L H sum t^2, with the H of all heads, for packed rows too."""
    trainer = make_trainer("packing=true")
    batch, flops = a_batch(trainer), trainer.policy.flops
    lengths = torch.bincount(batch.doc_ids[batch.doc_ids >= 0]).double()
    assert batch.n_docs > 1
    config = trainer.policy.model.config
    head = config.vocab_size * config.hidden_size
    squares = float((lengths**2).sum())
    total = flops.token * lengths.sum().item() + 6 * head * batch.n_targets + 6 * 2 * 32 * squares
    assert flops.of(batch) == total


def test_frozen_weights_take_four(make_trainer):
    """LoRA on all layers: no gradient of the base weights. The first layers need none of their input, too."""
    trainer = make_trainer("lora.rank=4", "total_batch_size=1")
    flops = trainer.policy.flops
    model = trainer.policy.model
    base = sum(p.numel() for name, p in model.named_parameters() if "proj.weight" in name)
    adapter = sum(p.numel() for p in trainer.parameters)
    first = model.model.layers[0].self_attn.q_proj.weight.numel()
    assert flops.token == 4 * base - 2 * first + 6 * adapter
    assert flops.target == 4 * model.get_output_embeddings().weight.numel()


def test_frozen_layers_before_all_trained_ones_take_two(make_trainer):
    """freeze_layers: no gradient reaches them."""
    trainer = make_trainer("freeze_layers=[embeddings,0]")
    blocks = trainer.policy.model.model.layers
    sizes = [sum(p.numel() for p in block.parameters() if p.dim() == 2) for block in blocks]
    assert trainer.policy.flops.token == 2 * sizes[0] + 6 * sizes[1]


def test_a_token_computes_only_its_experts():
    """Mixtral with 2 of 8 experts."""
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    model = MixtralForCausalLM(
        MixtralConfig(**shape, num_local_experts=8, num_experts_per_tok=2, num_key_value_heads=2)
    )
    found = count_flops(model, matrix_sizes(model))
    assert found.token == 6 * (4 * 16 * 16 + 8 * 16 + 2 * 3 * 16 * 32)


def test_a_window_bounds_the_pairs():
    """Each token attends to those at most `window` before it; enumerated, up to the half at the diagonal."""
    document, window = 50, 8
    pairs = sum(min(i, window) + 0.5 for i in range(document)) - 0.5 * (document - window)
    batch = Batch(*torch.zeros(4, 1, document, dtype=torch.int64), n_docs=1)
    assert ModelFlops(0, 0, 1.0, {float(window): 1}).of(batch) == pairs
    config = MistralConfig(sliding_window=8, num_hidden_layers=3)
    assert flops_module._windows(config) == {8.0: 3}
    config = LlamaConfig(num_hidden_layers=3)
    assert flops_module._windows(config) == {float("inf"): 3}


def test_a_shared_prompt_counts_once():
    """Two answers to a prompt of 3 tokens that is there once: the tokens of both attend to it."""
    doc_ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1]])
    prefixes = torch.tensor([[0, 0], [0, 3]])
    batch = Batch(*torch.zeros(3, 1, 7, dtype=torch.int64), doc_ids, n_docs=2, prefixes=prefixes)
    assert ModelFlops(1.0, 0, 0, {}).of(batch) == 7
    assert ModelFlops(0, 0, 1.0, {float("inf"): 1}).of(batch) == 5 * 5 / 2 + (5 * 5 - 3 * 3) / 2


def test_layers_of_several_sizes_are_not_counted():
    """The config of such a model does not tell one size, and the utilization is left out."""
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    model = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=2, num_key_value_heads=2))
    sizes, model.config = matrix_sizes(model), SimpleNamespace(get_text_config=SimpleNamespace)
    assert count_flops(model, sizes) is None


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_of_cards(name, teraflops):
    assert peak_of(name) == (None if teraflops is None else teraflops * 1e12)


def test_utilization_is_logged_where_the_peak_is_known(make_trainer, monkeypatch):
    """FLOPs of all steps since the last line / seconds / peak, on the console too; nothing of it on a CPU."""
    trainer = make_trainer("log_every_steps=3")
    trainer.train()
    assert "mfu" not in metrics(trainer)[-1] and peak_flops(torch.device("cpu")) is None
    monkeypatch.setattr(metric_logger, "peak_flops", lambda device: 1e9)
    trainer = make_trainer("log_every_steps=3", "exp_name=known")
    flops = []
    monkeypatch.setattr(
        ModelFlops, "of", lambda self, batch, of=ModelFlops.of: flops.append(of(self, batch)) or flops[-1]
    )
    trainer.train()
    row = metrics(trainer)[-1]
    seconds = row["tokens"] / row["tokens_per_second"]
    assert len(flops) == 3 and row["mfu"] == pytest.approx(round(sum(flops) / 1e9) / seconds, rel=1e-6)
    assert "mfu 41%" in train_line(1, 2, {"mfu": 0.412})
