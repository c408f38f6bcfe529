"""What is wrong with a config: its types and limits first, then what types cannot say.

That is: options that contradict each other, would be ignored, or name what is not there.
"""

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .schema import FOREIGN_NAMES, RIVALS, Config, aliases, all_keys

WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "keys and values",
}
# They do not step on a gradient alone, or take only some shapes of parameters.
UNFIT_OPTIMIZERS = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}
NEEDS_EVAL_DATA = ("do_first_eval", "eval_every_steps", "n_eval_examples", "eval_batch_size", "save_best")


@dataclass
class Source:
    """Where the values came from, so that a problem can name its line."""

    name: str
    lines: dict[str, int] = field(default_factory=dict)
    overridden: set[str] = field(default_factory=set)

    def where(self, key: str) -> tuple[float, str]:
        """(a number to sort by, the place in words)."""
        if any(related(key, other) for other in self.overridden):
            return math.inf, "--overrides"
        while key and key not in self.lines:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return (self.lines[key], f"{self.name}:{self.lines[key]}") if key else (0, self.name)

    def wrote(self, key: str) -> bool:
        return key in self.lines or key in self.overridden


class Problems:
    """Collects everything that is wrong with a config, and raises it as one `ConfigError`."""

    def __init__(self, source: Source):
        self.source = source
        self.found: list[tuple[float, str]] = []
        self.spoilt: set[str] = set()  # keys that something was told about

    def add(self, key: str, what: str, *rests_on: str) -> None:
        """Notes a problem, unless `key`, or one of the keys that it `rests_on`, was found wrong before."""
        if any(related(spoilt, other) for spoilt in self.spoilt for other in (key, *rests_on)):
            return
        self.spoilt.add(key)
        order, place = self.source.where(key)
        self.found.append((order, f"{place}: {key}: {what}"))

    def raise_if_any(self) -> None:
        if self.found:
            count = "1 problem" if len(self.found) == 1 else f"{len(self.found)} problems"
            lines = [line for _, line in sorted(self.found, key=lambda pair: pair[0])]
            raise ConfigError(f"{count} in the configuration\n" + "\n".join(f"  {line}" for line in lines))


def related(a: str, b: str) -> bool:
    """Whether two keys are the same, or one is inside the other."""
    short, long = sorted((a, b), key=len)
    return long == short or long.startswith((f"{short}.", f"{short}["))


def shown(value: Any) -> str:
    """A value as an error message shows it."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# -------------------------------------------------------------------------------------------- types and limits


class _Unfit(Exception):
    """A value is not of its type or outside of its limits; the message says what was expected."""


def check_types(schema: type, given: dict, path: str, problems: Problems) -> dict:
    """The values of `given` converted to the types of `schema`. What does not fit is told and left out."""
    known = {f.name: f for f in fields(schema) if f.init}
    hints = typing.get_type_hints(schema)
    values = {}
    for key, value in ((str(key), value) for key, value in given.items()):
        full = f"{path}{key}"
        if key not in known:
            _add_unknown(key, path, list(known), problems)
        elif value == "???":
            problems.add(full, "is left open (???); give it a value.")
        else:
            try:
                values[key] = _value(hints[key], value, full, problems)
                check_limits(known[key].metadata, values[key])
            except _Unfit as error:
                values.pop(key, None)
                problems.add(full, str(error))
    for name, f in known.items():
        if name not in given and f.default is MISSING and f.default_factory is MISSING:
            problems.add(f"{path}{name}", f"is missing. {f.metadata['help']}")
        if name not in values and is_dataclass(hints[name]):
            values[name] = check_types(hints[name], {}, f"{path}{name}.", problems)
    return values


def _value(hint: Any, value: Any, key: str, problems: Problems) -> Any:
    """`value` as type `hint`: a nested dataclass, a list of them, or a leaf. Raises _Unfit."""
    args = typing.get_args(hint)
    if is_dataclass(hint):
        if isinstance(value, dict):
            return check_types(hint, value, f"{key}.", problems)
        names = ", ".join(f.name for f in fields(hint))
        problems.add(key, f"expected {WORDS[dict]} ({names}), got {shown(value)}.")
        return {}
    if typing.get_origin(hint) is list and is_dataclass(args[0]) and isinstance(value, list):
        return [_value(args[0], entry, f"{key}[{i}]", problems) for i, entry in enumerate(value)]
    return _leaf(hint, value)


def _leaf(hint: Any, value: Any) -> Any:
    """`value` as a type without dataclasses in it. Raises _Unfit."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (value is None and types.NoneType in args):
        return value
    if origin is types.UnionType:  # X | None
        return _leaf(args[0], value)
    if origin is list and isinstance(value, list):
        return [_leaf(args[0], entry) for entry in value]
    if origin is dict and isinstance(value, dict):
        return {str(name): _leaf(args[1], entry) for name, entry in value.items()}
    converted = _scalar(hint, value)
    if converted is None:
        quotes = " Put it in quotes." if hint is str and type(value) is float else ""
        raise _Unfit(f"expected {WORDS[origin or hint]}, got {shown(value)}.{quotes}")
    return converted


