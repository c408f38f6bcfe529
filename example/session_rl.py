"""GRPO from a loop of your own, on the model of session_sft.py: a minute on one CPU core.

python example/session_sft.py 600
python example/session_rl.py [STEPS]
"""

import json
import random
import sys
from pathlib import Path

from minitrain import Sampling, Session


def main(steps: int = 100, model: str = "runs/session-sft/final") -> list[float]:
    rows = [json.loads(line) for line in Path("example/data/skills-train.jsonl").read_text().splitlines()]
    session = Session({"model": {"name_or_path": model}, "loss": {"name": "policy"}, "max_length": 64, "packing": True})
    sampling, rng, means = Sampling(max_new_tokens=8, temperature=1.0), random.Random(0), []
    for step in range(steps):
        chosen = rng.sample(rows, 32)
        groups = session.sample([row["prompt"] for row in chosen], num_samples=8, sampling=sampling)
        rollouts = [
            answer.rollout(reward=float(answer.text.strip() == row["response"]))  # advantages compare equal prompts
            for row, group in zip(chosen, groups, strict=True)
            for answer in group
        ]
        session.forward_backward(rollouts)
        session.optim_step(lr=5e-4)
        means.append(sum(row["reward"] for row in rollouts) / len(rollouts))
        if step % 10 == 0:
            print(f"step {step}  reward {means[-1]:.3f}")
    session.save("runs/session-rl/state")
    return means


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
