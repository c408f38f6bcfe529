"""Run the checks of a model type, and keep what comes out of them in docs/architectures.json.

An outcome is "ok", "refused", "n/a", "wrong" or "crash", all but the first with a reason.
"""

import json
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from transformers.models.auto import modeling_auto

from minitrain.errors import MinitrainError
from tests.architectures import causal, classifiers
from tests.architectures.oracle import NotApplicableError
from tests.architectures.sizes import NOT_OF_TOKENS
from tests.shapes import time_limit

FILE = Path(__file__).parents[2] / "docs" / "architectures.json"
BUILT = "built"  # the outcome of making the model
LONGEST = 300  # characters of a reason


class Group(NamedTuple):
    """Model types with the same checks."""

    kinds: list[str]
    checks: tuple[str, ...]
    make: Callable


GROUPS = {
    "causal": Group([*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES], causal.CHECKS, causal.Causal),
    "classifiers": Group(
        [*modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES], classifiers.CHECKS, classifiers.Classifier
    ),
}


class Outcome(NamedTuple):
    word: str
    reason: str = ""

    @property
    def code(self) -> str:
        """The code of the error of a refusal."""
        match = re.search(r"\[([a-z-]+)\]$", self.reason)
        return match[1] if match else ""


OK = Outcome("ok")


def run_checks(group: str, kind: str, folder: Path, checks: tuple[str, ...] = (), seconds: int = 240):
    """Return the outcome of each check of a model type.

    Args:
        group: "causal" or "classifiers".
        kind: The model type.
        folder: An empty folder.
        checks: Names of the checks (default: all).
        seconds: What all of them may take.
    """
    outcomes: dict[str, Outcome] = {}
    made: list = []
    try:
        with time_limit(seconds):
            if group == "causal" and kind in NOT_OF_TOKENS:
                return {BUILT: Outcome("n/a", NOT_OF_TOKENS[kind])}
            outcomes[BUILT] = _run(lambda: made.append(GROUPS[group].make(kind, folder)))
            if made:
                for check in checks or GROUPS[group].checks:
                    outcomes[check] = _run(getattr(made[0], check))
    except TimeoutError:
        outcomes[next(c for c in GROUPS[group].checks if c not in outcomes)] = Outcome("crash", "takes too long")
    names = {str(folder): "DIR", **({made[0].class_name: "MODEL"} if made else {}), kind: "TYPE"}
    return {check: _general(outcome, names) for check, outcome in outcomes.items()}


def _run(check: Callable[[], None]) -> Outcome:
    try:
        check()
    except TimeoutError:
        raise
    except NotApplicableError as error:
        return Outcome("n/a", str(error))
    except AssertionError as error:
        return Outcome("wrong", str(error))
    except MinitrainError as error:
        return Outcome("refused", str(error))
    except ImportError as error:
        return Outcome("n/a", str(error).strip().partition(" but ")[0])
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
        return Outcome("crash", reason)
    return OK


def _general(outcome: Outcome, names: dict[str, str]) -> Outcome:
    """Return an outcome without the names of its model, so that those of several models are equal."""
    reason = re.sub(r"\s+", " ", outcome.reason)
    for name, word in names.items():
        reason = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", word, reason)
    code = outcome.code and f" [{outcome.code}]"
    if len(reason) > LONGEST:
        reason = f"{reason[: LONGEST - len(code)]}...{code}"
    return Outcome(outcome.word, reason)


class Table:
    """The outcomes of all model types, as in docs/architectures.json.

    The file has each reason once. A row has the outcomes that are not ok, as a word and the number of its reason.
    """

    def __init__(self, path: Path = FILE):
        content = json.loads(path.read_text()) if path.exists() else {"transformers": "", "reasons": []}
        self.transformers: str = content["transformers"]
        self.rows: dict[str, dict[str, dict[str, Outcome]]] = {
            group: {
                kind: {check: self._read(cell, content["reasons"]) for check, cell in row.items()}
                for kind, row in content.get(group, {}).items()
            }
            for group in GROUPS
        }

    @staticmethod
    def _read(cell: str, reasons: list[str]) -> Outcome:
        word, _, number = cell.partition(" ")
        return Outcome(word, reasons[int(number) - 1])

    def outcome(self, group: str, kind: str, check: str) -> Outcome:
        return self.rows[group][kind].get(check, OK)

    @property
    def reasons(self) -> list[str]:
        cells = (outcome for rows in self.rows.values() for row in rows.values() for outcome in row.values())
        return list(dict.fromkeys(outcome.reason for outcome in cells if outcome != OK))

    def write(self, path: Path = FILE) -> None:
        reasons = self.reasons
        parts = [f'"transformers": {json.dumps(self.transformers)}']
        for group, rows in self.rows.items():
            lines = []
            for kind, row in rows.items():
                cells = {c: f"{o.word} {reasons.index(o.reason) + 1}" for c, o in row.items() if o != OK}
                lines.append(f"{json.dumps(kind)}: {json.dumps(cells)}")
            parts.append(f'"{group}": {{\n' + ",\n".join(lines) + "\n}")
        parts.append('"reasons": [\n' + ",\n".join(map(json.dumps, reasons)) + "\n]")
        path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
