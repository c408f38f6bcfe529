"""`minitrain doctor`: each finding shows on figures made for it, and none on healthy ones."""

import json
import math
import re

import pytest
import yaml

from minitrain.cli.main import main
from minitrain.tools.analysis.doctor import CHECKS, run_checks
from minitrain.training.metrics_log import read_history
from tests.conftest import ROOT
from tests.messages import reports

LINES = 30


def wobble(i: int) -> float:
    """Noise that is always the same, in [-1, 1]."""
    return math.sin(7.0 * i * i + i)


def common(i: int) -> dict:
    return {
        "loss": 0.5 + 2.5 * math.exp(-i / 8) + 0.05 * wobble(i),
        "lr": 1e-3 * (1 - i / LINES),
        "grad_norm": 0.8 + 0.3 * wobble(i + 1),
        "tokens_per_second": 1000 + 50 * wobble(i + 2),
        "padding": 0.1,
        "memory_gb": 1.0,
        "eta_seconds": 10.0 * (LINES - 1 - i),
    }


def preferences(i: int) -> dict:
    margin = 2 * (1 - math.exp(-i / 10))
    logps = {"logps/chosen": -80 + 0.3 * i + 4 * wobble(i + 3), "logps/rejected": -80 - 0.5 * i}
    return common(i) | logps | {"rewards/margins": margin + 0.1 * wobble(i + 4)}


def rollouts(i: int) -> dict:
    clips = {"clip_fraction/high": 0.05 + 0.02 * wobble(i), "clip_fraction/low": 0.05, "bounded_fraction": 0.0}
    return common(i) | clips | {"loss": 0.1 * wobble(i), "ratio": 1 + 0.05 * wobble(i), "advantage": 0.0}


def online(i: int) -> dict:
    entropy = 0.2 + 0.8 * math.exp(-i / 10) + 0.02 * wobble(i)
    return common(i) | {"loss": 0.1 * wobble(i), "advantage": 0.0, "entropy": entropy}


def round_of(i: int) -> dict:
    """The metrics of a round: the reward rises from 0.2 to 0.7, and zero_variance to 0.5."""
    reward = 0.7 - 0.5 * math.exp(-i / 8) + 0.02 * wobble(i)
    return {
        "round": i + 1,
        "reward": reward,
        "zero_variance": 0.2 + 0.4 * reward,
        "solved": 0.5 * reward,
        "failed": 0.2 - 0.2 * reward,
        "ended": 0.95 + 0.02 * wobble(i + 1),
        "length": 100 + i + 5 * wobble(i + 2),
        "unjudged": 0.0,
        "mismatch": 1e-6,
    }


HEALTHY = {"sft": common, "dpo": preferences, "policy": rollouts, "online": online}
SETTINGS = {"max_grad_norm": 1.0, "packing": False, "eval_datasets": ["a.jsonl"], "validation_split": 0.0}


