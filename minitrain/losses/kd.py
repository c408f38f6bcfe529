"""Knowledge distillation: match a teacher's distribution at each target."""

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
from .sft import TokenLoss, weighted_sum

IDS, LOGPS = (
    "teacher_ids",
    "teacher_logps",
)  # token columns; their names in a file of teacher outputs, after the data key

# Each formula maps log-probabilities of student and teacher [n, V] to the divergence [n] and its derivative with
# respect to the student's [n, V], up to a multiple of p_S in each row, to which the softmax is invariant.
Divergence = tuple[Tensor, Tensor]


def forward_kl(student: Tensor, teacher: Tensor) -> Divergence:
    """KL(T||S) = sum p_T (log p_T - log p_S), Hinton et al. 2015 (arXiv 1503.02531)."""
    probs = teacher.exp()
    return (teacher - student).mul_(probs).sum(1), probs.neg_()


def reverse_kl(student: Tensor, teacher: Tensor) -> Divergence:
    """KL(S||T) = sum p_S (log p_S - log p_T), as in MiniLLM (arXiv 2306.08543)."""
    slope = (student - teacher).mul_(student.exp())
    return slope.sum(1), slope


def symmetric(student: Tensor, teacher: Tensor) -> Divergence:
    """The mean of forward and reverse KL."""
    return tuple((a + b) / 2 for a, b in zip(forward_kl(student, teacher), reverse_kl(student, teacher), strict=True))


def jsd(student: Tensor, teacher: Tensor, weight: float) -> Divergence:
    """b KL(T||M) + (1 - b) KL(S||M) with M = (1 - b) p_S + b p_T (arXiv 2306.13649, eq. 1).

    It is 0 at b = 0 and b = 1. There, as in TRL, it is replaced by KL(T||S) and KL(S||T), the limits of jsd / b and
    jsd / (1 - b).
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
        None, "Folder or Hub name of a causal language model with the same tokenizer, or `tiny`."
    )
    teacher_dtype: str | None = option(
        None,
        "Dtype of the teacher's weights and compute (default: policy_dtype).",
        choices=("float32", "bfloat16", "float16"),
    )
    teacher_outputs: str | None = option(
        None,
        "File of `minitrain cache-teacher` with the teacher's outputs for all data. The teacher is then not loaded.",
    )
    temperature: float = option(4.0, "T, by which the logits of both models are divided.", ge=0.01, le=1000)
    alpha: float = option(0.7, "Weight of T^2 times the divergence (of the divergence, with jsd).", ge=0)
    beta: float = option(0.3, "Weight of the cross entropy of the targets.", ge=0)
    divergence: str = option(
        "forward_kl",
        "forward_kl: KL(T||S). reverse_kl: KL(S||T). symmetric: the mean of both. jsd: see jsd_weight.",
        choices=tuple(DIVERGENCES),
    )
    jsd_weight: float = option(
        0.5, "jsd: b in b KL(T||M) + (1 - b) KL(S||M), M = (1 - b) S + b T; 0 is forward_kl.", ge=0, le=1
    )
    top_k: int | None = option(
        None, "Compare the N most likely tokens of the teacher, and the rest as one token (default: all tokens).", ge=1
    )


@register_loss("kd", KDOptions)
class KD(TokenLoss):
    """``alpha T^2 D(student, teacher at temperature T) - beta log p``; the unit is the target.

    D includes the teacher's entropy. T^2 keeps the gradient as large as at T = 1 (arXiv 1503.02531, section 2); jsd has
    no such factor, as in its paper.
    """

    def unused_options(self) -> dict[str, str]:
        return {} if self.options.divergence == "jsd" else {"jsd_weight": "it needs loss.divergence=jsd."}

    def conflicts(self) -> dict[str, str]:
        is_constant = self.options.alpha == self.options.beta == 0
        reason = "is 0, and so is loss.beta, so the loss is always 0. Set one of them above 0."
        return {"alpha": reason} if is_constant else {}

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
        teacher = self._stored_outputs(batch) if models.teacher is None else models.teacher.target_hidden_states(batch)
        scores = models.policy(batch, distillation=Distillation(teacher, formula, o.temperature, o.top_k, weights))
        losses = weights[0] * scores.divergence - weights[1] * scores.logps  # [N]
        output = self.output(losses, batch, scores.logps, scores.loss_sum)
        output.metrics["kl"] = (weighted_sum(scores.divergence.detach(), batch), output.num_items)
        return output

    def _stored_outputs(self, batch: Batch) -> TopKLogprobs:
        return TopKLogprobs(batch.target_feature(IDS), batch.target_feature(LOGPS), self.n_tokens)


def read_outputs(files: Sequence[DataFile], options: KDOptions) -> tuple[int, list[AddedFeatures]]:
    """Return the vocabulary size of the teacher, and the columns of `options.teacher_outputs`, memory-mapped.

    Raises:
        ConfigError: If the file was made for other data, from another teacher or with other options.
    """
    path, added = Path(options.teacher_outputs), []
    try:
        if is_sealed(path) and not is_intact(path):
            raise ConfigError(
                f"loss.teacher_outputs: {path} is damaged: its checksum does not match. Run "
                "`minitrain cache-teacher` again.",
                "damaged-file",
            )
        with safe_open(path, "pt") as opened:
            metadata, names = opened.metadata() or {}, set(opened.keys())
            for file in files:
                if f"{file.key}/{IDS}" not in names:
                    raise ConfigError(
                        f"loss.teacher_outputs: {path} has no entries for {file.source} with the current tokenization. "
                        "Run `minitrain cache-teacher` again.",
                        "mismatch",
                    )
                columns = {name: opened.get_tensor(f"{file.key}/{name}") for name in (IDS, LOGPS)}
                added.append(AddedFeatures(file, token_features=columns))
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"loss.teacher_outputs: {path} is not a file of `minitrain cache-teacher` ({error}). Choose another file.",
            "wrong-path",
        ) from None
    for key in ("temperature", "top_k", "teacher", "teacher_dtype"):
        given = getattr(options, key)
        if not is_stored_name(metadata.get(key), str(given)) and not (given is None and key.startswith("teacher")):
            message = (
                f"is {given}, and {path} was made with {metadata.get(key)}. Set the same value, or make a new file."
            )
            raise ConfigError(f"loss.{key}: {message}", "mismatch")
    return int(metadata["n_tokens"]), added
