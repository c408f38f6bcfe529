"""The token cache: right, lazy, atomic, and never stale."""

import dataclasses
import fcntl
import json
import os
import time
from pathlib import Path

import pytest
import torch

from minitrain.config.schema import Config
from minitrain.config.sections import ModelConfig
from minitrain.data import cache as cache_module
from minitrain.data import cache_writer
from minitrain.data.cache import TokenCache, load_cache
from minitrain.data.examples import ROW_FORMATS, Conversation, assistant, format_sources, row_format, to_example, user
from minitrain.data.template import Template
from minitrain.errors import DataError
from minitrain.io.temp_files import building_folder
from minitrain.model.tiny import tiny_tokenizer
from tests.messages import raises, reports

ROWS = [{"prompt": f"{i} + 1 =", "response": str(i + 1) * (1 + i % 7)} for i in range(1000)]
BAD = '{"prompt": "cut'


def contents(cache: TokenCache) -> list[tuple[list[int], list[int]]]:
    return [(document.ids.tolist(), document.mask.tolist()) for i in range(len(cache)) for document in cache[i]]


def files_in(config) -> list[Path]:
    return sorted(Path(config.cache_dir).iterdir()) if Path(config.cache_dir).exists() else []


@pytest.fixture
def no_encoding(monkeypatch):
    """Called, it lets any further tokenising fail the test."""

    def forbid():
        monkeypatch.setattr(Template, "render", lambda *_: pytest.fail("tokenised again"))

    return forbid


@pytest.fixture
def two_processes(monkeypatch):
    """Makes small files go through worker processes too."""
    monkeypatch.setattr(cache_module, "SMALL_FILE_BYTES", 0)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def test_documents_are_what_the_template_gives(jsonl, config, template):
    """Each document is read back as its row was encoded, in the order of the file."""
    entry = jsonl(ROWS[:50])
    expected = [template.encode(to_example(row, entry)) for row in ROWS[:50]]
    cache = load_cache(entry, template, config)
    assert contents(cache) == [(tokens.ids, [int(flag) for flag in tokens.mask]) for tokens in expected]
    assert cache.lengths.tolist() == [len(tokens.ids) for tokens in expected]


def test_second_start_tokenises_nothing(jsonl, config, template, no_encoding):
    """The same file and options are read from the cache; path, weight and num_proc do not matter."""
    first = contents(load_cache(jsonl(ROWS[:50]), template, config))
    no_encoding()
    config.num_proc = 2
    again = load_cache(jsonl(ROWS[:50], "renamed.jsonl", weight=2.5), template, config)
    assert contents(again) == first and len(files_in(config)) == 1


def changed_template(**options) -> Template:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"unk_token": "<|pad|>"} if options.pop("special", False) else {})
    if options.pop("vocabulary", False):
        tokenizer.add_tokens(["12"])
    return Template(tokenizer, **options)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [*ROWS[:49], {"prompt": "49 + 1 =", "response": "51"}]},
        {"entry": {"n_examples": 49}},
        {"entry": {"type": "prompt_response"}},
        {"entry": {"columns": {"prompt": "response"}}},
        {"entry": {"prompt_template": "{prompt}?"}},
        {"entry": {"response_template": "{response}."}},
        {"config": {"max_length": 512}},
        {"config": {"truncation": "drop"}},
        {"template": {"train_on": "last_turn"}},
        {"template": {"chat_template": "none"}},
        {"template": {"special": True}},
        {"template": {"vocabulary": True}},
        {"format": 99},
    ],
    ids=str,
)
def test_everything_that_matters_is_in_the_key(jsonl, config, template, monkeypatch, change):
    """Each thing that determines the tokens makes another cache, so that nothing stale is read."""
    load_cache(jsonl(ROWS[:50]), template, config)
    monkeypatch.setattr(cache_module, "FORMAT", change.get("format", cache_module.FORMAT))
    config = dataclasses.replace(config, **change.get("config", {}))
    entry = jsonl(change.get("rows", ROWS[:50]), **change.get("entry", {}))
    load_cache(entry, changed_template(**change["template"]) if "template" in change else template, config)
    assert len(files_in(config)) == 2


@pytest.fixture
def own_schemas():
    """What a test registers is gone after it."""
    before = dict(ROW_FORMATS)
    yield
    ROW_FORMATS.clear()
    ROW_FORMATS.update(before)


