"""Random mutations of all that a user may hand in: no traceback, no hang, and every refusal has a message."""

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minitrain.cli.main import main
from tests.conftest import furnish
from tests.rows import ROWS
from tests.shapes import time_limit

SECONDS = 60  # for a command that takes one; none of them may hang
ODD_TEXTS = [
    "",
    " ",
    "\0",
    "\ud800",
    "\ufeff",
    "\ue0f0",
    "a" * 3000,
    "-1",
    "nan",
    "1e999",
    "[",
    "${x}",
    "../..",
    "%s",
    "{x}",
    "~",
]
ODD_NUMBERS = [-1, 0, 1, 2**31, 2**63, 10**30, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"), True, None]
ODD = [*ODD_TEXTS, *ODD_NUMBERS, [], {}, [[]], [None], ["a", 1], {"a": {}}, {"type": "x"}, [[[[[[]]]]]], {"": ""}]
PLAUSIBLE = [0, 1, 2, 3, 7, 0.5, 0.9, True, False, None, "a", "embeddings", [0.5, 0.5], ["q_proj"], ["0-1"], [1], {}]
CONFIG = """\
datasets: [rows.jsonl]
model: {name_or_path: ./model}
output_dir: runs
exp_name: fuzz
total_batch_size: 4
n_steps: 1
max_length: 128
seed: 1
lr: 1e-3
betas: [0.9, 0.95]
lora: {rank: 2, target_modules: [q_proj]}
loss: {name: sft}
validation_split: 0.2
early_stopping: {patience: 0, metric: loss}
on_bad_row: error
"""
ROLLOUT = "{num_generations: 2, prompts_per_round: 4, max_new_tokens: 4, rewards: [length]}"
RECORDS = {
    "sft": "conversation",
    "dpo": "preference",
    "kto": "unpaired_preference",
    "classify": "classification",
    "policy": "rollout",
}


class Hang(BaseException):
    """A command takes too long."""


def changed_value(value, rng: random.Random):
    """The value with something in it replaced, taken out, doubled or nested."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key, made = rng.choice(list(value)), dict(value)
        action = rng.random()
        if action < 0.15:
            del made[key]
        elif action < 0.25:
            made[rng.choice(["", "type", "text", "role", key + key, key.upper()])] = made.pop(key)
        else:
            made[key] = changed_value(made[key], rng)
        return made
    if isinstance(value, list) and value and rng.random() < 0.8:
        at, made = rng.randrange(len(value)), list(value)
        action = rng.random()
        made[at : at + 1] = [] if action < 0.15 else [made[at]] * 3 if action < 0.3 else [changed_value(made[at], rng)]
        return made
    if isinstance(value, str) and value and rng.random() < 0.3:
        return changed_bytes(value.encode(errors="surrogatepass"), rng).decode(errors="surrogateescape")
    return [value] if rng.random() < 0.1 else rng.choice(ODD)


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """The bytes with some cut off, flipped, put in, doubled or exchanged."""
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at, n = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 8, 40])
        put = rng.choice(
            [b"", b"\0", b"\xff", b'"', b"[", b"{", b"}", b",", b":", b"\n", b"\t", b"&a *a", b"- ", b"9" * 400]
        )
        action = rng.random()
        if action < 0.15:
            content = content[:at]
        elif action < 0.3:
            content = content[:at] + content[at : at + n] * 3 + content[at + n :]
        elif action < 0.5:
            content = content[:at] + rng.randbytes(n) + content[at + n :]
        else:
            content = content[:at] + put + content[at + rng.choice([0, n]) :]
    return content


def write_rows(rows: list, rng: random.Random) -> str:
    """A data file of mutated rows, in one of the formats that files have."""
    rows = list(rows[:6])
    for _ in range(rng.choice([1, 2, 4])):
        at = rng.randrange(len(rows))
        rows[at] = changed_value(rows[at], rng)
    kind = rng.choice(["jsonl", "jsonl", "json", "csv", "tsv", "parquet"])
    name = f"mutated.{kind}"
    if kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        table = [list(row) if i == 0 else list(row.values()) for i, row in enumerate(rows) if isinstance(row, dict)]
        text = "\n".join(mark.join(str(cell) for cell in line) for line in table)
        content = text.encode(errors="surrogatepass")
    elif kind == "parquet":
        content = parquet_of(ROWS["conversation"][:6])
    else:
        lines = [json.dumps(row) for row in rows]
        content = ("\n".join(lines) if kind == "jsonl" else "[" + ",\n".join(lines) + "]").encode()
    if kind == "parquet" or rng.random() < 0.4:
        content = changed_bytes(content, rng)
    Path(name).write_bytes(content)
    return name


def parquet_of(rows: list[dict]) -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


# ----------------------------------------------------------------------------- a mutation of each kind, as a command


def of_config(rng: random.Random) -> list[str]:
    if rng.random() < 0.5:
        Path("c.yml").write_bytes(changed_bytes(CONFIG.encode(), rng))
    else:
        import yaml

        given = yaml.safe_load(CONFIG)
        for _ in range(rng.choice([1, 1, 2])):
            given = changed_value(given, rng)
        Path("c.yml").write_text(json.dumps(given))
    return [rng.choice(["validate", "validate", "inspect", "train"]), "c.yml"]


def of_options(rng: random.Random) -> list[str]:
    """Options with values that they may have, in combinations that nobody has tried."""
    from dataclasses import fields, is_dataclass
    from typing import get_type_hints

    from minitrain.config.schema import Config

    def pairs(schema: type, path: str = "") -> Iterator[tuple[str, list]]:
        hints = get_type_hints(schema)
        for f in fields(schema):
            if not f.init or f.name in ("output_dir", "exp_name", "name_or_path", "datasets", "device", "cache_dir"):
                continue
            if is_dataclass(hints[f.name]):
                yield from pairs(hints[f.name], f"{path}{f.name}.")
            else:
                yield f"{path}{f.name}", list(f.metadata.get("choices", ())) or PLAUSIBLE

    Path("c.yml").write_text(CONFIG)
    chosen = rng.sample(list(pairs(Config)), rng.choice([1, 2, 3]))
    overrides = [f"{key}={json.dumps(rng.choice(values))}" for key, values in chosen]
    loss, record = rng.choice(list(RECORDS.items()))
    Path("good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[record]))
    command = rng.choice(["train", "train", "validate"])
    return [command, "c.yml", "--overrides", f"loss.name={loss}", "datasets=[good.jsonl]", *overrides]


def of_overrides(rng: random.Random) -> list[str]:
    from minitrain.config.schema import all_keys

    Path("c.yml").write_text(CONFIG)
    keys = [*all_keys(), "datasets[0].path", "datasets.path", "loss.beta", "datasets[0].columns", "loss"]
    values = [json.dumps(rng.choice(ODD)), rng.choice(ODD_TEXTS)]
    pairs = [f"{rng.choice(keys)}={rng.choice(values)}" for _ in range(rng.choice([1, 1, 3]))]
    return ["validate", "c.yml", "--overrides", *(pair.replace("\0", "\\0") for pair in pairs)]


def of_rows(rng: random.Random) -> list[str]:
    loss, record = rng.choice(list(RECORDS.items()))
    name = write_rows(ROWS[record], rng)
    Path("c.yml").write_text(CONFIG.replace("rows.jsonl", name).replace("name: sft", f"name: {loss}"))
    skips = rng.choice([["on_bad_row=skip"], []])
    commands = [
        ["inspect", "c.yml", *(["--overrides", *skips] if skips else [])],
        ["inspect", "c.yml", *(["--overrides", *skips] if skips else [])],
        ["validate", "c.yml", "--overrides", "validation_split=0", *skips],
        ["train", "c.yml", "--overrides", "validation_split=0", "n_steps=1", *skips],
        ["generate", "model", "--input", name, "--max-new-tokens", "1", "--output", "out.jsonl", "--force"],
        ["score", "scorer", "--input", name, "--output", "out.jsonl", "--force"],
    ]
    return rng.choice(commands)


def of_model(rng: random.Random) -> list[str]:
    """A damaged file of a model's folder."""
    shutil.rmtree("damaged", ignore_errors=True)
    source = rng.choice(["model", "model", "scorer", "adapter"])
    shutil.copytree(source, "damaged")
    file = rng.choice(sorted(path for path in Path("damaged").iterdir() if path.is_file()))
    content = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.7:
        file.write_text(json.dumps(changed_value(json.loads(content), rng)))
    elif file.suffix == ".safetensors" and rng.random() < 0.5:
        file.write_bytes(changed_bytes(content[:2000], rng) + content[2000:])
    else:
        file.write_bytes(changed_bytes(content, rng))
    if rng.random() < 0.1:
        index = {"metadata": {}, "weight_map": changed_value({"lm_head.weight": "none.safetensors"}, rng)}
        Path("damaged/model.safetensors.index.json").write_text(json.dumps(index))
    Path("c.yml").write_text(CONFIG.replace("./model", "./damaged" if source == "model" else "./model"))
    if source == "adapter":
        adapted = ["--overrides", "model.adapter=damaged", "lora={rank: 0, target_modules: all-linear}"]
        merge = ["merge", "damaged", "--output", "merged", "--force"]
        answer = ["generate", "damaged", "--prompt", "a", "--max-new-tokens", "1"]
        return rng.choice([merge, ["validate", "c.yml", *adapted], answer])
    if source == "scorer":
        return ["score", "damaged", "--text", "a b"]
    return rng.choice([["generate", "damaged", "--prompt", "a", "--max-new-tokens", "2"], ["validate", "c.yml"]])


def of_run(rng: random.Random) -> list[str]:
    """Damaged files of a run's folder."""
    shutil.rmtree("broken", ignore_errors=True)
    shutil.copytree("run", "broken")
    kinds = (".jsonl", ".json", ".yml")
    folders = (Path("broken"), Path("broken", "rollouts"))
    files = sorted(path for folder in folders for path in folder.iterdir() if path.is_file() and path.suffix in kinds)
    for file in rng.sample(files, rng.choice([1, 1, 2])):
        content = file.read_bytes()
        if file.suffix == ".jsonl" and rng.random() < 0.6:
            rows = [json.loads(line) for line in content.splitlines()]
            rows[rng.randrange(len(rows))] = changed_value(rng.choice(rows), rng)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            file.write_bytes(changed_bytes(content, rng))
    page = ["rollouts", "broken", "--html", "broken.html", "--force"]
    rollouts = [["rollouts", "broken"], ["rollouts", "broken", "--prompt", "1", "--round", "1"], page]
    return rng.choice([["plot", "broken", "--force"], ["doctor", "broken"], ["compare", "run", "broken"], *rollouts])


KINDS: dict[str, Callable[[random.Random], list[str]]] = {
    "config": of_config,
    "options": of_options,
    "overrides": of_overrides,
    "rows": of_rows,
    "model": of_model,
    "run": of_run,
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, llama_folder, rows_file) -> Path:
    """A folder with all that is mutated: a model, a scorer, an adapter, a run, rows."""
    folder = tmp_path_factory.mktemp("fuzz")
    furnish(folder, llama_folder, rows_file)
    with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else _in_folder(folder):
        Path("c.yml").write_text(CONFIG)
        Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(8)))
        more = ["do_first_eval=false", "log_every_steps=1"]
        assert main(["train", "c.yml", "--quiet", "--overrides", "n_steps=3", "exp_name=adapted", *more]) == 0
        labels = ["datasets=[labels.jsonl]", "loss={name: classify}", "lora={rank: 0, target_modules: all-linear}"]
        assert main(["train", "c.yml", "--quiet", "--overrides", *labels, "exp_name=labels", *more]) == 0
        shutil.copytree("runs/labels/final", "scorer")
        shutil.copytree("runs/adapted/final", "adapter")
        shutil.move("runs/adapted", "run")
        online = ["datasets=[prompts.jsonl]", "loss={name: policy}", f"rollout={ROLLOUT}", "validation_split=0"]
        online += ["eval_every_steps=0", "exp_name=sampled"]
        assert main(["train", "c.yml", "--quiet", "--overrides", "n_steps=3", *online, *more]) == 0
        shutil.copytree("runs/sampled/rollouts", "run/rollouts")
        metrics = Path("runs/sampled/metrics.jsonl").read_text()
        with Path("run/metrics.jsonl").open("a") as file:
            file.writelines(line + "\n" for line in metrics.splitlines() if '"rollout"' in line)
        shutil.rmtree("runs")
    return folder


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    import os

    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def fuzz(kind: str, seeds: range, folder: Path, capfd) -> None:
    """Run a command for each seed. What it prints for a failure names the kind and the seed."""
    with _in_folder(folder):
        for seed in seeds:
            shutil.rmtree("runs", ignore_errors=True)
            command = KINDS[kind](random.Random(f"{kind} {seed}"))
            told = f"{kind} {seed}: minitrain {' '.join(command)[:300]!r}"
            try:
                with time_limit(SECONDS, Hang):
                    code = main(command)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                pytest.fail(f"{told}: {type(error).__name__}: {str(error)[:300]}")
            _, err = capfd.readouterr()
            assert code in (0, 1, 2, 3), f"{told}: exit code {code}"
            assert "Traceback" not in err, f"{told}: {err[-300:]}"
            assert code in (0, 3) or err.strip() or command[0] == "compare", f"{told}: no message"


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_mutations(kind, workplace, capfd):
    """10 of each kind."""
    fuzz(kind, range(10), workplace, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_mutations(kind, part, workplace, capfd):
    """168 of each kind, in four parts that run side by side."""
    fuzz(kind, range(10 + 42 * part, 52 + 42 * part), workplace, capfd)
