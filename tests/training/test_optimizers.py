"""Optimizers of extras, Muon, master weights in the optimizer, and steps in the backward pass."""

import math

import pytest
import torch
from torch import nn

from minitrain import ConfigError, RunError, load_config
from minitrain.errors import InvalidConfigError
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_tokenizer
from minitrain.training import optim
from minitrain.training.optim import build_optimizer, hidden_matrices
from minitrain.training.optim_state import load_state
from minitrain.training.optimizers import InBackward, Joint, MasterWeights, set_lr
from tests.conftest import metrics, random_llama, weights
from tests.messages import raises

BASE = {"datasets": [__file__.replace("test_optimizers.py", "../../example/data/skills-test.jsonl")]}
BF16 = ("model.policy_dtype=bfloat16", "model.master_dtype=bfloat16")
IN_OPTIMIZER = ("model.policy_dtype=bfloat16", "model.master_weights=optimizer")
IN_BACKWARD = ("optimizer_in_backward=true", "max_grad_norm=0")
ROUNDING = "optimizer_args={bf16_stochastic_round: true}"


def config(*overrides):
    return load_config(BASE | {"model": {"name_or_path": "tiny"}, "lr": 2e-5}, list(overrides))


def needs(options):
    """Skip a case whose optimizer is not installed."""
    for package in ("bitsandbytes", "torchao"):
        if any(package in option for option in options):
            pytest.importorskip(package)


@pytest.fixture
def wide(make_trainer, wide_folder):
    """``wide("lr=0.1")``: a trainer over a Llama of width 64, whose matrices are large enough for 8 bits."""
    return lambda *overrides, **hooks: make_trainer(f"model.name_or_path={wide_folder}", *overrides, **hooks)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    save_model(random_llama(hidden_size=64), tiny_tokenizer(), folder, torch.float32)
    return folder


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 128), nn.Linear(128, 64)])
        self.norm, self.head, self.embedding = nn.LayerNorm(64), nn.Linear(64, 8), nn.Embedding(8, 64)


