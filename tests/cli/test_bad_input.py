"""What a user gets wrong: exit code 2, one clear message, no traceback, and nothing loaded in vain."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minitrain.cli import main

ROOT = Path(__file__).parents[2]
CONFIG = """\
datasets: [rows.jsonl]
model: {name_or_path: model}
output_dir: out
batch_size: 8
n_steps: 2
"""
GOOD_ROW = {"prompt": "a", "response": "b"}


@pytest.fixture
def folder(tmp_path, monkeypatch, llama_folder, rows_file):
    """A folder with c.yml, rows.jsonl and model/, which is the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(rows_file, "rows.jsonl")
    shutil.copytree(llama_folder, "model")
    Path("c.yml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def fails(folder, capsys):
    """``fails("lr=x")``: the message of a training command that exits with 2 and leaves no run behind."""

    def fails(*overrides: str) -> str:
        code = main(["train", "c.yml", *(["--overrides", *overrides] if overrides else [])])
        out, err = capsys.readouterr()
        assert code == 2, err
        assert err.startswith("minitrain: ") and "Traceback" not in err + out and out == ""
        assert not Path("out").exists()
        return err

    return fails


def write(name: str, *rows) -> str:
    """A jsonl file of dicts or of lines as they are; returns the override that trains on it."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    Path(name).write_bytes(b"\n".join(lines) + b"\n" if lines else b"")
    return f"datasets=[{name}]"


# ---------------------------------------------------------------------------- the config: nothing is loaded for it


@pytest.mark.parametrize(
    "overrides, told",
    [
        # names
        (["learing_rate=1"], "learing_rate: there is no such option"),
        (["learning_rate=1"], "learning_rate: there is no such option. Here it is called lr."),
        (["model.dtype=bfloat16"], "Here it is called model.policy_dtype."),
        (["model.policy_dtyp=bfloat16"], "Did you mean model.policy_dtype?"),
        (["loss.dft_alpha=1"], "loss.dft_alpha: there is no such option. There are label_smoothing, focal_gamma."),
        (["loss.name=sfft"], "there is no loss 'sfft'; there are "),
        (["optimizer=Adamm"], "torch.optim has no 'Adamm'"),
        (["optimizer=LBFGS"], "torch.optim has no 'LBFGS' that can be used"),
        (["optimizer_args.momentum=0.9"], "optimizer_args.momentum: AdamW takes amsgrad"),
        (["datasets=[{path: rows.jsonl, type: alpca}]"], "'alpca' is not one of chosen, messages"),
        # types and limits
        (["lr=fast"], "lr: expected a number, got 'fast'"),
        (["lr=-1"], "lr: must be 0 or more, got -1.0"),
        (["lr=nan"], "lr: expected a number"),
        (["n_steps=1.5"], "n_steps: expected a whole number, got 1.5"),
        (["n_steps=0"], "n_steps: must be 1 or more, got 0"),
        (["packing=1"], "packing: expected true or false, got 1"),
        (["betas=[0.9]"], "betas: expected two numbers from 0 to below 1"),
        (["lr_scheduler=cosin"], "'cosin' is not one of linear, cosine, constant. Did you mean cosine?"),
        (["model=tiny"], "model: expected keys and values (name_or_path"),
        (["datasets=3"], "datasets: expected a list, got 3"),
        (["datasets=[3]"], "datasets[0]: expected keys and values (path"),
        (["freeze_layers=[last]"], "'last' is neither a number, a range like 0-5, nor `embeddings`"),
        (["warmup_ratio=1.5"], "warmup_ratio: must be 1 or less, got 1.5"),
        (["exp_name=../x"], "'../x' is not the name of a folder"),
        # options that would be ignored, or contradict each other
        (["n_epochs=2", "n_steps=3"], "n_epochs: would be ignored beside n_steps"),
        (["packing=true", "group_by_length=true"], "group_by_length: would be ignored beside packing"),
        (["warmup_steps=2", "warmup_ratio=0.5"], "warmup_ratio: would be ignored beside warmup_steps"),
        (["warmup_steps=5"], "warmup_steps: 5 is more than n_steps=2"),
        (["max_bad_rows=3"], "max_bad_rows: would be ignored: it needs on_bad_row=skip"),
        (["save_best=true"], "save_best: would be ignored: there is nothing to evaluate on"),
        (["eval_generate.show=1"], "eval_generate: would be ignored: there is nothing to evaluate on"),
        (["validation_split=0.5", "early_stopping.patience=2"], "would be ignored: it needs eval_every_steps"),
        (["validation_split=0.5", "early_stopping.metric=exact_match"], "exact_match needs eval_generate.n_examples"),
        (["validation_split=1.5"], "validation_split: is a share below 1 or a whole number"),
        (["optimizer=SGD", "betas=[0.5,0.5]"], "betas: would be ignored: SGD has no betas"),
        (["eval_datasets=[{path: rows.jsonl, weight: 2}]"], "weight: has no meaning for evaluation"),
        (["gradient_accumulation_steps=3"], "8 examples cannot be cut into gradient_accumulation_steps=3 equal"),
        (["model.revision=main"], "model.revision: would be ignored"),
        (["loss.name=kd"], "loss.teacher: is missing: name the folder or the hub name of a model"),
        (["loss={name: kd, teacher: tiny, jsd_weight: 0.1}"], "jsd_weight: would be ignored: it needs loss.divergence"),
        # files
        (["loss={name: kd, teacher: ./nowhere}"], "loss.teacher: there is no folder nowhere"),
        (["loss={name: kd, teacher_outputs: nowhere}"], "loss.teacher_outputs: there is no file nowhere (seen from "),
        (["datasets=[nowhere.jsonl]"], "there is no file nowhere.jsonl (seen from "),
        (["datasets=[row.jsonl]"], "Did you mean rows.jsonl?"),
        (["datasets=[model]"], "model is the folder of a model; name a file"),
        (["datasets=[c.yml]"], "c.yml is no .json, .jsonl, .csv, .tsv, .parquet file"),
        (["model.name_or_path=./nowhere"], "there is no folder nowhere"),
        (["model.name_or_path=rows.jsonl"], "there is no folder rows.jsonl"),
        (["model.name_or_path=."], "holds no config.json, so it is not a model's folder"),
        (["model.tokenizer_name_or_path=./nowhere"], "there is no folder ./nowhere"),
        (["model.archive=nowhere.pt"], "nowhere.pt is not a .safetensors, .pt or .bin file that exists"),
        (["chat_template=nowhere.jinja"], "'nowhere.jinja' is neither auto, chatml, none, nor a text file"),
        (["resume=nowhere"], "'nowhere' is neither auto, never, nor the folder of a checkpoint"),
        # the form of an override
        (["lr"], "lr: write it as key=value"),
        (["lr=[1"], "lr: cannot be set to '[1'"),
        (["datasets[3].path=x"], "datasets[3].path: cannot be set to 'x': list index out of range"),
    ],
)
def test_wrong_options(fails, monkeypatch, overrides, told):
    """One problem in the config gives one line, before data, tokenizer or model are touched."""
    monkeypatch.setattr("minitrain.trainer.Trainer.__init__", lambda *_: pytest.fail("something was loaded"))
    lines = fails(*overrides).splitlines()
    assert lines[0] == "minitrain: 1 problem in the configuration" and len(lines) == 2
    assert lines[1].startswith(("  --overrides: ", "  c.yml:")) and told in lines[1]


def test_torchrun_with_the_basic_trainer(fails, monkeypatch):
    """Several processes would each train on everything."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "BasicTrainer trains on one device, but torchrun started 2 processes" in fails()


@pytest.mark.parametrize(
    "name, told",
    [
        ("nowhere.yml", "minitrain: nowhere.yml: there is no such file.\n"),
        ("cc.yml", "minitrain: cc.yml: there is no such file. Did you mean c.yml?\n"),
        ("model", "minitrain: model: this is a folder; name a YAML file in it.\n"),
        ("model/model.safetensors", "so it is no YAML file"),
        ("rows.jsonl", "rows.jsonl:2: not valid YAML: "),
        ("", "minitrain: .: this is a folder"),
    ],
)
def test_a_config_that_is_none(folder, capsys, name, told):
    """A path that is no config file is told in one line."""
    assert main(["train", name]) == 2
    err = capsys.readouterr().err
    assert told in err and len(err.splitlines()) == 1


# ----------------------------------------------------------------------------- the data: read before the model is


@pytest.mark.parametrize(
    "rows, told",
    [
        ([], "bad.jsonl: no example can be trained on (the file has no rows)"),
        ([GOOD_ROW, b"{"], "bad.jsonl:2: not valid JSON"),
        ([GOOD_ROW, b"", b"3"], "bad.jsonl:3: expected an object with keys"),
        ([b'{"prompt": "\xff"}'], "bad.jsonl:1: not UTF-8 text"),
        ([{"foo": 1}], "bad.jsonl:1: no known schema of conversation rows has the keys foo"),
        ([GOOD_ROW, {"prompt": "a"}], "bad.jsonl:2: no known schema of conversation rows has the keys prompt"),
        ([GOOD_ROW, {"prompt": "a", "response": ""}], "bad.jsonl:2: response is empty"),
        ([{"prompt": "a", "response": [1]}], "bad.jsonl:1: response is not a text"),
        ([{"messages": "hi"}], "bad.jsonl:1: messages is not a list of turns"),
        ([{"messages": [{"role": "boss", "content": "x"}]}], "bad.jsonl:1: messages[0] has the role 'boss'"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "bad.jsonl:1: messages has no turn of the assistant"),
    ],
)
def test_bad_data(fails, monkeypatch, rows, told):
    """File, line and reason, and the model was not read for it."""
    monkeypatch.setattr("minitrain.trainer.load_policy", lambda *_, **__: pytest.fail("the model was loaded"))
    assert told in fails(write("bad.jsonl", *rows))


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["datasets=[{path: rows.jsonl, type: alpaca}]"], "rows.jsonl:1: type alpaca needs the key 'instruction'"),
        (["datasets=[{path: rows.jsonl, columns: {prompt: q}}]"], "rows.jsonl:1: columns names 'q'"),
        (["datasets=[{path: rows.jsonl, prompt_template: '{x}'}]"], "prompt_template names the column 'x'"),
        (["validation_split=40"], "40 of 40 examples held out leave none to train on"),
        (["max_length=2", "truncation=drop"], "rows.jsonl: no example can be trained on (40 examples left out"),
        (["cache_dir=c.yml/x"], "the tokens cannot be kept there"),
    ],
)
def test_options_that_do_not_fit_the_data(fails, overrides, told):
    """What only the data can tell is told with file and line too."""
    assert told in fails(*overrides)


