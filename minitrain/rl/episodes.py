"""Sample the conversations of a round: responses and, with an environment, its replies.

Tokens stay as they were sampled. Only what an environment replies is tokenized, as a piece after the response.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minitrain.config.sections import RolloutConfig
from minitrain.data.messages import Message, Messages
from minitrain.data.source import row_name
from minitrain.data.template import Template
from minitrain.inference.choice import Chooser, Request, Sample

from .engine import Engine
from .environments import Environment, call

if TYPE_CHECKING:
    from minitrain.trainer import Trainer

PLACEHOLDER = "minitrain placeholder of a response"


@dataclass
class Prompt:
    """A prompt of a round.

    Attributes:
        number: Its index in the round.
        ids: Its token ids.
        row: Its data row.
        source: The data file of the row.
        line: Its line in the data file.
        messages: Its turns.
        variables: What the chat template is given besides.
    """

    number: int
    ids: list[int]
    row: Mapping[str, Any]
    source: str = ""
    line: int = 0
    messages: Messages = field(default_factory=list)
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """`file:line` of its row."""
        return row_name(self.source, self.line)


@dataclass
class Episode:
    """A conversation that is sampled after a prompt.

    Attributes:
        prompt: The prompt.
        key: Integers that determine its random numbers.
        messages: The turns so far.
        ids: Token ids after the prompt.
        mask: Which of them were sampled.
        logps: Their log-probabilities; 0 for others.
        token_rewards: The reward of the environment at each token.
        text: The last response.
        ended: Whether the last response ended by itself.
        turns: Number of responses.
        temperature: Of the log-probabilities.
    """

    prompt: Prompt
    key: tuple[int, ...]
    messages: Messages
    environment: Environment | None = None
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    token_rewards: list[float] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    turns: int = 0
    temperature: float = 1.0

    def append(self, ids: Sequence[int], logps: Sequence[float] | None = None) -> None:
        """Append sampled tokens with their log-probabilities, or tokens of a reply."""
        self.ids += ids
        self.mask += [logps is not None] * len(ids)
        self.logps += logps if logps is not None else [0.0] * len(ids)
        self.token_rewards += [0.0] * len(ids)


class Player:
    """Samples the conversations of a round from a policy.

    Args:
        trainer: Has the policy, its template and the maximum length of a conversation.
        engine: Samples from the policy.
        options: The options of rollouts.
        make_environment: Makes the environment of a conversation.
    """

    def __init__(
        self,
        trainer: "Trainer",
        engine: Engine,
        options: RolloutConfig,
        make_environment: Callable[[], Environment] | None = None,
    ):
        generator = trainer.generator
        self.template, self.parser, self.engine, self.options = generator.template, generator.parser, engine, options
        self.max_length = min(trainer.config.max_length, generator.n_positions)
        self.keep_alive = trainer.keep_alive
        self.make_environment = make_environment
        self.choose = Chooser(options.temperature, options.top_p, options.top_k)

    def play(self, prompts: Sequence[Prompt], key: tuple[int, ...], n: int) -> list[list[Episode]]:
        """Return n conversations for each prompt.

        Args:
            prompts: The prompts.
            key: Integers that determine the random numbers, together with the numbers of prompt and response.
            n: Conversations for each prompt.
        """
        groups = [[self._begin(prompt, (*key, prompt.number, i)) for i in range(n)] for prompt in prompts]
        active = [episode for group in groups for episode in group]
        for turn in range(self.options.max_turns):
            by_context = [list(same) for _, same in itertools.groupby(active, lambda e: (e.prompt.number, e.ids))]
            requests = [self._request(episodes, turn) for episodes in by_context]
            samples = self.engine.sample(requests, self.choose, self.parser.end_ids, self.options.stop)
            pairs = zip(itertools.chain(*by_context), itertools.chain(*samples), strict=True)
            active = [episode for episode, sample in pairs if self._continues(episode, sample)]
            if not active:
                break
        return groups

    def _begin(self, prompt: Prompt, key: tuple[int, ...]) -> Episode:
        temperature = self.options.temperature or 1.0  # greedy decoding does not scale
        if self.make_environment is None:
            return Episode(prompt, key, list(prompt.messages), temperature=temperature)
        environment = self.make_environment()
        seed = hash((key[:-1], prompt.number)) & 0x7FFFFFFF
        messages = call(environment.begin, prompt.row, prompt.messages, seed)
        self.keep_alive()
        if messages != prompt.messages:
            prompt.messages = messages
            prompt.ids = self.template.encode_prompt(messages, prompt.variables)
        return Episode(prompt, key, list(messages), environment, temperature=temperature)

    def _request(self, episodes: Sequence[Episode], turn: int) -> Request:
        context = episodes[0].prompt.ids + episodes[0].ids
        limit = min(self.options.max_new_tokens, self.max_length - len(context))
        return Request(context, [(*episode.key, turn) for episode in episodes], limit)

    def _continues(self, episode: Episode, sample: Sample) -> bool:
        """Append a response and the reply to it; return whether another response follows."""
        context = episode.prompt.ids + episode.ids
        response = self.parser.parse(context, sample.ids, episode.prompt.variables.get("tools"))
        episode.append(sample.ids, sample.logps)
        episode.messages = [*episode.messages, response.message]
        episode.text, episode.ended, episode.turns = response.text, sample.ended, episode.turns + 1
        if episode.environment is None or not sample.ended:
            return False
        reply = call(episode.environment.reply, response.message)
        self.keep_alive()
        episode.token_rewards[-1] += reply.reward
        if not reply.messages or episode.turns == self.options.max_turns:
            return False
        end = self.template.tokenizer.decode(sample.ids[-1:])
        text = text_after_response(self.template, episode.messages, reply.messages, episode.prompt.variables, end)
        ids = self.template.encoder.encode_text(text, before=end)
        if len(context) + len(sample.ids) + len(ids) >= self.max_length:
            episode.ended = False
            return False
        episode.append(ids)
        episode.messages = [*episode.messages, *reply.messages]
        return True


def text_after_response(
    template: Template, messages: Messages, reply: Messages, variables: Mapping[str, Any], end: str
) -> str:
    """Return the text between the end of the last response and the next one.

    Args:
        template: The chat template.
        messages: The conversation, which ends with a response.
        reply: The turns after it.
        variables: What the template is given besides.
        end: The text of the token that ends the response.
    """
    response: Message = messages[-1] | {"content": PLACEHOLDER}
    text = template.renderer.bind(variables).prompt([*messages[:-1], response, *reply])
    after = text[text.rindex(PLACEHOLDER) + len(PLACEHOLDER) :]
    _, found, rest = after.partition(end)
    return rest if found else after
