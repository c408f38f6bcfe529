"""Reading a config: what is accepted, what is told about the rest, and what is written down of it."""

import os
import sys
import warnings

import pytest
import yaml

from minitrain.config.saved import config_yaml
from minitrain.errors import ConfigError, InvalidConfigError
from minitrain.tools.preflight.load import load_config
from tests.messages import raises, reports


@pytest.fixture
def load(tmp_path, rows_file, monkeypatch):
    """``load("lr: 1", "seed=3")``: the config of a valid YAML file with these lines and overrides."""
    monkeypatch.chdir(tmp_path)

    def load(lines: str = "", *overrides: str, base: bool = True):
        head = f"datasets: {rows_file}\nmodel: {{name_or_path: tiny}}\n" if base else ""
        (tmp_path / "c.yml").write_text(head + lines)
        return load_config("c.yml", list(overrides))

    return load


def issues(load, *args, **kwargs) -> list[str]:
    """The lines of the error that these lines and overrides give."""
    with pytest.raises(ConfigError) as caught:
        load(*args, **kwargs)
    return [line.strip() for line in str(caught.value).splitlines()]


# ------------------------------------------------------------------------------------------- what is accepted


def test_short_forms(load, rows_file):
    """A path stands for a data set, a name for a loss, in the file as in the overrides."""
    assert [entry.path for entry in load().datasets] == [str(rows_file)]
    assert load("", f"datasets={{path: '{rows_file}', n_examples: 3}}").datasets[0].n_examples == 3
    assert load("loss: dft").loss == {"name": "dft"}
    assert load("loss: dft", "loss.dft_alpha=0.5").loss == {"name": "dft", "dft_alpha": 0.5}
    assert load("loss: {name: sft, label_smoothing: 0.1}", "loss=dft").loss == {"name": "dft"}


def test_loss_options_without_a_name_keep_the_default_loss(load):
    """Options of the default loss can be given without naming it."""
    assert load("", "loss.label_smoothing=0.1").loss == {"name": "sft", "label_smoothing": 0.1}


