"""Run steps of the real loop on a fake card, one trainer for each case, and print what each step asks of the card.

    python -m tests.training.card_driver folder < cases.json > counts.json

A case is {"loss": {...}, "overrides": [...]}. `folder` keeps the library of tests/fake_card.py.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
from tests import fake_card

FOLDER = Path(sys.argv[1])
fake_card.load(FOLDER)

import torch  # noqa: E402

from minitrain import Trainer, load_config  # noqa: E402
from minitrain.losses import registered  # noqa: E402
from minitrain.training import aux_models  # noqa: E402
from minitrain.training.after_step import start_window  # noqa: E402
from minitrain.training.aux_models import FrozenModel, InitialPolicySnapshot  # noqa: E402
from minitrain.training.metric_logger import MetricLogger  # noqa: E402
from minitrain.training.optim import build_optimizer  # noqa: E402
from tests.card_mode import DEVICE, Card  # noqa: E402
from tests.rows import ROWS  # noqa: E402

STEPS = 2  # the first one makes the optimizer's moments


def count(case: dict, number: int) -> dict:
    """Return the waits, the copies and the kernels of the last step of a case."""
    kind = registered()[case["loss"]["name"]].example_type
    file = FOLDER / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    base = {
        "datasets": [str(file)],
        "model": {"name_or_path": "tiny", "policy_dtype": "bfloat16"},
        "loss": case["loss"],
        "output_dir": str(FOLDER / "runs"),
        "cache_dir": str(FOLDER / "cache"),
        "exp_name": str(number),
        "seed": number,  # other batches than the case before, whose layout may be cached
        "total_batch_size": 8,
        "n_steps": 1000,
        "save_every_steps": 0,
        "log_every_steps": 1000,
        "quiet": True,
    }
    trainer, card, found = Trainer(load_config(base, case["overrides"])), Card(), {}
    move(trainer, card)

    def end(trainer: Trainer) -> None:
        found.update(waits=card.waits, copies=card.copies, kernels=sum(card.kernels.values()), of=dict(card.kernels))
        card.reset()
        trainer.should_stop = trainer.step == STEPS

    trainer.hooks["on_step_end"].append(end)
    trainer.logger = MetricLogger(trainer.config, FOLDER, {}, enabled=False)
    with card:
        start_window(trainer)
        trainer._loop()
    return found


def move(trainer: Trainer, card: Card) -> None:
    """Move what a trainer has on its device to the card."""
    trainer.device = trainer.parallel.device = trainer.precision.device = DEVICE
    card.move(trainer.policy)
    for model in trainer.models.frozen().values():
        if isinstance(model, FrozenModel):
            card.move(model.policy)
            model.precision.device = DEVICE
        elif isinstance(model, InitialPolicySnapshot):
            with card:
                model.__init__(trainer.policy, trainer.parallel)
    trainer.parameters = [p for p in trainer.policy.parameters() if p.requires_grad]
    trainer.optimizer = build_optimizer(trainer.policy, trainer.config)


if __name__ == "__main__":
    torch.set_num_threads(1)
    aux_models._tolerance = lambda *_: 10.0  # the tiny model in bfloat16
    print(json.dumps([count(case, number) for number, case in enumerate(json.load(sys.stdin))]))
