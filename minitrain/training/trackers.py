"""The trackers: TensorBoard, Weights & Biases, SwanLab, Trackio and MLflow.

Each function starts one and returns (log, close). Its package is imported only then.
"""

import contextlib
import io
import os
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from minitrain.config.schema import Config

RUN_ID = "tracker_id"
Log = Callable[[int, str, dict[str, float]], None]
Tracker = tuple[Log, Callable[[], Any]]
MLFLOW_BATCH = 100  # most parameters in a call


class Logged(NamedTuple):
    """What an interrupted run had logged before it was resumed.

    Attributes:
        step: Step of the checkpoint. Later rows are computed again.
        rows: Rows of `step` that are not computed again.
        last_steps: The last step that was logged, for each kind of row.
    """

    step: int
    rows: list[dict]
    last_steps: dict[str | None, int]


def is_enabled(config: Config, name: str) -> bool:
    """Return whether a tracker of `TRACKERS` is enabled."""
    return config.report_to_tensorboard if name == "tensorboard" else getattr(config, name).enabled


def _tensorboard(config: Config, folder: Path, settings: dict, logged: Logged | None) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=None if logged is None else logged.step)

    def log(step: int, kind: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(f"{kind}/{name}", value, step)
        writer.flush()

    for row in () if logged is None else logged.rows:  # these were purged with the later ones
        log(row["step"], row["kind"], {name: float(row[name]) for name in row.keys() - {"step", "kind"}})
    return log, writer.close


def _wandb(config: Config, folder: Path, settings: dict, logged: Logged | None) -> Tracker:
    import wandb

    run = wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=config.exp_name,
        dir=os.environ.get("WANDB_DIR", str(folder)),
        config=settings,
        settings=wandb.Settings(silent=True),
        id=_run_id(folder),
        resume=None if logged is None else "allow",
    )

    def log(step: int, kind: str, metrics: dict[str, float]) -> None:
        run.log({f"{kind}/{name}": value for name, value in metrics.items()} | {"step": step})

    return _only_new(log, logged), run.finish


def _swanlab(config: Config, folder: Path, settings: dict, logged: Logged | None) -> Tracker:
    import swanlab

    resume = (
        {"id": _run_id(folder), "resume": "allow"} if config.swanlab.mode == "cloud" else {}
    )  # other modes cannot resume
    run = swanlab.init(
        project=config.swanlab.project,
        experiment_name=config.exp_name,
        logdir=str(folder / "swanlab"),
        config=settings,
        mode=config.swanlab.mode,
        **resume,
    )

    def log(step: int, kind: str, metrics: dict[str, float]) -> None:
        run.log({f"{kind}/{name}": value for name, value in metrics.items()}, step=step)

    return _only_new(log, logged), swanlab.finish


def _trackio(config: Config, folder: Path, settings: dict, logged: Logged | None) -> Tracker:
    import trackio

    def quietly(function: Callable, *args: Any, **options: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a dozen lines
            return function(*args, **options)

    run = quietly(
        trackio.init,
        project=config.trackio.project,
        name=f"{config.exp_name}-{_run_id(folder)[:6]}",  # by which it is resumed
        space_id=config.trackio.space_id,
        config=settings,
        resume="never" if logged is None else "allow",
        embed=False,
        auto_log_cpu=False,
        auto_log_gpu=False,
    )

    def log(step: int, kind: str, metrics: dict[str, float]) -> None:
        run.log({f"{kind}/{name}": value for name, value in metrics.items()}, step=step)

    return _only_new(log, logged), lambda: quietly(trackio.finish)


def _mlflow(config: Config, folder: Path, settings: dict, logged: Logged | None) -> Tracker:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client, name = MlflowClient(config.mlflow.tracking_uri), config.mlflow.experiment
    found = client.get_experiment_by_name(name)
    experiment = client.create_experiment(name) if found is None else found.experiment_id
    tag = _run_id(folder)
    runs = client.search_runs([experiment], f"tags.minitrain_id = '{tag}'") if logged is not None else []
    if runs:
        run_id = runs[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        run_id = client.create_run(experiment, run_name=config.exp_name, tags={"minitrain_id": tag}).info.run_id
        params = [Param(key, str(value)) for key, value in _flat(settings).items()]
        for i in range(0, len(params), MLFLOW_BATCH):
            client.log_batch(run_id, params=params[i : i + MLFLOW_BATCH])

    def log(step: int, kind: str, metrics: dict[str, float]) -> None:
        now, pairs = int(1000 * time.time()), metrics.items()
        allowed = ((re.sub(r"[^\w\-. :/]", "_", f"{kind}/{name}"), value) for name, value in pairs)  # pass_4 for pass@4
        client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in allowed])

    return _only_new(log, logged), lambda: client.set_terminated(run_id)


def _flat(settings: dict, path: str = "") -> dict[str, Any]:
    """Return the options of all sections by keys such as `lora.rank`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) and value else {f"{path}{key}": value}
    return flat


def _run_id(folder: Path) -> str:
    """Return the id of this run for trackers, saved in the run directory for resuming."""
    file = folder / RUN_ID
    if file.exists() and (run_id := file.read_text(errors="replace").strip()).isalnum() and run_id.isascii():
        return run_id
    run_id = uuid.uuid4().hex[:21]
    file.write_text(run_id)
    return run_id


def _only_new(log: Log, logged: Logged | None) -> Log:
    """Skip rows that were logged before the interruption: they cannot be removed, and are computed again unchanged."""
    last_steps = {} if logged is None else logged.last_steps
    return lambda step, kind, metrics: log(step, kind, metrics) if step > last_steps.get(kind, -1) else None


TRACKERS: dict[str, Callable[[Config, Path, dict, Logged | None], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "swanlab": _swanlab,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
