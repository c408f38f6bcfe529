"""What a step costs on an H100 that is not there: a model of the card over the operations of a real step.

    python bench/card.py [--case "1B full, 16k"] [--top 12]

The step runs as in training, on tensors that have shapes and no values (tests/card_mode.py). Each operation takes the
time of its FLOPs or of the bytes that it reads and writes, and at least 2 us. The rates below are guesses at what
kernels reach, so times are estimates; counts, FLOPs and bytes are not. `fused` is what a compiler could reach: each run
of operations between two products counts as one kernel that reads what it is given, and writes what is used after it.
"""

import argparse
import random
import sys
import tempfile
import weakref
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import fake_card

if problem := fake_card.missing():
    sys.exit(f"bench/card.py: {problem}")
LIBRARY = tempfile.TemporaryDirectory()
fake_card.load(Path(LIBRARY.name))

import torch  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from minitrain.batch import Document, collate  # noqa: E402
from minitrain.distributed.parallel import SingleDevice  # noqa: E402
from minitrain.losses import Models, create_loss  # noqa: E402
from minitrain.model import attention  # noqa: E402
from minitrain.model.adapter import inject  # noqa: E402
from minitrain.model.policy import Policy  # noqa: E402
from minitrain.model.recompute import checkpoint_activations  # noqa: E402
from minitrain.model.sequence_head import make_policy  # noqa: E402
from minitrain.training.step import Precision, forward_backward, optim_step  # noqa: E402
from tests.card_mode import DEVICE, Card  # noqa: E402

PRODUCTS, ATTENTION, BYTES = 650e12, (400e12, 300e12), 2.8e12  # FLOP/s, (forward, backward), bytes/s
LAUNCH, PEAK = 2e-6, 989e12  # seconds; FLOP/s that MFU is measured by
MEDIAN, LONGEST = 400, 4096  # tokens of a document
FACTOR = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}  # the first factor of a product
READS_ROWS = ("index_select", "embedding", "gather")  # read as much of their input as they write
SHAPES = {
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=True),
    "8B": dict(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=False),
}  # fmt: skip


class Case(NamedTuple):
    """A model, how it is trained, and the tokens of a step, packed into one row."""

    shape: str
    tokens: int
    dtype: torch.dtype = torch.float32  # of the parameters; products are in bfloat16
    rank: int = 0  # of LoRA
    recompute: bool = False


CASES = {
    "1B full, 16k": Case("1B", 16_384),
    "1B full, 4k": Case("1B", 4096),
    "8B LoRA, 4k": Case("8B", 4096, torch.bfloat16, 16),
    "8B full, bfloat16, recomputed, 4k": Case("8B", 4096, torch.bfloat16, recompute=True),
}


class ModelOfCard(Card):
    """Counts seconds of the operations on the card, and the memory that they hold.

    Attributes:
        seconds: By kind of operation.
        of_operations: By operation.
        fused: Seconds if each run of operations between two products were one kernel.
    """

    def __init__(self, pairs: int):
        super().__init__()
        self.pairs = pairs  # of tokens that attend to one another, in all documents
        self.seconds, self.of_operations, self.fused = Counter(), Counter(), 0.0
        self.now = self.peak = 0
        self.held: set[int] = set()
        self.run: dict[str, dict] = defaultdict(dict)  # storages that the present run has read and made

    def launched(self, function, name: str, args: tuple, kwargs: dict, made) -> None:
        super().launched(function, name, args, kwargs, made)
        given = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
        results = [each for each in tree_iter(made) if isinstance(each, torch.Tensor)]
        for tensor in results:
            self._hold(tensor)
        launches = self.kernels[name] - self.before.get(name, 0)
        self.before[name] = self.kernels[name]
        moved = sum(map(_bytes, results))
        moved += moved if name in READS_ROWS else sum(map(_bytes, given))
        if "attention" in name or "varlen" in name:
            kind = "attention"
            heads = given[0].shape[1] * given[0].shape[-1] if given[0].dim() == 4 else given[0][0].numel()
            backward = "backward" in name
            flops = (10 if backward else 4) * heads * self._pairs_of(given[0])
            seconds = flops / ATTENTION[backward]
        elif name in FACTOR:
            kind = "products"
            seconds = 2 * results[0].numel() * args[FACTOR[name]].shape[-1] / PRODUCTS
        else:
            kind, seconds = "the rest", 0.0
        seconds = max(seconds, moved / BYTES, LAUNCH * launches)
        self.seconds[kind] += seconds
        self.of_operations[name] += seconds
        if kind == "the rest" and not name.startswith(("_foreach", "_fused")):
            self.run["read"] |= {_key(each): _bytes(each) for each in given if _key(each) not in self.run["made"]}
            self.run["made"] |= {_key(each): (weakref.ref(each.untyped_storage()), _bytes(each)) for each in results}
        else:
            self.end_run()
            self.fused += seconds

    def end_run(self) -> None:
        """Count the operations since the last product as one kernel."""
        if self.run["made"]:
            kept = sum(size for storage, size in self.run["made"].values() if storage() is not None)
            self.fused += max(LAUNCH, (sum(self.run["read"].values()) + kept) / BYTES)
        self.run.clear()

    def reset(self) -> None:
        super().reset()
        self.before: Counter = Counter()

    def _pairs_of(self, query: torch.Tensor) -> float:
        """Return the pairs of tokens of an attention: in a batch of equal rows, or in all documents."""
        if query.dim() == 4 and query.shape[0] * query.shape[2] > 0:
            return query.shape[0] * query.shape[2] ** 2 / 2
        return self.pairs

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if _key(tensor) not in self.held:
            self.held.add(_key(tensor))
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, _key(tensor), size)

    def _free(self, key: int, size: int) -> None:
        self.held.discard(key)
        self.now -= size


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: torch.Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def lengths(tokens: int) -> list[int]:
    """Return lengths of documents that fill a row: lognormal, the last one cut."""
    generator, found = random.Random(0), []
    while sum(found) < tokens:
        drawn = round(generator.lognormvariate(0.0, 1.0) * MEDIAN)
        found.append(min(max(drawn, 16), LONGEST, tokens - sum(found)))
    return found