@pytest.mark.parametrize(
    "override, value",
    [("lr=1", 1.0), ("lr=1e-3", 1e-3), ("n_steps=1e3", 1000), ("packing=yes", True), ("exp_name=7", "7"),
     ("betas=[0.5,0]", [0.5, 0.0]), ("n_steps=null", None), ("optimizer_args={amsgrad: true}", {"amsgrad": True})],
)  # fmt: skip
def test_values_are_converted_where_nothing_is_lost(load, override, value):
    """Whole numbers are numbers, 1e3 is a whole number; and nothing warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = getattr(load("", override), override.partition("=")[0])
    assert found == value and type(found) is type(value)


def test_alias(load):
    """batch_size is total_batch_size, and either overrides the other."""
    assert load("batch_size: 4").total_batch_size == 4
    assert load("batch_size: 4", "total_batch_size=6").total_batch_size == 6
    assert load("total_batch_size: 4", "batch_size=6").total_batch_size == 6
    assert load("batch_size: 4\nseed: ${batch_size}").seed == 4


def test_an_override_replaces_its_rival(load):
    """n_steps of the file does not stand in the way of --overrides n_epochs, nor the other way round."""
    config = load("n_steps: 5", "n_epochs=2")
    assert (config.n_steps, config.n_epochs) == (None, 2.0)
    assert load("n_epochs: 5", "n_steps=2").n_steps == 2
    assert load("n_epochs: 5", "n_steps=null").n_epochs == 5.0
    assert reports(issues(load, "n_epochs: 5\nn_steps: 2")[1], "conflict", "n_epochs: ", "n_steps")
    assert reports(issues(load, "", "n_epochs=5", "n_steps=2")[1], "conflict", "n_epochs: ", "n_steps")


def test_a_dict_serves_as_a_file(rows_file):
    """load_config takes the keys as a dict too."""
    config = load_config({"datasets": [rows_file], "model": {"name_or_path": "tiny"}}, ["seed=3"])
    assert (config.seed, config.exp_name) == (3, "config")


# ---------------------------------------------------------------------------------------- environment variables


def test_environment_variables_are_used_but_never_written(load, monkeypatch, rows_file):
    """The saved config names the variable, also in lists, texts, short forms and aliases, and loads again."""
    for name, value in {"NAME": "s3cret", "LR": "0.25", "N": "4", "FLAG": "true", "DATA": str(rows_file)}.items():
        monkeypatch.setenv(name, value)
    lines = (
        "datasets: ['${oc.env:DATA}']\nmodel: {name_or_path: tiny}\nexp_name: run-${oc.env:NAME}\nlr: ${oc.env:LR}\n"
        "betas: ['${oc.env:LR}', 0.5]\nbatch_size: ${oc.env:N}\npacking: ${oc.env:FLAG}\n"
        "loss: {name: dft, dft_alpha: '${oc.env:LR}'}\nwandb: {project: '${oc.env:NAME}'}\n"
    )
    config = load(lines, base=False)
    assert (config.lr, config.total_batch_size, config.packing) == (0.25, 4, True)
    assert (config.betas, config.loss["dft_alpha"], config.exp_name) == ([0.25, 0.5], 0.25, "run-s3cret")
    text = config_yaml(config)
    assert "s3cret" not in text and "0.25" not in text and str(rows_file) not in text
    assert load(text, base=False) == config


def test_a_whole_section_from_elsewhere(load, monkeypatch, rows_file):
    """datasets may be one variable, eval_datasets another option."""
    monkeypatch.setenv("DATA", str(rows_file))
    lines = "datasets: ${oc.env:DATA}\neval_datasets: ${datasets}\nmodel: {name_or_path: tiny}\nloss: ${oc.env:X,dft}"
    config = load(lines, base=False)
    assert config.datasets == config.eval_datasets and config.loss == {"name": "dft"}
    assert yaml.safe_load(config_yaml(config))["eval_datasets"] == "${datasets}"


def test_the_saved_config_says_the_same(load):
    """What is written loads to an equal config."""
    config = load("lr: 1\nfreeze_layers: [0-1, embeddings]\nloss: {name: sft, focal_gamma: 2}")
    assert load(config_yaml(config), base=False) == config


@pytest.mark.parametrize("kind", ["custom_dataset", "huggingface_dataset"])
def test_a_type_that_says_nothing_about_rows(load, rows_file, kind):
    """That of the chat SFT/DPO trainer's own files: rows are recognized by their keys, as without it."""
    plain = f"eval_datasets: {rows_file}"
    typed = load(f"eval_datasets: [{{type: {kind}, path: {rows_file}}}]")
    assert typed.eval_datasets == load(plain).eval_datasets
    assert load(plain, f"eval_datasets[0].type={kind}").eval_datasets[0].type is None


def test_no_first_evaluation_without_evaluation_data(load):
    """It is what happens anyway."""
    assert not load("do_first_eval: false").do_first_eval


# ---------------------------------------------------------------------------------------- what is told, and where


def test_all_problems_at_once(load, wording):
    """Types, limits, unknown names, contradictions and missing files come in one list, sorted by line."""
    lines = "lr: fast\nbatch_size: 7\ngradient_accumulation_steps: 2\nlearning_rate: 1\nmodle: 3\nloss: sdt\n"
    with pytest.raises(InvalidConfigError) as caught:
        load(lines, "seed=-1", "resume=nowhere")
    wording(caught.value)
    assert [(issue.where, issue.key, issue.code) for issue in caught.value.issues] == [
        ("c.yml:3", "lr", "wrong-type"),
        ("c.yml:4", "total_batch_size", "conflict"),
        ("c.yml:6", "learning_rate", "unknown-option"),
        ("c.yml:7", "modle", "unknown-option"),
        ("c.yml:8", "loss.name", "not-a-choice"),
        ("--overrides", "seed", "out-of-range"),
        ("--overrides", "resume", "not-found"),
    ]


