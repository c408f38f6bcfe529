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
from tests.messages import reports


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
    "arguments, code, about",
    [
        # the command line itself
        (["trian", "c.yml"], "usage", "'trian'"),
        (["train"], "usage", "CONFIG.yml"),
        (["train", "c.yml", "e.yml"], "usage", "e.yml"),
        (["train", "c.yml", "lr=1"], "usage", "--overrides"),
        (
            ["train", "c.yml", "--lr", "1"],
            "usage",
            "--lr",
        ),
        (["train", "c.yml", "--overide", "lr=1"], "usage", "--overide"),
        (["train", "c.yml", "--overrides"], "usage", "--overrides"),
        # generate
        (ASK, "usage", "--prompt"),
        ([*PROMPT, "--input", "rows.jsonl"], "usage", "--input"),
        ([*PROMPT, "--temperature", "-1"], "usage", "--temperature:"),
        ([*PROMPT, "--temperature", "nan"], "usage", "--temperature:"),
        ([*PROMPT, "--temperature", "inf"], "usage", "--temperature:"),
        ([*PROMPT, "--temperature", "1", "--top-p", "2"], "usage", "--top-p:"),
        ([*PROMPT, "--top-p", "0.5"], "no-effect", "--top-p"),
        ([*PROMPT, "--seed", "9" * 30], "usage", "--seed:"),
        ([*PROMPT, "--trust-remotecode"], "usage", "--trust-remotecode"),
        (
            [*PROMPT, "--chat-template", "chatlm"],
            "not-found",
            "'chatlm'",
        ),
        ([*PROMPT, "--chat-template", "model"], "not-found", "'model'"),
        ([*PROMPT, "--output", "model"], "wrong-path", "--output: model"),
        ([*PROMPT, "--output", "rows.jsonl"], "already-exists", "--output: rows.jsonl"),
        ([*PROMPT, "--output", "no/where.jsonl"], "not-found", "--output:"),
        ([*PROMPT, "--output", "/proc/x.jsonl"], "not-writable", "--output:"),
        ([*ASK, "--input", "nowhere.jsonl"], "not-found", "nowhere.jsonl:"),
        ([*ASK, "--input", "model"], "wrong-path", "model:"),
        ([*ASK, "--input", "c.yml"], "wrong-format", "c.yml:"),
        ([*ASK, "--input", "role.jsonl"], "invalid-row", "role.jsonl:1:"),
        (
            [*ASK, "--input", "nan.jsonl"],
            "invalid-row",
            "nan.jsonl:1:",
        ),
        ([*ASK, "--input", "array.jsonl"], "invalid-row", "array.jsonl:1:"),
        ([*ASK, "--prompt", "x" * 3000], "too-large", ""),
        (["generate", "rows.jsonl", "--prompt", "a"], "not-found", "rows.jsonl:"),
        (["generate", "runs/labels", "--prompt", "a"], "unsupported-model", "runs/labels:"),
        (["generate", "runs/unfinished", "--prompt", "a"], "unfinished-run", "runs/unfinished:"),
        (["generate", "runs/empty", "--prompt", "a"], "wrong-path", "runs/empty:"),
        (["generate", "x" * 300, "--prompt", "a"], "os-error", "xxxxx:"),
        (["chat", "runs/nowhere"], "not-found", "runs/nowhere:"),
        (["chat", "runs/labels"], "unsupported-model", "runs/labels:"),
        # score
        (["score", "runs/labels"], "usage", "--text"),
        (["score", "runs/whole", "--text", "a"], "unsupported-model", "runs/whole:"),
        (["score", "runs/label", "--text", "a"], "not-found", ""),
        (["score", "nobody/nothing", "--text", "a"], "unreachable", "nobody/nothing:"),
        (["score", "runs/labels", "--prompt", "a"], "usage", "--response:"),
        (["score", "runs/labels", "--text", ""], "invalid-row", "--text:"),
        ([*TEXT, "--text-pair", "b", "c"], "usage", "--text-pair:"),
        ([*TEXT, "--columns", "text=a"], "no-effect", "--columns"),
        ([*TEXT, "--batch-size", "0"], "usage", "--batch-size:"),
        ([*TEXT, "--output", "rows.jsonl"], "already-exists", "--output: rows.jsonl"),
        (["score", "runs/labels", "--input", "none.jsonl"], "no-data", "none.jsonl:"),
        (["score", "runs/labels", "--input", "x.txt"], "wrong-format", "x.txt:"),
        (["score", "runs/labels", "--input", "model"], "wrong-path", "model:"),
        (["score", "runs/labels", "--input", "nan.jsonl"], "invalid-row", "nan.jsonl:1:"),
        (["score", "runs/labels", "--input", "keys.jsonl"], "invalid-row", "keys.jsonl:1:"),
        (["score", "runs/labels", "--input", "mixed.jsonl"], "invalid-row", "mixed.jsonl:2:"),
        (["score", "runs/labels", "--input", "keys.jsonl", "--columns", "text"], "usage", "--columns:"),
        (["score", "runs/labels", "--input", "keys.jsonl", "--columns", "text=a"], "wrong-column", "keys.jsonl:1:"),
        # merge
        (["merge", "runs/lora"], "usage", "--output"),
        (["merge", "runs/whole", "--output", "m"], "unsupported-model", "runs/whole:"),
        (["merge", "runs/prompt", "--output", "m"], "unsupported-model", "runs/prompt:"),
        (["merge", "runs/nowhere", "--output", "m"], "not-found", "runs/nowhere:"),
        ([*MERGE, "model"], "already-exists", "--output: model"),
        ([*MERGE, "model", "--force"], "conflict", "output: model"),
        ([*MERGE, "rows.jsonl", "--force"], "already-exists", "--output: rows.jsonl"),
        ([*MERGE, ".", "--force"], "already-exists", "--output: ."),
        ([*MERGE, "runs/lora/final", "--force"], "already-exists", "--output:"),
        ([*MERGE, "rows.jsonl/m"], "wrong-path", "rows.jsonl"),
        ([*MERGE, "m", "--weights", "1", "2"], "usage", "--weights:"),
        ([*MERGE, "m", "--weights", "nan"], "usage", "--weights:"),
        ([*MERGE, "m", "--dtype", "fp16"], "usage", "'fp16'"),
        # teach
        (["teach", "c.yml"], "conflict", "loss.name:"),
        ([*TEACH, "loss.name=kd"], "missing-option", "loss.teacher:"),
        ([*TEACH, "loss={name: kd, teacher: ./model}"], "missing-option", "loss.top_k:"),
        ([*TEACH, "loss={name: kd, teacher: ./model, top_k: 9999}"], "out-of-range", "loss.top_k:"),
        ([*TEACH, "loss={name: kd, teacher: ./model, top_k: 0}"], "out-of-range", "loss.top_k:"),
        ([*TEACH, TOP_K, "--output", "rows.jsonl"], "already-exists", "--output: rows.jsonl"),
        ([*TEACH, TOP_K, "--output", "/proc/x"], "not-writable", ""),
        ([*TEACH, TOP_K, "cache_dir=rows.jsonl/x"], "not-writable", "rows.jsonl/x:"),
        # plot, doctor, compare, rollouts
        (["plot"], "usage", ""),
        (["plot", "runs/nowhere"], "not-found", "runs/nowhere:"),
        (["plot", "model"], "not-found", "model:"),
        (["plot", "runs/whole", "--output", "x.jpg"], "wrong-format", "x.jpg"),
        (["plot", "runs/whole", "--output", "mine.png"], "already-exists", "--output: mine.png"),
        (["plot", "runs/whole", "--output", "no/where.png"], "not-found", "--output:"),
        (["plot", "runs/whole", "--output", "/proc/x.png"], "not-writable", "--output:"),
        (["doctor", "rows.jsonl"], "not-found", "rows.jsonl:"),
        (["doctor", "r/empty"], "no-data", "r/empty/metrics.jsonl:"),
        (["doctor", "r/broken"], "damaged-file", "r/broken/metrics.jsonl:"),
        (["doctor", "r/text"], "damaged-file", "r/text/metrics.jsonl:"),
        (["doctor", "r/step"], "damaged-file", "r/step/metrics.jsonl:"),
        (["doctor", "runs/whole", "runs/lora"], "usage", ""),
        (["compare", "runs/whole"], "usage", ""),
        (["compare", "runs/whole", "model"], "not-found", ""),
        (["rollouts", "runs/whole"], "no-data", "runs/whole:"),
        (["rollouts", "model"], "not-found", "model:"),
        (["rollouts", "runs/whole", "--best", "--worst"], "usage", "--worst"),
        (["rollouts", "runs/whole", "--round", "0"], "usage", "--round:"),
        # inspect, validate
        (["inspect", "runs/whole"], "wrong-path", "runs/whole:"),
        (["inspect", "rows.jsonl"], "wrong-path", "rows.jsonl:"),
        (["inspect", "c.yml", "--rows", "0"], "usage", "--rows:"),
        (["inspect", "c.yml", "--split", "test"], "usage", "'test'"),
        (["inspect", "c.yml", "--split", "eval"], "no-data", "--split:"),
        (["validate"], "usage", "--all"),
        (["validate", "--all", "nowhere"], "not-found", "--all:"),
        (["validate", "--all", "c.yml"], "not-found", "--all:"),
        (["validate", "e.yml", "--quiet"], "unknown-option", "lerning_rate:"),
        (["validate", "d.yml", "--quiet"], "not-found", "d.yml:"),
        # plugins
        ([*PLUGIN, "nowhere.py"], "not-found", "--plugin: nowhere.py"),
        ([*PLUGIN, "rows.jsonl"], "not-found", "--plugin: rows.jsonl"),
        ([*PLUGIN, "syntax.py"], "plugin-failed", "--plugin: syntax.py:1:"),
        ([*PLUGIN, "raises.py"], "plugin-failed", "--plugin: raises.py:2: ZeroDivisionError:"),
        ([*PLUGIN, "imports.py"], "plugin-failed", "--plugin: imports.py:1: ModuleNotFoundError:"),
        ([*PLUGIN, "exits.py"], "plugin-failed", "--plugin: exits.py:3: SystemExit:"),
        ([*PLUGIN, "twice.py"], "already-exists", "--plugin: twice.py:"),
    ],
)
def test_a_wrong_command(place, monkeypatch, capsys, wording, arguments, code, about):
    """Of the parser a usage line and an error, of all else one line; no file is new, gone or written."""
    folder, before = place
    monkeypatch.chdir(folder)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    wording(err.rpartition("\nminitrain ")[2])
    assert reports(err, code, about) and out == "" and "Traceback" not in err
    assert err.startswith(("minitrain: ", "usage: "))
    assert _files(folder) == before


