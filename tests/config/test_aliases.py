"""Other names of options: accepted wherever a config comes from, and never together with the name they stand for."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from minitrain import ConfigError, Loss, create_loss, load_config, register_loss
from minitrain.config.schema import Config, aliases, option
from minitrain.errors import InvalidConfigError, RunDirError
from minitrain.losses import registered
from minitrain.losses.sft import SFT
from tests.conftest import ROOT, metrics
from tests.messages import raises, reports

OF_LOSSES = [(name, *pair) for name, loss in registered().items() for pair in aliases(loss.options_class).items()]
VALUES = {
    "advantage_estimator": "gae",
    "loss_aggregation": "grpo",
    "importance_sampling_level": "sequence",
    "clip_eps_low": 0.1,
    "clip_eps_high": 0.3,
    "gae_lambda": 0.5,
}
BESIDE = {"gae_lambda": {"advantage_estimator": "gae"}}  # what an option needs to have an effect


def options_for(name: str, key: str, own: str) -> dict:
    return {key: VALUES[own]} | (BESIDE.get(own, {}) if name == "policy" else {})


@pytest.fixture
def load(tmp_path, rows_file):
    """``load({"name": "policy"}, "loss.gae_lambda=0.5")``: the options of the loss of a YAML file with overrides."""

    def load(loss, *overrides: str) -> dict:
        config = {"datasets": str(rows_file), "model": {"name_or_path": "tiny"}, "loss": loss}
        (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
        return load_config(tmp_path / "c.yml", list(overrides)).loss

    return load


def test_the_names_of_other_libraries_and_of_0_1_0():
    """TRL's, and those that these options had before."""
    assert aliases(registered()["policy"].options_class) == {
        "advantages": "advantage_estimator",
        "lam": "gae_lambda",
        "loss_type": "loss_aggregation",
        "normaliser": "loss_aggregation",
        "ratio": "importance_sampling_level",
        "epsilon": "clip_eps_low",
        "eps_low": "clip_eps_low",
        "epsilon_high": "clip_eps_high",
        "eps_high": "clip_eps_high",
    }
    assert aliases(registered()["value"].options_class) == {"lam": "gae_lambda"}
    assert aliases() == {"batch_size": "total_batch_size"}


@pytest.mark.parametrize("name, alias, own", OF_LOSSES)
def test_an_alias_is_the_option_everywhere(load, name, alias, own):
    """In Python, in a file, in overrides of one key and of the section; the config has the option's own name."""
    given, meant = options_for(name, alias, own), options_for(name, own, own)
    assert create_loss(name, **given).options == create_loss(name, **meant).options
    want = {"name": name} | meant
    section = ", ".join(f"{key}: {value}" for key, value in given.items())
    assert load({"name": name} | given) == want
    assert load({"name": name}, *(f"loss.{key}={value}" for key, value in given.items())) == want
    assert load("sft", *(f"loss.{key}={value}" for key, value in given.items()), f"loss.name={name}") == want
    assert load("sft", f"loss={{name: {name}, {section}}}") == want


def test_an_override_takes_the_place_of_any_name_in_the_file(load):
    """Whichever of the names the file and the override use."""
    for there in ("clip_eps_low", "epsilon", "eps_low"):
        for key in ("clip_eps_low", "epsilon", "eps_low"):
            want = {"name": "policy", "clip_eps_low": 0.3}
            assert load({"name": "policy", there: 0.1}, f"loss.{key}=0.3") == want
            assert load({"name": "policy", there: 0.1}, f"loss={{{key}: 0.3}}") == want


def test_an_option_set_twice_is_refused(load):
    """With its line; by two aliases, too. Nothing is dropped in silence."""
    for one, other in (("epsilon", "eps_low"), ("clip_eps_low", "eps_low"), ("normaliser", "loss_type")):
        value = 0.1 if "eps" in one else "grpo"
        with raises(ConfigError, "conflict", "c.yml:", "loss."):
            load({"name": "policy", one: value, other: value})
        with raises(ConfigError, "conflict", "loss."):
            create_loss("policy", **{one: value, other: value})


def test_a_problem_with_an_alias_names_its_line(load, tmp_path):
    """The line that the user wrote, and not that of the section."""
    with pytest.raises(InvalidConfigError) as caught:
        load({"name": "policy", "eps_low": 7, "dual_clip": 3.0})
    lines = (tmp_path / "c.yml").read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if "eps_low" in line)
    assert reports(caught.value, "out-of-range", f"c.yml:{number}: loss.clip_eps_low: ")
    with raises(ConfigError, "out-of-range", "--overrides: loss.clip_eps_low: "):
        load({"name": "policy", "epsilon": 0.1}, "loss.eps_low=7")