@pytest.mark.parametrize(
    "lines, overrides, told",
    [
        ("eval_dataset: x.jsonl\nsave_best: true", (), ["eval_dataset"]),  # not: nothing to evaluate on
        ("eval_datasets: 3\nsave_best: true", (), ["eval_datasets"]),
        ("total_batch_size: x\ngradient_accumulation_steps: 5", (), ["total_batch_size"]),
        ("gradient_accumulation_steps: 0\ntotal_batch_size: 7", (), ["gradient_accumulation_steps"]),
        ("on_bad_row: skp\nmax_bad_rows: 3", (), ["on_bad_row"]),
        ("optimizer: 3.5\noptimizer_args: {momentum: 0.9}", (), ["optimizer"]),
        ("eval_every_step: 3\nearly_stopping: {patience: 2}\nvalidation_split: 0.5", (), ["eval_every_step"]),
        ("lr: a\nlearning_rate: 3", (), ["lr", "learning_rate"]),  # both stand there
    ],
)
def test_no_false_alarms_follow_from_a_problem(load, lines, overrides, told):
    """A value that is wrong is told once; what only follows from it is not told."""
    assert [line.split(": ")[1] for line in issues(load, lines, *overrides)[1:]] == told


@pytest.mark.parametrize(
    "lines, overrides, place",
    [
        ("lr: x", (), "c.yml:3: lr"),
        ("lr: 1", ("lr=x",), "--overrides: lr"),
        (
            "eval_datasets:\n  - path: a\n    type: text",
            ("eval_datasets[0].weight=0",),
            "c.yml:4: eval_datasets[0].path",
        ),
        ("eval_datasets: [b]", ("eval_datasets=[a]",), "--overrides: eval_datasets[0].path"),
        ("eval_datasets: [b]", ("eval_datasets[0].path=a",), "--overrides: eval_datasets[0].path"),
        ("wandb:\n  enabled: 3", ("wandb.project=x",), "c.yml:4: wandb.enabled"),
        ("wandb:\n  enabled: 3", ("wandb={project: x}",), "c.yml:4: wandb.enabled"),
        ("", ("wandb={enabled: 3}",), "--overrides: wandb.enabled"),
        ("eval_generate: {show: 1}", ("lr=1",), "c.yml:3: eval_generate"),
        ("batch_size: x", (), "c.yml:3: total_batch_size"),
        ("x: &x {enabled: 3}\nwandb:\n  <<: *x", (), "c.yml:3: x.enabled"),
    ],
)
def test_the_place_is_exact(load, lines, overrides, place):
    """A problem is in the overrides only if it, a part of it or what holds it was overridden."""
    assert any(line.startswith(f"{place}: ") for line in issues(load, lines, *overrides)[1:])


@pytest.mark.parametrize(
    "key, meant",
    [
        ("learning_rate", "lr"), ("epochs", "n_epochs"), ("beta1", "betas"),
        ("attn_implementation", "model.attn_implementation"), ("model.dtype", "model.policy_dtype"),
        ("model.torch_dtype", "model.policy_dtype"), ("model.policy_dtyp", "model.policy_dtype"), ("model.lr", "lr"),
        ("patience", "early_stopping.patience"), ("entity", "wandb.entity"), ("eval_every_step", "eval_every_steps"),
        ("enabled", "wandb.enabled or swanlab.enabled"), ("loss.dft_alpa", "loss.dft_alpha"),
        ("loss.lr", "lr"), ("datasets[0].typ", "datasets[0].type"), ("wandb.foo", "enabled, entity, project"),
        ("master_dtyp", "model.master_dtype"), ("label_smoothing", "loss.label_smoothing"),
    ],
)  # fmt: skip
def test_unknown_names_get_a_hint(load, key, meant):
    """Other libraries' names and near names are recognised, below the top level and across sections too."""
    assert reports(issues(load, "loss: dft", f"{key}=1")[1], "unknown-option", f"--overrides: {key}: ", meant)


