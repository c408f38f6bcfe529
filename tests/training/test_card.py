"""What a step asks of a GPU, counted on a fake one: waits for its results, copies to it, and kernels."""

import json
import subprocess
import sys

import pytest

from tests import fake_card
from tests.conftest import ROOT

LOSSES = (
    {"name": "sft"},
    {"name": "sft", "label_smoothing": 0.1},
    {"name": "dft"},
    {"name": "dpo", "reference": "adapter"},
    {"name": "dpo", "reference": "model"},
    {"name": "kto", "reference": "adapter"},
    {"name": "pairwise"},
    {"name": "classify"},
    {"name": "policy", "kl_coef": 0.1, "vf_coef": 0.1, "reference": "adapter"},
    {"name": "value"},
    {"name": "kd", "teacher": "tiny"},
)
CASES = [
    {"loss": loss, "overrides": [f"packing={packing}", *lora]}
    for loss in LOSSES
    for packing in ("true", "false")
    for lora in ([], ["lora.rank=4"])
]
QUICK = [CASES[i] for i in (0, 3, 13, 18, 25, 28, 35, 40)]
MOST_WAITS = 2


def counts(folder, cases: list[dict]) -> list[dict]:
    """What a step of each case asks of the card, counted by card_driver.py in a process of its own."""
    command = [sys.executable, "-m", "tests.training.card_driver", str(folder)]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(cases), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("cases", [QUICK, pytest.param(CASES, marks=pytest.mark.slow(minutes=1))], ids=["some", "all"])
@pytest.mark.skipif(bool(fake_card.missing()), reason=fake_card.missing())
def test_a_step_hardly_waits_for_the_card(tmp_path, cases):
    """Loss and norm are read at once; nothing else is, for any loss, layout and kind of training. All that goes to the
    card comes from pinned memory."""
    for case, found in zip(cases, counts(tmp_path, cases), strict=True):
        assert 1 <= len(found["waits"]) <= MOST_WAITS, (case, found["waits"])
        assert found["copies"] >= 8 and found["kernels"] > 200, case