def model_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> Block:
    torch.manual_seed(seed)
    return Block().to(dtype)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int, lr: float = 1e-2) -> None:
    """Steps on random gradients, the same for each model."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        set_lr(optimizer, lr)
        optimizer.step()


# ------------------------------------------------------------------------------------------------------ of extras

# Options, and how far five steps of lr 0.01 are from those of AdamW at most and on average.
NEAR_ADAMW = {
    "bitsandbytes.AdamW": (1e-6, 1e-7),
    "bitsandbytes.AdamW8bit": (5e-3, 1e-3),
    "bitsandbytes.PagedAdamW": (1e-6, 1e-7),
    "bitsandbytes.PagedAdamW8bit": (5e-3, 1e-3),
    "bitsandbytes.optim.PagedAdamW32bit": (1e-6, 1e-7),
    "torchao.AdamW8bit": (5e-3, 1e-3),
    "torchao.AdamWFp8": (1e-2, 1e-3),
    "torchao.AdamW4bit": (4e-2, 5e-3),
}


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", NEAR_ADAMW)
def test_an_optimizer_of_an_extra_is_near_adamw(name):
    """Within the rounding of its moments; decay, betas and lr are those of the config."""
    needs([name])
    options = ("weight_decay=0.1", "betas=[0.8,0.95]")
    exact, near = model_of(), model_of()
    take_steps(exact, build_optimizer(exact, config(*options)), 5)
    take_steps(near, build_optimizer(near, config(f"optimizer={name}", *options)), 5)
    highest, mean = NEAR_ADAMW[name]
    for (key, a), b in zip(near.named_parameters(), exact.parameters(), strict=True):
        distance = (a - b).detach().abs()
        assert distance.max() <= highest and distance.mean() <= mean, key


def test_stochastic_rounding_keeps_small_updates():
    """Of bf16 parameters: the mean of many weights moves as in float32, where rounding to the nearest moves none."""
    pytest.importorskip("torchao")
    moved = {}
    for name, options in {"nearest": (), "stochastic": (ROUNDING,)}.items():
        model = nn.ModuleList([nn.Linear(64, 64, bias=False)]).to(torch.bfloat16)
        nn.init.constant_(model[0].weight, 1.0)
        optimizer = build_optimizer(model, config("optimizer=torchao.AdamW8bit", *BF16, *options))
        set_lr(optimizer, 1e-4)
        for _ in range(20):
            model[0].weight.grad = torch.ones_like(model[0].weight)
            optimizer.step()
        moved[name] = 1 - model[0].weight.float().mean().item()
    assert moved["nearest"] == 0 and moved["stochastic"] == pytest.approx(20 * 1e-4, rel=0.2)


def test_an_import_path_names_any_optimizer(monkeypatch):
    """A class of torch as well, and a function."""
    assert type(build_optimizer(model_of(), config("optimizer=torch.optim.NAdam"))) is torch.optim.NAdam
    monkeypatch.setattr(
        optim, "lower_momentum", lambda params, lr, momentum=0.5: torch.optim.SGD(params, lr, momentum), raising=False
    )
    path = "optimizer=minitrain.training.optim.lower_momentum"
    optimizer = build_optimizer(model_of(), config(path, "optimizer_args={momentum: 0.25}", "lr=0.5"))
    assert [(g["momentum"], g["lr"], g["lr_ratio"]) for g in optimizer.param_groups] == [(0.25, 0.5, 1.0)]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("optimizer=not_a_package.AdamW",), ("optimizer", "not-installed")),
        (("optimizer=torch.optim.adamwx.AdamW",), ("optimizer", "not-found")),
        (("optimizer=torch.optim.AdamWW",), ("optimizer", "not-found")),
        (("optimizer=torch.optim.LBFGS",), ("optimizer", "not-a-choice")),
        (("optimizer=torch.optim. AdamW",), ("optimizer", "invalid-value")),
        (
            ("optimizer=torch.optim.AdamW", "optimizer_args={momentum: 1}"),
            ("optimizer_args.momentum", "unknown-option"),
        ),
        (("optimizer=torch.optim.SGD", "betas=[0.5,0.5]"), ("betas", "no-effect")),
        (("optimizer=minitrain.training.optim.optimizer_class",), ("optimizer", "invalid-value")),
        (("optimizer=Muon", "optimizer_args={ns_steps: 100, momentum: -1}"), ("optimizer", "invalid-value")),
        (("optimizer=Muon", "optimizer_args={adamw_lr_ratio: -1}"), ("optimizer", "invalid-value")),
        (("optimizer=Muon", "optimizer_args={adjust_lr_fn: x}"), ("optimizer", "invalid-value")),
        (("optimizer=bitsandbytes.SGD", "optimizer_args={momentum: 0}"), ("optimizer", "invalid-value")),
        (("optimizer=torchao.AdamW8bit", ROUNDING), ("optimizer_args.bf16_stochastic_round", "no-effect")),
        (
            ("optimizer=torchao.AdamW8bit", ROUNDING, *BF16, "trainer=FSDPTrainer", "fsdp.shard=none"),
            ("optimizer_args.bf16_stochastic_round", "conflict"),
        ),
        (("optimizer=bitsandbytes.LAMB", "trainer=FSDPTrainer"), ("optimizer", "conflict")),
        (("optimizer_in_backward=true",), ("optimizer_in_backward", "conflict")),
        ((*IN_BACKWARD, "gradient_accumulation_steps=2"), ("optimizer_in_backward", "conflict")),
        ((*IN_BACKWARD, "max_tokens_per_micro_batch=2000"), ("optimizer_in_backward", "conflict")),
        ((*IN_BACKWARD, "model.policy_dtype=float16"), ("optimizer_in_backward", "conflict")),
        ((*IN_BACKWARD, "max_bad_steps=3"), ("max_bad_steps", "no-effect")),
        (("model.master_weights=optimizer",), ("model.master_weights", "no-effect")),
        ((*IN_OPTIMIZER, "lora.rank=4"), ("model.master_weights", "no-effect")),
        ((*IN_OPTIMIZER, "trainer=FSDPTrainer"), ("model.master_weights", "no-effect")),
        ((*IN_OPTIMIZER, "model.master_dtype=bfloat16"), ("model.master_weights", "conflict")),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_before_the_model_is_loaded(options, problem):
    needs(options)
    with pytest.raises(InvalidConfigError) as caught:
        config(*options)
    assert [(issue.key, issue.code) for issue in caught.value.issues] == [problem]


def test_what_a_checkpoint_would_lose_is_refused(monkeypatch):
    """Numbers that an optimizer keeps in its groups, not in its state, as schedule-free ones do."""

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1

    monkeypatch.setattr(optim, "counting", Counting, raising=False)
    with pytest.raises(InvalidConfigError) as caught:
        config("optimizer=minitrain.training.optim.counting")
    assert [(issue.key, issue.code) for issue in caught.value.issues] == [("optimizer", "invalid-value")]
    assert "changes k " in str(caught.value)


@pytest.mark.parametrize("package, extra", [("bitsandbytes", "quant"), ("torchao", "torchao")])
def test_a_missing_package_names_its_extra(package, extra, monkeypatch):
    monkeypatch.setattr(optim, "find_spec", lambda name: None)
    with raises(ConfigError, "not-installed", f"minitrain[{extra}]"):
        optim.optimizer_class(f"{package}.AdamW8bit")


# ----------------------------------------------------------------------------------------------------------- Muon


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    """Each with its step, at lr and at lr times adamw_lr_ratio."""
    options = ("optimizer=Muon", "optimizer_args={adamw_lr_ratio: 0.5}", "weight_decay=0.1", "betas=[0.8,0.9]")
    ours, plain = model_of(), model_of()
    matrices = [layer.weight for layer in plain.blocks]
    rest = [p for p in plain.parameters() if not any(p is matrix for matrix in matrices)]
    take_steps(ours, build_optimizer(ours, config(*options)), 3)
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [[p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]]
    adamw = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0}], 5e-3, (0.8, 0.9)
    )
    muon.param_groups[0]["lr_ratio"] = 1.0
    for group in adamw.param_groups:
        group["lr_ratio"] = 0.5
    take_steps(plain, Both(muon, adamw), 3)
    for (key, a), b in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a, b[1], rtol=0, atol=1e-6, msg=key)


class Both:
    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for each in self.optimizers for group in each.param_groups]

    def step(self):
        for each in self.optimizers:
            each.step()


@pytest.mark.parametrize("lora", [(), ("lora.rank=4", "lora.loraplus_lr_ratio=4")], ids=str)
def test_the_matrices_of_a_model(make_trainer, lora):
    """Neither embeddings, LM head nor norms; LoRA's matrices keep the ratio of LoRA+."""
    trainer = make_trainer("optimizer=Muon", *lora)
    names = {name for name, p in trainer.policy.named_parameters() if p in hidden_matrices(trainer.policy)}
    trained = {name for name, p in trainer.policy.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in names & trained} == ({"lora_A", "lora_B"} if lora else {"weight"})
    assert len(names & trained) == 2 * 7 * (2 if lora else 1) and not any("embed" in name for name in names)
    trainer.train()
    ratios = {(type(part).__name__, g["lr_ratio"]) for part in trainer.optimizer.parts for g in part.param_groups}
    assert ratios == ({("Muon", 1.0), ("Muon", 4.0)} if lora else {("Muon", 1.0), ("AdamW", 1.0)})