@pytest.mark.parametrize(
    "text, code, part",
    [
        ("lr: 1\nlr: 2\n", "invalid-yaml", "c.yml:2: "),
        ("model: {a: 1, a: 2}\n", "invalid-yaml", "c.yml:1: "),
        ("model:\n\tlr: 2\n", "invalid-yaml", "c.yml:2: "),
        ("- a\n- b\n", "invalid-yaml", "c.yml: "),
        ("just words\n", "invalid-yaml", "c.yml: "),
        ("lr: [1\n", "invalid-yaml", "c.yml:2: "),
        ("a: 1\n---\nb: 2\n", "invalid-yaml", "c.yml:2: "),
        ("lr: \0\n", "invalid-yaml", "c.yml: "),
        ("null: 1\n", "invalid-yaml", "c.yml: "),
        ("? [a]\n: 1\n", "invalid-yaml", "c.yml:1: "),
        ("lr: 1\nseed: '${oc.env:X'\n", "invalid-yaml", "c.yml:2: seed: "),
        ("lr: !!set {a}\n", "invalid-yaml", "c.yml:1: lr: "),
        ("x: &x [*x]\n", "too-large", "30 levels"),
        ("x: " + "[" * 40 + "]" * 40, "too-large", "c.yml: "),
        ("x: !!int y\n", "wrong-type", "c.yml:1: 'y'"),
        ("x: !!float y\n", "wrong-type", "c.yml:1: 'y'"),
        ("x: !!bool y\n", "wrong-type", "c.yml:1: 'y'"),
        ("x: !!timestamp y\n", "wrong-type", "c.yml:1: 'y'"),
        ("a: 1\nx: " + "1" * 5000, "too-large", "c.yml:2: 1111111111111111111111111111111111111... "),
        ("a: 1\nx: 0x" + "1" * 5000, "too-large", "c.yml:2: 0x11111111111111111111111111111111111... "),
        ("x: '" + "x" * (1 << 20) + "'", "too-large", "c.yml: "),
        ("", "missing-option", "model.name_or_path: "),
        ("model:\n", "wrong-type", "c.yml:1: model: "),
    ],
)
def test_files_that_are_no_config(load, wording, text, code, part):
    """What YAML or OmegaConf refuse is told in one line, with the line number."""
    err = "\n".join(issues(load, text, base=False))
    wording(err)
    assert reports(err, code, part)


@pytest.mark.parametrize("step", ["[{}]", "{{<<: [{}]}}"])
def test_alias_bombs_are_refused(load, step):
    """Aliases that grow ninefold at each level, as values or as merged keys, are not written out."""
    levels = [f"x{i + 1}: &x{i + 1} " + step.format(",".join([f"*x{i}"] * 9)) for i in range(9)]
    assert reports(issues(load, "\n".join(["x0: &x0 {a: 1}", *levels]), base=False)[0], "too-large", "10000")


def test_an_alias_bomb_as_a_key_is_refused(load):
    """It would be hashed value by value."""
    levels = [f"x{i + 1}: &x{i + 1} [" + ",".join([f"*x{i}"] * 9) + "]" for i in range(9)]
    text = "\n".join(["x0: &x0 [1]", *levels, "? *x9", ": 1"])
    assert reports(issues(load, text, base=False)[0], "too-large", "10000")
    assert reports(issues(load, "", "lr={? [[1]] : 2}")[1], "invalid-yaml", "lr: ")


@pytest.mark.parametrize(
    "step", ["${{{0}}}${{{0}}}", "{{x: '${{{0}}}', y: '${{{0}}}'}}", "${{oc.select:{0}}}${{oc.select:{0}}}"]
)
def test_references_that_multiply_are_refused(load, monkeypatch, step):
    """Each level is twice the one before: 2^40 references, as texts, as sections and through a resolver."""
    monkeypatch.setattr("minitrain.config.load.MAX_CALLS", 200_000)
    levels = [f"x{i + 1}: {step.format(f'x{i}')}" for i in range(40)]
    (told,) = issues(load, "\n".join(["x0: {a: 1}", *levels]), base=False)
    assert reports(told, "too-large", "c.yml: ", "${...}")
    assert sys.getprofile() is None


