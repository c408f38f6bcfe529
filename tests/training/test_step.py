"""The two halves of an optimizer step, called as a loop of one's own calls them."""

import itertools

import pytest
import torch

from minitrain.errors import RunError
from tests.conftest import metrics, weights
from tests.messages import raises


def steps(trainer, n: int):
    """The micro-batches of the first n optimizer steps."""
    return [batches for _, batches in itertools.islice(trainer.train_loader.steps(), n)]


@pytest.mark.parametrize("options", [("gradient_accumulation_steps=4",), ("packing=true", "optimizer=SGD")], ids=str)
def test_the_two_halves_train_as_train_does(make_trainer, options):
    """The same weights and losses to the last bit, step by step."""
    options = ("total_batch_size=16", "n_steps=4", *options)
    whole = make_trainer(*options, "exp_name=whole")
    whole.train()
    trainer, found = make_trainer(*options, "exp_name=halves"), []
    for batches in steps(trainer, 4):
        output = trainer.forward_backward(batches)
        found.append({"loss": float(output.loss), "grad_norm": trainer.optim_step(), "step": trainer.step})
    logged = [{name: row[f"{name}"] for name in ("grad_norm", "step")} for row in metrics(whole)]
    assert [{name: row[name] for name in ("grad_norm", "step")} for row in found] == logged
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in metrics(whole)], rel=1e-6)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(trainer).items())


def test_gradients_are_those_of_the_mean_over_all_targets(make_trainer):
    """In one graph over all micro-batches; the loss and the metrics are the means of the whole step."""
    trainer = make_trainer("gradient_accumulation_steps=4")
    (batches,) = steps(trainer, 1)
    logps = [trainer.policy(batch).logps for batch in batches]
    loss = -torch.cat(logps).mean()
    expected = torch.autograd.grad(loss, trainer.parameters)
    output = trainer.forward_backward(batches)
    for parameter, gradient in zip(trainer.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert float(output.loss) == pytest.approx(loss.item(), rel=1e-5)
    assert output.metrics()["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert output.metrics()["avg_p_correct"] == pytest.approx(torch.cat(logps).exp().mean().item(), rel=1e-5)
    assert not any(output.loss.requires_grad or one.loss_sum.requires_grad for one in output.outputs)


def test_a_bad_step_outside_of_train_is_reported(make_trainer, capsys):
    """Its weights stay, its gradients are cleared, and the line goes to the console."""
    trainer = make_trainer("max_bad_steps=2")
    before = weights(trainer)
    for _ in range(2):
        output = trainer.forward_backward(*steps(trainer, 1))
        trainer.parameters[0].grad[0] = float("nan")
        if trainer.step == 1:
            with raises(RunError, "not-finite", "2 "):
                trainer.optim_step()
        else:
            assert trainer.optim_step() != trainer.updates == 0 and trainer.step == 1 and output.loss.isfinite()
    assert "step 1: " in capsys.readouterr().err
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert all(parameter.grad is None for parameter in trainer.parameters)


def test_an_update_needs_gradients(make_trainer):
    """Each update uses those of its own `forward_backward`."""
    trainer = make_trainer()
    with raises(RunError, "usage", "forward_backward"):
        trainer.optim_step()
    trainer.forward_backward(*steps(trainer, 1))
    trainer.optim_step()
    with raises(RunError, "usage", "forward_backward"):
        trainer.optim_step()
