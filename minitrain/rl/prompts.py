"""The prompts of data files, with their rows."""

from minitrain.data.examples import to_example
from minitrain.data.loader import TokenizedDataset
from minitrain.data.sampler import epoch_order, epoch_size
from minitrain.data.source import open_source

from .episodes import Prompt


class Prompts:
    """Prompts in the order of epochs, as training on files has it.

    Args:
        examples: The tokenized prompts.
        seed: Seed of the order.
    """

    def __init__(self, examples: TokenizedDataset, seed: int):
        self.examples, self.seed = examples, seed
        self.rows = {
            cache.path: {line: row for line, row in open_source(cache.dataset).rows() if isinstance(row, dict)}
            for cache in examples.caches
        }
        self.epoch, self.order = None, None  # the order of the last epoch

    def __len__(self) -> int:
        return epoch_size(self.examples.sizes, self.examples.weights)

    def in_order(self, position: int, number: int) -> Prompt:
        """Return the prompt at a position in the order of all epochs.

        Args:
            position: Number of prompts before it.
            number: Its number in the round.
        """
        epoch, index = divmod(position, len(self))
        if self.epoch != epoch:
            self.order = epoch_order(self.examples.sizes, self.examples.weights, self.seed, epoch)
            self.epoch = epoch
        return self.get(int(self.order[index]), number)

    def get(self, index: int, number: int) -> Prompt:
        """Return an example as a prompt with a number."""
        cache, example = self.examples.locate(index)
        line = int(cache.lines[example])
        row = self.rows[cache.path][line]
        parsed = to_example(row, cache.dataset, "prompt")
        ids = cache[example][0].ids.tolist()
        return Prompt(number, ids, row, cache.source, line, parsed.messages, parsed.variables)
