"""Supervised training from a loop of your own, on the embedded model: a minute on one CPU core.

python example/session_sft.py [STEPS]
"""

import json
import random
import sys
from pathlib import Path

from minitrain import Sampling, Session


def main(steps: int = 400) -> Session:
    train, test = (
        [json.loads(line) for line in Path(f"example/data/skills-{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    )
    session = Session({"model": {"name_or_path": "tiny"}, "max_length": 64, "packing": True, "betas": [0.9, 0.98]})
    rng = random.Random(0)
    for step in range(steps):
        output = session.forward_backward(rng.sample(train, 64))
        update = session.optim_step(lr=5e-3 * min(1, (step + 1) / 40, (steps - step) / steps * 1.25))
        if step % 50 == 0:
            print(f"step {step}  loss {output.loss:.3f}  norm {update.grad_norm:.2f}")
    print(session.evaluate(test))
    for (answer,) in session.sample(["12 + 30 =", "reverse lamp"], sampling=Sampling(max_new_tokens=8)):
        print(repr(answer.text))
    session.save_model("runs/session-sft/final")
    return session


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
