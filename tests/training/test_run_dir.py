"""A run directory loses nothing: not by a kill between two renames, by damage, or by a run that starts again."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitrain import RunError
from minitrain.distributed.parallel import SingleDevice
from minitrain.training import atomic_dir, checkpoint, saving
from minitrain.training.atomic_dir import atomic_folder, checkpoints, fingerprint, recover, replace_file
from minitrain.training.metrics_log import last_step
from minitrain.training.saving import SaveSchedule
from tests.conftest import metrics, weights
from tests.messages import problems, raises


def stop_at(step: int) -> dict:
    """A hook that stops a trainer as SIGTERM does."""
    return {"on_step_end": lambda t: setattr(t, "_received", 15) if t.step == step else None}


def kill_at(step: int) -> dict:
    """A hook that ends a trainer as a kill does: nothing more is written."""

    def kill(trainer):
        if trainer.step == step:
            raise KeyboardInterrupt

    return {"on_step_end": kill}


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def kill_in_folders(monkeypatch, point: str) -> None:
    def failpoint(name, subject=None):
        if name == point:
            raise Killed
        return subject

    monkeypatch.setattr(atomic_dir, "failpoint", failpoint)


def write_folder(target, text: str) -> None:
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text(text)


@pytest.mark.parametrize("point", ["replace.new", "replace.old", "replace.done"])
def test_a_kill_between_two_renames_loses_no_folder(tmp_path, monkeypatch, point):
    """`final/` is replaced, and killed at each point in between: afterwards there is one, complete."""
    target = tmp_path / "final"
    write_folder(target, "old")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_folders(patch, point)
        write_folder(target, "new")
    atomic_dir.remove_leftovers(tmp_path)  # takes nothing that is complete
    with monkeypatch.context() as patch, pytest.raises(Killed):  # and the recovery is killed, too
        kill_in_folders(patch, "recover.new")
        recover(tmp_path)
        raise Killed
    recover(tmp_path)
    atomic_dir.remove_leftovers(tmp_path)
    assert (target / "a").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("point", ["replace.new", "replace.old"])
def test_an_io_error_between_two_renames_changes_nothing(tmp_path, monkeypatch, point):
    """The old folder is back in its place, and the error is one line."""
    target = tmp_path / "final"
    write_folder(target, "old")

    def failpoint(name, subject=None):
        if name == point:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(atomic_dir, "failpoint", failpoint)
    with raises(RunError, "not-writable", f"{target}: ", "Input/output error"):
        write_folder(target, "new")
    assert (target / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["final"]


def test_what_is_no_longer_wanted_does_not_come_back(tmp_path, monkeypatch):
    """A checkpoint that was being removed when the kill came is removed."""
    for step in (1, 2):
        write_folder(tmp_path / f"step-{step}", "x")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_folders(patch, "prune.renamed")
        atomic_dir.prune(tmp_path, 1)
    assert recover(tmp_path) == []
    atomic_dir.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-2"]


@pytest.mark.parametrize("point", ["replace.old", "replace.new"])
def test_the_only_checkpoint_survives_its_replacement(make_trainer, monkeypatch, capsys, point):
    """keep_checkpoints=1, and the checkpoint of the same step is written again when the kill comes."""
    options = ("save_every_steps=2", "keep_checkpoints=1", "n_steps=4")
    make_trainer(*options, **stop_at(2)).train()
    whole = make_trainer(*options, "exp_name=whole")
    whole.train()
    second = make_trainer(*options, **stop_at(2))
    original = second.run.checkpoint(2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_folders(patch, point)
        atomic_dir.replace_folder(shutil.copytree(original, original.with_name(".tmp-step-2-x")), original)
    third = make_trainer(*options)  # finds a run, though no checkpoint has its name
    with raises(RunError, "other-run", "lr: 0.01 -> 0.5"):
        make_trainer(*options, "lr=0.5")
    third.train()
    assert third.checkpoint == original and "step-2: recovered" in capsys.readouterr().out
    assert all(torch.equal(p, weights(third)[name]) for name, p in weights(whole).items())
    assert not [path.name for path in original.parent.iterdir() if path.name.startswith(".")]


def test_a_step_is_committed_once(make_trainer):
    """A signal right after a save does not write the same checkpoint again."""
    saves = []
    trainer = make_trainer("save_every_steps=2", on_save=lambda t: saves.append(t.step))
    save = trainer.run.save_checkpoint

    def save_and_signal(*args):
        save(*args)
        trainer._received = 15

    trainer.run.save_checkpoint = save_and_signal
    trainer.train()
    assert saves == [2] and [path.name for path in checkpoints(trainer.run.checkpoints)] == ["step-2"]


def test_swapped_names_are_noticed(make_trainer):
    """step-1 and step-2 under each other's name: refused with the right names, not resumed from the older one."""
    trainer = make_trainer("save_every_steps=1", **stop_at(2))
    trainer.train()
    one, two = trainer.run.checkpoint(1), trainer.run.checkpoint(2)
    one.rename(one.with_name("x")), two.rename(one), one.with_name("x").rename(two)
    with raises(RunError, "damaged-file", "step-1: ", "step-2"):
        make_trainer("save_every_steps=1").train()


