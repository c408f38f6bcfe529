"""What is given to `Trainer` in Python: rows, a model, an optimizer, callbacks; and what is refused."""

import dataclasses
import gc
import inspect
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import minitrain
from minitrain import ConfigError, DataError, RunDirError, Sampling, Trainer, load_config
from minitrain.cli.main import main
from minitrain.config.schema import LoRAConfig
from minitrain.tools.preflight.validate import validate
from tests.conftest import weights


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
    with pytest.raises(DataError, match=r"train_dataset\[3\]: "):
        Trainer(options, train_dataset=rows)
    rows[3] = {"prompt": "x", "response": object()}
    with pytest.raises(DataError, match=r"train_dataset\[3\]: not usable as JSON"):
        Trainer(options, train_dataset=rows)


def test_rows_are_part_of_the_run(options, rows, capsys):
    """config.yml and the model card name them; other rows do not resume the run, equal ones do."""
    trainer = Trainer(options | {"save_every_steps": 1}, train_dataset=rows)
    trainer.train()
    saved = yaml.safe_load((trainer.run.path / "config.yml").read_text())["datasets"][0]["path"]
    assert saved.startswith("<python: train_dataset, list of 40 rows, sha256 ")
    assert saved in (trainer.run.final / "README.md").read_text()
    longer = options | {"save_every_steps": 1, "n_steps": 3}
    with pytest.raises(RunDirError, match="datasets"):
        Trainer(longer, train_dataset=rows[:20])
    again = Trainer(longer, train_dataset=[dict(row) for row in rows])
    again.train()
    assert again.step == 3 and "going on from" in capsys.readouterr().out
    del trainer, again
    gc.collect()
    assert main(["train", f"{options['output_dir']}/run/config.yml"]) == 2
    assert "rows that were given in Python" in capsys.readouterr().err


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
    with pytest.raises(RunDirError, match=r"model\.name_or_path"):
        Trainer(bare | {"n_steps": 3}, model=model, tokenizer=tokenizer, train_dataset=rows)
    same = AutoModelForCausalLM.from_pretrained(llama_folder)
    again = Trainer(bare | {"n_steps": 3}, model=same, tokenizer=tokenizer, train_dataset=rows)
    again.train()
    assert again.step == 3
    with pytest.raises(ConfigError, match=r"loss\.reference"):
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
    "arguments, message",
    [
        ({"train_dataset": "a.jsonl"}, "train_dataset: expected rows, got 'a.jsonl'"),
        ({"train_dataset": (row for row in [])}, "train_dataset: expected rows, got generator"),
        ({"train_dataset": []}, "train_dataset: has no rows"),
        ({"train_dataset": {"prompt": ["a"]}}, "train_dataset: expected rows, got dict"),
        ({"train_datasets": []}, "unexpected argument 'train_datasets'. Did you mean train_dataset"),
        ({"on_step_ended": print}, "unexpected argument 'on_step_ended'."),
        ({"on_step_end": 3}, "on_step_end: expected a function"),
        ({"callbacks": Misspelt()}, "callbacks: expected a list"),
        ({"callbacks": [Misspelt]}, "callbacks: expected an object, got the class Misspelt"),
        ({"callbacks": [Misspelt()]}, "Misspelt.on_step_ended would never be called."),
        ({"callbacks": [3]}, "callbacks: int has none of the methods"),
        ({"model": "tiny"}, "model: expected a model, got 'tiny'"),
        ({"model": torch.nn.Linear(1, 1)}, "model: expected a transformers model, got Linear"),
        ({"tokenizer": "tiny"}, "tokenizer: expected a tokenizer, got 'tiny'"),
        ({"loss": 3}, "loss: expected a Loss, got 3"),
        ({"optimizer": "SGD"}, "optimizer: expected a function"),
        ({"optimizer": lambda parameters: 3}, "optimizer: the function returned int"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_reported(options, rows, arguments, message):
    """By name, with what to give instead."""
    with pytest.raises(ConfigError) as caught:
        Trainer(options, **({"train_dataset": rows} | arguments))
    assert message in str(caught.value)


def test_data_in_the_config_and_in_python_conflict(options, rows, rows_file):
    """Nothing that was written is ignored."""
    with pytest.raises(ConfigError, match=r"datasets: conflicts with Trainer\(train_dataset=...\)"):
        Trainer(options | {"datasets": [str(rows_file)]}, train_dataset=rows)


def test_load_config_takes_keywords(options, rows_file, tmp_path):
    """They override the file, merge into sections, and are checked."""
    file = tmp_path / "c.yml"
    file.write_text(yaml.safe_dump(options | {"datasets": str(rows_file), "lora": {"rank": 4, "alpha": 3}}))
    config = load_config(file, lr=0.5, batch_size=4, lora={"rank": 8})
    assert (config.lr, config.total_batch_size) == (0.5, 4) and (config.lora.rank, config.lora.alpha) == (8, 3)
    with pytest.raises(ConfigError, match=r"load_config\(\.\.\.\): lr: "):
        load_config(file, lr="x")
    with pytest.raises(ConfigError, match="learning_rate: unknown option"):
        load_config(file, learning_rate=1.0)
    with pytest.raises(ConfigError, match="overrides: expected a list"):
        load_config(file, "lr=1")
    assert Trainer(file).config == load_config(file)


def test_a_model_is_saved_where_it_is_asked_for(options, rows, tmp_path):
    """`from_pretrained` reads it; a folder of other files is not replaced."""
    trainer = Trainer(options, train_dataset=rows)
    trainer.save_model(tmp_path / "model")
    trainer.save_model(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="is not a saved model"):
        trainer.save_model(tmp_path / "other")
    assert trainer.generate(["say 1"], Sampling(4)) == trainer.predict(["say 1"], 4)
    with pytest.raises(ConfigError, match="prompts: expected a list"):
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
