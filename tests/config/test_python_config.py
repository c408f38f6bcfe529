"""What is given in Python: a config that is built or changed there is checked, and a loss object is written down."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import yaml

from minitrain import Config, Loss, LossOutput, Trainer, create_loss, load_config, register_loss
from minitrain.config.saved import config_yaml
from minitrain.config.schema import option
from minitrain.config.sections import DatasetConfig, EarlyStoppingConfig, ModelConfig
from minitrain.errors import ConfigError, InvalidConfigError, RunDirError
from minitrain.losses import base, describe_loss, registered
from minitrain.losses.dft import DFT
from minitrain.losses.sft import SFT, SFTOptions
from minitrain.tools.preflight.load import check_python_config
from tests.messages import raises
from tests.rows import REQUIRED


@pytest.fixture
def config(rows_file, tmp_path):
    """A config built in Python, without `load_config`."""
    entries = [DatasetConfig(str(rows_file))]
    return Config(
        model=ModelConfig("tiny"), datasets=entries, n_steps=2, total_batch_size=4, output_dir=str(tmp_path / "runs")
    )


@dataclass
class PlainOptions:
    """Options without limits, as in any dataclass."""

    power: float = 1.0
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0


class Bare(Loss):
    """A loss of nobody's name, with options of no dataclass."""

    def num_items(self, batch):
        return torch.tensor(float(batch.n_targets))

    def __call__(self, batch, models):
        return LossOutput(-models.policy(batch).logps.sum(), self.num_items(batch), {})


class Unregistered(SFT):
    """A loss that inherits the name `sft` and is another one."""

    def __init__(self, options=None):
        super().__init__(options or SFTOptions(label_smoothing=0.25))


# ------------------------------------------------------------------------------------------------- checked


@pytest.mark.parametrize(
    "key, value, told, about",
    [
        ("lr_scheduler", "cosin", "not-a-choice", "lr_scheduler"),
        ("lr", -1.0, "out-of-range", "lr"),
        ("lr", float("nan"), "wrong-type", "lr"),
        ("seed", "x", "wrong-type", "seed"),
        ("learning_rate", 1.0, "unknown-option", "learning_rate"),
        ("model", ModelConfig("tiny", policy_dtype="fp8"), "not-a-choice", "model.policy_dtype"),
        ("model", {"name_or_path": "tiny", "dtype": "float16"}, "unknown-option", "model.dtype"),
        ("datasets", ["nowhere.jsonl"], "not-found", "datasets[0].path"),
        ("loss", {"name": "dft", "dft_alpha": 2.0}, "out-of-range", "loss.dft_alpha"),
        ("loss", {"name": "sdt"}, "not-a-choice", "loss.name"),
        ("early_stopping", EarlyStoppingConfig(patience=2), "no-effect", "early_stopping"),
        ("warmup_steps", 9, "out-of-range", "warmup_steps"),
        ("betas", (0.9,), "invalid-value", "betas"),
        ("optimizer", "AdamWW", "not-a-choice", "optimizer"),
        ("exp_name", "a/b", "invalid-value", "exp_name"),
    ],
)
def test_a_config_from_python_is_checked(config, wording, key, value, told, about):
    """Built or changed in Python, before anything is loaded, by the rules of a file; nothing is written."""
    setattr(config, key, value)
    with pytest.raises(InvalidConfigError) as caught:
        Trainer(config)
    wording(caught.value)
    assert [(issue.where, issue.key, issue.code) for issue in caught.value.issues] == [("config", about, told)]


def test_short_forms_serve_in_python_too(config, rows_file):
    """Dicts in the place of dataclasses, a path for a data set, a name for a loss; a tuple is a list."""
    config.datasets, config.model, config.loss = str(rows_file), {"name_or_path": "tiny"}, "dft"
    config.betas = (0.5, 0.9)
    checked = check_python_config(config)
    assert checked.datasets == [DatasetConfig(str(rows_file))] and checked.model == ModelConfig("tiny")
    assert checked.loss == {"name": "dft"} and checked.exp_name == "config" and checked.betas == [0.5, 0.9]
    assert check_python_config(checked) == checked