def rewrite(checkpoint, name: str, change) -> None:
    """Changes the tensors of a file of a checkpoint, and its hash in the manifest."""
    file = checkpoint / name
    if name.endswith(".json"):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    else:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = fingerprint(file)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


NORM = "model.model.layers.0.input_layernorm.weight"
PROJECTION = "model.model.layers.0.mlp.up_proj.weight"


def cut(name: str, *index):
    return lambda tensors: tensors.update({name: tensors[name][index].clone()})


INCONSISTENT = {
    "a vector of one number": ("model-0.safetensors", cut(NORM, slice(0, 1))),
    "a matrix of one row": ("model-0.safetensors", cut(PROJECTION, slice(0, 1))),
    "a matrix of one column": ("model-0.safetensors", cut(PROJECTION, slice(None), slice(0, 1))),
    "a moment of one number": ("optimizer-0.safetensors", cut(f"{PROJECTION}/exp_avg", slice(0, 1))),
    "no tensor": ("model-0.safetensors", lambda tensors: tensors.pop(NORM)),
    "rows that no file has": ("index.json", lambda index: index["model"][NORM]["pieces"].clear()),
    "too few rows": ("index.json", lambda index: index["model"][NORM]["pieces"][0].__setitem__(2, 5)),
    "a moment of nothing": ("index.json", lambda i: i["optimizer"].update({"x/y": {"shape": [1], "pieces": []}})),
    "an index of a wrong type": ("index.json", lambda index: index.update(model=[])),
    "a state without optimizer": ("state.json", lambda state: state.pop("optimizer")),
}


@pytest.mark.parametrize("what", INCONSISTENT)
def test_files_that_contradict_one_another_are_refused(make_trainer, what):
    """Hashes that are right do not make a checkpoint right: nothing is broadcast, and no row keeps what it had."""
    trainer = make_trainer("save_every_steps=1", **stop_at(1))
    trainer.train()
    rewrite(trainer.run.checkpoint(1), *INCONSISTENT[what])
    with raises(RunError, "damaged-file", "step-1"):
        make_trainer("save_every_steps=1").train()


def test_a_kill_while_logs_are_shortened_leaves_them(make_trainer, monkeypatch):
    """metrics.jsonl and ledger.jsonl are written beside and renamed, when a run goes on."""
    trainer = make_trainer("save_every_steps=2", "n_steps=4", **kill_at(4))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    before = {name: (trainer.run.path / name).read_bytes() for name in ("metrics.jsonl", "ledger.jsonl")}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_folders(patch, "replace.file")
        make_trainer("save_every_steps=2", "n_steps=4").train()
    assert {name: (trainer.run.path / name).read_bytes() for name in before} == before
    second = make_trainer("save_every_steps=2", "n_steps=4")
    second.train()
    assert [row["step"] for row in metrics(second)] == [1, 2, 3, 4]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    """An error while it is written leaves the old content and nothing else."""

    def lines():
        yield b"new"
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError):
        replace_file(tmp_path / "a", lines())
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


DAMAGED_LINES = [b"\0" * 50, b"\xff\xfe{", b"[1, 2]", b'{"step": "1"}', b'{"step": -1}', b'{"step": true}', b"[" * 9999]


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl"])
def test_damaged_lines_of_a_log_are_removed_and_reported(make_trainer, capsys, name):
    """Each by its number; the run goes on. The last line, which a kill has cut, is not worth a word."""
    trainer = make_trainer("save_every_steps=2", "n_steps=4", **stop_at(2))
    trainer.train()
    file = trainer.run.path / name
    sound = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([sound[0], *DAMAGED_LINES, sound[1], b'{"step": 3, "ki']))
    capsys.readouterr()
    second = make_trainer("save_every_steps=2", "n_steps=4")
    second.train()
    out = capsys.readouterr().out
    assert f"{file}:2, 3, 4, 5, 6, ...: unreadable lines are removed" in out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("kind") != "eval"] == [1, 2, 3, 4] and rows[0] == json.loads(
        sound[0]
    )