def _scalar(kind: type, value: Any) -> bool | int | float | str | None:
    """`value` as a bool, int, float or str where nothing is lost by it, else None. ``${oc.env:X}`` gives texts."""
    if kind is bool:
        return {"true": True, "false": False}.get(str(value).lower())
    if kind is str:
        return str(value) if type(value) is int or isinstance(value, (str, Path)) else None
    if kind not in (int, float) or type(value) not in (int, float, str):
        return None
    try:
        number = float(value)
        if kind is float:
            return number if math.isfinite(number) else None
        return int(value) if int(number) == number else None
    except (ValueError, OverflowError):
        return None


def check_limits(meta: dict, value: Any) -> None:
    """Raises _Unfit for a value that its option does not allow."""
    if value is None:
        return
    if meta["choices"] and value not in meta["choices"]:
        raise _Unfit(f"{value!r} is not one of {', '.join(meta['choices'])}.{nearest(value, meta['choices'])}")
    if meta["least"] is not None and value < meta["least"]:
        raise _Unfit(f"must be {meta['least']} or more, got {value}.")
    if meta["above"] is not None and value <= meta["above"]:
        raise _Unfit(f"must be above {meta['above']}, got {value}.")
    if meta["most"] is not None and value > meta["most"]:
        raise _Unfit(f"must be {meta['most']} or less, got {value}.")


# ------------------------------------------------------------------------------------------------ unknown names


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean ...?`` with the nearest of the known names, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]}?" if match else ""


def _add_unknown(name: str, path: str, known: list[str], problems: Problems) -> None:
    """Tells of a key that does not exist, and of the one that was meant if it can be guessed."""
    foreign, meant = FOREIGN_NAMES.get(name, ""), _meant(name, path, known)
    here = re.split("[ =,]", foreign)[0]
    if name in aliases():
        hint = f"is another name of {aliases()[name]}; give only one of them."
    elif foreign and here != f"{path}{name}":
        hint, meant = f"there is no such option. Here it is called {foreign}.", [here]
    elif meant:
        hint = f"there is no such option. Did you mean {' or '.join(meant)}?"
    else:
        hint = "there is no such option." + (f" There are {', '.join(known)}." if len(known) <= 12 else "")
    problems.add(f"{path}{name}", hint)
    problems.spoilt.update(key for key in meant if not problems.source.wrote(key))


def _meant(name: str, path: str, known: list[str]) -> list[str]:
    """Keys of this name in other sections, else a like one in this section, else like ones in others."""
    everywhere = [(key, key.rpartition(".")[2]) for key in all_keys()]
    if same := [key for key, last in everywhere if last == name]:
        return same
    if here := difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return [f"{path}{here[0]}"]
    like = difflib.get_close_matches(name, [last for _, last in everywhere], n=1, cutoff=0.75)
    return [key for key, last in everywhere if last in like]


# ----------------------------------------------------------------------------------------- what types cannot say


def check_config(config: Config, defaults: Config, problems: Problems) -> None:
    """Adds to `problems` what is wrong with `config`. An option at its default does not count as ignored."""
    given = {f.name for f in fields(Config) if getattr(config, f.name) != getattr(defaults, f.name)}
    _check_run(config, problems)
    _check_files(config, problems)
    _check_data(config, given, problems)
    _check_model(config, problems)
    _check_loss(config, problems)
    _check_steps(config, problems)
    _check_optimizer(config, given, problems)
    _check_evaluation(config, given, problems)


