"""One measurement of `bench/gpu.py`: python bench/gpu_work.py JOB.json. It writes what it has after every step."""

import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import gpu_rows  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from meter import Meter, wait  # noqa: E402

EOS, SEED = 1, 0


class Job:
    """What to do, and what was found; `save` replaces the result file."""

    def __init__(self, file: str):
        self.__dict__.update(json.loads(Path(file).read_text()))
        self.torch_device = torch.device(self.device)
        self.found = {"torch": torch.__version__}
        self.n_steps = self.warmup + self.steps
        self.model = f"{self.folder}/{self.shape}/model"

    def save(self, **more) -> None:
        self.found |= more
        scratch = Path(f"{self.out}.new")
        scratch.write_text(json.dumps(self.found))
        scratch.replace(self.out)

    @property
    def data(self) -> Path:
        """The folder of the data of this amount, made when it is needed first."""
        kind = f"pairs-{self.pairs}" if self.pairs else f"tokens-{self.tokens}"
        folder = Path(self.folder) / self.shape / kind
        if not (folder / "ready").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_pairs(self, folder) if self.pairs else write_documents(self, folder)
            (folder / "ready").touch()
        return folder


class Recorder:
    """Seconds and loss of each step, and the peak of memory."""

    def __init__(self, job: Job):
        self.job, self.meter, self.losses = job, Meter(job.torch_device), []

    def begin(self, model=None) -> None:
        self.meter.begin(model)

    def step(self, loss: float) -> None:
        self.losses.append(float(loss))
        self.meter.tick()
        total = self.meter.peak_mib() + self.meter.before / 2**20
        self.job.save(seconds=self.meter.seconds, losses=self.losses, peak_mib=total)

    @property
    def is_full(self) -> bool:
        return len(self.losses) == self.job.n_steps


# ------------------------------------------------------------------------------------------------ models and data


