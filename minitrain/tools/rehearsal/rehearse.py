"""Rehearse a run: check it, train a small model, kill it, resume on other ranks, and use the result."""

import dataclasses
import json
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from minitrain.config.saved import config_yaml
from minitrain.config.schema import Config
from minitrain.data.examples import ClassificationExample, Conversation
from minitrain.data.messages import assistant, user
from minitrain.errors import CODES, ConfigError, RunError
from minitrain.inference.generate import Sampling, load_generator
from minitrain.inference.score import ScoringRequest, load_scorer
from minitrain.losses import create_loss
from minitrain.training.atomic_dir import checkpoints
from minitrain.training.metric_logger import LEDGER, METRICS

from ..preflight.validate import validate
from .on_cpu import Untried
from .ranks import run_ranks
from .small_run import N_STEPS, small_config

KILLED_AFTER = N_STEPS - 1  # steps
N_LINES = 15  # of the output of a process that failed without a message of minitrain
PROMPT = "Hello"


@dataclasses.dataclass
class Rehearsal:
    """A rehearsal in progress.

    Attributes:
        config: The config of the small run.
        folder: The temporary folder.
        plugins: Files to run before.
        hybrid: Whether the ranks are on two machines, as fsdp.shard=hybrid needs.
    """

    config: Config
    folder: Path
    plugins: Sequence[str]
    hybrid: bool

    @property
    def run(self) -> Path:
        return Path(self.config.output_dir) / self.config.exp_name

    def train(self, name: str, n_ranks: int, fault: str = "") -> list[int]:
        """Run the training command, and return the exit codes of the ranks; `fault` is as MINITRAIN_FAULT."""
        file = self.folder / f"{self.config.exp_name}.yml"
        file.write_text(config_yaml(self.config), encoding="utf-8")
        command = [sys.executable, "-m", "minitrain", "train", str(file)]
        command += ["--plugin", *self.plugins] if self.plugins else []
        variables = {"MINITRAIN_FAULT": fault} if fault else {}
        return run_ranks(command, n_ranks, 2 if self.hybrid else 1, self.folder / name, variables)

    def rows(self, file: str) -> list[dict]:
        """Return the rows of a log of the run."""
        path = self.run / file
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def failure(self, name: str, codes: Sequence[int], what: str) -> RunError:
        """Return the error of the first rank that failed, as its process reported it."""
        ranks = sorted(range(len(codes)), key=lambda rank: codes[rank] in (0, -signal.SIGKILL))  # failed by themselves
        logs = [(self.folder / name / f"{rank}.txt").read_text(errors="replace") for rank in ranks]
        reported = [log for log in logs if "minitrain: " in log]
        if not reported:
            log = logs[0]
            return RunError(
                f"{what} failed. Its last lines:\n" + "\n".join(log.splitlines()[-N_LINES:]), "process-failed"
            )
        message = reported[0].partition("minitrain: ")[2].strip()
        code = re.search(r"\[([a-z-]+)\]$", message)
        known = code is not None and code[1] in CODES
        text = message.removesuffix(f"[{code[1]}]").rstrip() if known else message
        return RunError(f"{what} failed: {text}", code[1] if known else "process-failed")


def rehearse(
    source: str, config: Config, shard: str, untried: Untried, plugins: Sequence[str], ranks: int | None
) -> Iterator[str]:
    """Yield what a rehearsal does, and at the end what it tried and what it could not. Warnings begin with `warning: `.

    Args:
        source: The path of the config.
        config: The config of `parse_for_cpu`, with `shard` and `untried`.
        shard: `fsdp.shard` of the run.
        untried: What is not tried on a CPU.
        plugins: Files that have been run, and that the processes run, too.
        ranks: The number of ranks (default: 2 with FSDPTrainer, 4 with fsdp.shard=hybrid, else 1).

    Raises:
        MinitrainError: Whatever would end the run, too.
    """
    n_ranks = _number_of_ranks(config, ranks, shard)
    yield f"{source}: checking the options, every row of the data and the run directory"
    report = validate(config, with_memory=False)
    if report["left out"] != "nothing":
        yield f"warning: rows left out or truncated: {report['left out']}"
    if "warning" in report:
        yield f"warning: {report['warning']}"
    with tempfile.TemporaryDirectory(prefix="minitrain-rehearsal-") as folder:
        small, model, more = small_config(config, Path(folder), n_ranks, shard)
        untried |= more
        parts = Rehearsal(small, Path(folder), plugins, shard == "hybrid")
        tried = {"data": f"every row: {report['examples']}", "model": model}
        yield from _play(parts, n_ranks, tried, untried)
    yield "tried:"
    yield from _table(tried)
    yield "not tried:"
    yield from _table(untried)


def _number_of_ranks(config: Config, ranks: int | None, shard: str) -> int:
    if config.trainer == "BasicTrainer":
        if ranks not in (None, 1):
            message = f"BasicTrainer trains on one device, got {ranks} ranks. Set trainer=FSDPTrainer."
            raise ConfigError(f"--ranks: {message}", "conflict")
        return 1
    if shard == "hybrid" and (ranks or 4) % 2:
        raise ConfigError(f"--ranks: hybrid needs two machines with as many ranks, got {ranks}. Set 4.", "conflict")
    return ranks or (4 if shard == "hybrid" else 2)


