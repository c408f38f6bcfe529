"""Call reward functions in processes with a time limit, so that one that hangs or dies does not stop the run.

The main process never waits without a limit: a worker that does not read or send in time is killed.
"""

import asyncio
import contextlib
import ctypes
import gc
import math
import os
import pickle
import signal
import socket
import struct
import sys
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch

from minitrain.config.schema import Config
from minitrain.errors import RunError
from minitrain.io.system import CAN_FORK

from .rewards import Answer, Failed, Reward, read_result

GRACE = 2.0  # seconds after the time limit in which a worker can report it, before it is killed
START_SECONDS = 60.0  # for a worker to start
LONGEST_WAIT = 1.0  # seconds until `keep_alive` is called again, which can raise after a signal
N_WORKERS = 4
N_RESTARTS = 8  # of workers that ended between calls, in a row
N_CONCURRENT = 64  # calls of an async function at the same time
N_LATE = 64  # calls in a row that take too long; then the others of the round are not made
PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_sockets: set[socket.socket] = set()  # of this process to its workers


class InProcess:
    """Calls reward functions in this process, without a time limit."""

    def call(self, reward: Reward, answers: Sequence[Answer]) -> list[Any]:
        """Return the result of a reward function for each answer; `Failed` where it failed."""
        if reward.judges_together:
            return _call_together(reward, answers, None)
        return [_call(reward, answer) for answer in answers]

    def close(self) -> None:
        """Do nothing."""


