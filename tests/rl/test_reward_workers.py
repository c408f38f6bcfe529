"""Reward functions that hang, die or disturb their process: others keep their rewards, and nothing waits forever."""

import contextlib
import math
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from minitrain.config.issues import ConfigIssues, ConfigSource
from minitrain.errors import RunError
from minitrain.rl import reward_workers
from minitrain.rl import rewards as registry
from minitrain.rl.reward_workers import InProcess, Workers
from minitrain.rl.rewards import Answer, Failed, build_rewards, combine, register_reward
from tests.messages import raises

LARGE = "x" * 4_000_000  # more than a socket holds


@pytest.fixture(autouse=True)
def own_rewards(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture(autouse=True)
def limited():
    """Fail a test that waits forever."""

    def stop(number, frame):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 120)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def answer(text="4", **row):
    return Answer(text, [{"role": "assistant", "content": text}], {"answer": "4"} | row, [1, 2, 3], True, 1, 0)


@pytest.fixture
def workers(monkeypatch):
    """Return a function that makes workers of a reward function."""
    monkeypatch.setattr(reward_workers, "GRACE", 0.5)
    made = []

    def make(function, n_workers=2, timeout=0.5, whole_round=False):
        register_reward("hostile", whole_round=whole_round)(function)
        issues = ConfigIssues(ConfigSource("test"))
        rewards = build_rewards(["hostile"], issues)
        issues.raise_if_any()
        made.append(Workers(rewards, n_workers, timeout))
        return made[-1]

    yield make
    for one in made:
        one.close()


def totals(pool, *answers, failures=None):
    failures = Counter() if failures is None else failures
    return [one.total for one in combine([pool.call(pool.rewards[0], answers)], pool.rewards, failures)]


def ignores_the_limit(*_):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    time.sleep(60)


def stops_the_timer(*_):
    signal.alarm(0)
    time.sleep(60)


def blocks_signals(*_):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGTERM])
    time.sleep(60)


def catches_everything(*_):
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


def stops_itself(*_):
    os.kill(os.getpid(), signal.SIGSTOP)


def writes_a_part(*_):
    """The begin of a message, as of a worker that is killed while it sends, whose child has the socket, too."""
    if os.fork() == 0:
        time.sleep(60)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as connection:
            connection.send(b"\xff\x00\x00")
    os._exit(1)


def raises_an_error_without_text(*_):
    class Error(Exception):
        def __str__(self):
            raise ValueError

    raise Error


def raises_a_base_exception(*_):
    class Error(BaseException):
        pass

    raise Error


def closes_files(*_):
    os.closerange(3, 200)


def forks(*_):
    os.fork()
    raise ZeroDivisionError


def raises_an_interrupt(*_):
    raise KeyboardInterrupt


def has_its_own_limit(*_):
    """A verifier with a time limit of its own, which replaces that of the worker."""
    signal.alarm(1)
    time.sleep(60)


