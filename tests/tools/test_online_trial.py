"""`minitrain validate` of an online config plays a round: real functions, marked tokens, and nothing is trained."""

import json
import re
from pathlib import Path

import pytest

from minitrain import ConfigError, RunError, load_config
from minitrain.cli.main import main
from minitrain.inference import choice
from minitrain.rl import environments, rewards
from minitrain.rl.environments import register_environment
from minitrain.rl.rewards import NoOptions, register_reward
from minitrain.tools.preflight import online
from minitrain.tools.preflight.validate import validate
from minitrain.training.setup import dry_run
from tests.messages import raises
from tests.rl.test_rollout_keys import Polite
from tests.scorers import random_base

ROLLOUT = {"num_generations": 6, "prompts_per_round": 4, "max_new_tokens": 40, "rewards": ["length"]}


@pytest.fixture(autouse=True)
def own_functions(monkeypatch):
    monkeypatch.setattr(rewards, "_REGISTRY", dict(rewards._REGISTRY))
    monkeypatch.setattr(environments, "_REGISTRY", dict(environments._REGISTRY))


@pytest.fixture
def config(tmp_path):
    """Return a function that makes the config of a run on sampled answers."""
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}", "answer": f"it is {i}"}) + "\n" for i in range(12)))

    def make(rollout=None, **options):
        base = {"model": {"name_or_path": "tiny"}, "datasets": [str(rows)], "output_dir": str(tmp_path / "runs")}
        base |= {"loss": {"name": "policy"}, "total_batch_size": 2, "rollout": ROLLOUT | (rollout or {})}
        return load_config(base | {"exp_name": "run"} | options)

    return make


def test_a_round_of_two_prompts_is_sampled_and_judged(config, tmp_path):
    """At most 4 answers of 32 tokens to each prompt, with their rewards by part; the run directory stays empty."""
    report = validate(config({"rewards": ["length", {"name": "regex", "pattern": ".*", "weight": 2.0}]}))
    text = report["round"]
    assert len(re.findall(r"prompts.jsonl:\d+: <\|im_start\|>user", text)) == 2
    answers = re.findall(r"answer \d: reward (\S+) \(length (\S+), regex 1\); (\d+) tokens, (ended|cut off)", text)
    assert len(answers) == 8
    for reward, part, tokens, end in answers:
        assert float(part) == -int(tokens) / 100 and float(reward) == pytest.approx(2 + float(part), abs=1e-3)
        assert int(tokens) <= 32 and (end == "ended" or int(tokens) == 32)
    assert text.count("⟦") == 1 + 8  # the legend and the answers
    assert report["rounds"] == "3 of 4 prompts with 6 answers each, 2 steps per round"
    assert report["steps"] == "6 of 2 prompts, 1.00 epochs of 12 prompts"
    assert "targets" not in str(report) and not (tmp_path / "runs").exists()


def test_replies_are_marked_apart_from_what_was_sampled(config):
    """An environment that replies `ok` after each answer; answers end at the first byte, as if each were an end."""
    register_environment("polite", NoOptions)(type("Rewarding", (Polite,), {"reward": 1.0}))
    every_byte = [chr(i) for i in range(32, 127)] + ["\N{REPLACEMENT CHARACTER}"] + [chr(i) for i in range(32)]
    text = validate(config({"environment": "polite", "max_turns": 3, "stop": every_byte}))["round"]
    answer = text[text.index("answer 1:") :].split("answer 2:")[0]
    assert answer.count("⟦") == 3 and answer.count("«result: ") == 2 and answer.count("\n    ok<") == 2
    assert "reward 2.97 (length -0.03); 3 tokens, ended" in answer


def test_an_environment_that_fails_is_named(config):
    class Broken(Polite):
        def begin(self, row, messages, seed):
            return row["missing"]

    register_environment("broken", NoOptions)(Broken)
    with raises(RunError, "plugin-failed", "rollout.environment", "KeyError", "test_online_trial.py"):
        validate(config({"environment": "broken"}))


def test_functions_that_fail_are_counted_with_their_message(config):
    register_reward("broken")(lambda answer, options: 1 / 0)
    report = validate(config({"rewards": ["broken", "length"]}))
    assert "reward broken: ZeroDivisionError: division by zero (8 of 8 answers)" in report["warning"]
    register_reward("silent")(lambda answer, options: None)
    report = validate(config({"rewards": ["silent"]}))
    assert "silent: judged none of the answers" in report["warning"] and report["round"].count("not judged") == 8 + 2


