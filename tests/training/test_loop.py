"""The loop against a plain one written here, and what it does with precision, schedules, NaN and evaluation."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from minitrain import ConfigError, RunError
from minitrain.config.schedules import lr_factor
from minitrain.losses import LossOutput
from minitrain.losses.sft import SFT, SFTOptions
from tests.conftest import metrics, random_llama, weights
from tests.messages import raises


def plain_training(trainer, n_steps: int) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Ten lines of PyTorch: full logits, cross entropy over all labels of the step, clip, AdamW, linear schedule."""
    config, model = trainer.config, random_llama()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr)
    losses, norms, steps = [], [], trainer.train_loader.steps()
    for step in range(n_steps):
        _, batches = next(steps)
        total, count = 0.0, sum((b.labels != -100).sum() for b in batches)
        for b in batches:
            for row, start, stop in b.spans.tolist():
                ids, labels = b.input_ids[row : row + 1, start:stop], b.labels[row, start + 1 : stop]
                logits = model(input_ids=ids).logits[0, :-1]
                total = total + F.cross_entropy(logits, labels, reduction="sum")
        (total / count).backward()
        losses.append(total.item() / count.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item())
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 - step / n_steps)
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, dict(model.named_parameters())


def trains_as_plainly(trainer, n_steps: int) -> None:
    losses, norms, parameters = plain_training(trainer, n_steps)
    trainer.train()
    assert [row["grad_norm"] for row in metrics(trainer)] == pytest.approx(norms, rel=1e-4)
    assert [row["loss"] for row in metrics(trainer)] == pytest.approx(losses, rel=1e-4)
    for name, p in trainer.policy.model.named_parameters():
        torch.testing.assert_close(p, parameters[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    "layout",
    [
        (),
        ("gradient_accumulation_steps=4",),
        ("packing=true",),
        ("group_by_length=true",),
        ("max_tokens_per_micro_batch=90",),
        ("max_tokens_per_micro_batch=90", "packing=true"),
    ],
)
def test_ten_steps_equal_a_plain_loop(make_trainer, layout):
    """Losses and weights after 10 steps of AdamW with decay, clipping and a schedule, whatever the layout."""
    trains_as_plainly(make_trainer("n_steps=10", "weight_decay=0.1", "max_grad_norm=0.5", *layout), 10)


def test_a_short_last_window_is_scaled_by_its_own_tokens(make_trainer):
    """7 examples in steps of 4, cut into 4: the second step has three, and is the mean over its own tokens
    (transformers#39659)."""
    base = ("n_steps=2", "total_batch_size=4", "datasets.0.n_examples=7", "gradient_accumulation_steps=4")
    trains_as_plainly(make_trainer(*base), 2)


def test_the_logged_loss_is_the_same_for_every_accumulation(make_trainer):
    """Accumulation 1, 2, 4, 8 log one loss and one norm (transformers#35078)."""
    rows = []
    for parts in (1, 2, 4, 8):
        trainer = make_trainer("n_steps=2", f"gradient_accumulation_steps={parts}", f"exp_name=parts{parts}")
        trainer.train()
        rows.append([(row["loss"], row["grad_norm"]) for row in metrics(trainer)])
    for other in rows[1:]:
        for got, want in zip(other, rows[0]):
            assert got == pytest.approx(want, rel=1e-4)


def test_a_logged_window_is_the_mean_over_its_tokens(make_trainer):
    """log_every_steps=4 logs the token mean of four steps, not the last loss and not a mean of means."""
    every, window = make_trainer("n_steps=4"), make_trainer("n_steps=4", "log_every_steps=4", "exp_name=window")
    counts = [sum(b.n_targets for b in batches) for _, (_, batches) in zip(range(4), every.train_loader.steps())]
    every.train()
    window.train()
    each = [row["loss"] for row in metrics(every)]
    want = sum(loss * n for loss, n in zip(each, counts)) / sum(counts)
    assert metrics(window)[0]["loss"] == pytest.approx(want, rel=1e-5)


# ------------------------------------------------------------------------------------------------- non-finite


class Poisoned(SFT):
    """sft whose loss is NaN at the calls in `bad`."""

    bad: tuple[int, ...] = ()

    def __init__(self, bad):
        super().__init__(SFTOptions())
        self.bad, self.calls = bad, 0

    def __call__(self, batch, models) -> LossOutput:
        output = super().__call__(batch, models)
        self.calls += 1
        if self.calls in self.bad:
            output.loss_sum = output.loss_sum * math.nan
        return output


def test_a_nan_step_is_logged_and_changes_nothing(make_trainer):
    """The log shows NaN, weights, moments and schedule stay, training goes on (trl#6702)."""
    seen = {}

    def note(t):
        moments = [s["exp_avg"].clone() for s in t.optimizer.state.values()]
        seen[t.step] = (weights(t), moments, t.lr)

    trainer = make_trainer("n_steps=4", loss=Poisoned((3,)), on_step_end=note)
    trainer.train()
    losses = [row["loss"] for row in metrics(trainer)]
    assert losses[2] == "nan" and all(isinstance(losses[i], float) for i in (0, 1, 3))
    for name, p in seen[2][0].items():
        assert torch.equal(p, seen[3][0][name])
    assert all(torch.equal(a, b) for a, b in zip(seen[2][1], seen[3][1]))
    assert seen[2][2] == seen[3][2]
    assert any(not torch.equal(p, seen[4][0][name]) for name, p in seen[3][0].items())


def test_training_gives_up_after_many_nan_steps_in_a_row(make_trainer):
    """max_bad_steps in a row end the run with what to do about it; fewer do not."""
    trainer = make_trainer("n_steps=9", "max_bad_steps=3", loss=Poisoned((2, 3, 5, 6, 7)))
    with raises(RunError, "not-finite", "step 7"):
        trainer.train()


def test_the_schedule_follows_the_updates_taken(make_trainer):
    """Logged lrs are the closed form; a skipped step does not advance it (accelerate#963)."""
    lrs = []
    trainer = make_trainer(
        "n_steps=8",
        "warmup_steps=2",
        "lr_scheduler=cosine",
        "gradient_accumulation_steps=2",
        loss=Poisoned((7,)),  # the first micro-batch of the fourth step
        on_step_end=lambda t: lrs.append(t.optimizer.param_groups[0]["lr"]),
    )
    trainer.train()
    factors = [lr_factor(update, 8, 2, "cosine") for update in (0, 1, 2, 2, 3, 4, 5, 6)]
    assert lrs == pytest.approx([0.01 * f for f in factors])


# -------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_keeps_float32_masters(make_trainer, dtype):
    """Parameters and moments stay float32, the loss is near that of float32, the saved model has the dtype."""
    import transformers as tf

    exact = make_trainer("exp_name=exact", "n_steps=2")
    exact.train()
    trainer = make_trainer(f"model.policy_dtype={dtype}", "n_steps=2")
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.policy.parameters())
    assert all(s["exp_avg"].dtype == torch.float32 for s in trainer.optimizer.state.values())
    for got, want in zip(metrics(trainer), metrics(exact)):
        assert got["loss"] == pytest.approx(want["loss"], rel=2e-2) and got["loss"] != want["loss"]
    assert tf.AutoModelForCausalLM.from_pretrained(trainer.run.final).dtype == getattr(torch, dtype)


