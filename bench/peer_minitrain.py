"""minitrain through its public Trainer; on request also where the time of a step goes."""

import itertools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import transformers
from meter import Meter, read_job, wait, write_result

from minitrain import Trainer, load_config
from minitrain.model import policy as policy_module


class Spans:
    """Seconds spent in chosen functions of a trainer, the device waited for at their ends."""

    def __init__(self, trainer: Trainer):
        self.seconds, self.device = Counter(), trainer.device
        self.wrap("data", trainer.train_loader, "micro_batches")
        self.wrap("body, forward", trainer.policy, "hidden_states")
        self.wrap("head with its gradient", policy_module, "chunked_logprobs")
        self.wrap("body, backward", trainer.precision, "backward")
        self.wrap("gradient norm", trainer.parallel, "grad_norm")
        self.wrap("optimizer", trainer.optimizer, "step")

    def wrap(self, name: str, owner, attribute: str) -> None:
        function = getattr(owner, attribute)

        def timed(*args, **kwargs):
            wait(self.device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait(self.device)
            self.seconds[name] += time.perf_counter() - start
            return result

        object.__setattr__(owner, attribute, timed)


class Watch:
    """Hooks that note loss sums and sizes after each step, to be looked at when the training is over."""

    def __init__(self, job: dict):
        self.job, self.sums, self.tokens, self.places, self.spans = job, [], [], [], None

    def begin(self, trainer: Trainer) -> None:
        self.meter = Meter(trainer.device)
        if self.job.get("breakdown"):
            self.spans = Spans(trainer)
        self.meter.begin(trainer.policy)

    def step(self, trainer: Trainer) -> None:
        self.meter.tick()
        self.sums.append(trainer.totals.sums.get("loss"))
        self.places.append(trainer.window.positions)
        if self.spans and trainer.step == self.job["warmup"]:
            self.spans.seconds.clear()

    def end(self, trainer: Trainer) -> None:
        pairs = [(0.0, 0.0)] + [tuple(pair.tolist()) for pair in self.sums]  # running (sum, weight)
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(pairs)]
        places = [b - a for a, b in itertools.pairwise([0, *self.places])]
        more = {"transformers": transformers.__version__}
        if self.spans:
            total = sum(self.meter.seconds[self.job["warmup"] :])
            rest = total - sum(self.spans.seconds.values())
            more["breakdown"] = {k: v / total for k, v in [*self.spans.seconds.items(), ("the rest", rest)]}
        write_result(self.job, self.meter, [s / w for s, w in steps], [w for _, w in steps], places, **more)


def main() -> None:
    job = read_job()
    adapter = [f"model.adapter={job['folder']}/adapter"] if job["lora"] else []
    packing = f"packing={job['kind'] == 'minitrain packed'}"
    train(job, "data.jsonl", packing, f"max_length={job['max_length']}", *adapter)


def train(job: dict, data: str, *overrides: str, prepare: Callable[[Trainer], None] = lambda trainer: None) -> None:
    """Trains on a file of the job's folder, and writes down what was seen."""
    folder = Path(job["folder"])
    settings = {
        "exp_name": "bench",
        "output_dir": job["scratch"],
        "cache_dir": str(folder / "cache"),
        "datasets": [str(folder / data)],
        "chat_template": "none",
        "model": {"name_or_path": str(folder / "model"), "policy_dtype": job["dtype"]},
        "total_batch_size": job["batch"],
        "n_steps": job["n_steps"] + 1,  # the last step logs itself and starts a new window of sums
        "lr": job["lr"],
        "lr_scheduler": "constant",
        "log_every_steps": job["n_steps"] + 1,
        "num_proc": 1,
    }
    watch = Watch(job)
    config = load_config(settings, list(overrides))
    trainer = Trainer(config, on_train_begin=watch.begin, on_step_end=lambda t: measured(t, watch))
    prepare(trainer)
    trainer.train()


def measured(trainer: Trainer, watch: Watch) -> None:
    """Notes the step; after the last measured one, tells what was seen and stops."""
    if trainer.step <= watch.job["n_steps"]:
        watch.step(trainer)
    if trainer.step == watch.job["n_steps"]:
        watch.end(trainer)
        trainer.should_stop = True


if __name__ == "__main__":
    main()
