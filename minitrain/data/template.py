"""Examples -> token ids and loss mask, through the chat template.

The text is built as inference builds it: each answer follows exactly what the template gives with
`add_generation_prompt`. It is split at the borders of the answers and the pieces are tokenized one by one. So the ids
of a prompt are those of inference, no token crosses a border, and the mask is exact to the character.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from minitrain.config.schema import Config
from minitrain.errors import ConfigError, DataError

from .answers import Answer, Answered, find_answers, find_earlier
from .counts import LOST, TRAINED, UNREAD, UNREAD_ROW, UNTRAINED, Uses, count_uses
from .examples import OF_TEXTS, Conversation, Example, PlainText, Rollout
from .messages import LITERAL, Messages, assistant, is_trained_on, leaves, number_calls, split_reasoning, user
from .needles import Needles, lost_context, uses_of_turn, uses_of_variables
from .rendering import ChatRenderer, Rendering, set_defaults
from .sandbox import UnboundedTemplate
from .text_encoder import Piece, RenderedDocument, TextEncoder, Tokens, check_texts

# ChatML, with tools, calls and reasoning in the tags that Hermes and Qwen use.
CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\\n\\n' }}{%- endif %}
{{- 'You can call these functions:\\n<tools>\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
{{- '</tools>\\nTo call one, write its name and arguments:\\n<tool_call>\\n' }}
{{- '{"name": <name>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if not (tools and loop.first and message['role'] == 'system') %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}
{%- if message['reasoning_content'] %}
{{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message['content'] }}
{%- for call in message['tool_calls'] or [] %}
{{- '\\n' if message['content'] or not loop.first }}
{{- '<tool_call>\\n{"name": ' + call['function']['name'] | tojson + ', "arguments": ' }}
{{- call['function']['arguments'] | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


class Targets(NamedTuple):
    """The options of a config about what is trained on, and how it is checked."""

    train_on: str
    train_on_reasoning: bool
    on_missing: str
    split_special_tokens: bool


class Template:
    """A tokenizer with a chat template, made ready for training."""

    def __init__(
        self,
        tokenizer,
        chat_template: str = "auto",
        train_on: str = "all_turns",
        train_on_reasoning: bool = True,
        on_missing: str = "error",
        split_special_tokens: bool = True,
        variables: Mapping[str, Any] | None = None,
    ):
        """Set the tokenizer's template, and add ChatML's two tokens where ChatML is used and they are missing.

        Args:
            chat_template: auto, chatml, none, or the path of a Jinja file.
            train_on, train_on_reasoning, on_missing, split_special_tokens: See the options of a config.
            variables: Default values of the template's own variables, such as enable_thinking. They become a part of
                the template, so that a saved model has the prompts of its training.
        """
        self.tokenizer = tokenizer
        self.targets = Targets(train_on, train_on_reasoning, on_missing, split_special_tokens)
        if chat_template == "chatml" or (chat_template == "auto" and not tokenizer.chat_template):
            added = {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
            tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
            tokenizer.chat_template = CHATML
        elif chat_template == "none":
            tokenizer.chat_template = PLAIN
        elif chat_template != "auto":
            tokenizer.chat_template = _read(chat_template)
        if not isinstance(tokenizer.chat_template, str):
            raise ConfigError(
                "chat_template: the tokenizer has several templates. Name a .jinja file.", "invalid-template"
            )
        self.renderer = ChatRenderer(tokenizer.chat_template, tokenizer.special_tokens_map)
        self._try_out()
        if variables:
            tokenizer.chat_template = set_defaults(tokenizer.chat_template, variables)
            self.renderer = ChatRenderer(tokenizer.chat_template, tokenizer.special_tokens_map)
        self.has_markers = bool(re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template))
        self.encoder = TextEncoder(tokenizer)
        self.ends = self.encoder.ends
        self.ends.appends_eos = self._appends_eos()
        self.needles = Needles(on_missing, train_on_reasoning, "enable_thinking" in self.renderer.words)
        self._write_bos()

    def _try_out(self) -> None:
        try:
            self.renderer.bind({}).text([user("a"), assistant("b")])
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"chat_template: invalid Jinja in line {error.lineno}: {error.message}. Fix the template.",
                "invalid-template",
            ) from None
        except UnboundedTemplate as error:
            raise ConfigError(f"chat_template: {error}. Name another template.", "invalid-template") from None
        except jinja2.TemplateError:
            pass  # a template may refuse this very conversation

    def _write_bos(self) -> None:
        """Let the tokenizer's template write the BOS of training, if it writes none.

        transformers and inference servers add no BOS to the text of a chat template.
        """
        source = "{{- bos_token }}" + self.renderer.source
        with contextlib.suppress(jinja2.TemplateError, DataError):  # this very conversation may be refused
            prompts = [
                ChatRenderer(one, self.renderer.variables).bind({}).prompt([user("a")])
                for one in (self.renderer.source, source)
            ]
            without, with_bos = map(self.encoder.encode_text, prompts)
            if without != self.encoder.with_bos(without) == with_bos:
                self.tokenizer.chat_template = source

    def _appends_eos(self) -> bool:
        """Return whether the template writes EOS after the last turn, in addition to the token that ends each turn."""
        turns, eos_token = [user("a"), assistant("b"), user("c")], self.tokenizer.eos_token
        try:
            text, longer = (self.renderer.bind({}).text(turns[:n]) for n in (2, 3))
        except jinja2.TemplateError:
            return False
        without = text.removesuffix(eos_token)
        return without != text and longer.startswith(without) and bool(self.ends.end.search(without))

    def end_ids(self) -> list[int]:
        """Return the tokens that end a turn, for generation: EOS and those this template closes an answer with."""
        texts = [self.renderer.text_of_calls()]
        with contextlib.suppress(jinja2.TemplateError):  # it may refuse this very conversation
            texts.append(self.renderer.bind({}).text([user("a"), assistant("b")]))
        ends = {self.encoder.encode_text(self.ends.close(text))[-1] for text in texts if text}
        return sorted({self.tokenizer.eos_token_id} | ends)

    # ------------------------------------------------------------------------------------------------ conversations

    def encode(self, example: Conversation | PlainText, n_trained: int | None = None) -> Tokens:
        """Return the token ids and mask of a full example, not yet truncated.

        Args:
            n_trained: How many answers, counted from the last one, are trained on; by default what `train_on` says.

        Raises:
            DataError: The example cannot be encoded.
        """
        if isinstance(example, PlainText):
            check_texts([example.text])
            ids = self.encoder.with_bos(self.encoder.encode_text(example.text))
            if ids[-1:] != [self.tokenizer.eos_token_id]:
                ids.append(self.tokenizer.eos_token_id)
            return Tokens(ids, [False] + [True] * (len(ids) - 1))
        return self.encoder.join(self.render(example, n_trained))

    def render(self, example: Conversation, n_trained: int | None = None) -> RenderedDocument:
        """Return the text of a conversation, with its answers; see `encode`."""
        trained = self.trained_turns(example.messages, n_trained)
        messages = self._checked(example.messages[: trained[-1] + 1])
        rendering = self.renderer.bind(example.variables)
        document = self._render_answers(messages, trained, example.variables, self._find(rendering, messages))
        self._add_dropped(document, example.messages, trained)
        return document

    def render_turns(self, example: Conversation) -> list[RenderedDocument]:
        """Return a document for each answer that is trained on, as inference sees it.

        Raises:
            DataError: The example cannot be rendered.
        """
        trained = self.trained_turns(example.messages)
        messages = self._checked(example.messages[: trained[-1] + 1])
        rendering = self.renderer.bind(example.variables)
        documents, found = [], None
        for i in trained:
            found = self._find(rendering, messages[: i + 1], found)
            documents.append(self._render_answers(messages[: i + 1], [i], example.variables, found))
        self._add_dropped(documents[-1], example.messages, trained)
        return documents

    def unread_variables(self, example: Example) -> list[str]:
        """Return what a row gives for the chat template that this one does not read."""
        if isinstance(example, PlainText) or (isinstance(example, Rollout) and not isinstance(example.response, str)):
            return list(example.variables)  # it is not rendered
        return self.renderer.unread_variables(example.variables)

    def trained_turns(self, messages: Messages, n_trained: int | None = None) -> list[int]:
        """Return the indices of the answers that are trained on. Raises DataError if there are none."""
        if n_trained is None and self.targets.train_on == "last_turn":
            n_trained = 1
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [i for i in answers[-n_trained if n_trained else None :] if is_trained_on(messages[i])]
        if not trained:
            raise DataError(
                "no turn of the assistant has a weight above 0, so there is nothing to train on", "no-answer"
            )
        return trained

    def encode_prompt(self, messages: Messages, variables: Mapping[str, Any] | None = None) -> list[int]:
        """Return the ids up to where the assistant begins to answer, made as in training.

        Raises:
            DataError: The prompt cannot be rendered, or lacks a tool.
        """
        messages = self._checked(messages)
        rendering = self.renderer.bind(variables or {})
        try:
            prompt = rendering.prompt(messages)
            answers = find_earlier(rendering, messages, prompt, self.ends).answers if len(messages) > 1 else []
        except jinja2.TemplateError as error:
            raise _refused(error) from None
        tools = (variables or {}).get("tools") or []
        if self.targets.on_missing == "error" and (lost := lost_context({}, tools, prompt)):
            raise DataError(
                f"tools: the chat template leaves out {lost[0]}. Use one that writes tools, or remove them",
                "lost-field",
            )
        return self.encoder.join(RenderedDocument(_split(prompt, answers, {}))).ids

    def count_prompt(self, messages: Messages, variables: Mapping[str, Any] | None = None) -> Counter:
        """Return what becomes of the fields of a prompt, as counts like those of training data."""
        variables, messages = variables or {}, self._checked(messages)
        try:
            text = self.renderer.bind(variables).prompt(messages)
        except jinja2.TemplateError as error:
            raise _refused(error) from None
        uses = self._uses(messages, {}, text) | {(-1, name): key for name, key in uses_of_variables(variables, text)}
        keys = [f"{LOST}{lost}" for lost in lost_context(dict(enumerate(messages)), [], text)]
        keys += [UNREAD_ROW + name for name in self.renderer.unread_variables(variables)]
        return count_uses(uses) + Counter(keys)

    def _find(self, rendering: Rendering, messages: Messages, earlier: Answered | None = None) -> Answered:
        try:
            return find_answers(rendering, messages, self.ends, self.has_markers, earlier)
        except jinja2.TemplateError as error:
            raise _refused(error) from None

    def _render_answers(
        self, messages: Messages, trained: Collection[int], variables: Mapping[str, Any], found: Answered
    ) -> RenderedDocument:
        """Return the document of a conversation that ends with an answer."""
        answers = found.answers
        spans = {i: "".join(found.text[a.start : a.stop] for a in answers if a.turn == i) for i in trained}
        n_literal = found.text.count(LITERAL)
        counts = {"literal-tokens": n_literal} if n_literal else {}
        counts |= self.needles.check(messages, trained, variables, found)
        weights = {i: messages[i].get("weight", 1.0) for i in trained}
        pieces = _split(found.text, answers, weights)
        if not self.targets.train_on_reasoning:
            pieces = [_without_reasoning(piece, messages) for piece in pieces]
        uses = self._uses(messages, spans, found.text)
        uses |= {(-1, name): key for name, key in uses_of_variables(variables, found.text)}
        return RenderedDocument(pieces, counts, sorted(trained), uses)

    def _uses(self, messages: Messages, spans: Mapping[int, str], text: str, start: int = 0) -> Uses:
        """Return what becomes of the fields of messages.

        Args:
            spans: Turn -> the text that is trained on for it.
            start: The turn of the first message.
        """
        uses: Uses = {}
        for i, message in enumerate(messages, start):
            for name, key in uses_of_turn(message, spans.get(i, ""), text):
                uses[i, name] = key
            for key in self.renderer.unread_keys(message):
                uses[i, f"key {key}"] = UNREAD + key
            if not self.targets.train_on_reasoning and uses.get((i, "reasoning"), "").endswith(f":{TRAINED}"):
                uses[i, "reasoning"] = f"reasoning:{UNTRAINED}"
        return uses

    def _add_dropped(self, document: RenderedDocument, messages: Messages, trained: list[int]) -> None:
        """Count the turns after the last one that is trained on."""
        if dropped := messages[trained[-1] + 1 :]:
            document.counts["dropped-turns"] = len(dropped)
            document.uses |= self._uses(dropped, {}, "", start=trained[-1] + 1)

    def _checked(self, messages: Messages) -> Messages:
        """Return messages whose calls have ids, and whose special tokens in the text of users and tools are marked."""
        check_texts([leaf for message in messages for leaf in leaves(message) if isinstance(leaf, str)])
        messages = number_calls(messages)
        if not self.targets.split_special_tokens:
            return messages
        return [
            message | {"content": self.encoder.mark_literals(message["content"])}
            if message["role"] in ("user", "tool")
            else message
            for message in messages
        ]


def make_template(tokenizer, config: Config, kind: str) -> Template:
    """Return the template for records of a type; texts to classify are read as they are."""
    chat_template = "none" if kind in OF_TEXTS else config.chat_template
    targets = {name: getattr(config, name) for name in Targets._fields}
    return Template(tokenizer, chat_template, **targets, variables=config.chat_template_kwargs)


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"chat_template: expected auto, chatml, none or a text file, got {file!r}.", "not-found"
        ) from None


def _refused(error: jinja2.TemplateError) -> DataError:
    return DataError(f"the chat template refuses the conversation: {error}", "invalid-template")


def _split(text: str, answers: list[Answer], weights: Mapping[int, float]) -> list[Piece]:
    """Split a text into the answers, each with its weight, and the pieces between them."""
    pieces, position = [], 0
    for answer in answers:
        pieces.append(Piece(text[position : answer.start]))
        pieces.append(Piece(text[answer.start : answer.stop], weights.get(answer.turn, 0.0), turn=answer.turn))
        position = answer.stop
    return [*pieces, Piece(text[position:])]


def _without_reasoning(piece: Piece, messages: Messages) -> Piece:
    """Return a piece whose reasoning is not trained on."""
    reasoning = split_reasoning(messages[piece.turn])[0] if piece.turn is not None else ""
    start = piece.text.find(reasoning) if reasoning else -1
    return piece if start < 0 else piece._replace(untrained=(start, start + len(reasoning)))
