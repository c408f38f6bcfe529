"""The schema: every option is used, explained, within its own limits, and every example passes."""

import ast
import copy
import math
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest

from minitrain.config import issues, schema
from minitrain.errors import ConfigError
from minitrain.losses import registered
from minitrain.losses.dpo import VARIANTS
from minitrain.tools.preflight.load import load_config
from tests.messages import raises
from tests.rows import REQUIRED

ROOT = Path(__file__).parents[2]
OPTION_CLASSES = [
    *(c for c in vars(schema).values() if is_dataclass(c)),
    *(loss.options_class for loss in registered().values()),
]


def test_every_option_is_read_by_the_code():
    """Each key is accessed as an attribute somewhere outside of the schema."""
    accessed = set()
    for file in (ROOT / "minitrain").rglob("*.py"):
        if file.name not in ("schema.py", "sections.py"):
            accessed |= {n.attr for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)}
    unread = [f"{c.__name__}.{f.name}" for c in OPTION_CLASSES for f in fields(c) if f.name not in accessed]
    assert unread == []


def test_every_option_is_explained_and_its_default_allowed():
    """Each has a help text, and a default that passes the check of its own limits."""
    for f in (f for c in OPTION_CLASSES for f in schema.option_fields(c)):
        assert f.metadata["help"].endswith("."), f.name
        if f.default is not MISSING:
            issues.check_limits(f.metadata, f.default)


def numbers(options_class, path=""):
    """The keys of all options that are numbers, those in sections and lists of sections, too."""
    hints = typing.get_type_hints(options_class)
    for f in schema.option_fields(options_class):
        kinds = {*(typing.get_args(hints[f.name]) or [hints[f.name]])} - {type(None)}
        inner = next((kind for kind in kinds if is_dataclass(kind)), None)
        is_list = typing.get_origin(hints[f.name]) is list
        if inner is not None:
            yield from numbers(inner, f"{path}{f.name}{'[0]' * is_list}.")
        elif kinds <= {int, float} and not is_list:
            yield f"{path}{f.name}"


NUMBERS = [
    *numbers(schema.Config),
    *(f"{name}:{key}" for name, loss in registered().items() for key in numbers(loss.options_class, "loss.")),
]
ZERO = {  # what 0 means; all other options refuse it, but for those of losses, whose formulas decide
    "seed": "a seed like others",
    "datasets[0].seed": "a seed like others",
    "eval_datasets[0].seed": "a seed like others",
    "retention_datasets[0].seed": "a seed like others",
    "datasets[0].p_oracle": "no example keeps the oracle",
    "eval_datasets[0].p_oracle": "no example keeps the oracle",
    "retention_datasets[0].p_oracle": "no example keeps the oracle",
    "datasets[0].n_distractors": "no distractors",
    "eval_datasets[0].n_distractors": "no distractors",
    "retention_datasets[0].n_distractors": "no distractors",
    "validation_split": "nothing is held out",
    "model.router_aux_loss_coef": "no auxiliary loss",
    "max_bad_rows": "no bad row may be skipped",
    "lora.rank": "without LoRA",
    "lora.dropout": "no dropout",
    "soft_prompt.num_virtual_tokens": "without a soft prompt",
    "rollout.num_generations": "trains on data files",
    "rollout.top_k": "all tokens",
    "lr": "a run that trains nothing, to look at its metrics",
    "weight_decay": "no decay",
    "max_grad_norm": "no clipping",
    "warmup_steps": "no warm-up",
    "warmup_ratio": "no warm-up",
    "eval_every_steps": "only at the end",
    "eval_generate.n_examples": "no answers",
    "eval_generate.show": "no answer is printed",
    "early_stopping.patience": "never early",
    "early_stopping.threshold": "any improvement counts",
    "save_every_steps": "no checkpoints",
    "save_models_every_steps": "no models on the way",
}
BESIDE = {  # what an option needs, so as not to be ignored
    "max_bad_rows": {"on_bad_row": "skip"},
    "eval_generate": {"eval_generate": {"n_examples": 1}},
    "dpo:loss.gamma": {"loss": {"variant": "simpo"}},
    "dpo:loss.alpha": {"loss": {"variant": "cpo"}},
    "kd:loss.jsd_weight": {"loss": {"divergence": "jsd"}},
    "policy:loss.gamma": {"loss": {"advantages": "gae", "vf_coef": 0.1}},
    "policy:loss.gae_lambda": {"loss": {"advantages": "gae", "vf_coef": 0.1}},
}
BESIDE |= {f"{name}:": {"loss": options} for name, options in REQUIRED.items()}


def complaint(key: str, value, rows_file) -> str:
    """What is wrong with a config whose option `key` has this value."""
    loss, _, path = key.rpartition(":")
    lists = ["datasets", "eval_datasets", *["retention_datasets"] * path.startswith("retention_datasets")]
    data = {name: [{"path": str(rows_file)}] for name in lists}
    config = data | {"model": {"name_or_path": "tiny"}, "loss": {"name": loss or "sft"}}
    if path == "validation_split":
        config.pop("eval_datasets")
    for beginning, more in copy.deepcopy(BESIDE).items():
        if key.startswith(beginning):
            config |= {name: config.get(name, {}) | part if name == "loss" else part for name, part in more.items()}
    *parents, last = path.replace("[0]", "").split(".")
    section = config
    for parent in parents:
        section = section.setdefault(parent, {})
        section = section[0] if isinstance(section, list) else section
    section[last] = value
    try:
        load_config(config)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_that_mean_nothing_are_refused(key, rows_file):
    """None is accepted to fail late or to do nothing: nan, inf, below 0, huge, 0 in float32 only, and mostly 0."""
    path = key.rpartition(":")[2]
    for value in (math.nan, math.inf, -math.inf, -1, 1e30, 10**30, 1e-300):
        assert f"config: {path}: " in complaint(key, value, rows_file), value
    told = complaint(key, 0, rows_file)
    accepted = told == "" if key in ZERO else f"config: {path}: " in told
    assert accepted or (":" in key and told == ""), told


def test_what_zero_means_is_said_of_options_that_are_there():
    """The list above names no other ones."""
    assert ZERO.keys() <= set(NUMBERS)


def test_a_loss_that_is_a_variant_of_another():
    """`loss: ipo`, as others have it, names the family."""
    for variant in VARIANTS:
        with raises(ConfigError, "not-a-choice", f"loss.name=dpo loss.variant={variant}"):
            load_config({"model": {"name_or_path": "tiny"}, "loss": variant})


@pytest.mark.parametrize("example", sorted((ROOT / "example").rglob("*.yml")), ids=lambda path: path.name)
def test_every_example_passes(example, monkeypatch):
    """Each config under example/ is free of problems, seen from the root of the project."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TEACHER", "tiny")  # in the place of the one that another example leaves
    monkeypatch.setenv("POLICY", "tiny")
    load_config(example)
