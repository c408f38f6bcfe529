"""What a user gets wrong with the commands besides train: exit code 2, one line, nothing written or lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitrain.cli.main import main
from tests.conftest import ROOT, furnish
from tests.faults.test_faults import IN_A_NAMESPACE, NO_NAMESPACES


@pytest.fixture(scope="module")
def runs(tmp_path_factory, llama_folder, rows_file):
    """Runs of a model, an adapter, a soft prompt and a classifier, with the data beside them."""
    folder = tmp_path_factory.mktemp("runs")
    config = furnish(folder, llama_folder, rows_file)
    (folder / "c.yml").write_text(json.dumps(config))
    before = os.getcwd()
    os.chdir(folder)
    try:
        for name, *overrides in (
            ("whole",),
            ("lora", "lora.rank=2"),
            ("prompt", "soft_prompt.num_virtual_tokens=2"),
            ("labels", "loss.name=classify", "datasets=[labels.jsonl]"),
        ):
            assert main(["train", "c.yml", "--overrides", f"exp_name={name}", *overrides]) == 0
    finally:
        os.chdir(before)
    (folder / "runs" / "unfinished" / "checkpoints").mkdir(parents=True)
    (folder / "runs" / "empty").mkdir()
    (folder / "e.yml").write_text(json.dumps(config | {"lerning_rate": 1}))
    for name, text in {
        "nan.jsonl": '{"text": NaN, "prompt": null}',
        "mixed.jsonl": '{"text": "a"}\n{"prompt": "a", "response": "b"}',
        "keys.jsonl": '{"foo": "a"}',
        "role.jsonl": '{"messages": [{"role": "boss", "content": "a"}]}',
        "array.jsonl": "[1]",
        "none.jsonl": "",
        "x.txt": "hello",
        "mine.png": "mine",
        "syntax.py": "def f(:",
        "raises.py": "x = 1\n1 / 0",
        "imports.py": "import not_there_at_all",
        "exits.py": "import sys\n\nsys.exit('bye')",
        "twice.py": "from minitrain.losses import register_loss\nregister_loss('sft', dict)(dict)",
        "r/empty/metrics.jsonl": "",
        "r/broken/metrics.jsonl": "{\n[]\n3\nnull",
        "r/text/metrics.jsonl": '{"step": 1, "kind": "train", "loss": "x"}',
        "r/step/metrics.jsonl": '{"step": true, "kind": "train", "loss": 1}',
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def place(runs):
    """All files with their times, which no wrong command may change."""
    return runs, _files(runs)


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {str(path): path.lstat() for path in folder.rglob("*")}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}


TEACH = ["teach", "c.yml", "--overrides"]
TEXT = ["score", "runs/labels", "--text", "a"]
ASK = ["generate", "runs/whole", "--max-new-tokens", "1"]
PROMPT = [*ASK, "--prompt", "a"]
MERGE = ["merge", "runs/lora", "--output"]
TOP_K = "loss={name: kd, teacher: ./model, top_k: 4}"
PLUGIN = ["train", "c.yml", "--plugin"]


@pytest.mark.parametrize(
    "arguments, told",
    [
        # the command line itself
        ([], "usage: minitrain "),
        (["trian", "c.yml"], "invalid choice: 'trian' (choose from"),
        (["train"], "the following arguments are required: CONFIG.yml"),
        (["train", "c.yml", "e.yml"], "unknown arguments: e.yml; give one config at a time"),
        (["train", "c.yml", "lr=1"], "lr=1; options of the config follow --overrides: --overrides lr=..."),
        (
            ["train", "c.yml", "--lr", "1"],
            "--lr 1; options of the config follow --overrides: --overrides lr",
        ),
        (["train", "c.yml", "--overide", "lr=1"], "unknown arguments: --overide lr=1; did you mean --overrides?"),
        (["train", "c.yml", "--overrides"], "argument --overrides: expected at least one argument"),
        # generate
        (ASK, "one of the arguments --prompt --input is required"),
        ([*PROMPT, "--input", "rows.jsonl"], "argument --input: not allowed with argument --prompt"),
        ([*PROMPT, "--temperature", "-1"], "--temperature: expected a number of 0 or more, got '-1'"),
        ([*PROMPT, "--temperature", "nan"], "--temperature: expected a number of 0 or more, got 'nan'"),
        ([*PROMPT, "--temperature", "inf"], "--temperature: expected a number of 0 or more, got 'inf'"),
        ([*PROMPT, "--temperature", "1", "--top-p", "2"], "--top-p: expected a number from 0 to 1, got '2'"),
        ([*PROMPT, "--top-p", "0.5"], "--top-p would be ignored: it needs a --temperature above 0"),
        ([*PROMPT, "--seed", "9" * 30], "--seed: expected a number from 0 to "),
        ([*PROMPT, "--trust-remotecode"], "unknown arguments: --trust-remotecode; did you mean --trust-remote-code?"),
        (
            [*PROMPT, "--chat-template", "chatlm"],
            "the chat template 'chatlm' is neither auto, chatml, none, nor a text",
        ),
        ([*PROMPT, "--chat-template", "model"], "the chat template 'model' is neither auto, chatml, none, nor a"),
        ([*PROMPT, "--output", "model"], "--output: model is a folder; name a file in it"),
        ([*PROMPT, "--output", "rows.jsonl"], "--output: rows.jsonl exists; choose another name or add --force"),
        ([*PROMPT, "--output", "no/where.jsonl"], "--output: there is no folder "),
        ([*PROMPT, "--output", "/proc/x.jsonl"], "--output: /proc/x.jsonl cannot be written: "),
        ([*ASK, "--input", "nowhere.jsonl"], "nowhere.jsonl: there is no such file (seen from "),
        ([*ASK, "--input", "model"], "model: this is a folder; name a file in it"),
        ([*ASK, "--input", "c.yml"], "c.yml: expected a .txt, .json, .jsonl, .csv, .tsv, "),
        ([*ASK, "--input", "role.jsonl"], "role.jsonl:1: messages[0] has the role 'boss'; known are user, human"),
        (
            [*ASK, "--input", "nan.jsonl"],
            "nan.jsonl:1: none of the keys messages, prompt, question, instruction, query",
        ),
        ([*ASK, "--input", "array.jsonl"], "array.jsonl:1: expected an object with keys, got list '[1]'; a list of"),
        ([*ASK, "--prompt", "x" * 3000], "leave no place for an answer: the model has 1024 places"),
        (["generate", "rows.jsonl", "--prompt", "a"], "rows.jsonl: there is no such folder"),
        (["generate", "runs/labels", "--prompt", "a"], "runs/labels: this model gives scores and no text; use"),
        (["generate", "runs/unfinished", "--prompt", "a"], "runs/unfinished: this run is not finished; the same"),
        (["generate", "runs/empty", "--prompt", "a"], "runs/empty: holds neither a model (config.json), an adapter"),
        (["generate", "x" * 300, "--prompt", "a"], "xxxxx: File name too long"),
        (["chat", "runs/nowhere"], "runs/nowhere: there is no such folder (seen from "),
        (["chat", "runs/labels"], "runs/labels: this model gives scores and no text; use `minitrain score`"),
        # score
        (["score", "runs/labels"], "one of the arguments --text --prompt --input is required"),
        (["score", "runs/whole", "--text", "a"], "runs/whole: this model ends in a vocabulary and gives no scores"),
        (["score", "runs/label", "--text", "a"], "Did you mean runs/labels?"),
        (["score", "nobody/nothing", "--text", "a"], "nobody/nothing: it is not here, the hub does not answer ("),
        (["score", "runs/labels", "--prompt", "a"], "--response: 0 for 1 of --prompt; give one for each"),
        (["score", "runs/labels", "--text", ""], "--text: the text is empty"),
        ([*TEXT, "--text-pair", "b", "c"], "--text-pair: 2 for 1 of --text; give one for each"),
        ([*TEXT, "--columns", "text=a"], "--columns would be ignored: it needs --input"),
        ([*TEXT, "--batch-size", "0"], "--batch-size: expected a number of 1 or more, got '0'"),
        ([*TEXT, "--output", "rows.jsonl"], "--output: rows.jsonl exists; choose another name or add --force"),
        (["score", "runs/labels", "--input", "none.jsonl"], "none.jsonl: holds no rows"),
        (["score", "runs/labels", "--input", "x.txt"], "x.txt: expected a .json, .jsonl, .csv, .tsv, "),
        (["score", "runs/labels", "--input", "model"], "model: this is a folder; name a file in it"),
        (["score", "runs/labels", "--input", "nan.jsonl"], "nan.jsonl:1: text is not a text, but 'nan'"),
        (["score", "runs/labels", "--input", "keys.jsonl"], "keys.jsonl:1: no known schema of conversation rows has"),
        (["score", "runs/labels", "--input", "mixed.jsonl"], "mixed.jsonl:2: some rows are texts to label and others"),
        (["score", "runs/labels", "--input", "keys.jsonl", "--columns", "text"], "--columns: expected NAME=COLUMN"),
        (["score", "runs/labels", "--input", "keys.jsonl", "--columns", "text=a"], "keys.jsonl:1: columns names 'a'"),
        # merge
        (["merge", "runs/lora"], "the following arguments are required: --output"),
        (["merge", "runs/whole", "--output", "m"], "runs/whole: holds no LoRA, so there is nothing to merge"),
        (["merge", "runs/prompt", "--output", "m"], "runs/prompt: holds no LoRA, so there is nothing to merge"),
        (["merge", "runs/nowhere", "--output", "m"], "runs/nowhere: there is no such folder"),
        ([*MERGE, "model"], "--output: model exists; choose another name or add --force"),
        ([*MERGE, "model", "--force"], "--output: model is the base model, and the adapters would no longer fit it"),
        ([*MERGE, "rows.jsonl", "--force"], "--output: rows.jsonl is no model's folder, and --force writes over noth"),
        ([*MERGE, ".", "--force"], "--output: . is no model's folder, and --force writes over nothing else"),
        ([*MERGE, "runs/lora/final", "--force"], "--output: runs/lora/final is no model's folder, and --force writes"),
        ([*MERGE, "rows.jsonl/m"], "rows.jsonl is a file, so no folder can be made in it"),
        ([*MERGE, "m", "--weights", "1", "2"], "--weights: 2 numbers for 1 adapters; give one for each"),
        ([*MERGE, "m", "--weights", "nan"], "--weights: expected a number from -1000 to 1000, got 'nan'"),
        ([*MERGE, "m", "--dtype", "fp16"], "argument --dtype: invalid choice: 'fp16'"),
        # teach
        (["teach", "c.yml"], "loss.name: only kd has a teacher; set loss.name=kd"),
        ([*TEACH, "loss.name=kd"], "loss.teacher: is missing: name the folder or the hub name of a model"),
        ([*TEACH, "loss={name: kd, teacher: ./model}"], "loss.top_k: is missing; it says how many tokens are noted"),
        ([*TEACH, "loss={name: kd, teacher: ./model, top_k: 9999}"], "loss.top_k: is 9999, and the tokenizer has 259"),
        ([*TEACH, "loss={name: kd, teacher: ./model, top_k: 0}"], "loss.top_k: must be 1 or more, got 0"),
        ([*TEACH, TOP_K, "--output", "rows.jsonl"], "--output: rows.jsonl exists; choose another name or add --force"),
        ([*TEACH, TOP_K, "--output", "/proc/x"], "/proc/x cannot be written: "),
        ([*TEACH, TOP_K, "cache_dir=rows.jsonl/x"], "rows.jsonl/x: the tokens cannot be kept there: Not a directory"),
        # plot, doctor, compare
        (["plot"], "the following arguments are required: RUN"),
        (["plot", "runs/nowhere"], "runs/nowhere: there is no such folder; name a run folder, like runs/EXP_NAME"),
        (["plot", "model"], "model: holds no metrics.jsonl, so it is no run folder"),
        (["plot", "runs/whole", "--output", "x.jpg"], "--output: x.jpg would be a PNG; give it a name that ends in"),
        (["plot", "runs/whole", "--output", "mine.png"], "--output: mine.png exists and is no plot of these runs"),
        (["plot", "runs/whole", "--output", "no/where.png"], "--output: there is no folder "),
        (["plot", "runs/whole", "--output", "/proc/x.png"], "--output: /proc/x.png cannot be written: "),
        (["doctor", "rows.jsonl"], "rows.jsonl: there is no such folder; name a run folder"),
        (["doctor", "r/empty"], "r/empty/metrics.jsonl: holds no figures yet"),
        (["doctor", "r/broken"], "r/broken/metrics.jsonl: holds no line that can be read"),
        (["doctor", "r/text"], "r/text/metrics.jsonl: holds no line that can be read"),
        (["doctor", "r/step"], "r/step/metrics.jsonl: holds no line that can be read"),
        (["doctor", "runs/whole", "runs/lora"], "unknown arguments: runs/lora"),
        (["compare", "runs/whole"], "the following arguments are required: "),
        (["compare", "runs/whole", "model"], "model"),
        # inspect, validate
        (["inspect", "runs/whole"], "runs/whole: this is a folder; name a YAML file in it"),
        (["inspect", "rows.jsonl"], "rows.jsonl: this is a file of data; name the YAML file whose `datasets` name it"),
        (["inspect", "c.yml", "--rows", "0"], "--rows: expected a number of 1 or more, got '0'"),
        (["inspect", "c.yml", "--split", "test"], "argument --split: invalid choice: 'test'"),
        (["inspect", "c.yml", "--split", "eval"], "--split: there is nothing to evaluate on; give eval_datasets"),
        (["validate"], "name a config, or with --all a folder of them"),
        (["validate", "--all", "nowhere"], "--all: there is no .yml file in nowhere"),
        (["validate", "--all", "c.yml"], "--all: there is no .yml file in c.yml"),
        (["validate", "e.yml", "--quiet"], "lerning_rate: unknown option. Use lr."),
        (["validate", "d.yml", "--quiet"], "d.yml: there is no such file. Did you mean "),
        # plugins
        ([*PLUGIN, "nowhere.py"], "--plugin: nowhere.py is no Python file that exists"),
        ([*PLUGIN, "rows.jsonl"], "--plugin: rows.jsonl is no Python file that exists"),
        ([*PLUGIN, "syntax.py"], "--plugin: syntax.py:1: invalid syntax"),
        ([*PLUGIN, "raises.py"], "--plugin: raises.py:2: ZeroDivisionError: division by zero"),
        ([*PLUGIN, "imports.py"], "--plugin: imports.py:1: ModuleNotFoundError: No module named 'not_there_at_all'"),
        ([*PLUGIN, "exits.py"], "--plugin: exits.py:3: SystemExit: bye"),
        ([*PLUGIN, "twice.py"], "--plugin: twice.py: a loss named 'sft' is registered already"),
    ],
)
def test_a_wrong_command(place, monkeypatch, capsys, arguments, told):
    """Of the parser a usage line and an error, of all else one line; no file is new, gone or written."""
    folder, before = place
    monkeypatch.chdir(folder)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert told in err and out == "" and "Traceback" not in err
    assert err.startswith(("minitrain: ", "usage: "))
    assert _files(folder) == before


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda: Path("runs/c").write_text(""), "runs/c: cannot be written: Not a directory"),
        (lambda: Path("runs/c/config.yml").mkdir(parents=True), "runs/c/config.yml: is a folder, and training writes"),
        (lambda: Path("runs/c/.lock").mkdir(parents=True), "runs/c/.lock: is a folder, and training writes a file."),
    ],
)
def test_a_run_folder_that_cannot_be_written(folder, capsys, damage, told):
    """Things that stand in its way are left where they are."""
    Path("runs").mkdir()
    damage()
    assert main(["train", "c.yml", "--overrides", "output_dir=runs"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["output_dir=rows.jsonl/x"], "rows.jsonl/x/c: cannot be written: Not a directory. Set output_dir."),
        (["output_dir=/proc/1/x"], "/proc/1/x/c: cannot be written: No such file or directory. Set output_dir."),
        (["output_dir=/dev/null"], "/dev/null/c: cannot be written: Not a directory. Set output_dir."),
        (["cache_dir=rows.jsonl"], "rows.jsonl: the tokens cannot be kept there: File exists. Set cache_dir."),
        (["output_dir=" + "x" * 300], "File name too long"),
        (["datasets=[" + "x" * 300 + ".jsonl]"], "File name too long"),
    ],
)
def test_places_that_cannot_be_had(fails, overrides, told):
    """Permission bits do not hold for root, so the places are such as nobody can write to."""
    assert told in fails(*overrides)


@pytest.mark.parametrize("command", ["train", "validate"])
def test_a_checkpoint_that_is_none(folder, capsys, command):
    """The folder of a model, or any other one."""
    assert main([command, "c.yml", "--overrides", "resume=model"]) == 2
    told = "model: manifest.json is missing or damaged, so this is no complete checkpoint (like RUN/checkpoints/step-N)"
    assert capsys.readouterr().err == f"minitrain: {told} [damaged-file]\n"


def test_out_of_memory(folder, monkeypatch, capsys):
    """A failure of the machine (1), with what takes less."""
    monkeypatch.setattr("minitrain.trainer.load_policy", lambda *_, **__: torch.empty(10**16))
    assert main(["train", "c.yml"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("minitrain: out of memory. Make batches smaller (") and len(err.splitlines()) == 1


ON_A_FULL_DISK = """
import os, shutil, subprocess, sys
from minitrain.cli.main import main
kd = "loss={name: kd, teacher: ./model, top_k: 4}"
for command in (
    ["train", "c.yml", "--overrides", "cache_dir=full/cache"],
    ["train", "c.yml", "--overrides", "output_dir=full"],
    ["generate", "runs/lora", "--prompt", "a", "--max-new-tokens", "1", "--output", "full/a.jsonl"],
    ["score", "runs/labels", "--text", "a", "--output", "full/a.jsonl"],
    ["merge", "runs/lora", "--output", "full/merged"],
    ["teach", "c.yml", "--overrides", kd, "--output", "full/teacher"],
    ["plot", "runs/lora", "--output", "full/plot.png"],
):
    print("exit code", main(command), file=sys.stderr, flush=True)
