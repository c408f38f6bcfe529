"""Compare greedy responses of a model with those of another program, and name the likely cause of a difference."""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minitrain.data.template import Template
from minitrain.model.dtypes import DtypePlan
from minitrain.model.load import DTYPES
from minitrain.training.step import inference

from .choice import Chooser, Request
from .generate import Generator
from .prompts import Prompt
from .served import Answer

TOLERANCE = 1e-3  # of log-probabilities in float32
LOST_SUM = 2.0**-24  # of each token's probability, where a server adds them up one by one in float32, as llama.cpp does
ROUNDING = 3.0  # times the change of minitrain's own log-probabilities in a dtype, which programs round differently
N_CANDIDATES = 200  # likely tokens that are looked up in the text of a server without token ids

BOS_ADDED = (
    "BOS: the prompt begins with one BOS more than in training. The tokenizer and the chat template may both write it"
)
BOS_MISSING = "BOS: the prompt lacks the BOS of training. The chat template must write it, or the server add it"
BOS_NUMBER = (
    "BOS: the number of tokens differs by one. A BOS may be missing, or the chat template may write a second one"
)
TEMPLATE = (
    "chat template: the prompt is not that of training. Serve with the chat_template.jinja of this folder, unless the "
    "server has another model"
)
TOKENIZER = (
    "tokenizer: the text of the prompt is that of training, but not its tokens. The tokenizer may have been converted "
    "inexactly, or the server has another model"
)
END = (
    "end token: the response goes on where that of minitrain ends. Serve with the eos_token_id of "
    "generation_config.json, unless the server has another model"
)
EARLY = "end token: the response ends earlier. Look for stop strings or other end tokens in the server's options"
LENGTH = "context length: the response is cut off. Serve with a longer context"
SAMPLING = (
    "sampling: the log-probabilities are equal, but another token is chosen. Look for a repetition penalty or other "
    "defaults in generation_config.json and in the server's options"
)
WEIGHTS = (
    "weights: the log-probabilities differ by more than rounding to float16 or bfloat16 explains. The server may have "
    "another model or quantized weights"
)
UNKNOWN = "unknown, since no log-probabilities are reported: another model, dtype, quantization or sampling options"


class Report(NamedTuple):
    """What a comparison found.

    Attributes:
        lines: Findings by topic.
        difference: The first difference; None if everything is equal.
        cause: Its likely cause.
    """

    lines: dict[str, str]
    difference: str | None = None
    cause: str | None = None


def own_answers(model: nn.Module, template: Template, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
    """Return minitrain's greedy responses."""
    generator = Generator(model.eval(), template)
    ids = [generator.encode(prompt.messages, prompt.variables) for prompt in prompts]
    requests = [Request(one, [(0,)], max(1, min(max_new_tokens, generator.n_positions - len(one)))) for one in ids]
    with inference(generator.policy):
        samples = [sample for (sample,) in generator.sampler.sample(requests, Chooser())]
    decode = template.tokenizer.decode
    return [
        Answer(decode(sample.ids, skip_special_tokens=True), sample.ended, one, len(one), sample.ids, sample.logps)
        for one, sample in zip(ids, samples, strict=True)
    ]


@torch.no_grad()
def transformers_answers(
    model: nn.Module,
    tokenizer: Any,
    template: Template,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    end_ids: list[int] | None,
) -> list[Answer]:
    """Return the greedy responses of `generate` in transformers, to prompts of its chat template.

    Args:
        model: The model.
        tokenizer: Its tokenizer, as transformers loads it.
        template: minitrain's chat template.
        prompts: The prompts.
        max_new_tokens: Maximum number of tokens of a response.
        end_ids: Tokens that end a response (default: those of generation_config.json).
    """
    answers, end_ids = [], end_ids or end_ids_of(model)
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            template.renderer.adapt(prompt.messages),
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            **prompt.variables,
        )
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end_ids,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        ids = inputs["input_ids"][0].tolist()
        response = output.sequences[0, len(ids) :]  # [T]
        logps = torch.cat(output.logits).float().log_softmax(-1).gather(1, response[:, None])[:, 0]  # [T]
        text = tokenizer.decode(response, skip_special_tokens=True)
        ended = int(response[-1]) in end_ids
        answers.append(Answer(text, ended, ids, len(ids), response.tolist(), logps.tolist()))
    return answers


def end_ids_of(model: nn.Module) -> list[int]:
    """Return the tokens that end a response of `generate` in transformers."""
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