def test_a_reward_of_the_reference_answer_itself_is_shown(config):
    """As text it equals itself; the number 7 of a pattern is in none of them."""
    report = validate(config({"rewards": ["exact_match"]}))
    assert report["round"].count("reference answer: reward 1 (exact_match 1)") == 2 and "warning" not in report
    report = validate(config({"rewards": [{"name": "exact_match", "key": "prompt"}]}))
    assert "exact_match is 0 for the reference answer itself" in report["warning"]


@pytest.mark.parametrize("limit, here", [(0, True), (10**11, False)])
def test_a_random_model_answers_for_one_that_is_large_or_elsewhere(config, tmp_path, monkeypatch, limit, here):
    """With the tokenizer of the run, whatever its architecture and adapter are."""
    folder = random_base("gpt2", tmp_path / "gpt2")
    monkeypatch.setattr(online, "MAX_WORK", limit)
    if not here:
        monkeypatch.setattr(online, "_has_weights_here", lambda model: False)
    options = {"model": {"name_or_path": str(folder)}, "lora": {"rank": 2}}
    text = validate(config(**options))["round"]
    reason = "too many for a trial" if here else "are not on this machine"
    assert "a random model, since" in text and reason in text and text.count("answer 4") == 2


def test_a_sampler_that_differs_from_the_policy_is_refused_as_in_training(config, monkeypatch):
    choose = choice.Chooser.__call__
    monkeypatch.setattr(choice.Chooser, "__call__", lambda *args: (choose(*args)[0], 0.9 * choose(*args)[1]))
    with raises(ConfigError, "unsupported-model", "rollout.num_generations: "):
        validate(config())


@pytest.mark.parametrize("metric", ["reward", "reward/exact_match", "pass@4/exact_match", "ended"])
def test_metrics_of_sampled_answers_are_known(config, metric):
    rollout = {"rewards": ["exact_match"], "eval_generations": 8}
    stopping = {"metric": metric}
    options = {"validation_split": 2, "save_best": True, "early_stopping": stopping, "eval_every_steps": 1}
    validate(config(rollout, **options))
    with raises(ConfigError, "not-a-choice", "early_stopping.metric"):
        validate(config(rollout, **options | {"early_stopping": {"metric": f"{metric}x".replace("/", "-")}}))


def test_rewards_that_load_a_model_are_not_tried(config):
    text = validate(config({"rewards": ["length", {"name": "teacher", "name_or_path": "tiny"}]}))["round"]
    assert "not tried, since they load a model: teacher" in text and text.count("(length -") == 8 + 2


def test_a_missing_model_of_a_reward_is_refused(config):
    with raises(ConfigError, "unreachable", "rollout.rewards: teacher: "):
        validate(config({"rewards": [{"name": "teacher", "name_or_path": "missing/teacher"}]}))


@pytest.mark.parametrize("loss", ["dpo", "kto", "sft", "kd"])
def test_every_kind_of_loss_is_tried(config, loss):
    options = {"name": loss} | ({"teacher": "tiny"} if loss == "kd" else {})
    rollout = {"rewards": []} if loss == "kd" else {}
    assert validate(config(rollout, loss=options))["round"].count("answer 4") == 2


def test_the_prompts_are_those_that_a_training_begins_with(config):
    trial = online.play_round(dry_run(config()))
    from minitrain import Trainer

    first = Trainer(config()).train_loader.draw(2)
    assert [group[0][0].prompt.ids for group in trial.groups] == [prompt.ids for prompt in first]


def test_rows_without_a_reference_are_reported(config, capsys):
    """`validate` and training name the first line and the number, for files of which some rows have one."""
    run = config({"rewards": ["length", "exact_match"]})
    rows = Path(run.datasets[0].path)
    lines = rows.read_text().splitlines()
    lines[3] = lines[7] = json.dumps({"prompt": "what?"})
    rows.write_text("\n".join(lines))
    warning = f"{rows}:4: exact_match has nothing to compare with in 2 of 12 rows"
    assert warning in validate(run)["warning"]
    from minitrain import Trainer

    assert [warning in line for line in Trainer(run).warnings] == [True]


def test_one_line_for_each_config_of_a_folder(tmp_path, capsys):
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"prompt": "a", "answer": "b"}\n' * 4)
    config = {"datasets": [str(rows)], "model": {"name_or_path": "tiny"}, "loss": "policy", "total_batch_size": 4}
    rollout = {"num_generations": 2, "prompts_per_round": 4, "rewards": ["exact_match"]}
    (tmp_path / "a.yml").write_text(json.dumps(config | {"rollout": rollout}))
    (tmp_path / "b.yml").write_text(json.dumps(config | {"rollout": rollout | {"rewards": ["exact"]}}))
    assert main(["validate", "--all", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "a.yml: valid; 4 to train on; steps: 1 of 4 prompts" in out and "rollout.rewards[0]" in err
