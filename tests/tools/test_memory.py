"""The estimate of memory against trainings that do take place: the same parts to the byte, and nothing uncounted."""

import functools
import gc
import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import DbrxConfig, DbrxForCausalLM

from minitrain import Trainer, load_config
from minitrain.errors import ConfigError
from minitrain.losses import registered
from minitrain.model import attention, kd_divergence
from minitrain.model.float8 import use_float8
from minitrain.model.logprobs import LMHead, chunk_bytes
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_tokenizer
from minitrain.tools.preflight.memory import (
    StepInputs,
    _head_chunks_of,
    _largest_batch,
    estimate_memory,
    simulate_step,
)
from minitrain.tools.preflight.memory_tracker import MemoryTracker
from minitrain.training import setup
from minitrain.training.optim_state import named_state
from minitrain.training.setup import dry_run
from tests.chats import THINKING, conversations, written
from tests.conftest import random_llama
from tests.messages import raises
from tests.model.test_router import MODELS
from tests.rows import REQUIRED, ROWS
from tests.scorers import random_base

CPU = torch.device("cpu")
DBRX = DbrxConfig(
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=256,
    vocab_size=288,
    attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
)
OPTIONS = REQUIRED | {  # and what makes a loss compute more
    "kd": {"teacher": "tiny", "top_k": 5},
    "policy": {"advantages": "reinforce++", "kl_coef": 0.1, "kl_in": "loss", "vf_coef": 0.1},
}


@pytest.fixture
def config(tmp_path, llama_folder):
    """``config("lr=0.1", loss="dpo")``: a config over rows of the loss's kind."""

    def make(*overrides: str, loss: str = "sft", model=llama_folder):
        data = tmp_path / f"{loss}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[registered()[loss].example_type]))
        base = {
            "datasets": [str(data)],
            "model": {"name_or_path": str(model)},
            "loss": {"name": loss} | OPTIONS.get(loss, {}),
            "output_dir": str(tmp_path / "runs"),
            "exp_name": "run",
            "total_batch_size": 8,
            "validation_split": 8,
            "n_steps": 2,
        }
        return load_config(base, list(overrides))

    return make


def held(tensors) -> int:
    """Bytes of tensors, those that share memory counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def taken(config, float8: str | None = None) -> MemoryTracker:
    """The same step with the real model of a trainer, with FP8 in emulation."""
    trainer, tracker = Trainer(config), MemoryTracker()
    if float8:
        use_float8(trainer.policy.model, float8, emulate=True)
    attention._groups.cache_clear()  # what another step has left there would be nobody's
    several = config.gradient_accumulation_steps > 1 or config.max_tokens_per_micro_batch
    batches = [_largest_batch(trainer.train_loader, False)] * (2 if several else 1)
    held_out = _largest_batch(trainer.eval_loader, True)
    parts = trainer.loss, trainer.policy, trainer.models, trainer.parallel, batches, held_out
    gc.collect()
    simulate_step(StepInputs(trainer.config, *parts), tracker)
    return tracker


# ------------------------------------------------------------------------------------------- against real trainings


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optimizer=SGD",),
        ("optimizer=SGD", "optimizer_args={momentum: 0.9}"),
        ("optimizer=Adafactor",),
        ("optimizer=Adagrad",),
        ("model.master_dtype=bfloat16", "model.policy_dtype=bfloat16"),
        ("model.master_weights=optimizer", "model.policy_dtype=bfloat16"),
        ("optimizer=Muon",),
        ("optimizer=bitsandbytes.AdamW8bit", "optimizer_args={min_8bit_size: 64}"),
        ("optimizer=torchao.AdamW8bit",),
        ("optimizer_in_backward=true", "max_grad_norm=0"),
        ("freeze_layers=[0]", "model.policy_dtype=bfloat16"),
        ("lora.rank=4", "model.policy_dtype=bfloat16", "optimizer=NAdam"),
        ("soft_prompt.num_virtual_tokens=5", "soft_prompt.method=prefix", "soft_prompt.prefix_projection=true"),
    ],
    ids=str,
)
def test_weights_gradients_and_moments_are_those_of_a_training(config, overrides):
    """Each the sum of the bytes of a real trainer's tensors."""
    for package in ("bitsandbytes", "torchao"):
        if any(package in option for option in overrides):
            pytest.importorskip(package)
    config, seen = config(*overrides), []
    trainer = Trainer(config)
    for p in trainer.parameters:
        p.register_hook(lambda grad: seen.append(grad.nbytes))
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(held(p.grad for p in trainer.parameters)))
    trainer.train()
    states = named_state(dict(trainer.policy.named_parameters()), trainer.optimizer, 0)[0].values()
    found = estimate_memory(dry_run(config), CPU).parts
    assert found["weights"] == held((*trainer.policy.parameters(), *trainer.policy.buffers()))
    assert found["gradients"] == max(seen)
    moments = held(states)
    if config.optimizer == "AdamW" and config.model.master_weights == "model":  # whose update needs nothing besides
        assert found["optimizer"] == moments
    assert moments <= found.get("optimizer", 0) <= moments + 4 * held(trainer.parameters)


