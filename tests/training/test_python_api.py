"""What is given to `Trainer` in Python: rows, a model, an optimizer, callbacks; and what is refused."""

import dataclasses
import gc
import inspect
import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import minitrain
from minitrain import (
    Config,
    ConfigError,
    DataError,
    Loss,
    MinitrainError,
    RunDirError,
    Sampling,
    Trainer,
    create_loss,
    load_config,
    load_generator,
    merge_adapters,
    register_loss,
)
from minitrain.cli.main import main
from minitrain.config.sections import LoRAConfig
from minitrain.tools.preflight.validate import validate
from tests.conftest import weights
from tests.messages import raises, reports


@pytest.fixture
def options(tmp_path, llama_folder):
    """A config without data."""
    return {
        "model": {"name_or_path": str(llama_folder)},
        "output_dir": str(tmp_path / "runs"),
        "exp_name": "run",
        "total_batch_size": 8,
        "n_steps": 2,
        "lr": 1e-2,
        "log_every_steps": 1,
    }


@pytest.fixture
def rows(rows_file):
    return [json.loads(line) for line in rows_file.read_text().splitlines()]


def equal(a: Trainer, b: Trainer) -> bool:
    ours, theirs = weights(a), weights(b)
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_rows_train_as_the_same_rows_in_a_file(options, rows, rows_file):
    """A list, a datasets.Dataset and any collection with a length give the weights of the file, to the last bit."""
    from datasets import Dataset

    file = Trainer(options | {"datasets": [str(rows_file)], "exp_name": "file"})
    file.train()
    for i, given in enumerate((rows, Dataset.from_list(rows), tuple(rows))):
        trainer = Trainer(options | {"exp_name": f"rows-{i}"}, train_dataset=given, eval_dataset=rows[:8])
        assert trainer.train()["loss"] == pytest.approx(trainer.evaluate(rows[:8])["loss"])
        assert equal(trainer, file)


def test_a_bad_row_is_named_by_its_index(options, rows):
    """As a file's line is."""
    rows[3] = {"prompt": "no response"}
    with raises(DataError, "invalid-row", "train_dataset[3]: "):
        Trainer(options, train_dataset=rows)
    rows[3] = {"prompt": "x", "response": object()}
    with raises(DataError, "invalid-json", "train_dataset[3]: "):
        Trainer(options, train_dataset=rows)
    rows[3] = ["x", "y"]
    with raises(DataError, "invalid-row", "train_dataset[3]: ") as caught:
        Trainer(options, train_dataset=rows)
    assert ".json" not in str(caught.value)


def test_rows_are_part_of_the_run(options, rows, capsys):
    """config.yml and the model card name them; other rows do not resume the run, equal ones do."""
    trainer = Trainer(options | {"save_every_steps": 1}, train_dataset=rows)
    trainer.train()
    saved = yaml.safe_load((trainer.run.path / "config.yml").read_text())["datasets"][0]["path"]
    assert saved.startswith("<python: train_dataset, list of 40 rows, sha256 ")
    assert saved in (trainer.run.final / "README.md").read_text()
    longer = options | {"save_every_steps": 1, "n_steps": 3}
    with raises(RunDirError, "other-run", "datasets"):
        Trainer(longer, train_dataset=rows[:20])
    again = Trainer(longer, train_dataset=[dict(row) for row in rows])
    again.train()
    assert again.step == 3 and "resuming from" in capsys.readouterr().out
    del trainer, again
    gc.collect()
    assert main(["train", f"{options['output_dir']}/run/config.yml"]) == 2
    assert reports(capsys.readouterr().err, "not-found", "datasets[0].path: ")


