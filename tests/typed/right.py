"""Uses of the public API that a type checker accepts. `tests/test_types.py` checks this file; nothing runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minitrain import (
    Batch,
    Config,
    Generator,
    Loss,
    LossOutput,
    MinitrainError,
    Models,
    PolicyOutput,
    SampledResponse,
    Sampling,
    Session,
    StepOutput,
    Trainer,
    create_loss,
    load_config,
    load_generator,
    merge_adapters,
    register_loss,
)


@dataclass
class ScaledOptions:
    scale: float = 1.0


@register_loss("scaled", ScaledOptions)
class Scaled(Loss):
    options: ScaledOptions

    def num_items(self, batch: Batch) -> Tensor:
        return torch.tensor(float(batch.n_targets))

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        output: PolicyOutput = models.policy(batch)
        assert output.logps is not None
        nll = -output.logps.sum() * self.options.scale
        return LossOutput(nll, self.num_items(batch), {"loss": (nll, self.num_items(batch))})


class StopWhenGood:
    def on_eval_end(self, trainer: Trainer) -> None:
        trainer.should_stop = trainer.eval_metrics["loss"] < 0.1


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def report(trainer: Trainer) -> None:
    print(trainer.step, trainer.lr)


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    rows = [{"prompt": "a", "response": "b"}]
    config: Config = load_config(Path("config.yml"), ["lr=1e-4"], lr=1e-4, lora={"rank": 8})
    trainer = Trainer(
        config,
        model=model,
        tokenizer=tokenizer,
        train_dataset=rows,
        eval_dataset=tuple(rows),
        loss=create_loss("dpo", beta=0.2),
        optimizer=sgd,
        callbacks=[StopWhenGood()],
        on_train_begin=report,
        on_step_end=[report, lambda trainer: print(trainer.step + 1)],
        on_eval_end=report,
        on_save=report,
        on_train_end=lambda trainer: trainer.eval_metrics,
    )
    metrics: dict[str, float] = trainer.train() | trainer.evaluate(rows)
    trainer.save_model("model")
    print(trainer.lr + 1, config.lr is None, trainer.config.model.name_or_path.upper())
    print(trainer.total_steps + trainer.updates)
    return metrics


def own_loop(trainer: Trainer, stop: Callable[[float], bool]) -> int:
    for indices, batches in trainer.train_loader.steps():
        output: StepOutput = trainer.forward_backward(batches)
        norm: float = trainer.optim_step()
        if stop(norm) or sum(indices) < 0:
            print(output.loss, output.metrics()["loss"] + 1, trainer.optimizer, trainer.policy, trainer.tokenizer)
            break
    return trainer.step


def answer(trainer: Trainer) -> list[str]:
    conversation = [{"role": "user", "content": "a"}]
    generator: Generator = load_generator("runs/a")
    answers = generator.generate(["a", conversation], Sampling(max_new_tokens=4, temperature=0.5))
    tools = [{"name": "f", "parameters": {"type": "object"}}]
    kwargs = {"enable_thinking": False}
    conversation += generator.generate_messages([conversation], tools=tools, chat_template_kwargs=kwargs)
    answers += trainer.generate(["a"], tools=tools, chat_template_kwargs=kwargs)
    return [*answers, *trainer.generate(["a"]), *trainer.predict(["a"], 4), trainer.chat(conversation).strip()]


def merge() -> str:
    try:
        return merge_adapters(["runs/a", Path("runs/b")], "merged", weights=[0.5, 0.5], dtype="bfloat16").upper()
    except MinitrainError as error:
        return error.code + error.message


Trainer({"model": {"name_or_path": "tiny"}}, loss="sft")
Trainer("config.yml", on_step_end=lambda trainer: print(trainer.step))


def loop_of_a_session(session: Session) -> float:
    output: StepOutput = session.forward_backward([{"prompt": "a", "response": "b"}], loss="dft")
    groups: list[list[SampledResponse]] = session.sample(["a"], num_samples=2, sampling=Sampling(temperature=1.0))
    session.forward_backward([groups[0][0].rollout(reward=1.0, group=0)])
    metrics: dict[str, float] = session.evaluate(({"prompt": "a", "response": "b"},), create_loss("sft"))
    session.save(Path("state"))
    session.load("state")
    session.save_model("model")
    return session.optim_step(lr=1e-4).grad_norm + output.metrics()["loss"] + metrics["loss"]
