"""What is logged about rounds: metrics, answers in rollouts/, warnings, and what a resumed run keeps of them."""

import json
import math
from collections import Counter
from itertools import pairwise

import pytest

from minitrain import Trainer
from minitrain.rl import rewards as registry
from minitrain.rl.documents import JudgedAnswer
from minitrain.rl.reports import answer_metrics, group_metrics
from minitrain.rl.rewards import NoOptions, RewardFunction
from minitrain.rl.round_log import round_line
from tests.conftest import metrics

NAN = math.nan
N, PROMPTS = 4, 4


def odd(answer, options) -> float | None:
    """Judge only answers whose first token has an odd id; different rewards for these."""
    return len(answer.ids) if answer.ids[0] % 2 else None


@pytest.fixture
def online(tmp_path, monkeypatch):
    """Return a function that makes a trainer on sampled answers, whose rounds are single steps."""
    monkeypatch.setitem(registry._REGISTRY, "odd", RewardFunction(odd, NoOptions))
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}", "answer": str(i)}) + "\n" for i in range(12)))

    def make(exp_name="run", rollout=None, hooks=None, **options):
        rewards = ["length", {"name": "regex", "pattern": ".*a.*", "weight": 2.0}]
        rollout = {"num_generations": N, "prompts_per_round": PROMPTS, "max_new_tokens": 6, "rewards": rewards} | (
            rollout or {}
        )
        config = {
            "model": {"name_or_path": "tiny"},
            "datasets": [str(rows)],
            "output_dir": str(tmp_path / "runs"),
            "exp_name": exp_name,
            "quiet": True,
            "loss": {"name": "policy"},
            "total_batch_size": PROMPTS,
            "n_steps": 2,
            "lr": 1e-3,
            "packing": True,
            "save_every_steps": 0,
            "rollout": rollout,
        }
        return Trainer(config | options, **(hooks or {}))

    return make


def saved(trainer, number: int) -> list[dict]:
    file = trainer.run.path / "rollouts" / f"round-{number}.jsonl"
    return [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]


def group(*parts: dict[str, float], rewards=None):
    """The answers to a prompt by the results of the reward functions; without a reward of its own, that of `right`."""
    rewards = [one.get("right", NAN) for one in parts] if rewards is None else rewards
    answers = [JudgedAnswer([1], [2], [True], [-1.0], reward, True) for reward in rewards]
    stats = [{"parts": one, "reward": r, "messages": [r], "tokens": 1} for one, r in zip(parts, rewards, strict=True)]
    return answers, stats


def right(*values: float):
    return group(*({"right": value} for value in values))


def test_metrics_of_groups():
    """All right, all wrong, half right, and one right of which the others cannot be judged."""
    groups = [right(1.0, 1.0), right(0.0, 0.0), right(1.0, 0.0), group({"right": 1.0}, {})]
    found = group_metrics(groups, ["right"])
    assert found == {
        "reward_std": 0.5 / 4,
        "zero_variance": 3 / 4,
        "distinct": (1 + 1 + 2 + 2) / 2 / 4,
        "solved": 2 / 4,
        "failed": 1 / 4,
    }


def test_answers_without_any_reward_have_no_mean():
    """0 would be the best reward of a penalty, and save_best would take it."""
    stats = [one | {"ended": True, "turns": 1} for one in group({}, {}, rewards=[NAN, NAN])[1]]
    found = answer_metrics([stats]) | {"tokens_per_second": 1.0}
    assert math.isnan(found["reward"]) and found["unjudged"] == 1
    assert "reward nan" in round_line(1, 2, found) and "unjudged 100%" in round_line(1, 2, found)
    assert "unjudged" not in round_line(1, 2, found | {"reward": 1.0, "unjudged": 0.0})


def test_the_first_function_says_what_is_right():
    """A penalty of 0 in all answers does not make them wrong, and other numbers leave the metrics out."""
    parts = [{"right": 1.0, "overlong": 0.0}, {"right": 1.0, "overlong": 0.0}]
    assert group_metrics([group(*parts)], ["right", "overlong"])["solved"] == 1
    assert "solved" not in group_metrics([right(0.5, 1.0)], ["right"])
    both = group_metrics([group({"right": 1.0}, {"right": 0.0, "overlong": 0.0})], ["right", "overlong"])
    assert (both["unjudged/right"], both["unjudged/overlong"]) == (0, 0.5)
    assert group_metrics([group({}, {}, rewards=[1.0, 1.0])], [])["solved"] == 1  # an environment alone


