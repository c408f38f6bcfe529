"""--json: one JSON value on stdout, for results and for errors."""

import json
from pathlib import Path

import pytest

from minitrain.cli.main import main
from minitrain.errors import CODES
from tests.commands import CASES, PARSERS

WITH_JSON = [name for name in CASES if "--json" in PARSERS[name]._option_string_actions]


@pytest.fixture
def read(trained_folder, capsys):
    """``read("doctor", "runs/lora")``: (exit code, what a command prints with --json)."""

    def read(*arguments: str) -> tuple[int, object]:
        capsys.readouterr()
        code = main([*arguments, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return read


@pytest.mark.parametrize("name", WITH_JSON)
def test_a_result_is_one_value(read, name):
    """Nothing else is on stdout, and the exit code is that of the command without it."""
    code, result = read(*CASES[name].arguments)
    assert code == main(CASES[name].arguments) and result


def test_the_commands_for_tools_have_it():
    assert {"validate", "inspect", "doctor", "compare"} <= set(WITH_JSON)


def test_a_valid_config(read):
    code, (result,) = read("validate", "c.yml")
    assert (code, result["config"], result["valid"]) == (0, "c.yml", True)
    assert {"examples", "steps", "parameters"} <= result["report"].keys()


def test_problems_of_configs(read, capsys):
    """Each config has its entry; the problems have key and code, and stderr says the same."""
    Path("bad.yml").write_text("datasets: [rows.jsonl]\nmodel: {name_or_path: model}\nlr: x\nn_step: 2\n")
    assert main(["validate", "c.yml", "bad.yml", "--json"]) == 2
    out, err = capsys.readouterr()
    good, bad = json.loads(out)
    assert good["valid"] and not bad["valid"] and bad["error"]["code"] == "invalid-config"
    issues = [(issue["where"], issue["key"], issue["code"]) for issue in bad["error"]["issues"]]
    assert issues == [("bad.yml:3", "lr", "wrong-type"), ("bad.yml:4", "n_step", "unknown-option")]
    assert all(issue["message"] in err for issue in bad["error"]["issues"])


@pytest.mark.parametrize("name", WITH_JSON)
def test_an_error_is_a_value(read, name):
    """With its code, also where the argument is a run directory."""
    several = ["./nowhere"] * (2 if name in ("compare", "evaluate") else 1)
    code, result = read(name, *several)
    (result,) = result if isinstance(result, list) else [result]
    assert code == 2 and result["error"]["code"] == "not-found" and "nowhere" in result["error"]["message"]
    assert result["error"]["code"] in CODES


def test_examples_with_their_targets(read):
    """The targets are the response and its end token."""
    _, examples = read("inspect", "c.yml", "--rows", "2")
    assert len(examples) == 2
    for example in examples:
        (document,) = example["documents"]
        row = json.loads(Path("rows.jsonl").read_text().splitlines()[int(example["where"].partition(":")[2]) - 1])
        assert row["prompt"] in document["text"]
        assert len(document["ids"]) == len(document["is_target"])
        assert sum(document["is_target"]) == len(row["response"]) + 1  # one token a byte


def test_findings_have_codes(read):
    Path("runs/lora/metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 1.0}\n')
    _, result = read("doctor", "runs/lora")
    assert result["run"] == "runs/lora" and isinstance(result["passed"], list)
    (finding,) = [one for one in result["findings"] if one["code"] == "no-evaluation"]
    assert finding["problem"] and finding["advice"]


def test_where_runs_differ(read):
    """The first step, and the options with both values; a run is the same as itself."""
    code, same = read("compare", "runs/lora", "runs/lora")
    assert code == 0 and same["same"] and same["differences"] == {} and same["options"] == {}
    code, result = read("compare", "runs/lora", "runs/labels")
    assert code == 1 and not result["same"] and result["common_steps"] == [1, 1]
    assert result["differences"]["tokens"]["step"] == 1
    assert result["options"]["loss.name"] == {"a": "sft", "b": "classify"}


def test_a_number_that_json_lacks(read):
    """It is a string, as in metrics.jsonl."""
    ledger = Path("runs/lora/ledger.jsonl")
    row = json.loads(ledger.read_text().splitlines()[0])
    ledger.write_text(json.dumps(row | {"loss": "nan"}) + "\n")
    assert read("compare", "runs/lora", "runs/labels")[1]["differences"]["loss"]["a"] == "nan"
