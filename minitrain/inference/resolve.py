"""Which folder a name on the command line stands for."""

from pathlib import Path

from minitrain.config.suggest import suggest
from minitrain.errors import ConfigError
from minitrain.io.paths import holds_model, looks_local


def find_model(source: str) -> str:
    """Return the folder with the model of a run, a model's own folder, or a name of the hub as it is.

    Raises ConfigError for a folder that is not there or holds no model.
    """
    folder = Path(source)
    if not folder.is_dir() and (looks_local(source) or _beside_runs(folder)):
        there = [str(run.parent) for run in folder.parent.glob("*/metrics.jsonl")]
        raise ConfigError(
            f"{source}: there is no such folder (seen from {Path.cwd()}).{suggest(source, there)}", "not-found"
        )
    if not folder.is_dir() or holds_model(folder):
        return source
    for name in ("final", "best"):
        if holds_model(folder / name):
            return str(folder / name)
    if (folder / "checkpoints").is_dir():
        raise ConfigError(
            f"{source}: this run is not finished; the same training command goes on with it.", "unfinished-run"
        )
    raise ConfigError(
        f"{source}: holds neither a model (config.json), an adapter, nor a finished run (final/).", "wrong-path"
    )


def _beside_runs(folder: Path) -> bool:
    """Whether ``runs/name`` can only be meant for a run, although hub names look like that too."""
    return len(folder.parts) == 2 and (folder.parts[0] == "runs" or any(folder.parent.glob("*/metrics.jsonl")))