def test_small_updates_reach_bf16_training(make_trainer):
    """lr 1e-5 for 100 steps moves the float32 masters as far as float32 training, while bf16 parameters hardly move
    (pytorch/ao#1124)."""
    moved = {}
    for name, options in {
        "float32": (),
        "bf16": ("model.policy_dtype=bfloat16",),
        "bf16 masters": ("model.policy_dtype=bfloat16", "model.master_dtype=bfloat16"),
    }.items():
        trainer = make_trainer("n_steps=100", "lr=1e-5", "lr_scheduler=constant", f"exp_name={name}", *options)
        before = weights(trainer)
        trainer.train()
        moved[name] = sum((p.float() - before[n].float()).abs().sum() for n, p in weights(trainer).items())
    assert moved["bf16"] > 0.9 * moved["float32"]
    assert moved["bf16 masters"] < 0.8 * moved["float32"]


def test_gradients_are_unscaled_before_they_are_clipped(make_trainer):
    """With a loss scale of 1024 the clipped update is that of float32 (pytorch/examples#1196)."""
    plain = make_trainer("exp_name=plain", "n_steps=2", "max_grad_norm=0.1", "optimizer=SGD")
    plain.train()
    scaled = make_trainer("n_steps=2", "max_grad_norm=0.1", "optimizer=SGD")
    scaled.precision.scale = 1024.0
    scaled.train()
    for name, p in weights(plain).items():
        torch.testing.assert_close(weights(scaled)[name], p, rtol=1e-6, atol=1e-7)


def test_a_float16_overflow_halves_the_scale_and_skips(make_trainer):
    """A scale at which gradients overflow is found and halved; it is no bad step, and training goes on."""
    trainer = make_trainer("model.policy_dtype=float16", "n_steps=4", "max_bad_steps=1")
    trainer.precision.scale = 2.0**127
    trainer.train()
    assert trainer.precision.scale < 2.0**127 and trainer.updates < trainer.step == 4


