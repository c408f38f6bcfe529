"""Tokenizing chat rows: minitrain's token cache against `datasets.map`, from the same file, with as many processes.

    python bench/encoding.py [--rows 500000] [--processes 2] [--rounds 1]

The rows are parts of this project's pages, in conversations of two to six turns with a chat template that marks the
assistant's turns, and the tokenizer is a BPE that is trained on them. `map` calls apply_chat_template for a row, as
trainers do; `map batched` for 1,000 rows at a time. Every peer reads the JSON lines and writes input_ids and labels to
disk; those of the first 1,000 rows are compared. CPU seconds count all processes. Exit status 1: the tokens differ, or
minitrain is slower than `map`.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from meter import median  # noqa: E402

PEERS = ("minitrain", "map", "map batched")
TEMPLATE = """\
{% for message in messages %}<|{{ message.role }}|>
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}{% else %}
{{- message.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
COMPARED = 1_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minitrain-bench-") as folder:
        make_tokenizer(Path(folder))
        write_rows(Path(folder) / "rows.jsonl", arguments.rows)
        found = {peer: [] for peer in arguments.peers}
        for number in range(arguments.rounds):
            for peer in arguments.peers[number % len(found) :] + arguments.peers[: number % len(found)]:
                found[peer].append(in_a_process(peer, folder, arguments.processes))
    print(f"{arguments.rows:,} rows, {arguments.processes} processes, {found[peer][0]['tokens']:,} tokens\n")
    print("| | rows/s | seconds | CPU seconds | CPU seconds of `map` / its own |\n|---|---:|---:|---:|---:|")
    cpu = {peer: median(one["cpu"] for one in each) for peer, each in found.items()}
    for peer, each in found.items():
        seconds = median(one["seconds"] for one in each)
        ratio = f"{cpu['map'] / cpu[peer]:.2f}" if "map" in cpu else "-"
        print(f"| {peer} | {arguments.rows / seconds:,.0f} | {seconds:.1f} | {cpu[peer]:.1f} | {ratio} |")
    same = all(one["first"] == each[0]["first"] for each in found.values() for one in each)
    same &= len({json.dumps(each[0]["first"]) for each in found.values()}) == 1
    print("\nThe tokens are the same." if same else "\nTHE TOKENS DIFFER.")
    return 0 if same and cpu.get("minitrain", 0) <= cpu.get("map", float("inf")) else 1


def pieces() -> list[str]:
    """The paragraphs of this project's pages."""
    files = [*sorted((HERE.parent / "docs").glob("*.md")), HERE.parent / "README.md"]
    paragraphs = (part.strip() for file in files for part in file.read_text(encoding="utf-8").split("\n\n"))
    return [part for part in paragraphs if 20 < len(part) < 1_500]


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of up to 8,192 tokens, with the template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8_192, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(pieces(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def write_rows(file: Path, n_rows: int) -> None:
    generator, texts = random.Random(0), pieces()
    with open(file, "w", encoding="utf-8") as out:
        for _ in range(n_rows):
            messages = [
                {"role": role, "content": part_of(generator.choice(texts), generator)}
                for _ in range(generator.choice((1, 1, 2, 3)))
                for role in ("user", "assistant")
            ]
            out.write(json.dumps({"messages": messages}) + "\n")


def part_of(text: str, generator: random.Random) -> str:
    """A text from a random character in its first half on, so that few rows have the same texts.

    It begins with no white space, which `map` would join with the end of the header.
    """
    return text[generator.randrange(len(text) // 2) :].strip()


def in_a_process(peer: str, folder: str, processes: int) -> dict:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(sender, peer, folder, processes))
    process.start()
    sender.close()  # so that a peer that fails ends the wait
    try:
        return receiver.recv()
    finally:
        process.join()


def measure(sender, peer: str, folder: str, processes: int) -> None:
    """Send the seconds from the file to the tokens on disk, without the imports, and the tokens of the first rows."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    file = f"{folder}/rows.jsonl"
    run = (
        prepare_minitrain(tokenizer, file)
        if peer == "minitrain"
        else prepare_map(tokenizer, file, peer == "map batched")
    )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        began, cpu = time.perf_counter(), cpu_seconds()
        tokens, first = run(scratch, processes)
        seconds = time.perf_counter() - began
        sender.send({"seconds": seconds, "cpu": cpu_seconds() - cpu, "tokens": tokens, "first": first})


def cpu_seconds() -> float:
    """Of this process and of its ended children."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def prepare_minitrain(tokenizer, file: str):
    from minitrain import load_config
    from minitrain.data.cache import load_cache
    from minitrain.data.template import make_template

    config = load_config({"datasets": [file], "max_length": 1 << 20, "model": {"name_or_path": "tiny"}, "quiet": True})
    template = make_template(tokenizer, config, "conversation")

    def run(scratch: str, processes: int):
        config.cache_dir, config.num_proc = scratch, processes
        cache = load_cache(config.datasets[0], template, config)
        first = []
        for index in range(min(COMPARED, len(cache))):
            (document,) = cache[index]
            ids, mask = document.ids.tolist(), document.mask.tolist()
            first.append([ids, [token if is_target else -100 for token, is_target in zip(ids, mask)]])
        return int(cache.offsets[-1]), first

    return run


def prepare_map(tokenizer, file: str, batched: bool):
    from datasets import load_dataset

    def encode(row: dict) -> dict:
        out = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": out["input_ids"], "labels": labels_of(out["input_ids"], out["assistant_masks"])}

    def encode_batch(rows: dict) -> dict:
        out = tokenizer.apply_chat_template(rows["messages"], return_dict=True, return_assistant_tokens_mask=True)
        labels = [labels_of(*pair) for pair in zip(out["input_ids"], out["assistant_masks"])]
        return {"input_ids": out["input_ids"], "labels": labels}

    def run(scratch: str, processes: int):
        rows = load_dataset("json", data_files=file, split="train", cache_dir=scratch)
        call = encode_batch if batched else encode
        tokens = rows.map(call, batched=batched, num_proc=processes, remove_columns=rows.column_names)
        first = [[row["input_ids"], row["labels"]] for row in tokens.select(range(min(COMPARED, len(tokens))))]
        return sum(map(len, tokens["input_ids"])), first

    return run


def labels_of(ids: list[int], mask: list[int]) -> list[int]:
    return [token if is_target else -100 for token, is_target in zip(ids, mask)]


if __name__ == "__main__":
    sys.exit(main())