def test_a_model_is_trained_itself(options, rows, llama_folder):
    """The very object; as the same model from its folder, to the last bit. Another one does not resume the run."""
    file = Trainer(options | {"exp_name": "file"}, train_dataset=rows)
    file.train()
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    bare = {key: value for key, value in options.items() if key != "model"} | {"save_every_steps": 1}
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    trainer = Trainer(bare, model=model, tokenizer=tokenizer, train_dataset=rows)
    trainer.train()
    assert trainer.policy.model is model and equal(trainer, file)
    saved = yaml.safe_load((trainer.run.path / "config.yml").read_text())["model"]
    assert saved["name_or_path"].startswith("<python: model LlamaForCausalLM, sha256 ")
    with raises(RunDirError, "other-run", "model.name_or_path"):
        Trainer(bare | {"n_steps": 3}, model=model, tokenizer=tokenizer, train_dataset=rows)
    same = AutoModelForCausalLM.from_pretrained(llama_folder)
    again = Trainer(bare | {"n_steps": 3}, model=same, tokenizer=tokenizer, train_dataset=rows)
    again.train()
    assert again.step == 3
    with raises(ConfigError, "conflict", "loss.reference"):
        pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8
        Trainer(bare | {"loss": "dpo", "exp_name": "dpo"}, model=same, tokenizer=tokenizer, train_dataset=pairs)


def test_validate_leaves_a_model_from_python_alone(options, rows, llama_folder):
    """It builds one of the same config without weights."""
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    del options["model"]
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    trainer = Trainer(options, model=model, tokenizer=tokenizer, train_dataset=rows)
    before = dict(model.named_parameters())
    validate(dataclasses.replace(trainer.config, lora=LoRAConfig(rank=2)))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in after)
    assert all(parameter.requires_grad for parameter in after.values())


@pytest.mark.parametrize(
    "more",
    [
        {"lora": {"rank": 4}},
        {"lora": {"rank": 4}, "packing": True, "activation_checkpointing": True},
        {"lora": {"rank": 4}, "model": {"quantization": "4bit", "policy_dtype": "bfloat16"}},
        {"freeze_layers": [0]},
    ],
    ids=["lora", "packing", "quantized", "frozen"],
)
def test_a_model_from_python_with_other_options(options, rows, llama_folder, more):
    """As the same model from its folder, to the last bit."""
    if "quantization" in more.get("model", {}):
        pytest.importorskip("bitsandbytes")
    model = more.get("model", {})
    file = Trainer(options | more | {"exp_name": "file", "model": options["model"] | model}, train_dataset=rows)
    given = {"model": AutoModelForCausalLM.from_pretrained(llama_folder)}
    given["tokenizer"] = AutoTokenizer.from_pretrained(llama_folder)
    trainer = Trainer(options | more | {"model": model}, train_dataset=rows, **given)
    for each in (file, trainer):
        each.train()
    assert trainer.policy.model is given["model"] and equal(trainer, file)


def test_a_model_from_python_is_checked_as_others_are(options, rows, llama_folder):
    """Quantization without an adapter; the message names the config, where the option is."""
    given = {"model": AutoModelForCausalLM.from_pretrained(llama_folder)}
    given["tokenizer"] = AutoTokenizer.from_pretrained(llama_folder)
    with pytest.raises(ConfigError, match=r"config: model\.quantization: "):
        Trainer(options | {"model": {"quantization": "4bit"}}, train_dataset=rows, **given)


def test_problems_next_to_a_loss_object_are_reported_at_once(options, rows):
    """Wrong types and conflicts in one error, as without one."""
    wrong = options | {"lr": "x", "warmup_steps": 1, "warmup_ratio": 0.5}
    with pytest.raises(ConfigError) as caught:
        Trainer(wrong, train_dataset=rows, loss=create_loss("sft", label_smoothing=0.1))
    assert {"lr", "warmup_ratio"} <= {issue.key for issue in caught.value.issues}


def test_ctrl_c_in_an_interpreter_returns_to_the_prompt(options, rows, capsys):
    """With a checkpoint, without a traceback; `train` again goes on, in the same trainer and in a new one."""
    interrupt = {"on_step_end": lambda t: t.step == 1 and signal.raise_signal(signal.SIGINT)}
    trainer = Trainer(options | {"n_steps": 3}, train_dataset=rows, **interrupt)
    assert trainer.train() == {}
    assert trainer.step == 1 and trainer.signal == signal.SIGINT and "SIGINT" in capsys.readouterr().out
    trainer.train()
    assert trainer.step == 3 and trainer.signal is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Trainer(options | {"n_steps": 3}, train_dataset=rows).train() == {}