def test_activation_checkpointing_changes_no_number(make_trainer):
    """The recomputed activations give the same weights, with dropout too."""
    results = []
    for value in ("false", "true"):
        trainer = make_trainer(f"activation_checkpointing={value}", f"exp_name=ac-{value}")
        for module in trainer.policy.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
        trainer.train()
        results.append(weights(trainer))
    for name, p in results[0].items():
        torch.testing.assert_close(results[1][name], p, rtol=1e-6, atol=1e-7)


def test_activation_checkpointing_really_recomputes(make_trainer):
    """Each block runs its forward twice a step."""
    calls = []
    trainer = make_trainer("activation_checkpointing=true", "n_steps=1")
    trainer.policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 2


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(make_trainer, tmp_path):
    """torch.compile changes no loss beyond rounding, over 12 batches of 12 lengths, without a recompilation limit being
    hit (pytorch#135458)."""
    import torch._dynamo

    torch._dynamo.reset()
    rows = [{"prompt": "say", "response": "ab" * (i // 2 + 1)} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (f"datasets=[{tmp_path / 'rows.jsonl'}]", "n_steps=12", "total_batch_size=2", "group_by_length=true")
    plain = make_trainer("exp_name=plain", *options)
    compiled = make_trainer("compile=true", *options)
    widths = {batch.input_ids.shape[1] for _, (_, (batch,)) in zip(range(12), plain.train_loader.steps())}
    assert len(widths) == 12
    plain.train()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled.train()
    for got, want in zip(metrics(compiled), metrics(plain)):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-3)


def test_frozen_layers_do_not_move(make_trainer):
    """freeze_layers leaves their weights bit for bit; the rest moves."""
    trainer = make_trainer("freeze_layers=[0,embeddings]")
    before = weights(trainer)
    trainer.train()
    for name, p in weights(trainer).items():
        assert torch.equal(p, before[name]) == ("layers.0." in name or "embed_tokens" in name), name


@pytest.mark.parametrize(
    ("master", "policy", "frozen"),
    [
        ("float32", "bfloat16", "bfloat16"),
        ("float32", "float16", "float16"),
        ("bfloat16", "float32", "bfloat16"),
        ("bfloat16", "float16", "float16"),
    ],
)
def test_layers_of_two_dtypes(make_trainer, byte_folder, master, policy, frozen):
    """Frozen and trained layers work together in the check before the first step, in steps and in generation."""
    options = (f"model.master_dtype={master}", f"model.policy_dtype={policy}")
    new_tokens = ("freeze_layers=[embeddings]", f"model.tokenizer_name_or_path={byte_folder}")
    adapter = ("lora.rank=4", "lora.modules_to_save=[embed_tokens]")
    cases = [("freeze_layers=[0]",), ("freeze_layers=[1]",), new_tokens, *[adapter] * (master == "float32")]
    for case in cases:
        trainer = make_trainer(f"exp_name={cases.index(case)}", *case, *options)
        assert {p.dtype for p in trainer.policy.parameters() if not p.requires_grad} == {getattr(torch, frozen)}
        trainer.train()
        assert math.isfinite(metrics(trainer)[-1]["loss"]) and trainer.generate(["say 1"])


# ------------------------------------------------------------------------------------------------- evaluation


def test_eval_loss_is_exact_for_every_batch_size(make_trainer, rows_file):
    """Eval batches of 1, 3, 8, packed or not: one value, the mean over tokens (transformers#39241)."""
    values = []
    for size, packing in ((1, "false"), (3, "false"), (8, "true"), (40, "false")):
        trainer = make_trainer(f"eval_datasets=[{rows_file}]", f"eval_batch_size={size}", f"packing={packing}")
        values.append(trainer.evaluate()["loss"])
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)
    total = count = 0.0
    model = random_llama()
    for batch in trainer.eval_loader.eval_batches():
        for row, start, stop in batch.spans.tolist():
            labels = batch.labels[row, start + 1 : stop]
            logits = model(input_ids=batch.input_ids[row : row + 1, start:stop]).logits[0, :-1]
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
    assert values[0] == pytest.approx(total / count, rel=1e-5)


def test_evaluation_restores_modes_and_random_numbers(make_trainer, rows_file):
    """Every module's mode is as before, and training draws the same numbers as without it (simpletransformers#941)."""
    trainer = make_trainer(
        f"eval_datasets=[{rows_file}]", "eval_generate.n_examples=2", "eval_generate.max_new_tokens=2"
    )
    trainer.policy.model.model.layers[0].eval()
    modes = [module.training for module in trainer.policy.modules()]
    assert True in modes and False in modes
    state = torch.get_rng_state()
    trainer.evaluate()
    trainer.predict(["say 1"], max_new_tokens=2, temperature=1.0)
    assert [module.training for module in trainer.policy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_does_not_change_training(make_trainer, rows_file):
    """With dropout, runs with and without evaluations end bit for bit alike."""
    results = []
    for name, options in {"with": (f"eval_datasets=[{rows_file}]", "eval_every_steps=1"), "without": ()}.items():
        trainer = make_trainer(f"exp_name={name}", *options)
        for module in trainer.policy.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
        trainer.train()
        results.append(weights(trainer))
    assert all(torch.equal(p, results[1][name]) for name, p in results[0].items())


def test_evaluations_come_when_they_are_asked_for(make_trainer, rows_file):
    """Before the first step, every so many, once at the end; n_eval_examples bounds them."""
    base = (f"eval_datasets=[{rows_file}]", "n_steps=5", "n_eval_examples=4")
    trainer = make_trainer("eval_every_steps=2", *base)
    assert len(trainer.eval_loader.examples) == 4
    trainer.train()
    assert [row["step"] for row in metrics(trainer, "eval")] == [0, 2, 4, 5]
    trainer = make_trainer("do_first_eval=false", "exp_name=other", *base)
    trainer.train()
    assert [row["step"] for row in metrics(trainer, "eval")] == [5]


def test_early_stopping_and_the_best_model(make_trainer, rows_file):
    """Without improvement for `patience` evaluations it stops; best/ holds the weights of the best step."""
    import transformers as tf

    kept = {}
    trainer = make_trainer(
        f"eval_datasets=[{rows_file}]",
        "eval_every_steps=1",
        "n_steps=30",
        "early_stopping.patience=2",
        "save_best=true",
        on_eval_end=lambda t: kept.update({t.step: weights(t)}),
    )
    values = iter([5.0, 4.0, 3.0, 3.5, 3.2])
    trainer.evaluate = lambda: {"loss": next(values)}
    trainer.train()
    assert trainer.step == 4
    best = tf.AutoModelForCausalLM.from_pretrained(trainer.run.best)
    assert torch.equal(best.model.norm.weight, kept[2]["model.model.norm.weight"])
    assert not torch.equal(best.model.norm.weight, kept[4]["model.model.norm.weight"])


def test_another_metric_is_looked_for_before_the_first_step(make_trainer, rows_file):
    """Also with do_first_eval=false: a misspelt one would else be found out at the first evaluation, hours later."""
    options = (f"eval_datasets=[{rows_file}]", "do_first_eval=false", "n_steps=2", "save_best=true")
    steps = []
    with raises(ConfigError, "not-a-choice", "early_stopping.metric: ", "'perplexty'", "perplexity"):
        make_trainer("early_stopping.metric=perplexty", *options, on_step_end=lambda t: steps.append(t.step)).train()
    assert steps == []
    trainer = make_trainer("early_stopping.metric=perplexity", "exp_name=right", *options)
    trainer.train()
    assert [row["step"] for row in metrics(trainer, "eval")] == [0, 2]


# ------------------------------------------------------------------------------------------------------- hooks


def test_hooks_are_called_in_order_and_can_stop(make_trainer, rows_file):
    """Plain functions that get the trainer."""
    calls = []

    def step_end(trainer):
        calls.append(f"step {trainer.step}")
        trainer.should_stop = trainer.step == 2

    trainer = make_trainer(
        f"eval_datasets=[{rows_file}]",
        "n_steps=9",
        on_train_begin=lambda t: calls.append("begin"),
        on_step_end=step_end,
        on_eval_end=lambda t: calls.append("eval"),
        on_save=lambda t: calls.append("save"),
        on_train_end=lambda t: calls.append("end"),
    )
    trainer.train()
    assert calls == ["begin", "eval", "step 1", "step 2", "eval", "save", "end"]


def test_an_unknown_hook_is_refused(make_trainer):
    """A misspelt hook would never be called."""
    with raises(ConfigError, "not-a-choice", "on_step_ended"):
        make_trainer(on_step_ended=print)


def test_a_loss_object_takes_the_place_of_the_configured_one(make_trainer):
    """Trainer(config, loss=create_loss(...))."""
    from minitrain import create_loss

    trainer = make_trainer(loss=create_loss("sft", label_smoothing=0.5))
    plain = make_trainer("exp_name=plain")
    trainer.train()
    plain.train()
    assert metrics(trainer)[0]["loss"] != pytest.approx(metrics(plain)[0]["loss"], rel=1e-3)
