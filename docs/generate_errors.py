"""Writes docs/errors.md from `minitrain.errors.CODES`: ``python docs/generate_errors.py > docs/errors.md``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from minitrain.errors import CODES

HEAD = """\
# Errors

```
$ minitrain train c.yml --overrides lr=-1
minitrain: 1 problem in the configuration
  --overrides: lr: must be 0 or more, got -1.0. [out-of-range]
```

An error names the file and line, or the option, says what is wrong, and what to do about it. It ends with a code in
brackets. Codes stay the same from version to version; the wording may change. All problems of a config come at once,
one per line. [resume.md](resume.md#stop-a-run) lists the exit codes.

With `--json`, a command prints the error on stdout, too: `{"error": {"code": ..., "message": ..., "issues": [...]}}`.
`validate --json` prints a list with an entry for each config.

In Python, every error is a `minitrain.MinitrainError`. Its `code` is one of these names and its `message` is the text
without the code. The error of a config has `issues`, each with `where`, `key`, `code` and `message`:

```python
from minitrain import ConfigError, load_config

try:
    config = load_config("c.yml", ["lr=-1"])
except ConfigError as error:
    print([(issue.key, issue.code) for issue in error.issues])  # [("lr", "out-of-range")]
```

`docs/generate_errors.py` writes this page from `minitrain/errors.py`.

| code | meaning |
|---|---|
"""


def document() -> str:
    return HEAD + "".join(f"| `{code}` | {meaning} |\n" for code, meaning in sorted(CODES.items()))


if __name__ == "__main__":
    sys.stdout.write(document())
