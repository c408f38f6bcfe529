"""What a user gets wrong: exit code 2, one clear message, no traceback, and nothing loaded in vain."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitrain.cli.main import main
from tests.conftest import CONFIG, GOOD_ROW, ROOT
from tests.messages import reports

# ---------------------------------------------------------------------------- the config: nothing is loaded for it


@pytest.mark.parametrize(
    "overrides, code, about",
    [
        # names
        (["learing_rate=1"], "unknown-option", "learing_rate:"),
        (["learning_rate=1"], "unknown-option", "learning_rate:"),
        (["model.dtype=bfloat16"], "unknown-option", "model.policy_dtype"),
        (["model.policy_dtyp=bfloat16"], "unknown-option", "model.policy_dtype"),
        (["loss.dft_alpha=1"], "unknown-option", "loss.dft_alpha:"),
        (["loss={beta: 0.1}"], "unknown-option", "loss.beta:"),
        (["allow_changes=[lrr]"], "unknown-option", "allow_changes:"),
        (["loss.name=null"], "not-a-choice", ""),
        (["loss.name=sfft"], "not-a-choice", "'sfft'"),
        (["optimizer=Adamm"], "not-a-choice", "'Adamm'"),
        (["optimizer=LBFGS"], "not-a-choice", "'LBFGS'"),
        (["optimizer_args.momentum=0.9"], "unknown-option", "optimizer_args.momentum:"),
        (["datasets=[{path: rows.jsonl, type: alpca}]"], "not-a-choice", "'alpca'"),
        # types and limits
        (["lr=fast"], "wrong-type", "lr:"),
        (["lr=-1"], "out-of-range", "lr:"),
        (["lr=nan"], "wrong-type", "lr:"),
        (["lr=inf"], "wrong-type", "lr:"),
        (["lr=0,001"], "wrong-type", "lr:"),
        (["lr=yes"], "wrong-type", "lr:"),
        (["weight_decay=null"], "wrong-type", "weight_decay:"),
        (["weight_decay=.nan"], "wrong-type", "weight_decay:"),
        (["gradient_accumulation_steps=-2"], "out-of-range", "gradient_accumulation_steps:"),
        (["n_steps=null", "n_epochs=0"], "out-of-range", "n_epochs:"),
        (["seed=99999999999999999999999"], "out-of-range", "seed:"),
        (["fsdp.timeout_seconds=1e30", "trainer=FSDPTrainer"], "out-of-range", "fsdp.timeout_seconds:"),
        (["warmup_steps=99999999999999999999999"], "out-of-range", "warmup_steps:"),
        (["output_dir="], "wrong-type", "output_dir:"),
        (["output_dir=''"], "invalid-value", "output_dir:"),
        (["model.adapter=''"], "invalid-value", "model.adapter:"),
        (
            ["optimizer=SGD", "optimizer_args.momentum=.nan"],
            "not-finite",
            "optimizer_args.momentum:",
        ),
        (
            ["validation_split=0.5", "early_stopping.metric=perplexity"],
            "no-effect",
            "early_stopping.patience",
        ),
        (
            ["validation_split=0.5", "eval_generate.show=1"],
            "no-effect",
            "eval_generate:",
        ),
        (
            ["loss={name: kto, desirable_weight: 0, undesirable_weight: 0}"],
            "conflict",
            "",
        ),
        (["loss={name: kd, teacher: tiny, alpha: 0, beta: 0}"], "conflict", "loss.alpha:"),
        (["betas=[a,b]"], "wrong-type", "betas:"),
        (["betas={a: 1}"], "wrong-type", "betas:"),
        (["loss=3"], "wrong-type", "loss:"),
        (["loss=[sft]"], "wrong-type", "loss:"),
        (["loss.label_smoothing=2"], "out-of-range", "loss.label_smoothing:"),
        (["device=gpu"], "not-a-choice", "device:"),
        (["n_steps=1.5"], "wrong-type", "n_steps:"),
        (["n_steps=0"], "out-of-range", "n_steps:"),
        (["packing=1"], "wrong-type", "packing:"),
        (["betas=[0.9]"], "invalid-value", "betas:"),
        (["lr_scheduler=cosin"], "not-a-choice", "'cosin'"),
        (["model=tiny"], "wrong-type", "model:"),
        (["datasets=3"], "wrong-type", "datasets:"),
        (["datasets=[]"], "missing-option", "datasets:"),
        (["datasets=[null]"], "wrong-type", "datasets[0]:"),
        (["datasets=[{type: text}]"], "missing-option", "datasets[0].path:"),
        (["datasets=[{path: rows.jsonl, weight: 0}]"], "out-of-range", "datasets[0].weight:"),
        (["datasets=[{path: rows.jsonl, columns: [a]}]"], "wrong-type", "columns:"),
        (["datasets=[3]"], "wrong-type", "datasets[0]:"),
        (["freeze_layers=[last]"], "invalid-value", "'last'"),
        (["freeze_layers=[-1]"], "invalid-value", ""),
        (["freeze_layers=[1.5]"], "invalid-value", ""),
        (["warmup_ratio=1.5"], "out-of-range", "warmup_ratio:"),
        (["exp_name=../x"], "invalid-value", "'../x'"),
        # options that would be ignored, or contradict each other
        (["n_epochs=2", "n_steps=3"], "conflict", "n_epochs:"),
        (["packing=true", "group_by_length=true"], "conflict", "group_by_length:"),
        (["warmup_steps=2", "warmup_ratio=0.5"], "conflict", "warmup_ratio:"),
        (["warmup_steps=5"], "out-of-range", "warmup_steps:"),
        (["max_bad_rows=3"], "no-effect", "max_bad_rows:"),
        (["save_best=true"], "no-effect", "save_best:"),
        (["eval_generate.show=1"], "no-effect", "eval_generate:"),
        (["validation_split=0.5", "early_stopping.patience=2"], "no-effect", "eval_every_steps"),
        (
            ["validation_split=0.5", "early_stopping.metric=exact_match", "save_best=true"],
            "conflict",
            "eval_generate.n_examples",
        ),
        (["validation_split=1.5"], "out-of-range", "validation_split:"),
        (["optimizer=SGD", "betas=[0.5,0.5]"], "no-effect", "betas:"),
        (["eval_datasets=[{path: rows.jsonl, weight: 2}]"], "no-effect", "weight:"),
        (["gradient_accumulation_steps=3"], "conflict", "gradient_accumulation_steps"),
        (["model.revision=main"], "no-effect", "model.revision:"),
        (["loss={name: classify, labels: [a, a]}"], "conflict", "loss.labels:"),
        (["loss={name: classify, class_weights: {a: 0}}"], "conflict", "loss.class_weights:"),
        (["loss={name: classify, labels: [a, b], positive_label: c}"], "conflict", "loss.positive_label:"),
        (["loss.name=kd"], "missing-option", "loss.teacher:"),
        (["loss={name: kd, teacher: tiny, jsd_weight: 0.1}"], "no-effect", "jsd_weight:"),
        # files
        (["loss={name: kd, teacher: ./nowhere}"], "not-found", "loss.teacher:"),
        (["loss={name: kd, teacher_outputs: nowhere}"], "not-found", "loss.teacher_outputs:"),
        (["loss={name: kd, teacher_outputs: model}"], "wrong-path", "loss.teacher_outputs:"),
        (["datasets=['https://a.b/c.jsonl']"], "wrong-path", "https:"),
        (["datasets=[/dev/null]"], "wrong-path", ""),
        (["model.adapter=model"], "wrong-path", "model.adapter:"),
        (["datasets=[nowhere.jsonl]"], "not-found", "nowhere.jsonl"),
        (["datasets=[row.jsonl]"], "not-found", "rows.jsonl"),
        (["datasets=[model]"], "wrong-path", ""),
        (["datasets=[c.yml]"], "wrong-format", "c.yml"),
        (["model.name_or_path=./nowhere"], "not-found", ""),
        (["model.name_or_path=rows.jsonl"], "not-found", "rows.jsonl"),
        (["model.name_or_path=."], "wrong-path", "config.json"),
        (["model.tokenizer_name_or_path=./nowhere"], "not-found", ""),
        (["model.archive=nowhere.pt"], "not-found", "nowhere.pt"),
        (["chat_template=nowhere.jinja"], "not-found", "'nowhere.jinja'"),
        (["chat_template=model"], "not-found", "'model'"),
        (["resume=rows.jsonl"], "not-found", "'rows.jsonl'"),
        (["resume=nowhere"], "not-found", "'nowhere'"),
        # the form of an override
        (["lr"], "usage", "lr:"),
        (["lr=[1"], "invalid-value", "lr:"),
        (["lora={rank: 2, target_modules: []}"], "invalid-value", "lora.target_modules:"),
        (["lora={rank: 2, target_parameters: experts}"], "wrong-type", "lora.target_parameters:"),
        (["lora={rank: 2, target_parameters: all-experts, dropout: 0.1}"], "conflict", "lora.dropout:"),
        (["lora={rank: 2, target_parameters: all-experts, use_dora: true}"], "conflict", "lora.use_dora:"),
        (["lora={rank: 2, target_parameters: [w], init: pissa}"], "conflict", "lora.init:"),
        (["datasets.path=x"], "unknown-option", "datasets.path:"),
        (["lr=!!int x"], "wrong-type", "lr:"),
        (["lr=" + "1" * 5000], "too-large", "lr:"),
        (["a." * 1000 + "b=1"], "usage", ""),
        (["loss={name: [a]}"], "not-a-choice", "loss.name:"),
        (["loss={name: {a: b}}"], "not-a-choice", "loss.name:"),
        (["datasets[3].path=x"], "invalid-value", "datasets[3].path:"),
    ],
)
def test_wrong_options(fails, monkeypatch, overrides, code, about):
    """One problem in the config gives one line, before data, tokenizer or model are touched."""
    monkeypatch.setattr("minitrain.trainer.Trainer.__init__", lambda *_: pytest.fail("something was loaded"))
    lines = fails(*overrides).splitlines()
    assert lines[0].startswith("minitrain: 1 ") and len(lines) == 2
    assert lines[1].startswith(("  --overrides: ", "  c.yml:")) and reports(lines[1], code, about)


def test_torchrun_with_the_basic_trainer(fails, monkeypatch):
    """Several processes would each train on everything."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert reports(fails(), "conflict", "trainer: ", "2")