RIDDLES = [{"riddle": f"{i} + 1", "solution": str(i + 1)} for i in range(3)]


def riddle(row, dataset):
    return Conversation([user(row["riddle"]), assistant(row["solution"])])


def riddle_with_a_dot(row, dataset):
    return Conversation([user(row["riddle"] + "."), assistant(row["solution"])])


def test_a_new_format_reads_the_rows_that_an_old_cache_left_out(jsonl, config, template, own_schemas):
    """A cache that was written before the format was registered does not hide its rows, nor one of other code."""
    config.on_bad_row, entry = "skip", jsonl([*ROWS[:2], *RIDDLES])
    assert len(load_cache(entry, template, config)) == 2
    register = row_format("riddle", "conversation", "riddle", "solution")
    register(riddle)
    first = load_cache(entry, template, config)
    assert len(first) == 5 and not first.counts
    register(riddle_with_a_dot)
    assert contents(load_cache(entry, template, config))[2:] != contents(first)[2:]


@pytest.mark.parametrize(
    ("kind", "type"), [("preference", None), ("conversation", "messages")], ids=["other kind", "other type"]
)
def test_a_format_that_is_not_used_is_not_in_the_key(kind, type, own_schemas):
    """Caches, and the files of teachers that name them, outlive formats of other kinds of rows."""
    before = format_sources(kind, type)
    row_format("riddle", "conversation", "riddle", "solution")(riddle)
    assert format_sources(kind, type) == before != []
    assert format_sources("conversation", None)[-1][0] == "riddle"


def test_a_format_typed_into_an_interpreter_is_in_the_key(own_schemas):
    """There is no source to read, but code."""
    found = []
    for text in ("row['riddle']", "row['solution']['a']"):
        scope = {}
        exec(f"def convert(row, dataset):\n    return {text}", scope)
        row_format("riddle", "conversation", "riddle", "solution")(scope["convert"])
        found.append(format_sources("conversation", "riddle"))
    assert found[0] != found[1]


def test_key_is_the_same_for_a_tokenizer_made_again(jsonl, config, template, no_encoding):
    """The key depends on what the tokenizer is, not on which object it is or what it was used for."""
    entry = jsonl(ROWS[:50])
    load_cache(entry, template, config)
    no_encoding()
    again = Template(tiny_tokenizer())
    again.tokenizer(["a"], padding="max_length", truncation=True, max_length=4)
    load_cache(entry, again, config)


def test_processes_change_nothing(jsonl, config, template, two_processes):
    """One and two processes write the same bytes."""
    entry = jsonl(ROWS)
    load_cache(entry, template, config)
    (path,) = files_in(config)
    alone = path.read_bytes()
    path.unlink()
    config.num_proc = 2
    load_cache(entry, template, config)
    assert files_in(config) == [path] and path.read_bytes() == alone


