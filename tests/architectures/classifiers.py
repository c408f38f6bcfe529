"""The checks of a model with a head for labels. Each returns nothing, or raises an error."""

import functools
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minitrain import Trainer
from minitrain.batch import Batch
from minitrain.inference.merge import merge_adapters
from tests.architectures import oracle
from tests.architectures.oracle import (
    Gradients,
    assert_equal,
    assert_same_gradients,
    documents,
    logits_of,
    make_batch,
    padded_batch,
)
from tests.architectures.tiny import tiny_causal_model, tiny_classifier

TARGETS = torch.tensor([0, 1, 2, 0])  # labels of the documents


class Classifier:
    """The checks of one model type."""

    def __init__(self, kind: str, folder: Path):
        self.kind, self.folder = kind, folder
        oracle.write_data(folder)
        model = tiny_classifier(kind)
        self.class_name = type(model).__name__
        model.config.architectures = [self.class_name]
        self.base = oracle.save_base(model, folder / "base")

    def load(self, folder: Path) -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    @functools.cached_property
    def expected(self) -> tuple[Tensor, Gradients]:
        """The scores of single documents, and the gradients of their cross entropy."""
        model = self.load(self.base)
        rows = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in documents()]
        scores = torch.cat([model(**row).logits.float() for row in rows])  # [D, L]
        F.cross_entropy(scores, TARGETS).backward()
        return scores.detach(), oracle.gradients(model)

    def trainer(self, base: Path, *overrides: str) -> Trainer:
        shutil.rmtree(self.folder / "runs", ignore_errors=True)
        return Trainer(oracle.make_config(self.folder, base, *overrides))

    def labels_trainer(self, *overrides: str) -> Trainer:
        data = f"datasets=[{self.folder / 'labels.jsonl'}]"
        return self.trainer(self.base, "loss.name=classify", data, *overrides)

    def padded(self):
        """Documents that are padded to one length."""
        self._compare(self.labels_trainer(), padded_batch())

    def packed(self):
        """Two documents in each of two rows."""
        first, second, third, fourth = ((document, 0) for document in documents())
        self._compare(self.labels_trainer("packing=true"), make_batch([[first, second], [third, fourth]]))

    def _compare(self, trainer: Trainer, batch: Batch) -> None:
        scores = trainer.policy(batch).scores  # [D, L]
        F.cross_entropy(scores, TARGETS).backward()
        assert_equal("scores", scores.detach(), self.expected[0])
        assert_same_gradients(oracle.gradients(trainer.policy, "model."), self.expected[1])

    def classify(self):
        """final/ of a trained classifier loads in transformers with the same scores."""
        trainer = self.labels_trainer()
        trainer.train()
        self._compare_final(trainer)

    def pairwise(self):
        """The same for a reward model, which begins as a model without a head."""
        base = self.folder / "headless"
        if self.kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            oracle.save_base(tiny_causal_model(self.kind), base)
        else:
            oracle.save_base(AutoModel.from_pretrained(self.base), base)
        data = f"datasets=[{self.folder / 'pairs.jsonl'}]"
        trainer = self.trainer(base, "loss.name=pairwise", data, "chat_template=chatml")
        trainer.train()
        self._compare_final(trainer)

    def _compare_final(self, trainer: Trainer) -> None:
        saved, info = AutoModelForSequenceClassification.from_pretrained(
            trainer.run.final, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"], f"missing: {sorted(info['missing_keys'])[:1]}"
        assert not info["unexpected_keys"], f"unexpected: {sorted(info['unexpected_keys'])[:1]}"
        assert_equal("scores of final/", logits_of(saved), logits_of(trainer.generator.model))

    def lora(self):
        """A LoRA with its head has the same scores in PEFT, and merged."""
        trainer = self.labels_trainer("lora.rank=4")
        trainer.train()
        expected = logits_of(trainer.generator.model)
        in_peft = PeftModel.from_pretrained(self.load(self.base), trainer.run.final)
        assert_equal("scores in PEFT", logits_of(in_peft), expected, 3 * oracle.TOLERANCE)
        merge_adapters([str(trainer.run.final)], self.folder / "merged")
        assert_equal("merged scores", logits_of(self.load(self.folder / "merged")), expected, 3 * oracle.TOLERANCE)


CHECKS = ("padded", "packed", "classify", "pairwise", "lora")
