"""Find the model of a run."""

from pathlib import Path

from minitrain.config.suggest import suggest
from minitrain.errors import ConfigError
from minitrain.io.paths import holds_model, looks_local


def find_model(source: str) -> str:
    """Return the folder of a run's model; a model folder or the name of a Hub model is returned unchanged.

    Raises:
        ConfigError: The folder does not exist or has no model.
    """
    folder = Path(source)
    if not folder.is_dir() and (looks_local(source) or _looks_like_run(folder)):
        runs = [str(run.parent) for run in folder.parent.glob("*/metrics.jsonl")]
        advice = suggest(source, runs) or " Check the path."
        raise ConfigError(f"{source}: folder does not exist (relative to {Path.cwd()}).{advice}", "not-found")
    if not folder.is_dir() or holds_model(folder):
        return source
    for name in ("final", "best"):
        if holds_model(folder / name):
            return str(folder / name)
    if (folder / "checkpoints").is_dir():
        raise ConfigError(
            f"{source}: the run is not finished. Resume it with the same training command.", "unfinished-run"
        )
    raise ConfigError(
        f"{source}: has no model (config.json), adapter or finished run (final/). Name another folder.", "wrong-path"
    )


def _looks_like_run(folder: Path) -> bool:
    """Return whether ``runs/name``, which could also name a Hub model, is next to other runs."""
    return len(folder.parts) == 2 and (folder.parts[0] == "runs" or any(folder.parent.glob("*/metrics.jsonl")))
