"""The checks of a causal language model. Each returns nothing, or raises AssertionError or an error of minitrain."""

import functools
import re
import shutil
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from minitrain import Trainer
from minitrain.batch import Batch
from minitrain.config.schema import Config
from minitrain.inference.generate import Sampling, load_generator
from minitrain.inference.merge import merge_adapters
from minitrain.model.load import META, build_policy, load_tokenizer
from minitrain.model.quantize import is_quantized
from tests.architectures import oracle
from tests.architectures.oracle import (
    N_PROMPT,
    N_SHARED,
    Gradients,
    NotApplicableError,
    assert_equal,
    assert_moved,
    documents,
    dtypes_of,
    logits_of,
    make_batch,
    padded_batch,
)
from tests.architectures.tiny import tiny_causal_model


class Causal:
    """The checks of one model type."""

    def __init__(self, kind: str, folder: Path):
        self.folder = folder
        oracle.write_data(folder)
        shutil.rmtree(folder / "base", ignore_errors=True)
        model = tiny_causal_model(kind)
        self.class_name = type(model).__name__
        self.base = oracle.save_base(model, folder / "base")

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @functools.cached_property
    def model(self) -> nn.Module:
        return self.load(self.base)

    @functools.cached_property
    def expected(self) -> tuple[Tensor, Gradients]:
        return oracle.logps_and_gradients(self.model, documents())

    def trainer(self, *overrides: str) -> Trainer:
        shutil.rmtree(self.folder / "runs", ignore_errors=True)
        return Trainer(self._config(*overrides))

    def trained(self, *overrides: str) -> tuple[nn.Module, Path]:
        """Train, and return the model and the folder of its final/."""
        trainer = self.trainer(*overrides)
        trainer.train()
        return trainer.generator.model.eval(), trainer.run.final

    # ------------------------------------------------------------------------- logps and gradients

    def padded(self):
        """Documents that are padded to one length."""
        self._compare(self.trainer(), padded_batch())

    def packed(self):
        """All documents in one row, and two in each of two rows."""
        self._packed(self.trainer("packing=true"))

    def eager(self):
        """Documents that are packed, with attention in eager mode."""
        self._packed(self.trainer("packing=true", "model.attn_implementation=eager"))

    def _packed(self, trainer: Trainer) -> None:
        first, second, third, fourth = ((document, 0) for document in documents())
        self._compare(trainer, make_batch([[first, second, third, fourth]]))
        self._compare(trainer, make_batch([[first, second], [third, fourth]]))

    def shared(self):
        """Packed documents that share a prompt, which the row has once."""
        trainer = self.trainer("packing=true")
        if not trainer.policy.supports_document_masking:
            raise NotApplicableError("its packed rows do not share prompts")
        docs, n_shared = oracle.documents_with_shared_prompts(), (0, N_SHARED, 0, N_SHARED)
        expected = oracle.logps_and_gradients(self.model, docs, [max(N_PROMPT, n) for n in n_shared])
        self._compare(trainer, make_batch([zip(docs, n_shared, strict=True)]), expected)

    def checkpointing(self):
        """Activation checkpointing, which saves memory only if it reaches the blocks that are called."""
        trainer = self.trainer("activation_checkpointing=true")
        n_saved, n_without = (_n_saved_tensors(other) for other in (trainer, self.trainer()))
        assert n_saved < n_without, "activation checkpointing saves no memory"
        self._compare(trainer, padded_batch())

    def frozen(self):
        """Frozen layers have no gradient; the others have that of full training."""
        trainer = self.trainer("freeze_layers=[0,embeddings]")
        _, actual = _compute(trainer, padded_batch())
        parameters = dict(trainer.policy.model.named_parameters())
        frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
        oracle.assert_same_gradients(actual, {n: g for n, g in self.expected[1].items() if n not in frozen})
        blocks = [name for name in self.expected[1] if re.search(r"\.0\.", name)]
        assert not blocks or frozen.intersection(blocks), "nothing of the first block is frozen"

    def bfloat16(self):
        """Finite gradients and about the same loss, for full training and LoRA."""
        for overrides in ([], ["lora.rank=4"]):
            trainer = self.trainer("model.policy_dtype=bfloat16", *overrides)
            with trainer.precision.autocast():
                logps, gradients = _compute(trainer, padded_batch())
            assert_equal("mean logps", logps.mean(), self.expected[0].mean(), 0.1)
            assert all(gradient.isfinite().all() for gradient in gradients.values()), "a gradient is not finite"

    def _compare(self, trainer: Trainer, batch: Batch, expected: tuple[Tensor, Gradients] | None = None) -> None:
        logps, gradients = _compute(trainer, batch)
        expected_logps, expected_gradients = expected or self.expected
        assert_equal("logps", logps, expected_logps)
        oracle.assert_same_gradients(gradients, expected_gradients)

    # ------------------------------------------------------------------------ reading and writing

    def meta(self):
        """The model that `validate` measures has the parameters of the loaded one."""
        config = self._config()
        policies = [
            build_policy(config, load_tokenizer(config.model), device)[0] for device in (META, torch.device("cpu"))
        ]
        meta, full = ({n: p.shape for n, p in policy.named_parameters()} for policy in policies)
        assert meta == full, f"parameters differ: {sorted(set(meta.items()) ^ set(full.items()))[:1]}"

    def sharded(self):
        """The parameters of a model that is read by shards, as each rank does."""
        config, cpu = self._config(), torch.device("cpu")
        policy, weights = build_policy(config, load_tokenizer(config.model), cpu, sharded=True)
        if weights is None:
            raise NotApplicableError("its files are read as a whole: transformers converts their tensors")
        full, _ = build_policy(config, load_tokenizer(config.model), cpu)
        expected = dict(full.named_parameters()) | dict(full.named_buffers())
        for name, parameter in policy.named_parameters():
            rows = weights.rows(name.removeprefix("model."), 0, len(parameter) if parameter.ndim else 1)
            assert torch.equal(rows.reshape(expected[name].shape).float(), expected[name].float()), f"{name} differs"
        for name, buffer in policy.named_buffers():
            same = not buffer.is_meta and torch.allclose(buffer.float(), expected[name].float(), equal_nan=True)
            assert same, f"{name} differs"

    def _config(self, *overrides: str) -> Config:
        return oracle.make_config(self.folder, self.base, "chat_template=chatml", *overrides)

    def final(self):
        """final/ loads in transformers without a difference, and its files have the names of the base's."""
        model, final = self.trained()
        saved, info = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"], f"missing: {sorted(info['missing_keys'])[:1]}"
        assert not info["unexpected_keys"], f"unexpected: {sorted(info['unexpected_keys'])[:1]}"
        assert_equal("logits of final/", logits_of(saved), logits_of(model))
        names = set(dtypes_of(self.base)) ^ set(dtypes_of(final))
        assert not names, f"names differ: {sorted(names)[:1]}"
        assert_moved(logits_of(saved), logits_of(self.model))

    def float32(self):
        """At lr 0, final/ of a bfloat16 run is the base in bfloat16, with what transformers keeps in float32."""
        _, final = self.trained("model.policy_dtype=bfloat16", "n_steps=1", "lr=0.0")
        base = self.load(self.base, torch.bfloat16)
        try:
            expected = logits_of(base)
        except RuntimeError as error:
            raise NotApplicableError("transformers cannot compute it in bfloat16") from error
        base.save_pretrained(self.folder / "bfloat16")
        dtypes = dtypes_of(final)
        rounded = [n for n, t in dtypes_of(self.folder / "bfloat16").items() if t == "F32" and dtypes.get(n, t) != t]
        assert not rounded, f"{sorted(rounded)[0]} is rounded"
        saved = self.load(final, torch.bfloat16)
        assert torch.equal(logits_of(saved), expected), "logits of final/ differ"

    def lora(self):
        """LoRA on all linear layers has the same logits in PEFT, loaded again, and merged."""
        model, final = self.trained("lora.rank=4", "lora.target_modules=all-linear")
        expected = logits_of(model)
        assert_moved(expected, logits_of(self.model))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            in_peft = PeftModel.from_pretrained(self.load(self.base), final)
        ignored = [str(warning.message) for warning in caught if "missing" in str(warning.message).lower()]
        assert_equal("logits in PEFT", logits_of(in_peft), expected, 3 * oracle.TOLERANCE)
        assert not ignored, f"PEFT warns: {ignored[0][:80]}"
        run = shutil.copytree(self.folder / "runs", self.folder / "lora", dirs_exist_ok=True) / "run"
        again = self.trainer(f"model.adapter={run / 'final'}").generator.model
        assert_equal("logits loaded again", logits_of(again), expected, 3 * oracle.TOLERANCE)
        merge_adapters([str(run)], self.folder / "merged")
        merged = logits_of(self.load(self.folder / "merged"))
        assert_equal("merged logits", merged, expected, 3 * oracle.TOLERANCE)

    def long(self):
        """Rows that are longer than the model's table of positions are refused, the others are trained on."""
        self.trained(f"datasets=[{self.folder / 'long.jsonl'}]", "max_length=512", "n_steps=1")

    def four_bits(self):
        """Quantization reaches 9 of 10 weights of the matrices in blocks, or the report names the others."""
        policy = self.trainer("lora.rank=4", "model.quantization=4bit").policy
        parameters = dict(policy.named_parameters()).items()
        packed = sum(2 * p.numel() for _, p in parameters if is_quantized(p))
        vocabulary = {
            id(one.weight) for one in (policy.model.get_input_embeddings(), policy.model.get_output_embeddings())
        }
        others = [(n, p) for n, p in parameters if not is_quantized(p) and id(p) not in vocabulary]
        matrices = [p.numel() for n, p in others if _is_matrix(n, p)]
        share = packed / (packed + sum(matrices))
        is_reported = "quantized (not " in policy.model.matrices
        assert share > 0.9 or is_reported, f"only {share:.0%} of the matrices are quantized"

    # ------------------------------------------------------------------------------------ generation

    def generate(self):
        """Greedy responses equal those of transformers, one by one and in a batch."""
        prompts = [documents()[0][:12].tolist(), documents()[2][:7].tolist(), documents()[2][:15].tolist()]
        generator = load_generator(str(self.base), "cpu", "chatml")
        try:
            expected = [self._transformers_generate(generator.tokenizer, prompt) for prompt in prompts]
        except Exception as error:
            raise NotApplicableError(f"{type(error).__name__} in generate of transformers") from error
        single = [generator.generate_from_ids([prompt], Sampling(8))[0].text for prompt in prompts]
        assert single == expected, "responses one by one differ"
        batch = [response.text for response in generator.generate_from_ids(prompts, Sampling(8))]
        assert batch == expected, "responses in a batch differ"

    def _transformers_generate(self, tokenizer, prompt: list[int]) -> str:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0, "max_new_tokens": 8}
        output = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        response = output[0, len(prompt) :].tolist()
        response = response[: response.index(2)] if 2 in response else response
        return tokenizer.decode(response, skip_special_tokens=True)


CHECKS = ("padded", "packed", "eager", "shared", "checkpointing", "frozen", "bfloat16", "meta", "sharded", "generate")
CHECKS += ("final", "float32", "lora", "long", "four_bits")


def _compute(trainer: Trainer, batch: Batch) -> tuple[Tensor, Gradients]:
    """Return the logps of a batch, and the gradients of their mean."""
    trainer.policy.zero_grad(set_to_none=True)
    logps = trainer.policy(batch).logps  # [N]
    (-logps.mean()).backward()
    return logps.detach(), oracle.gradients(trainer.policy, "model.")


def _n_saved_tensors(trainer: Trainer) -> int:
    """Return how many tensors a forward pass saves for the backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(1) or tensor, lambda tensor: tensor):
        trainer.policy(padded_batch())
    return len(saved)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter is a matrix, or a stack of them, that LoRA does not train, outside of vocabularies."""
    outside = re.search("lora_|embed|lm_head|wte|wpe|conv", name)
    return parameter.ndim >= 2 and min(parameter.shape) > 1 and not outside