def test_the_config_that_a_trainer_was_given_is_not_changed(config):
    """The trainer works with a copy."""
    before = dataclasses.asdict(config)
    trainer = Trainer(config, loss=create_loss("dft"))
    assert dataclasses.asdict(config) == before and trainer.config.loss == {"name": "dft"}


def test_what_is_changed_in_python_is_saved(config, monkeypatch, rows_file):
    """Also over an interpolation; `dataclasses.replace` keeps those that stand for the same."""
    monkeypatch.setenv("LR", "0.25")
    monkeypatch.setenv("NAME", "s3cret")
    given = {"datasets": [str(rows_file)], "model": {"name_or_path": "tiny"}, "lr": "${oc.env:LR}"}
    loaded = load_config(given | {"exp_name": "run-${oc.env:NAME}", "betas": ["${oc.env:LR}", 0.5]})
    loaded.lr = 0.5
    for changed in (loaded, dataclasses.replace(loaded, seed=3), check_python_config(loaded)):
        saved = yaml.safe_load(config_yaml(changed))
        assert saved["lr"] == 0.5 and saved["exp_name"] == "run-${oc.env:NAME}"
        assert saved["betas"] == ["${oc.env:LR}", 0.5] and "s3cret" not in config_yaml(changed)


@pytest.mark.parametrize("text", ["a ${b} c", "${", "\\${lr}", "\\\\${x} ${y}", "$x {y}", "${oc.env:HOME}"])
def test_dollars_of_a_text_from_python_stay_what_they_are(config, text, tmp_path):
    """`${` in a text that was given in Python is no interpolation, and the saved config loads to the same text."""
    config.datasets[0].prompt_template = text + "{prompt}"
    (tmp_path / "c.yml").write_text(config_yaml(check_python_config(config)))
    assert load_config(tmp_path / "c.yml").datasets[0].prompt_template == text + "{prompt}"


def test_a_config_needs_a_model():
    """In Python, without a file that could be named."""
    with raises(ConfigError, "missing-option", "model: ", "ModelConfig"):
        Config()


# ---------------------------------------------------------------------------------------------- loss objects


def is_required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


@pytest.mark.parametrize("name", sorted(registered()))
def test_a_loss_object_is_described_as_a_config_has_it(name, tmp_path):
    """Each registered loss at its defaults by its name alone, and with any one option changed by that one."""
    if name == "kd":
        (tmp_path / "teacher").mkdir()
    required = {f.name for f in dataclasses.fields(registered()[name].options_class) if is_required(f)}
    base = {key: value for key, value in REQUIRED.get(name, {}).items() if key in required}
    assert describe_loss(create_loss(name, **base)) == {"name": name} | base
    other = {int: 3, float: 0.5, bool: None}
    for f in dataclasses.fields(registered()[name].options_class):
        default = f.default if f.default is not dataclasses.MISSING else None
        value = not default if isinstance(default, bool) else other.get(type(default))
        if value is None or value == default:
            continue
        try:
            loss = create_loss(name, **base | {f.name: value})
        except ConfigError:
            continue
        assert describe_loss(loss) in ({"name": name} | base | {f.name: value}, {"name": name} | base), f.name
        described = describe_loss(loss)
        assert create_loss(**described).options == loss.options


def test_options_that_follow_from_others_are_not_described():
    """`policy` makes kl_in, clip_eps_high and others of `advantage_estimator`; none of them was given."""
    loss = create_loss("policy", advantage_estimator="reinforce++")
    assert describe_loss(loss) == {"name": "policy", "advantage_estimator": "reinforce++"}


def test_a_loss_object_is_recorded_and_resumed(make_trainer, tmp_path):
    """config.yml names it, the command line resumes the same loss, and another one is refused."""
    trainer = make_trainer("n_steps=2", "save_every_steps=1", loss=create_loss("dft", dft_alpha=0.5))
    trainer.train()
    saved = tmp_path / "runs" / "run" / "config.yml"
    assert yaml.safe_load(saved.read_text())["loss"] == {"name": "dft", "dft_alpha": 0.5}
    assert "dft_alpha: 0.5" in (trainer.run.final / "README.md").read_text()
    again = Trainer(load_config(saved, ["n_steps=4"]))
    assert type(again.loss) is DFT and again.loss.options.dft_alpha == 0.5
    again.train()
    assert again.step == 4
    for other in (None, create_loss("dft"), create_loss("sft"), Unregistered()):
        with raises(RunDirError, "other-run", "loss: "):
            make_trainer("n_steps=4", loss=other)