def test_what_an_interpreter_shows(options, rows):
    """One line for each; a config shows what is not the default, and its help() explains each option."""
    trainer = Trainer(options | {"lora": {"rank": 4}}, train_dataset=rows)
    assert repr(trainer) == "<Trainer 'run': LlamaForCausalLM, loss sft, step 0 of 2>"
    assert "lora=LoRAConfig(rank=4), total_batch_size=8, n_steps=2" in repr(trainer.config) and "seed" not in repr(
        trainer.config
    )
    _, batches = next(iter(trainer.train_loader.steps()))
    shown = [repr(trainer.generator), repr(batches[0]), repr(trainer.forward_backward(batches))]
    assert all(len(line) < 100 and line.startswith("<") for line in shown)
    assert "\n    lr: Peak learning rate" in inspect.getdoc(Config)
    assert "TYPE_CHECKING" not in dir(minitrain) and "import_module" not in dir(minitrain)


def test_a_loss_can_be_defined_again(own_registry):
    """As a cell of a notebook does when it is run twice; another class of the same name is refused."""

    def define(name="Mine", parent=Loss, options=Sampling):
        return register_loss("mine", options)(type(name, (parent,), {}))

    define()
    again = define()
    assert type(create_loss("mine")) is again
    with pytest.raises(ConfigError, match="already-exists"):
        define("Other")
    with pytest.raises(ConfigError, match=r"register_loss.*wrong-type"):
        define(options=dict)
    with pytest.raises(ConfigError, match=r"register_loss.*wrong-type"):
        define(parent=object)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: t.generate([{"role": "user", "content": "a"}]), "prompts[0]: expected a string or a list"),
        (lambda t: t.generate(["a"], {"max_new_tokens": 3}), "sampling: expected a Sampling"),
        (lambda t: Sampling(temperature=-1), "temperature: must be 0 or more"),
        (lambda t: Sampling(stop=["\n", ""]), "stop: has an empty string"),
        (lambda t: t.forward_backward(next(iter(t.train_loader.steps()))[1][0]), "batches: expected a list"),
        (lambda t: load_config(t.config), "Change it with dataclasses.replace"),
        (lambda t: load_generator("tiny", device="gpu"), "device: "),
        (lambda t: merge_adapters("a", "b"), "sources: expected a list"),
        (lambda t: merge_adapters(["a"], "b", [1, 2]), "weights: "),
        (lambda t: merge_adapters(["a"], "b", dtype="int8"), "dtype: expected one of"),
    ],
)
def test_wrong_calls_are_reported(options, rows, call, message):
    """Those of methods and functions, too."""
    with pytest.raises(ConfigError) as caught:
        call(Trainer(options, train_dataset=rows))
    assert message in str(caught.value)


def test_an_optimizer_from_python(options, rows):
    """It trains as the same one by name; its groups keep their own peaks, and config.yml names the function."""
    by_name = Trainer(options | {"optimizer": "SGD", "exp_name": "name"}, train_dataset=rows)
    by_name.train()

    def make(parameters):
        return torch.optim.SGD(parameters, lr=1e-2)

    trainer = Trainer(options, train_dataset=rows, optimizer=make)
    trainer.train()
    assert equal(trainer, by_name)
    assert "test_an_optimizer_from_python" in trainer.config.optimizer
    two = Trainer(
        options | {"exp_name": "two"},
        train_dataset=rows,
        optimizer=lambda p: torch.optim.SGD([{"params": p[:1], "lr": 1e-3}, {"params": p[1:], "lr": 1e-1}]),
    )
    two.train()
    small, large = (group["lr"] for group in two.optimizer.param_groups)
    assert large == pytest.approx(100 * small)


def test_several_hooks_and_objects_are_called_in_order(options, rows):
    """Objects with methods first, then the functions of a keyword in their order."""
    calls = []

    class Callback:
        def on_step_end(self, trainer):
            calls.append(f"object {trainer.step}")

    functions = [lambda t: calls.append(f"first {t.step}"), lambda t: calls.append(f"second {t.step}")]
    Trainer(options | {"n_steps": 1}, train_dataset=rows, callbacks=[Callback()], on_step_end=functions).train()
    assert calls == ["object 1", "first 1", "second 1"]


class Misspelt:
    def on_step_ended(self, trainer):
        """Would never be called."""