def test_a_line_for_each_answer(online, tmp_path):
    """Full groups, with the data row of each and the advantage that its tokens have: (reward - mean) / deviation."""
    trainer = online(rollout={"save_samples": N + 1})
    trainer.train()
    for number in (1, 2):
        rows = saved(trainer, number)
        assert [row["group"] for row in rows] == [0] * N + [1] * N
        assert {(row["round"], row["step"]) for row in rows} == {(number, number - 1)}
        for row in rows:
            assert row["source"].endswith("prompts.jsonl")
            assert row["prompt"][-1]["content"] == f"say {row['line'] - 1}"
            assert [message["role"] for message in row["messages"]] == ["assistant"]
            assert row["reward"] == pytest.approx(row["parts"]["length"] + 2 * row["parts"]["regex"])
            assert row["ended"] == (row["tokens"] < 6) and row["logp"] < 0
        rewards = [row["reward"] for row in rows[:N]]
        mean = sum(rewards) / N
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (N - 1))
        expected = [(reward - mean) / (deviation or 1) for reward in rewards]
        assert [row["advantage"] for row in rows[:N]] == pytest.approx(expected, abs=1e-3)
    assert {row["round"] for row in metrics(trainer, "rollout")} == {1, 2}


def test_answers_that_cannot_be_judged(online):
    """They have no reward and no advantage, and the others keep their own."""
    trainer = online(rollout={"rewards": ["odd"], "save_samples": -1}, n_steps=1, debug=True)
    trainer.train()
    rows, (logged,) = saved(trainer, 1), metrics(trainer, "rollout")
    unjudged = [row for row in rows if row["reward"] is None]
    assert 0 < len(unjudged) < len(rows) == N * PROMPTS
    assert logged["unjudged"] == pytest.approx(len(unjudged) / len(rows))
    for row in rows:
        assert (row["reward"] is None) == ("advantage" not in row) == (row["parts"] == {})
        if row["reward"] is not None:
            assert row["reward"] == row["tokens"]
    for number in range(PROMPTS):
        of_group = [row for row in rows if row["group"] == number and row["reward"] is not None]
        ordered = sorted(of_group, key=lambda row: row["reward"])
        assert [row["advantage"] for row in ordered] == sorted(row["advantage"] for row in of_group)


def test_every_sampled_answer_is_trained_on(online):
    """Long answers are not left out: the lengths that are sampled are those in the batches."""
    trainer = online(rollout={"save_samples": -1, "max_new_tokens": 40})
    trained: Counter[int] = Counter()
    steps = trainer.train_loader.steps

    def watched(consumed=0):
        for indices, batches in steps(consumed):
            cache = trainer.train_loader.examples.caches[0]
            assert sum(batch.n_targets for batch in batches) == int(cache.mask.sum())
            trained.update(_n_trained(cache))
            yield indices, batches

    trainer.train_loader.steps = watched
    trainer.train()
    sampled = Counter(row["tokens"] for number in (1, 2) for row in saved(trainer, number))
    assert len(sampled) > 1 and trained == sampled


def _n_trained(cache) -> list[int]:
    bounds = cache.offsets.tolist()
    return [int(cache.mask[start:end].sum()) for start, end in pairwise(bounds)]


def test_a_resumed_run_logs_each_round_once(online):
    """A round that was sampled after the checkpoint is sampled again; neither its metrics nor its answers are twice."""
    options = {"n_steps": 5, "save_every_steps": 2, "rollout": {"save_samples": -1}}
    whole = online("whole", **options)
    whole.train()

    def stop(trainer):
        if trainer.step == 4:
            (trainer.run.path / "rollouts" / "round-9.jsonl").write_text('{"round": 9, "step": 8}\n')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        online("cut", hooks={"on_step_end": stop}, **options).train()
    cut = online("cut", **options)
    before = [row["round"] for row in metrics(cut, "rollout")]
    cut.train()
    assert before == [1, 2, 3, 4] and cut.checkpoint.name == "step-2"
    timed = ("seconds/generate", "seconds/judge", "seconds/logps", "seconds/train", "tokens_per_second")
    of_runs = [
        [{name: value for name, value in row.items() if name not in timed} for row in metrics(trainer, "rollout")]
        for trainer in (whole, cut)
    ]
    assert of_runs[0] == of_runs[1] and [row["round"] for row in of_runs[1]] == [1, 2, 3, 4, 5]
    folders = [trainer.run.path / "rollouts" for trainer in (whole, cut)]
    answers = [{file.name: file.read_text() for file in folder.iterdir()} for folder in folders]
    assert answers[0] == answers[1] and len(answers[0]) == 5