@pytest.mark.parametrize(
    "name, code, about",
    [
        ("nowhere.yml", "not-found", "nowhere.yml:"),
        ("cc.yml", "not-found", "cc.yml:"),
        ("model", "wrong-path", "model:"),
        ("model/model.safetensors", "invalid-text", ""),
        ("rows.jsonl", "wrong-path", "rows.jsonl:"),
        ("", "wrong-path", ".:"),
    ],
)
def test_a_config_that_is_none(folder, capsys, wording, name, code, about):
    """A path that is no config file is told in one line."""
    assert main(["train", name]) == 2
    err = capsys.readouterr().err
    wording(err)
    assert reports(err, code, about) and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "more, code, about",
    [
        ("n_steps: 3", "invalid-yaml", "c.yml:6:"),
        ("lora:\n\trank: 2", "invalid-yaml", "c.yml:7:"),
        ("lr:1", "invalid-yaml", "c.yml:6:"),
        ("exp_name: a: b", "invalid-yaml", "c.yml:6:"),
        ("exp_name: 'a", "invalid-yaml", "c.yml:6:"),
        ("betas: [0.9, 0.99", "invalid-yaml", "','"),
        ("exp_name: *a", "invalid-yaml", "c.yml:6:"),
        ("exp_name: !!python/object:os.system x", "invalid-yaml", "c.yml:6:"),
        ("---\nlr: 1", "invalid-yaml", "c.yml:6:"),
        ("? [1]\n: 2", "invalid-yaml", "c.yml:6:"),
        ("exp_name: a\0b", "invalid-yaml", "c.yml:"),
        ("exp_name: ${oc.env:NOT_SET}", "invalid-reference", "c.yml:6: exp_name:"),
        (
            "exp_name: ${nothing}",
            "invalid-reference",
            "c.yml:6: exp_name:",
        ),
        ("exp_name: ${exp_name}", "invalid-reference", "c.yml:6: exp_name:"),
        ("1: 2", "unknown-option", "c.yml:6: 1:"),
        (b"exp_name: caf\xe9", "invalid-text", "c.yml:"),
    ],
)
def test_a_config_that_is_no_yaml(fails, more, code, about):
    """The line and what to do about it, in words for somebody who does not know YAML."""
    Path("c.yml").write_bytes(CONFIG.encode() + (more if isinstance(more, bytes) else more.encode()) + b"\n")
    assert reports(fails(), code, about)


