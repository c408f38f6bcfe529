"""The documents tell the truth: their tables name our options and commands, their YAML and commands are understood."""

import ast
import inspect
import itertools
import re
import runpy
import shlex
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from minitrain import load_config
from minitrain.cli.main import _config_first
from minitrain.cli.registry import COMMANDS
from minitrain.config.aliases import resolve_aliases
from minitrain.config.issues import ConfigIssues, ConfigSource, check_types
from minitrain.config.load import _apply_overrides, _expand_short_forms
from minitrain.config.schema import LISTS, Config, aliases, all_keys
from minitrain.config.sections import DatasetConfig
from minitrain.data import sandbox
from minitrain.losses import loss_options, registered
from tests.commands import PARSERS
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
GENERATED = {
    "options.md": "generate_options.py",
    "commands.md": "generate_commands.py",
    "migrating.md": "generate_migrating.py",
    "migrating-grpo.md": "generate_migrating.py",
    "api.md": "generate_api.py",
    "errors.md": "generate_errors.py",
    "architectures.md": "generate_architectures.py",
}
BY_NAME = {"ids": lambda page: page.name}
LOSS_OPTIONS = {name: [f.name for f in fields(loss.options_class)] for name, loss in registered().items()}
KEYS = {*all_keys(), *aliases(), "loss.name", *(f"loss.{key}" for keys in LOSS_OPTIONS.values() for key in keys)}
KEYS |= {f"{name}[0].{f.name}" for name in LISTS for f in fields(DatasetConfig)}


def tables(page: Path, header: list[str]) -> list[tuple[str, list[str]]]:
    """(place, items in backticks of the second column) of each row under this header."""
    rows, inside = [], False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        inside = cells == header or (inside and len(cells) == len(header))
        if inside and cells != header and set(line) - set("|-: "):
            rows.append((f"{page.name}:{number}", re.findall(r"`([^`]+)`", cells[1].replace("\\|", "|"))))
    return rows


def words(item: str) -> list[str]:
    """The overrides in one pair of backticks; spaces inside of brackets, braces and quotes belong to a value."""
    return re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|[^\s\[{\"])+", item)


def problems_of(item: str) -> list[str]:
    """What is wrong with ``key`` or ``key=value``, or several of them, by the schema's names, types and limits."""
    overrides = words(item)
    keys = [word.partition("=")[0].replace("datasets.0.", "datasets[0].") for word in overrides]
    if unknown := [key for key in keys if key not in KEYS]:
        return [f"there is no option {', '.join(unknown)}"]
    raw = OmegaConf.create(
        {"datasets": [{"path": "a"}], "eval_datasets": [{"path": "b"}], "model": {"name_or_path": "c"}}
    )
    found = ConfigIssues(ConfigSource("page"))
    _apply_overrides(raw, [word for word in overrides if "=" in word], found, loss_options)
    given = resolve_aliases(_expand_short_forms(OmegaConf.to_container(raw)), loss_options)
    check_types(Config, given, "", found)
    loss = dict(given.get("loss", {}))
    name = loss.pop("name", None)
    if name is not None and name not in LOSS_OPTIONS:
        return [f"there is no loss {name}"]
    asked = {key.removeprefix("loss.") for key in keys if key.startswith("loss.")} - {"name"}
    takers = [one for one in ([name] if name else LOSS_OPTIONS) if asked <= {*LOSS_OPTIONS[one]}]
    if not takers:
        return [f"{f'loss {name} has not' if name else 'no loss has'} all of {', '.join(sorted(asked))}"]
    attempts = [check_loss(one, loss) for one in takers if asked]
    return [str(issue) for _, issue in found.entries] + min(attempts, key=len, default=[])


def check_loss(name: str, given: dict) -> list[str]:
    """What one loss has against these options. One that must be given may stand elsewhere."""
    found = ConfigIssues(ConfigSource("page"))
    schema = registered()[name].options_class
    needed = {f.name for f in fields(schema) if f.default is MISSING and f.default_factory is MISSING}
    found.reported.update(f"loss.{key}" for key in needed - set(given))
    check_types(schema, given, "loss.", found)
    return [str(issue) for _, issue in found.entries]


def problems_of_command(text: str) -> list[str]:
    """What is wrong with a command line that begins with minitrain, python, torchrun or make."""
    line = shlex.split(re.sub(r" \.\.\.$", "", text))
    if line[0] == "make":
        known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        return [f"there is no target {target}" for target in line[1:] if target not in known]
    if "-m" in line and line[line.index("-m") + 1 :][:1] == ["minitrain"]:
        line = line[line.index("-m") + 1 :]
    if line[0] in ("python", "torchrun"):
        script = next((word for word in line if word.endswith(".py")), "")
        if script != "train.py":
            return [] if (ROOT / script).is_file() else [f"there is no file {script}"]
        line = ["minitrain", "train", *line[line.index("train.py") + 1 :]]
    line = [line[0], *_config_first(line[1:])]
    known = PARSERS | {alias: PARSERS[one.name] for one in COMMANDS.values() for alias in one.aliases}
    if line[1:2] == ["--help"] or len(line) == 1:
        return []
    if line[1] not in known:
        return [f"there is no command {line[1]}"]
    options = {option for action in known[line[1]]._actions for option in action.option_strings}
    found = [f"{line[1]} has no {word}" for word in line[2:] if word.startswith("--") and word not in options]
    if "--overrides" in line:
        behind = line[line.index("--overrides") + 1 :]
        stop = next((i for i, word in enumerate(behind) if word.startswith("--")), len(behind))
        found += [told for word in behind[:stop] for told in problems_of(word)]
    return found


def is_command(item: str) -> bool:
    return item.split()[0] in ("minitrain", "python", "torchrun", "make")


# ------------------------------------------------------------------------------------------------ tables of keys


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], **BY_NAME)
def test_headers_of_tables_name_every_column(page):
    lines = page.read_text().splitlines()
    headers = [line for line, below in itertools.pairwise(lines) if re.fullmatch(r"\|[-:|]+\|", below)]
    assert [line for line in headers if not all(cell.strip() for cell in line[1:-1].split("|"))] == []


