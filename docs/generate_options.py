"""Write docs/options.md from the dataclasses of the options: ``python docs/generate_options.py > docs/options.md``."""

import sys
import types
import typing
from dataclasses import MISSING, is_dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from minitrain.config.schema import Config, option_fields
from minitrain.losses import registered
from minitrain.rl.rewards import registered as rewards

HEAD = """\
# Options

```bash
minitrain train config.yml --overrides lr=2e-5 model.policy_dtype=bfloat16 "datasets=[a.jsonl,b.csv]"
```

These are all options of a config file and of `--overrides`. `docs/generate_options.py` generates this page from
`minitrain/config/schema.py` and `sections.py`.

- Unknown keys, wrong types and options without effect are errors. All of them are reported at once.
- An option without effect is an error at its default, too. You may always write that something is off: `false`, `0`,
  `null`, or a section with such an entry. The `config.yml` of a run lists all options, and can be trained again.
- A number is at most 1,000,000,000 unless the table names another bound, and never nan or inf.
- `loss: dft` is short for `loss: {name: dft}`, and `datasets: a.jsonl` for `datasets: [{path: a.jsonl}]`.
- An override of one of `n_steps`/`n_epochs`, `warmup_steps`/`warmup_ratio`, `eval_datasets`/`validation_split` or
  `packing`/`group_by_length` replaces the other one in the file.
- `${oc.env:NAME}` is the environment variable NAME, and `${seed}` another option. The saved config keeps them
  unresolved, and messages show the variable instead of its value ([secrets](resume.md#secrets)).
- *free*: you may change this option when you resume a run ([resume.md](resume.md)).
"""


def document() -> str:
    """Return the page."""
    parts = [HEAD, section("Top level", Config)]
    for f in option_fields(Config):
        schema = nested(typing.get_type_hints(Config).get(f.name))
        if schema:
            also = " and `eval_datasets`" if f.name == "datasets" else ""
            entry = ", each entry" if f.name == "datasets" else ""
            if f.name != "eval_datasets":
                parts.append(section(f"`{f.name}`{also}{entry}", schema))
    for name, loss in registered().items():
        parts.append(section(f"`loss`, with `name: {name}`", loss.options_class))
    for name, reward in rewards().items():
        parts.append(section(f"`rollout.rewards`, each with `name: {name}` and `weight`", reward.options_class))
    return "\n".join(parts)


def nested(hint) -> type | None:
    """Return the dataclass in ``X`` or ``list[X]``, or None."""
    for candidate in (hint, *typing.get_args(hint)):
        if is_dataclass(candidate):
            return candidate
    return None


def section(title: str, schema: type) -> str:
    """Return the heading and the table of a dataclass."""
    hints = typing.get_type_hints(schema)
    lines = [f"## {title}", "", "| key | default | value | meaning |", "|---|---|---|---|"]
    for f in option_fields(schema):
        names = ", ".join(f"`{alias}`" for alias in f.metadata["aliases"])
        alias = f" (or {names})" if names else ""
        free = "" if f.metadata["affects_results"] else " *free*"
        help_text = f.metadata["help"].replace("|", "\\|")
        lines.append(
            f"| `{f.name}`{alias} | {default(f, hints[f.name])} | {value(f, hints[f.name])} | {help_text}{free} |"
        )
    return "\n".join([*lines, ""])


def default(f, hint) -> str:
    """Return the default as YAML."""
    if f.default is MISSING and f.default_factory is MISSING:
        return "required"
    if f.default is MISSING and is_dataclass(hint):
        return "see below"
    given = f.default if f.default is not MISSING else f.default_factory()
    if given is None:
        return ""
    if isinstance(given, dict):
        return "`{" + ", ".join(f"{key}: {entry}" for key, entry in given.items()) + "}`"
    return f"`{str(given).lower() if isinstance(given, bool) else given}`"


def value(f, hint) -> str:
    """Return the choices, or the type and limits, in words."""
    meta = f.metadata
    if meta["choices"]:
        numbers = ["a number"] * (meta["ge"] is not None)
        return ", ".join([*(f"`{choice}`" for choice in meta["choices"]), *numbers])
    limits = [("ge", "{} or more"), ("gt", "above {}"), ("lt", "below {}"), ("le", "{} or less")]
    bounds = [text.format(meta[name]) for name, text in limits if meta[name] is not None]
    return ", ".join([type_name(hint), *bounds])


def type_name(hint) -> str:
    """Return the name of a type for users."""
    words = {bool: "true or false", int: "integer", float: "number", str: "string", typing.Any: "string or list"}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return type_name(args[0])
    if origin is list:
        return {float: "list of numbers", typing.Any: "list"}.get(args[0], "list of entries")
    if origin is dict:
        return "keys and values"
    return "keys" if is_dataclass(hint) else words[hint]


if __name__ == "__main__":
    sys.stdout.write(document())