def _play(run: Rehearsal, n_ranks: int, tried: dict[str, str], untried: Untried) -> Iterator[str]:
    """Yield the stages of a rehearsal; add what was tried and what was not."""
    config, sharded = run.config, run.config.trainer == "FSDPTrainer"
    others = _other_ranks(n_ranks, run.hybrid) if sharded else 1
    yield f"training {KILLED_AFTER} of {N_STEPS} steps on {_ranks(n_ranks)}, then killing the run"
    codes = run.train("killed", n_ranks, f"step.end@{KILLED_AFTER}:kill9")
    saved = checkpoints(run.run / "checkpoints")
    if -signal.SIGKILL not in codes or not saved:
        raise run.failure("killed", codes, "the training")
    _check_rewards(run)
    yield f"resuming from {saved[-1].name} on {_ranks(others)}"
    codes = run.train("resumed", others)
    if any(codes):
        raise run.failure("resumed", codes, "the resumed training")
    steps = [row["step"] for row in run.rows(LEDGER)]
    if steps != list(range(1, N_STEPS + 1)):
        raise RunError(f"the resumed run has the steps {steps} in its ledger. Report this as a bug.", "process-failed")
    yield "loading final/ and using it"
    tried |= {
        "training": f"{N_STEPS} steps on {_ranks(n_ranks)}: {_describe(config)}",
        "evaluation": ", ".join(_metrics(run, "eval")) or "none, without evaluation data",
        "checkpoint": f"written on {_ranks(n_ranks)}; kill -9 after step {KILLED_AFTER}; read on {_ranks(others)}",
        "final model": _use(run),
    }
    if config.rollout.num_generations:
        rewards = [name for name in _metrics(run, "rollout") if name.startswith("reward/")]
        judged_by = (
            f"rewards {', '.join(name.removeprefix('reward/') for name in rewards)}" if rewards else "no rewards"
        )
        tried["sampling"] = f"rounds of {config.rollout.prompts_per_round} prompts; {judged_by}"
    if not sharded:
        untried["ranks"] = "more than one, which need trainer=FSDPTrainer"


def _check_rewards(run: Rehearsal) -> None:
    """Raise RunError if a reward function failed, or if an answer has no reward."""
    rows = [row for row in run.rows(METRICS) if row["kind"] == "rollout"]
    fractions = [value for row in rows for name, value in row.items() if name.partition("/")[0] == "unjudged"]
    log = (run.folder / "killed" / "0.txt").read_text(errors="replace")
    reasons = re.findall(r"^warning: (reward .*)$", log, re.MULTILINE)
    if reasons or any(row.get("unjudged") for row in rows):
        reason = "; ".join(reasons) or "a function returned None"
        message = f"{max(fractions, default=0.0):.0%} of the answers were not judged: {reason}. Correct the function."
        raise RunError(f"rollout.rewards: {message}", "plugin-failed")


def _use(run: Rehearsal) -> str:
    """Load the final model, use it, and return what it did."""
    loss = create_loss(**run.config.loss)
    if loss.head_labels is not None:
        of_text, of_answer = ClassificationExample(PROMPT, None, ""), Conversation([user(PROMPT), assistant(PROMPT)])
        example = of_text if loss.data_kind == "classification" else of_answer
        request = ScoringRequest("the rehearsal", {}, example)
        scorer = load_scorer(str(run.run), [request], "cpu", trust_remote_code=run.config.model.trust_remote_code)
        return f"loaded; it has scored {PROMPT!r}: outputs {scorer.scores([request]).shape[1]}"
    generator = load_generator(str(run.run), "cpu", trust_remote_code=run.config.model.trust_remote_code)
    generator.generate([PROMPT], Sampling(8))
    return f"loaded; it has answered {PROMPT!r}"


def _other_ranks(n_ranks: int, hybrid: bool) -> int:
    """Return another number of ranks that a step of the small run can be divided among."""
    if n_ranks == 1:
        return 2
    return n_ranks // 2 if n_ranks % 2 == 0 and n_ranks // 2 % (2 if hybrid else 1) == 0 else 1


def _describe(config: Config) -> str:
    parts = [f"loss {config.loss['name']}", config.optimizer, config.trainer]
    if config.trainer == "FSDPTrainer":
        parts[-1] += f" with fsdp.shard={config.fsdp.shard} on gloo"
    if config.lora.rank:
        parts.append(f"LoRA of rank {config.lora.rank}")
    if config.model.quantization != "none":
        parts.append(f"{config.model.quantization} on a CPU")
    return ", ".join(parts)


def _metrics(run: Rehearsal, kind: str) -> list[str]:
    """Return the names of the metrics of the last row of a kind."""
    rows = [row for row in run.rows(METRICS) if row["kind"] == kind]
    return [name for name in rows[-1] if name not in ("step", "kind", "seconds")] if rows else []


def _ranks(number: int) -> str:
    return "1 process" if number == 1 else f"{number} ranks"


def _table(lines: dict[str, str]) -> Iterator[str]:
    width = max(map(len, lines))
    yield from (f"  {topic:<{width}}  {text}" for topic, text in lines.items())