def test_a_config_and_an_object_that_differ_are_refused(make_trainer):
    """Neither is ignored in silence; the same loss twice is fine, and so is an object where the config names none."""
    with raises(ConfigError, "conflict", "loss: ", "'dft'", "'sft'"):
        make_trainer("loss=dft", loss=create_loss("sft"))
    same = make_trainer("loss.name=dft", "loss.dft_alpha=0.5", loss=create_loss("dft", dft_alpha=0.5))
    assert same.config.loss == {"name": "dft", "dft_alpha": 0.5}


def test_an_option_of_an_object_that_has_no_effect_is_refused(make_trainer):
    """By the check that the same option in a config gets."""
    with raises(ConfigError, "no-effect", "loss.kl_estimator: ", "loss.kl_coef"):
        make_trainer(loss=create_loss("policy", kl_estimator="k2"))


def test_a_registered_loss_of_the_users_own(make_trainer, own_registry, tmp_path):
    """Its name and options are recorded, plain dataclass fields included, and the file loads where it is registered."""
    register_loss("mine", PlainOptions)(type("Mine", (SFT,), {}))
    trainer = make_trainer("n_steps=1", loss=create_loss("mine", power=3.0))
    trainer.train()
    saved = tmp_path / "runs" / "run" / "config.yml"
    assert load_config(saved).loss == {"name": "mine", "power": 3.0}
    with raises(ConfigError, "wrong-type", "loss.power: ", "'x'"):
        load_config(saved, ["loss.power=x"])
    base._REGISTRY.pop("mine")
    with raises(ConfigError, "not-a-choice", "loss.name: ", "'mine'"):
        load_config(saved)


def test_an_unregistered_class_is_never_taken_for_another_loss(make_trainer, tmp_path):
    """It trains; config.yml has its full name, which is no loss that a config can name, so that nothing resumes the run
    as the loss whose name it inherits."""
    trainer = make_trainer("n_steps=2", "save_every_steps=1", loss=Unregistered())
    trainer.train()
    name = f"{__name__}.Unregistered"
    saved = tmp_path / "runs" / "run" / "config.yml"
    assert yaml.safe_load(saved.read_text())["loss"] == {"name": name, "label_smoothing": 0.25}
    with raises(ConfigError, "not-a-choice", f"'{name}'", "register_loss"):
        load_config(saved)
    again = make_trainer("n_steps=4", "save_every_steps=1", loss=Unregistered())
    again.train()
    assert again.step == 4
    with raises(RunDirError, "other-run", "loss: "):
        make_trainer("n_steps=6", "save_every_steps=1", loss=Unregistered(SFTOptions(label_smoothing=0.5)))


@pytest.mark.parametrize("hint, code", [(object, "wrong-type"), (Any, "invalid-value")])
def test_an_option_that_no_yaml_holds(make_trainer, own_registry, hint, code):
    """A function among the options of a registered loss is refused, since config.yml could not name it."""
    options = dataclasses.make_dataclass("O", [("f", hint, option(None, "A function."))])
    register_loss("odd", options)(type("Odd", (SFT,), {}))
    with raises(ConfigError, code, "loss.f: "):
        make_trainer(loss=create_loss("odd", f=print))


def test_a_bare_loss_trains(make_trainer, tmp_path, capsys):
    """A class without a name or options in a dataclass is told, and recorded, by its own name."""
    make_trainer("n_steps=1", loss=Bare(None)).train()
    saved = yaml.safe_load((tmp_path / "runs" / "run" / "config.yml").read_text())
    assert saved["loss"] == {"name": f"{__name__}.Bare"} and f"loss {__name__}.Bare" in capsys.readouterr().out
