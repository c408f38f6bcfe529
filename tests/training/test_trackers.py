"""Trackio and MLflow get the metrics and the options; stand-ins of the packages record what they are sent."""

import contextlib
import math
import sys
import types
import typing
from collections import namedtuple

import pytest

from tests.conftest import metrics

Metric = namedtuple("Metric", "key value timestamp step")
Param = namedtuple("Param", "key value")


def kill_at(step: int):
    def kill(trainer):
        if trainer.step == step:
            raise KeyboardInterrupt

    return kill


@pytest.fixture
def installed(monkeypatch):
    """``installed(name=module)``: a package that can be imported."""

    def install(**modules):
        for name, module in modules.items():
            module.__spec__ = object()
            monkeypatch.setitem(sys.modules, name.replace("__", "."), module)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())

    return install


@pytest.fixture
def trackio(installed):
    """The options of each run, and the (step, metrics) that all of them get."""
    module = types.ModuleType("trackio")
    module.started, module.logged = [], []

    def init(**options):
        print("* Trackio project initialized")
        module.started.append(options)
        return types.SimpleNamespace(log=lambda values, step: module.logged.append((step, values)))

    module.init, module.finish = init, lambda: print("* Run finished")
    installed(trackio=module)
    return module


def test_trackio_gets_metrics_and_config(make_trainer, trackio, capsys):
    """And none of its lines is printed."""
    make_trainer("trackio.enabled=true", "trackio.project=p", "trackio.space_id=a/b").train()
    (started,) = trackio.started
    assert (started["project"], started["space_id"], started["resume"]) == ("p", "a/b", "never")
    assert started["config"]["lr"] == 0.01
    assert [step for step, _ in trackio.logged] == [1, 2, 3] and "train/loss" in trackio.logged[0][1]
    assert "*" not in capsys.readouterr().out


def test_a_trackio_run_is_resumed_by_its_name(make_trainer, trackio):
    """Which no other run directory has; no row is sent twice."""
    for step in (2, None):
        trainer = make_trainer("trackio.enabled=true", "save_every_steps=1", on_step_end=kill_at(step))
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train()
    first, second = trackio.started
    assert first["name"] == second["name"] and first["name"].startswith("run-") and len(first["name"]) == 10
    assert (first["resume"], second["resume"]) == ("never", "allow")
    assert [step for step, _ in trackio.logged] == [1, 2, 3]


class Client:
    """A server of MLflow: experiments by name, runs with tags, params and metrics."""

    experiments: typing.ClassVar[dict[str, str]] = {}
    runs: typing.ClassVar[list] = []

    def __init__(self, tracking_uri):
        self.uri = tracking_uri

    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name):
        return self.experiments.setdefault(name, f"id of {name}")

    def create_run(self, experiment, run_name, tags):
        run = types.SimpleNamespace(experiment=experiment, name=run_name, tags=tags, params={}, metrics=[], status="")
        run.info = types.SimpleNamespace(run_id=len(self.runs))
        self.runs.append(run)
        return run

    def search_runs(self, experiments, query):
        tag = query.removeprefix("tags.minitrain_id = '").removesuffix("'")
        return [run for run in self.runs if run.experiment in experiments and run.tags["minitrain_id"] == tag]

    def update_run(self, run_id, status):
        self.runs[run_id].status = status

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100
        self.runs[run_id].metrics += metrics
        self.runs[run_id].params |= {param.key: param.value for param in params}

    def set_terminated(self, run_id):
        self.runs[run_id].status = "FINISHED"


@pytest.fixture
def mlflow(installed, monkeypatch):
    monkeypatch.setattr(Client, "experiments", {})
    monkeypatch.setattr(Client, "runs", [])
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")  # restored after the test
    module, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    module.MlflowClient, entities.Metric, entities.Param = Client, Metric, Param
    installed(mlflow=module, mlflow__entities=entities)
    return Client


def test_mlflow_gets_metrics_and_options(make_trainer, mlflow):
    """Options of sections have names with dots; names of metrics have only the characters that MLflow allows."""
    trainer = make_trainer("mlflow.enabled=true", "mlflow.experiment=e", "lora.rank=2")
    trainer.train()
    (run,) = mlflow.runs
    assert (run.name, run.experiment, run.status) == ("run", "id of e", "FINISHED")
    assert run.params["lora.rank"] == "2" and run.params["lr"] == "0.01" and len(run.params) > 100
    losses = [(one.step, one.value) for one in run.metrics if one.key == "train/loss"]
    assert losses == [(row["step"], row["loss"]) for row in metrics(trainer)]


def test_mlflow_gets_allowed_names(mlflow, make_trainer, tmp_path):
    from minitrain.training.trackers import TRACKERS

    config = make_trainer("mlflow.enabled=true").config
    log, _ = TRACKERS["mlflow"](config, tmp_path, {}, None)
    log(4, "eval", {"pass@4": 0.5, "reward/f(x)": math.nan})
    assert [one.key for one in mlflow.runs[0].metrics] == ["eval/pass_4", "eval/reward/f_x_"]


def test_an_mlflow_run_is_resumed_by_its_tag(make_trainer, mlflow):
    """The same run, with the options of its start; no row is sent twice."""
    for step in (2, None):
        trainer = make_trainer("mlflow.enabled=true", "save_every_steps=1", on_step_end=kill_at(step))
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train()
    (run,) = mlflow.runs
    assert [one.step for one in run.metrics if one.key == "train/loss"] == [1, 2, 3] and run.status == "FINISHED"


def test_the_packages_themselves(make_trainer, tmp_path, monkeypatch):
    """Where they are installed: a local run of each, read back."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    for step in (2, None):
        trainer = make_trainer(
            "trackio.enabled=true", "mlflow.enabled=true", "save_every_steps=1", on_step_end=kill_at(step)
        )
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train()
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("minitrain").experiment_id])
    losses = [(row["step"], row["loss"]) for row in metrics(trainer)]
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == losses
    assert run.data.params["lr"] == "0.01" and run.info.status == "FINISHED"
    (name,) = storage.get_runs("minitrain")
    logs = storage.get_logs("minitrain", name)
    assert [(row["step"], row["train/loss"]) for row in logs] == losses