"""
TOLD = """\
minitrain: full/cache: the tokens cannot be kept there: No space left on device. Set cache_dir. [no-space]
exit code 2
minitrain: full/c: cannot be written: No space left on device. Set output_dir. [no-space]
exit code 2
minitrain: --output: full/a.jsonl cannot be written: No space left on device
exit code 2
minitrain: --output: full/a.jsonl cannot be written: No space left on device
exit code 2
minitrain: full/merged: cannot be written: No space left on device
exit code 1
minitrain: full/teacher cannot be written: No space left on device. Name another place with --output.
exit code 2
minitrain: --output: full/plot.png cannot be written: No space left on device
exit code 2
"""


@pytest.mark.skipif(NO_NAMESPACES, reason="this machine allows no user namespaces with mounts of their own")
def test_a_full_disk(runs):
    """A small tmpfs without a free block: each is told, and no file holds a part of anything."""
    full = "mkdir full && mount -t tmpfs -o size=8k tmpfs full && ! dd if=/dev/zero of=full/fill 2> /dev/null"
    script = f"{full}; {sys.executable} -c '{ON_A_FULL_DISK}'; find full -type f -size +0"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*IN_A_NAMESPACE, script], cwd=runs, env=environment, capture_output=True, text=True)
    (runs / "full").rmdir()
    assert done.stderr == TOLD and done.stdout == "full/fill\n"