class Comparison:
    """Compares minitrain's responses with those of another program.

    Args:
        model: The model in float32, which judges how close two tokens are.
        template: Its chat template with the tokenizer.
        own: minitrain's responses.
        dtype: Name of the dtype that the other program is meant to compute in.
        tolerance: Largest difference of log-probabilities without rounding in this dtype.
    """

    def __init__(
        self, model: nn.Module, template: Template, own: Sequence[Answer], dtype: str, tolerance: float = TOLERANCE
    ):
        self.model, self.own, self.dtype, self.tolerance = model, own, dtype, tolerance
        self.tokenizer, self.end_ids = template.tokenizer, template.end_ids()
        self.rounding: dict[str, float] = {"float32": 0.0}

    def with_answers(self, answers: Sequence[Answer], where: str) -> Report:
        """Return the findings about the responses of a program, in the order in which one causes the next."""
        pairs = list(zip(self.own, answers, strict=True))
        prompts = [self._compare_prompts(*pair) for pair in pairs]
        lengths = [self._common_length(*pair) for pair in pairs]
        differences = [
            abs(a - b)
            for (own, other), n in zip(pairs, lengths, strict=True)
            for a, b in zip(own.logps[:n], (other.logps or [])[:n])
        ]
        self.largest = max(differences, default=None)
        self.tolerance = max(self.tolerance, ROUNDING * self._rounding_of(self.dtype))
        responses = [self._compare_response(*pair, n) for pair, n in zip(pairs, lengths, strict=True)]
        lines = {
            f"prompts {where}": _describe(prompts, all(answer.prompt for answer in answers)),
            f"responses {where}": _describe_responses(responses),
            f"log-probs {where}": self._describe_logps(differences, any(answer.logps for answer in answers)),
        }
        for topic, found in {"prompt": prompts, "response": responses}.items():
            for number, one in enumerate(found, 1):
                if isinstance(one, tuple):
                    return Report(lines, f"{topic} {number} {where}: {one[0]}", one[1])
        if differences and not self.largest <= self.tolerance:
            difference = f"a log-probability {where} differs by {self.largest:.2g}, more than {self.tolerance:.2g}"
            return Report(lines, difference, self._cause_in_numbers([self.largest]))
        return Report(lines)

    def _compare_prompts(self, own: Answer, other: Answer) -> tuple[str, str] | None:
        """Return (difference, cause) of a prompt; None if it is equal, as far as the program reports it."""
        ours, theirs, bos = own.prompt, other.prompt, self.tokenizer.bos_token_id
        if theirs is None:
            if other.n_prompt in (None, len(ours)):
                return None
            cause = BOS_NUMBER if abs(other.n_prompt - len(ours)) == 1 else TEMPLATE
            return f"it has {other.n_prompt} tokens instead of {len(ours)}", cause
        if ours == theirs:
            return None
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        got, expected = (self.tokenizer.decode(ids[first : first + 8]) for ids in (theirs, ours))
        if self.tokenizer.decode(theirs) == self.tokenizer.decode(ours):
            got, expected = (self.tokenizer.convert_ids_to_tokens(ids[first : first + 3]) for ids in (theirs, ours))
            return f"from token {first + 1}, its tokens are {got} instead of {expected}", TOKENIZER
        cause = BOS_ADDED if theirs == [bos, *ours] else BOS_MISSING if ours == [bos, *theirs] else TEMPLATE
        return f"from token {first + 1}, it is {got!r} instead of {expected!r}", cause

    def _common_length(self, own: Answer, other: Answer) -> int:
        """Return the number of tokens at the beginning of two responses that are equal."""
        if other.ids is not None:
            return next(
                (i for i, (a, b) in enumerate(zip(own.ids, other.ids)) if a != b), min(map(len, (own.ids, other.ids)))
            )
        if other.text is None:
            return 0
        theirs, n_own = other.text.strip(), len(self._body(own))
        return next((n for n in range(n_own, 0, -1) if theirs.startswith(self._text(own.ids[:n]))), 0)

    def _body(self, answer: Answer) -> list[int]:
        """Return the ids of a response without its end token."""
        has_end = answer.ended and answer.ids[-1:] and answer.ids[-1] in self.end_ids
        return answer.ids[:-1] if has_end else answer.ids

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip().rstrip("\ufffd")

    def _compare_response(self, own: Answer, other: Answer, n: int) -> tuple[str, str] | str | None:
        """Return (difference, cause) of a response whose first n tokens are equal, "tie", "unknown", or None."""
        if other.ids is None and other.text is None:
            return "unknown"
        ours = self._body(own)
        if other.ids is not None:
            theirs = self._body(other)
            n, is_at_end, rest = min(n, len(ours), len(theirs)), n >= len(theirs), theirs[n:]
            shown = self.tokenizer.decode(rest[:8])
        else:
            common = self._text(own.ids[:n])
            shown = other.text.strip()[len(common) :][:40]
            is_at_end = not shown.strip().rstrip("\ufffd")
        if n == len(ours) and (not own.ended or (is_at_end and other.ended)):
            return None
        expected = self.tokenizer.decode(own.ids[n : n + 8])
        if is_at_end:
            return f"after {n} tokens, it ends instead of {expected!r}", EARLY if other.ended else LENGTH
        if n == len(ours):
            return f"after {n} tokens, it goes on with {shown!r} instead of {expected!r}", END
        gap, logp = self._judge_token(own, n, other, shown)
        if gap <= 2 * self.tolerance:
            return "tie"
        known = [self.largest] if self.largest is not None else []
        known += [abs(other.logps[n] - logp)] if other.logps and logp is not None else []
        cause = SAMPLING if known and max(known) <= self.tolerance else self._cause_in_numbers(known)
        return f"after {n} tokens, it is {shown!r} instead of {expected!r}", cause

    @torch.no_grad()
    def _judge_token(self, own: Answer, n: int, other: Answer, shown: str) -> tuple[float, float | None]:
        """Return by how much another program's next token is less likely than minitrain's, and its log-probability."""
        ids = torch.tensor([own.prompt + own.ids[:n]], device=self.model.device)
        logps = self.model(input_ids=ids).logits[0, -1].float().log_softmax(-1)  # [V]
        if other.ids is not None and other.ids[n] >= len(logps):
            return torch.inf, None  # the program has another vocabulary
        if other.ids is not None:
            return float(logps.max() - logps[other.ids[n]]), float(logps[other.ids[n]])
        whole = self._text(own.ids[:n]) + shown
        for token in logps.topk(min(N_CANDIDATES, len(logps))).indices.tolist():
            text = self._text([*own.ids[:n], token])
            if token != own.ids[n] and text and whole.startswith(text):
                return float(logps.max() - logps[token]), float(logps[token])
        return torch.inf, None

    def _cause_in_numbers(self, differences: Sequence[float]) -> str:
        if not differences:
            return UNKNOWN
        largest = max(differences)
        rounding = {name: self._rounding_of(name) for name in ("float16", "bfloat16")}
        fitting = [name for name, change in rounding.items() if largest <= ROUNDING * change]
        if not fitting:
            return WEIGHTS
        name = min(fitting, key=lambda name: abs(math.log(largest / rounding[name])))
        return (
            f"dtype: the log-probabilities differ as in {name}, in which minitrain's own change by "
            f"{rounding[name]:.2g}. Serve in {self.dtype}, or compare with --dtype {name}"
        )

    def _rounding_of(self, name: str) -> float:
        """Return the largest change of minitrain's log-probabilities when the model computes in a dtype."""
        if name not in self.rounding:
            rounded, plan = copy.deepcopy(self.model), DtypePlan(self.model, DTYPES[name])
            for path, parameter in rounded.named_parameters():
                parameter.data = parameter.data.to(plan(path, parameter))
            changes = [(_logps(rounded, own) - torch.tensor(own.logps)).abs().max().item() for own in self.own]
            self.rounding[name] = max(changes)
        return self.rounding[name]

    def _describe_logps(self, differences: Sequence[float], are_reported: bool) -> str:
        if not differences:
            return "not compared, since no token is equal" if are_reported else "not reported"
        mean = sum(differences) / len(differences)
        verdict = "equal" if self.largest <= self.tolerance else "different"
        limit = f"limit {self.tolerance:.2g} in {self.dtype}"
        return (
            f"{verdict}, largest difference {self.largest:.2g}, mean {mean:.2g} of {len(differences)} tokens ({limit})"
        )


@torch.no_grad()
def _logps(model: nn.Module, answer: Answer) -> Tensor:
    """Return the log-probabilities of a response in float32, shape [T]."""
    ids = torch.tensor([answer.prompt + answer.ids], device=model.device)
    logits = model(input_ids=ids).logits[0, len(answer.prompt) - 1 : -1].float()  # [T, V]
    return logits.log_softmax(-1).gather(1, ids[0, len(answer.prompt) :, None])[:, 0].cpu()


def _describe(found: Sequence[tuple | None], are_known: bool) -> str:
    n_equal = sum(one is None for one in found)
    return f"{n_equal} of {len(found)} have {'equal ids' if are_known else 'as many tokens'}"


def _describe_responses(found: Sequence[tuple | str | None]) -> str:
    parts = [f"{sum(one is None for one in found)} of {len(found)} equal"]
    ties, unknown = found.count("tie"), found.count("unknown")
    parts += [f"{ties} up to a choice between two tokens that are equally likely"] if ties else []
    parts += [f"{unknown} not compared, since the server reports no token ids"] if unknown else []
    return ", ".join(parts)
