"""The model card that goes with a saved model."""

from . import __version__
from .saved_config import config_yaml
from .schema import Config


def model_card(config: Config, results: dict[str, float], n_examples: int, steps: int) -> str:
    """README.md of a saved model: what it was trained on, how, and how well it did."""
    files = "\n".join(f"- `{entry.path}`" for entry in config.datasets)
    figures = "\n".join(f"| {name} | {value:.6g} |" for name, value in results.items()) or "| none | |"
    return f"""---
library_name: transformers
base_model: {config.model.name_or_path}
tags: [minitrain, {config.loss["name"]}]
---

# {config.exp_name}

`{config.model.name_or_path}` trained with the loss `{config.loss["name"]}` by minitrain {__version__},
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