def build(job: Job) -> None:
    """A random model of the shape, made on the device and saved in bfloat16, with a word-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from workload import Setting, build_tokenizer

    shape = gpu_rows.Shape(**job.sizes)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2 * gpu_rows.MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
        dtype="bfloat16",
    )
    began = time.perf_counter()
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(job.torch_device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    wait(job.torch_device)
    made = time.perf_counter()
    model.save_pretrained(job.model)
    build_tokenizer(Setting(shape.vocab, "bfloat16", steps=0, batch=0)).save_pretrained(job.model)
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    job.save(weights=n_weights, made_in=made - began, saved_in=time.perf_counter() - made)


def draw_lengths(generator: np.random.Generator, tokens: int, longest: int) -> np.ndarray:
    """Lengths of the documents of a step, lognormal, that add up to `tokens`."""
    n = max(2, tokens // gpu_rows.MEAN_LENGTH)
    lengths = generator.lognormal(np.log(400), 0.7, n).clip(16, longest)
    lengths = np.maximum(4, (lengths * tokens / lengths.sum()).astype(int).clip(max=longest))
    while (missing := tokens - lengths.sum()) != 0:  # what rounding and the longest length have left
        open_ones = np.flatnonzero(lengths < longest) if missing > 0 else np.flatnonzero(lengths > 4)
        lengths[open_ones[: abs(missing)]] += np.sign(missing)
    return lengths


def write_documents(job: Job, folder: Path) -> None:
    """data.jsonl for minitrain, and tokens.json with the same documents in the order in which it takes them.

    Every step has the same number of documents and of tokens. All tokens but the first are trained on.
    """
    from minitrain.data.sampler import epoch_order

    generator = np.random.Generator(np.random.PCG64(SEED))
    longest = min(gpu_rows.MAX_LENGTH, job.tokens // 2)
    steps = [draw_lengths(generator, job.tokens, longest) for _ in range(24)]
    documents = [
        [*generator.integers(3, job.sizes["vocab"], length - 1).tolist(), EOS] for step in steps for length in step
    ]
    rows = [None] * len(documents)
    for document, place in zip(documents, epoch_order([len(documents)], [1.0], SEED, 0)):
        rows[place] = {"prompt": words(document[:1]) + " ", "response": words(document[1:-1])}
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tokens.json").write_text(json.dumps({"documents": documents, "n_docs": len(steps[0])}))


def write_pairs(job: Job, folder: Path) -> None:
    """pairs.jsonl: prompts of some 400 tokens, answers of 200."""
    generator = np.random.Generator(np.random.PCG64(SEED))

    def draw(median: int) -> str:
        length = int(np.clip(generator.lognormal(np.log(median), 0.5), 8, job.tokens // 8))
        return words(generator.integers(3, job.sizes["vocab"], length).tolist())

    rows = [{"prompt": draw(400) + " ", "chosen": draw(200), "rejected": draw(200)} for _ in range(24 * job.pairs)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def read_steps(job: Job) -> list[list[list[int]]]:
    """The documents of each step."""
    found = json.loads((job.data / "tokens.json").read_text())
    n = found["n_docs"]
    documents = found["documents"][: n * job.n_steps]
    return [documents[i : i + n] for i in range(0, len(documents), n)]


def note_work(job: Job, documents: list[list[list[int]]]) -> None:
    """What a step has to process."""
    timed = documents[job.warmup :]
    squares = statistics.mean(sum(len(document) ** 2 for document in step) for step in timed)
    job.save(tokens=job.tokens, squares=squares)


# ------------------------------------------------------------------------------------------------------ minitrain


def settings_of(job: Job, file: Path, batch: int) -> dict:
    return {
        "exp_name": "bench",
        "output_dir": job.scratch,
        "cache_dir": str(file.parent / "cache"),
        "datasets": [str(file)],
        "chat_template": "none",
        "device": job.device,
        "model": {"name_or_path": job.model, "policy_dtype": "bfloat16"},
        "packing": True,
        "max_length": gpu_rows.MAX_LENGTH,
        "total_batch_size": batch,
        "n_steps": job.n_steps + 1,  # a last step would log and start a new window of sums
        "lr": 1e-5,
        "lr_scheduler": "constant",
        "log_every_steps": job.n_steps + 1,
        "save_every_steps": job.n_steps + 1,
        "num_proc": 1,
    }


def sft(job: Job) -> None:
    documents = read_steps(job)
    note_work(job, documents)
    train(job, settings_of(job, job.data / "data.jsonl", len(documents[0])))


def dpo(job: Job) -> None:
    job.save(pairs=job.pairs)
    train(job, settings_of(job, job.data / "pairs.jsonl", job.pairs))


def train(job: Job, settings: dict, on_step=lambda trainer: None) -> None:
    """Train for the steps of the job. The process ends there, since nothing is to be saved."""
    from minitrain import Trainer, load_config

    for part in job.without:
        module, _, name = part.partition(":")
        if importlib.util.find_spec(module) is None or not hasattr(importlib.import_module(module), name):
            return job.save(skipped=f"this version has no {part}")
        setattr(importlib.import_module(module), name, lambda *args, **kwargs: False)
    recorder = Recorder(job)
    before = [0.0, 0.0]

    def step(trainer) -> None:
        pair = trainer.totals.sums["loss"].tolist()  # running (sum, weight)
        recorder.step((pair[0] - before[0]) / (pair[1] - before[1]))
        before[:] = pair
        on_step(trainer)
        if recorder.is_full:
            job.save(done=True)
            sys.stdout.flush()
            os._exit(0)

    config = load_config(settings, list(job.overrides))
    hooks = {"on_train_begin": lambda trainer: recorder.begin(), "on_step_end": step}
    Trainer(config, **hooks).train()


def waits(job: Job) -> None:
    """How often a step waits for the device, and where, by torch's own count."""
    if job.device == "cpu":
        return job.save(skipped="a CPU is not waited for")
    found, show = Counter(), warnings.showwarning

    def count(message, category, filename, line, *rest) -> None:
        if "synchroniz" in str(message):
            frames = [f for f in traceback.extract_stack() if "minitrain" in f.filename and "bench" not in f.filename]
            found[f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else f"{filename}:{line}"] += 1

    def on_step(trainer) -> None:
        if trainer.step == 2:
            warnings.simplefilter("always")
            warnings.showwarning = count
            torch.cuda.set_sync_debug_mode("warn")
        elif trainer.step == 3:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = show
            # The loss that this script reads after the step is one of them.
            job.save(waits=sum(found.values()), waits_by_line=dict(found.most_common()))

    job.warmup, job.steps, job.n_steps = 2, 2, 4
    train(job, settings_of(job, job.data / "data.jsonl", len(read_steps(job)[0])), on_step)