VARIED = [
    ("sft", ("packing=true", "gradient_accumulation_steps=2")),
    ("sft", ("activation_checkpointing=true", "model.policy_dtype=bfloat16")),
    ("sft", ("activation_checkpointing=selective", "packing=true")),
    ("sft", ("activation_checkpointing=2", "max_tokens_per_micro_batch=200")),
    ("sft", ("lora.rank=4", "lora.dropout=0.1", "model.policy_dtype=bfloat16", "packing=true")),
    ("dft", ("freeze_layers=[embeddings]", "packing=true", "model.attn_implementation=eager")),
    ("dpo", ("model.reference_dtype=bfloat16",)),
    ("kto", ("gradient_accumulation_steps=2",)),
    ("kd", ("loss.teacher_dtype=bfloat16",)),
    ("pairwise", ("packing=true",)),
    ("classify", ("lora.rank=2",)),
]
WITHOUT_OPTIONS = {"sft"} | registered().keys() - {loss for loss, _ in VARIED}
SETTINGS = [*((loss, ()) for loss in sorted(WITHOUT_OPTIONS)), *VARIED]
MORE_SETTINGS = [
    ("sft", ("soft_prompt.num_virtual_tokens=5", "model.policy_dtype=float16")),
    ("sft", ("loss.label_smoothing=0.1", "loss.focal_gamma=2", "optimizer=Adafactor")),
    ("dpo", ("lora.rank=4", "model.policy_dtype=bfloat16")),
    ("dpo", ("packing=true", "loss.reference=adapter")),
]


@pytest.mark.parametrize("loss, overrides", SETTINGS, ids=str)
def test_a_step_without_weights_takes_what_a_real_one_takes(config, loss, overrides):
    """Every part, and the most of all together, to the byte: what autograd keeps, and what is made on the way."""
    compare(config, loss, overrides)


@pytest.mark.slow
@pytest.mark.parametrize("loss, overrides", MORE_SETTINGS, ids=str)
def test_more_steps_without_weights(config, loss, overrides):
    """The same with other options."""
    compare(config, loss, overrides)


def compare(config, loss: str, overrides: tuple[str, ...]) -> None:
    config = config(*overrides, loss=loss)
    found, real = estimate_memory(dry_run(config), CPU), taken(config)
    assert found.parts == {part: size for part, size in real.peaks.items() if size}
    assert found.peak == real.peak
    assert max(found.parts.values()) <= found.peak <= sum(found.parts.values())


@pytest.mark.parametrize("loss, packing", [("sft", True), ("sft", False), ("kd", True)])
def test_examples_of_different_numbers_of_documents(config, tmp_path, loss, packing):
    """With weights, and with beginnings that documents share in packed rows."""
    file = written(tmp_path / "chats.jsonl", conversations(24, weights=(0.5, 2)))
    (tmp_path / "thinking.jinja").write_text(THINKING)
    settings = (f"datasets=[{file}]", f"chat_template={tmp_path / 'thinking.jinja'}", "train_on=each_turn")
    settings = (*settings, f"packing={packing}", "gradient_accumulation_steps=2")
    compare(config, loss, settings)
    loader = Trainer(config(*settings, loss=loss)).train_loader
    steps = [batches for (_, batches), _ in zip(loader.steps(), range(loader.steps_per_epoch))]
    sizes = [batch.input_ids.numel() for batches in steps for batch in batches]
    assert _largest_batch(loader, False).input_ids.numel() == max(sizes)


def test_an_encoder(config, tmp_path):
    """Of BERT's kind, whose head is its own."""
    made = config(loss="classify", model=random_base("bert", tmp_path / "bert"))
    assert estimate_memory(dry_run(made), CPU).parts == dict(taken(made).peaks)