def test_a_chat_template_that_is_none(fails):
    """A template that is not valid Jinja is told with the reason."""
    Path("t.jinja").write_text("{% for x %}")
    assert "expected token 'in'" in fails("chat_template=t.jinja")


# ------------------------------------------------------------------------------------------------------ the model


def no_causal_lm():
    Path("model/config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))


def unknown_model_type():
    Path("model/config.json").write_text(json.dumps({"model_type": "never-heard-of"}))


def empty_config():
    Path("model/config.json").write_text("")


def no_weights():
    Path("model/model.safetensors").unlink()


def empty_weights():
    Path("model/model.safetensors").write_bytes(b"")


def cut_weights():
    with open("model/model.safetensors", "r+b") as file:
        file.truncate(1000)


def no_tokenizer():
    for file in Path("model").glob("token*"):
        file.unlink()


def corrupt_tokenizer():
    Path("model/tokenizer.json").write_text("{}")


def no_eos():
    settings = json.loads(Path("model/tokenizer_config.json").read_text())
    settings["eos_token"] = None
    Path("model/tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "spoil, told",
    [
        (no_causal_lm, "no causal language model in 'model'"),
        (unknown_model_type, "'model'"),
        (empty_config, "'model'"),
        (no_weights, "no causal language model in 'model'"),
        (empty_weights, "no causal language model in 'model'"),
        (cut_weights, "no causal language model in 'model'"),
        (no_tokenizer, "no tokenizer could be loaded from 'model'"),
        (corrupt_tokenizer, "no tokenizer could be loaded from 'model'"),
        (no_eos, "the tokenizer of 'model' has no EOS token"),
    ],
)
def test_a_folder_that_is_no_model(fails, spoil, told):
    """Wrong, empty, cut and incomplete folders are told in one line."""
    spoil()
    err = fails()
    assert told in err and len(err.splitlines()) == 1


def test_an_archive_that_does_not_fit(fails):
    """An empty archive, and one that is no archive at all."""
    Path("empty.safetensors").write_bytes((16).to_bytes(8, "little") + b'{"x":{}}        ')
    assert "empty.safetensors cannot be loaded" in fails("model.archive=empty.safetensors")
    Path("text.pt").write_text("hello")
    assert "text.pt cannot be loaded" in fails("model.archive=text.pt")


def test_blocks_that_the_model_does_not_have(fails):
    """freeze_layers is checked against the model that was loaded."""
    assert "freeze_layers: 0-9 is outside of the model's blocks 0-1" in fails("freeze_layers=[0-9]")


# ---------------------------------------------------------------------------------------------- as a real command


@pytest.mark.parametrize(
    "arguments, told", [(["c.yml", "--overrides", "lr=x", "sed=1"], "2 problems"), ([], "usage: ")]
)
def test_the_real_command(folder, arguments, told):
    """train.py itself: exit code 2, the message on stderr, nothing on stdout."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "error"})
    assert done.returncode == 2 and told in done.stderr and done.stdout == "" and "Traceback" not in done.stderr
