"""Jobs of 12 steps over the random Llama, and the traces of those that nothing disturbed."""

from pathlib import Path

from tests.distributed.launch import Ranks, launch, trace

N_STEPS = 12
OPTIONS = (
    f"n_steps={N_STEPS}",
    "total_batch_size=6",  # an epoch of 35 ends with a short step
    "save_every_steps=2",
    "validation_split=5",
    "eval_every_steps=5",
)


class Lab:
    """The oracle of a job is the trace of one like it that ran through: step, examples, bits of loss, weights' hash."""

    def __init__(self, folder: Path, model: Path, rows: Path):
        self.folder, self.model, self.rows, self.count, self.oracles = folder, model, rows, 0, {}

    def job(self, ranks: int, *overrides: str, dropout: float = 0.1) -> dict:
        """A job for `launch` with a run directory of its own; 0 ranks is BasicTrainer."""
        self.count += 1
        name = f"run-{self.count}"
        config = {
            "datasets": [str(self.rows)],
            "model": {"name_or_path": str(self.model)},
            "output_dir": str(self.folder / "runs"),
            "cache_dir": str(self.folder / "cache"),
            "exp_name": name,
            "trainer": "FSDPTrainer" if ranks else "BasicTrainer",
            "lr": 1e-2,
            "log_every_steps": 1,
            "num_proc": 1,
        }
        files = {key: str(self.folder / f"{name}.{key}") for key in ("trace", "began", "ended")}
        return {"config": config, "overrides": [*OPTIONS, *overrides], "dropout": dropout, **files}

    def start(self, ranks: int, job: dict, fault: str = "") -> Ranks:
        env = {"MINITRAIN_FAULT": fault} if fault else {}
        return Ranks(ranks, [job], self.folder / "launch" / job["config"]["exp_name"], env)

    def run(self, ranks: int, job: dict, fault: str = "") -> tuple[int, str]:
        return self.start(ranks, job, fault).finish()

    def oracle(self, ranks: int, *overrides: str) -> dict[int, list]:
        key = (ranks, *overrides)
        if key not in self.oracles:
            job = self.job(ranks, *overrides)
            launch(ranks, [job], self.folder / "oracle")
            self.oracles[key] = {line[0]: line for line in trace(Path(job["trace"]))}
            assert list(self.oracles[key]) == list(range(1, N_STEPS + 1))
        return self.oracles[key]

    def recover(self, ranks: int, job: dict, *overrides: str) -> str:
        """The same command again ends the run; all that was ever traced is as in the oracle, and nothing is missing."""
        code, output = self.run(ranks, job)
        assert code == 0, output[-3000:]
        self.compare(ranks, job, *overrides)
        return output

    def compare(self, ranks: int, job: dict, *overrides: str) -> None:
        oracle, found = self.oracle(ranks, *overrides), trace(Path(job["trace"]))
        for line in found:
            assert line == oracle[line[0]]
        assert {line[0] for line in found} == set(oracle) and found[-1][0] == N_STEPS
        assert not [*self.path(job).rglob(".tmp-*"), *self.path(job).rglob(".trash-*")]

    def path(self, job: dict) -> Path:
        return Path(job["config"]["output_dir"]) / job["config"]["exp_name"]

    def checkpoints(self, job: dict) -> list[str]:
        return sorted(path.name for path in (self.path(job) / "checkpoints").iterdir())