def experts_folder(name: str, folder: Path) -> Path:
    """A saved mixture of experts: one that multiplies its experts at once, or DBRX, which loops over them."""
    torch.manual_seed(0)
    (DbrxForCausalLM(DBRX) if name == "dbrx" else MODELS[name]()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("mixtral", ()),
        ("mixtral", ("model.policy_dtype=bfloat16", "activation_checkpointing=true")),
        ("mixtral", ("model.policy_dtype=bfloat16", "model.master_dtype=bfloat16")),
        ("qwen3-moe", ("model.router_aux_loss_coef=0.1", "packing=true", "gradient_accumulation_steps=2")),
        ("gpt-oss", ("lora.rank=4",)),
    ],
    ids=str,
)
def test_experts_that_are_multiplied_at_once(config, tmp_path, name, overrides):
    """What they take does not depend on the load of each."""
    made = config(*overrides, model=experts_folder(name, tmp_path / name))
    found, real = estimate_memory(dry_run(made), CPU), taken(made)
    assert found.parts == {part: size for part, size in real.peaks.items() if size}
    assert found.peak == real.peak


def test_experts_in_a_loop(config, tmp_path):
    """The estimate is that of an even load, so it is near the memory of a real step."""
    made = config(model=experts_folder("dbrx", tmp_path / "dbrx"))
    found, real = estimate_memory(dry_run(made), CPU), taken(made)
    assert found.peak == pytest.approx(real.peak, rel=0.1)
    assert found.parts["activations"] == pytest.approx(real.peaks["activations"], rel=0.2)


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8(config, monkeypatch, recipe):
    """In emulation on both sides, which also keeps what the products in FP8 keep."""
    monkeypatch.setattr(setup, "use_float8", functools.partial(use_float8, emulate=True))
    run = dry_run(config("model.policy_dtype=bfloat16", "packing=true"))
    plain = estimate_memory(run, CPU)
    real = taken(run.config, recipe)
    run.config.model.float8 = recipe  # which is refused without a GPU
    attention._groups.cache_clear()
    found = estimate_memory(run, CPU)
    assert found.parts["activations"] != plain.parts["activations"]
    assert found.parts == {part: real.peaks[part] for part in found.parts} and found.peak == real.peak


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_layers_are_as_large_as_those_of_bitsandbytes(config, bits):
    """Packed weights, their scales and code books."""
    config = config("lora.rank=4", f"model.quantization={bits}", "model.policy_dtype=bfloat16")
    tensors = []
    for module in Trainer(config).policy.modules():
        tensors += [*module._parameters.values(), *module._buffers.values()]
        weight = module._parameters.get("weight")
        if type(weight).__name__ == "Params4bit":
            state = weight.quant_state
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        elif type(weight).__name__ == "Int8Params":
            tensors.append(weight.SCB if weight.SCB is not None else module.state.SCB)
    assert estimate_memory(dry_run(config), CPU).parts["weights"] == held(t for t in tensors if t is not None)


@pytest.mark.parametrize("shard, ranks", [("full", 2), ("full", 3), ("grad", 2), ("none", 2)])
def test_sharded_weights_gradients_and_moments(config, shard, ranks):
    """On each rank the rows of its share, the last one's padded; without a cut, all."""
    made = config("trainer=FSDPTrainer", f"fsdp.shard={shard}", "gradient_accumulation_steps=1", "total_batch_size=12")
    run = dry_run(made)
    found = estimate_memory(run, CPU, ranks).parts
    share = 1 if shard == "none" else ranks
    rows = sum(4 * math.ceil(p.shape[0] / share) * p[0].numel() for p in run.policy.parameters())
    buffers = held(run.policy.buffers())
    assert found["weights"] == rows + buffers
    assert found["gradients"] == rows
    steps = 4 * len(list(run.policy.parameters()))
    assert found["optimizer"] == 2 * rows + steps
    assert found.get("gathered", 0) > 0


@pytest.mark.slow
def test_gathered_weights_are_given_back(config, tmp_path):
    """With shard=full a block's are there while it computes; with grad all are there until the backward pass."""
    save_model(random_llama(num_hidden_layers=6), tiny_tokenizer(), tmp_path / "deep", torch.float32)
    gathered = {}
    for shard in ("full", "grad"):
        run = dry_run(config("trainer=FSDPTrainer", f"fsdp.shard={shard}", model=tmp_path / "deep"))
        gathered[shard] = estimate_memory(run, CPU, 2).parts["gathered"]
    block = held(torch.empty(p.shape) for p in run.policy.model.model.layers[0].parameters())
    assert gathered["grad"] - gathered["full"] > 2 * block


# ------------------------------------------------------------------------------------------------------ the tracker


