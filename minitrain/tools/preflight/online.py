"""Play a round of a few prompts before a training, with its own rewards, environment and template."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitrain.config.issues import ConfigIssues, ConfigSource
from minitrain.config.schema import Config
from minitrain.config.sections import LoRAConfig, ModelConfig, SoftPromptConfig
from minitrain.data.messages import assistant
from minitrain.data.template import Template
from minitrain.model.load import CPU, build_policy
from minitrain.model.policy import Policy
from minitrain.rl.checks import count_steps
from minitrain.rl.engine import LocalEngine, build_engine, check_copy
from minitrain.rl.episodes import Episode, Prompt
from minitrain.rl.reports import Stats, answer_metrics, pass_at_k, stats_of
from minitrain.rl.rewards import Judgement, build_rewards
from minitrain.rl.rewards_builtin import reference_of
from minitrain.rl.rounds import make_rounds
from minitrain.training.setup import Preparation

from ..stage import Stage
from ..terminal import escape
from .preview import RESULT, Marks, decode

N_PROMPTS = 2
MAX_ANSWERS, MAX_TOKENS, MAX_TURNS = 4, 32, 4  # of a prompt, of an answer, of a conversation
MAX_WORK = 10**11  # parameters times tokens: a few seconds of a CPU core


@dataclass
class Trial:
    """A round of a few prompts.

    Attributes:
        config: The config, with the limits of the trial.
        stand_in: Why a random model answered instead of the policy; "" if the policy did.
        groups: The answers to each prompt with their rewards.
        references: The rewards of the reference answers, by the index of the prompt.
        untried: Rewards that load a model, which did not judge.
        where: `file:line` of each prompt.
        failures: How many calls of reward functions failed, by function and problem.
        without_reference: Which rows lack what a reward function compares with.
    """

    config: Config
    stand_in: str
    groups: list[list[tuple[Episode, Judgement]]]
    references: dict[int, Judgement]
    untried: list[str]
    where: list[str]
    failures: Mapping[str, int]
    without_reference: list[str]

    @property
    def stats(self) -> list[list[Stats]]:
        return [[stats_of(*pair) for pair in group] for group in self.groups]

    def warnings(self) -> Iterator[str]:
        """Yield what is wrong with the reward functions."""
        yield from self.without_reference
        n = sum(map(len, self.groups))
        for problem, count in self.failures.items():
            yield f"reward {problem} ({count} of {n} answers)"
        for number, judgement in self.references.items():
            for name, reward in judgement.parts.items():
                if name.startswith("exact_match") and not reward:
                    yield f"{self.where[number]}: {name} is 0 for the reference answer itself"

    def metrics(self) -> list[str]:
        """Return the names of the metrics of an evaluation, as far as these answers show them."""
        return [*answer_metrics(self.stats), *pass_at_k(self.stats)]


def play_round(run: Preparation) -> Trial:
    """Sample and judge answers to the first prompts of a run.

    The policy answers if its weights are on this machine and it is small enough to do so in seconds, else a random
    model with its tokenizer.

    Raises:
        ConfigError: The sampler does not fit the model.
        DataError: An evaluation row has no reference answer, which eval_generate needs.
        RunError: The environment raises an error.
    """
    options, issues = run.config.rollout, ConfigIssues(ConfigSource("rollout"))
    if options.sampler_dtype is not None:
        check_copy(run.policy.model)
    rewards = build_rewards(options.rewards, issues)
    issues.raise_if_any()
    small = dataclasses.replace(
        options,
        num_generations=min(options.num_generations, MAX_ANSWERS),
        max_new_tokens=min(options.max_new_tokens, MAX_TOKENS),
        max_turns=min(options.max_turns, MAX_TURNS),
        engine="local",
        engine_args={},
        sampler_dtype=None,
        rewards=[entry for entry, reward in zip(options.rewards, rewards, strict=True) if not reward.function.is_model],
    )
    config = dataclasses.replace(run.config, rollout=small)
    stand_in = _reason_for_stand_in(run, small)
    policy = _stand_in(run) if stand_in else _policy(run)
    stage = Stage(config, run.loss, policy.eval(), run.template, dataclasses.replace(run.train_loader, config=config))
    rounds = make_rounds(stage, LocalEngine(stage) if stand_in else build_engine(stage))
    rounds.check_references(run.eval_loader)
    try:
        prompts = rounds.draw(N_PROMPTS)
        episodes = rounds.play(prompts, (config.seed, 0), small.num_generations)
        judgements, failures = rounds.judge(episodes), dict(rounds.failures)
        references = [episode for prompt in prompts if (episode := _reference(prompt, run.template))]
        of_references = rounds.judge([references])[0]
    finally:
        rounds.workers.close()
    return Trial(
        config,
        stand_in,
        [list(zip(*pair, strict=True)) for pair in zip(episodes, judgements, strict=True)],
        {episode.prompt.number: judgement for episode, judgement in zip(references, of_references, strict=True)},
        [reward.key for reward in rewards if reward.function.is_model],
        [prompt.where for prompt in prompts],
        failures,
        rounds.prompts.without_reference(rewards),
    )


def _reference(prompt: Prompt, template: Template) -> Episode | None:
    """Return the reference answer of a row as a conversation that was sampled."""
    text = reference_of(prompt.row, None)
    if text is None:
        return None
    episode = Episode(prompt, (), [*prompt.messages, assistant(text)], text=text, ended=True, turns=1)
    ids = [*template.encoder.encode_text(text), template.end_ids()[0]]
    episode.append(ids, [0.0] * len(ids))
    return episode


def _reason_for_stand_in(run: Preparation, options: Any) -> str:
    model = run.config.model
    if not _has_weights_here(model):
        return f"the weights of {model.name_or_path} are not on this machine"
    n_parameters = sum(parameter.numel() for parameter in run.policy.parameters())
    n_new = options.num_generations * options.max_new_tokens * options.max_turns
    n_tokens = N_PROMPTS * (int(run.data.train.lengths.max()) + n_new)
    return f"{n_parameters:,} parameters are too many for a trial" if n_parameters * n_tokens > MAX_WORK else ""


def _has_weights_here(model: ModelConfig) -> bool:
    from huggingface_hub import try_to_load_from_cache

    if model.name_or_path == "tiny" or Path(model.name_or_path).is_dir():
        return True
    files = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(model.name_or_path, f, revision=model.revision), str) for f in files)


def _policy(run: Preparation) -> Policy:
    policy, _ = build_policy(run.config, run.template.tokenizer, CPU, value_head="values" in run.loss.requires)
    policy.groups_documents = run.policy.groups_documents
    return policy


def _stand_in(run: Preparation) -> Policy:
    """Return the built-in model with random weights and the run's tokenizer."""
    config = dataclasses.replace(
        run.config,
        model=ModelConfig("tiny"),
        lora=LoRAConfig(),
        soft_prompt=SoftPromptConfig(),
        freeze_layers=[],
        packing=False,
    )
    return build_policy(config, run.template.tokenizer, CPU)[0]


