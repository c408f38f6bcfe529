"""Parquet files, folders with a data set, and data sets on the hub: what is read, what is told."""

import json
import sys
from pathlib import Path

import pytest

from minitrain import ConfigError, DataError, load_config
from minitrain.cli.main import main
from minitrain.config.sections import DatasetConfig
from minitrain.data.cache import load_cache
from minitrain.data.files import read_rows
from minitrain.data.source import is_file, open_source
from minitrain.errors import UnreachableError
from minitrain.io import hub
from tests.messages import raises, reports

datasets = pytest.importorskip("datasets")

ROWS = [{"prompt": f"say {i}", "response": "ab" * (1 + i % 5)} for i in range(30)]
PAIRS = {"sentence1": ["a", "b", "c"], "sentence2": ["a", "x", "c"], "label": [1, 0, 1], "idx": [0, 1, 2]}
NAMES = ["not_equivalent", "equivalent"]


def pairs(**changes):
    """Three rows of MRPC as GLUE on the hub has them: labels are numbers that have names."""
    values = {name: datasets.Value("string") for name in ("sentence1", "sentence2")}
    features = values | {"label": datasets.ClassLabel(names=NAMES), "idx": datasets.Value("int32")}
    return datasets.Dataset.from_dict(PAIRS | changes, features=datasets.Features(features))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data set in a folder, as it is downloaded from the hub: two configurations, two splits."""
    entries = []
    for name, chosen in (("short", ROWS[:10]), ("long", ROWS)):
        for split, rows in (("train", chosen), ("test", chosen[:4])):
            file = tmp_path / "set" / name / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(file)
        files = "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in ("train", "test"))
        entries.append(f"- config_name: {name}\n  data_files:\n{files}")
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{''.join(entries)}---\n")
    return tmp_path / "set"


def test_parquet_has_the_rows_of_any_file(tmp_path, template, config, jsonl):
    """The same tokens as from JSON Lines, and the number of a row in the place of its line."""
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    one = load_cache(jsonl(ROWS), template, config)
    other = load_cache(DatasetConfig(str(tmp_path / "rows.parquet")), template, config)
    assert other.ids.tolist() == one.ids.tolist() and other.mask.tolist() == one.mask.tolist()
    assert other.lines.tolist() == list(range(1, 31))
    datasets.Dataset.from_list([*ROWS[:3], {"prompt": "a", "response": ""}]).to_parquet(tmp_path / "bad.parquet")
    with raises(DataError, "no-answer", "bad.parquet:4: response"):
        load_cache(DatasetConfig(str(tmp_path / "bad.parquet")), template, config)


def test_labels_by_name_and_empty_columns(tmp_path):
    """Numbers that stand for labels become these; -1, as in GLUE's test files, is told; an empty column is gone."""
    file = tmp_path / "pairs.parquet"
    pairs(label=[1, 0, -1], sentence2=["a", None, "c"]).to_parquet(file)
    rows = [row for _, row in read_rows(file)]
    assert rows[0] == {"sentence1": "a", "sentence2": "a", "label": "equivalent", "idx": 0}
    assert rows[1] == {"sentence1": "b", "label": "not_equivalent", "idx": 1}
    assert reports(rows[2], "invalid-row", "label: ", "-1", "not_equivalent, equivalent")


def test_labels_of_a_folder(tmp_path, template, config):
    """The same through `datasets`; -1 has the number of its row."""
    (tmp_path / "glue").mkdir()
    pairs().to_parquet(tmp_path / "glue" / "train.parquet")
    pairs(label=[1, 0, -1]).to_parquet(tmp_path / "glue" / "test.parquet")
    cache = load_cache(DatasetConfig(str(tmp_path / "glue")), template, config, "classification")
    assert sorted(cache.labels) == sorted(NAMES) and len(cache) == 3
    assert [cache.labels[int(number)] for number in cache.doc_features["label"]] == [NAMES[i] for i in PAIRS["label"]]
    with raises(DataError, "invalid-row", "glue:test:3: label: ", "-1"):
        load_cache(DatasetConfig(str(tmp_path / "glue"), split="test"), template, config, "classification")


@pytest.mark.parametrize("spoil", [lambda data: b"PAR1 no", lambda data: data[:-20], lambda data: b""])
def test_what_is_no_parquet(tmp_path, spoil):
    """Wrong, cut and empty files are told in one line."""
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(file)
    file.write_bytes(spoil(file.read_bytes()))
    with raises(DataError, "invalid-table", "rows.parquet: ") as caught:
        list(read_rows(file))
    assert "\n" not in str(caught.value)


def test_a_folder_has_configurations_and_splits(folder, template, config):
    """`name` and `split` choose; what is not there is told with what is."""

    def size(**options) -> int:
        return len(load_cache(DatasetConfig(str(folder), **options), template, config))

    assert (size(name="short"), size(name="long"), size(name="long", split="test")) == (10, 30, 4)
    assert size(name="long", n_examples=7) == 7
    with raises(DataError, "unreadable", "set: ", "short", "long"):
        size()
    with raises(DataError, "unreadable", "set: ", "tset", "train", "test"):
        size(name="long", split="tset")