def test_the_ledger_by_hand():
    """relu(x W) V with x [5, 7], W [7, 11], V [11, 3] in float32: what is held, and when it is held most."""
    x, w, v = torch.zeros(5, 7), torch.zeros(7, 11, requires_grad=True), torch.zeros(11, 3, requires_grad=True)
    tracker = MemoryTracker()
    tracker.hold(w, "weights")
    tracker.hold(w[1:], "weights")  # a view is no second one
    with tracker:
        y = (x @ w).relu() @ v
        assert tracker.now == {"weights": 4 * 77, "activations": 4 * (55 + 15)}  # relu keeps its result
        assert tracker.peaks["activations"] == 4 * (55 + 55) and tracker.peak == 4 * (77 + 110)
        tracker.reset_peaks()
        y.sum().backward()
        tracker.hold(w.grad, "gradients")
        del y
    assert tracker.now == {"weights": 4 * 77, "activations": 4 * 33, "gradients": 4 * 77}  # of v nobody has spoken
    assert tracker.total == sum(tracker.now.values())


def test_what_autograd_keeps_is_counted(config):
    """After a forward pass the tracker holds all that PyTorch's own hooks say is saved, weights apart."""
    trainer, tracker = Trainer(config("packing=true", "loss.focal_gamma=1")), MemoryTracker()
    batch, saved = _largest_batch(trainer.train_loader, False), {}
    attention._groups.cache_clear()  # another test may have made the layout of this batch

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    known = [*trainer.policy.parameters(), *trainer.policy.buffers(), *vars(batch).values()]
    known = {t.untyped_storage()._cdata for t in known if isinstance(t, torch.Tensor)}
    with tracker, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = trainer.loss(batch, trainer.models)
    kept = {key: size for key, size in saved.items() if key not in known}
    assert len(kept) > 20
    assert {key: tracker.held[key][1] for key in kept} == kept
    del output


def test_the_output_layer_counts_as_head(config):
    """With a vocabulary of 20,000 tokens its gradient and a chunk of logits, but not in the activations."""
    made = config("model.name_or_path=tiny", "freeze_layers=[0-1]")
    run = dry_run(made)
    plain = estimate_memory(run, CPU).parts
    run.template.tokenizer.add_tokens([f"<new {i}>" for i in range(20_000)])
    grown = estimate_memory(run, CPU).parts
    assert grown["head"] - plain["head"] > 20_000 * 64 * 4
    assert grown["activations"] - plain["activations"] < 20_000 * 64 * 4 * 2.1  # the two gradients of a tied matrix


def test_memory_elsewhere_is_no_part_of_the_peak(config):
    """fsdp.cpu_offload on a GPU; on the CPU there is no elsewhere."""
    made = config("trainer=FSDPTrainer")
    made.fsdp.cpu_offload = True
    run = dry_run(made)
    here, there = (estimate_memory(run, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert there.elsewhere == {"weights", "gradients", "optimizer"} and not here.elsewhere
    assert there.peak < sum(there.parts[part] for part in ("activations", "head", "gathered")) + 1
    assert here.peak > here.parts["weights"] + here.parts["optimizer"] > there.peak / 10


def test_the_largest_micro_batch(config):
    """It has as many places as any of the first epoch's, on any rank."""
    for overrides in (("gradient_accumulation_steps=2",), ("packing=true",), ("group_by_length=true",)):
        trainer = Trainer(config(*overrides))
        loader = trainer.train_loader
        steps = [batches for (_, batches), _ in zip(loader.steps(), range(loader.steps_per_epoch))]
        places = [batch.input_ids.numel() for batches in steps for batch in batches]
        assert _largest_batch(loader, False).input_ids.numel() == max(places) > min(places)
        evaluated = [batch.input_ids.numel() for batch in trainer.eval_loader.eval_batches()]
        assert _largest_batch(trainer.eval_loader, True).input_ids.numel() == max(evaluated)


def test_devices_that_do_not_fit(config):
    """As training would refuse them."""
    run = dry_run(config())
    with raises(ConfigError, "conflict", "trainer: "):
        estimate_memory(run, CPU, 2)
    run = dry_run(config("trainer=FSDPTrainer"))
    with raises(ConfigError, "conflict", "total_batch_size: 8 "):
        estimate_memory(run, CPU, 3)


def test_the_chunks_of_a_gpu_hold_for_distillation_too():
    """The estimate for a GPU is on CPU tensors, with the GPU's buffers for every product of the LM head."""
    hidden, layer = torch.zeros(1, 8), LMHead(torch.zeros(1000, 8))
    with _head_chunks_of("cuda"):
        assert kd_divergence.default_chunk(hidden, layer, kd_divergence.BUFFERS) == chunk_bytes("cuda") // (
            4 * 2 * 1000
        )