DAMAGED_CONFIGS = {
    "NUL": b"\0" * 100,
    "bytes": b"\xff\xfe\xff",
    "empty": b"",
    "list": b"[1, 2]",
    "yaml": b"lr: [",
    "deep": b"[" * 9999,
    "long": b"lr: " + b"9" * 9999,
}


@pytest.mark.parametrize("content", [*DAMAGED_CONFIGS.values(), None], ids=[*DAMAGED_CONFIGS, "missing"])
def test_a_damaged_config_does_not_switch_off_the_check_of_options(make_trainer, capsys, content):
    """The options are in each checkpoint, too; without any the run is refused. config.yml is written again."""
    options = ("save_every_steps=2", "n_steps=4")
    trainer = make_trainer(*options, **stop_at(2))
    trainer.train()
    file = trainer.run.path / "config.yml"
    whole = file.read_text()
    file.unlink() if content is None else file.write_bytes(content)
    with raises(RunError, "other-run", "lr: 0.01 -> 0.5"):
        make_trainer(*options, "lr=0.5")
    make_trainer(*options).train()
    assert f"were compared with those of {trainer.run.checkpoint(2)}" in capsys.readouterr().out
    assert file.read_text() == whole
    file.unlink() if content is None else file.write_bytes(content)
    for folder in checkpoints(trainer.run.checkpoints):
        rewrite(folder, "state.json", lambda state: state.pop("config"))
    with raises(RunError, "damaged-file", "config.yml: "):
        make_trainer(*options)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"\xff", b"", b"5", b'{"finished_step": "x", "total_steps": 3}', b'{"finished_step": 3}', b"[" * 9999],
)
def test_a_damaged_run_json_is_one_error(make_trainer, content):
    """Whether the run has finished is unknown then; removed, the run goes on."""
    trainer = make_trainer("save_every_steps=3")
    trainer.train()
    (trainer.run.path / "run.json").write_bytes(content)
    with raises(RunError, "damaged-file", "run.json: "):
        make_trainer("save_every_steps=3").train()
    (trainer.run.path / "run.json").unlink()
    make_trainer("save_every_steps=3").train()
    assert json.loads((trainer.run.path / "run.json").read_text()) == {"finished_step": 3, "total_steps": 3}


def notices(trainer, capsys) -> list[str]:
    """The lines that a run printed about its folder."""
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{trainer.run.path}: ")]


def test_a_restart_from_step_0_says_so_and_keeps_what_was_there(make_trainer, rows_file, capsys, wording):
    """Killed without a checkpoint: metrics, ledger, curves and models of that attempt are moved, not written over."""
    options = ("save_every_steps=0", "save_models_every_steps=2", "n_steps=4", "report_to_tensorboard=true")
    for attempt in (1, 2):
        trainer = make_trainer(*options, **kill_at(3))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert len(notices(trainer, capsys)) == attempt - 1
    make_trainer(*options).train()
    run, (notice,) = trainer.run.path, notices(trainer, capsys)
    assert "step 3" in notice and str(run / "attempt-2") in notice
    wording(notice)
    for attempt in (1, 2):
        kept = run / f"attempt-{attempt}"
        assert last_step(kept / "metrics.jsonl") == last_step(kept / "ledger.jsonl") == 3
        assert (kept / "models" / "step-2" / "model.safetensors").exists() and list((kept / "tensorboard").iterdir())
    assert last_step(run / "metrics.jsonl") == 4 and not (run / "attempt-3").exists()


def test_a_restart_of_a_run_without_a_step_keeps_nothing(make_trainer, rows_file, capsys, wording):
    """Only the evaluation at step 0 was made: no folder is left of it, but it is said."""
    options = (f"eval_datasets=[{rows_file}]", "save_best=true", "save_every_steps=0")
    with pytest.raises(KeyboardInterrupt):
        make_trainer(*options, on_eval_end=kill_at(0)["on_step_end"]).train()
    trainer = make_trainer(*options)
    trainer.train()
    (notice,) = notices(trainer, capsys)
    wording(notice)
    assert not (trainer.run.path / "attempt-1").exists() and [r["step"] for r in metrics(trainer, "eval")] == [0, 3]


