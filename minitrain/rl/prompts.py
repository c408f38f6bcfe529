"""The prompts of data files, with their rows."""

from collections.abc import Sequence

from minitrain.config.sections import DatasetConfig
from minitrain.data.examples import to_example
from minitrain.data.loader import TokenizedDataset
from minitrain.data.sampler import epoch_order, epoch_size
from minitrain.data.source import open_source

from .episodes import Prompt


class Prompts:
    """Prompts in the order of epochs, as training on files has it.

    Args:
        examples: The tokenized prompts.
        datasets: The entries of the config that they are from.
        seed: Seed of the order.
    """

    def __init__(self, examples: TokenizedDataset, datasets: Sequence[DatasetConfig], seed: int):
        self.examples, self.seed = examples, seed
        self.datasets = {cache.path: entry for cache, entry in zip(examples.caches, datasets, strict=False)}
        self.rows = {
            path: {line: row for line, row in open_source(entry).rows() if isinstance(row, dict)}
            for path, entry in self.datasets.items()
        }

    def __len__(self) -> int:
        return epoch_size(self.examples.sizes, self.examples.weights)

    def in_order(self, position: int, number: int) -> Prompt:
        """Return the prompt at a position in the order of all epochs.

        Args:
            position: Number of prompts before it.
            number: Its number in the round.
        """
        epoch, index = divmod(position, len(self))
        order = epoch_order(self.examples.sizes, self.examples.weights, self.seed, epoch)
        return self.get(int(order[index]), number)

    def get(self, index: int, number: int) -> Prompt:
        """Return an example as a prompt with a number."""
        cache, example = self.examples.locate(index)
        row = self.rows[cache.path][int(cache.lines[example])]
        parsed = to_example(row, self.datasets[cache.path], "prompt")
        return Prompt(number, cache[example][0].ids.tolist(), row, parsed.messages, parsed.variables)
