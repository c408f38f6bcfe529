"""How many held-out prompts the model answers as the reference does."""

from collections.abc import Callable

from .data.loader import Examples
from .generate import Generator, Sampling
from .schema import EvalGenerateConfig


def exact_match(
    generator: Generator, examples: Examples, settings: EvalGenerateConfig, batch_size: int, say: Callable[[str], None]
) -> float:
    """Share of the first `n_examples` whose greedy answer is the reference, white space around it aside.

    `say` gets a line for each of the first `show` answers.
    """
    tokenizer = generator.tokenizer
    chosen = examples.first(settings.n_examples)
    prompts, references = [], []
    for document in (chosen[i][0] for i in range(len(chosen))):
        start = len(document.mask) - document.mask.flip(0).tolist().index(0)  # where the last answer begins
        prompts.append(document.ids[:start].tolist())
        references.append(tokenizer.decode(document.ids[start:], skip_special_tokens=True).strip())
    answers = generator.answer(prompts, Sampling(settings.max_new_tokens), batch_size, progress=True)
    matches = [answer.strip() == reference for answer, reference in zip(answers, references, strict=True)]
    for i in range(min(settings.show, len(answers))):
        prompt = tokenizer.decode(prompts[i], skip_special_tokens=True)
        verdict = "right" if matches[i] else f"wrong, expected {_short(references[i])}"
        say(f"  {_short(prompt.strip(), from_end=True)} -> {_short(answers[i].strip())} ({verdict})")
    return sum(matches) / len(matches)


def _short(text: str, width: int = 60, from_end: bool = False) -> str:
    if len(text) <= width:
        return repr(text)
    return repr("..." + text[3 - width :] if from_end else text[: width - 3] + "...")