def test_the_options_of_the_adapters_exist():
    """Each item of the second column of the README's table is an override that the schema takes, or a command."""
    adapters = tables(ROOT / "README.md", ["adapter", "option", "notes"])
    assert len(adapters) > 5
    assert [told for place, here in adapters for told in problems_of_items(place, here)] == []


def problems_of_items(place: str, items: list[str]) -> list[str]:
    """What is wrong with overrides and commands."""
    return [
        f"{place}: `{item}`: {told}"
        for item in items
        for told in (problems_of_command(item) if is_command(item) else problems_of(item))
    ]


@pytest.mark.parametrize(
    ("item", "wrong"),
    [
        ("lr", False),
        ("batch_size=8", False),
        ("lora.rank=16 lora.alpha=32", False),
        ("loss.beta", False),
        ("loss.variant=ipo loss.beta=0.1", False),
        ("loss.name=kd loss.teacher=big loss.temperature=1", False),
        ("datasets=[{path: a.jsonl, weight: 2}]", False),
        ("datasets[0].columns={prompt: q, response: a}", False),
        ("learning_rate", True),
        ("lr=fast", True),
        ("lora.rank=-1", True),
        ("model.policy_dtype=bf16", True),
        ("loss.variant=kto_pair", True),
        ("loss.name=sft loss.beta=0.1", True),
        ("loss.name=sftt", True),
        ("datasets[0].colums", True),
    ],
)  # fmt: skip
def test_the_check_of_the_tables_finds_what_is_wrong(item, wrong):
    """The rule by which the tables are read takes what the schema takes, and nothing else."""
    assert bool(problems_of(item)) == wrong


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("minitrain merge RUN --output DIR", False),
        ("torchrun --nproc_per_node=4 train.py config.yml --overrides trainer=FSDPTrainer", False),
        ("torchrun --nproc_per_node=4 -m minitrain train config.yml --overrides trainer=FSDPTrainer", False),
        ("torchrun --nproc_per_node=4 -m minitrain trian config.yml", True),
        ("minitrain export RUN", True),
        ("minitrain merge --into DIR", True),
        ("python train.py config.yml --overrides learning_rate=1", True),
        ("make everything", True),
    ],
)
def test_the_check_of_command_lines_finds_what_is_wrong(line, wrong):
    """The same for commands."""
    assert bool(problems_of_command(line)) == wrong


# ------------------------------------------------------------------------------------------- YAML, Python, commands


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks, but for those of other libraries, which begin with a comment that says so: ``# there: NAME``."""
    found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)
    return [block for block in found if not block.startswith("# there: ")]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], **BY_NAME)
