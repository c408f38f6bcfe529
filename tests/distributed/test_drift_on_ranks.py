"""kl_to_start and retention data on two ranks: the metrics of one process."""

import json

import pytest

from tests.distributed.launch import launch
from tests.distributed.test_fsdp import figures

SETTINGS = {"full": (), "lora": ("lora.rank=4", "lora.modules_to_save=[lm_head]", "packing=true")}


def test_two_ranks_drift_as_one_process(job, scratch, tmp_path):
    """A frozen copy and the initial adapter are sharded, and the head that both compare with is gathered."""
    kept = tmp_path / "kept.jsonl"
    kept.write_text("".join(json.dumps({"text": f"the {word} is here"}) + "\n" for word in ("cat", "owl", "deer")))
    options = ("validation_split=5", "eval_kl_to_start=true", f"retention_datasets={kept}", "eval_batch_size=2")
    alone = {name: job(name, *options, *more) for name, more in SETTINGS.items()}
    ranked = {name: job(f"ranks-{name}", *options, *more, fsdp="full") for name, more in SETTINGS.items()}
    launch(0, list(alone.values()), scratch / "alone")
    launch(2, list(ranked.values()), scratch / "ranks")
    for name, wanted in alone.items():
        ours, theirs = (figures(each, "eval")[-1] for each in (ranked[name], wanted))
        for key in ("kl_to_start", "retention/loss", "retention/kl_to_start"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3) != 0, (name, key)