# ------------------------------------------------------------------------------------------------- master weights


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Muon"])
@pytest.mark.parametrize(
    "layout", [("packing=true",), ("gradient_accumulation_steps=2", "activation_checkpointing=true")]
)
def test_masters_in_the_optimizer_train_as_masters_in_the_model(make_trainer, optimizer, layout):
    """To the last bit: losses, norms, masters, and what is saved; the linear layers of the blocks are bfloat16."""
    options = (f"optimizer={optimizer}", *layout, "weight_decay=0.1", "max_grad_norm=0.5", "n_steps=4")
    ours = make_trainer(*IN_OPTIMIZER, *options, "exp_name=ours")
    plain = make_trainer("model.policy_dtype=bfloat16", *options, "exp_name=plain")
    ours.train(), plain.train()
    logged = [[(row["loss"], row["grad_norm"]) for row in metrics(each)] for each in (ours, plain)]
    assert logged[0] == logged[1] and len(logged[0]) == 4
    assert isinstance(ours.optimizer, MasterWeights)
    dtypes = set()
    for (name, a), b in zip(ours.policy.named_parameters(), plain.policy.parameters(), strict=True):
        master = ours.optimizer.stand_ins[a]
        assert torch.equal(master, b) and torch.equal(a, b.to(a.dtype)), name
        dtypes.add((a.dtype, "proj" in name, a.grad_dtype, master.dtype))
    assert dtypes == {
        (torch.bfloat16, True, torch.float32, torch.float32),
        (torch.float32, False, torch.float32, torch.float32),
    }


