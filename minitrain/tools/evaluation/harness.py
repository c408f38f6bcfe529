"""Evaluate a model on the tasks of lm-evaluation-harness, through its own API."""

import logging
from typing import Any

from minitrain.errors import ConfigError
from minitrain.inference.generate import Generator

from .evaluate import Result


def run_tasks(
    source: str,
    generator: Generator,
    tasks: list[str],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    batch_size: int = 16,
) -> list[Result]:
    """Return the metrics of each task. The options are those of lm_eval.

    Raises:
        ConfigError: A task does not exist.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that is already loaded
    manager = TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ConfigError(
            f"--tasks: unknown task {unknown[0]!r}. `lm-eval ls tasks` lists them; --include-path adds your own.",
            "not-a-choice",
        )
    model = HFLM(pretrained=generator.model, tokenizer=generator.tokenizer, batch_size=batch_size)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        log_samples=False,
    )
    counts = found["n-samples"]
    return [
        Result(source, task, counts[task]["effective"] if task in counts else 0, _metrics(results), [])
        for task, results in found["results"].items()
    ]


def _metrics(results: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a task, without the name of the filter `none`."""
    numbers = {name.removesuffix(",none"): value for name, value in results.items() if isinstance(value, (int, float))}
    return {name: float(value) for name, value in numbers.items() if name != "sample_len"}
