"""What a user gets wrong: exit code 2, one clear message, no traceback, and nothing loaded in vain."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitrain.cli.main import main
from minitrain.config.schedules import SCHEDULES
from tests.conftest import CONFIG, GOOD_ROW, ROOT

# ---------------------------------------------------------------------------- the config: nothing is loaded for it


@pytest.mark.parametrize(
    "overrides, told",
    [
        # names
        (["learing_rate=1"], "learing_rate: unknown option"),
        (["learning_rate=1"], "learning_rate: unknown option. Use lr."),
        (["model.dtype=bfloat16"], "unknown option. Use model.policy_dtype (float32, bfloat16 or float16)."),
        (["model.policy_dtyp=bfloat16"], "Did you mean model.policy_dtype?"),
        (["loss.dft_alpha=1"], "loss.dft_alpha: loss.name=sft has no such option; dft has it."),
        (["loss={beta: 0.1}"], "loss.beta: loss.name=sft has no such option; dpo, kd, kto have it."),
        (["allow_changes=[lrr]"], "allow_changes: there is no option 'lrr'. Did you mean lr?"),
        (["loss.name=null"], "there is no loss None; there are "),
        (["loss.name=sfft"], "there is no loss 'sfft'; there are "),
        (["optimizer=Adamm"], "torch.optim has no 'Adamm'"),
        (["optimizer=LBFGS"], "torch.optim has no 'LBFGS' that can be used"),
        (["optimizer_args.momentum=0.9"], "optimizer_args.momentum: AdamW takes amsgrad"),
        (["datasets=[{path: rows.jsonl, type: alpca}]"], "'alpca' is not one of chosen, messages"),
        # types and limits
        (["lr=fast"], "lr: expected a number, got 'fast'"),
        (["lr=-1"], "lr: must be 0 or more, got -1.0"),
        (["lr=nan"], "lr: expected a number"),
        (["lr=inf"], "lr: expected a number"),
        (["lr=0,001"], "lr: expected a number, got '0,001'"),
        (["lr=yes"], "lr: expected a number, got True"),
        (["lr=null"], "lr: expected a number, got nothing"),
        (["weight_decay=.nan"], "weight_decay: expected a number, got nan"),
        (["gradient_accumulation_steps=-2"], "gradient_accumulation_steps: must be 1 or more, got -2"),
        (["n_steps=null", "n_epochs=0"], "n_epochs: must be above 0, got 0.0"),
        (["seed=99999999999999999999999"], "seed: must be 9223372036854775807 or less"),
        (["fsdp.timeout_seconds=1e30", "trainer=FSDPTrainer"], "fsdp.timeout_seconds: must be 1000000.0 or less"),
        (["warmup_steps=99999999999999999999999"], "warmup_steps: must be 1000000000 or less"),
        (["output_dir="], "output_dir: expected a text, got nothing"),
        (["output_dir=''"], "output_dir: is empty. Give a value, or leave it out."),
        (["model.adapter=''"], "model.adapter: is empty. Give a value, or leave it out."),
        (
            ["optimizer=SGD", "optimizer_args.momentum=.nan"],
            "optimizer_args.momentum: expected a finite number, got nan.",
        ),
        (
            ["validation_split=0.5", "early_stopping.metric=perplexity"],
            "it needs early_stopping.patience, or save_best",
        ),
        (
            ["validation_split=0.5", "eval_generate.show=1"],
            "eval_generate: would be ignored: it needs eval_generate.n_",
        ),
        (
            ["loss={name: kto, desirable_weight: 0, undesirable_weight: 0}"],
            "nothing is left to learn. Set one of them.",
        ),
        (["loss={name: kd, teacher: tiny, alpha: 0, beta: 0}"], "loss.alpha: is 0, and so is loss.beta; nothing is"),
        (["betas=[a,b]"], "betas: expected a number, got 'a'"),
        (["betas={a: 1}"], "betas: expected a list, got {'a': 1}"),
        (["loss=3"], "loss: expected keys and values, got 3"),
        (["loss=[sft]"], "loss: expected keys and values, got ['sft']"),
        (["loss.label_smoothing=2"], "loss.label_smoothing: must be 1 or less, got 2.0"),
        (["device=gpu"], "device: 'gpu' is not one of auto, cpu, cuda, mps."),
        (["n_steps=1.5"], "n_steps: expected a whole number, got 1.5"),
        (["n_steps=0"], "n_steps: must be 1 or more, got 0"),
        (["packing=1"], "packing: expected true or false, got 1"),
        (["betas=[0.9]"], "betas: expected two numbers from 0 to below 1"),
        (["lr_scheduler=cosin"], f"'cosin' is not one of {', '.join(SCHEDULES)}. Did you mean cosine?"),
        (["model=tiny"], "model: expected keys and values (name_or_path"),
        (["datasets=3"], "datasets: expected a list, got 3"),
        (["datasets=[]"], "datasets: is missing: name at least one file"),
        (["datasets=[null]"], "datasets[0]: expected keys and values (path"),
        (["datasets=[{type: text}]"], "datasets[0].path: is missing"),
        (["datasets=[{path: rows.jsonl, weight: 0}]"], "datasets[0].weight: must be above 0"),
        (["datasets=[{path: rows.jsonl, columns: [a]}]"], "columns: expected keys and values, got ['a']"),
        (["datasets=[3]"], "datasets[0]: expected keys and values (path"),
        (["freeze_layers=[last]"], "'last' is neither a number, a range like 0-5, nor `embeddings`"),
        (["freeze_layers=[-1]"], "-1 is neither a number, a range like 0-5, nor `embeddings`"),
        (["freeze_layers=[1.5]"], "1.5 is neither a number, a range like 0-5, nor `embeddings`"),
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
        (
            ["validation_split=0.5", "early_stopping.metric=exact_match", "save_best=true"],
            "needs eval_generate.n_examples",
        ),
        (["validation_split=1.5"], "validation_split: is a share below 1 or a whole number"),
        (["optimizer=SGD", "betas=[0.5,0.5]"], "betas: would be ignored: SGD has no betas"),
        (["eval_datasets=[{path: rows.jsonl, weight: 2}]"], "weight: has no meaning for evaluation"),
        (["gradient_accumulation_steps=3"], "8 examples cannot be cut into gradient_accumulation_steps=3 equal"),
        (["model.revision=main"], "model.revision: would be ignored"),
        (["loss={name: classify, labels: [a, a]}"], "loss.labels: a label stands twice in a, a. List each label once."),
        (["loss={name: classify, class_weights: {a: 0}}"], "loss.class_weights: a weight has to be above 0, and 100"),
        (["loss={name: classify, labels: [a, b], positive_label: c}"], "loss.positive_label: there is no label 'c'"),
        (["loss.name=kd"], "loss.teacher: is missing: name the folder or the hub name of a model"),
        (["loss={name: kd, teacher: tiny, jsd_weight: 0.1}"], "jsd_weight: would be ignored: it needs loss.divergence"),
        # files
        (["loss={name: kd, teacher: ./nowhere}"], "loss.teacher: there is no folder nowhere"),
        (["loss={name: kd, teacher_outputs: nowhere}"], "loss.teacher_outputs: there is no file nowhere (seen from "),
        (["loss={name: kd, teacher_outputs: model}"], "loss.teacher_outputs: model is a folder; name the file that"),
        (["datasets=['https://a.b/c.jsonl']"], "https://a.b/c.jsonl is an address; download it, and name the file"),
        (["datasets=[/dev/null]"], "/dev/null is a device or a pipe, which cannot be read twice"),
        (["model.adapter=model"], "model.adapter: model holds no adapter_config.json, so it is no adapter"),
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
        (["chat_template=model"], "'model' is neither auto, chatml, none, nor a text file"),
        (["resume=rows.jsonl"], "'rows.jsonl' is neither auto, never, nor the folder of a checkpoint"),
        (["resume=nowhere"], "'nowhere' is neither auto, never, nor the folder of a checkpoint"),
        # the form of an override
        (["lr"], "lr: write it as key=value"),
        (["lr=[1"], "lr: cannot be set to '[1'"),
        (["lora={rank: 2, target_modules: []}"], "lora.target_modules: is empty, so that nothing would be trained."),
        (["datasets.path=x"], "datasets.path: names an option of a list. Name an entry of it, for example datasets[0]"),
        (["lr=!!int x"], "lr: 'x' is not of the type !!int. Leave the tag out."),
        (["lr=" + "1" * 5000], "lr: 1111111111111111111111111111111111111... is a number of 5000 digits."),
        (["a." * 1000 + "b=1"], "write it as key=value, for example lr=2e-5"),
        (["loss={name: [a]}"], "loss.name: there is no loss ['a']; there are "),
        (["loss={name: {a: b}}"], "loss.name: there is no loss {'a': 'b'}; there are "),
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
        ("rows.jsonl", "rows.jsonl: this is a file of data; name the YAML file whose `datasets` name it.\n"),
        ("", "minitrain: .: this is a folder"),
    ],
)
def test_a_config_that_is_none(folder, capsys, name, told):
    """A path that is no config file is told in one line."""
    assert main(["train", name]) == 2
    err = capsys.readouterr().err
    assert told in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "more, told",
    [
        ("n_steps: 3", "c.yml:6: not valid YAML: found duplicate key n_steps. Give it once."),
        ("lora:\n\trank: 2", "c.yml:7: not valid YAML: found character '\\t' that cannot start any token. Indent with"),
        ("lr:1", "c.yml:6: not valid YAML: could not find expected ':'. Write `key: value`, with a space behind"),
        ("exp_name: a: b", "c.yml:6: not valid YAML: mapping values are not allowed here. Indent keys of one level"),
        ("exp_name: 'a", "c.yml:6: not valid YAML: found unexpected end of stream. A quotation mark that opens here"),
        ("betas: [0.9, 0.99", "not valid YAML: expected ',' or ']', but got '<stream end>'. A bracket is not closed"),
        ("exp_name: *a", "c.yml:6: not valid YAML: found undefined alias 'a'."),
        ("exp_name: !!python/object:os.system x", "c.yml:6: not valid YAML: could not determine a constructor"),
        ("---\nlr: 1", "c.yml:6: not valid YAML: expected a single document in the stream, but found another"),
        ("? [1]\n: 2", "c.yml:6: a key is a list or a mapping. Write `key: value`."),
        ("exp_name: a\0b", "c.yml: not valid YAML: unacceptable character #x0000"),
        ("exp_name: ${oc.env:NOT_SET}", "c.yml:6: exp_name: '${oc.env:NOT_SET}' cannot be filled in: Environment var"),
        (
            "exp_name: ${nothing}",
            "c.yml:6: exp_name: '${nothing}' cannot be filled in: Interpolation key 'nothing'",
        ),
        ("exp_name: ${exp_name}", "c.yml:6: exp_name: '${exp_name}' cannot be filled in: Recursive interpolation"),
        ("1: 2", "c.yml:6: 1: unknown option."),
        (b"exp_name: caf\xe9", "c.yml: not UTF-8 text (byte 106), so it is no YAML file."),
    ],
)
def test_a_config_that_is_no_yaml(fails, more, told):
    """The line and what to do about it, in words for somebody who does not know YAML."""
    Path("c.yml").write_bytes(CONFIG.encode() + (more if isinstance(more, bytes) else more.encode()) + b"\n")
    assert told in fails()


@pytest.mark.parametrize("whole", ["- a\n- b\n", "hello\n", '"lr: 1"\n'])
def test_a_config_of_no_keys(fails, whole):
    """A list or a text is not taken for an empty config."""
    Path("c.yml").write_text(whole)
    assert fails() == "minitrain: c.yml: expected lines of the form `key: value`, for example `lr: 2e-5`.\n"


def test_marks_of_windows_are_no_mistake(folder):
    """Byte-order marks and CRLF, in configs and data, and gzip."""
    mark, row = b"\xef\xbb\xbf", json.dumps(GOOD_ROW).encode() + b"\r\n"
    Path("c.yml").write_bytes(mark + CONFIG.replace("\n", "\r\n").encode())
    Path("a.jsonl").write_bytes(mark + row)
    Path("b.csv").write_bytes(mark + b"prompt,response\r\na,b\r\n")
    Path("c.tsv").write_bytes(mark + b"prompt\tresponse\r\na\tb\r\n")
    Path("d.json").write_bytes(mark + b"[" + row + b"]")
    Path("e.jsonl.gz").write_bytes(gzip.compress(mark + row))
    assert main(["train", "c.yml", "--overrides", "datasets=[a.jsonl,b.csv,c.tsv,d.json,e.jsonl.gz]"]) == 0


# ---------------------------------------------------------------------------------------------- as a real command


@pytest.mark.parametrize(
    "arguments, told", [(["c.yml", "--overrides", "lr=x", "sed=1"], "2 problems"), ([], "usage: ")]
)
def test_the_real_command(folder, arguments, told):
    """train.py itself: exit code 2, the message on stderr, nothing on stdout."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "error"})
    assert done.returncode == 2 and told in done.stderr and done.stdout == "" and "Traceback" not in done.stderr


def test_a_python_without_the_packages(folder):
    """As when the virtual environment was not entered: what is missing, where, and how to have it."""
    done = subprocess.run([sys.executable, "-ES", str(ROOT / "train.py"), "c.yml"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert f"is not installed for {sys.executable}. `pip install -e .` in the folder of minitrain" in done.stderr


def test_the_report_of_torchrun(fails, monkeypatch):
    """torchrun ends in a table of the reasons that it finds in such a file, as torch's own error handler writes it."""
    from torch.distributed.elastic.multiprocessing.api import ProcessFailure

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(Path("error.json").absolute()))
    err = fails("lr=x")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file="error.json")
    assert f"minitrain: {failure.message['extraInfo']['py_callstack']}\n" == err and failure.timestamp > 0