@pytest.mark.parametrize(
    "arguments, code, part",
    [
        ({"train_dataset": "a.jsonl"}, "wrong-type", "train_dataset: "),
        ({"train_dataset": (row for row in [])}, "wrong-type", "train_dataset: "),
        ({"train_dataset": []}, "no-data", "train_dataset: "),
        ({"train_dataset": {"prompt": ["a"]}}, "wrong-type", "train_dataset: "),
        ({"train_datasets": []}, "not-a-choice", "'train_datasets'"),
        ({"lr": 3}, "not-a-choice", "load_config(..., lr=...)"),
        ({"processing_class": 3}, "not-a-choice", "Use tokenizer."),
        ({"model": AutoModelForCausalLM}, "wrong-type", "class AutoModelForCausalLM"),
        ({"on_step_ended": print}, "not-a-choice", "'on_step_ended'"),
        ({"on_step_end": 3}, "wrong-type", "on_step_end: "),
        ({"callbacks": Misspelt()}, "wrong-type", "callbacks: "),
        ({"callbacks": [Misspelt]}, "wrong-type", "callbacks: "),
        ({"callbacks": [Misspelt()]}, "usage", "Misspelt.on_step_ended"),
        ({"callbacks": [3]}, "wrong-type", "callbacks: "),
        ({"model": "tiny"}, "wrong-type", "model: "),
        ({"model": torch.nn.Linear(1, 1)}, "wrong-type", "model: "),
        ({"tokenizer": "tiny"}, "wrong-type", "tokenizer: "),
        ({"loss": 3}, "wrong-type", "loss: "),
        ({"optimizer": "SGD"}, "wrong-type", "optimizer: "),
        ({"optimizer": lambda parameters: 3}, "wrong-type", "optimizer: "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_reported(options, rows, arguments, code, part):
    """By name, with what to give instead."""
    with raises(MinitrainError, code, part):
        Trainer(options, **({"train_dataset": rows} | arguments))


def test_data_in_the_config_and_in_python_conflict(options, rows, rows_file):
    """Nothing that was written is ignored."""
    with raises(ConfigError, "conflict", "datasets: "):
        Trainer(options | {"datasets": [str(rows_file)]}, train_dataset=rows)


def test_load_config_takes_keywords(options, rows_file, tmp_path):
    """They override the file, merge into sections, and are checked."""
    file = tmp_path / "c.yml"
    file.write_text(yaml.safe_dump(options | {"datasets": str(rows_file), "lora": {"rank": 4, "alpha": 3}}))
    config = load_config(file, lr=0.5, batch_size=4, lora={"rank": 8})
    assert (config.lr, config.total_batch_size) == (0.5, 4) and (config.lora.rank, config.lora.alpha) == (8, 3)
    with raises(ConfigError, "wrong-type", "load_config(...): lr: "):
        load_config(file, lr="x")
    with raises(ConfigError, "unknown-option", "learning_rate: "):
        load_config(file, learning_rate=1.0)
    with raises(ConfigError, "wrong-type", "overrides: "):
        load_config(file, "lr=1")
    assert Trainer(file).config == load_config(file, model={"policy_dtype": "float32"})  # auto, resolved


def test_a_model_is_saved_where_it_is_asked_for(options, rows, tmp_path):
    """`from_pretrained` reads it; a folder of other files is not replaced."""
    trainer = Trainer(options, train_dataset=rows)
    trainer.save_model(tmp_path / "model")
    trainer.save_model(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with raises(ConfigError, "already-exists", "other"):
        trainer.save_model(tmp_path / "other")
    assert trainer.generate(["say 1"], Sampling(4)) == trainer.predict(["say 1"], 4)
    with raises(ConfigError, "wrong-type", "prompts: "):
        trainer.generate("say 1")


def test_names_can_be_found():
    """`dir`, and so tab completion, knows all public names; type checkers see them in `TYPE_CHECKING`."""
    assert set(minitrain.__all__) <= set(dir(minitrain))
    source = inspect.getsource(minitrain)
    for name in minitrain.__all__:
        assert getattr(minitrain, name).__doc__ and f" {name} as {name}\n" in source
    assert Path(minitrain.__file__).with_name("py.typed").exists()
    named = inspect.signature(Trainer).parameters
    assert list(named)[1:9] == [
        "model", "tokenizer", "train_dataset", "eval_dataset", "loss", "optimizer", "callbacks", "hooks"
    ]  # fmt: skip
    assert dataclasses.is_dataclass(Sampling)
