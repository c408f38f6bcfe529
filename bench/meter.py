"""Clock, peak memory and matrix-multiply rate of one process. Needs torch and nothing else: every peer uses it."""

import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Meter:
    """Seconds and CPU seconds of each step, and the peak of memory above what was held when `begin` was called."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.cpu_seconds = device, [], []

    def begin(self, model: torch.nn.Module | None = None) -> None:
        """Call it when the model is loaded and nothing is trained yet."""
        if model is not None:  # weights read from a mapped file count only once they are touched
            sum(float(p.detach().sum()) for p in model.parameters())
        gc.collect()
        wait(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self.before = _status("VmRSS")
        self.last, self.last_cpu = time.perf_counter(), time.process_time()

    def tick(self) -> None:
        """Call it after each step."""
        wait(self.device)
        now, cpu = time.perf_counter(), time.process_time()  # of all threads
        self.seconds.append(now - self.last)
        self.cpu_seconds.append(cpu - self.last_cpu)
        self.last, self.last_cpu = now, cpu

    def peak_mib(self) -> float:
        high = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else _status("VmHWM")
        return (high - self.before) / 2**20


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def matmul_rate(rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of [rows, inner] @ [inner, columns], the faster of `dtype` and (on a CPU) float32, best of several."""
    candidates = {dtype, torch.float32} if device.type == "cpu" else {dtype}
    return max(_matmul_rate(rows, inner, columns, candidate, device) for candidate in candidates)


def _matmul_rate(rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype).T
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    times = []
    for _ in range(7):
        wait(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / min(times)


def machine_rates(job: dict, device: torch.device) -> dict[str, float]:
    """FLOP/s of a product of the body and of the output layer, at this job's sizes."""
    dtype, width, rows = DTYPES[job["dtype"]], job["hidden"], 100 * job["batch"]
    return {
        "body": matmul_rate(rows, width, job["intermediate"], dtype, device),
        "head": matmul_rate(min(rows // 2, 512), width, job["vocab"], dtype, device),
    }


def read_job() -> dict:
    return json.loads(Path(sys.argv[1]).read_text())


def write_result(job: dict, meter: Meter, losses: list, supervised: list, places: list, **more) -> None:
    """What a peer has to tell, as JSON where the job wants it. Peak first: measuring the rate takes memory too."""
    result = {
        "peak_mib": meter.peak_mib(),
        "seconds": meter.seconds,
        "cpu_seconds": meter.cpu_seconds,
        "losses": [float(loss) for loss in losses],
        "supervised": [int(n) for n in supervised],
        "places": [int(n) for n in places],
        "torch": torch.__version__,
        **more,
    }
    result["rates"] = machine_rates(job, meter.device)
    Path(job["out"]).write_text(json.dumps(result))


def median(values) -> float:
    return statistics.median(values)