class Workers:
    """Calls reward functions in processes.

    A worker limits the time of a call by a signal in its main thread. If the function suppresses that signal, the
    worker is killed and replaced.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        n_workers: int,
        timeout: float,
        keep_alive: Callable[[float], None] = lambda seconds: None,
    ):
        """
        Args:
            rewards: The functions.
            n_workers: Number of processes.
            timeout: Seconds for an answer.
            keep_alive: Called before each wait for results, with its longest time in seconds.
        """
        self.rewards, self.n_workers, self.timeout, self.keep_alive = list(rewards), n_workers, timeout, keep_alive
        self.workers: list[_Worker] = []
        self.n_restarts = 0  # since the last call
        weakref.finalize(self, _stop, self.workers)

    def call(self, reward: Reward, answers: Sequence[Answer]) -> list[Any]:
        """Return the result of a reward function for each answer; `Failed` where it failed."""
        if not reward.judges_together or not answers:
            return self._call_all(reward, answers, self.timeout)
        results = self._call_all(reward, [list(answers)], _limit(reward, len(answers), self.timeout))[0]
        return [results] * len(answers) if isinstance(results, Failed) else results

    def _call_all(self, reward: Reward, arguments: Sequence[Any], limit: float) -> list[Any]:
        """Return the result of each call. `limit` is the time of a call, in seconds."""
        number, results = self.rewards.index(reward), [None] * len(arguments)
        waiting, n_late = deque(range(len(arguments))), 0
        if arguments and not self.workers:
            self.workers += [_Worker(self.rewards, self.timeout) for _ in range(self.n_workers)]
        while waiting or any(worker.index is not None for worker in self.workers):
            for worker in self.workers:
                if waiting and not worker.is_busy:
                    index = waiting.popleft()
                    try:
                        worker.send(index, pickle.dumps((number, arguments[index])), limit)
                    except OSError:  # it ended after its last call
                        self._restart(worker)
                        waiting.appendleft(index)
                    except Exception as error:
                        results[index] = Failed(f"cannot get this answer and its row ({_describe(error)})")
            busy = [worker for worker in self.workers if worker.is_busy]
            seconds = max(0.0, min((worker.deadline for worker in busy), default=0.0) - time.monotonic())
            self.keep_alive(seconds)
            ready = wait([worker.socket for worker in busy], min(seconds, LONGEST_WAIT))
            for worker in busy:
                if worker.socket in ready or time.monotonic() > worker.deadline:
                    index, result = worker.index, self._receive(worker, limit)
                    if index is not None:
                        results[index] = result
                        n_late = n_late + 1 if result == _took_more_than(limit) else 0
            while waiting and n_late >= N_LATE:
                results[waiting.popleft()] = Failed(f"was not called after {n_late} calls in a row that took too long")
        return results

    def _receive(self, worker: "_Worker", limit: float) -> Any:
        """Return the result of a worker, or what is wrong with it."""
        if worker.index is not None:
            self.n_restarts = 0
        try:
            return worker.receive()
        except Exception as error:
            self._restart(worker)
            if isinstance(error, TimeoutError):
                return _took_more_than(limit)
            return Failed("ended its process" if isinstance(error, (EOFError, OSError)) else _describe(error))

    def _restart(self, worker: "_Worker") -> None:
        self.n_restarts += 1
        if self.n_restarts > N_RESTARTS:
            raise RunError(
                "rollout.rewards: the processes of the reward functions end before they are called. Set debug=true to "
                "call the functions in the main process.",
                "process-failed",
            )
        worker.stop()
        worker.start()

    def close(self) -> None:
        """End the processes. A later call starts others."""
        _stop(self.workers)


def start_workers(rewards: Sequence[Reward], config: Config, on_result: Callable[[], None]) -> Workers | InProcess:
    """Return what calls the reward functions of a run: processes, or this one for `debug` and where none can be forked.

    Args:
        on_result: As for `Workers`.
    """
    if config.debug or not CAN_FORK:
        return InProcess()
    return Workers(rewards, min(config.num_proc or N_WORKERS, N_WORKERS), config.rollout.reward_timeout, on_result)


class _Worker:
    """A process, and the index of the call that it works on.

    It is forked, because functions of a plugin or a notebook cannot be pickled.
    """

    def __init__(self, rewards: list[Reward], timeout: float):
        self.rewards, self.timeout = rewards, timeout
        self.start()

    def start(self) -> None:
        self.socket, other = socket.socketpair()
        _sockets.add(self.socket)
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _work(other, parent, self.rewards, self.timeout)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        other.close()
        self.index: int | None = None
        self.is_busy, self.deadline = True, time.monotonic() + START_SECONDS

    def send(self, index: int, call: bytes, limit: float) -> None:
        self.deadline = time.monotonic() + limit + GRACE
        self.socket.settimeout(limit + GRACE)
        self.is_busy, self.index = True, index
        with contextlib.suppress(TimeoutError):  # `receive` reports it
            _send(self.socket, call)

    def receive(self) -> Any:
        result = pickle.loads(_receive(self.socket, max(self.deadline, time.monotonic() + 0.1)))
        self.is_busy, self.index = False, None
        return result

    def stop(self) -> None:
        """Kill the process and those that reward functions have started."""
        for kill in (os.killpg, os.kill):  # it has no group before it calls setsid
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)
        _sockets.discard(self.socket)
        self.socket.close()
        end = time.monotonic() + GRACE
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(self.pid, os.WNOHANG) == (0, 0) and time.monotonic() < end:
                time.sleep(0.001)


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stop()
    workers.clear()


def _send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(struct.pack("Q", len(message)) + message)


def _receive(connection: socket.socket, deadline: float | None = None) -> bytes:
    """Return a message.

    Raises:
        EOFError: The other process has ended.
        TimeoutError: The message is not complete at the deadline.
    """

    def read(n: int) -> bytes:
        data = bytearray()
        while len(data) < n:
            if deadline is not None:
                seconds = deadline - time.monotonic()
                if seconds <= 0:
                    raise TimeoutError
                connection.settimeout(seconds)
            part = connection.recv(min(n - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    return read(*struct.unpack("Q", read(8)))


# ------------------------------------------------------------------------------------------------ in a worker


class _TimeIsUp(BaseException):
    pass


def _work(connection: socket.socket, parent: int, rewards: list[Reward], timeout: float) -> None:
    """Answer calls until the main process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what Ctrl-C does
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()  # a group, which is killed with the processes that functions start
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        return
    for inherited in _sockets:  # a worker reads the end of its socket when only the main process has the other one
        inherited.close()
    gc.freeze()  # objects of the main process, whose finalizers belong there
    torch.set_num_threads(1)  # threads of the main process do not exist here
    os.environ["OMP_NUM_THREADS"] = "1"
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    pid = os.getpid()
    result: Any = None  # the first message says that it has started
    with contextlib.suppress(EOFError, OSError):
        while True:
            try:
                message = pickle.dumps(result)
            except Exception as error:
                message = pickle.dumps(
                    Failed(f"returned {type(result).__name__}, which cannot be sent ({_describe(error)})")
                )
            _send(connection, message)
            number, argument = pickle.loads(_receive(connection))
            result = _limited(rewards[number], argument, timeout)
            if os.getpid() != pid:  # a fork of the function, whose result is not that of the call
                return
            for stream in (sys.stdout, sys.stderr):
                stream.flush()


