"""A model with its data and template outside of a training."""

from dataclasses import dataclass, field

from minitrain.config.schema import Config
from minitrain.data.loader import MicrobatchLoader
from minitrain.data.template import Template
from minitrain.distributed.parallel import SingleDevice
from minitrain.inference.generate import Generator
from minitrain.losses import Loss, Models
from minitrain.model.load import CPU, DTYPES
from minitrain.model.policy import Policy
from minitrain.training.step import Precision


@dataclass
class Stage:
    """What rounds of sampled answers and evaluations use of a trainer."""

    config: Config
    loss: Loss
    policy: Policy
    template: Template
    train_loader: MicrobatchLoader
    parallel: SingleDevice = field(default_factory=lambda: SingleDevice(CPU))
    models: Models | None = None  # of an evaluation
    logger: None = None

    def __post_init__(self):
        self.tokenizer, self.device = self.template.tokenizer, self.parallel.device
        self.precision = Precision(DTYPES[self.config.model.policy_dtype], self.device)
        self.generator = Generator(self.policy.model, self.template, self.policy, self.parallel)
        self.notes: list[str] = []

    def keep_alive(self, seconds: float = 0.0) -> None:
        self.parallel.keep_alive(seconds)

    def is_interrupted(self) -> bool:
        return False