def test_a_hundred_problems_are_enough(load):
    """Each unknown option is compared with all others, so the time for thousands of them would have no bound."""
    lines = issues(load, "\n".join(f"k{i}: 1" for i in range(3000)))
    assert lines[0].startswith("100 ") and len(lines) == 101


def test_nothing_in_a_config_is_executed(load, tmp_path):
    """Tags that name Python objects are refused, in the file and in the overrides."""
    canary = tmp_path / "canary"
    attack = f"!!python/object/apply:os.system ['touch {canary}']"
    assert reports(issues(load, f"lr: {attack}")[0], "invalid-yaml", "c.yml:3: ")
    assert reports(issues(load, "", f"lr={attack}")[1], "invalid-value", "lr: ")
    assert not canary.exists()


@pytest.mark.parametrize(
    "lines, about",
    [
        ("lr: ${oc.env:NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE"),
        ("lr: ${nowhere}", "nowhere"),
        ("lr: ${lr}", "lr"),
        ("loss: {name: '${loss}'}", "loss"),
        ("lr: ${python:1}", "python"),
    ],
)
def test_interpolations_that_fail(load, lines, about):
    """They are told like any other problem, with their line and beside the others."""
    found = issues(load, f"{lines}\nseed: x")
    assert reports(found[1], "invalid-reference", "c.yml:3: ", about)
    assert reports(found[2], "wrong-type", "c.yml:4: seed: ", "'x'")


@pytest.mark.parametrize("override", ["lr", "=5", "a..b=1", ".x=1", "model.=1", "a[=1", "lr 1", ""])
def test_overrides_that_are_no_dotlist(load, override):
    """They are told with the form that was expected."""
    assert reports(issues(load, "", override)[1], "usage", f"--overrides: {override}: ")


def test_exp_name_is_the_stem_of_the_file_by_default(load, tmp_path):
    """Letters stay as they are, so that a run is found again."""
    assert load().exp_name == "c"
    (tmp_path / "Qwen-SFT.yml").write_text((tmp_path / "c.yml").read_text())
    assert load_config("Qwen-SFT.yml").exp_name == "Qwen-SFT"


@pytest.mark.parametrize("name", ["a/b", "..", ".", "a\\b", "/x"])
def test_exp_name_is_the_name_of_one_folder(load, name):
    """A run can be written nowhere but into output_dir."""
    assert reports(issues(load, f"exp_name: '{name}'")[1], "invalid-value", "exp_name: ")


@pytest.mark.parametrize(
    "lines, key",
    [
        ("freeze_layers: [9-0]", "freeze_layers"),
        ('cache_dir: "a\\0b"', "cache_dir"),
        ('output_dir: "\\0"', "output_dir"),
        ('chat_template: "\\0"', "chat_template"),
    ],
)
def test_values_that_would_fail_late(load, wording, lines, key):
    """They are refused with their line, before anything is loaded."""
    line = issues(load, lines)[1]
    wording(line)
    assert reports(line, "invalid-value", f"c.yml:3: {key}: ")


def test_a_pipe_is_no_config(tmp_path):
    """It is refused at once, where reading it would wait for ever."""
    os.mkfifo(tmp_path / "c.yml")
    with raises(ConfigError, "wrong-path", "c.yml"):
        load_config(tmp_path / "c.yml")


def test_a_loss_that_is_a_number_is_refused_beside_other_overrides():
    """`loss=2` after `loss.name=sft`, and more overrides after it, was a traceback."""
    config = {"model": {"name_or_path": "tiny"}, "datasets": ["a.jsonl"]}
    with raises(ConfigError, "wrong-type", "loss"):
        load_config(config, ["loss.name=sft", "loss=2", "max_bad_rows=1"])