def _check_run(config: Config, problems: Problems) -> None:
    from importlib.util import find_spec

    from .engine.parallel import pick_device

    if not config.exp_name or config.exp_name in (".", "..") or re.search(r"[/\\\0]", config.exp_name):
        problems.add("exp_name", f"{config.exp_name!r} is not the name of a folder; set output_dir for its place.")
    if config.resume not in ("auto", "never") and not Path(config.resume).is_dir():
        problems.add("resume", f"{config.resume!r} is neither auto, never, nor the folder of a checkpoint.")
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        problems.add("trainer", f"BasicTrainer trains on one device, but torchrun started {processes} processes.")
    try:
        pick_device(config.device)
    except ConfigError as error:
        problems.add("device", str(error).removeprefix("device: ") + ".")
    if config.report_to_tensorboard and find_spec("tensorboard") is None:
        problems.add("report_to_tensorboard", "the package tensorboard is not installed: pip install tensorboard")
    for name in ("wandb", "swanlab"):
        if getattr(config, name).enabled and find_spec(name) is None:
            problems.add(f"{name}.enabled", f"the package {name} is not installed: pip install {name}")


def _check_files(config: Config, problems: Problems) -> None:
    from .data.files import FORMATS
    from .data.records import SCHEMAS

    if not config.datasets:
        problems.add("datasets", "is missing: name at least one file, for example datasets=[data.jsonl].")
    for name, entries in (("datasets", config.datasets), ("eval_datasets", config.eval_datasets)):
        for i, entry in enumerate(entries):
            key, path = f"{name}[{i}]", Path(entry.path)
            if path.is_dir():
                problems.add(f"{key}.path", f"{path} is a folder; name a file in it.")
            elif not path.exists():
                problems.add(f"{key}.path", f"there is no file {path} (seen from {Path.cwd()}).{_near_file(path)}")
            elif not os.access(path, os.R_OK):
                problems.add(f"{key}.path", f"no permission to read {path}.")
            elif path.name.removesuffix(".gz").rpartition(".")[2].lower() not in FORMATS:
                problems.add(f"{key}.path", f"{path.name} is no .{', .'.join(FORMATS)} file (.gz behind it is fine).")
            if entry.type is not None and entry.type not in SCHEMAS:
                hint = nearest(entry.type, SCHEMAS)
                problems.add(f"{key}.type", f"{entry.type!r} is not one of {', '.join(SCHEMAS)}.{hint}")
            if name == "eval_datasets" and entry.weight != 1:
                problems.add(f"{key}.weight", "has no meaning for evaluation, which sees every example once.")


def _near_file(path: Path) -> str:
    """A file of nearly that name in the same folder."""
    match = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1, cutoff=0.8)
    return f" Did you mean {path.parent / match[0]}?" if match else ""


def _check_data(config: Config, given: set[str], problems: Problems) -> None:
    for winner, loser in RIVALS:
        if winner in given and loser in given:
            problems.add(loser, f"would be ignored beside {winner}; give one of them.", winner)
    if config.validation_split > 1 and config.validation_split != int(config.validation_split):
        problems.add("validation_split", "is a share below 1 or a whole number of examples.")
    if config.chat_template not in ("auto", "chatml", "none"):
        try:
            Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ValueError):
            problems.add("chat_template", f"{config.chat_template!r} is neither auto, chatml, none, nor a text file.")
    if "max_bad_rows" in given and config.on_bad_row == "error":
        problems.add("max_bad_rows", "would be ignored: it needs on_bad_row=skip.", "on_bad_row")


