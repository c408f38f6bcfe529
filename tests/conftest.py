"""Fixtures: a random two-layer Llama with the embedded tokenizer, small data, and a trainer over both."""

import inspect
import itertools
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.messages import Snapshot
from tests.order import pytest_collection_modifyitems  # noqa: F401
from tests.processors import PROCESSOR, set_answers

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from minitrain import Trainer, load_config
from minitrain.cli.main import main
from minitrain.io import redact
from minitrain.losses import base
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_model, tiny_tokenizer
from tests.chats import THINKING, written

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell, and its children, ignore it
if PROCESSOR:
    set_answers(PROCESSOR)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"  # real data and models, which users do not have
DEADLINE = 300  # seconds for a command; none takes long, but on a machine that does much else


def pytest_addoption(parser):
    parser.addoption("--update-messages", action="store_true", help="write the messages of these tests to messages.txt")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name commands and functions in the ids of tests, which messages.txt has, instead of numbering them."""
    if isinstance(val, (list, tuple)) and all(isinstance(word, str) for word in val):
        return " ".join(val)[:80].encode("unicode_escape").decode()
    return val.__qualname__.partition(".")[0] if inspect.isfunction(val) else None


_deselected: set[str] = set()  # ids of tests


def pytest_deselected(items):
    _deselected.update(item.nodeid for item in items)


@pytest.fixture(scope="session")
def _snapshot(request, tmp_path_factory):
    update = request.config.getoption("--update-messages")
    assert not (update and hasattr(request.config, "workerinput")), "--update-messages needs a single process"
    partial = request.config.getoption("lf", False) or any("::" in path for path in request.config.args)
    collected = set() if partial else _deselected | {item.nodeid for item in request.session.items}
    snapshot = Snapshot(update, tmp_path_factory.getbasetemp(), collected)
    yield snapshot
    snapshot.save()


@pytest.fixture
def wording(request, _snapshot):
    """``wording(text)``: the message of this test is the one in messages.txt, the only place that has wordings."""
    return lambda text: _snapshot.compare(request.node.nodeid, text)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Token caches go to a temporary folder, never to the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _nothing_hidden(monkeypatch):
    """What one test takes from the environment is shown in the messages of the next one."""
    monkeypatch.setattr(redact, "_hidden", {})
    monkeypatch.setattr(redact, "_pattern", None)


@pytest.fixture
def own_registry():
    """What a test registers is gone after it."""
    before = dict(base._REGISTRY)
    yield
    base._REGISTRY.clear()
    base._REGISTRY.update(before)


def random_llama(**changes):
    """A Llama of 2 layers and width 32 over the embedded tokenizer, with weights large enough to matter."""
    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.2} | changes
    model = tiny_model(0, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, **shape)
    model.new_ids = []
    return model


def chain_model(tokenizer, *tokens: int, like=LlamaForCausalLM):
    """A model that says after each of these tokens the next one, after the last the last, and after others the first.

    It is so by construction: blocks add nothing, the embedding of token t is the unit vector t, and the row of the
    output layer of each token is the sum of the unit vectors that it follows.
    """
    n = len(tokenizer)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 1, "tie_word_embeddings": False}
    if like is LlamaForCausalLM:
        shape |= {"intermediate_size": 8}
    model = like(like.config_class(vocab_size=n, hidden_size=n + n % 2, **shape))
    for parameter in model.base_model.parameters():
        if parameter.ndim > 1:
            parameter.data.zero_()
    follows = dict.fromkeys(range(n), tokens[0]) | dict(zip(tokens, [*tokens[1:], tokens[-1]], strict=True))
    head, vectors = model.get_output_embeddings().weight.data.zero_(), model.get_input_embeddings().weight.data
    for before, after in follows.items():
        vectors[before, before] = head[after, before] = 1.0
    for end in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, end, getattr(tokenizer, end))
        setattr(model.generation_config, end, getattr(tokenizer, end))
    model.new_ids = []
    return model


def byte_tokenizer(hole: int = 0, spare: int = 0) -> PreTrainedTokenizerFast:
    """One token a byte and an EOS, without a chat template.

    `hole` ids are missing before the last bytes; `spare` more tokens are special ones that no text has.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {"<|end|>": 0} | {symbol: i + 1 + (hole if i > 200 else 0) for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<|spare-{i}|>" for i in range(spare)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory) -> str:
    """`byte_tokenizer` as a folder, without a model: beside one, transformers would add tokens of its own."""
    folder = tmp_path_factory.mktemp("bytes")
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def more_bytes_folder(tmp_path_factory) -> str:
    """The same with more tokens than the random Llama has rows."""
    folder = tmp_path_factory.mktemp("more-bytes")
    byte_tokenizer(spare=10).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """The random Llama as a folder that `from_pretrained` reads."""
    folder = tmp_path_factory.mktemp("llama")
    save_model(random_llama(), tiny_tokenizer(), folder, torch.float32)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """40 questions whose answers are of very different lengths."""
    rng = random.Random(0)
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"say {i}", "response": "ab" * rng.choice([1, 2, 5, 15])} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def make_trainer(tmp_path, llama_folder, rows_file):
    """``make_trainer("lr=0.1", ..., on_step_end=f)``: a trainer over the random Llama in a run directory of its own."""

    def make(*overrides: str, loss=None, **hooks) -> Trainer:
        base = {
            "datasets": [str(rows_file)],
            "model": {"name_or_path": str(llama_folder)},
            "output_dir": str(tmp_path / "runs"),
            "exp_name": "run",
            "total_batch_size": 8,
            "n_steps": 3,
            "lr": 1e-2,
            "log_every_steps": 1,
        }
        return Trainer(load_config(base, list(overrides)), loss=loss, **hooks)

    return make


