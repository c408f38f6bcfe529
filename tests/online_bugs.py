"""Silent bugs of online RL, the tests that guard against them, and lines of the code that keep some of them away.

The tests name a bug by its number in their docstrings, as "silent RL bug R1".
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

from tests.mutations import Mutation

TESTS = Path(__file__).parent

# Number -> (where it was reported, what went wrong).
ONLINE_BUGS = {
    1: ("trl#4159", "Answers were sampled at another temperature than that of their log-probabilities."),
    2: (
        "trl#6789, ms-swift#8442",
        "top_p or top_k truncated what answers were sampled from, but not what was trained.",
    ),
    3: (
        "trl#5783",
        "Options of generation_config.json, such as a repetition penalty, changed the samples.",
    ),
    4: ("trl#5814", "A correction of responses summed over tokens, so it vanished with their length."),
    5: ("Liger-Kernel#1088", "One path of the loss ignored the correction."),
    6: ("open-instruct#1387", "Either sampling or training computed logits in bfloat16."),
    7: ("OpenRLHF#1155", "Sampling and training differed in their rounding until the run collapsed."),
    8: ("TRL", "A large log-ratio at a padded position became infinity times 0."),
    9: (
        "trl#6024, ms-swift#10117",
        "The loss was divided by the tokens of a micro-batch, or of all sampled answers.",
    ),
    10: ("SkyRL#1296", "A rollout without a trained token counted as one token."),
    11: ("Search-R1#39", "Each answer was a group of its own, so there was no baseline."),
    12: ("slime#1918", "Groups were inferred from the shape of the batch, so uneven ones shared a mean."),
    13: ("verl#2185", "The batch was reordered, and rewards stayed in place."),
    14: ("trl#6533", "A function returned one reward, which all answers got."),
    15: ("ms-swift#8123", "One answer without a reward made all advantages NaN."),
    16: (
        "verl#5635",
        "A time limit of a verifier raised outside of the main thread, and every answer got 0.",
    ),
    17: ("verl#6392", "The output of a tool was judged as if the model had written it."),
    18: ("verl#6310", "The reward of an empty answer went to padding."),
    19: ("verl#6362", "A reward on a token that was masked later still counted."),
    20: ("trl#3750", "The last reward was given to the first padding token."),
    21: ("AReaL#1346", "Advantages decayed over tokens of the environment."),
    22: ("slime#2235", "Each rank whitened by the statistics of its own part."),
    23: ("ToolRL#52", "The KL had the wrong sign."),
    24: ("slime#399", "One estimator of advantages ignored the coefficient of the KL."),
    25: ("RL#2506", "k1 in the loss has no gradient in expectation."),
    26: ("OpenRLHF#768", "The KL was both in the rewards and in the loss."),
    27: ("RL#2955", "A resumed run took its reference from the checkpoint."),
    28: (
        "trl#5224, verl#6719",
        "Turns were decoded and tokenized again, into other ids than those sampled.",
    ),
    29: ("RL#2176", "Answers within the prompt were trained on."),
    30: ("trl#3853", "Prompts had two BOS tokens, or none."),
    31: ("trl#3646", "Long prompts lost the first tokens of their template."),
    32: ("trl#6800", "Prompts were padded without position ids."),
    33: ("reasoning-from-scratch#185", "The end token was not part of an answer, so it was never trained on."),
    34: ("OpenRLHF#238", "An end token replaced the last token of a truncated answer."),
    35: ("trl#6263", "Most answers were truncated, and nothing said so."),
    36: ("verifiers#186", "An option that gives truncated answers no reward took it from all of them."),
    37: ("ms-swift#9855, trl#2698", "The server sampled from the base model."),
    38: ("Megatron-LM#5983", "Ranks or answers shared their random numbers."),
    39: ("trl#3148", "A resumed run skipped or repeated prompts."),
    40: (
        "transformers#36051",
        "Activation checkpointing switched the KV cache off, or sampling left the model in another mode.",
    ),
    41: ("trl#2022", "The entropy counted padding."),
    42: ("trl#6648", "The entropy bonus was divided in another way than the loss."),
    43: ("Visual-RFT#176", "The empty answer was part of the reference, and right."),
    44: ("RL#4158", "Equal rewards had a standard deviation of 1e-9, by which was divided."),
    45: ("tinker#822", "Late answers were dropped, so long ones were never trained on."),
    46: ("trl#5790", "The best model was chosen by the reward that was hacked."),
    47: ("trl#3120", "A ratio that is always 1 was logged, and looked like broken clipping."),
    48: ("users of GRPO", "Most groups of two answers had equal rewards, and nothing said so."),
}

# A bug may have several lines. Those of R2, R3, R20 and R25 are in tests/mutations.py.
ONLINE_MUTATIONS = [
    Mutation(
        number=1,
        file="minitrain/rl/logps.py",
        line="output = models.policy(batch, temperature=loss.temperature)",
        replacement="output = models.policy(batch)",
        test="tests/rl/test_sampled_bugs.py::test_log_probabilities_are_those_of_the_sampling_temperature",
    ),
    Mutation(
        number=4,
        file="minitrain/rl/logps.py",
        line="log_ratio = (sums / counts.clamp_min(1))[documents]",
        replacement="log_ratio = sums[documents]",
        test="tests/rl/test_rounds_and_losses.py::test_the_correction_of_a_response_does_not_depend_on_its_length",
    ),
    Mutation(
        number=5,
        file="minitrain/losses/policy.py",
        line='losses = losses * batch.target_feature("importance_weights")',
        replacement="pass",
        test="tests/losses/test_rollouts.py::test_policy_equals_its_formula",
    ),
    Mutation(
        number=10,
        file="minitrain/losses/policy.py",
        line="rollouts = batch.docs_with_targets.sum().float()",
        replacement="rollouts = torch.ones_like(batch.docs_with_targets).sum().float()",
        test="tests/rl/test_rounds_and_losses.py::test_truncated_answers_keep_their_reward_and_have_no_gradient",
    ),
    Mutation(
        number=12,
        file="minitrain/losses/advantages.py",
        line="return values.unique(return_inverse=True)[1]",
        replacement="return torch.arange(len(values)) // (len(values) // len(values.unique()))",
        test="tests/rl/test_rounds_and_losses.py::test_groups_are_those_of_the_prompts",
    ),
    Mutation(
        number=13,
        file="minitrain/rl/rounds.py",
        line="pairs = [list(zip(group, of_group, strict=True))",
        replacement="pairs = [list(zip(group, of_group[::-1], strict=True))",
        test="tests/rl/test_rounds.py::test_each_answer_keeps_its_own_reward",
    ),
    Mutation(
        number=15,
        file="minitrain/rl/documents.py",
        line="return [answer for answer in group if not math.isnan(answer.reward)]",
        replacement="return list(group)",
        test="tests/rl/test_rounds_and_losses.py::test_an_answer_that_could_not_be_judged_is_in_no_mean",
    ),
    Mutation(
        number=21,
        file="minitrain/rl/episodes.py",
        line="self.mask += [logps is not None] * len(ids)",
        replacement="self.mask += [True] * len(ids)",
        test="tests/rl/test_environments.py::test_a_conversation_of_two_turns_is_trained_as_it_was_sampled",
    ),
    Mutation(
        number=23,
        file="minitrain/losses/policy.py",
        line="losses = losses + o.kl_coef * (kl * rho if o.kl_times_ratio else kl)",
        replacement="losses = losses - o.kl_coef * (kl * rho if o.kl_times_ratio else kl)",
        test="tests/losses/test_exact_gradients.py::test_a_step_along_the_gradient_lowers_the_kl",
    ),
    Mutation(
        number=26,
        file="minitrain/losses/policy.py",
        line='penalized_rewards(rollouts, o.kl_coef if o.kl_in == "reward" else 0.0, o.kl_estimator)',
        replacement="penalized_rewards(rollouts, o.kl_coef, o.kl_estimator)",
        test="tests/losses/test_exact_gradients.py::test_a_kl_in_the_loss_is_that_of_each_token",
    ),
    Mutation(
        number=28,
        file="minitrain/rl/episodes.py",
        line="episode.append(sample.ids, sample.logps)",
        replacement="episode.append(self.template.encoder.encode_text(response.text, before=''), sample.logps)",
        test="tests/rl/test_environments.py::test_a_conversation_of_two_turns_is_trained_as_it_was_sampled",
    ),
    Mutation(
        number=29,
        file="minitrain/rl/documents.py",
        line="mask += [False] * n + answer.mask",
        replacement="mask += [True] * n + answer.mask",
        test="tests/rl/test_round_prompts.py::test_answers_in_the_prompt_are_not_trained_on",
    ),
    Mutation(
        number=34,
        file="minitrain/rl/episodes.py",
        line="episode.append(sample.ids, sample.logps)",
        replacement="episode.append([*sample.ids[:-1], self.template.end_ids()[0]], sample.logps)",
        test="tests/rl/test_prompts_and_ends.py::test_the_end_of_a_truncated_answer_is_what_was_sampled",
    ),
    Mutation(
        number=36,
        file="minitrain/rl/rounds.py",
        line='if self.options.truncated == "zero" and not episode.ended:',
        replacement='if self.options.truncated == "zero":',
        test="tests/rl/test_prompts_and_ends.py::test_only_truncated_answers_lose_their_reward",
    ),
    Mutation(
        number=37,
        file="minitrain/model/merged.py",
        line='lora.merged_weight(module, weight) if hasattr(module, "lora") else weight.detach()',
        replacement="weight.detach()",
        test="tests/rl/test_vllm.py::test_the_server_samples_from_the_weights_after_each_step",
    ),
    Mutation(
        number=38,
        file="minitrain/rl/episodes.py",
        line="self._begin(prompt, (*key, prompt.number, i))",
        replacement="self._begin(prompt, (*key, i))",
        test="tests/rl/test_sampled_bugs.py::test_no_two_answers_share_random_numbers",
    ),
    Mutation(
        number=39,
        file="minitrain/rl/rounds.py",
        line="self.n_drawn = 0  # the dropped round draws its prompts again",
        replacement="pass",
        test="tests/faults/test_interrupted_rounds.py::test_stopped_while_it_samples",
    ),
    Mutation(
        number=43,
        file="minitrain/rl/rewards_builtin.py",
        line="return float(not says_nothing(answer) and final_answer(answer.text, options.match) == expected)",
        replacement='return float((final_answer(answer.text, options.match) or "") in expected)',
        test="tests/rl/test_rewards.py::test_exact_match",
    ),
    Mutation(
        number=44,
        file="minitrain/rl/documents.py",
        line="max(rewards) - min(rewards) < EQUAL",
        replacement="max(rewards) == min(rewards)",
        test="tests/rl/test_rewards.py::test_equal_rewards_that_are_no_binary_fractions_give_no_advantage",
    ),
    Mutation(
        number=47,
        file="minitrain/rl/rounds.py",
        line='cache.token_features.pop("old_logps", None)',
        replacement="pass",
        test="tests/rl/test_rounds_and_losses.py::test_ratios_are_logged_only_where_they_can_differ_from_1",
    ),
]


def guards() -> dict[int, list[str]]:
    """Return the tests whose docstrings name each bug, as arguments of pytest."""
    tests: dict[int, list[str]] = defaultdict(list)
    for file in sorted(TESTS.rglob("test_*.py")):
        text = file.read_text()
        if "silent RL bug" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for number in _numbers(" ".join((ast.get_docstring(node) or "").split())):
                    tests[number].append(f"{file.relative_to(TESTS.parent)}::{node.name}")
    return dict(sorted(tests.items()))


def _numbers(docstring: str) -> set[int]:
    """Return the numbers in a docstring, such as "silent RL bugs R1, R4 to R6 and R9"."""
    numbers: set[int] = set()
    for found in re.findall(r"silent RL bugs? ((?:R\d+(?:, | and | to )?)+)", docstring):
        for first, last in re.findall(r"R(\d+)(?: to R(\d+))?", found):
            numbers |= set(range(int(first), int(last or first) + 1))
    return numbers
