"""A thread that prepares the next batches: the same steps in the same order, errors where they belong, and no thread
that stays."""

import contextlib
import itertools
import json
import os
import signal
import threading

import pytest
import torch

from minitrain.batch import ON_CPU
from minitrain.data.prefetch import prefetch
from minitrain.errors import DataError
from tests.conftest import weights
from tests.messages import raises
from tests.rl.test_rounds import LOSSES, online  # noqa: F401 (a fixture)

OPTIONS = ("n_steps=9", "total_batch_size=6", "gradient_accumulation_steps=2", "save_every_steps=0")


@pytest.fixture(autouse=True)
def _no_thread_stays():
    yield
    assert not preparing()


def preparing() -> list[str]:
    """The living threads that prepare batches."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def prefetching(trainer):
    """Make a trainer prefetch, which it does by itself on CUDA devices only."""
    assert not trainer.train_loader.prefetch
    for loader in filter(None, (trainer.train_loader, trainer.eval_loader)):
        loader.prefetch = True
    return trainer


def lines(trainer) -> list:
    """The ledger: loss, norm and a hash of the tokens of each step."""
    return [json.loads(line) for line in (trainer.run.path / "ledger.jsonl").read_text().splitlines()]


def test_a_thread_is_one_item_ahead():
    """The next item is computed while the caller has the last, and no item before that."""
    computed = [threading.Event() for _ in range(5)]

    def items():
        for number, event in enumerate(computed):
            assert threading.current_thread() is not threading.main_thread()
            event.set()
            yield number

    found = prefetch(items())
    for number in range(3):
        assert next(found) == number
        assert computed[number + 1].wait(60)
        assert not any(event.is_set() for event in computed[number + 2 :])
    found.close()
    assert list(prefetch(iter(range(5)))) == [0, 1, 2, 3, 4]


def test_an_error_is_raised_where_its_item_is_due():
    def items():
        yield from range(3)
        raise DataError("row 4 is missing", "invalid-row")

    found = prefetch(items())
    assert list(itertools.islice(found, 3)) == [0, 1, 2]
    with pytest.raises(DataError, match="row 4 is missing"):
        next(found)


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_that_prefetches_is_the_same(make_trainer, packing):
    """Ledger, evaluations, weights: over the border of an epoch, with micro-batches; also stopped by a signal and
    resumed, where the prepared step was not consumed."""
    options = (*OPTIONS, f"packing={packing}".lower(), "validation_split=4", "eval_every_steps=2", "eval_batch_size=2")
    plain = make_trainer("exp_name=plain", *options)
    plain.train()

    def stop(trainer):
        if trainer.step in (2, 6):
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(3):
        ahead = prefetching(make_trainer("exp_name=ahead", *options, on_step_end=stop))
        ahead.train()
        assert not preparing()
    assert ahead.step == 9 and ahead.consumed == plain.consumed and lines(ahead) == lines(plain)
    for name, tensor in weights(ahead).items():
        assert torch.equal(tensor, weights(plain)[name])
    assert dict(ahead.eval_metrics, seconds=0) == dict(plain.eval_metrics, seconds=0)


@pytest.mark.parametrize("where", ["data", "hook", "evaluation"])
def test_a_run_that_fails_leaves_no_thread(make_trainer, monkeypatch, where):
    """An error of the third step's data is raised after two steps; one of the caller ends the thread, too."""
    steps = []

    def hook(trainer):
        steps.append(trainer.step)
        if where == "hook" and trainer.step == 2:
            raise DataError("broken", "invalid-row")

    options = ("validation_split=4", "eval_every_steps=2", "do_first_eval=false", "eval_batch_size=1")
    trainer = prefetching(make_trainer(*OPTIONS, *options, on_step_end=hook))
    loader = {"data": trainer.train_loader, "evaluation": trainer.eval_loader}.get(where)
    if loader is not None:
        calls, batch = itertools.count(1), loader.batch

        def broken(rows):
            if next(calls) == {"data": 5, "evaluation": 3}[where]:  # two micro-batches a step
                raise DataError("broken", "invalid-row")
            return batch(rows)

        monkeypatch.setattr(loader, "batch", broken)
    with raises(DataError, "invalid-row") as error:
        trainer.train()
    assert error is not None and not preparing()
    assert steps == [1, 2][: len(steps)] and trainer.step == 2


def test_prefetched_batches_are_pinned(make_trainer, monkeypatch):
    """All tensors but those that stay on the CPU, if there is a CUDA device."""
    trainer, pinned = prefetching(make_trainer(*OPTIONS)), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(id(tensor)) or tensor)
    with contextlib.closing(trainer.train_loader.steps()) as steps:
        batches = next(steps)[1]
    for batch in batches:
        tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        tensors |= batch.doc_features | batch.token_features
        assert {name for name, tensor in tensors.items() if id(tensor) not in pinned} <= set(ON_CPU)
        assert len(tensors) > 8


def test_rounds_that_prefetch_are_the_same(online):  # noqa: F811
    """The thread prepares only steps of the sampled round: the next one is sampled from the newest weights, in the
    main thread."""
    rollout = {"num_iterations": 2, "zero_variance_groups": "skip"}
    options = {"loss": LOSSES["grpo"], "rollout": rollout, "n_steps": 9, "total_batch_size": 2}
    runs = []
    for prefetches in (False, True):
        trainer = online(exp_name=f"prefetches-{prefetches}", **options)
        trainer.train_loader.prefetch = prefetches
        sampled, play = [], trainer.train_loader.play

        def noted(*args, play=play, sampled=sampled, trainer=trainer, **changes):
            sampled.append((trainer.step, threading.current_thread() is threading.main_thread()))
            return play(*args, **changes)

        trainer.train_loader.play = noted
        trainer.train()
        assert not preparing() and all(in_main for _, in_main in sampled) and len(sampled) > 2
        runs.append((sampled, lines(trainer), weights(trainer)))
    plain, ahead = runs
    assert ahead[:2] == plain[:2]
    assert all(torch.equal(tensor, plain[2][name]) for name, tensor in ahead[2].items())
