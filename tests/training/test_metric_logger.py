"""Trackers get the figures, and none of them can stop training."""

import contextlib
import json
import signal
import sys
import types

import pytest

from minitrain import RunError
from minitrain.training.metric_logger import duration, train_line
from tests.conftest import metrics


def test_every_figure_is_in_metrics_jsonl(make_trainer, rows_file):
    """One object a line, train and eval, with all that users read."""
    trainer = make_trainer(f"eval_datasets=[{rows_file}]")
    trainer.train()
    wanted = {
        "loss",
        "avg_p_correct",
        "perplexity",
        "lr",
        "grad_norm",
        "epoch",
        "tokens",
        "tokens_per_second",
        "padding",
        "memory_gb",
        "eta_seconds",
    }
    assert all(wanted <= row.keys() for row in metrics(trainer))
    assert {"loss", "perplexity", "avg_p_correct"} <= metrics(trainer, "eval")[0].keys()
    assert metrics(trainer)[-1]["epoch"] == pytest.approx(24 / 40)


def test_tensorboard_gets_the_same_figures(make_trainer):
    """Its event files hold train/loss at each log step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer("report_to_tensorboard=true")
    trainer.train()
    events = EventAccumulator(str(trainer.run.path / "tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert logged == [(row["step"], pytest.approx(row["loss"])) for row in metrics(trainer)]


def test_a_tracker_that_fails_is_switched_off_with_one_warning(make_trainer, monkeypatch, capsys):
    """swanlab raises at every call: one warning, and training ends well."""

    class Run:
        def log(self, *args, **kwargs):
            raise ConnectionError("no route to host")

    fake = types.SimpleNamespace(init=lambda **kwargs: Run(), finish=lambda: None, __spec__=object())
    monkeypatch.setitem(sys.modules, "swanlab", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    trainer = make_trainer("swanlab.enabled=true")
    trainer.train()
    out = capsys.readouterr().out
    assert out.count("swanlab failed") == 1 and "no route to host" in out
    assert trainer.run.final.exists()


def test_wandb_offline_gets_figures_and_config(make_trainer, monkeypatch):
    """What is sent: kind/name, the step, and the config."""
    import wandb

    logged, started = [], {}

    class Run:
        def log(self, figures):
            logged.append(figures)

        def finish(self):
            pass

    monkeypatch.setattr(wandb, "init", lambda **kwargs: started.update(kwargs) or Run())
    make_trainer("wandb.enabled=true", "wandb.project=p").train()
    assert started["project"] == "p" and started["name"] == "run" and started["config"]["lr"] == 0.01
    assert [figures["step"] for figures in logged] == [1, 2, 3] and "train/loss" in logged[0]


@pytest.mark.parametrize("named", [True, False])
def test_wandb_writes_where_its_own_variable_says(make_trainer, monkeypatch, named):
    """WANDB_DIR decides, as for every user of wandb; the run directory is the place when it is not set."""
    import wandb

    started = {}
    monkeypatch.setenv("WANDB_DIR", "/elsewhere") if named else monkeypatch.delenv("WANDB_DIR", raising=False)
    fake = types.SimpleNamespace(log=lambda figures: None, finish=lambda: None)
    monkeypatch.setattr(wandb, "init", lambda **kwargs: started.update(kwargs) or fake)
    trainer = make_trainer("wandb.enabled=true")
    trainer.train()
    assert started["dir"] == ("/elsewhere" if named else str(trainer.run.path))


@pytest.mark.slow
def test_wandb_itself_runs_offline(make_trainer, monkeypatch):
    """A real offline run leaves its folder inside the run directory."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = make_trainer("wandb.enabled=true")
    trainer.train()
    assert list((trainer.run.path / "wandb").glob("offline-run-*"))


def test_debug_sends_nothing_to_trackers(make_trainer):
    """debug=true keeps metrics.jsonl and nothing else."""
    trainer = make_trainer("debug=true", "report_to_tensorboard=true")
    trainer.train()
    assert metrics(trainer) and not (trainer.run.path / "tensorboard").exists()


def test_closed_stdout_does_not_stop_training(make_trainer, monkeypatch):
    """`| head` closes the pipe: training goes on to the end."""

    class Closed:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    trainer = make_trainer()
    monkeypatch.setattr(sys, "stdout", Closed())
    trainer.train()
    assert trainer.run.final.exists()


def test_the_console_line_is_tidy():
    """Fixed order, no long decimals."""
    figures = {"loss": 1.23456, "lr": 2e-5, "grad_norm": 0.98765, "tokens_per_second": 12345.6, "padding": 0.031}
    line = train_line(5, 100, figures | {"memory_gb": 1.5, "eta_seconds": 3661})
    assert line == (
        "step   5/100  loss 1.2346  lr 2.00e-05  grad_norm 0.988  12,346 tok/s  padding 3%  mem 1.50 GB  eta 1:01:01"
    )
    assert duration(59.6) == "1:00" and duration(float("inf")) == "?"


def test_the_model_card_states_data_options_and_results(make_trainer, rows_file):
    """README.md beside the model."""
    trainer = make_trainer(f"eval_datasets=[{rows_file}]")
    trainer.train()
    card = (trainer.run.final / "README.md").read_text()
    assert str(rows_file) in card and "| eval loss |" in card and "lr: 0.01" in card and "library_name" in card


def test_the_config_in_the_run_folder_makes_the_same_run(make_trainer):
    """config.yml is complete and loads."""
    from minitrain import load_config

    trainer = make_trainer("loss.label_smoothing=0.1")
    trainer.train()
    again = load_config(trainer.run.path / "config.yml")
    assert again == trainer.config


