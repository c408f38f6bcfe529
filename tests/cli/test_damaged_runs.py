"""Commands that read run directories, with any damaged file: one message each, never a traceback."""

import json
import random

import pytest
import yaml

from minitrain.cli.main import main
from minitrain.cli.registry import COMMANDS
from tests.commands import CASES, SAVED_ANSWER

VALUES = (None, True, -1, 10**400, 1e308, 5e-324, "x", "nan", "9" * 5000, "\ud800", [], [1], {}, {"a": 1})
OPTIONS = {
    "lr": 0.01,
    "max_grad_norm": 1.0,
    "packing": False,
    "model": {"policy_dtype": "float32"},
    "eval_datasets": [],
}
FIGURES = (
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "padding",
    "memory_gb",
    "eta_seconds",
    "ratio",
    "logps/chosen",
)


def write_run(folder, **contents) -> None:
    """A run of 12 log lines; `contents` replaces what its files hold, None leaves one out."""
    (folder / "rollouts").mkdir(parents=True)
    rows = [
        {"step": i, "kind": kind} | dict.fromkeys(FIGURES, 1 / i) for i in range(1, 13) for kind in ("train", "eval")
    ]
    steps = [{"step": i, "tokens": "x", "loss": 1 / i, "grad_norm": 1.0} for i in range(1, 13)]
    whole = {
        "metrics.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "ledger.jsonl": "\n".join(map(json.dumps, steps)).encode(),
        "run.json": b'{"finished_step": 12, "total_steps": 12}',
        "config.yml": yaml.safe_dump(OPTIONS).encode(),
        "rollouts/round-1.jsonl": json.dumps(SAVED_ANSWER).encode(),
    }
    for name, content in (whole | contents).items():
        if content is not None:
            (folder / name).write_bytes(content)


def commands(tmp_path) -> list[list[str]]:
    """Return the command lines of all commands that read the logs of runs."""
    runs = {"runs/lora": str(tmp_path / "a"), "runs/labels": str(tmp_path / "b")}
    names = [name for name, command in COMMANDS.items() if command.run.__module__ == "minitrain.cli.run_commands"]
    return [[runs.get(word, word) for word in CASES[name].arguments] for name in names]


def check(command: list[str], capsys) -> tuple[int, str]:
    code = main(command)
    told = capsys.readouterr().err
    assert code in (0, 1, 2) and "Traceback" not in told, told
    assert (code == 2) <= (told.count("\n") in (1, 2, 3, 4)), told
    return code, told


DAMAGED = [b"\0" * 40, b"\xff", b"", b"[]", b"5", b"[" * 9999]


@pytest.mark.parametrize("content", [*DAMAGED, b'{"finished_step": "x", "total_steps": 3}', b'{"finished_step": 12}'])
def test_a_damaged_run_json_is_named(tmp_path, capsys, content):
    """Nothing is said of whether the run has finished but that it is unknown."""
    write_run(tmp_path / "a", **{"run.json": content})
    code, told = check(["doctor", str(tmp_path / "a")], capsys)
    assert code == 0 and "run.json: is damaged" in told


@pytest.mark.parametrize(
    "content", [b"\0" * 40, b"\xff", b"", b"[]", b"5", b"lr: [", b"[" * 9999, b"lr: " + b"9" * 9999]
)
def test_a_damaged_config_is_named(tmp_path, capsys, content):
    """The findings that need no option are there."""
    write_run(tmp_path / "a", **{"config.yml": content})
    code, told = check(["doctor", str(tmp_path / "a")], capsys)
    assert code == 0 and "config.yml: is not a readable config" in told


@pytest.mark.parametrize(
    "line", [b"\xff", b"\0" * 9, b"[1]", b"[" * 9999, b'{"step": "1"}', b'{"step": 1e999, "kind": "eval"}']
)
def test_damaged_lines_are_counted(tmp_path, capsys, line):
    """In both logs by number."""
    write_run(tmp_path / "b")
    whole = {name: (tmp_path / "b" / name).read_bytes() for name in ("metrics.jsonl", "ledger.jsonl")}
    write_run(tmp_path / "a", **{name: line + b"\n" + content for name, content in whole.items()})
    for command in commands(tmp_path):
        code, told = check(command, capsys)
        name = "ledger" if command[0] == "compare" else "metrics"
        assert code == 0 and f"{name}.jsonl:1: an unreadable line is skipped" in told


def test_values_that_cannot_be_summed(tmp_path, capsys):
    """Numbers near the largest of all: as good as infinite."""
    write_run(tmp_path / "b")
    content = (tmp_path / "b" / "metrics.jsonl").read_bytes()
    write_run(tmp_path / "a", **{"metrics.jsonl": content.replace(b": 1.0", b": 1e308").replace(b": 0.5", b": 1e308")})
    for command in commands(tmp_path):
        assert check(command, capsys)[0] in (0, 1)


def damaged(rng: random.Random, content: bytes) -> bytes:
    """A value of another type in a JSON object or a YAML mapping, or a byte, or the end cut off."""
    how = rng.randrange(4)
    if how == 0:
        place = rng.randrange(len(content))
        return content[:place] + rng.choice([b"\0", b"\xff", b"[", b"{", b'"', b"\n"]) + content[place + 1 :]
    if how == 1:
        return content[: rng.randrange(len(content))]
    lines = content.splitlines()
    number = rng.randrange(len(lines))
    try:
        row = yaml.safe_load(content) if content.startswith(b"eval") else json.loads(lines[number])
        keys = [rng.choice(list(row))]
        row |= dict.fromkeys(keys, rng.choice(VALUES))
    except ValueError:
        return content
    if content.startswith(b"eval"):
        return yaml.safe_dump(row).encode()
    return b"\n".join([*lines[:number], json.dumps(row).encode(), *lines[number + 1 :]])


@pytest.mark.parametrize("seed", [0, pytest.param(100, marks=pytest.mark.slow)])
def test_any_damage_is_survived(tmp_path, capsys, seed):
    """Random damage to each file, and folders among the checkpoints with odd names."""
    rng = random.Random(seed)
    write_run(tmp_path / "b")
    files = [path for path in (tmp_path / "b").rglob("*") if path.is_file()]
    whole = {str(path.relative_to(tmp_path / "b")): path.read_bytes() for path in files}
    assert whole["config.yml"].startswith(b"eval")
    for number in range(50 if seed == 100 else 4):
        folder = tmp_path / str(number)
        write_run(folder, **{name: damaged(rng, content) for name, content in whole.items()})
        for name in ("step-²", "step-99999999999999999999", "step-x"):
            (folder / "checkpoints" / name).mkdir(parents=True)
        for command in commands(tmp_path):
            check([word if word != str(tmp_path / "a") else str(folder) for word in command], capsys)
