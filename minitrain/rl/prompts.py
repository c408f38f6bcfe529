"""The prompts of data files, with their rows."""

import itertools
from collections.abc import Sequence

from minitrain.config.issues import ConfigIssues
from minitrain.config.sections import DatasetConfig
from minitrain.data.examples import to_example
from minitrain.data.loader import TokenizedDataset
from minitrain.data.sampler import epoch_order, epoch_size
from minitrain.data.source import is_file, open_source
from minitrain.errors import MinitrainError

from .episodes import Prompt
from .rewards import Reward

N_CHECKED = 1000  # rows of a file


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

    def without_reference(self, rewards: Sequence[Reward]) -> list[str]:
        """Return which rows lack what a reward function compares with."""
        found = []
        for reward, cache in itertools.product(rewards, self.examples.caches):
            rows = self.rows[cache.path]
            lines = [line for line, row in rows.items() if not reward.function.reads(row, reward.options)]
            if lines:
                found.append(
                    f"{cache.source}:{lines[0]}: {reward.name} has nothing to compare with in {len(lines):,} of "
                    f"{len(rows):,} rows, so it does not judge their answers"
                )
        return found


def check_rows(rewards: Sequence[Reward], datasets: Sequence[DatasetConfig], issues: ConfigIssues) -> None:
    """Add to `issues` the rewards that cannot judge any answer, because the first data rows lack what they read."""
    if not all(map(is_file, datasets)):
        return
    try:
        sources = [open_source(dataset).rows() for dataset in datasets]
        rows = [row for source in sources for _, row in itertools.islice(source, N_CHECKED) if isinstance(row, dict)]
    except (MinitrainError, OSError):  # reading the data reports it
        return
    for number, reward in enumerate(rewards):
        if rows and not any(reward.function.reads(row, reward.options) for row in rows):
            message = (
                f"no data row has what {reward.name} compares with. Add the column, or set the option `key` to it."
            )
            issues.add(f"rollout.rewards[{number}]", "wrong-column", message)