# ---------------------------------------------------------------------------------------------- in the backward pass

COMBINED = {
    "AdamW": (),
    "decay": ("weight_decay=0.1", "lora.rank=4", "lora.loraplus_lr_ratio=4"),
    "Muon": ("optimizer=Muon",),
    "Adafactor": ("optimizer=Adafactor", "lr=0.1"),
    "8-bit": ("optimizer=bitsandbytes.AdamW8bit",),
    "torchao": ("optimizer=torchao.AdamW8bit",),
    "masters": IN_OPTIMIZER,
    "schedule": ("warmup_steps=2", "lr_scheduler=cosine"),
}


@pytest.mark.parametrize("name", COMBINED)
def test_steps_in_the_backward_pass_are_the_same(wide, name):
    """Losses, norms and weights; no gradient is left after the backward pass."""
    options = (*COMBINED[name], "max_grad_norm=0", "n_steps=4")
    needs(options)
    ours = wide(*options, "optimizer_in_backward=true", "exp_name=ours")
    plain = wide(*options, "exp_name=plain")
    _, batches = next(ours.train_loader.steps())
    assert isinstance(ours.optimizer, InBackward)
    ours.train(), plain.train()
    logged = [[(row["loss"], row["grad_norm"], row["lr"]) for row in metrics(each)] for each in (ours, plain)]
    assert logged[0] == [pytest.approx(row, rel=1e-6) for row in logged[1]] and len(logged[0]) == 4
    for key, p in weights(plain).items():
        torch.testing.assert_close(weights(ours)[key], p, rtol=0, atol=1e-6, msg=key)
    ours.forward_backward(batches)
    assert all(p.grad is None for p in ours.parameters)


def test_bfloat16_gradients_have_a_float32_norm(wide):
    """The weights are those of plain steps to the bit, and the norm is that of float64."""
    options = ("model.master_dtype=bfloat16", "model.policy_dtype=bfloat16", "max_grad_norm=0", "n_steps=2")
    ours = wide(*options, "optimizer_in_backward=true", "exp_name=ours")
    plain = wide(*options, "exp_name=plain")
    _, batches = next(plain.train_loader.steps())
    plain.forward_backward(batches)
    assert {p.grad.dtype for p in plain.parameters} == {torch.bfloat16}
    norm = sum(p.grad.double().square().sum() for p in plain.parameters).sqrt()
    for p in plain.parameters:
        p.grad = None
    ours.train(), plain.train()
    assert metrics(ours)[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert [row["loss"] for row in metrics(ours)] == [row["loss"] for row in metrics(plain)]
    assert all(torch.equal(p, weights(plain)[name]) for name, p in weights(ours).items())


def test_only_one_gradient_exists_at_a_time(make_trainer):
    """Where a plain step holds all of them."""
    trainer, alive = make_trainer(*IN_BACKWARD), []
    for p in trainer.parameters:
        hooks = list(p._post_accumulate_grad_hooks.values())
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(each.grad is not None for each in trainer.parameters))
        )
        assert len(hooks) == 1
    trainer.forward_backward(next(trainer.train_loader.steps())[1])
    assert len(alive) == len(trainer.parameters) and max(alive) == 0


