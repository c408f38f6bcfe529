"""A training under torchrun (or alone) that writes down what it did; started by the tests.

    driver.py JOBS.json   [{"config": {...}, "overrides": [...], "dropout": 0.2, "trace": file, "gradients": file,
                            "began": file, "ended": file, "stop": [rank, step], "in_python": true,
                            "answers": file, "collectives": file, "plugin": file, "float8": "rowwise",
                            "offload": true, "compiled": file}, ...]

Each step appends a JSON line to the trace: step, example indices, loss and hash of the weights. `began` and `ended`
get the whole weights, and the optimizer's moments as `moments/...`, before the first step and after the last one.
`answers` gets responses, and how often parameters were gathered for them; `collectives` those of each step, by kind.
At `stop` a hook of that rank wants training to end. With `in_python`, `Trainer` gets the model and the rows as objects.
`float8` emulates FP8, and `offload` is activation_offload, both of which a CPU refuses. `compiled` gets the numbers of
graphs and of their calls, which run without a compiler.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitrain import Config, MinitrainError, Sampling, Trainer, load_config
from minitrain.cli.config_commands import load_plugin
from minitrain.model.float8 import use_float8
from minitrain.model.weights import full_tensors
from minitrain.training import loading

torch.set_num_threads(1)


def whole(trainer: Trainer) -> dict[str, torch.Tensor]:
    tensors = full_tensors(trainer.generator.model, trainer.parallel.full_tensor)
    return {name: tensor.clone() for name, tensor in tensors}


def write_state(trainer: Trainer, file: str) -> None:
    names = {id(p): name for name, p in trainer.policy.named_parameters()}
    state = whole(trainer)
    for parameter, entries in trainer.optimizer.state.items():
        for key, value in entries.items():
            state[f"moments/{names[id(parameter)]}/{key}"] = trainer.parallel.full_tensor(value).clone()
    if trainer.parallel.rank == 0:
        save_file(state, file)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    parts = [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for _, t in sorted(tensors.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def write_gradients(trainer: Trainer, file: str) -> None:
    """Those of the first step, before they are clipped."""
    grad_norm = trainer.parallel.grad_norm

    def noted(parameters):
        names = {id(p): name for name, p in trainer.policy.named_parameters()}
        grads = {names[id(p)]: trainer.parallel.full_tensor(p.grad).clone() for p in parameters}
        if trainer.parallel.rank == 0 and trainer.step == 0:
            save_file(grads, file)
        return grad_norm(parameters)

    trainer.parallel.grad_norm = noted


def note_step(trainer: Trainer, job: dict) -> None:
    weights = digest(whole(trainer))
    if [trainer.parallel.rank, trainer.step] == job.get("stop"):
        trainer.should_stop = True
    if trainer.parallel.rank == 0:
        loss = trainer.train_metrics["loss"].hex()
        with open(job["trace"], "a") as opened:
            opened.write(json.dumps([trainer.step, trainer.indices, loss, weights]) + "\n")


class Collectives(TorchDispatchMode):
    """Counts collectives by kind. FSDP gathers parameters by `_allgather_base_`."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def write_collectives(trainer: Trainer, collectives: Collectives, file: str) -> None:
    """Those since the last step, one line a step."""
    if trainer.parallel.rank == 0:
        with open(file, "a") as opened:
            opened.write(json.dumps(collectives.counts) + "\n")
    collectives.counts.clear()


def write_answers(trainer: Trainer, file: str) -> None:
    prompts = ["a", "what is 1 + 1?", "b c", "a longer prompt than the others", "d"]
    answers = []
    for sampling in (Sampling(4), Sampling(24), Sampling(12, temperature=1.0, seed=5)):
        with Collectives() as collectives:
            texts = trainer.generate(prompts, sampling)
        answers.append({"texts": texts, "gathers": trainer.parallel.gather(collectives.counts["_allgather_base_"])})
    if trainer.parallel.rank == 0:
        Path(file).write_text(json.dumps(answers))


@contextlib.contextmanager
def counting_graphs(file: str) -> Iterator[None]:
    """Run what torch.compile traces, and write how many graphs and calls of them this took on rank 0."""
    compile, counts = torch.compile, Counter()

    def backend(module, inputs):
        counts["graphs"] += 1

        def run(*args):
            counts["calls"] += 1
            return module.forward(*args)

        return run

    torch._dynamo.reset()
    torch.compile = functools.partial(compile, backend=backend)
    try:
        yield
    finally:
        torch.compile = compile
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        Path(file).write_text(json.dumps(counts))


@contextlib.contextmanager
def offloading_activations() -> Iterator[None]:
    prepare = loading.prepare_policy

    def prepare_policy(policy, weights, config, *rest, **more):
        return prepare(policy, weights, dataclasses.replace(config, activation_offload=True), *rest, **more)

    loading.prepare_policy = prepare_policy
    try:
        yield
    finally:
        loading.prepare_policy = prepare


def main() -> int:
    codes = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        with contextlib.ExitStack() as stack:
            if "compiled" in job:
                stack.enter_context(counting_graphs(job["compiled"]))
            if "offload" in job:
                stack.enter_context(offloading_activations())
            codes.append(run(job))
    if len(codes) > 1:
        print(f"exit codes: {codes}\n", end="", flush=True)  # in one piece, since ranks share the output
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the launcher ends all when one leaves with a code, and rank 0 may still write
        torch.distributed.destroy_process_group()
    return codes[-1]


def given_in_python(config: Config) -> dict:
    """Rows, model and tokenizer that a config names, as arguments of `Trainer`."""
    rows = [json.loads(line) for line in Path(config.datasets[0].path).read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name_or_path)
    return {"train_dataset": rows, "model": model, "tokenizer": tokenizer}


def run(job: dict) -> int:
    if "plugin" in job:
        load_plugin(job["plugin"])
    config = load_config(job["config"], job.get("overrides", []))
    if config.trainer == "FSDPTrainer":  # a hang tells its place before a test gives up
        config.fsdp.timeout_seconds = min(120, config.fsdp.timeout_seconds)
    hooks = {}
    if "trace" in job:
        hooks["on_step_end"] = lambda t: note_step(t, job)
    if "began" in job:
        hooks["on_train_begin"] = lambda t: write_state(t, job["began"])
    if job.get("in_python"):
        config, hooks = dataclasses.replace(config, datasets=[]), hooks | given_in_python(config)
    trainer = Trainer(config, **hooks)
    if "float8" in job:
        use_float8(trainer.policy.model, job["float8"], emulate=True)
    for module in trainer.policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = job.get("dropout", 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = job.get("dropout", 0.0)
    if "gradients" in job:
        write_gradients(trainer, job["gradients"])
    with Collectives() if "collectives" in job else contextlib.nullcontext() as collectives:
        if collectives:
            trainer.hooks["on_step_end"].append(lambda t: write_collectives(t, collectives, job["collectives"]))
        trainer.train()
    if "answers" in job:
        write_answers(trainer, job["answers"])
    if "ended" in job:
        write_state(trainer, job["ended"])
    trainer.parallel.store = trainer.parallel.watchdog = None  # as `close` does, but for the group, which is kept
    return 0 if trainer.signal is None else 128 + trainer.signal


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MinitrainError as error:
        print(f"minitrain: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
