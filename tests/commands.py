"""How the tests run each command of the registry. A new command needs a line in CASES."""

import runpy
from typing import NamedTuple

from minitrain.cli.registry import COMMANDS
from tests.conftest import ROOT

PARSERS = runpy.run_path(str(ROOT / "docs" / "generate_commands.py"))["commands"]()
WITH_CONFIG = [name for one in COMMANDS.values() if one.takes_config for name in (one.name, *one.aliases)]
KD = ["--overrides", "loss={name: kd, teacher: ./model, top_k: 2}"]

SAVED_ANSWER = {"round": 1, "step": 1, "source": "rows.jsonl", "line": 1, "group": 0} | {
    "prompt": [{"role": "user", "content": "a"}],
    "messages": [{"role": "assistant", "content": "b"}],
    "reward": 1.0,
    "parts": {"length": 1.0},
    "ended": True,
    "turns": 1,
    "tokens": 2,
    "logp": -1.0,
}


class CommandCase(NamedTuple):
    """A command line that succeeds in the fixture `trained_folder`.

    Attributes:
        arguments: The command line.
        stage: A function that it calls, "module:name" below minitrain, in which tests interrupt it.
        quiet_output: What it prints with --quiet; None if that is the same as without.
        writes: The file or folder that it writes.
    """

    arguments: list[str]
    stage: str
    quiet_output: str | None = ""
    writes: str = ""


CASES = {
    "train": CommandCase(["train", "c.yml"], "config.load:_read_text", writes="runs/c/final"),
    "validate": CommandCase(["validate", "c.yml"], "tools.preflight.validate:_report"),
    "inspect": CommandCase(["inspect", "c.yml"], "tools.preflight.preview:_batch", quiet_output=None),
    "rehearse": CommandCase(["rehearse", "c.yml"], "tools.rehearsal.rehearse:validate"),
    "cache-teacher": CommandCase(
        ["cache-teacher", "c.yml", "--output", "teacher.safetensors", *KD],
        "inference.teacher_cache:_write_outputs",
        quiet_output="teacher.safetensors\n",
        writes="teacher.safetensors",
    ),
    "generate": CommandCase(
        ["generate", "runs/lora", "--prompt", "a", "--max-new-tokens", "1", "--output", "labels.jsonl", "--force"],
        "inference.generate:Generator._generate",
        writes="labels.jsonl",
    ),
    "score": CommandCase(
        ["score", "runs/labels", "--text", "a", "--output", "labels.jsonl", "--force"],
        "inference.score:SequenceScorer.predict",
        writes="labels.jsonl",
    ),
    "evaluate": CommandCase(
        ["evaluate", "runs/lora", "rows.jsonl", "--output", "labels.jsonl", "--force"],
        "tools.evaluation.evaluate:evaluate_all",
        quiet_output=None,
        writes="labels.jsonl",
    ),
    "chat": CommandCase(["chat", "runs/lora"], "cli.model_commands:input"),
    "merge": CommandCase(
        ["merge", "runs/lora", "--output", "merged"], "inference.merge:merge_adapter", writes="merged"
    ),
    "check": CommandCase(["check", "runs/lora"], "inference.check:_check_adapter", quiet_output=None),
    "plot": CommandCase(["plot", "runs/lora"], "tools.analysis.plot:plot", writes="runs/lora/metrics.png"),
    "doctor": CommandCase(["doctor", "runs/lora"], "tools.analysis.doctor:run_checks"),
    "compare": CommandCase(["compare", "runs/lora", "runs/labels"], "tools.analysis.compare:compare"),
    "rollouts": CommandCase(["rollouts", "runs/lora"], "tools.analysis.rollouts:show_answers"),
}
