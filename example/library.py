"""The library from Python: a loss made by name, hooks, a run that is stopped and goes on, answers, chat.

    python example/library.py [STEPS]

It trains the embedded model for STEPS steps, 400 when left out: about a minute on two CPU cores.
"""

import signal
import sys

from minitrain import Trainer, create_loss, load_config


def settings(steps: int):
    """A YAML file with overrides, as on the command line. A dict of the same keys does as well."""
    overrides = [f"n_steps={steps}", f"eval_every_steps={steps // 4}", "eval_generate.n_examples=50"]
    return load_config("example/quickstart-sft.yml", ["exp_name=library", "save_every_steps=0", *overrides])


class History:
    """A hook with a memory: any function of the trainer will do."""

    def __init__(self):
        self.losses: dict[int, float] = {}

    def __call__(self, trainer: Trainer) -> None:
        self.losses[trainer.step] = trainer.eval_metrics["loss"]
        print(f"  hook: eval loss {self.losses[trainer.step]:.3f} after {trainer.step} steps")


def stop_half_way(trainer: Trainer) -> None:
    if trainer.step == trainer.total_steps // 2:
        signal.raise_signal(signal.SIGINT)


def main(steps: int = 400) -> History:
    history = History()

    # Interrupted half-way, as by Ctrl-C: it writes a checkpoint, though save_every_steps is 0. A hook that wants a run
    # to be over, with final/ and all, sets trainer.should_stop = True.
    Trainer(settings(steps), on_step_end=stop_half_way, on_eval_end=history).train()

    # The same folder and the same options go on from there. A loss that stands in the config could be given by
    # loss=create_loss(...) too.
    trainer = Trainer(settings(steps), loss=create_loss("sft", label_smoothing=0.0), on_eval_end=history)
    metrics = trainer.train()
    print(f"the last evaluation: {metrics['exact_match']:.0%} of unseen questions right")

    print(trainer.predict(["12 + 30 =", "reverse lamp"]))
    conversation = [{"role": "user", "content": "40 - 12 ="}]
    conversation.append({"role": "assistant", "content": trainer.chat(conversation)})
    print(conversation)
    return history


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