def build(case: Case, card: ModelOfCard) -> Policy:
    """Return the policy on the card."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[case.shape], rope_theta=5e5)).to(case.dtype)
    attention.attend_by_document(model)
    if case.rank:
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model.requires_grad_(False).new_ids = []
        inject(model, {"r": case.rank, "lora_alpha": 16, "target_modules": names, "bias": "none"})
    made = make_policy(model)
    if case.recompute:
        checkpoint_activations(made.model)
    card.move(made)
    return made.train()


def measure(name: str, case: Case, top: int) -> dict[str, float]:
    """Print what a step costs, and return it."""
    sizes = lengths(case.tokens)
    card = ModelOfCard(sum(size**2 / 2 for size in sizes))
    documents = [Document(torch.ones(n, dtype=torch.int32), (torch.arange(n) > 0).byte()) for n in sizes]
    batch, made = collate([documents], 0), build(case, card)
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    for group in optimizer.param_groups:
        group["lr_ratio"] = 1.0
    parallel, precision = SingleDevice(DEVICE), Precision(torch.bfloat16, DEVICE)
    with card:
        for tensor in {_key(each): each for each in (*made.parameters(), *made.buffers())}.values():
            card._hold(tensor)
        for _ in range(2):  # the first step makes the moments
            card.reset()
            card.seconds.clear(), card.of_operations.clear()
            card.fused, card.peak = 0.0, card.now
            output = forward_backward(create_loss("sft"), [batch], Models(made), parallel, precision)
            card.end_run()
            optim_step(optimizer, trained, output.loss, 1e-5, 1.0, parallel, precision)
            card.end_run()
    counted = matrices(made) * 6 * case.tokens if not case.rank else matrices(made) * 4 * case.tokens
    shape = SHAPES[case.shape]
    counted += 6 * shape["num_hidden_layers"] * shape["hidden_size"] * sum(size**2 for size in sizes)
    total = sum(card.seconds.values())
    found = {
        "ms": 1e3 * total,
        "of products": 1e3 * card.seconds["products"],
        "of attention": 1e3 * card.seconds["attention"],
        "MFU": 100 * counted / total / PEAK,
        "ms fused": 1e3 * card.fused,
        "MFU fused": 100 * counted / card.fused / PEAK,
        "kernels": sum(card.kernels.values()),
        "waits": len(card.waits),
        "peak GB": card.peak / 1e9,
    }
    print(f"| {name} | " + " | ".join(f"{value:,.0f}" for value in found.values()) + " |", flush=True)
    for operation, seconds in card.of_operations.most_common(top):
        print(f"    {1e3 * seconds:8.1f} ms  {card.kernels[operation]:6} x {operation}")
    return found


def matrices(made: Policy) -> int:
    """Return the number of weights in matrix products: those of the blocks and of the LM head."""
    named = made.model.named_parameters()
    blocks = [p.numel() for name, p in named if ".layers." in name and p.dim() == 2 and "lora_" not in name]
    return made.model.get_output_embeddings().weight.numel() + sum(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="only this case")
    parser.add_argument("--top", type=int, default=0, help="also print the operations that take longest")
    options = parser.parse_args()
    columns = ["step", "ms", "products", "attention", "MFU %", "ms fused", "MFU % fused", "kernels", "waits", "peak GB"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, case in CASES.items():
        if options.case in (None, name):
            measure(name, case, options.top)


if __name__ == "__main__":
    main()