def test_a_run_that_starts_over_moves_the_answers(online):
    """Without a checkpoint, the answers of the former attempt are not mixed with new ones."""
    online(n_steps=2).train()
    (online().run.path / "run.json").unlink()
    again = online(n_steps=1, allow_changes=["n_steps"])
    again.train()
    assert [file.name for file in (again.run.path / "rollouts").iterdir()] == ["round-1.jsonl"]
    assert len(list((again.run.path / "attempt-1" / "rollouts").iterdir())) == 2


def test_ranks_other_than_0_write_nothing(online, tmp_path, capsys):
    """Neither answers nor warnings: the ranks share the run directory."""
    trainer = online(rollout={"rewards": ["length"]}, n_steps=1)
    trainer.parallel.rank = 1
    trainer.train()
    assert not list(trainer.run.path.glob("rollouts*")) and not (trainer.run.path / "metrics.jsonl").exists()
    assert "warning" not in capsys.readouterr().out


def test_a_warning_when_few_answers_end(online, capsys):
    """In the first round only; none when they end (silent RL bug R35)."""
    online("short", rollout={"max_new_tokens": 1}).train()
    assert capsys.readouterr().out.count("rollout.max_new_tokens=1,") == 1
    online("long", rollout={"max_new_tokens": 100, "stop": list("aeiou")}).train()
    assert "max_new_tokens" not in capsys.readouterr().out


def test_a_warning_when_sampling_and_training_differ(online, capsys):
    """Once in a run (silent RL bug R7)."""
    trainer = online()
    warn = trainer.train_loader.log.warn_of_mismatch
    trainer.logger = type("Logger", (), {"warning": staticmethod(print)})
    for mismatch in (0.04, 0.06, 0.07):
        warn({"round": 2, "ended": 1.0, "mismatch": mismatch})
    assert capsys.readouterr().out.count("mismatch") == 1


def shift_sampled_logps(trainer, monkeypatch):
    """Add 0.2 to the log-probabilities of the sampled tokens of each round."""
    use = trainer.train_loader._use

    def shifted(cache):
        cache.token_features["sample_logps"] += 0.2
        use(cache)

    monkeypatch.setattr(trainer.train_loader, "_use", shifted)


def test_the_warning_in_rounds_of_one_step(online, capsys, monkeypatch):
    """Only the train metrics have the mismatch: the log-probabilities that were sampled are changed by 0.2."""
    trainer = online()
    shift_sampled_logps(trainer, monkeypatch)
    trainer.train()
    assert "mismatch" not in metrics(trainer, "rollout")[-1]
    assert metrics(trainer)[-1]["mismatch"] == pytest.approx(0.2, abs=1e-3)
    assert capsys.readouterr().out.count("mismatch") == 1


def test_the_warning_in_rounds_of_several_steps(online, capsys, monkeypatch):
    """The metrics of the round have the mismatch, and the warning comes before its first step."""
    out = []
    hooks = {"on_step_end": lambda trainer: out.append(capsys.readouterr().out.count("mismatch"))}
    trainer = online(rollout={"num_iterations": 2}, hooks=hooks)
    shift_sampled_logps(trainer, monkeypatch)
    trainer.train()
    logged = metrics(trainer, "rollout")[0]
    assert logged["mismatch"] == pytest.approx(0.2, abs=1e-3) and logged["mismatch/outside"] == 0
    assert logged["mismatch/ess"] == pytest.approx(1, abs=1e-3)
    assert out == [1, 0] and "mismatch" not in capsys.readouterr().out


def test_no_rewards_without_functions(online):
    """Distillation on sampled answers has no reward to log."""
    trainer = online(loss={"name": "kd", "teacher": "tiny"}, rollout={"rewards": []}, n_steps=1)
    trainer.train()
    (logged,) = metrics(trainer, "rollout")
    assert "length" in logged and not {"reward", "zero_variance", "unjudged"} & set(logged)


def test_the_metrics_of_a_round(online):
    """Those that the page lists, with the time of each part and the sampling speed."""
    trainer = online()
    trainer.train()
    first, second = metrics(trainer, "rollout")
    assert {"drawn", "length_max", "ended", "turns", "unjudged/length", "reward/regex", "distinct"} <= set(first)
    assert "seconds/train" not in first and second["seconds/train"] > 0
    speed = first["length"] * N * PROMPTS / first["seconds/generate"]
    assert first["tokens_per_second"] == pytest.approx(speed)