def _limited(reward: Reward, argument: Any, timeout: float) -> Any:
    def stop(number, frame):
        raise _TimeIsUp

    limit = _limit(reward, len(argument), timeout) if reward.judges_together else timeout
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        try:
            return _call_together(reward, argument, timeout) if reward.judges_together else _call(reward, argument)
        finally:  # in which the time can be up, too
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
    except _TimeIsUp:
        return _took_more_than(limit)


def _limit(reward: Reward, n_answers: int, timeout: float) -> float:
    """Return the time of a call for all answers, in seconds: async calls are made `N_CONCURRENT` at a time."""
    return timeout if reward.function.whole_round else timeout * math.ceil(n_answers / N_CONCURRENT) + GRACE


def _took_more_than(timeout: float) -> Failed:
    return Failed(f"took more than {timeout:g} seconds")


def _call(reward: Reward, answer: Answer) -> Any:
    return _guarded(lambda: _plain(reward.function.function(answer, reward.options), answer))


def _call_together(reward: Reward, answers: Sequence[Answer], timeout: float | None) -> list[Any]:
    def call() -> Any:
        if reward.is_async:
            loop = asyncio.new_event_loop()  # asyncio.run would wait for threads that hang
            results = loop.run_until_complete(_await_all(reward, answers, timeout))
            loop.close()
        else:
            results = reward.function.function(list(answers), reward.options)
        if not isinstance(results, (list, tuple)) or len(results) != len(answers):
            n = len(results) if isinstance(results, (list, tuple)) else type(results).__name__
            return Failed(f"returned {n} results for {len(answers)} answers")
        return [_plain(result, answer) for result, answer in zip(results, answers, strict=True)]

    results = _guarded(call)
    return [results] * len(answers) if isinstance(results, Failed) else results


async def _await_all(reward: Reward, answers: Sequence[Answer], timeout: float | None) -> Any:
    """Return the results of an async function, each within the time limit."""
    function, gate = reward.function.function, asyncio.Semaphore(N_CONCURRENT)
    if reward.function.whole_round:
        return await function(list(answers), reward.options)

    async def judge(answer: Answer) -> Any:
        async with gate:
            call = asyncio.ensure_future(function(answer, reward.options))
            done, _ = await asyncio.wait([call], timeout=timeout)
            if not done:
                call.cancel()
                return _took_more_than(timeout)
            return _guarded(call.result)

    return await asyncio.gather(*map(judge, answers))


def _guarded(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or `Failed` if it raises."""
    try:
        return call()
    except (_TimeIsUp, KeyboardInterrupt):
        raise
    except BaseException as error:
        return Failed(_describe(error))


def _plain(result: Any, answer: Answer) -> Any:
    """Return a result that another process can read; one that is invalid as its description."""
    read = read_result(result, len(answer.ids))
    return Failed(read.problem) if read.problem else {**read.extra, "reward": list(read.tokens) or read.number}


def _describe(error: BaseException) -> str:
    try:
        text = str(error).strip().splitlines()
    except Exception:  # of the error's own method
        text = []
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