def test_an_alias_belongs_to_its_loss(load):
    """`loss_type` is an option of pairwise and an alias of policy; the error names the losses that have an alias."""
    assert load({"name": "pairwise", "loss_type": "hinge"}) == {"name": "pairwise", "loss_type": "hinge"}
    with raises(ConfigError, "unknown-option", "loss.eps_low: ", "policy"):
        load({"name": "sft", "eps_low": 0.1})


def test_a_reference_to_an_alias(load):
    """`${loss.eps_low}` is the value as it is written."""
    found = load({"name": "policy", "eps_low": 0.1, "eps_high": "${loss.eps_low}"})
    assert found == {"name": "policy", "clip_eps_low": 0.1, "clip_eps_high": 0.1}


def test_a_run_that_was_saved_with_the_old_name_resumes(make_trainer, tmp_path):
    """Its config.yml has the name of 0.1.0; the same value under the new name is no change, another one is."""
    rows = tmp_path / "rollouts.jsonl"
    rows.write_text(
        '{"prompt": "a", "response": "b", "reward": 1}\n{"prompt": "a", "response": "c", "reward": 0}\n' * 8
    )
    settings = (f"datasets=[{rows}]", "loss={name: policy, clip_eps_low: 0.1}", "save_every_steps=1")
    trainer = make_trainer(*settings, "n_steps=1")
    trainer.train()
    saved = Path(trainer.run.path) / "config.yml"
    saved.write_text(re.sub("clip_eps_low", "eps_low", saved.read_text()))
    with raises(RunDirError, "other-run", "allow_changes=[loss]"):
        make_trainer(*settings, "loss.clip_eps_low=0.3", "n_steps=2").train()
    make_trainer(*settings, "n_steps=2").train()
    assert [row["step"] for row in metrics(trainer)] == [1, 2]


# ------------------------------------------------------------------------------------------------ of one's own


@dataclass
class Mine:
    scale: float = option(1.0, "Scale.", ge=0, lt=10, alias=("factor", "multiplier"))
    name_of_file: str = option("a", "File.", affects_results=False)


@dataclass
class Older:
    scale: float = option(1.0, "Scale.", least=0, below=10, alias=("factor", "multiplier"))
    name_of_file: str = option("a", "File.", free=True)


def test_the_words_of_0_1_0_in_a_plugin():
    """least, above, below, most and free mean ge, gt, lt, le and affects_results=False; what is no word is refused."""
    for key in ("scale", "name_of_file"):
        assert Mine.__dataclass_fields__[key].metadata == Older.__dataclass_fields__[key].metadata
    assert option(1, "", above=0, most=3).metadata == option(1, "", gt=0, le=3).metadata
    assert aliases(Mine) == {"factor": "scale", "multiplier": "scale"}
    with pytest.raises(TypeError, match="leest"):
        option(1, "", leest=0)


def test_options_without_metadata_have_no_aliases():
    """A dataclass of plain fields."""

    @dataclass
    class Plain:
        power: float = 1.0

    assert aliases(Plain) == {} and aliases(Config) and Loss


@pytest.mark.parametrize(
    "written, given", [("clip_eps_low", "epsilon"), ("eps_low", "epsilon"), ("epsilon", "clip_eps_low")]
)
def test_keywords_replace_an_option_under_any_of_its_names(rows_file, written, given):
    """`load_config(source, loss={...})` finds the option in the file as an override does."""
    source = {"datasets": str(rows_file), "model": {"name_or_path": "tiny"}, "loss": {"name": "policy", written: 0.1}}
    assert load_config(source, loss={given: 0.15}).loss["clip_eps_low"] == 0.15


def test_an_option_of_a_loss_keeps_a_name_that_is_an_alias_elsewhere(rows_file, own_registry):
    """`batch_size` stands for `total_batch_size` at the top level only."""

    @dataclass
    class Options:
        batch_size: int = option(1, "Of the loss.")

    register_loss("own", Options)(type("Own", (SFT,), {}))
    source = {"datasets": str(rows_file), "model": {"name_or_path": "tiny"}, "loss": {"name": "own", "batch_size": 3}}
    config = load_config(source | {"batch_size": 8})
    assert (config.loss["batch_size"], config.total_batch_size) == (3, 8)


def test_a_new_process_knows_the_names(tmp_path, rows_file):
    """The losses are imported when a config has options of one, so the command line accepts what this process does."""
    source = {"datasets": str(rows_file), "model": {"name_or_path": "tiny"}, "loss": {"name": "policy", "eps_low": 0.1}}
    (tmp_path / "c.yml").write_text(yaml.safe_dump(source))
    code = (
        "import sys; from minitrain import load_config; loss = load_config(sys.argv[1], ['loss.epsilon_high=0.3']).loss"
    )
    code += "; print(loss['clip_eps_low'], loss['clip_eps_high'])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "c.yml"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "0.1 0.3\n", done.stderr