def test_a_resumed_run_makes_its_state_with_one_gradient_at_a_time():
    """All of them might not fit into the memory of a run that never holds them."""
    alive, parameters = [], {str(i): nn.Parameter(torch.ones(2)) for i in range(3)}
    parts = {p: torch.optim.AdamW([p]) for p in parameters.values()}
    optimizer = InBackward(Joint(parts.values()), parts)
    for part in parts.values():
        part.register_step_pre_hook(lambda *_: alive.append(sum(p.grad is not None for p in parts)))
    load_state(parameters, optimizer, 0, {}, lambda name, value: True)
    assert alive[:3] == [1, 1, 1] and max(alive) == 1
    assert all(optimizer.state[p] for p in parts) and not optimizer.norms


def test_a_gpu_that_is_missing_is_not_a_problem_of_the_optimizer(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidConfigError) as caught:
        config("device=cuda")
    assert [(issue.key, issue.code) for issue in caught.value.issues] == [("device", "no-device")]


def test_two_micro_batches_of_ones_own_are_refused(make_trainer):
    trainer = make_trainer(*IN_BACKWARD)
    batches = next(trainer.train_loader.steps())[1]
    with raises(ConfigError, "conflict", "optimizer_in_backward: "):
        trainer.forward_backward([*batches, *batches])


def test_a_gradient_that_is_not_finite_ends_the_run(make_trainer):
    """It cannot be skipped, because weights have changed."""
    trainer = make_trainer(*IN_BACKWARD)
    trainer.parameters[0].register_hook(lambda grad: grad * math.nan)
    with raises(RunError, "not-finite", "optimizer_in_backward"):
        trainer.train()


# ------------------------------------------------------------------------------------------------------- checkpoints

RESUMED = COMBINED | {
    "4-bit": ("optimizer=torchao.AdamW4bit",),
    "stochastic": ("optimizer=torchao.AdamW8bit", ROUNDING, *BF16),
    "fp8": ("optimizer=torchao.AdamWFp8",),
    "paged": ("optimizer=bitsandbytes.PagedAdamW8bit",),
    "in backward": IN_BACKWARD,
    "all": (*IN_OPTIMIZER, *IN_BACKWARD, "optimizer=Muon"),
    "8-bit in backward": (*IN_BACKWARD, "optimizer=bitsandbytes.AdamW8bit"),
    "torchao in backward": (*IN_BACKWARD, "optimizer=torchao.AdamW8bit"),
}


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_an_uninterrupted_one_to_the_bit(wide, name):
    """With the state of every kind: quantized, tensor subclasses, masters, momenta, numbers."""
    options = ("n_steps=4", "save_every_steps=2", "lr_scheduler=constant", *RESUMED[name])
    needs(options)
    whole = wide("exp_name=whole", *options)
    whole.train()
    wide(*options, on_step_end=lambda t: setattr(t, "_received", 15) if t.step == 2 else None).train()
    torch.manual_seed(12345)
    rest = wide(*options)
    rest.train()
    assert all(torch.equal(p, weights(rest)[key]) for key, p in weights(whole).items())
    assert [row["loss"] for row in metrics(rest)] == [row["loss"] for row in metrics(whole)]


@pytest.mark.parametrize(
    ("before", "after", "state"),
    [
        (("optimizer=SGD", "optimizer_args={momentum: 0.9}"), ("optimizer=SGD",), "momentum_buffer"),
        (("optimizer=bitsandbytes.AdamW8bit",), ("optimizer=bitsandbytes.AdamW",), "state1"),
        (("optimizer=bitsandbytes.AdamW",), ("optimizer=bitsandbytes.AdamW8bit",), "state1"),
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_the_optimizer_is_refused(wide, before, after, state):
    """Instead of being dropped or converted, when the optimizer or its options have changed."""
    needs(before)
    options = ("n_steps=3", "save_every_steps=1")
    wide(*options, *before, on_step_end=lambda t: setattr(t, "_received", 15) if t.step == 1 else None).train()
    trainer = wide(*options, *after, "allow_changes=[optimizer,optimizer_args]")
    with raises(RunError, "mismatch", state):
        trainer.train()
