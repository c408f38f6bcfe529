"""Options without an effect are refused where they are written at their default, and the config of a run loads."""

from pathlib import Path

import pytest
import yaml

from minitrain.config.saved import config_yaml
from minitrain.config.schema import Config, aliases, option_fields
from minitrain.errors import InvalidConfigError
from minitrain.tools.preflight.load import SHARE_OF_A_RUN, check_python_config, load_config, written_options

DEFAULTS = {f.name: f.default for f in option_fields(Config)}


@pytest.fixture
def base(rows_file):
    return {"datasets": str(rows_file), "model": {"name_or_path": "tiny"}}


def refused(source, *overrides: str) -> list[tuple[str, str]]:
    """(key, file or --overrides) of each problem."""
    with pytest.raises(InvalidConfigError) as caught:
        load_config(source, list(overrides))
    return [(issue.key, issue.where) for issue in caught.value.issues]


WITHOUT_EFFECT = [
    ("betas", {"optimizer": "SGD", "betas": [0.9, 0.999]}),
    ("eps", {"optimizer": "SGD", "eps": DEFAULTS["eps"]}),
    ("max_bad_rows", {"max_bad_rows": DEFAULTS["max_bad_rows"]}),
    ("eval_batch_size", {"eval_batch_size": DEFAULTS["eval_batch_size"]}),
    ("n_epochs", {"n_steps": 2, "n_epochs": DEFAULTS["n_epochs"]}),
    ("truncation", {"loss": "value", "truncation": DEFAULTS["truncation"]}),
    ("chat_template", {"loss": "classify", "chat_template": DEFAULTS["chat_template"]}),
    ("train_on", {"loss": "classify", "train_on": DEFAULTS["train_on"]}),
    ("lora", {"lora": {"init": "default"}}),
    ("soft_prompt", {"soft_prompt": {"method": "prompt"}}),
    ("early_stopping", {"validation_split": 2, "early_stopping": {"metric": "loss"}}),
    ("eval_generate", {"validation_split": 2, "eval_generate": {"match": "text"}}),
    ("fsdp", {"fsdp": {"shard": "full"}}),
]


@pytest.mark.parametrize(("key", "options"), WITHOUT_EFFECT, ids=[key for key, _ in WITHOUT_EFFECT])
def test_an_option_at_its_default_that_has_no_effect(base, key, options):
    """It is refused in a file as in the overrides, as with any other value."""
    assert refused(base | options) == [(key, "config")]
    without = {name: value for name, value in options.items() if name != key}
    value = yaml.safe_dump(options[key], default_flow_style=True).removesuffix("...\n").strip()
    if key != "n_epochs":  # which takes the place of the file's n_steps
        assert refused(base | without, f"{key}={value}") == [(key, "--overrides")]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "SGD", "weight_decay": 0},
        {"packing": True, "group_by_length": False},
        {"n_steps": 2, "n_epochs": "${oc.env:NO_SUCH_NUMBER,1}"},
        {"warmup_steps": 2, "n_steps": 9, "warmup_ratio": 0.0},
        {"validation_split": 0, "eval_every_steps": 0, "n_eval_examples": None, "save_best": False},
        {"lora": {"rank": 0}},
        {"lora": {"rank": 0, "init": "default"}},
        {"lora": {}},
        {"early_stopping": {"patience": 0, "metric": "loss"}},
        {"eval_generate": {"n_examples": 0}},
        {"soft_prompt": {"num_virtual_tokens": 0, "method": "prompt"}},
        {"fsdp": {"cpu_offload": False}},
    ],
    ids=str,
)
def test_what_is_written_as_off_is_fine(base, options):
    """It says what happens anyway."""
    assert load_config(base | options) == load_config(base | options)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_the_config_of_a_run_loads(base, optimizer, tmp_path):
    """It lists each option with its default, those without an effect in this run, too; a few may have come later."""
    config = load_config(base | {"optimizer": optimizer, "n_steps": 2, "exp_name": "a"})
    file = tmp_path / "config.yml"
    file.write_text(config_yaml(config))
    assert load_config(file) == config
    assert load_config(file, ["n_epochs=1"]).n_steps is None
    older = yaml.safe_load(file.read_text())
    for name in list(older)[-12:]:
        del older[name]
    assert load_config(older).optimizer == optimizer


def test_an_override_of_the_config_of_a_run_counts(base, tmp_path):
    """The file lists betas because it lists all; the user asks for them."""
    file = tmp_path / "config.yml"
    file.write_text(config_yaml(load_config(base | {"optimizer": "SGD"})))
    assert refused(file, "betas=[0.9,0.999]") == [("betas", "--overrides")]


def test_what_is_changed_in_python_counts_only_where_it_differs(base):
    """A default has no mark there that says whether anybody wrote it, and what a file has can be taken back."""
    config = load_config(base | {"n_epochs": 1.0})
    config.n_steps, config.optimizer = 2, "SGD"
    assert check_python_config(config).n_steps == 2


def test_the_examples_are_no_configs_of_runs():
    """None lists nearly all options, so what it lists counts."""
    for file in Path(__file__).parents[2].joinpath("example").glob("*.yml"):
        raw = yaml.safe_load(file.read_text())
        names = {aliases().get(name, name) for name in raw}
        assert len(names) < SHARE_OF_A_RUN / 1.3 * len(option_fields(Config))
        assert "datasets" in written_options(raw, set())
