"""The command that notes a teacher's outputs."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from minitrain.cli.main import main
from tests.conftest import DEADLINE
from tests.messages import reports

CONFIG = """\
datasets: [{rows}]
validation_split: 8
model: {{name_or_path: {model}}}
loss: {{name: kd, teacher: tiny, top_k: 5, temperature: 2}}
cache_dir: cache
batch_size: 8
n_steps: 2
"""


@pytest.fixture
def teach(tmp_path, monkeypatch, llama_folder, rows_file, capsys):
    """``teach(...)``: (exit code, stdout, stderr) of the command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text(CONFIG.format(rows=rows_file, model=llama_folder))

    def teach(*arguments: str):
        code = main(["teach", "c.yml", *arguments])
        return code, *capsys.readouterr()

    return teach


def test_what_is_written(teach, rows_file):
    """Ids and log-probabilities that fall, and sum to 1 with the rest, where tokens are learned; zeros elsewhere."""
    code, out, _ = teach("--output", "t.safetensors")
    assert code == 0
    assert out == "teacher outputs saved to t.safetensors; train with loss.teacher_outputs=t.safetensors\n"
    (tokens,) = Path("cache").glob("*.safetensors")
    with safe_open(tokens, "pt") as cache, safe_open("t.safetensors", "pt") as file:
        learned = cache.get_tensor("mask").bool()
        ids = file.get_tensor(f"{tokens.stem}/teacher_ids")
        logps = file.get_tensor(f"{tokens.stem}/teacher_logps")
        metadata = file.metadata()
        assert len(metadata.pop("checksum")) == 8
        assert metadata == {
            "temperature": "2.0", "top_k": "5", "n_tokens": "259", "teacher": "tiny", "teacher_dtype": "float32",
        }  # fmt: skip
    assert ids.shape == (len(learned), 5) and logps.shape == (len(learned), 6)
    assert (logps[learned].exp().sum(1) - 1).abs().max() < 1e-5
    assert (logps[learned][:, :5].diff() <= 0).all()
    assert all(len(set(row)) == 5 for row in ids[learned].tolist())
    assert not ids[~learned].any() and not logps[~learned].any()


def test_it_is_made_once_beside_the_tokens(teach, monkeypatch):
    """Without --output the same command finds what it made; other options make another one."""
    from minitrain.inference import teacher_cache as module

    code, out, _ = teach()
    assert code == 0 and len(list(Path("cache").glob("*-teacher.safetensors"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_teacher", None)
        assert teach() == (0, out, "")
    assert teach("--overrides", "loss.temperature=3")[0] == 0
    assert len(list(Path("cache").glob("*-teacher.safetensors"))) == 2


def test_damaged_outputs_are_not_trained_on(teach, capsys):
    """A page of zeros, which are tokens and log-probabilities, too: refused if the file was named, else made again."""
    assert teach("--output", "t.safetensors")[0] == teach()[0] == 0
    (kept,) = Path("cache").glob("*-teacher.safetensors")
    whole = kept.read_bytes()
    for file in (Path("t.safetensors"), kept):
        content = file.read_bytes()
        file.write_bytes(content[:-4000] + bytes(4000))
    code = main(["train", "c.yml", "--overrides", "loss.teacher_outputs=t.safetensors", "loss.teacher=null"])
    assert code == 2 and reports(capsys.readouterr().err, "damaged-file", "t.safetensors")
    assert reports(teach()[1], "damaged-file", str(kept)) and kept.read_bytes() == whole


@pytest.mark.parametrize(
    "arguments, problem, about",
    [
        (["--overrides", "loss=sft"], "conflict", "loss.name: "),
        (["--overrides", "loss.top_k=null"], "missing-option", "loss.top_k: "),
        (["--overrides", "loss.top_k=300"], "out-of-range", "loss.top_k: "),
        (["--overrides", "loss.teacher_outputs=c.yml"], "conflict", "loss.teacher_outputs: "),
        (["--overrides", "loss.teacher=null"], "missing-option", "loss.teacher: "),
        (["--output", "c.yml"], "already-exists", "--output: c.yml "),
        (["--output", "no/where"], "not-found", "--output: "),
        (["--force", "--output", "cache"], "wrong-path", "--output: cache "),
    ],
)
def test_what_cannot_be_done(teach, wording, arguments, problem, about):
    """Exit code 2 and one message."""
    Path("cache").mkdir()
    code, out, err = teach(*arguments)
    wording(err)
    assert code == 2 and reports(err, problem, about) and out == "" and "Traceback" not in err


def test_it_works_on_one_device(teach, monkeypatch):
    """Under torchrun each process would write the same file."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = teach("--overrides", "trainer=FSDPTrainer")
    assert code == 2 and reports(err, "conflict")


def test_force_writes_over_a_file(teach):
    """--force replaces what stands there."""
    Path("t.safetensors").write_text("old")
    assert teach("--output", "t.safetensors", "--force")[0] == 0
    assert Path("t.safetensors").stat().st_size > 1000


def test_what_a_killed_process_left_is_removed(teach):
    """A kill -9 leaves a folder beside --output; the next run removes it and says so."""
    Path("out").mkdir()
    code = "import os; from minitrain.cli import main as cli; from minitrain.inference import teacher_cache; "
    code += "teacher_cache._write_outputs = lambda *_: os._exit(9); "
    code += "cli.main(['teach', 'c.yml', '--output', 'out/t.safetensors', '--overrides', 'device=cpu'])"
    assert subprocess.run([sys.executable, "-c", code], timeout=DEADLINE).returncode == 9
    (left,) = Path("out").iterdir()
    assert f"{left}: removed" in teach("--output", "out/t.safetensors")[1]
    assert list(Path("out").iterdir()) == [Path("out/t.safetensors")]
