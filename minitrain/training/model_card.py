"""The model card that goes with a saved model."""

import json
from typing import Any

from minitrain import __version__
from minitrain.config.saved import config_yaml, written
from minitrain.config.schema import Config


def model_card(config: Config, results: dict[str, float], n_examples: int, steps: int) -> str:
    """README.md of a saved model: what it was trained on, how, and how well it did."""
    options = written(config)
    base = _named(options["model"], "name_or_path")
    entries = options["datasets"] if isinstance(options["datasets"], list) else [options["datasets"]]
    files = "\n".join(f"- `{_named(entry, 'path')}`" for entry in entries)
    figures = "\n".join(f"| {name} | {value:.6g} |" for name, value in results.items()) or "| none | |"
    return f"""---
library_name: transformers
base_model: {json.dumps(base) if ": " in base else base}
tags: [minitrain, {config.loss["name"]}]
---

# {config.exp_name}

`{base}` trained with the loss `{config.loss["name"]}` by minitrain {__version__},
{steps} optimizer steps over {n_examples} examples.

## Data

{files}

## Results

| metric | value |
|---|---|
{figures}

## Options

```yaml
{config_yaml(config).strip()}
```
"""


def _named(section: Any, key: str) -> str:
    """Return the option that names a model or a file; a section that is one `${...}` stays as it is written."""
    return section[key] if isinstance(section, dict) else section
