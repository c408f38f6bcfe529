"""Write docs/api.md from the public names of minitrain: ``python docs/generate_api.py > docs/api.md``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import minitrain

HEAD = """\
# Python API

```python
from minitrain import Trainer, load_config

trainer = Trainer(load_config("config.yml", ["lr=1e-4"]))
trainer.train()
```

Import these names from `minitrain`. They load on first use, so `import minitrain` does not import torch. `make docs`
builds this page with the docstrings of all names; in Python, `help(minitrain.Trainer)` shows the same.
"""

# The attributes of a config have a page of their own.
OPTIONS_PAGE = """\
    options:
      members: []
      show_signature: false

[options.md](options.md) lists its attributes.
"""


def document() -> str:
    """Return the page: for each name, the directive by which mkdocstrings shows its docstring."""
    return "\n".join([HEAD, *map(directive, minitrain.__all__)])


def directive(name: str) -> str:
    public = getattr(minitrain, name)
    return f"::: {public.__module__}.{public.__qualname__}\n" + (OPTIONS_PAGE if name == "Config" else "")


if __name__ == "__main__":
    sys.stdout.write(document())
