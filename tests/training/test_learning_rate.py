"""The default of lr by loss and adapter, and warnings about a learning rate or a batch size that does not fit."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minitrain import ConfigError, create_loss, load_config
from minitrain.cli.main import main
from minitrain.losses.sft import SFT
from minitrain.training.learning_rate import batch_hints, lr_warnings, with_lr
from tests.messages import raises

LORA, PROMPT = {"rank": 4}, {"num_virtual_tokens": 2}
PREFIX = PROMPT | {"method": "prefix"}


def config_of(loss: str, **options):
    config = load_config({"model": {"name_or_path": "tiny"}, "datasets": ["a.jsonl"], "exp_name": "a", **options})
    config.loss = {"name": loss}
    return config


def policy(width: int = 512) -> SimpleNamespace:
    embeddings = nn.Embedding(4, width, device="meta")
    return SimpleNamespace(model=SimpleNamespace(get_input_embeddings=lambda: embeddings))


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n')


@pytest.mark.parametrize(
    ("loss", "options", "wanted"),
    [
        ("sft", {}, 2e-5),
        ("sft", {"lora": LORA}, 2e-4),
        ("sft", {"soft_prompt": PROMPT}, 2e-2),
        ("sft", {"soft_prompt": PREFIX}, 5e-3),
        ("dpo", {}, 1e-6),
        ("dpo", {"lora": LORA}, 1e-5),
        ("policy", {"lora": LORA}, 1e-5),
        ("sft", {"lora": LORA, "lr": 3e-3}, 3e-3),
        ("sft", {"lr": 0.0}, 0.0),
    ],
)
def test_the_default_of_a_loss_and_an_adapter(loss, options, wanted):
    config = config_of(loss, **options)
    assert config.lr == options.get("lr")
    assert with_lr(config, create_loss(loss)).lr == wanted


@pytest.mark.parametrize(
    ("peft_type", "wanted"), [("LORA", 2e-4), ("PREFIX_TUNING", 5e-3), ("PROMPT_TUNING", 2e-2), (None, 2e-4)]
)
def test_the_default_of_a_loaded_adapter(tmp_path, peft_type, wanted):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}) if peft_type else "{")
    config = config_of("sft", model={"name_or_path": "tiny", "adapter": str(tmp_path)})
    assert with_lr(config, create_loss("sft")).lr == wanted


def test_a_run_shows_saves_and_compares_its_default(make_trainer, capsys):
    """In the first lines, in config.yml and in the steps; a run goes on with it, and not with another one."""
    trainer = make_trainer("lr=null", "lora.rank=2", "save_every_steps=1", "lr_scheduler=constant")
    trainer.train()
    assert "optimizer: AdamW, lr 0.0002 (the default of sft with LoRA), constant schedule, 0 warmup" in (
        capsys.readouterr().out
    )
    assert trainer.config.lr == trainer.train_metrics["lr"] == trainer.lr == 2e-4
    assert re.search("^lr: 0.0002$", (trainer.run.path / "config.yml").read_text(), re.MULTILINE)
    options = ("lora.rank=2", "save_every_steps=1", "lr_scheduler=constant", "n_steps=4")
    make_trainer("lr=null", *options).train()
    with raises(Exception, "other-run", "lr"):
        make_trainer("lr=2e-5", *options)


def test_a_loss_of_ones_own_has_its_default(make_trainer):
    class Slow(SFT):
        full_lr = 7e-6

    trainer = make_trainer("lr=null", loss=Slow(create_loss("sft").options))
    assert trainer.config.lr == 7e-6 and trainer.optimizer.param_groups[0]["lr"] == 7e-6


def test_a_schedule_is_checked_with_the_default():
    """Its final learning rate may not be above the peak, which depends on the adapter."""
    options = {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": {"min_lr": 1e-4}}
    config_of("sft", lora=LORA, **options)
    with raises(ConfigError, "out-of-range", "lr_scheduler_args.min_lr"):
        config_of("sft", **options)


@pytest.mark.parametrize(
    ("loss", "lr", "options", "warned"),
    [
        ("sft", 2e-5, {"lora": LORA}, "low"),
        ("sft", 5e-5, {"lora": LORA}, None),
        ("sft", 2e-5, {"lora": LORA | {"init": "pissa"}}, None),
        ("sft", 2e-5, {"soft_prompt": PROMPT}, "low"),
        ("sft", 1e-3, {}, "high"),
        ("sft", 5e-4, {}, None),
        ("sft", 5e-7, {}, None),
        ("sft", 1e-3, {"lora": LORA}, None),
        ("sft", 2e-2, {"lora": LORA}, "high"),
        ("sft", 1e-3, {"optimizer": "SGD"}, None),
        ("dpo", 5e-5, {}, "high"),
        ("dpo", 2e-5, {}, None),
        ("dpo", 5e-6, {"lora": LORA}, None),
        ("dpo", 5e-7, {"lora": LORA}, "low"),
    ],
)
def test_learning_rates_that_do_not_fit(loss, lr, options, warned):
    """Far from the default, with Adam, in a model that is not tiny."""
    config, loss = config_of(loss, lr=lr, **options), create_loss(loss)
    warnings = lr_warnings(config, policy(), loss)
    assert len(warnings) == (warned is not None)
    assert all(warning.startswith(f"lr={lr:g} is {warned}: ") for warning in warnings)
    assert not lr_warnings(config, policy(64), loss)


def test_an_optimizer_of_python_has_its_own_lr(make_trainer, capsys, monkeypatch):
    monkeypatch.setattr("minitrain.training.learning_rate.WARNED_WIDTH", 1)
    make_trainer("lr=1", "n_steps=1", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3)).train()
    out = capsys.readouterr().out
    assert ", lr of its own, linear schedule" in out and "is high" not in out


@pytest.mark.parametrize(
    ("loss", "size", "n_steps", "options", "hinted"),
    [
        ("sft", 256, 500, {"lora": LORA}, ["total_batch_size=256"]),
        ("sft", 128, 500, {"lora": LORA}, []),
        ("sft", 256, 500, {}, []),
        ("sft", 64, 20, {}, ["20 optimizer steps"]),
        ("sft", 64, 20, {"n_steps": 20}, []),
        ("policy", 256, 20, {"lora": LORA}, []),
    ],
)
def test_hints_about_the_batch_size(loss, size, n_steps, options, hinted):
    config = config_of(loss, total_batch_size=size, **options)
    hints = batch_hints(config, policy(), create_loss(loss), n_steps)
    assert len(hints) == len(hinted) and all(words in hint for words, hint in zip(hinted, hints))
    assert not batch_hints(config, policy(64), create_loss(loss), n_steps)


def test_validate_and_train_say_the_same(folder, capsys, monkeypatch):
    """The default, the warning and the hint."""
    monkeypatch.setattr("minitrain.training.learning_rate.WARNED_WIDTH", 1)
    arguments = ["c.yml", "--overrides", "lr=2e-5", "lora.rank=2", "n_steps=null", "n_epochs=0.5"]
    assert main(["validate", *arguments]) == 0
    validated = capsys.readouterr().out
    assert main(["train", *arguments]) == 0
    trained = capsys.readouterr().out
    for words in (
        "lr=2e-05 is low: 0.0002 is usual for sft with LoRA (docs/learning-rates.md)",
        "3 optimizer steps are few",
        "AdamW, lr 2e-05, linear schedule, 0 warmup steps",
    ):
        assert words in validated and words in trained
