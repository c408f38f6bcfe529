"""Check that other programs say the same as minitrain with a saved model or adapter: `minitrain check`."""

import contextlib
import copy
import dataclasses
import logging
import re
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from minitrain.config.sections import ModelConfig
from minitrain.data.template import Template
from minitrain.errors import ConfigError
from minitrain.io.paths import looks_local
from minitrain.model.adapter_config import FILE, read_config
from minitrain.model.adapter_files import PREFIX, load_adapter
from minitrain.model.diagnostics import describe_head, first_line, model_load_error
from minitrain.model.load import load_base, load_merged, load_model, load_tokenizer, trained_outputs
from minitrain.model.pretrained import auto_class, no_progress_bar, quantization_of, read_model_config
from minitrain.model.weights import open_files, weight_files

from .check_prompts import choose_prompts
from .generate import model_config, saved_dtype
from .parity import LOST_SUM, TOLERANCE, Comparison, Report, end_ids_of, own_answers, transformers_answers
from .resolve import find_model
from .served import Answer, Server
from .serving import serve_commands

LOGITS_TOLERANCE = 1e-3  # of logits in float32, relative to the largest one if that exceeds 1
N_TOKENS = 16
LAYER = re.compile(r"\.(lora_|token_adapter|base_layer|modules_to_save)")  # what follows a module in PEFT's keys


@dataclasses.dataclass
class Check:
    """Lines of the report by topic, whether everything was reached and equal, and the first difference of responses."""

    lines: dict[str, str] = dataclasses.field(default_factory=dict)
    passed: bool = True
    difference: str | None = None
    cause: str | None = None
    commands: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def count(self, topic: str, names: set[str], missing: set[str], unused: set[str] = frozenset()) -> None:
        """Report how many of the names were reached."""
        parts = [f"{len(names) - len(missing)} of {len(names)} reached"]
        parts += [f"not reached: {_first(missing)}"] if missing else []
        parts += [f"not used: {_first(unused)}"] if unused else []
        self.lines[topic], self.passed = "; ".join(parts), self.passed and not missing and not unused

    def compare(self, topic: str, actual: Tensor, expected: Tensor) -> None:
        """Report the largest difference of logits."""
        difference, largest = float((actual - expected).abs().max()), float(expected.abs().max())
        is_close = difference <= LOGITS_TOLERANCE * max(1.0, largest)  # False if it is NaN
        verdict = "equal" if is_close else "different"
        self.lines[topic] = f"{verdict}, largest difference {difference:.2g} of logits up to {largest:.2g}"
        self.passed = self.passed and is_close

    def add(self, report: Report) -> None:
        """Add the findings about the responses of a program."""
        self.lines |= report.lines
        if report.difference is not None and self.difference is None:
            self.passed, self.difference, self.cause = False, report.difference, report.cause


class Responses:
    """Prompts, and minitrain's responses to them.

    Args:
        source: The run directory or folder that is checked.
        template: Its chat template with the tokenizer.
        prompts: A file of prompts; see `choose_prompts`.
        n: Number of prompts.
        max_new_tokens: Maximum number of tokens of a response.
    """

    def __init__(self, source: str, template: Template, prompts: str | None, n: int, max_new_tokens: int):
        self.template, self.max_new_tokens = template, max_new_tokens
        self.prompts, self.where = choose_prompts(source, prompts, n, template)
        self.own: list[Answer] = []

    def generate(self, model: nn.Module) -> None:
        """Generate minitrain's responses."""
        self.own = own_answers(model, self.template, self.prompts, self.max_new_tokens)

    def compare(self, check: Check, model: nn.Module, config: ModelConfig, where: str) -> None:
        """Compare with the responses of a model in transformers, with the tokenizer in its files."""
        from transformers import AutoTokenizer

        name = config.tokenizer_name_or_path or config.name_or_path
        # The generation_config.json of an adapter's base model can lack an end token of training. Users pass it then.
        end_ids = self.template.end_ids() if config.adapter else None
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
            answers = transformers_answers(model, tokenizer, self.template, self.prompts, self.max_new_tokens, end_ids)
        except Exception as error:  # a model can refuse its cache, or a template the conversation
            check.lines[f"responses {where}"], check.passed = f"not generated: {first_line(error)}", False
            return
        check.add(Comparison(model, self.template, self.own, "float32").with_answers(answers, where))