@pytest.mark.parametrize("whole", ["- a\n- b\n", "hello\n", '"lr: 1"\n'])
def test_a_config_of_no_keys(fails, whole):
    """A list or a text is not taken for an empty config."""
    Path("c.yml").write_text(whole)
    assert reports(fails(), "invalid-yaml", "c.yml: ")


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
    "arguments, about", [(["c.yml", "--overrides", "lr=x", "sed=1"], "[unknown-option]"), ([], "usage: ")]
)
def test_the_real_command(folder, arguments, about):
    """train.py itself: exit code 2, the message on stderr, nothing on stdout."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "error"})
    assert done.returncode == 2 and about in done.stderr and done.stdout == "" and "Traceback" not in done.stderr


def test_a_python_without_the_packages(folder):
    """As when the virtual environment was not entered: what is missing, where, and how to have it."""
    done = subprocess.run([sys.executable, "-ES", str(ROOT / "train.py"), "c.yml"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert reports(done.stderr, "not-installed", sys.executable)


def test_the_report_of_torchrun(fails, monkeypatch):
    """torchrun ends in a table of the reasons that it finds in such a file, as torch's own error handler writes it."""
    from torch.distributed.elastic.multiprocessing.api import ProcessFailure

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(Path("error.json").absolute()))
    err = fails("lr=x")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file="error.json")
    assert f"minitrain: {failure.message['extraInfo']['py_callstack']}\n" == err and failure.timestamp > 0
