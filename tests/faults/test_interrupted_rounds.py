"""Online training that is killed or stopped while it samples, judges or trains on a round.

A round has two passes of two steps, and a checkpoint after each third step, so that most lie within a round.
"""

import json
import signal
from pathlib import Path

import pytest

from tests.distributed.launch import trace

POINTS = ("round.draw", "round.sample", "round.reward", "round.gather", "round.logps", "step.reduce", "save.written")
QUICK = {(0, "round.sample@2"), (2, "round.gather@2"), (0, "save.written@3")}
KILLS = [
    pytest.param(ranks, f"{point}@{n}", marks=() if (ranks, f"{point}@{n}") in QUICK else pytest.mark.slow)
    for ranks in (0, 2)
    for point in POINTS
    for n in (1, 2, 3)
]


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> tuple[str, ...]:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "say " + "x" * i}) + "\n" for i in range(10)))
    rollout = {
        "num_generations": 3,
        "prompts_per_round": 4,
        "num_iterations": 2,
        "max_new_tokens": 5,
        "rewards": ["length", "repetition"],
        "zero_variance_groups": "resample",
        "importance_correction": "tis",
        "save_samples": -1,
    }
    settings = (f"datasets=[{prompts}]", f"rollout={json.dumps(rollout)}", "loss.name=policy", "loss.kl_coef=0.1")
    return (*settings, "total_batch_size=2", "save_every_steps=3", "validation_split=0", "eval_every_steps=0")


def rollouts(lab, job) -> dict[str, list[dict]]:
    """The answers of each round."""
    files = sorted((lab.path(job) / "rollouts").iterdir())
    return {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


@pytest.fixture(scope="module")
def undisturbed(lab, options):
    """Return a function that returns the rollouts of a run of n ranks, which nothing disturbs."""
    found = {}

    def of(ranks: int) -> dict[str, list[dict]]:
        if ranks not in found:
            before = lab.count
            lab.oracle(ranks, *options)
            path = lab.folder / "runs" / f"run-{before + 1}"
            found[ranks] = rollouts(lab, {"config": {"output_dir": path.parent, "exp_name": path.name}})
        return found[ranks]

    return of


@pytest.mark.parametrize(("ranks", "point"), KILLS)
def test_killed_in_a_round(lab, options, undisturbed, ranks, point):
    """kill -9 of a process or of one of two ranks: the command again trains on the same answers, bit for bit
    (silent RL bug R39)."""
    expected, job = undisturbed(ranks), lab.job(ranks, *options)
    code, output = lab.run(ranks, job, f"{point}:kill9" + ("#1" if ranks else ""))
    assert code == -signal.SIGKILL, output
    lab.recover(ranks, job, *options)
    assert rollouts(lab, job) == expected


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "point",
    [
        "round.sample@5",
        "round.logps@2",
        *(pytest.param(f"round.reward@{n}", marks=pytest.mark.slow) for n in (1, 2, 3, 4)),
    ],
)
def test_stopped_while_it_samples(lab, options, undisturbed, ranks, point):
    """SIGTERM drops the round: the checkpoint is that of the end of the round before it (silent RL bug R39).

    So it is when the round has been judged, also after examples at the end of that round that have no targets.
    """
    expected, job = undisturbed(ranks), lab.job(ranks, *options)
    code, output = lab.run(ranks, job, f"{point}:term" + ("#1" if ranks else ""))
    assert code == 143 and "stopped by SIGTERM at step" in output, output
    steps = [line[0] for line in trace(Path(job["trace"]))] if Path(job["trace"]).exists() else []
    assert (len(steps) % 4 == 0 or point.startswith("round.logps")) and (
        not steps or f"step-{steps[-1]}" in lab.checkpoints(job)
    )
    lab.recover(ranks, job, *options)
    assert rollouts(lab, job) == expected