def check_model(
    source: str,
    base: str | None = None,
    trust_remote_code: bool = False,
    prompts: str | None = None,
    n_prompts: int = 20,
    max_new_tokens: int = 32,
    server: Server | None = None,
    dtype: str | None = None,
) -> Check:
    """Load a saved model or adapter with the class of its files, and compare its logits with those of minitrain.

    For a language model with a chat template, compare greedy responses and their log-probabilities, too.

    Args:
        source: A run directory, or the folder of a model or of an adapter.
        base: The base model (default: that of the adapter, or the model itself).
        trust_remote_code: Run code that comes with the model.
        prompts: A file of prompts (default: rows that the run is evaluated on, or prompts that come with minitrain).
        n_prompts: Number of prompts.
        max_new_tokens: Maximum number of tokens of a response.
        server: A server to compare with, too.
        dtype: Name of the dtype that the server computes in (default: that of config.json).

    Raises:
        ConfigError: A model cannot be loaded, or is of a kind that cannot be checked.
    """
    config = model_config(find_model(source), trust_remote_code)
    if base is not None and looks_local(base) and not Path(base).is_dir():
        raise ConfigError(f"--base: {base} does not exist (relative to {Path.cwd()}). Check the path.", "not-found")
    if config.adapter is not None and read_config(Path(config.adapter))["peft_type"] != "LORA":
        raise ConfigError(f"{source}: is a soft prompt, which adapts no modules. Check LoRA only.", "unsupported-model")
    if config.adapter is not None and (base or config.name_or_path) == "tiny":
        advice = "Merge the adapter (minitrain merge), and check the merged model."
        raise ConfigError(f"{source}: its base model `tiny` has no files to load. {advice}", "unsupported-model")
    outputs, check, responses = trained_outputs(config), Check(), None
    tokenizer = load_tokenizer(config, scores=outputs is not None)
    if outputs is None and tokenizer.chat_template:
        responses = Responses(source, Template(tokenizer), prompts, n_prompts, max_new_tokens)
    elif server is not None or prompts is not None:
        reason = "returns scores, not text" if outputs else "has no chat template"
        raise ConfigError(f"{source}: the model {reason}. Remove --url and --prompts.", "unsupported-model")
    base_config = dataclasses.replace(config, name_or_path=base, revision=None) if base is not None else config
    check_files = _check_full if config.adapter is None else _check_adapter
    model = check_files(check, config, base_config, tokenizer, responses)
    if responses is not None:
        check.lines["prompts"] = f"{len(responses.prompts)} from {responses.where}"
        saved = saved_dtype(config) or "float32"
        check.commands = serve_commands(source, config, responses.template, saved, end_ids_of(model))
        if server is not None:
            tolerance = max(TOLERANCE, LOST_SUM * model.get_input_embeddings().weight.shape[0])
            comparison = Comparison(model, responses.template, responses.own, dtype or saved, tolerance)
            prompts_left = tqdm(responses.prompts, unit=" prompts", disable=None, leave=False)
            answers = [server.answer(prompt, max_new_tokens) for prompt in prompts_left]
            check.add(comparison.with_answers(answers, "of the server"))
    return check


def _check_full(
    check: Check, config: ModelConfig, base: ModelConfig, tokenizer, responses: Responses | None
) -> nn.Module:
    """Check a model against its base model, and return it as transformers loads it."""
    outputs = trained_outputs(config)
    own = load_model(config, tokenizer, 0, torch.float32, outputs)
    expected = _logits(own)
    if responses is not None:
        responses.generate(own)
    del own
    model, info = _load_alone(config, outputs)
    missing = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    check.lines["class"] = type(model).__name__
    check.count("tensors", set(model.state_dict()), missing, set(info["unexpected_keys"]))
    if base.name_or_path != config.name_or_path:
        own_class = (_read_config(base).architectures or [""])[0]
        if own_class != type(model).__name__:
            check.lines["class"], check.passed = f"{type(model).__name__}; the base model is {own_class}", False
        names, saved = _names_in_files(base), _names_in_files(config)
        check.count("names of the base model", names, names - saved)
    check.compare("logits", _logits(model), expected)
    if responses is not None:
        responses.compare(check, model, config, "in transformers")
    return model