# ------------------------------------------------------------------------------------------------------------ words


def describe_round(trial: Trial, template: Template, marks: Marks) -> str:
    """Return the answers with their rewards, one per paragraph, with marks around sampled tokens and replies."""
    options = trial.config.rollout
    by = f"a random model, since {trial.stand_in}" if trial.stand_in else "the policy"
    lines = [
        f"{N_PROMPTS} prompts, {options.num_generations} answers each of at most {options.max_new_tokens} tokens, "
        f"sampled from {by}"
    ]
    sampled, reply = marks.fields[None, True], marks.fields[RESULT, False]
    lines.append(f"{_marked('sampled', marks.runs[True], sampled)}, {_marked('reply', ('', ''), reply)}")
    if trial.untried:
        lines.append(f"not tried, since they load a model: {', '.join(trial.untried)}")
    for number, group in enumerate(trial.groups):
        prompt = escape(decode(template.tokenizer, group[0][0].prompt.ids)).rstrip("\n")
        lines.append(f"{trial.where[number]}: {_marked(prompt, ('', ''), marks.fields[None, False])}")
        if number in trial.references:
            lines.append(f"  reference answer: {_rewards(trial.references[number])}")
        for i, (episode, judgement) in enumerate(group, 1):
            end = "ended" if episode.ended else "cut off"
            lines.append(f"  answer {i}: {_rewards(judgement)}; {sum(episode.mask)} tokens, {end}")
            lines.append("    " + _conversation(episode, template.tokenizer, marks).replace("\n", "\n    "))
    return "\n".join(lines)


def _conversation(episode: Episode, tokenizer, marks: Marks) -> str:
    """Return the text after the prompt, with marks around what was sampled and what the environment replied."""
    text, read, start = "", "", 0
    borders = [i for i in range(1, len(episode.ids)) if episode.mask[i] != episode.mask[i - 1]]
    for stop in [*borders, len(episode.ids)]:
        until = decode(tokenizer, episode.ids[:stop])
        field = marks.fields[(None, True) if episode.mask[start] else (RESULT, False)]
        text += _marked(escape(until[len(read) :]), marks.runs[episode.mask[start]], field)
        read, start = until, stop
    return text


def _marked(text: str, run: tuple[str, str], field: tuple[str, str]) -> str:
    return run[0] + field[0] + text + field[1] + run[1]


def _rewards(judgement: Judgement) -> str:
    if math.isnan(judgement.total):
        return "not judged"
    parts = ", ".join(f"{name} {value:.4g}" for name, value in (judgement.parts | judgement.extra).items())
    return f"reward {judgement.total:.4g}" + (f" ({parts})" if parts else "")


def describe_rounds(run: Preparation) -> dict[str, str]:
    """Return lines about the number of steps and the size of rounds."""
    config, options, n = run.config, run.config.rollout, run.train_loader.epoch_size
    n_steps = count_steps(config, n)
    per_round = options.num_iterations * options.prompts_per_round // config.total_batch_size
    epochs = n_steps / per_round * options.prompts_per_round / n
    return {
        "steps": f"{n_steps:,} of {config.total_batch_size:,} prompts, {epochs:.2f} epochs of {n:,} prompts",
        "rounds": f"{math.ceil(n_steps / per_round):,} of {options.prompts_per_round:,} prompts with "
        f"{options.num_generations} answers each, {per_round} step{'s' * (per_round > 1)} per round",
    }