def profile(job: Job) -> None:
    """One step: the share of time in which the device is busy, and the 20 kernels that take longest."""
    from torch.profiler import ProfilerActivity

    on_card = job.device != "cpu"
    activities = [ProfilerActivity.CUDA] if on_card else [ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities)
    began = 0.0

    def on_step(trainer) -> None:
        nonlocal began
        if trainer.step == job.warmup:
            profiler.start()
            wait(job.torch_device)
            began = time.perf_counter()
        elif trainer.step == job.warmup + 1:
            wait(job.torch_device)
            seconds = time.perf_counter() - began
            profiler.stop()
            job.save(**summary_of(profiler, seconds, on_card))

    job.warmup, job.steps, job.n_steps = 3, 2, 5
    train(job, settings_of(job, job.data / "data.jsonl", len(read_steps(job)[0])), on_step)


def summary_of(profiler, seconds: float, on_card: bool) -> dict:
    attribute = "self_device_time_total" if on_card else "self_cpu_time_total"
    kernels = [(getattr(event, attribute) / 1e3, event.count, event.key) for event in profiler.key_averages()]
    kernels = sorted((kernel for kernel in kernels if kernel[0] > 0), reverse=True)
    busy = sum(ms for ms, _, _ in kernels) / 1e3
    top = [{"ms": ms, "count": count, "name": name[:100]} for ms, count, name in kernels[:20]]
    return {"step_seconds": seconds, "busy": busy / seconds, "kernels": sum(k[1] for k in kernels), "longest": top}


# ---------------------------------------------------------------------------------------------------- does it work


def losses(job: Job) -> None:
    """Five steps of a tiny model with every loss, full and LoRA, packed and padded, on the card and on the CPU."""
    from minitrain.losses import create_loss, registered
    from tests.rows import REQUIRED, ROWS

    table, folder = [], Path(job.scratch)
    for kind, rows in ROWS.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = job.options.get("losses") or sorted(registered())
    for name, rank, packing in itertools.product(names, (0, 4), (True, False)):
        try:
            loss = {"name": name} | REQUIRED.get(name, {})
            kind = create_loss(**loss).example_type
            overrides = [f"lora.rank={rank}", f"packing={packing}"]
            on_card, on_cpu = (
                short_run(job, loss, folder / f"{kind}.jsonl", overrides, d) for d in (job.device, "cpu")
            )
            difference = max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(on_card, on_cpu, strict=True))
            table.append({"loss": name, "lora": rank > 0, "packing": packing, "difference": difference})
        except Exception as error:
            table.append({"loss": name, "lora": rank > 0, "packing": packing, "error": str(error)[:300]})
        job.save(losses_of=table)