def _check_model(config: Config, problems: Problems) -> None:
    model = config.model
    key, folder = "model.name_or_path", Path(model.name_or_path)
    is_local = looks_local(model.name_or_path)
    if model.name_or_path != "tiny" and is_local:
        if not folder.is_dir():
            problems.add(key, f"there is no folder {folder} (seen from {Path.cwd()}).{_near_file(folder)}")
        elif (folder / "final" / "config.json").is_file():
            problems.add(key, f"{folder} is the folder of a run; its model is {folder / 'final'}.")
        elif not (folder / "config.json").is_file():
            problems.add(key, f"{folder} holds no config.json, so it is not a model's folder.")
    if model.revision is not None and (model.name_or_path == "tiny" or is_local):
        problems.add("model.revision", "would be ignored: the model does not come from the hub.", key)
    tokenizer = model.tokenizer_name_or_path
    if tokenizer and looks_local(tokenizer) and not Path(tokenizer).is_dir():
        problems.add("model.tokenizer_name_or_path", f"there is no folder {tokenizer} (seen from {Path.cwd()}).")
    archive = model.archive
    if archive and not (Path(archive).is_file() and archive.endswith((".pt", ".bin", ".safetensors"))):
        problems.add("model.archive", f"{archive} is not a .safetensors, .pt or .bin file that exists.")
    for entry in config.freeze_layers:
        if not re.fullmatch(r"\d+(-\d+)?|embeddings", str(entry)):
            problems.add("freeze_layers", f"{entry!r} is neither a number, a range like 0-5, nor `embeddings`.")


def looks_local(name: str) -> bool:
    """Whether a model's name can only be that of a folder; on the hub it is `name` or `owner/name`."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or len(Path(name).parts) > 2


def _check_loss(config: Config, problems: Problems) -> None:
    from .losses import registered

    name, known = config.loss["name"], registered()
    if name not in known:
        hint = nearest(str(name), known)
        problems.add("loss.name", f"there is no loss {name!r}; there are {', '.join(known)}.{hint}")
        return
    options = {key: value for key, value in config.loss.items() if key != "name"}
    config.loss = {"name": name} | check_types(known[name].options_class, options, "loss.", problems)


def _check_steps(config: Config, problems: Problems) -> None:
    if config.total_batch_size % config.gradient_accumulation_steps:
        problems.add(
            "total_batch_size",
            f"{config.total_batch_size} examples cannot be cut into gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} equal micro-batches.",
        )
    if config.n_steps is not None and config.warmup_steps > config.n_steps:
        problems.add("warmup_steps", f"{config.warmup_steps} is more than n_steps={config.n_steps}.")


def _check_optimizer(config: Config, given: set[str], problems: Problems) -> None:
    from .engine.optim import accepted_options, optimizer_class

    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        problems.add("betas", f"expected two numbers from 0 to below 1, got {config.betas}.")
    try:
        chosen = optimizer_class(config.optimizer, UNFIT_OPTIMIZERS)
    except ConfigError as error:
        problems.add("optimizer", str(error))
        return
    accepted = accepted_options(chosen)
    for key in ("betas", "eps", "weight_decay"):
        if key in given and key not in accepted:
            problems.add(key, f"would be ignored: {chosen.__name__} has no {key}.", "optimizer")
    own = [name for name in accepted if name not in ("params", "lr", "betas", "eps", "weight_decay")]
    for key in config.optimizer_args:
        if key not in own:
            problems.add(f"optimizer_args.{key}", f"{chosen.__name__} takes {', '.join(own)}.", "optimizer")


def _check_evaluation(config: Config, given: set[str], problems: Problems) -> None:
    stopping, answers = config.early_stopping, config.eval_generate
    if not config.eval_datasets and not config.validation_split:
        needs_data = "would be ignored: there is nothing to evaluate on. Give eval_datasets or validation_split."
        for key in (*NEEDS_EVAL_DATA, "eval_generate", "early_stopping"):
            if key in given:
                problems.add(key, needs_data, "eval_datasets", "validation_split")
    if config.n_eval_examples and answers.n_examples > config.n_eval_examples:
        problems.add("eval_generate.n_examples", f"is more than n_eval_examples={config.n_eval_examples}.")
    if stopping.patience and not config.eval_every_steps:
        problems.add("early_stopping.patience", "would be ignored: it needs eval_every_steps.", "eval_every_steps")
    if stopping.metric == "exact_match" and not answers.n_examples:
        problems.add("early_stopping.metric", "exact_match needs eval_generate.n_examples.", "eval_generate")