@pytest.fixture
def make_run(tmp_path):
    """``make_run("sft", {"lr": lambda i: 0})``: a run with 30 train and 6 eval lines, some figures changed."""

    def make(kind="sft", train=None, evals=None, rounds=None, settings=None, finished=True):
        folder = tmp_path / "run"
        folder.mkdir()
        lines = []
        for i in range(LINES):
            row = HEALTHY[kind](i) | {name: curve(i) for name, curve in (train or {}).items()}
            lines.append({"step": 10 * (i + 1), "kind": "train"} | row)
            if kind == "online":
                changed = {name: curve(i) for name, curve in (rounds or {}).items()}
                lines.append({"step": 10 * i, "kind": "rollout"} | round_of(i) | changed)
            if evals is not None or i % 10 in (0, 9):
                usual = {"loss": 0.7 + 2.5 * math.exp(-i / 8), "kl_to_start": 0.01 * i}
                usual |= {"retention/loss": 2 + 0.001 * i, "retention/kl_to_start": 0.005 * i}
                own = {name: curve(i) for name, curve in (evals or {}).items()}
                lines.append({"step": 10 * (i + 1), "kind": "eval"} | usual | own)
        for line in lines:
            line |= {name: str(v) for name, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        (folder / "config.yml").write_text(yaml.safe_dump(SETTINGS | (settings or {})))
        if finished:
            (folder / "run.json").write_text(json.dumps({"finished_step": 10 * LINES, "total_steps": 10 * LINES}))
        return folder

    return make


def found(folder) -> list[str]:
    return list(run_checks(read_history(folder))[0])


@pytest.mark.parametrize("kind", HEALTHY)
def test_nothing_is_found_in_a_healthy_run(make_run, kind, capsys):
    """And the report says what was looked at."""
    folder = make_run(kind)
    findings, passed = run_checks(read_history(folder))
    assert findings == {}
    assert main(["doctor", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and ", ".join(passed) in " ".join(out.split())


def test_healthy_runs_are_looked_at_from_all_sides(tmp_path, make_run):
    """Each check is made in one of them, so none above is silent because it was not asked; and only where it fits."""
    looked = {}
    for kind in HEALTHY:
        folder = make_run(kind)
        looked[kind] = set(run_checks(read_history(folder))[1])
        folder.rename(tmp_path / kind)
    assert set.union(*looked.values()) == {check.name for check in CHECKS}
    assert "clip fractions" not in looked["sft"] and "overfitting" not in looked["policy"]


def test_each_code_is_documented():
    """In the table of docs/metrics.md."""
    table = (ROOT / "docs" / "metrics.md").read_text().partition("| code | finding | condition |")[2]
    assert sorted(re.findall(r"^\| `([a-z-]+)` ", table, re.M)) == sorted(check.code for check in CHECKS)


def rise(i: int) -> float:
    return 0.7 + 2.5 * math.exp(-i / 3) + (0.03 * (i - 10) if i > 10 else 0)


CASES = {
    "lr 0": (
        dict(train={"lr": lambda i: 1e-3 if i < 20 else 0.0}),
        "zero-lr",
        ["210", "300"],
    ),
    "flat": (
        dict(train={"loss": lambda i: 0.693 + 0.02 * wobble(i)}, evals={"loss": lambda i: 0.693}),
        "flat-loss",
        ["0.001"],
    ),
    "diverging": (
        dict(
            train={"loss": lambda i: 1 + 2 * math.exp(-i) + 0.1 * max(0, i - 15)},
            evals={"loss": lambda i: 1 + 2 * math.exp(-i)},
        ),
        "rising-loss",
        ["2.3", "300"],
    ),
    "not finite": (
        dict(train={"loss": lambda i: math.nan if i in (3, 4) else common(i)["loss"]}),
        "not-finite",
        ["train/loss", "40, 50"],
    ),
    "gradient not finite": (
        dict(train={"grad_norm": lambda i: math.inf if i == 3 else 1.0}),
        "not-finite",
        ["train/grad_norm", "40"],
    ),
    "spikes": (
        dict(train={"grad_norm": lambda i: {12: 20.0, 20: 30.0}.get(i, 0.5)}),
        "gradient-spikes",
        ["30", "60", "130, 210"],
    ),
    "clipped": (
        dict(train={"grad_norm": lambda i: 5 + wobble(i)}),
        "clipped-gradients",
        ["max_grad_norm", "30"],
    ),
    "overfitting": (
        dict(evals={"loss": rise}),
        "overfitting",
        ["110", "0.7892", "1.27", "300"],
    ),
    "forgetting": (
        dict(evals={"retention/loss": lambda i: 2 + 0.05 * i}),
        "forgetting",
        ["2 at step 10", "3.45 at step 300", "eval loss went from 3.2 to 0.766"],
    ),
    "forgetting for a reward": (
        dict(kind="online", evals={"retention/loss": lambda i: 2 + 0.05 * i, "reward": lambda i: 0.02 * i}),
        "forgetting",
        ["eval reward went from 0 to 0.58"],
    ),
    "forgetting in perplexity": (
        dict(
            evals={"retention/loss": lambda i: 2 + 0.05 * i, "loss": lambda i: 1.0, "perplexity": lambda i: 9 - 0.1 * i}
        ),
        "forgetting",
        ["eval perplexity went from 9 to 6.1"],
    ),
    "far from the start": (
        dict(evals={"kl_to_start": lambda i: 0.1 * i}),
        "far-from-start",
        ["step 300", "2.9 nats"],
    ),
    "far on retention data": (
        dict(evals={"retention/kl_to_start": lambda i: 0.02 * i}),
        "far-on-retention",
        ["step 300", "0.58 nats", "0.3"],
    ),
    "chosen falls": (
        dict(
            kind="dpo",
            evals={"logps/chosen": lambda i: -80 - i, "rewards/margins": lambda i: 0.1 * i},
        ),
        "chosen-falls",
        ["eval", "-80", "-109", "2.9"],
    ),
    "chosen falls in training": (
        dict(kind="dpo", train={"logps/chosen": lambda i: -80 - i}),
        "chosen-falls",
        ["train", "-84.5", "-104.5"],
    ),
    "clip fraction": (
        dict(kind="policy", train={"clip_fraction/high": lambda i: 0.02 * i}),
        "clip-fraction",
        ["54%"],
    ),
    "bounded log-ratios": (
        dict(kind="policy", train={"bounded_fraction": lambda i: 0.02 * (i == 4)}),
        "bounded-ratios",
        ["2.0%", "bounded_fraction"],
    ),
    "ratio": (
        dict(kind="policy", train={"ratio": lambda i: 1 + 0.02 * i}),
        "off-policy",
        ["1.58", "0.8", "1.25", "140, 150, 160, 170, 180", "12"],
    ),
    "ratio at once": (
        dict(kind="policy", train={"ratio": lambda i: 0.5}),
        "off-policy",
        ["old_logps", "loss.temperature"],
    ),
    "padding": (
        dict(train={"padding": lambda i: 0.4}),
        "padding",
        ["40%"],
    ),
    "slower": (
        dict(train={"tokens_per_second": lambda i: 1000 - 20 * i}),
        "slower",
        ["tokens per second"],
    ),
    "equal rewards at the start": (
        dict(kind="online", rounds={"zero_variance": lambda i: 1.0 if i < 3 else 0.3, "failed": lambda i: 0.9}),
        "equal-rewards",
        ["first 3 rounds", "0.256", "easier prompts"],
    ),
    "solved at the start": (
        dict(kind="online", rounds={"zero_variance": lambda i: 1.0 if i < 3 else 0.3, "failed": lambda i: 0.0}),
        "equal-rewards",
        ["harder prompts"],
    ),
    "most prompts fail": (
        dict(
            kind="online",
            rounds={"zero_variance": lambda i: 0.9, "solved": lambda i: 0.05, "failed": lambda i: 0.85},
        ),
        "zero-variance",
        ["90%", "5% all right, 85% all wrong", "resample"],
    ),
    "two answers to a prompt": (
        dict(
            kind="online",
            rounds={"zero_variance": lambda i: 0.7, "solved": lambda i: 0.35, "failed": lambda i: 0.35},
            settings={"rollout": {"num_generations": 2}},
        ),
        "zero-variance",
        ["70%", "With 2 answers", "num_generations=8"],
    ),
    "the reward stays": (
        dict(kind="online", rounds={"reward": lambda i: 0.3 + 0.03 * wobble(i)}),
        "flat-reward",
        ["first third", "`minitrain rollouts`"],
    ),
    "the reward falls again": (
        dict(kind="online", rounds={"reward": lambda i: 0.2 + 0.04 * min(i, 15) - 0.04 * max(0, i - 20)}),
        "falling-reward",
        ["0.8", "step 150", "step 290"],
    ),
    "the reward is hacked": (
        dict(kind="online", evals={"exact_match": lambda i: 0.5 - 0.01 * i}),
        "reward-hacking",
        ["eval/exact_match from 0.5 to 0.21", "early_stopping.metric"],
    ),
    "overfitting to the prompts": (
        dict(kind="online", evals={"reward": lambda i: 0.5 - 0.01 * i}),
        "reward-hacking",
        ["eval/reward from 0.5"],
    ),
    "answers are cut off": (
        dict(kind="online", rounds={"ended": lambda i: 0.3 - 0.01 * i}, settings={"rollout": {"max_new_tokens": 256}}),
        "truncated-answers",
        ["26%", "6%", "max_new_tokens=256"],
    ),
    "answers grow": (
        dict(kind="online", rounds={"length": lambda i: 100 + 10 * i, "ended": lambda i: 1 - 0.01 * i}),
        "length-grows",
        ["145 tokens", "345", "96%", "76%"],
    ),
    "entropy": (
        dict(kind="online", train={"entropy": lambda i: math.exp(-i / 3)}),
        "entropy-collapse",
        ["from 1 to 0.000433 nats"],
    ),
    "sampling differs": (
        dict(kind="online", rounds={"mismatch": lambda i: 0.01 + 0.005 * i}),
        "mismatch",
        ["0.01 per token at step 0", "0.15", "step 290", "importance_correction"],
    ),
    "sampling differs in training": (
        dict(kind="online", rounds={"mismatch": lambda i: math.nan}, train={"mismatch": lambda i: 0.2 * (i == 7)}),
        "mismatch",
        ["0.2 at step 80"],
    ),
    "functions fail": (
        dict(
            kind="online",
            rounds={"unjudged": lambda i: 0.0, "unjudged/judge": lambda i: 0.4, "unjudged/length": lambda i: 0.0},
        ),
        "unjudged-answers",
        ["40%", "by judge", "reward_timeout"],
    ),
    "unfinished": (
        dict(finished=False),
        "unfinished",
        ["checkpoint"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_finding_on_figures_made_for_it(make_run, capsys, monkeypatch, wording, case):
    """It alone is found, with its evidence, wrapped to the terminal, and the exit code is 0. Among them are truncated
    answers, groups with equal rewards and samples of another policy (silent RL bugs R7, R35 and R48)."""
    monkeypatch.setenv("COLUMNS", "72")
    changes, code, values = CASES[case]
    folder = make_run(**changes)
    assert found(folder) == [code]
    assert main(["doctor", str(folder)]) == 0
    out = capsys.readouterr().out
    wording(out.partition("\n\n")[2])
    finding = " ".join(out.partition(f"[{code}]\n  ")[2].split())
    assert all(value in finding for value in values)
    assert max(len(line) for line in out.splitlines() if str(folder) not in line) <= 72


def test_a_model_that_learns_nothing_does_not_forget(make_run):
    """Where the evaluation does not improve either, other findings say what is wrong."""
    folder = make_run(evals={"retention/loss": lambda i: 2 + 0.05 * i, "loss": lambda i: 1 + 0.1 * i})
    assert "forgetting" not in found(folder)


def test_a_run_that_was_never_evaluated(make_run):
    """Without eval lines; the advice knows whether there are data for it."""
    cases = [({}, "eval_every_steps=100"), ({"eval_datasets": []}, "eval_datasets, or validation_split")]
    for number, (settings, advice) in enumerate(cases):
        folder = make_run(settings=settings)
        file = folder / "metrics.jsonl"
        file.write_text("".join(line for line in file.open() if '"eval"' not in line))
        ((code, finding),) = run_checks(read_history(folder))[0].items()
        assert code == "no-evaluation" and finding.advice.startswith(advice)
        folder.rename(folder.with_name(f"run-{number}"))


def test_where_an_unfinished_run_goes_on(make_run):
    """From its newest checkpoint; an end of an earlier, shorter run is none."""
    folder = make_run()
    for step in (90, 200):
        (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (folder / "run.json").write_text('{"finished_step": 200, "total_steps": 200}')
    (finding,) = run_checks(read_history(folder))[0].values()
    assert "step 300" in finding.evidence and "step 200" in finding.advice


UNSUSPICIOUS = {
    "the loss fell before the second line": dict(
        train={"loss": lambda i: 1.1 if i == 0 else 1 + 0.01 * wobble(i)}, evals={"loss": lambda i: 1.0}
    ),
    "or before the first": dict(train={"loss": lambda i: 1 + 0.01 * wobble(i)}),
    "a loss near 0 moves a little": dict(train={"loss": lambda i: math.exp(-i) + 0.02 * (i > 20)}),
    "the loss of a policy stays": dict(kind="policy", evals={"loss": lambda i: 0.1}),
    "dft rises while it learns": dict(
        train={
            "loss": lambda i: 0.1 + 0.01 * i,
            "perplexity": lambda i: common(i)["loss"],
            "dft_alpha": lambda i: 1.0,
        },
        evals={"loss": lambda i: 0.1 + 0.01 * i, "perplexity": lambda i: common(i)["loss"]},
    ),
    "gradients grow slowly": dict(train={"grad_norm": lambda i: 0.05 * 1.1**i}),
    "some are clipped": dict(train={"grad_norm": lambda i: 0.9 if i == 5 else 5.0}),
    "clipping is off": dict(train={"grad_norm": lambda i: 5.0}, settings={"max_grad_norm": 0}),
    "float16 overflows": dict(
        train={"grad_norm": lambda i: math.inf if i < 2 else 1.0}, settings={"model": {"policy_dtype": "float16"}}
    ),
    "packing is on": dict(train={"padding": lambda i: 0.4}, settings={"packing": True}),
    "speed is unsteady": dict(
        train={"tokens_per_second": lambda i: 1000.0 if i in (1, 2, 3, 4, 5, 10, 12, 14, 16, 18, 21, 24, 27) else 100.0}
    ),
    "lr ends with 0": dict(train={"lr": lambda i: 0.0 if i == LINES - 1 else 1e-3}),
    "most prompts are solved in the end": dict(
        kind="online",
        rounds={"zero_variance": lambda i: 0.1 + 0.03 * i, "solved": lambda i: 0.03 * i, "reward": lambda i: 0.9},
        train={"entropy": lambda i: math.exp(-i / 3)},
    ),
    "the reward rose at once": dict(
        kind="online", rounds={"reward": lambda i: 0.7 + 0.02 * wobble(i) - 0.5 * (i == 0)}
    ),
    "longer answers that are worth more": dict(kind="online", rounds={"length": lambda i: 100 + 10 * i}),
    "the evaluation wobbles": dict(kind="online", evals={"reward": lambda i: 0.5 + 0.02 * wobble(i)}),
    "all right answers are kept": dict(
        kind="online", rounds={"zero_variance": lambda i: 1.0}, settings={"loss": {"name": "sft"}}
    ),
    "a critic needs no group": dict(
        kind="online",
        rounds={"zero_variance": lambda i: 1.0},
        settings={"loss": {"name": "policy", "advantage_estimator": "gae"}},
    ),
    "train noise hides in evaluations": dict(
        kind="dpo",
        train={"logps/chosen": lambda i: -80 - i},
        evals={"logps/chosen": lambda i: -80 + i, "rewards/margins": lambda i: 0.1 * i},
    ),
}


@pytest.mark.parametrize("case", UNSUSPICIOUS)
def test_what_only_seems_wrong(make_run, case):
    """Nothing is found where a figure looks odd for a good reason."""
    assert found(make_run(**UNSUSPICIOUS[case])) == []


def test_few_lines_say_little(make_run, capsys):
    """Of 2 lines no trend is told, and nothing fails; nor where all are undefined, or config.yml is no longer there."""
    folder = make_run("dpo", finished=True)
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    (folder / "run.json").write_text('{"finished_step": 20, "total_steps": 20}')
    file.write_text("".join(lines[:3]))
    assert found(folder) == []
    (folder / "config.yml").unlink()
    file.write_text('{"step": 10, "kind": "train", "loss": "nan", "logps/chosen": "nan", "rewards/margins": "-inf"}\n')
    assert found(folder) == ["not-finite", "no-evaluation"]
    assert main(["doctor", str(folder)]) == 0


def test_broken_lines_are_skipped_and_said(make_run, capsys):
    """A line cut off by a crash, one of another kind, one that is no object: named by number, the rest is read."""
    folder = make_run()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 310, "kind": "train", "loss": 1' + 400 * "0" + "}\n")
        file.write('[1]\n{"step": 310, "kind": "test", "loss": 1}\n{"step": 310, "kind": "train", "lo')
    assert main(["doctor", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "[" not in out
    assert err.startswith(f"minitrain: {folder}/metrics.jsonl:37, 38, 39, 40: ") and err.count("\n") == 1


@pytest.mark.parametrize("command", ["doctor", "plot"])
def test_folders_that_are_no_runs(command, tmp_path, capsys):
    """Exit code 2 and one line."""
    (tmp_path / "other").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    for name, code in {"nowhere": "not-found", "other": "not-found", "empty": "no-data"}.items():
        assert main([command, str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert reports(err, code, name) and out == "" and err.count("\n") == 1


def test_a_run_of_the_trainer(make_trainer, rows_file, capsys):
    """The figures and the config are read as training writes them: always clipped at this limit, much padding."""
    trainer = make_trainer(f"eval_datasets=[{rows_file}]", "n_steps=6", "max_grad_norm=1e-4", "lr=1e-3")
    trainer.train()
    history = read_history(trainer.run.path)
    assert history.end == (6, 6) and history.last_step == 6 and history.damaged == []
    codes = found(trainer.run.path)
    assert {"clipped-gradients", "padding"} <= set(codes)
    assert "unfinished" not in codes and "no-evaluation" not in codes