def test_cache_is_mapped_and_not_read(jsonl, config, template):
    """Token ids stay in the file until they are used: tensors and documents lie in a mapping of it."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    cache = load_cache(jsonl(ROWS), template, config)
    lines = [line for line in maps.read_text().splitlines() if line.endswith(cache.path.name)]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    for tensor in (cache.ids, cache.mask, cache[3][0].ids, cache[3][0].mask):
        assert any(start <= tensor.data_ptr() < end for start, end in spans)


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_row(jsonl, config, template, two_processes, processes):
    """A bad row is an error with file, line and reason, out of worker processes as well; nothing is left behind."""
    config.num_proc = processes
    entry = jsonl([*ROWS[:700], BAD, *ROWS[700:]])
    with raises(DataError, "invalid-json", "rows.jsonl:701: ", "on_bad_row=skip"):
        load_cache(entry, template, config)
    entry = jsonl([*ROWS[:700], {"prompt": "x", "response": ""}, *ROWS[700:]])
    with raises(DataError, "no-answer", "rows.jsonl:701: response"):
        load_cache(entry, template, config)
    assert files_in(config) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_rows_are_skipped_and_counted(jsonl, config, template, two_processes, capsys, processes):
    """on_bad_row=skip leaves bad rows out, names the first three and counts them all, each time."""
    config.num_proc, config.on_bad_row = processes, "skip"
    entry = jsonl([*ROWS[:300], *[BAD] * 4, *ROWS[300:600]])
    cache = load_cache(entry, template, config)
    assert len(cache) == 600 and cache.counts == {"bad-rows": 4}
    assert load_cache(entry, template, config).counts == {"bad-rows": 4}
    said = capsys.readouterr()
    named = [reports(said.out + said.err, "invalid-json", f"rows.jsonl:{n}: ") for n in range(301, 305)]
    assert named == [True, True, True, False]


def test_too_many_bad_rows(jsonl, config, template):
    """max_bad_rows is the most that are left out."""
    config.on_bad_row, config.max_bad_rows = "skip", 2
    assert len(load_cache(jsonl([*ROWS[:9], BAD, BAD]), template, config)) == 9
    with raises(DataError, "invalid-json", "rows.jsonl:12: ", "max_bad_rows=2"):
        load_cache(jsonl([*ROWS[:9], BAD, BAD, BAD]), template, config)


def test_cache_made_with_skipping_does_not_hide_bad_rows(jsonl, config, template):
    """A cache made with bad rows left out is not taken where they are errors, or where fewer are allowed."""
    entry = jsonl([*ROWS[:9], BAD, BAD])
    load_cache(entry, template, dataclasses.replace(config, on_bad_row="skip"))
    with raises(DataError, "invalid-json", "rows.jsonl:10: "):
        load_cache(entry, template, config)
    with raises(DataError, "invalid-json", "max_bad_rows=1"):
        load_cache(entry, template, dataclasses.replace(config, on_bad_row="skip", max_bad_rows=1))


def test_n_examples(jsonl, config, template):
    """n_examples takes the first so many; what stands behind them is not looked at, bad rows either."""
    cache = load_cache(jsonl([*ROWS[:5], BAD, *ROWS[5:]], n_examples=5), template, config)
    assert contents(cache) == contents(load_cache(jsonl(ROWS[:5]), template, config))
    config.on_bad_row = "skip"
    cache = load_cache(jsonl([*ROWS[:5], BAD, *ROWS[5:]], n_examples=6), template, config)
    assert len(cache) == 6 and cache.counts == {"bad-rows": 1}


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_file(tmp_path, jsonl, config, template, text):
    """A file without rows is an error that names it."""
    entry = jsonl([])
    Path(entry.path).write_text(text)
    with raises(DataError, "no-data", "rows.jsonl: "):
        load_cache(entry, template, config)


def test_missing_file(jsonl, config, template):
    """A file that vanished after the config was checked is an error that names it."""
    entry = jsonl(ROWS[:5])
    Path(entry.path).unlink()
    with raises(DataError, "unreadable", "rows.jsonl: "):
        load_cache(entry, template, config)


def test_folder_that_cannot_be_written(tmp_path, jsonl, config, template):
    """A cache folder that cannot be made is an error that says what to set."""
    (tmp_path / "file").write_text("")
    config.cache_dir = str(tmp_path / "file" / "cache")
    with raises(DataError, "not-writable", "file/cache: ", "cache_dir"):
        load_cache(jsonl(ROWS[:5]), template, config)


def test_full_disk(jsonl, config, template, monkeypatch):
    """A disk that is full says so, and leaves neither a cache nor debris."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_writer, "start_file", full)
    with raises(DataError, "no-space", "cache_dir"):
        load_cache(jsonl(ROWS[:5]), template, config)
    assert files_in(config) == []


@pytest.mark.parametrize("where", ["encoding", "joining"])
def test_interrupted_build(jsonl, config, template, monkeypatch, where):
    """Ctrl-C in the middle leaves no cache and no debris; the next start makes it from the beginning."""
    entry = jsonl(ROWS[:600])
    original = Template.render

    def interrupted(self, record):
        if record.messages[0]["content"].startswith("500 "):
            raise KeyboardInterrupt
        return original(self, record)

    with monkeypatch.context() as patched:
        if where == "encoding":
            patched.setattr(Template, "render", interrupted)
        else:
            patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load_cache(entry, template, config)
    assert files_in(config) == []
    assert len(load_cache(entry, template, config)) == 600


def test_debris_of_a_killed_build_is_removed(jsonl, config, template):
    """What a killed process left is removed by the next one that makes a cache, and not what is still being made.

    Without a lock, as where files cannot be locked, it is removed a day later.
    """
    old, young, dead = (Path(config.cache_dir, f".building-{name}") for name in ("old", "young", "dead"))
    for folder in (old, young, dead):
        folder.mkdir(parents=True)
        (folder / "ids").write_bytes(b"x")
    (dead / "lock").touch()
    os.utime(old, (time.time() - 90000,) * 2)
    with building_folder(Path(config.cache_dir)) as at_work:
        os.utime(at_work, (time.time() - 90000,) * 2)
        dead.mkdir(exist_ok=True)
        (dead / "lock").touch()
        load_cache(jsonl(ROWS[:5]), template, config)
        assert at_work.exists() and young.exists() and not dead.exists() and not old.exists()
    assert not at_work.exists()