def test_metrics_hold_no_invalid_json(make_trainer):
    """Infinite and undefined figures are texts."""
    trainer = make_trainer("lr=1000", "n_steps=6")
    with contextlib.suppress(RunError):
        trainer.train()
    for line in (trainer.run.path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_what_comes_from_the_environment_is_never_kept(make_trainer, monkeypatch):
    """A value from ${oc.env:...} is in no file of the run and is not sent to trackers."""
    import wandb

    started = {}
    monkeypatch.setenv("MY_ENTITY", "top-secret-name")
    fake = types.SimpleNamespace(log=lambda figures: None, finish=lambda: None)
    monkeypatch.setattr(wandb, "init", lambda **kwargs: started.update(kwargs) or fake)
    trainer = make_trainer("wandb.enabled=true", "wandb.entity=${oc.env:MY_ENTITY}")
    trainer.train()
    assert started["entity"] == "top-secret-name" and "top-secret-name" not in json.dumps(started["config"])
    for file in trainer.run.path.rglob("*"):
        assert not file.is_file() or b"top-secret-name" not in file.read_bytes(), file


def test_quiet_prints_nothing(make_trainer, rows_file, capsys):
    """Neither lines nor answers nor bars, on either stream; the figures are in the file as always."""
    generate = "eval_generate={n_examples: 2, max_new_tokens: 2}"
    trainer = make_trainer("quiet=true", f"eval_datasets=[{rows_file}]", generate)
    trainer.train()
    assert capsys.readouterr() == ("", "") and len(metrics(trainer)) == 3 and trainer.run.final.exists()
    make_trainer("quiet=true", f"eval_datasets=[{rows_file}]", generate).train()  # it is finished already
    assert capsys.readouterr() == ("", "")


def test_quiet_leaves_warnings(make_trainer, capsys):
    """A step that is skipped, a tracker that fails and a signal are told in any case."""
    trainer = make_trainer("quiet=true", "lr=1000", "max_grad_norm=0", "optimizer=SGD", "n_steps=50", "max_bad_steps=2")
    with pytest.raises(RunError):
        trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("loss or gradient is not finite" in line for line in lines)
    trainer = make_trainer(
        "quiet=true", "exp_name=other", on_step_end=lambda trainer: signal.raise_signal(signal.SIGINT)
    )
    trainer.train()
    assert "stopped by SIGINT at step 1" in capsys.readouterr().out


def kill_at(step: int):
    def kill(trainer):
        if trainer.step == step:
            raise KeyboardInterrupt

    return kill


def test_tensorboard_has_each_point_once_after_a_kill(make_trainer, rows_file, monkeypatch):
    """Steps after the checkpoint are computed again: their first points are purged, and no other one is lost."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Files of one second are read in the order of their names, in which the tenth of a process is before the second.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))

    options = ("report_to_tensorboard=true", f"eval_datasets=[{rows_file}]", "eval_every_steps=1", "n_steps=5")
    for step in (4, 5, None):
        trainer = make_trainer(*options, "save_every_steps=2", on_step_end=kill_at(step))
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train()
    assert trainer.step == 5 and trainer.checkpoint == trainer.run.checkpoint(4)
    events = EventAccumulator(str(trainer.run.path / "tensorboard"))
    events.Reload()
    for kind, steps in (("train", range(1, 6)), ("eval", range(6))):
        assert [event.step for event in events.Scalars(f"{kind}/loss")] == list(steps)
        found = [event.value for event in events.Scalars(f"{kind}/loss")]
        assert found == pytest.approx([row["loss"] for row in metrics(trainer, kind)])


def test_a_wandb_run_is_resumed(make_trainer, rows_file, monkeypatch):
    """The same id, and nothing that was sent before is sent again; a run that starts from step 0 gets another id."""
    import wandb

    logged, started = [], []
    fake = types.SimpleNamespace(log=logged.append, finish=lambda: None)
    monkeypatch.setattr(wandb, "init", lambda **kwargs: started.append((kwargs["id"], kwargs["resume"])) or fake)
    options = ("wandb.enabled=true", f"eval_datasets=[{rows_file}]", "eval_every_steps=1", "n_steps=5")
    for step, every in ((3, 0), (4, 2), (None, 2)):
        trainer = make_trainer(*options, f"save_every_steps={every}", on_step_end=kill_at(step))
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train()
    (first, new), (second, restarted), (third, resumed) = started
    assert len(first) == 21 and second != first and third == second
    assert (new, restarted, resumed) == (None, None, "allow")
    sent = [(next(iter(row)).partition("/")[0], row["step"]) for row in logged]
    after = sent[sent.index(("eval", 0), 1) :]  # the second start
    assert sorted(after) == [*(("eval", step) for step in range(6)), *(("train", step) for step in range(1, 6))]


def test_a_swanlab_run_is_resumed(make_trainer, monkeypatch):
    """In its cloud, which alone can do it."""
    started = []
    fake = types.SimpleNamespace(finish=lambda: None, __spec__=object())
    fake.init = lambda **kwargs: started.append(kwargs) or types.SimpleNamespace(log=lambda *args, **kwargs: None)
    monkeypatch.setitem(sys.modules, "swanlab", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for mode in ("cloud", "local"):
        for step in (2, None):
            hooks = {"on_step_end": kill_at(step)}
            trainer = make_trainer(
                "swanlab.enabled=true", f"swanlab.mode={mode}", f"exp_name={mode}", "save_every_steps=1", **hooks
            )
            with contextlib.suppress(KeyboardInterrupt):
                trainer.train()
    assert started[0]["id"] == started[1]["id"] and started[0]["resume"] == "allow"
    assert not {"id", "resume"} & started[2].keys()
