"""The commands themselves: help, exit codes, pipes, chat, and files of answers."""

import argparse
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minitrain import __version__
from minitrain.cli.main import _parse, main
from minitrain.cli.registry import COMMANDS
from tests.commands import PARSERS, WITH_CONFIG
from tests.conftest import DEADLINE, ROOT
from tests.messages import reports

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*arguments, **kwargs) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` as a process of its own."""
    options = dict(capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=DEADLINE) | kwargs
    return subprocess.run([sys.executable, *map(str, arguments)], **options)


# ---------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_reads_like_a_page(capsys, name):
    """It has the usage, all arguments and the exit codes."""
    assert main([name, "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"usage: minitrain {name} ") and "exit codes:" in page
    shown = [action for action in PARSERS[name]._actions if action.help != argparse.SUPPRESS]
    assert all((action.option_strings or [action.metavar])[-1] in page for action in shown)


def test_train_py_is_the_train_command(capsys):
    """It goes by its own name, and shows its usage when there is nothing to do."""
    assert main(["train", "--help"], prog="train.py") == 0
    assert capsys.readouterr().out.startswith("usage: train.py CONFIG.yml [--overrides KEY=VALUE ...]\n")
    assert main(["train"], prog="train.py") == 2
    assert "usage: train.py CONFIG.yml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "c.yml"],
        ["--config=c.yml"],
        ["--overrides", "lr=1", "seed=2", "--config", "c.yml"],
        ["--config", "c.yml", "--quiet", "--overrides", "lr=1", "seed=2"],
        ["--overrides", "lr=1", "--config=c.yml", "--overrides", "seed=2"],
    ],
)
@pytest.mark.parametrize("command", WITH_CONFIG)
def test_a_config_by_option(command, arguments):
    """`--config FILE`, as other trainers have it, is `FILE`, wherever it is."""
    parsed = _parse([command, *arguments], "minitrain")
    assert (parsed.configs if command == "validate" else [parsed.config]) == ["c.yml"]
    assert parsed.overrides == (["lr=1", "seed=2"] if "--overrides" in arguments else [])


@pytest.mark.parametrize(
    "arguments, about",
    [
        (["train", "a.yml", "--config", "b.yml"], "a.yml"),
        (["train", "--config"], "CONFIG.yml"),
        (["generate", "runs/x", "--config", "b.yml", "--prompt", "a"], "--config"),
    ],
)
def test_a_config_by_option_that_does_not_fit(capsys, arguments, about):
    """Two configs, none behind the option, and commands that take no config."""
    assert main(arguments) == 2 and reports(capsys.readouterr().err, "usage", about)


def test_no_command(capsys):
    """The whole help, and exit code 2."""
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: minitrain ")


def test_version(capsys):
    """--version tells it and nothing else."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"minitrain {__version__}\n"


@pytest.mark.parametrize(
    "arguments, code, part",
    [
        (["trian"], "usage", "'trian'"),
        (["train", "c.yml", "lr=1"], "usage", "--overrides lr=..."),
        (["train", "c.yml", "--override", "lr=1"], "usage", "--override lr=1"),
        (["generate", "m"], "usage", "--prompt --input"),
        (["generate", "m", "--prompt", "a", "--input", "b"], "usage", "--input: "),
        (["generate", "m", "--prompt", "a", "--temperature", "-1"], "usage", "--temperature: "),
        (["generate", "m", "--prompt", "a", "--top-p", "2"], "usage", "--top-p: "),
        (["generate", "m", "--prompt", "a", "--temperature", "nan"], "usage", "'nan'"),
        (["generate", "m", "--prompt", "a", "--max-new-tokens", "0"], "usage", "--max-new-tokens: "),
        (["generate", "m", "--prompt", "a", "--top-p", "0.5"], "no-effect", "--top-p"),
        (["generate", "m", "--prompt", "a", "--top-k", "5"], "no-effect", "--top-k"),
        (["generate", "./nowhere", "--prompt", "a"], "not-found", "./nowhere: "),
        (["generate", "a/b/c", "--prompt", "a"], "not-found", "a/b/c: "),
        (["generate", "docs", "--prompt", "a"], "wrong-path", "docs: "),
        (["generate", "nobody/nothing", "--prompt", "a"], "unreachable", "nobody/nothing: "),
        (["generate", "tiny", "--prompt", "a", "--chat-template", "x"], "not-found", "'x'"),
        (["generate", "tiny", "--prompt", "a", "--device", "mps"], "no-device", "device: "),
        (["generate", "m", "--input", "nowhere.txt"], "not-found", "nowhere.txt: "),
        (["generate", "m", "--input", "train.py"], "wrong-format", "train.py: "),
        (["generate", "m", "--prompt", "a", "--output", "docs"], "wrong-path", "--output: docs"),
        (["generate", "m", "--prompt", "a", "--output", "README.txt/x"], "not-found", "--output: "),
        (["chat", "./nowhere"], "not-found", "./nowhere: "),
    ],
)
def test_wrong_arguments(capsys, monkeypatch, wording, arguments, code, part):
    """Exit code 2 and one message for what cannot be done."""
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    wording(err.rpartition("\nminitrain ")[2])
    assert reports(err, code, part) and out == "" and "Traceback" not in err


# ------------------------------------------------------------------------------------------------------ generate


@pytest.fixture
def generate(tmp_path, llama_folder, monkeypatch, capsys):
    """``generate(...)``: (exit code, stdout, stderr) of a generate command in a temporary folder."""
    monkeypatch.chdir(tmp_path)

    def generate(*arguments: str):
        code = main(["generate", str(llama_folder), "--max-new-tokens", "4", *arguments])
        return code, *capsys.readouterr()

    return generate


def rows_of(name: str) -> list[dict]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def test_every_kind_of_input_gives_the_same_answers(generate):
    """The prompts of a .txt, .jsonl, .json and .csv file are answered in their order, other columns kept."""
    prompts = ["a", "a much longer prompt, so that batches are not in the order of the file", "ünï"]
    Path("p.txt").write_text("\ufeff" + "\r\n\n".join(prompts) + "\n", encoding="utf-8")
    rows = [
        {"messages": [{"role": "user", "content": prompts[0]}, {"role": "assistant", "content": "learned"}], "id": 0},
        {"question": prompts[1], "id": 1},
        {"instruction": prompts[2], "input": "", "id": 2},
    ]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("p.json").write_text(json.dumps([{"query": prompt} for prompt in prompts]))
    with open("p.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt"], *([prompt] for prompt in prompts)])
    answers = {}
    for kind in ("txt", "jsonl", "json", "csv"):
        code, out, _ = generate("--input", f"p.{kind}", "--output", f"{kind}.jsonl", "--batch-size", "2")
        assert code == 0 and out == f"3 responses saved to {kind}.jsonl\n"
        answers[kind] = [row["response"] for row in rows_of(f"{kind}.jsonl")]
    assert answers["txt"] == answers["jsonl"] == answers["json"] == answers["csv"]
    assert [row["id"] for row in rows_of("jsonl.jsonl")] == [0, 1, 2]
    assert generate("--prompt", *prompts)[1] == "".join(answer + "\n" for answer in answers["txt"])


def test_an_output_that_is_a_list(generate):
    """A .json file holds a list, which `--input` reads again; a name of another format is refused."""
    assert generate("--prompt", "a", "ünï", "--output", "out.json")[0] == 0
    rows = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert [row["prompt"] for row in rows] == ["a", "ünï"] and all(row["response"] for row in rows)
    assert generate("--input", "out.json", "--output", "again.jsonl")[0] == 0
    for name in ("out.csv", "out.jsonl.gz", "out.parquet"):
        code, _, err = generate("--prompt", "a", "--output", name)
        assert code == 2 and reports(err, "wrong-format", "--output: ", name)


def test_a_response_that_a_row_has(generate):
    """It stays, and the answers go into another column, the same for all rows."""
    Path("p.jsonl").write_text('{"prompt": "a", "response": "mine"}\n{"prompt": "b", "model_response": "other"}\n')
    code, out, _ = generate("--input", "p.jsonl", "--output", "out.jsonl")
    renamed = "`response` is saved as `model_model_response`"
    assert code == 0 and out == f"2 responses saved to out.jsonl; the rows have a column of that name, so {renamed}\n"
    first, second = rows_of("out.jsonl")
    assert first["response"] == "mine" and second["model_response"] == "other" and "response" not in second
    assert (
        "\n".join([first["model_model_response"], second["model_model_response"], ""])
        == generate("--prompt", "a", "b")[1]
    )


def test_an_output_is_not_written_over(generate):
    """Without --force an existing file stays as it is, and the model is not even loaded."""
    Path("out.jsonl").write_text("mine")
    code, _, err = generate("--prompt", "a", "--output", "out.jsonl")
    assert code == 2 and reports(err, "already-exists", "--output: out.jsonl ")
    assert Path("out.jsonl").read_text() == "mine"
    assert generate("--prompt", "a", "--output", "out.jsonl", "--force")[0] == 0
    assert rows_of("out.jsonl")[0]["prompt"] == "a"


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 2)])
def test_nothing_is_left_half_written(generate, monkeypatch, error, code):
    """Ctrl-C or a full disk while the answers are written leaves neither a part nor a broken file."""

    def write(path, text, **_):
        with open(path, "w") as file:
            file.write(text[:5])
        raise error

    Path("out.jsonl").write_text("mine")
    monkeypatch.setattr(Path, "write_text", write)
    assert generate("--prompt", "a", "--output", "out.jsonl", "--force")[0] == code
    assert os.listdir() == ["out.jsonl"] and Path("out.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    "content, told, part",
    [
        (b'{"prompt": "a"}\n{"promt": "b"}\n', "invalid-row", "p.jsonl:2: "),
        (b'{"prompt": "a"}\n\n{"prompt": 3}\n', "invalid-row", "p.jsonl:3: "),
        (b'{"prompt": "a"}\n{\n', "invalid-json", "p.jsonl:2: "),
        (b'{"messages": []}\n', "invalid-row", "p.jsonl:1: messages"),
        (b'{"messages": "hello"}\n', "invalid-row", "p.jsonl:1: messages"),
        (b'{"messages": [{"role": "user", "content": 3}]}\n', "invalid-row", "p.jsonl:1: messages[0]"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}\n', "invalid-row", "p.jsonl:1: messages"),
        (b'{"messages": [{"content": "a"}]}\n', "invalid-row", "p.jsonl:1: messages[0]"),
        (b"", "no-data", "p.jsonl: "),
        (b'{"prompt": "a"}\n{"prompt": "' + b"x" * 1100 + b'"}\n', "too-large", "p.jsonl:2: the prompt has 1119 "),
    ],
)
def test_bad_prompts(generate, wording, content, told, part):
    """A row without a usable prompt is told with file and line."""
    Path("p.jsonl").write_bytes(content)
    code, out, err = generate("--input", "p.jsonl")
    wording(err)
    assert code == 2 and out == "" and reports(err, told, part) and len(err.splitlines()) == 1


def test_a_text_file_that_is_no_utf8(generate):
    """It is told with its line."""
    Path("p.txt").write_bytes(b"fine\n\xff\n")
    assert reports(generate("--input", "p.txt")[2], "invalid-text", "p.txt:2: ")


def test_the_same_seed_samples_the_same(generate):
    """--temperature with a seed repeats itself, and another seed gives other answers."""
    sampled = [generate("--prompt", "a", "b", "--temperature", "0.7", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]


# ---------------------------------------------------------------------------------------------------------- chat


HEAD = "Type a message. /help shows the commands; /exit or Ctrl-D ends the chat.\n"


def test_chat(llama_folder):
    """It remembers the conversation until /reset, ends at /exit, and survives what is too long or no text."""
    said = b"hello\nhello\n" + b"x" * 1100 + b"\n\xff\n/reset\nhello\n/help\n/exit\nnever read\n"
    done = run("-m", "minitrain", "chat", llama_folder, "--max-new-tokens", 4, input=said, text=False)
    assert done.returncode == 0 and done.stderr == b""
    head, first, second, refused, no_text, reset, again, helped, end = done.stdout.decode().split("> ")
    assert head == HEAD and first == again != second
    assert "1189 tokens" in refused and refused.endswith(". Type another message, or /reset.\n")
    assert no_text.endswith(". Type another message, or /reset.\n")
    assert reset == "" and end == ""
    assert [line.split()[0] for line in helped.splitlines()] == ["/help", "/reset", "/exit", "Anything"]


@pytest.mark.parametrize("said, answers", [("", 0), ("\n", 0), ("hello", 1), ("hello\n", 1)])
def test_chat_ends_with_its_input(llama_folder, monkeypatch, capsys, said, answers):
    """Ctrl-D ends it at any time, with a line break."""
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    assert main(["chat", str(llama_folder), "--max-new-tokens", "2", "--system", "Be brief."]) == 0
    told = capsys.readouterr().out
    assert told.startswith(HEAD + "> ") and told.endswith("> \n")
    assert len(told.removeprefix(HEAD).split("> ")) == 2 + max(answers, said.count("\n"))


# --------------------------------------------------------------------------------------------- pipes and signals


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "tiny", "--max-new-tokens", "1", "--prompt", "a"]])
def test_a_reader_that_stops_reading(arguments):
    """A pipe that nobody reads any more, as after `| head -1`, is no error."""
    command = [sys.executable, "-m", "minitrain", *arguments]
    writing = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, cwd=ROOT)
    writing.stdout.close()
    assert writing.stderr.read() == b"" and writing.wait(timeout=DEADLINE) == 0


@pytest.fixture
def config_file(tmp_path, llama_folder, rows_file) -> Path:
    """A config of a run that would take very long."""
    config = {"datasets": [str(rows_file)], "model": {"name_or_path": str(llama_folder)}, "exp_name": "x"}
    config |= {"output_dir": str(tmp_path / "runs"), "cache_dir": str(tmp_path / "cache")}
    config |= {"batch_size": 4, "n_steps": 100_000, "log_every_steps": 1}
    (tmp_path / "c.yml").write_text(json.dumps(config))  # JSON is YAML
    return tmp_path / "c.yml"


def test_ctrl_c_while_training(config_file, capsys):
    """SIGINT leaves a checkpoint and exit code 130; the same command goes on, and a third time does nothing."""
    runs = config_file.parent / "runs"
    command = [sys.executable, "train.py", str(config_file)]
    training = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT)
    try:
        while "step " not in training.stdout.readline():
            assert training.poll() is None
        training.send_signal(signal.SIGINT)
        out = training.communicate(timeout=DEADLINE)[0]
    finally:
        training.kill()  # it would go on for 100,000 steps, and keep the output of the tests open
    assert training.returncode == 130 and "stopped by SIGINT at step " in out
    step = int(re.search(r"SIGINT at step (\d+)", out)[1])
    for told in (f"resuming from {runs}/x/checkpoints/step-{step}", f"is finished: {step + 2} steps"):
        assert main(["train", str(config_file), "--overrides", f"n_steps={step + 2}"]) == 0
        assert told in capsys.readouterr().out


def test_ctrl_c_before_training(config_file):
    """SIGINT ends it with one line and exit code 130, also while numpy is imported, which would swallow it."""
    command = [sys.executable, "-X", "importtime", "train.py", str(config_file)]
    loading = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT)
    try:
        while "numpy" not in loading.stderr.readline():
            assert loading.poll() is None
        loading.send_signal(signal.SIGINT)
        err = loading.communicate(timeout=DEADLINE)[1]
    finally:
        loading.kill()
    assert loading.returncode == 130 and err.endswith("minitrain: interrupted\n") and "Traceback" not in err


def test_what_is_refused_and_what_fails(config_file, capsys):
    """A run directory that does not fit is something to mend (2); training that breaks down is a failure (1)."""

    def train(*overrides: str) -> tuple[int, str]:
        return main(["train", str(config_file), "--overrides", "n_steps=2", *overrides]), capsys.readouterr().err

    assert train("save_every_steps=1")[0] == 0
    for override, kind, about in (
        ("lr=0.5", "other-run", "lr: 2e-05 -> 0.5"),
        ("resume=never", "already-exists", ""),
        (f"resume={config_file.parent}", "damaged-file", "manifest.json"),
        (f"output_dir={config_file}", "not-writable", str(config_file)),
    ):
        code, err = train(override)
        assert code == 2 and reports(err, kind, about) and len(err.splitlines()) == 1, err
    code, err = train("exp_name=nan", "lr=1000", "max_grad_norm=0", "n_steps=50", "max_bad_steps=1", "optimizer=SGD")
    assert code == 1 and reports(err, "not-finite")
