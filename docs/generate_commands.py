"""Writes docs/commands.md, each command's own --help: ``python docs/generate_commands.py > docs/commands.md``."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from minitrain.cli.main import EXIT_CODES, _parser

HEAD = """\
# Commands

What `minitrain COMMAND --help` prints, put together by `docs/generate_commands.py`. `python train.py` is `minitrain
train`, and `python -m minitrain` is `minitrain`. Every command ends with one of these:

```
{exit_codes}```

What is to be mended is said in one line, or in a list of them, without a traceback. Several devices train with
`torchrun --nproc_per_node=N train.py CONFIG.yml` ([distributed.md](distributed.md)); the other commands use one.
"""

# An example of each command, and where more is said about it.
MORE = {
    "train": (
        "minitrain train example/quickstart-sft.yml --overrides exp_name=warmer lr=1e-2",
        "[options.md](options.md) has every option, [resume.md](resume.md) what is in a run folder.",
    ),
    "generate": (
        'minitrain generate runs/quickstart-sft --prompt "57 + 36 =" "reverse tiger"',
        "Rows of a file keep their other keys. [data.md](data.md) says which files are read.",
    ),
    "score": (
        'minitrain score runs/classify --text "kim sold the small owl"',
        "[losses.md](losses.md#classify-unit-example) says what is trained for it.",
    ),
    "chat": ("minitrain chat runs/quickstart-sft", "`/exit` ends it, `/reset` begins anew."),
    "merge": (
        "minitrain merge runs/lora-sft --output runs/merged",
        "[adapters.md](adapters.md#merging) says how weights are added.",
    ),
    "teach": (
        "minitrain teach example/kd.yml --overrides loss.top_k=16 --output runs/teacher.safetensors",
        "[losses.md](losses.md#kd-unit-supervised-token) says what it is for.",
    ),
    "plot": (
        "minitrain plot runs/quickstart-sft runs/warmer --output runs/metrics.png",
        "[metrics.md](metrics.md#looking-at-a-run) says what is drawn.",
    ),
    "doctor": (
        "minitrain doctor runs/quickstart-sft",
        "[metrics.md](metrics.md#looking-at-a-run) lists what it looks at.",
    ),
    "compare": (
        "minitrain compare runs/quickstart-sft runs/warmer",
        "[metrics.md](metrics.md#where-two-runs-part) says how to read it. Its exit code is 1 when the runs differ.",
    ),
    "inspect": (
        "minitrain inspect example/dpo.yml --rows 2",
        "[data.md](data.md#seeing-what-is-trained) shows what it prints.",
    ),
    "validate": (
        "minitrain validate example/quickstart-sft.yml example/dpo.yml --full",
        "[data.md](data.md#seeing-what-is-trained) explains its figures and what it refuses.",
    ),
}


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command by its name."""
    (sub,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return sub.choices


def document() -> str:
    """The whole page, as wide on every terminal."""
    os.environ["COLUMNS"] = "110"
    parts = [HEAD.format(exit_codes=EXIT_CODES.removeprefix("exit codes:\n"))]
    for name, parser in commands(_parser("minitrain")).items():
        told = parser.format_help().replace(EXIT_CODES.rstrip(), "").rstrip()
        example, more = MORE[name]
        parts.append(f"## {name}\n\n```\n{told}\n```\n\n{more} For example:\n\n```bash\n{example}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(document())
