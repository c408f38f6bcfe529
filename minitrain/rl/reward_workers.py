"""Call reward functions in processes with a time limit, so that one that hangs or dies does not stop the run."""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from .rewards import Answer, Failed, Reward, read_result

GRACE = 2.0  # seconds after the time limit in which a worker can report it, before it is killed


class InProcess:
    """Calls reward functions in this process, without a time limit."""

    def call(self, reward: Reward, answers: Sequence[Answer]) -> list[Any]:
        """Return the result of a reward function for each answer; `Failed` where it failed."""
        if reward.function.whole_round:
            return _call_whole(reward, answers)
        return [_call(reward, answer) for answer in answers]

    def close(self) -> None:
        """Do nothing."""


class Workers:
    """Calls reward functions in processes.

    A worker limits the time of a call by a signal in its main thread. If the function suppresses that signal, the
    worker is killed and replaced.
    """

    def __init__(self, rewards: Sequence[Reward], n_workers: int, timeout: float):
        self.rewards, self.n_workers, self.timeout = list(rewards), n_workers, timeout
        self.workers: list[_Worker] = []

    def call(self, reward: Reward, answers: Sequence[Answer]) -> list[Any]:
        """Return the result of a reward function for each answer; `Failed` where it failed."""
        number = self.rewards.index(reward)
        if reward.function.whole_round:
            results = self._call_all(number, [list(answers)])[0]
            if isinstance(results, Failed):
                return [results] * len(answers)
            return results
        return self._call_all(number, answers)

    def _call_all(self, number: int, arguments: Sequence[Any]) -> list[Any]:
        waiting, results = deque(enumerate(arguments)), [None] * len(arguments)
        if not self.workers:
            self.workers = [_Worker(self.rewards, self.timeout) for _ in range(self.n_workers)]
        while waiting or any(worker.index is not None for worker in self.workers):
            for worker in self.workers:
                if worker.index is None and waiting:
                    index, argument = waiting.popleft()
                    worker.send(number, index, argument)
            busy = {worker.connection: worker for worker in self.workers if worker.index is not None}
            ready = wait(
                list(busy), timeout=max(0.0, min(worker.deadline for worker in busy.values()) - time.monotonic())
            )
            for connection in ready:
                index = busy[connection].index
                results[index] = self._receive(busy[connection])
            for worker in busy.values():
                if worker.index is not None and time.monotonic() > worker.deadline:
                    results[worker.index] = Failed(f"took more than {self.timeout:g} seconds")
                    worker.restart()
        return results

    def _receive(self, worker: "_Worker") -> Any:
        try:
            result = worker.connection.recv()
        except Exception as error:  # the worker died, or its result cannot be read
            worker.restart()
            return Failed("ended its process" if isinstance(error, (EOFError, OSError)) else _describe(error))
        worker.index = None
        return result

    def close(self) -> None:
        """End the processes. A later call starts others."""
        for worker in self.workers:
            worker.stop()
        self.workers = []


class _Worker:
    """A process, and the index of the call that it works on."""

    def __init__(self, rewards: list[Reward], timeout: float):
        self.rewards, self.timeout = rewards, timeout
        self.restart(first=True)

    def restart(self, first: bool = False) -> None:
        if not first:
            self.stop()
        self.index: int | None = None
        self.deadline = 0.0
        context = multiprocessing.get_context("fork")  # functions of a plugin or a notebook cannot be pickled
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, self.rewards, self.timeout), daemon=True)
        self.process.start()
        other.close()

    def send(self, number: int, index: int, argument: Any) -> None:
        self.index, self.deadline = index, time.monotonic() + self.timeout + GRACE
        self.connection.send((number, argument))

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class _TimeIsUp(BaseException):
    pass


def _work(connection: Connection, rewards: list[Reward], timeout: float) -> None:
    """Answer calls until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what Ctrl-C does
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["OMP_NUM_THREADS"] = "1"
    parent = os.getppid()
    while True:
        try:
            while not connection.poll(1.0):
                if os.getppid() != parent:  # other workers hold the other end of the connection, too
                    return
            number, argument = connection.recv()
        except (EOFError, OSError):
            return
        result = _limited(rewards[number], argument, timeout)
        try:
            connection.send(result)
        except Exception as error:  # it cannot be pickled
            connection.send(Failed(f"returned {type(result).__name__}, which cannot be sent ({_describe(error)})"))


def _limited(reward: Reward, argument: Any, timeout: float) -> Any:
    def stop(number, frame):
        raise _TimeIsUp

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        return _call_whole(reward, argument) if reward.function.whole_round else _call(reward, argument)
    except _TimeIsUp:
        return Failed(f"took more than {timeout:g} seconds")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _call(reward: Reward, answer: Answer) -> Any:
    try:
        return _plain(reward.function.function(answer, reward.options))
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return Failed(_describe(error))


def _call_whole(reward: Reward, answers: Sequence[Answer]) -> list[Any]:
    try:
        results = reward.function.function(list(answers), reward.options)
        if not isinstance(results, (list, tuple)) or len(results) != len(answers):
            n = len(results) if isinstance(results, (list, tuple)) else type(results).__name__
            return [Failed(f"returned {n} results for {len(answers)} answers")] * len(answers)
        return [_plain(result) for result in results]
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return [Failed(_describe(error))] * len(answers)


def _plain(result: Any) -> Any:
    """Return a result that another process can read; one that is invalid as its description."""
    number, extra, problem = read_result(result)
    return Failed(problem) if problem else {"reward": number, **extra}


def _describe(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
