"""What comes from the environment, and passwords in URLs, are in no file of a run and in no message."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from minitrain import load_config
from minitrain.cli.main import main
from minitrain.config.saved import config_yaml
from minitrain.config.sections import DatasetConfig
from minitrain.errors import ConfigError, DataError, MinitrainError
from minitrain.io.redact import redact, redact_urls

CANARY = "c4nary"
URL = f"https://me:{CANARY}-word@host/x?a=1&access_token={CANARY}-token"
CONFIG = f"""\
datasets: ['${{oc.env:SECRET_DATA}}']
eval_datasets: '${{oc.decode:${{oc.env:SECRET_EVAL}}}}'
model: {{name_or_path: '${{oc.env:SECRET_ROOT}}/model'}}
chat_template: ${{oc.env:SECRET_ROOT}}/turns.jinja
wandb: {{project: 'of {URL} '}}
output_dir: out
cache_dir: cache
exp_name: run
total_batch_size: 8
n_steps: 2
save_every_steps: 1
log_every_steps: 1
lr: 1e-2
num_proc: 1
save_best: true
report_to_tensorboard: true
eval_generate: {{n_examples: 1, max_new_tokens: 2}}
"""
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


@pytest.fixture
def command(tmp_path, monkeypatch, llama_folder, rows_file, capfd):
    """``command("train", "lr=1")``: (exit code, what it printed) in a folder with a config full of secrets."""
    root = tmp_path / f"{CANARY}-root"
    shutil.copytree(llama_folder, root / "model")
    (root / "turns.jinja").write_text(TURNS)
    for name in ("rows", "held"):
        shutil.copy(rows_file, root / f"{name}.jsonl")
    monkeypatch.setenv("SECRET_ROOT", str(root))
    monkeypatch.setenv("SECRET_DATA", str(root / "rows.jsonl"))
    monkeypatch.setenv("SECRET_EVAL", f"[{{path: {root}/held.jsonl}}]")
    monkeypatch.setenv("SECRET_TOKEN", f"{CANARY}-token-" + "x" * 200)
    monkeypatch.setenv("SECRET_KEY", f"-----{CANARY}-----\nsecond {CANARY} line\nlast")
    (tmp_path / f"{CANARY}-near").mkdir()
    shutil.copy(rows_file, tmp_path / f"{CANARY}-near/rows.jsonl")
    monkeypatch.setenv("SECRET_NEAR", str(tmp_path / f"{CANARY}-near/row.jsonl"))
    monkeypatch.setenv("SECRET_LIST", f"[/none/{CANARY}/a.jsonl, {{path: /none/{CANARY}/b.jsonl}}]")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("c.yml").write_text(CONFIG)

    def command(name: str, *overrides: str, config: str = "c.yml") -> tuple[int, str]:
        code = main([name, config, *(["--overrides", *overrides] if overrides else [])])
        return code, "".join(capfd.readouterr())

    return command


def leaks(folder: str = ".") -> set[str]:
    """The files under a folder that hold the secret, in their content or their name."""
    files = [file for file in Path(folder).rglob("*") if file.is_file() and file.name != "c.yml"]
    assert len(files) > 1
    return {file.name for file in files if CANARY.encode() in file.read_bytes() or CANARY in str(file)}


def test_no_secret_in_what_a_run_writes_and_prints(command):
    """Config, card, checkpoints, logs, models and token caches name variables; the run resumes from them."""
    code, told = command("train")
    assert code == 0 and CANARY not in told, told
    assert "${oc.env:SECRET_ROOT}/model: " in told and "expected" in told
    assert {file.name for file in Path("out/run").iterdir()} >= {"config.yml", "final", "best", "checkpoints"}
    assert leaks() == set()
    card = Path("out/run/final/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "${oc.env:SECRET_ROOT}/model" and "- `${oc.env:SECRET_DATA}`\n" in card
    saved = yaml.safe_load(Path("out/run/config.yml").read_text())
    assert saved["wandb"]["project"] == "of https://***@host/x?a=1&access_token=*** "
    assert saved["eval_datasets"] == "${oc.decode:${oc.env:SECRET_EVAL}}"
    state = json.loads(Path("out/run/checkpoints/step-2/state.json").read_text())
    assert state["config"] == saved

    code, told = command("train", "n_steps=3")
    assert code == 0 and "resuming from out/run/checkpoints/step-2" in told and CANARY not in told
    code, told = command("train", "n_steps=4", "lr=0.5")
    assert code == 2 and "lr: 0.01 -> 0.5)" in told and CANARY not in told
    for name in ("validate", "inspect"):
        code, told = command(name, "n_steps=4")
        assert code == 0 and CANARY not in told, told
    assert "${oc.env:SECRET_DATA}:" in told
    assert leaks() == set()


def test_a_config_saved_with_its_password_resumes(command):
    """A run directory of an older version still has the password; that is no change of an option."""
    template = f"prompt_template: 'See {URL} {{prompt}}'"
    Path("c.yml").write_text(CONFIG.replace("datasets: ['${oc.env:SECRET_DATA}']", DATASETS.format(template), 1))
    assert command("train")[0] == 0
    file = Path("out/run/config.yml")
    assert leaks() == set() and "See https://***@host/x?a=1&access_token=*** {prompt}" in file.read_text()
    settings = yaml.safe_load(file.read_text())
    settings["datasets"][0]["prompt_template"] = f"See {URL} {{prompt}}"
    file.write_text(yaml.safe_dump(settings))
    assert command("train", "n_steps=3")[0] == 0 and leaks() == set()


DATASETS = "datasets: [{{path: '${{oc.env:SECRET_DATA}}', {}}}]"


def test_an_adapter_names_its_base_and_nothing_else_does(command):
    """PEFT loads the base of adapter_config.json, so that the path has to stand there."""
    assert command("train", "lora.rank=2")[0] == 0
    assert leaks() == {"adapter_config.json"}
    code, told = command("train", "n_steps=3", "lora.rank=2", "model.adapter=${oc.env:SECRET_ROOT}/no")
    assert code == 2 and "${oc.env:SECRET_ROOT}/no" in told and CANARY not in told


def test_what_a_teacher_says_is_kept_under_a_hash_of_its_name(command):
    """The file is for this teacher, whether its name is written out or not, and for no other one."""
    loss = ["loss={name: kd, teacher: '${oc.env:SECRET_ROOT}/model', top_k: 4}"]
    code, told = command("teach", *loss)
    (file,) = Path("cache").glob("*-teacher.safetensors")
    assert code == 0 and str(file) in told and CANARY not in told and leaks("cache") == set()
    loss.append(f"loss.teacher_outputs={file}")
    assert command("train", *loss)[0] == 0
    assert command("train", *loss, f"loss.teacher={Path('..').resolve()}/{CANARY}-root/model", "exp_name=b")[0] == 0
    code, told = command("train", *loss, "loss.teacher=tiny", "exp_name=c")
    assert code == 2 and "loss.teacher: " in told and CANARY not in told


FAILURES = {
    "no folder": ["model.name_or_path=${oc.env:SECRET_ROOT}/modle"],
    "no model": ["model.name_or_path=${oc.env:SECRET_ROOT}"],
    "hub name": ["model.name_or_path=me/${oc.env:SECRET_TOKEN}"],
    "no file": ["datasets=['${oc.env:SECRET_ROOT}/row.jsonl']"],
    "near file": ["datasets=['${oc.env:SECRET_DATA}x']"],
    "no data": ["datasets=['${oc.env:SECRET_ROOT}/turns.jinja']"],
    "bad row": ["datasets=['${oc.env:SECRET_ROOT}/bad.jsonl']"],
    "bad row left out": ["datasets=['${oc.env:SECRET_ROOT}/bad.jsonl']", "on_bad_row=skip"],
    "address": [f"datasets=['{URL}']"],
    "long address": [f"lr='https://{CANARY}{'x' * 90}@host'"],
    "number": ["lr=${oc.env:SECRET_TOKEN}"],
    "integer": [f"lr=!!int {URL}"],
    "choice": ["train_on=${oc.env:SECRET_KEY}"],
    "list": ["betas=['${oc.env:SECRET_TOKEN}', 1]"],
    "loss": ["loss=${oc.env:SECRET_TOKEN}"],
    "optimizer": ["optimizer=a${oc.env:SECRET_KEY}"],
    "section": ["model=${oc.env:SECRET_TOKEN}"],
    "template": ["chat_template=${oc.env:SECRET_ROOT}/none.jinja"],
    "near file of a folder": ["datasets=['${oc.env:SECRET_NEAR}']"],
    "name of a name": ["datasets=['${oc.env:SECRET_${exp_name}}']", "exp_name=NEAR"],
    "decoded": ["datasets=${oc.decode:${oc.env:SECRET_LIST}}"],
    "not decoded": ["datasets=${oc.decode:${oc.env:SECRET_KEY}}"],
    "long integer": [f"lr=!!int https://{CANARY}{'x' * 90}@host"],
    "archive": ["model.archive=${oc.env:SECRET_DATA}"],
    "teacher": ["loss={name: kd, teacher: '${oc.env:SECRET_ROOT}/none'}"],
}


@pytest.mark.parametrize("name", ["train", "validate"])
@pytest.mark.parametrize("overrides", FAILURES.values(), ids=FAILURES)
def test_no_secret_in_an_error(command, overrides, name):
    """Errors name the variable; they are long, cut, quoted, of several lines, or made from a part of the value."""
    Path(f"../{CANARY}-root/bad.jsonl").write_text('{"prompt": "a"}\n' * 3)
    code, told = command(name, *overrides)
    assert code in (2, 3) and CANARY not in told and "Traceback" not in told, told
    assert any(word in told for word in ("oc.env:SECRET_", "***", "lr: expected")), told


def test_a_damaged_model_is_named_by_its_variable(command):
    """The reason comes from another library, with the path in it. A folder to resume from is named alike."""
    code, told = command("train", "resume=${oc.env:SECRET_ROOT}")
    assert code == 2 and CANARY not in told and "${oc.env:SECRET_ROOT}" in told
    Path(f"../{CANARY}-root/model/model.safetensors").write_bytes(b"0" * 100)
    code, told = command("train")
    assert code == 2 and CANARY not in told and "${oc.env:SECRET_ROOT}/model" in told


# -------------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:pw@host/x", "https://***@host/x"),
        ("'https://token@host', b@c", "'https://***@host', b@c"),
        ("postgres://u:p/w@host/db", "postgres://***@host/db"),
        ("http://host:80/@scope/x and a@b.c", "http://host:80/@scope/x and a@b.c"),
        ("https://h/?token=abc&q=1&X-Amz-Signature=2#access_token=3", None),
        ("https://h/?keyword=abc&monkeys=1", "https://h/?keyword=abc&monkeys=1"),
        ("https://${oc.env:U}:${oc.env:P}@h/?key=${oc.env:K}", "https://${oc.env:U}:${oc.env:P}@h/?key=${oc.env:K}"),
        ("https://user:${oc.env:P}@h", "https://user:${oc.env:P}@h"),
        ("https://${oc.env:U}:literal@h", "https://***@h"),
        ("no url: user:pw@host", "no url: user:pw@host"),
    ],
)
def test_passwords_in_urls(url, shown):
    """User info and parameters that hold a secret are masked, `${...}` in their place is kept."""
    assert redact_urls(url) == (shown or "https://h/?token=***&q=1&X-Amz-Signature=***#access_token=***")


def test_values_are_searched_for_from_six_characters(monkeypatch, rows_file):
    """A short value is part of ordinary words. Folders that are written to are shown. No variable is replaced twice."""
    values = {"SHORT": "train", "LONG": "traini", "NAME": "my-run-1", "OTHER": "oc.env"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    given = {"datasets": [str(rows_file)], "model": {"name_or_path": "tiny"}, "exp_name": "x-${oc.env:NAME}"}
    load_config(given | {"wandb": {"project": "${oc.env:SHORT}", "entity": "${oc.env:LONG}${oc.env:OTHER}"}})
    told = "training my-run-1 train trainioc.env oc.env"
    shown = "${oc.env:LONG}ng my-run-1 train ${oc.env:LONG}${oc.env:OTHER} ${oc.env:OTHER}"
    assert redact(told) == redact(redact(told)) == shown
    assert [kind(told, "usage").message for kind in (MinitrainError, ConfigError, DataError)] == [shown] * 3


def test_every_form_of_a_value_is_hidden(monkeypatch, rows_file, tmp_path):
    """A line of it, escaped as Python and JSON do it, as an absolute path, and with links resolved."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target").mkdir()
    (tmp_path / "linked").symlink_to("target")
    monkeypatch.setenv("KEY", 'first "line"\n\tsecond line\n\u00e9')
    monkeypatch.setenv("FOLDER", "linked//x/../rows")
    given = {"datasets": [str(rows_file)], "model": {"name_or_path": "tiny"}}
    load_config(given | {"wandb": {"project": "${oc.env:KEY}", "entity": "${oc.env:FOLDER}"}})
    key = os.environ["KEY"]
    for form in (key, repr(key)[1:-1], json.dumps(key)[1:-1], *key.splitlines()[:2]):
        assert redact(f"a {form} b") == "a ${oc.env:KEY} b"
    for form in ("linked//x/../rows", "linked/rows", f"{tmp_path}/linked/rows", f"{tmp_path}/target/rows"):
        assert redact(f"{form}:3") == "${oc.env:FOLDER}:3"