def test_going_back_to_an_older_checkpoint_keeps_the_newer_ones(make_trainer, capsys):
    """resume=PATH in the same folder: later checkpoints are moved, so that none of them is resumed from later."""
    options = ("save_every_steps=1", "n_steps=4", "keep_checkpoints=4")
    trainer = make_trainer(*options, **stop_at(3))
    trainer.train()
    back = make_trainer(*options, f"resume={trainer.run.checkpoint(1)}", **stop_at(2))
    back.train()
    assert [path.name for path in checkpoints(trainer.run.checkpoints)] == ["step-1", "step-2"]
    moved = checkpoints(trainer.run.path / "attempt-1" / "checkpoints")
    assert [path.name for path in moved] == ["step-2", "step-3"] and "step 3" in notices(trainer, capsys)[0]


def test_a_run_from_a_checkpoint_of_another_folder_does_not_mix_with_this_one(make_trainer):
    """Its logs and checkpoints begin with that checkpoint; those of the folder are moved."""
    options = ("save_every_steps=1", "n_steps=4")
    make_trainer(*options, "exp_name=here", **stop_at(3)).train()
    there = make_trainer(*options, "exp_name=there", **stop_at(1))
    there.train()
    trainer = make_trainer(*options, "exp_name=here", f"resume={there.run.checkpoint(1)}")
    trainer.train()
    assert [row["step"] for row in metrics(trainer)] == [2, 3, 4]
    assert (trainer.run.path / "attempt-1" / "checkpoints" / "step-3").is_dir()


def test_falling_back_keeps_the_checkpoint_it_falls_back_to(make_trainer):
    """The newest is damaged and keep_checkpoints=1: what is resumed from stays until there is a newer sound one."""
    options = ("save_every_steps=1", "n_steps=4")
    trainer = make_trainer(*options, "keep_checkpoints=2", **stop_at(3))
    trainer.train()
    (trainer.run.checkpoint(3) / "state.json").write_bytes(b"")
    second = make_trainer(*options, "keep_checkpoints=1", **kill_at(3))
    with pytest.raises(KeyboardInterrupt):
        second.train()
    assert second.checkpoint == trainer.run.checkpoint(2) and second.checkpoint.is_dir()
    third = make_trainer(*options, "keep_checkpoints=1")
    third.train()
    assert third.checkpoint == trainer.run.checkpoint(2)
    assert [path.name for path in checkpoints(trainer.run.checkpoints)] == ["step-4"]


class Clock:
    """`time.perf_counter` that a test moves."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(saving.time, "perf_counter", lambda: self.now)

    def steps_with_a_save(self, schedule, seconds_per_step: float, n_steps: int, cost: float) -> list[int]:
        saved = []
        schedule.start()
        for step in range(1, n_steps + 1):
            self.now += seconds_per_step
            if schedule.is_due(step, n_steps):
                self.now += cost
                schedule.saved(cost)
                saved.append(step)
        return saved


PARALLEL = SingleDevice(torch.device("cpu"))


def test_checkpoints_by_time_cost_little(monkeypatch):
    """One a minute while that is cheap; at most 2% of the time for those that take long, the first one included."""
    clock = Clock(monkeypatch)
    schedule = SaveSchedule(None, 10, PARALLEL)
    assert clock.steps_with_a_save(schedule, 20, 12, 0.5) == [3, 6, 9, 12]
    for speed in (saving.WRITE_SPEED, 1e9):
        began, n_bytes = clock.now, 84e9
        schedule = SaveSchedule(None, n_bytes, PARALLEL)
        saved = clock.steps_with_a_save(schedule, 60, 2000, n_bytes / speed)
        assert saved and schedule.count == len(saved) and schedule.seconds <= 0.02 * (clock.now - began)
        assert schedule.summary().startswith(f"{len(saved)} checkpoints took")
    assert saved[1] - saved[0] == 70  # minutes


def test_checkpoints_by_steps(monkeypatch):
    """Every N and the last one; 0: none, whatever the time."""
    clock = Clock(monkeypatch)
    assert clock.steps_with_a_save(SaveSchedule(4, 10, PARALLEL), 1, 10, 0) == [4, 8, 10]
    assert clock.steps_with_a_save(SaveSchedule(0, 10, PARALLEL), 1e6, 10, 0) == []


def test_ranks_save_after_the_same_step(monkeypatch):
    """The clock of another rank says that a checkpoint is due, and this one's does not."""
    Clock(monkeypatch)
    monkeypatch.setattr(PARALLEL, "max", lambda value: 1, raising=False)
    assert SaveSchedule(None, 10, PARALLEL).is_due(1, 10)


