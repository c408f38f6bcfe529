"""The Python API: a loss by name, callbacks, resuming an interrupted run, rows and a model in memory, generation.

    python example/library.py [STEPS]

It trains the embedded model for STEPS steps (default: 400), about a minute on two CPU cores.
"""

import signal
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitrain import Trainer, create_loss, load_config


def settings(steps: int):
    """A YAML file with overrides, as on the command line. A dict of the same keys does as well."""
    overrides = [f"n_steps={steps}", f"eval_every_steps={steps // 4}", "eval_generate.n_examples=50"]
    return load_config("example/quickstart-sft.yml", ["exp_name=library", "save_every_steps=0", *overrides])


class History:
    """A callback: an object with methods that are named like hooks. A function of the trainer will do, too."""

    def __init__(self):
        self.losses: dict[int, float] = {}

    def on_eval_end(self, trainer: Trainer) -> None:
        self.losses[trainer.step] = trainer.eval_metrics["loss"]
        print(f"  hook: eval loss {self.losses[trainer.step]:.3f} after {trainer.step} steps")


def stop_half_way(trainer: Trainer) -> None:
    if trainer.step == trainer.total_steps // 2:
        signal.raise_signal(signal.SIGINT)


def main(steps: int = 400) -> History:
    history = History()

    # Interrupted halfway, as by Ctrl-C: the run writes a checkpoint, although save_every_steps is 0. To end a run
    # regularly and save final/, a hook sets trainer.should_stop = True.
    Trainer(settings(steps), on_step_end=stop_half_way, callbacks=[history]).train()

    # The same run directory and options resume from there. The loss of the config can also be passed as
    # loss=create_loss(...).
    trainer = Trainer(settings(steps), loss=create_loss("sft", label_smoothing=0.0), callbacks=[history])
    metrics = trainer.train()
    print(f"the last evaluation: {metrics['exact_match']:.0%} of unseen questions right")

    print(trainer.predict(["12 + 30 =", "reverse lamp"]))
    conversation = [{"role": "user", "content": "40 - 12 ="}]
    conversation.append({"role": "assistant", "content": trainer.chat(conversation)})
    train_on_doubles(trainer.run.final)
    print(conversation)
    return history


def train_on_doubles(folder: Path) -> None:
    """Everything from Python: rows in memory, a loaded model, an optimizer of your own."""
    rows = [{"prompt": f"{number} + {number} =", "response": str(2 * number)} for number in range(10, 50)]
    doubles = Trainer(
        {"exp_name": "library-doubles", "total_batch_size": 8, "n_steps": 4},
        model=AutoModelForCausalLM.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        train_dataset=rows[8:],
        eval_dataset=rows[:8],
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    )
    print(f"doubles: loss {doubles.train()['loss']:.3f}")
    doubles.save_model("runs/library-doubles/model")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
