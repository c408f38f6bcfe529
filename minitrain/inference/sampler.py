"""Sample responses from a policy, with the fastest loop whose log-probabilities are those of the policy.

Each token is chosen by one random number, which depends only on the key of the response and on the position. So a
response does not depend on the others in its batch, nor on the loop.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch

from minitrain.batch import Document, collate
from minitrain.errors import ConfigError
from minitrain.model.load_check import check_output_layer
from minitrain.model.policy import Policy
from minitrain.model.positions import restoring_rotary

from .choice import Chooser, IsStopped, Request, Sample, TokenChoice
from .plain_loop import PlainLoop
from .slots import SlotLoop, fitting_slots

N_TRIED = 8  # tokens that are sampled to try a loop
MakeLoop = Callable[[Policy, int], SlotLoop | PlainLoop]  # (policy, number of slots) -> loop


def one_at_a_time(policy: Policy, n_slots: int) -> PlainLoop:
    """Return a loop for models in which a row depends on the others, such as RWKV in transformers 5.23."""
    return PlainLoop(policy, 1)


def by_own_logits(policy: Policy, n_slots: int) -> PlainLoop:
    """Return a loop for models that the policy does not compute as transformers does."""
    return PlainLoop(policy, 1, own_logits=True)


class Sampler:
    """Samples responses from a policy, which must be in eval mode, without gradients.

    Args:
        policy: The policy.
        end_ids: Tokens that end a response.
        n_slots: Maximum number of rows of a batch (default: see `fitting_slots`). It changes no response.
        is_checked: Whether the output layer of the policy is known to be that of its model.
    """

    def __init__(self, policy: Policy, end_ids: Sequence[int], n_slots: int | None = None, is_checked: bool = True):
        self.policy, self.end_ids, self.n_slots, self.is_checked = policy, set(end_ids), n_slots, is_checked

    def sample(
        self,
        requests: Sequence[Request],
        choose: Chooser,
        is_stopped: IsStopped | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> list[list[Sample]]:
        """Return the responses to each request, in the order of its keys. All ranks must make the first call.

        Args:
            requests: The prompts.
            choose: Chooses the tokens.
            is_stopped: Called with the ids of a response after each of its tokens; True ends it.
            on_step: Called after each token of a batch with the number of responses that have ended.
        """
        return self._sample(
            self.make_loop, requests, TokenChoice(self.policy, choose, self.end_ids, is_stopped, on_step)
        )

    def _sample(self, make_loop: MakeLoop, requests: Sequence[Request], choice: TokenChoice) -> list[list[Sample]]:
        rows = choice.rows(requests)
        # Some rotary frequencies depend on the longest row of a batch, so long rows are not mixed with others.
        limit = self.policy.rotary_limit
        longest = max((len(request.prompt) + request.limit for request in requests), default=0)
        n_slots = self.n_slots or fitting_slots(self.policy, longest)
        short, long = [], []
        for row in itertools.chain(*rows):
            (long if len(row.prompt) + row.limit > limit else short).append(row)
        with restoring_rotary(self.policy.model):
            make_loop(self.policy, n_slots).run(short, choice)
            make_long = PlainLoop if make_loop is SlotLoop else make_loop
            make_long(self.policy, n_slots).run(long, choice)
        return [[row.sample for row in of_request] for of_request in rows]

    @functools.cached_property
    def make_loop(self) -> MakeLoop:
        """The first loop that samples a few tokens with the log-probabilities of the policy. All ranks must call it."""
        exact = self.policy.model.dtype == torch.float32 and not torch.is_autocast_enabled(self._device.type)
        tolerance = 1e-3 if exact else 0.1  # per token
        if self.is_checked or self._has_own_logits():
            for make_loop in (SlotLoop, PlainLoop, one_at_a_time):
                if self._difference(make_loop) <= tolerance:
                    return make_loop
        return by_own_logits

    @property
    def _device(self) -> torch.device:
        return self.policy.model.get_input_embeddings().weight.device

    def _has_own_logits(self) -> bool:
        """Return whether the output layer of the policy is that of its model."""
        try:
            check_output_layer(self.policy, self._device)
        except ConfigError:
            return False
        return True

    def _difference(self, make_loop: MakeLoop) -> float:
        """Return the mean difference per token between the log-probabilities of a loop and those of the policy.

        It is infinite if the loop cannot run the model.
        """
        if make_loop is SlotLoop and not SlotLoop.supports(self.policy):
            return math.inf
        longest = max(2, min(9, self.policy.position_limit - N_TRIED))
        prompts = [list(range(first, first + n)) for first, n in ((3, longest), (4, 1 + longest // 2), (5, longest))]
        requests = [
            Request(prompt, [(i,)], N_TRIED) for i, prompt in enumerate(prompts)
        ]  # every vocabulary has the ids
        try:
            choice = TokenChoice(self.policy, Chooser(1.0), set())
            samples = self._sample(make_loop, requests, choice)
            return max(self._distance(prompt, sample) for prompt, (sample,) in zip(prompts, samples, strict=True))
        except Exception:  # an architecture that is called differently
            return math.inf

    def _distance(self, prompt: list[int], sample: Sample) -> float:
        mask = torch.tensor([0] * len(prompt) + [1] * len(sample.ids), dtype=torch.uint8)
        document = Document(torch.tensor(prompt + sample.ids, dtype=torch.int32), mask)
        logps = self.policy(collate([[document]], 0).to(self._device)).logps.float().cpu()  # [8]
        return float((logps - torch.tensor(sample.logps)).abs().mean())