def test_a_folder_whose_files_differ(tmp_path, template, config):
    """Rows of other columns are an error that names the way out, since `datasets` reads all of them as one table."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "set" / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    with raises(DataError, "unreadable", "set:train: "):
        load_cache(DatasetConfig(str(tmp_path / "set")), template, config)


def test_the_cache_of_a_folder_is_that_of_its_bytes(folder, template, config):
    """Made anew when a file changes, also within the same second, and not when only its time does."""
    entry = DatasetConfig(str(folder), name="short")
    first = load_cache(entry, template, config).key
    file = folder / "short" / "train-00000-of-00001.parquet"
    file.touch()
    assert load_cache(entry, template, config).key == first
    datasets.Dataset.from_list(ROWS[:9]).to_parquet(file)
    changed = load_cache(entry, template, config)
    assert changed.key != first and len(changed) == 9


def test_a_data_set_of_the_hub(monkeypatch, template, config):
    """Configuration, split and revision reach `datasets`; the fingerprint is part of the cache's key."""
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    entry, rows = DatasetConfig("openai/gsm8k", name="main", split="test", revision="v1"), ROWS[:5]
    first = load_cache(entry, template, config)
    assert asked == [("openai/gsm8k", {"name": "main", "split": "test", "revision": "v1", "streaming": False})]
    assert len(first) == 5 and first.source == "openai/gsm8k:test"
    rows = ROWS[:6]
    assert len(load_cache(entry, template, config)) == 6
    rows = [{"prompt": "a", "response": 3.5}, {"prompt": "a"}]
    with raises(DataError, "invalid-row", "openai/gsm8k:test:2: ", "columns: "):
        load_cache(entry, template, config)


@pytest.mark.parametrize(
    ("path", "options", "file"),
    [
        ("openai/gsm8k", {}, False),
        ("m-a-p/Code-Feedback", {}, False),
        ("allenai/tulu-v3.1-mix", {}, False),
        ("here", {}, False),  # a folder
        ("here/rows.txt", {}, True),
        ("here/rows", {}, True),  # there is a folder here/, so this is a file that is not
        ("here/rows", {"split": "train"}, False),
        ("there/rows.jsonl", {}, True),
        ("there/rows.PARQUET", {}, True),
        ("there/rows.jsonl.gz", {"split": "train"}, True),
        ("./rows", {}, True),
        ("../rows", {}, True),
        ("/rows/x", {}, True),
        ("a/b/c", {}, True),
        ("squad", {}, True),
        ("", {}, False),  # the current folder
    ],
)
def test_names_of_files_and_of_the_hub(tmp_path, monkeypatch, path, options, file):
    """A name on the hub is owner/name, and nothing that only a file can be called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_file(DatasetConfig(path, **options)) == file


@pytest.mark.parametrize(
    ("entry", "code", "part"),
    [
        ("data/foo.jsonl", "not-found", "datasets[0].path: data/foo.jsonl"),
        ("rows", "not-found", "Did you mean rows.jsonl?"),
        ("empty", "wrong-path", "datasets[0].path: empty"),
        ({"path": "rows.jsonl", "split": "test"}, "no-effect", "datasets[0].split: "),
        ({"path": "rows.jsonl", "name": "main"}, "no-effect", "datasets[0].name: "),
        ({"path": "set", "revision": "v1"}, "no-effect", "datasets[0].revision: "),
    ],
)
def test_entries_that_are_refused(folder, tmp_path, monkeypatch, entry, code, part):
    """Told with the config, before anything is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    with raises(ConfigError, code, part):
        load_config({"datasets": [entry], "model": {"name_or_path": "tiny"}})


def test_without_the_package(folder, tmp_path, monkeypatch):
    """One line says what to install, in the config and where a file is read without one."""
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    for path, package in ((folder, "datasets"), ("openai/gsm8k", "datasets"), (tmp_path / "rows.parquet", "pyarrow")):
        with raises(ConfigError, "not-installed", "datasets[0].path: ", package, "minitrain[data]"):
            load_config({"datasets": [str(path)], "model": {"name_or_path": "tiny"}})
    with raises(DataError, "not-installed", "pyarrow", "minitrain[data]"):
        list(read_rows(tmp_path / "rows.parquet"))
    with raises(DataError, "not-installed", "datasets", "minitrain[data]"):
        open_source(DatasetConfig(str(folder)))


@pytest.fixture
def silent_hub(monkeypatch):
    """As on a machine without a network; the number of requests is counted."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(type(get_session()), "send", refuse)
    hub.is_hub_reachable.cache_clear()
    yield asked
    hub.is_hub_reachable.cache_clear()


def test_a_silent_hub_is_asked_once(silent_hub, monkeypatch):
    """A data set and a model that are not there: one request for both, where the libraries make six for each and wait
    for 47 seconds between them; one line each."""
    from minitrain.config.sections import ModelConfig
    from minitrain.model.load import load_model, load_tokenizer

    download = "hf download openai/gsm8k --repo-type dataset --local-dir DIR"
    with raises(UnreachableError, "unreachable", "openai/gsm8k: ", "https:", download):
        open_source(DatasetConfig("openai/gsm8k"))
    model = ModelConfig("FacebookAI/roberta-base")
    for load in (load_tokenizer, lambda config: load_model(config, range(9), 0)):
        with raises(UnreachableError, "unreachable", "hf download FacebookAI/roberta-base --local-dir DIR") as caught:
            load(model)
        assert "\n" not in str(caught.value)
    assert len(silent_hub) == 1


def test_prompts_from_parquet(tmp_path, llama_folder):
    """`generate --input` takes a table; what JSON has no word for, a date, comes back as a text."""
    import datetime

    day = datetime.date(2024, 5, 17)
    datasets.Dataset.from_list([{"question": "say 1", "day": day}]).to_parquet(tmp_path / "asked.parquet")
    output = tmp_path / "answered.jsonl"
    source, limit = str(tmp_path / "asked.parquet"), ["--max-new-tokens", "2"]
    assert main(["generate", str(llama_folder), "--input", source, "--output", str(output), *limit]) == 0
    row = json.loads(output.read_text())
    assert row["question"] == "say 1" and row["day"] == "2024-05-17" and isinstance(row["response"], str)