def test_a_folder_where_files_cannot_be_locked(jsonl, config, template, monkeypatch):
    """As on some network file systems: a cache is made there, and one that another process makes is let alone."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    Path(config.cache_dir).mkdir()
    with building_folder(Path(config.cache_dir)) as at_work:
        assert len(load_cache(jsonl(ROWS[:5]), template, config)) == 5 and at_work.exists()


def tensor_bytes(content: bytes, name: str) -> slice:
    """Where a tensor is in a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + size])[name]["data_offsets"]
    return slice(8 + size + begin, 8 + size + end)


def overwrite(content: bytes, name: str, byte: int) -> bytes:
    """A tensor of one byte repeated, as a disk may give back a page of zeros."""
    place = tensor_bytes(content, name)
    return content[: place.start] + bytes([byte]) * (place.stop - place.start) + content[place.stop :]


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE = {
    "cut": lambda content: content[:-10],
    "empty": lambda content: b"",
    "garbage": lambda content: b"x" * 100,
    "ids of zeros": lambda content: overwrite(content, "ids", 0),
    "masks of zeros": lambda content: overwrite(content, "mask", 0),
    "masks of 255": lambda content: overwrite(content, "mask", 255),
    "offsets of zeros": lambda content: overwrite(content, "offsets", 0),
    "one bit": lambda content: flip(content, tensor_bytes(content, "ids").start + 40),
    "a count": lambda content: content.replace(b'"counts": "{}"', b'"counts": "{ }"'),
    "the checksum": lambda content: flip(content, content.index(b'"checksum": "') + 13),
    "no checksum": lambda content: content.replace(b'"checksum"', b'"checksun"'),
    "longer": lambda content: content + b"x",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_made_again(jsonl, config, template, damage, capsys):
    """Whatever has changed in it: it is reported, and never trained on."""
    entry = jsonl(ROWS[:50])
    expected = contents(load_cache(entry, template, config))
    (path,) = files_in(config)
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole))
    assert path.read_bytes() != whole
    assert contents(load_cache(entry, template, config)) == expected
    assert path.read_bytes() == whole
    assert reports(capsys.readouterr().out, "damaged-file", f"{path}: ", entry.path)


def test_killed_worker(jsonl, config, template, two_processes, monkeypatch):
    """A worker that the system kills, for want of memory for one, is an error that says what to set."""
    monkeypatch.setattr(Template, "render", lambda *_: os._exit(9))
    config.num_proc = 2
    with raises(DataError, "process-failed", "rows.jsonl: ", "num_proc"):
        load_cache(jsonl(ROWS), template, config)
    assert files_in(config) == []


def test_cache_is_plain_safetensors(jsonl, config, template):
    """Any reader of safetensors can open it; there is no pickle in it."""
    from safetensors.torch import load_file

    cache = load_cache(jsonl(ROWS[:51]), template, config)
    tensors = load_file(cache.path)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "offsets": torch.int64,
        "lines": torch.int64,
        "shared": torch.int32,
        "first_documents": torch.int64,
        "ids": torch.int32,
        "mask": torch.uint8,
    }
    header = cache.path.read_bytes()[8:]
    metadata = json.loads(header[: header.index(b"}}") + 2])["__metadata__"]
    assert len(metadata.pop("checksum")) == 8
    assert metadata == {
        "counts": "{}",
        "labels": "[]",
    }


def test_default_folder(monkeypatch, tmp_path):
    """Without cache_dir the tokens are kept where the system keeps caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_module.cache_folder(Config(model=ModelConfig("tiny"))) == tmp_path / "minitrain"


def test_processes_do_not_run_ahead():
    """Results come in the order of the file, and only some chunks are read ahead, so that memory stays bounded."""
    read = 0

    def chunks():
        nonlocal read
        for read in range(1, 41):
            yield [read]

    results = cache_module._in_processes(list, chunks(), 2)
    assert next(results) == [1] and read <= 9
    assert list(results) == [[i] for i in range(2, 41)]