def test_yaml_in_the_documents_is_understood(page, monkeypatch, tmp_path):
    """Each block passes all checks of a config. Files that are only examples are made up, as is a model for a part."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "yaml"):
        given = yaml.safe_load(block)
        given.setdefault("model", {}).setdefault("name_or_path", "tiny")
        given.setdefault("datasets", "data.jsonl")
        make_files(given)
        load_config(given)


def make_files(given: dict) -> None:
    """What a config names and nobody has: data, a template, an archive, an adapter."""
    entries = [entry for key in LISTS for entry in as_list(given.get(key, []))]
    paths = [entry["path"] if isinstance(entry, dict) else entry for entry in entries]
    paths += [given.get("chat_template"), given["model"].get("archive")]
    paths = [path for path in paths if path and Path(path).suffix]  # what has none is a name of something else
    if given["model"].get("adapter"):
        paths.append(given["model"]["adapter"] + "/adapter_config.json")
    for path in map(Path, paths):
        assert not path.is_absolute(), f"{path}: an example names a relative path"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in (given["model"]["name_or_path"], as_dict(given.get("loss")).get("teacher", "tiny")):
        if name.count("/") > 1 or name.startswith("."):
            Path(name).mkdir(parents=True, exist_ok=True)
            (Path(name) / "config.json").touch()


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def as_dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def unrolled(block: str) -> str:
    """A block with one line for each command, and the first value of each loop variable."""
    for name, value in re.findall(r"^for (\w+) in (\S+)", block, re.M):
        block = block.replace(f"${name}", value)
    return block.replace("\\\n", " ")


@pytest.mark.parametrize("page", PAGES, **BY_NAME)
def test_commands_in_the_documents_exist(page):
    """Each line of a bash block that is ours names a command and options that there are."""
    lines = [line for block in blocks(page, "bash") for line in unrolled(block).splitlines() if line.strip()]
    ours = [line.split("  #")[0] for line in lines if is_command(line)]
    assert [f"{line}: {told}" for line in ours for told in problems_of_command(line)] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], **BY_NAME)
def test_python_in_the_documents_is_python(page):
    """It parses; what it does is the business of other tests."""
    for block in blocks(page, "python"):
        ast.parse(block)


# ------------------------------------------------------------------------------------------------ pages that are made


@pytest.mark.parametrize("page", GENERATED)
def test_a_generated_page_is_up_to_date(page, monkeypatch):
    """It is what its script makes, whatever the width of the terminal is."""
    monkeypatch.setenv("COLUMNS", "60")
    make = runpy.run_path(str(ROOT / "docs" / GENERATED[page]))["document"]
    file = ROOT / "docs" / page
    assert (make(file) if inspect.signature(make).parameters else make()) == file.read_text(), "run: make docs"


def test_links_in_the_documents_lead_somewhere():
    """Every relative link of README and docs/ exists."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], **BY_NAME)
def test_links_to_headings_lead_to_one(page):
    """What stands behind # in a link is a heading of that page, as GitHub names it."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        headings = re.findall(r"^#+ (.*)$", (page.parent / target if target else page).read_text(), re.M)
        assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor


def test_the_readme_and_the_start_page_link_every_page():
    readme, index = (ROOT / "README.md").read_text(), (ROOT / "docs" / "index.md").read_text()
    assert [page.name for page in PAGES if f"](docs/{page.name}" not in readme] == []
    assert [page.name for page in PAGES if f"]({page.name}" not in index and page.name != "index.md"] == []


# ------------------------------------------------------------------------------------------ the walk through the code


AFTERNOON = (ROOT / "docs" / "afternoon.md").read_text()
STOPS = re.findall(r"^\| `(minitrain/\S+)` \|", AFTERNOON, re.M)


def test_the_files_of_the_walk_exist():
    assert len(STOPS) > 20
    assert all((ROOT / file).is_file() for file in STOPS)


def test_the_names_of_the_walk_are_in_the_code():
    """Functions, classes and attributes that it points to are there, those of a table in the file of their row."""
    for file, told in re.findall(r"^\| `(minitrain/\S+)` \| (.*) \|$", AFTERNOON, re.M):
        text = (ROOT / file).read_text()
        for name in re.findall(r"`([A-Za-z_][\w.]*)`", told):
            there = all(re.search(rf"\b{part}\b", text) for part in name.split("."))
            assert there or name.endswith(".py"), (file, name)
    code = "".join(path.read_text() for path in (ROOT / "minitrain").rglob("*.py"))
    prose = AFTERNOON[: AFTERNOON.index("## Exercises")]
    for name in re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)?)`", prose):
        assert name.endswith(".py") or all(part in code for part in name.split(".")), name


def test_the_bounds_of_templates_are_those_of_the_code():
    """docs/data.md says them in words."""
    text = " ".join((ROOT / "docs" / "data.md").read_text().split())
    assert f"may take {sandbox.MAX_SECONDS:g} seconds" in text
    assert f"may be {sandbox.MAX_SIZE // 10**6} million characters and items" in text
    assert f"and {sandbox.SIZE_PER_CHARACTER:,} more for each character of the conversation" in text
