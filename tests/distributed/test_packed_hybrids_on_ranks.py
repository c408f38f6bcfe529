"""A sharded hybrid with packed rows: ranks have different numbers of groups, and make equal numbers of calls."""

import math

import pytest

from minitrain.model.tiny import tiny_tokenizer
from tests.distributed.launch import launch
from tests.distributed.test_fsdp import figures, same_training
from tests.model.test_packed_hybrids import model_of


@pytest.fixture
def hybrid(tmp_path) -> str:
    """Mamba 2 as a folder that `from_pretrained` reads."""
    model_of("mamba2").save_pretrained(tmp_path / "hybrid")
    tiny_tokenizer().save_pretrained(tmp_path / "hybrid")
    return f"model.name_or_path={tmp_path / 'hybrid'}"


def test_two_ranks_pack_a_hybrid_as_one_process(job, scratch, hybrid):
    """Gradients, losses and weights; with a last step whose second rank has fewer examples, and checkpointing."""
    settings = {
        "packed": ("packing=true", "gradient_accumulation_steps=2"),
        "uneven": ("packing=true", "total_batch_size=6", "n_steps=8", "gradient_accumulation_steps=3"),
        "checkpointed": ("packing=true", "activation_checkpointing=true", "lora.rank=4", "validation_split=7"),
    }
    alone = {name: job(f"alone-{name}", hybrid, *overrides) for name, overrides in settings.items()}
    ranked = {name: job(f"ranks-{name}", hybrid, *settings[name], fsdp="full") for name in settings}
    launch(0, list(alone.values()), scratch / "alone")
    launch(2, list(ranked.values()), scratch / "ranks")
    for name, ours in ranked.items():
        same_training(ours, alone[name], rtol=2e-5)
        assert all(math.isfinite(row["loss"]) for row in figures(ours))