@pytest.mark.parametrize(
    "damage, code, about",
    [
        (lambda: Path("runs/c").write_text(""), "not-writable", "runs/c:"),
        (lambda: Path("runs/c/config.yml").mkdir(parents=True), "wrong-path", "runs/c/config.yml:"),
        (lambda: Path("runs/c/.lock").mkdir(parents=True), "wrong-path", "runs/c/.lock:"),
    ],
)
def test_a_run_folder_that_cannot_be_written(folder, capsys, wording, damage, code, about):
    """Things that stand in its way are left where they are."""
    Path("runs").mkdir()
    damage()
    assert main(["train", "c.yml", "--overrides", "output_dir=runs"]) == 2
    err = capsys.readouterr().err
    wording(err)
    assert reports(err, code, about)


@pytest.mark.parametrize(
    "overrides, code, about",
    [
        (["output_dir=rows.jsonl/x"], "not-writable", "rows.jsonl/x/c:"),
        (["output_dir=/proc/1/x"], "not-writable", "/proc/1/x/c:"),
        (["output_dir=/dev/null"], "not-writable", "/dev/null/c:"),
        (["cache_dir=rows.jsonl"], "not-writable", "rows.jsonl:"),
        (["output_dir=" + "x" * 300], "not-writable", ""),
        (["datasets=[" + "x" * 300 + ".jsonl]"], "os-error", ""),
    ],
)
def test_places_that_cannot_be_had(fails, overrides, code, about):
    """Permission bits do not hold for root, so the places are such as nobody can write to."""
    assert reports(fails(*overrides), code, about)


