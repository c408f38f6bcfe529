"""`minitrain merge`, and answers from an adapter's run."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from minitrain.cli.main import main
from minitrain.inference.generate import Sampling, load_generator
from minitrain.training import atomic_dir
from tests.conftest import DEADLINE
from tests.messages import reports


@pytest.fixture
def runs(make_trainer):
    """Two runs of a LoRA over the random Llama: their folders and their trainers."""
    made = {}
    for name, seed in (("one", 0), ("two", 1)):
        trainer = make_trainer("lora.rank=4", "lr=0.05", f"seed={seed}", f"exp_name={name}")
        trainer.train()
        made[name] = trainer
    return made


def weights_of(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_merged_model_answers_as_the_adapter_does(runs, tmp_path, capsys):
    """Equal to the trainer's own answers, by transformers' files; a folder that exists is not written over."""
    run, output = str(runs["one"].run.path), tmp_path / "merged"
    assert main(["merge", run, "--output", str(output)]) == 0
    assert f"saved in float32 to {output}" in capsys.readouterr().out
    messages = [[{"role": "user", "content": text}] for text in ("say 1", "say 2")]
    wanted = [runs["one"].chat(each, max_new_tokens=8) for each in messages]
    for source in (run, str(output)):
        generator = load_generator(source, device="cpu")
        assert [generator.generate([each], Sampling(max_new_tokens=8))[0] for each in messages] == wanted
    assert main(["merge", run, "--output", str(output)]) == 2
    assert reports(capsys.readouterr().err, "already-exists", "--output: ")
    assert main(["merge", run, "--output", str(output), "--force", "--dtype", "bfloat16"]) == 0
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights_of(output).values())


def test_several_adapters_are_added_by_weight(runs, tmp_path, llama_folder):
    """base + 0.25 (one - base) + 2 (two - base)."""
    folders = {}
    for name, trainer in runs.items():
        folders[name] = tmp_path / name
        assert main(["merge", str(trainer.run.path), "--output", str(folders[name])]) == 0
    both = [str(trainer.run.path) for trainer in runs.values()]
    assert main(["merge", *both, "--weights", "0.25", "2", "--output", str(tmp_path / "both")]) == 0
    base, one, two, found = map(weights_of, (llama_folder, folders["one"], folders["two"], tmp_path / "both"))
    for name, tensor in base.items():
        want = tensor + 0.25 * (one[name] - tensor) + 2 * (two[name] - tensor)
        torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, code, about",
    [
        (["nowhere"], "not-found", "nowhere: "),
        (["RUN", "--weights", "1", "2"], "usage", "--weights: "),
        (["RUN", "PLAIN"], "unsupported-model", "runs/plain"),
        (["RUN", "OTHER"], "mismatch", "runs/other"),
    ],
)
def test_what_cannot_be_merged(make_trainer, runs, tmp_path, capsys, arguments, code, about):
    """In one line, and nothing is written."""
    plain = make_trainer("exp_name=plain", "n_steps=1")
    plain.train()
    other = make_trainer("exp_name=other", "n_steps=1", "lora.rank=2", "model.name_or_path=tiny")
    other.train()
    folders = {"RUN": runs["one"].run.path, "PLAIN": plain.run.path, "OTHER": other.run.path}
    named = [str(folders.get(word, word)) for word in arguments]
    assert main(["merge", *named, "--output", str(tmp_path / "out")]) == 2
    assert reports(capsys.readouterr().err, code, about) and not (tmp_path / "out").exists()


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def kill_at(patch, point: str) -> None:
    def failpoint(name, subject=None):
        if name == point:
            raise Killed
        return subject

    patch.setattr(atomic_dir, "failpoint", failpoint)


@pytest.mark.parametrize("point", ["replace.new", "replace.old", "replace.done"])
def test_a_killed_replacement_is_completed_by_the_next_run(runs, tmp_path, monkeypatch, capsys, point):
    """merge --force, killed between its renames: the next run puts the new model in place and removes the rest."""
    run, output = str(runs["one"].run.path), tmp_path / "out" / "merged"
    assert main(["merge", run, "--output", str(output)]) == 0
    neighbors = [tmp_path / "out" / name for name in (".new-merged-2-0123abcd", ".trash-other-0123abcd")]
    for folder in neighbors:
        folder.mkdir()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, point)
        main(["merge", run, "--output", str(output), "--force", "--dtype", "bfloat16"])
    capsys.readouterr()
    assert main(["merge", run, "--output", str(output)]) == 2
    err = capsys.readouterr().err
    assert ("merged: recovered after an interrupted replacement" in err) == (
        point != "replace.done"
    ) and "exists" in err
    assert sorted(output.parent.iterdir()) == sorted([output, *neighbors])
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights_of(output).values())


def test_a_kill_while_the_model_is_written(runs, tmp_path):
    """The old model stays, and the next run removes the half-written one."""
    run, output = str(runs["one"].run.path), tmp_path / "out" / "merged"
    assert main(["merge", run, "--output", str(output)]) == 0
    before = weights_of(output)
    code = "import os; from minitrain.cli import main as cli; from minitrain.inference import merge; "
    code += "merge.save_model = lambda model, words, folder, dtype: (folder / 'half').write_text('x') and os._exit(9); "
    code += f"cli.main(['merge', {run!r}, '--output', {str(output)!r}, '--force'])"
    assert subprocess.run([sys.executable, "-c", code], timeout=DEADLINE).returncode == 9
    assert [path.name for path in output.parent.rglob("half")] and weights_of(output).keys() == before.keys()
    assert main(["merge", run, "--output", str(output), "--force"]) == 0
    assert list(output.parent.iterdir()) == [output]