HOSTILE = {
    "raises": lambda *_: 1 / 0,
    "exits": lambda *_: os._exit(3),
    "leaves": lambda *_: exit(1),
    "is killed": lambda *_: os.kill(os.getpid(), signal.SIGKILL),
    "nan": lambda *_: math.nan,
    "string": lambda *_: "good",
    "too large": lambda *_: 10**400,
    "dict": lambda *_: {"score": 1},
    "sleeps": lambda *_: time.sleep(60),
}
HOSTILE |= {
    function.__name__.replace("_", " "): function
    for function in (
        has_its_own_limit,
        ignores_the_limit,
        stops_the_timer,
        blocks_signals,
        catches_everything,
        stops_itself,
        writes_a_part,
        raises_an_error_without_text,
        raises_a_base_exception,
        raises_an_interrupt,
        closes_files,
        forks,
    )
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_function_is_counted_and_stops_nothing(name, workers):
    """It judges the second of three answers badly; the others keep their rewards (silent RL bugs R14 to R16)."""
    hostile, failures = HOSTILE[name], Counter()
    pool = workers(lambda one, options: hostile() if one.text == "bad" else float(one.text))
    judged = totals(pool, answer("1"), answer("bad"), answer("2"), failures=failures)
    assert judged[::2] == [1, 2] and math.isnan(judged[1])
    assert sum(failures.values()) == 1 and next(iter(failures)).startswith("hostile: ")
    assert totals(pool, answer("3"), answer("4")) == [3, 4]


@pytest.mark.parametrize("name", ["raises", "raises an error without text", "too large", "leaves"])
def test_the_main_process_survives_a_function_that_raises(name, workers):
    pool = workers(lambda one, options: HOSTILE[name]() if one.text == "bad" else 1.0)
    results = InProcess().call(pool.rewards[0], [answer("bad"), answer()])
    assert isinstance(results[0], Failed) and results[1] == {"reward": 1.0}


def test_a_large_row_is_not_sent_to_a_worker_that_does_not_read(workers):
    """It is stopped; the main process does not wait for space in the socket."""
    pool = workers(lambda one, options: float(len(one.row["long"])), n_workers=1)
    assert totals(pool, answer(long=LARGE)) == [len(LARGE)]
    os.kill(pool.workers[0].pid, signal.SIGSTOP)
    judged = totals(pool, answer(long=LARGE), answer(long="four"))
    assert math.isnan(judged[0]) and judged[1] == 4


def test_a_large_result_that_is_not_complete(workers):
    """The worker is stopped while it sends."""

    def large(one, options):
        pid = os.getpid()
        if os.fork() == 0:
            time.sleep(0.2)
            os.kill(pid, signal.SIGSTOP)
            os._exit(0)
        return {"reward": 1.0} | {LARGE[:100_000] + str(i): 1.0 for i in range(40)}

    pool = workers(lambda one, options: large(one, options) if one.text == "bad" else 1.0)
    began = time.monotonic()
    totals(pool, answer("bad"), answer(), answer())
    assert time.monotonic() - began < 30


def test_rows_and_results_that_cannot_be_sent(workers):
    pool = workers(lambda one, options: 1.0)
    judged = totals(pool, answer(), answer(function=lambda: 1), answer())
    assert judged[::2] == [1, 1] and math.isnan(judged[1])


def test_the_main_process_is_called_while_it_waits(workers):
    """It then reports to the watchdog of the other ranks that it makes progress."""
    pool, beats = workers(lambda one, options: 1.0), []
    pool.keep_alive = beats.append
    assert totals(pool, *[answer()] * 9) == [1] * 9 and len(beats) >= 9 / pool.n_workers
    assert max(beats) > pool.timeout  # it waits for longer than that only if a worker has to be killed


def test_a_signal_does_not_wait_for_a_slow_function(workers, monkeypatch, tmp_path):
    """The main process is called again and again, also while all workers are busy."""
    monkeypatch.setattr(reward_workers, "LONGEST_WAIT", 0.01)
    file, beats = tmp_path / "third", []

    def slow(one, options):
        wait_until(file.exists)
        return 1.0

    pool = workers(slow, n_workers=1, timeout=20)
    pool.keep_alive = lambda seconds: beats.append(seconds) or (len(beats) > 9 and file.touch())
    assert totals(pool, answer()) == [1]


def test_a_worker_that_ends_between_calls_is_replaced(workers):
    pool = workers(lambda one, options: 1.0)
    assert totals(pool, answer(), answer()) == [1, 1]
    for worker in pool.workers:
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    assert totals(pool, answer(), answer(), answer()) == [1, 1, 1]


def test_workers_that_cannot_start_stop_the_run(workers, monkeypatch):
    """They hang, as after a fork while another thread has a lock; or end."""
    monkeypatch.setattr(reward_workers, "START_SECONDS", 0.2)
    monkeypatch.setattr(reward_workers, "N_RESTARTS", 2)
    for start in (lambda *_: time.sleep(60), lambda *_: os._exit(1)):
        monkeypatch.setattr(reward_workers, "_work", start)
        with raises(RunError, "process-failed", "rollout.rewards"):
            totals(workers(lambda one, options: 1.0), answer())


def test_a_function_that_always_hangs_is_given_up(workers, monkeypatch):
    """A round of 1,000 answers does not take 1,000 times the limit."""
    monkeypatch.setattr(reward_workers, "N_LATE", 3)
    failures = Counter()
    pool = workers(lambda one, options: time.sleep(60), timeout=0.1)
    assert all(map(math.isnan, totals(pool, *[answer()] * 1000, failures=failures)))
    assert sum(failures.values()) == 1000 and max(failures.values()) > 990


def test_processes_of_a_function_end_with_its_worker(workers):
    pool = workers(lambda one, options: {"reward": 1.0, "pid": subprocess.Popen(["sleep", "60"]).pid}, n_workers=1)
    pids = [int(pool.call(pool.rewards[0], [answer()])[0]["pid"]), pool.workers[0].pid]
    assert all(map(is_alive, pids))
    pool.close()
    wait_until(lambda: not any(map(is_alive, pids)))


def test_workers_end_with_the_main_process(workers, tmp_path):
    """Also when it is killed while a function hangs: they would keep its lock, sockets and output open."""
    file = tmp_path / "pid"

    def hangs(one, options):
        file.write_text(str(os.getpid()))
        ignores_the_limit()

    pool = workers(hangs, timeout=60)
    main = os.fork()
    if main == 0:
        totals(pool, answer())
        os._exit(0)
    try:
        wait_until(lambda: file.exists() and file.read_text())
    finally:
        os.kill(main, signal.SIGKILL)
        os.waitpid(main, 0)
    wait_until(lambda: not is_alive(int(file.read_text())))


def test_workers_end_with_their_owner(workers):
    """Those of an evaluation after training, which nothing closes."""
    pool = workers(lambda one, options: 1.0)
    owner = Workers(pool.rewards, 1, 1.0)
    owner.call(pool.rewards[0], [answer()])
    pids = [worker.pid for worker in owner.workers]
    del owner
    wait_until(lambda: not any(map(is_alive, pids)))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition):
    """Wait for a condition; `limited` ends it."""
    while not condition():
        time.sleep(0.01)