def test_a_run_with_defaults_that_is_killed_goes_on(make_trainer, monkeypatch, capsys):
    """No option names a checkpoint; time passes; the same command resumes, and ends as an uninterrupted run."""
    whole = make_trainer("exp_name=whole", "n_steps=5")
    whole.train()
    assert not whole.run.checkpoints.exists()  # it took less than a minute
    monkeypatch.setattr(saving, "MIN_INTERVAL", 0)
    monkeypatch.setattr(saving, "MAX_SHARE", float("inf"))
    with pytest.raises(KeyboardInterrupt):
        make_trainer("n_steps=5", **kill_at(4)).train()
    second = make_trainer("n_steps=5")
    second.train()
    assert second.checkpoint == second.run.checkpoint(3) and [row["step"] for row in metrics(second)] == [1, 2, 3, 4, 5]
    assert all(torch.equal(p, weights(second)[name]) for name, p in weights(whole).items())
    out = capsys.readouterr().out
    assert "a checkpoint about every 0:00" in out and "2 checkpoints took" in out


@pytest.mark.parametrize("asked", [True, False])
def test_a_checkpoint_that_nobody_asked_for_ends_no_run(make_trainer, monkeypatch, capsys, asked):
    """A full disk is reported at each attempt, and training goes on; with save_every_steps it ends the run."""
    monkeypatch.setattr(saving, "MIN_INTERVAL", 0)
    monkeypatch.setattr(saving, "MAX_SHARE", float("inf"))
    monkeypatch.setattr(checkpoint, "SPARE", 1e12)
    trainer = make_trainer(*(["save_every_steps=1"] if asked else []))
    if asked:
        with raises(RunError, "no-space", "step-1: ", "keep_checkpoints"):
            trainer.train()
    else:
        trainer.train()
        assert [code for _, code in problems(capsys.readouterr().out)] == ["no-space"] * 3
        assert trainer.run.final.exists() and trainer.step == 3


@pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
def test_the_best_so_far_is_always_there(make_trainer, rows_file, monkeypatch, losses):
    """Nothing beats step 0, ties included: best/ is the model of step 0."""
    trainer = make_trainer(f"eval_datasets=[{rows_file}]", "save_best=true", "eval_every_steps=2")
    values = iter(losses)
    monkeypatch.setattr(trainer, "evaluate", lambda: {"loss": next(values)})
    before = weights(trainer)
    trainer.train()
    saved = load_file(trainer.run.best / "model.safetensors")
    assert trainer.best == 1 and all(torch.equal(saved[name], before[f"model.{name}"]) for name in saved)


def test_a_metric_that_is_nan_is_not_the_best(make_trainer, rows_file, monkeypatch, capsys):
    """NaN at step 0 does not stay the best, as no comparison with it is true; that best/ is missing is said."""
    trainer = make_trainer(f"eval_datasets=[{rows_file}]", "save_best=true", "eval_every_steps=2")
    values = iter([float("nan"), 2.0, float("nan")])
    monkeypatch.setattr(trainer, "evaluate", lambda: {"loss": next(values)})
    trainer.train()
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if f"{trainer.run.best} " in line]
    assert "nan at step 0" in warning
    assert trainer.best == 2 and trainer.run.best.exists()


def test_a_best_that_is_missing_is_reported(make_trainer, rows_file, monkeypatch, capsys):
    """save_best set only when the run goes on: there is no best/ until something is better, which is said."""
    options = (f"eval_datasets=[{rows_file}]", "save_every_steps=1")
    make_trainer(*options, **stop_at(2)).train()
    trainer = make_trainer(*options, "save_best=true", "lr=0", "allow_changes=[lr]")
    monkeypatch.setattr(trainer, "evaluate", lambda: {"loss": 99.0})
    trainer.train()
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if f"{trainer.run.best} " in line]
    assert "loss" in warning and f"{trainer.best:.6g}" in warning