def short_run(job: Job, loss: dict, file: Path, overrides: list[str], device: str) -> list[float]:
    """The losses of five steps in float32."""
    from minitrain import Trainer, load_config

    name = f"{loss['name']}-{'-'.join(overrides)}-{device}"
    settings = {
        "exp_name": name.replace("=", "-"),
        "output_dir": job.scratch,
        "cache_dir": f"{job.scratch}/cache",
        "datasets": [str(file)],
        "device": device,
        "model": {"name_or_path": "tiny", "policy_dtype": "float32"},
        "loss": loss,
        "max_length": 128,
        "total_batch_size": 8,
        "n_steps": 5,
        "lr": 1e-3,
        "log_every_steps": 1,
        "quiet": True,
        "num_proc": 1,
    }
    trainer = Trainer(load_config(settings, overrides))
    trainer.train()
    lines = (trainer.run.path / "metrics.jsonl").read_text().splitlines()
    return [float(row["loss"]) for row in map(json.loads, lines) if row["kind"] == "train"]


def resume(job: Job) -> None:
    """Six steps at once, and three that are resumed from the checkpoint of the others: the same weights to the bit."""
    from minitrain import ConfigError, Trainer, load_config
    from tests.rows import ROWS

    file = Path(job.scratch) / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS["conversation"]))
    settings = {
        "output_dir": job.scratch,
        "cache_dir": f"{job.scratch}/cache",
        "datasets": [str(file)],
        "device": job.device,
        "model": {"name_or_path": "tiny"},
        "packing": True,
        "total_batch_size": 8,
        "n_steps": 6,
        "lr": 1e-3,
        "save_every_steps": 3,
        "keep_checkpoints": 2,
        "quiet": True,
        "deterministic": True,
    }
    try:
        load_config(settings)
    except ConfigError:  # an older version
        settings.pop("deterministic")
    first = Trainer(load_config({**settings, "exp_name": "first"}))
    first.train()
    checkpoint = str(first.run.path / "checkpoints" / "step-3")
    second = Trainer(load_config({**settings, "exp_name": "second", "resume": checkpoint}))
    second.train()
    pairs = list(zip(first.policy.parameters(), second.policy.parameters(), strict=True))
    job.save(same=all(torch.equal(a, b) for a, b in pairs), deterministic="deterministic" in settings)


def rates(job: Job) -> None:
    """Products of square matrices and copies, the best of several."""
    device, size = job.torch_device, 8192 if job.device != "cpu" else 256
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = fastest(lambda a=a, b=b: a @ b, device)
        job.save(**{f"tflops_{name}": 2 * size**3 / seconds / 1e12})
    source = torch.empty(size * size * 16, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source), device)
    job.save(tb_per_second=2 * source.numel() * 2 / seconds / 1e12)


def fastest(call, device: torch.device) -> float:
    times = []
    for _ in range(20):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


# ------------------------------------------------------------------------------------------------- the plain loop


def plain(job: Job) -> None:
    """A loop by hand, one document at a time, with float32 weights and log-softmax: what the losses should be."""
    from transformers import AutoModelForCausalLM

    steps = read_steps(job)
    note_work(job, steps)
    only_forward = job.options.get("only_forward", False)
    dtype = torch.bfloat16 if only_forward else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).to(job.torch_device).train()
    optimizer = None if only_forward else torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    recorder = Recorder(job)
    recorder.begin()
    for documents in steps:
        n_targets, total = sum(len(document) - 1 for document in documents), 0.0
        for document in documents:
            ids = torch.tensor(document, device=job.torch_device)[None]
            with torch.autocast(job.torch_device.type, torch.bfloat16), torch.set_grad_enabled(not only_forward):
                logits = model(input_ids=ids, use_cache=False).logits
                loss = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum") / n_targets
            if optimizer is not None:
                loss.backward()
            total += loss.item()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recorder.step(total)


def main() -> None:
    job = Job(sys.argv[1])
    import gpu_peers
    import gpu_sampling

    work = globals().get(job.work) or getattr(gpu_sampling, job.work, None) or getattr(gpu_peers, job.work)
    work(job)
    job.save(done=True)


if __name__ == "__main__":
    main()
