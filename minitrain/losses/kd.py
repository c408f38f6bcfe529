"""Knowledge distillation: towards a teacher's distribution at each supervised token."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minitrain.batch import Batch, Distillation, TopKLogprobs
from minitrain.config.schema import option
from minitrain.errors import ConfigError
from minitrain.io.checksum import is_intact, is_sealed
from minitrain.io.redact import is_stored_name

from .base import AddedFeatures, DataFile, LossOutput, Models, register_loss
from .sft import TokenLoss

IDS, LOGPS = "teacher_ids", "teacher_logps"  # columns, and what they are called in a file behind the key of the data

# Each formula maps log-probabilities of student and teacher [n, V] to the divergence [n] and its derivative by those of
# the student [n, V], up to a multiple of p_S in each row, which does not move a softmax.
Compared = tuple[Tensor, Tensor]


def forward_kl(student: Tensor, teacher: Tensor) -> Compared:
    """KL(T||S) = sum p_T (log p_T - log p_S), Hinton et al. 2015 (arXiv 1503.02531)."""
    probs = teacher.exp()
    return (teacher - student).mul_(probs).sum(1), probs.neg_()


def reverse_kl(student: Tensor, teacher: Tensor) -> Compared:
    """KL(S||T) = sum p_S (log p_S - log p_T), as in MiniLLM (arXiv 2306.08543)."""
    slope = (student - teacher).mul_(student.exp())
    return slope.sum(1), slope


def symmetric(student: Tensor, teacher: Tensor) -> Compared:
    """The mean of both."""
    return tuple((a + b) / 2 for a, b in zip(forward_kl(student, teacher), reverse_kl(student, teacher), strict=True))


def jsd(student: Tensor, teacher: Tensor, weight: float) -> Compared:
    """b KL(T||M) + (1 - b) KL(S||M) with M = (1 - b) p_S + b p_T (arXiv 2306.13649, eq. 1).

    Its limit is 0 for b = 0 and b = 1; there it is, as in TRL, KL(T||S) and KL(S||T), the limit of it over b, 1 - b.
    """
    if weight in (0, 1):
        return reverse_kl(student, teacher) if weight else forward_kl(student, teacher)
    mixture = torch.logaddexp(student + math.log(1 - weight), teacher + math.log(weight))
    slope = (student - mixture).mul_(student.exp()).mul_(1 - weight)
    return weight * forward_kl(mixture, teacher)[0] + slope.sum(1), slope


DIVERGENCES = {f.__name__: f for f in (forward_kl, reverse_kl, symmetric, jsd)}


@dataclass
class KDOptions:
    teacher: str | None = option(
        None, "A folder or hub name of a causal language model with the same tokenizer, or `tiny`."
    )
    teacher_dtype: str | None = option(
        None,
        "The dtype of its weights and compute; policy_dtype when left out.",
        choices=("float32", "bfloat16", "float16"),
    )
    teacher_outputs: str | None = option(
        None,
        "What the teacher says of all data: a file that `minitrain cache-teacher` made. Then no teacher is loaded.",
    )
    temperature: float = option(4.0, "T: the logits of both are divided by it.", ge=0.01, le=1000)
    alpha: float = option(0.7, "Weight of T^2 times the divergence.", ge=0)
    beta: float = option(0.3, "Weight of the cross entropy of the data's own tokens.", ge=0)
    divergence: str = option(
        "forward_kl",
        "forward_kl: KL(T||S). reverse_kl: KL(S||T). symmetric: the mean of both. jsd: see jsd_weight.",
        choices=tuple(DIVERGENCES),
    )
    jsd_weight: float = option(
        0.5, "jsd: b in b KL(T||M) + (1 - b) KL(S||M), M = (1 - b) S + b T; 0 is forward_kl.", ge=0, le=1
    )
    top_k: int | None = option(
        None, "Compare on the teacher's so many likeliest tokens, all others as one; on all when left out.", ge=1
    )


@register_loss("kd", KDOptions)
class KD(TokenLoss):
    """``alpha T^2 D(student, teacher at temperature T) - beta log p``; the unit is the supervised token.

    D is a true divergence, the teacher's entropy included. T^2 keeps its gradient as large as at T = 1 (arXiv
    1503.02531, section 2); a jsd goes without, as in its paper.
    """

    def unused_options(self) -> dict[str, str]:
        return {} if self.options.divergence == "jsd" else {"jsd_weight": "it needs loss.divergence=jsd."}

    def conflicts(self) -> dict[str, str]:
        nothing = self.options.alpha == self.options.beta == 0
        return {"alpha": "is 0, and so is loss.beta; nothing is left to learn. Set one of them."} if nothing else {}

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"teacher"} if self.options.teacher_outputs is None else ())

    def on_data_loaded(self, train: Sequence[DataFile], eval: Sequence[DataFile]) -> list[AddedFeatures]:
        """Return the columns of `teacher_outputs`, if that is set."""
        if self.options.teacher_outputs is None:
            return []
        self.n_tokens, added = read_outputs([*train, *eval], self.options)
        return added

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        o = self.options
        formula = DIVERGENCES[o.divergence]
        if o.divergence == "jsd":
            formula = functools.partial(jsd, weight=o.jsd_weight)
        weights = o.alpha if o.divergence == "jsd" else o.alpha * o.temperature**2, o.beta
        theirs = self._stored_outputs(batch) if models.teacher is None else models.teacher.target_hidden_states(batch)
        scores = models.policy(batch, distillation=Distillation(theirs, formula, o.temperature, o.top_k, weights))
        losses = weights[0] * scores.divergence - weights[1] * scores.logps  # [N]
        output = self.output(losses.sum(), batch, scores.logps)
        output.metrics["kl"] = (scores.divergence.detach().sum(), output.num_items)
        return output

    def _stored_outputs(self, batch: Batch) -> TopKLogprobs:
        return TopKLogprobs(batch.target_feature(IDS), batch.target_feature(LOGPS), self.n_tokens)


def read_outputs(files: Sequence[DataFile], options: KDOptions) -> tuple[int, list[AddedFeatures]]:
    """Return V, the number of the teacher's tokens, and the columns of `options.teacher_outputs`, which stay on disk.

    Raises:
        ConfigError: For a file that was made for other data, of another teacher or with other options.
    """
    path, added = Path(options.teacher_outputs), []
    try:
        if is_sealed(path) and not is_intact(path):
            raise ConfigError(
                f"loss.teacher_outputs: {path} is damaged, its checksum is wrong. Make it again with "
                "`minitrain cache-teacher`.",
                "damaged-file",
            )
        with safe_open(path, "pt") as opened:
            made, names = opened.metadata() or {}, set(opened.keys())
            for file in files:
                if f"{file.key}/{IDS}" not in names:
                    raise ConfigError(
                        f"loss.teacher_outputs: {path} holds nothing of {file.source} as it is tokenised now; "
                        "make it anew with `minitrain cache-teacher`.",
                        "mismatch",
                    )
                columns = {name: opened.get_tensor(f"{file.key}/{name}") for name in (IDS, LOGPS)}
                added.append(AddedFeatures(file, token_features=columns))
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"loss.teacher_outputs: {path} is no file of `minitrain cache-teacher`: {error}.", "wrong-path"
        ) from None
    for key in ("temperature", "top_k", "teacher", "teacher_dtype"):
        given = getattr(options, key)
        if not is_stored_name(made.get(key), str(given)) and not (given is None and key.startswith("teacher")):
            told = f"{path} was made with {made.get(key)}, and here it is {given}; make it anew, or set it to the same."
            raise ConfigError(f"loss.{key}: {told}", "mismatch")
    return int(made["n_tokens"]), added
