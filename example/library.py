"""The Python API: a loss by name, hooks, resuming an interrupted run, generation, chat.

    python example/library.py [STEPS]

It trains the embedded model for STEPS steps (default: 400), about a minute on two CPU cores.
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

    # Interrupted halfway, as by Ctrl-C: the run writes a checkpoint, although save_every_steps is 0. To end a run
    # regularly and save final/, a hook sets trainer.should_stop = True.
    Trainer(settings(steps), on_step_end=stop_half_way, on_eval_end=history).train()

    # The same run directory and options resume from there. The loss of the config can also be passed as
    # loss=create_loss(...).
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
