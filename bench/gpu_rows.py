"""What `bench/gpu.py` measures: shapes of models, amounts of data, and the rows of each phase, most important first."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    @property
    def n_matmul(self) -> int:
        """Weights that a token is multiplied with, the output layer included."""
        head_size = self.hidden // self.heads
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * head_size
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocab * self.hidden


SHAPES = {
    "1B": Shape(2048, 8192, 16, 32, 8, 128_256, True),  # Llama-3.2-1B
    "8B": Shape(4096, 14336, 32, 32, 8, 128_256, False),  # Llama-3.1-8B
}
TINY = {
    "1B": Shape(64, 128, 2, 4, 2, 512, True),
    "8B": Shape(64, 128, 3, 4, 2, 512, False),
}
MAX_LENGTH = 4096  # of a document; their median is 400
MEAN_LENGTH = 512  # of a step's documents
MINUTES = {"A": 7.0, "B": 9.0, "C": 9.0}


@dataclass(frozen=True)
class Row:
    """One measurement, in a process of its own.

    Attributes:
        name: In the table.
        phase: A, B or C.
        work: The function of gpu_work.py, gpu_sampling.py or gpu_peers.py that does it.
        shape: The model, a key of SHAPES; empty for those that bring their own.
        overrides: Options of minitrain.
        tokens: Of a step.
        pairs: Preference pairs of a step instead of documents.
        steps: Timed ones, after `warmup`.
        limit: Seconds after which it is stopped.
        without: Functions, as `module:name`, that answer False instead: a part that is switched off.
        needs: Packages; without one the row is skipped.
        trained: Share of the 6 FLOPs for each weight and token: 4/6 with frozen weights. 0: the FLOPs are not counted.
        options: For `work`.
    """

    name: str
    phase: str
    work: str
    shape: str = ""
    overrides: tuple[str, ...] = ()
    tokens: int = 16_384
    pairs: int = 0
    steps: int = 15
    warmup: int = 5
    limit: float = 90
    without: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    trained: float = 1.0
    options: dict = field(default_factory=dict)


COMPILE = "compile=true"
BF16_MASTERS = "model.master_dtype=bfloat16"
WEIGHTS_8BIT = (BF16_MASTERS, "optimizer=torchao.AdamW8bit", "optimizer_args={bf16_stochastic_round: true}")
IN_BACKWARD = "optimizer_in_backward=true"
SELECTIVE, FULL = "activation_checkpointing=selective", "activation_checkpointing=full"
LORA = "lora.rank=16"
TRL = ("trl", "liger_kernel")
NO_KERNEL = ("minitrain.model.varlen:is_supported",)

ROWS = [
    # A: does everything run, and what does the card do?
    Row("rates of products and copies", "A", "rates", limit=60),
    Row("resume, bit for bit", "A", "resume", limit=60),
    Row("build 1B", "A", "build", "1B", limit=120),
    Row("waits in a step of 1B", "A", "waits", "1B", limit=60),
    Row("profile of a step of 1B", "A", "profile", "1B", limit=60),
    Row("profile of a step of 1B, compiled", "A", "profile", "1B", (COMPILE,), limit=120),
    Row("losses on the card and on the CPU", "A", "losses", limit=200),
    # B: 1B, all weights trained
    Row("minitrain, compiled", "B", "sft", "1B", (COMPILE,), limit=120),
    Row("minitrain", "B", "sft", "1B"),
    Row("plain loop, one document at a time", "B", "plain", "1B", steps=3, warmup=2, limit=60),
    Row("TRL + Liger", "B", "trl", "1B", needs=TRL, options={"dtype": "float32"}),
    Row("minitrain, bfloat16 weights, compiled", "B", "sft", "1B", (COMPILE, BF16_MASTERS), limit=120),
    Row("minitrain, bfloat16 weights", "B", "sft", "1B", (BF16_MASTERS,)),
    Row("TRL + Liger, bfloat16 weights", "B", "trl", "1B", needs=TRL, options={"dtype": "bfloat16"}),
    Row("minitrain, attention in groups", "B", "sft", "1B", without=NO_KERNEL),
    Row("minitrain, selective recomputation, compiled", "B", "sft", "1B", (COMPILE, SELECTIVE), limit=120),
    Row("torchtune, compiled and packed", "B", "torchtune", "1B", needs=("torchtune",), limit=120),
    Row("minitrain, 4,096 tokens, compiled", "B", "sft", "1B", (COMPILE,), tokens=4096, limit=120),
    Row("sampling, slots with CUDA graphs", "B", "sampling", "1B", steps=3, warmup=1, trained=0,
        options={"loop": "graphs", "slots": 64}),
    Row("sampling, slots", "B", "sampling", "1B", steps=2, warmup=1, trained=0,
        options={"loop": "slots", "slots": 64}),
    Row("sampling, the plain loop", "B", "sampling", "1B", steps=2, warmup=1, trained=0,
        options={"loop": "plain", "slots": 64}),
    Row("minitrain, padded", "B", "sft", "1B", ("packing=false",), limit=60),
    # C: 8B
    Row("build 8B", "C", "build", "8B", limit=150),
    Row("minitrain, LoRA, compiled", "C", "sft", "8B", (LORA, COMPILE), 4096, limit=120, trained=4 / 6),
    Row("minitrain, LoRA", "C", "sft", "8B", (LORA,), 4096, trained=4 / 6),
    Row("minitrain, all weights, torchao's AdamW8bit, selective recomputation, compiled", "C", "sft", "8B",
        (*WEIGHTS_8BIT, SELECTIVE, COMPILE), 4096, limit=150, needs=("torchao",)),
    Row("minitrain, all weights, AdamW in the backward pass, selective recomputation, compiled", "C", "sft", "8B",
        (BF16_MASTERS, IN_BACKWARD, "max_grad_norm=0", SELECTIVE, COMPILE), 4096, limit=150),
    Row("minitrain, LoRA, DPO, prompts shared", "C", "dpo", "8B", (LORA, "loss.name=dpo"), pairs=8, trained=0),
    Row("TRL + Liger, LoRA", "C", "trl", "8B", (), 4096, needs=(*TRL, "peft"), trained=4 / 6,
        options={"dtype": "bfloat16", "lora": 16}),
    Row("Unsloth, LoRA", "C", "unsloth", "8B", (), 4096, needs=("unsloth",), trained=4 / 6),
    Row("plain forward pass, the first loss", "C", "plain", "8B", (), 4096, steps=1, warmup=0, limit=60,
        options={"only_forward": True}),
    Row("minitrain, all weights, bitsandbytes' AdamW8bit, full recomputation", "C", "sft", "8B",
        (BF16_MASTERS, "optimizer=bitsandbytes.AdamW8bit", FULL), 4096, limit=120, needs=("bitsandbytes",)),
    Row("minitrain, LoRA, 16,384 tokens, selective recomputation, compiled", "C", "sft", "8B",
        (LORA, SELECTIVE, COMPILE), limit=120, trained=4 / 6),
]  # fmt: skip
