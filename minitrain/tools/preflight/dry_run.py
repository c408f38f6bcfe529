"""Prepare a training without loading weights, for `inspect` and `validate`."""

import dataclasses
from dataclasses import dataclass

from minitrain.config.schema import Config
from minitrain.data.loader import Data, MicrobatchLoader, TokenizedDataset
from minitrain.data.template import Template
from minitrain.losses import Loss, create_loss
from minitrain.model.load import META, build_policy
from minitrain.model.policy import Policy
from minitrain.model.save import check_saving
from minitrain.training.setup import make_loader, read_data


@dataclass
class DryRun:
    """A prepared training.

    Attributes:
        config: The full config.
        loss: The loss.
        template: The chat template with its tokenizer.
        data: The tokenized training and evaluation data.
        policy: The policy on the meta device.
    """

    config: Config
    loss: Loss
    template: Template
    data: Data
    policy: Policy

    def loader(self, examples: TokenizedDataset) -> MicrobatchLoader:
        """Return the loader of a trainer on one device."""
        return make_loader(examples, self.config, self.template.tokenizer, self.policy)

    def with_packing(self, packing: bool) -> "DryRun":
        """Return the same training with or without packing."""
        config = dataclasses.replace(self.config, packing=packing)
        return dataclasses.replace(self, config=config, policy=_build_policy(config, self.template, self.loss))

    def build_policy(self, quantized: bool = False) -> Policy:
        """Return another policy on the meta device; with `quantized`, its quantized layers have their final size."""
        return _build_policy(self.config, self.template, self.loss, quantized)


def dry_run(config: Config) -> DryRun:
    """Read the data as the trainer does, and the model's config only.

    Raises:
        ConfigError: An option does not fit the model or the data.
        DataError: A data row cannot be used.
    """
    loss = create_loss(**config.loss)
    template, data = read_data(config, loss)
    policy = _build_policy(config, template, loss)
    check_saving(policy.model, template.tokenizer)
    return DryRun(config, loss, template, data, policy)


def _build_policy(config: Config, template: Template, loss: Loss, quantized: bool = False) -> Policy:
    """Build a policy on the meta device. With `quantized`, layers are packed as quantization packs them."""
    if not quantized:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, quantization="none"))
    ends = {"outputs": loss.head_labels, "value_head": "values" in loss.requires}
    return build_policy(config, template.tokenizer, META, **ends)[0]