@pytest.mark.parametrize("command", ["train", "validate"])
def test_a_checkpoint_that_is_none(folder, capsys, wording, command):
    """The folder of a model, or any other one."""
    assert main([command, "c.yml", "--overrides", "resume=model"]) == 2
    err = capsys.readouterr().err
    wording(err)
    assert reports(err, "damaged-file", "model: manifest.json") and len(err.splitlines()) == 1


def test_out_of_memory(folder, monkeypatch, capsys, wording):
    """A failure of the machine (1), with what takes less."""
    monkeypatch.setattr("minitrain.training.setup.build_policy", lambda *_, **__: torch.empty(10**16))
    assert main(["train", "c.yml"]) == 1
    err = capsys.readouterr().err
    wording(err)
    assert reports(err, "out-of-memory") and len(err.splitlines()) == 1


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
REFUSED = [  # about -> exit code
    ("full/cache: ", 2),
    ("full/c: ", 2),
    ("--output: full/a.jsonl ", 2),
    ("--output: full/a.jsonl ", 2),
    ("full/merged: ", 1),
    ("full/teacher: ", 2),
    ("--output: full/plot.png ", 2),
]


@pytest.mark.skipif(NO_NAMESPACES, reason="this machine allows no user namespaces with mounts of their own")
def test_a_full_disk(runs):
    """A small tmpfs without a free block: each is told, and no file holds a part of anything."""
    full = "mkdir full && mount -t tmpfs -o size=8k tmpfs full && ! dd if=/dev/zero of=full/fill 2> /dev/null"
    script = f"{full}; {sys.executable} -c '{ON_A_FULL_DISK}'; find full -type f -size +0"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*IN_A_NAMESPACE, script], cwd=runs, env=environment, capture_output=True, text=True)
    (runs / "full").rmdir()
    lines = iter(done.stderr.splitlines())
    for (about, code), (message, ending) in zip(REFUSED, zip(lines, lines, strict=True), strict=True):
        assert reports(message, "no-space", about) and ending == f"exit code {code}", done.stderr
    assert done.stdout == "full/fill\n"
