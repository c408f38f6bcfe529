"""`max_minutes`: a run that ends in time with a checkpoint, by a clock that only the run's own work moves."""

import sys
from types import SimpleNamespace

import pytest

from minitrain import RunError
from minitrain.cli.main import main
from minitrain.training import after_step, saving, time_limit
from tests.conftest import metrics
from tests.messages import raises

STEP, SAVE, EVALUATION = 10.0, 5.0, 20.0  # seconds


class Clock:
    """Stands still but for `pass_time`."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time_limit, "clock", clock)
    for module in (after_step, saving):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock))
    return clock


@pytest.fixture
def timed(make_trainer, clock):
    """Return a function that makes a trainer whose steps, saves and evaluations take the seconds above."""

    def make(*overrides: str, **hooks):
        trainer = make_trainer("n_steps=9", "save_every_steps=0", *overrides, **hooks)
        trainer.hooks["on_step_end"].insert(0, lambda t: clock.pass_time(STEP))
        trainer.save_schedule.cost = SAVE
        evaluate = trainer.evaluate

        def timed_evaluation(*args):
            clock.pass_time(EVALUATION)
            return evaluate(*args)

        trainer.evaluate = timed_evaluation
        return trainer

    return make


def test_it_stops_before_a_step_that_would_end_too_late(timed, clock, capsys):
    """Of 60 s, five steps take 50; a sixth would leave no time for the checkpoint. The next commands end the run."""
    oracle = timed("exp_name=undisturbed")
    oracle.train()
    assert oracle.step == 9 and oracle.signal is None
    for stop in (5, 9):
        trainer = timed("max_minutes=1")
        began = clock()
        trainer.train()
        assert trainer.step == stop and clock() - began <= 60
        if stop < 9:
            assert trainer.signal == 14 and "stopped by max_minutes at step 5" in capsys.readouterr().out
            assert trainer.run.checkpoint(5).is_dir() and not trainer.run.final.exists()
    assert trainer.signal is None and trainer.run.final.exists()
    ledgers = [(run.run.path / "ledger.jsonl").read_text() for run in (oracle, trainer)]
    assert ledgers[0] == ledgers[1] and ledgers[0].count("\n") == 9


def test_time_for_an_evaluation_is_kept(timed, clock):
    """20 s before the first step, and 20 s after the third: at the end of the second, 40 s of 75 have passed, and the
    step, the evaluation and the checkpoint take 35; of 74 s that is too much. The loading is on the clock, too."""
    evaluated = ("validation_split=5", "eval_every_steps=3")
    for name, seconds, stop in (("enough", 75.0, 3), ("short", 74.0, 2)):
        trainer = timed(*evaluated, f"exp_name={name}", f"max_minutes={seconds / 60}")
        trainer.train()
        assert (trainer.step, trainer.signal) == (stop, 14)
        assert [row["step"] for row in metrics(trainer, "eval")] == ([0, 3] if stop == 3 else [0])
    trainer = timed(*evaluated, "exp_name=loading", "max_minutes=1.25")
    clock.pass_time(10)
    trainer.train()
    assert trainer.step == 2


def test_evaluations_are_not_part_of_a_step(timed):
    """Evaluation, two steps, evaluation: 60 of 75 s have passed, and a step and the checkpoint take 15."""
    trainer = timed("validation_split=5", "eval_every_steps=2", "max_minutes=1.25")
    trainer.train()
    assert (trainer.step, trainer.signal) == (3, 14)


def test_one_evaluation_in_the_middle_is_not_reserved_twice(timed):
    """While it evaluates, only the checkpoint is still to come, although the next step is evaluated, too."""
    trainer = timed("validation_split=5", "eval_every_steps=1", "max_minutes=1", "eval_batch_size=1")
    trainer.train()  # 20 + 10 + 20 s; the next step and evaluation would end after 80
    assert trainer.step == 1 and [row["step"] for row in metrics(trainer, "eval")] == [0, 1]


def test_an_evaluation_that_takes_too_long_is_cut_short(timed, clock):
    """As by a signal; the next command begins with it, and if it is never done, the run does not go on forever."""
    trainer = timed("validation_split=5", "max_minutes=1", "do_first_eval=false", "eval_every_steps=2")
    trainer.hooks["on_step_end"].append(lambda t: t.step == 2 and clock.pass_time(40))
    trainer.train()
    assert (trainer.step, trainer.signal, metrics(trainer, "eval")) == (2, 14, [])
    assert trainer.run.checkpoint(2).is_dir()
    trainer = timed("validation_split=5", "max_minutes=1", "do_first_eval=false", "eval_every_steps=2")
    trainer.hooks["on_train_begin"].append(lambda t: clock.pass_time(50))
    with raises(RunError, "out-of-range", "max_minutes", "1 minutes", "step 2"):
        trainer.train()


def test_all_ranks_stop_when_one_is_late(make_trainer):
    """What ranks agree on is the largest code: here another rank sends that of the time limit."""
    trainer = make_trainer("max_minutes=60")
    codes = []

    def largest(value: float) -> float:
        if sys._getframe(1).f_code.co_name != "_stopping":
            return value
        codes.append(value)
        return max(value, 14.0 if len(codes) == 3 else 0.0)

    trainer.parallel.max = largest
    trainer.train()
    assert trainer.signal == 14 and trainer.step == 2 and codes[:3] == [0, 0, 0]


def test_a_finished_run_is_not_stopped_afterwards(timed, clock):
    """The last check, which sets the exit code, knows signals only."""
    trainer = timed("max_minutes=2", on_train_end=lambda t: None)
    trainer.hooks["on_save"].append(lambda t: clock.pass_time(1000))
    trainer.train()
    assert trainer.signal is None and trainer.run.final.exists()


def test_a_second_training_of_the_process_has_its_own_time(timed, clock):
    trainer = timed("max_minutes=1")
    trainer.train()
    assert trainer.step == 5
    clock.pass_time(1000)
    trainer.train()
    assert trainer.step == 9 and trainer.signal is None


def test_the_exit_code(folder, monkeypatch, capsys):
    """142, by which a script that submits the command again knows that it is not done."""
    clock = Clock()
    monkeypatch.setattr(time_limit, "clock", clock)
    monkeypatch.setattr(after_step, "log_train", lambda trainer: clock.pass_time(50))
    arguments = ["train", "c.yml", "--overrides", "n_steps=3", "log_every_steps=1", "max_minutes=1"]
    assert main(arguments) == 142
    assert "stopped by max_minutes at step 1" in capsys.readouterr().out