def test_a_default_is_no_secret(monkeypatch, rows_file):
    """It stands in the config; a value that is not used is not hidden either."""
    monkeypatch.delenv("NOT_SET", raising=False)
    given = {"datasets": [str(rows_file)], "model": {"name_or_path": "${oc.env:NOT_SET,tiny}"}}
    load_config(given | {"chat_template": "${oc.env:NOT_SET,chatml}"})
    assert redact("tiny chatml") == "tiny chatml"


def test_a_list_that_python_changed_keeps_its_variables(monkeypatch, rows_file, tmp_path):
    """An entry more or fewer does not resolve the others in the saved config."""
    monkeypatch.setenv("DATA", str(rows_file))
    other = str(shutil.copy(rows_file, tmp_path / "other.jsonl"))
    given = {
        "datasets": [other, "${oc.env:DATA}"],
        "model": {"name_or_path": "tiny"},
        "eval_datasets": "${oc.env:DATA}",
    }
    config = load_config(given)

    def paths(key: str = "datasets") -> list[str]:
        entries = yaml.safe_load(config_yaml(config))[key]
        return [entry["path"] if isinstance(entry, dict) else entry for entry in entries]

    saved = yaml.safe_load(config_yaml(config))
    assert saved["datasets"][1] == saved["eval_datasets"] == "${oc.env:DATA}"
    config.datasets.insert(0, DatasetConfig("c.jsonl"))
    config.eval_datasets[0].weight = 0.5
    assert paths() == ["c.jsonl", other, "${oc.env:DATA}"] and paths("eval_datasets") == ["${oc.env:DATA}"]
    config.datasets[:2] = []
    assert paths() == ["${oc.env:DATA}"]