def _check_adapter(
    check: Check, config: ModelConfig, base: ModelConfig, tokenizer, responses: Responses | None
) -> nn.Module:
    """Check an adapter with its base model, and return the merged model."""
    folder, outputs, config = Path(config.adapter), trained_outputs(config), base
    adapted = load_base(config, tokenizer)
    load_adapter(adapted, folder)
    expected, n_rows = _logits(adapted), adapted.get_input_embeddings().weight.shape[0]
    if responses is not None:
        responses.generate(adapted)
    del adapted
    model, _ = _load_alone(config, outputs)
    check.lines["class"] = type(model).__name__
    with safe_open(folder / FILE, "pt") as file:
        layers = {_layer(key) for key in file.keys()}  # noqa: SIM118
    check.count("modules", layers, layers - dict(model.named_modules()).keys())
    if model.get_input_embeddings().weight.shape[0] < n_rows:
        model.resize_token_embeddings(n_rows, mean_resizing=False)
    if find_spec("peft") is None:
        check.lines["logits in PEFT"] = "not compared, peft is not installed. Run pip install minitrain[peft]"
    elif config.quantization == "none":
        _compare_peft(check, copy.deepcopy(model), config, expected, responses)
    merged = load_merged(config, tokenizer).state_dict()
    unused = model.load_state_dict(merged, strict=False).unexpected_keys
    check.count("merged weights", set(merged), set(unused))
    check.compare("logits when merged", _logits(model), expected)
    if responses is not None and "responses in PEFT" not in check.lines:
        responses.compare(check, model, config, "when merged")
    return model


def _compare_peft(
    check: Check, model: nn.Module, config: ModelConfig, expected: Tensor, responses: Responses | None
) -> None:
    """Compare with the logits and responses in PEFT, which changes the model."""
    with _silenced():
        from peft import PeftModel

        try:
            adapted = PeftModel.from_pretrained(model, config.adapter)
        except Exception as error:  # PEFT refuses some layers, each with an error of its own
            check.lines["logits in PEFT"], check.passed = f"PEFT refuses the adapter: {first_line(error)}", False
            return
        check.compare("logits in PEFT", _logits(adapted), expected)
        if responses is not None:
            responses.compare(check, adapted, config, "in PEFT")


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Within the context, hide warnings of other libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _read_config(config: ModelConfig, **changes):
    try:
        return read_model_config(config, **changes)
    except Exception as error:
        raise model_load_error(config, "model", error) from None


def _load_alone(config: ModelConfig, outputs: list[str] | None) -> tuple[nn.Module, dict]:
    """Return the model in a folder, loaded by transformers with the class that its config.json names."""
    import transformers

    hf_config = _read_config(config, **({} if outputs is None else {"num_labels": len(outputs)}))
    if quantization_of(hf_config) is not None:
        reason = f"{config.name_or_path}: its weights are quantized. Merge the adapter, and check the merged model"
        raise ConfigError(f"{reason}.", "unsupported-model")
    name = (hf_config.architectures or [""])[0]
    model_class = getattr(transformers, name, None)
    try:
        if model_class is None or (outputs is not None and not name.endswith("ForSequenceClassification")):
            model_class = auto_class(hf_config, outputs)
        with no_progress_bar():
            model, info = model_class.from_pretrained(
                config.name_or_path,
                config=hf_config,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:
        raise model_load_error(config, describe_head(outputs), error) from None
    return model, info


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    """Return the logits of a few tokens, float32, shape [1, T, V], or [1, L] of a scalar head."""
    ids = torch.arange(3, 3 + N_TOKENS) % model.config.get_text_config().vocab_size
    return model.eval()(input_ids=ids[None]).logits.float()


def _layer(key: str) -> str:
    name = key.removeprefix(PREFIX)
    return LAYER.split(name, maxsplit=1)[0] if LAYER.search(name) else name.rpartition(".")[0]


def _names_in_files(config: ModelConfig) -> set[str]:
    return set(open_files(weight_files(config.name_or_path, config.revision)))


def _first(names: set[str]) -> str:
    others = f" and {len(names) - 1} others" if len(names) > 1 else ""
    return f"{min(names)}{others}"
