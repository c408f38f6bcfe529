"""Compute the greedy exact match of an evaluation of sampled answers."""

from typing import TYPE_CHECKING

from minitrain.errors import DataError
from minitrain.inference.evaluation import final_answer, final_text, log_answer, warn_of_references

from .prompts import Prompts
from .rewards_builtin import REFERENCES, reference_of

if TYPE_CHECKING:
    from .rounds import Rounds


def exact_match(rounds: "Rounds", prompts: Prompts, key: tuple[int, ...]) -> float:
    """Return the fraction of prompts whose greedy answer, the last one of a conversation, is that of the row.

    All ranks must call it.

    Args:
        rounds: What samples the answers.
        prompts: The evaluation prompts, of which the first `eval_generate.n_examples` are used.
        key: Integers that determine the random numbers of environments.
    """
    settings, trainer = rounds.config.eval_generate, rounds.trainer
    expected = references(prompts, settings.n_examples)
    mine = [prompts.get(i, i) for i in range(rounds.rank, len(expected), rounds.world_size)]
    groups = rounds.play(mine, key, 1, is_updated=False, temperature=0.0, max_new_tokens=settings.max_new_tokens)
    texts = [[episode.prompt.number, episode.text] for (episode,) in groups]
    texts = sorted(pair for of_rank in trainer.parallel.gather(texts) for pair in of_rank)
    answers = [text for _, text in texts]
    expected = [final_answer(reference, settings.match) for reference in expected]
    pairs = zip(answers, expected, strict=True)
    matches = [final is not None and final_answer(answer, settings.match) == final for answer, final in pairs]
    for i in range(min(settings.show, len(answers))):
        question = prompts.get(i, i).messages[-1]["content"]
        log_answer(trainer, question, answers[i], final_text(expected[i]), matches[i])
    missing = [prompts.examples.where(i) for i, final in enumerate(expected) if final is None]
    warn_of_references(trainer, missing, len(expected))
    return sum(matches) / len(matches)


def references(prompts: Prompts, n: int) -> list[str]:
    """Return the reference answers of the first n prompts. Raise DataError for a row that has none."""
    found = []
    for i in range(min(n, len(prompts.examples))):
        prompt = prompts.get(i, i)
        reference = reference_of(prompt.row, None)
        if reference is None:
            keys = ", ".join(REFERENCES)
            message = f"eval_generate compares answers with that of the row, which has none of {keys}."
            raise DataError(f"{prompt.where}: {message} Add one, or remove eval_generate.", "invalid-row")
        found.append(reference)
    return found