@pytest.fixture
def turns(make_trainer, tmp_path):
    """``turns(rows, "packing=true")``: a trainer on rows with turns, with the template of tests/chats.py."""
    (tmp_path / "thinking.jinja").write_text(THINKING)
    numbers = itertools.count()

    def make(rows: list[dict], *options: str, **given):
        number = next(numbers)
        settings = [f"datasets=[{written(tmp_path / f'{number}.jsonl', rows)}]", f"exp_name={number}"]
        settings += [f"chat_template={tmp_path / 'thinking.jinja'}", "on_missing=warn"]
        return make_trainer(*settings, *options, **given)

    return make


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of all parameters by name."""
    return {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}


def metrics(trainer: Trainer, kind: str = "train") -> list[dict]:
    """The lines of metrics.jsonl of one kind."""
    lines = (trainer.run.path / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


# ------------------------------------------------------------------------------ a folder in which a user works

CONFIG = """\
datasets: [rows.jsonl]
model: {name_or_path: model}
output_dir: out
batch_size: 8
n_steps: 2
"""
GOOD_ROW = {"prompt": "a", "response": "b"}


@pytest.fixture
def folder(tmp_path, monkeypatch, llama_folder, rows_file):
    """A folder with c.yml, rows.jsonl and model/, which is the current one."""
    monkeypatch.chdir(tmp_path)
    fill_folder(llama_folder, rows_file)
    return tmp_path


def fill_folder(llama_folder: Path, rows_file: Path) -> None:
    """Put c.yml, rows.jsonl and model/ into the current folder."""
    shutil.copy(rows_file, "rows.jsonl")
    shutil.copytree(llama_folder, "model")
    Path("c.yml").write_text(CONFIG)


def furnish(folder: Path, llama_folder: Path, rows_file: Path) -> dict:
    """Puts a model, rows and labelled texts into a folder; returns the config of a step on them."""
    shutil.copytree(llama_folder, folder / "model")
    shutil.copy(rows_file, folder / "rows.jsonl")
    rows = [{"text": f"say {i}", "label": "ab"[i % 2]} for i in range(20)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"datasets": ["rows.jsonl"], "model": {"name_or_path": "./model"}, "output_dir": "runs", "n_steps": 1}


@pytest.fixture
def both_fail(folder, capsys):
    """``both_fail("lr=x")``: the message of a training command that exits with 2 and leaves no run behind.

    `validate` says the same before.
    """

    def both_fail(*overrides: str) -> str:
        arguments = ["c.yml", *(["--overrides", *overrides] if overrides else [])]
        assert main(["validate", *arguments]) == 2
        validated = capsys.readouterr().err
        code = main(["train", *arguments])
        out, err = capsys.readouterr()
        assert code == 2, err
        assert err.startswith("minitrain: ") and "Traceback" not in err + out and out == ""
        assert not Path("out").exists()
        assert validated == err
        return err

    return both_fail


@pytest.fixture
def fails(both_fail, wording):
    """The same, with the wording of messages.txt."""

    def fails(*overrides: str) -> str:
        err = both_fail(*overrides)
        wording(err)
        return err

    return fails


def write(name: str, *rows) -> str:
    """A jsonl file of dicts or of lines as they are; returns the override that trains on it."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    Path(name).write_bytes(b"\n".join(lines) + b"\n" if lines else b"")
    return f"datasets=[{name}]"


@pytest.fixture
def shared():
    """Finds a file of the real data and tokenizers beside the repository; skips the test where there is none."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{name} is not here")
        return path

    return find
