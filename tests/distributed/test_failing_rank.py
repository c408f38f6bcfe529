"""One rank fails, and the others end with one line that names it."""

import shutil

import pytest

from tests.distributed.launch import Ranks, finish, torchrun
from tests.messages import problems, reports

TRACEBACK = "Traceback (most recent call last)"


def damaged_for_rank_1(folder, llama_folder) -> str:
    """A path with the rank in it: the weights that rank 1 finds are cut off."""
    for rank in (0, 1):
        shutil.copytree(llama_folder, folder / f"model-{rank}")
    with open(folder / "model-1" / "model.safetensors", "r+b") as file:
        file.truncate(20_000)
    return f"{folder}/model-${{oc.env:RANK}}"


def test_weights_that_one_rank_cannot_read(job, scratch, llama_folder, tmp_path):
    """Both say that it is rank 1, and why, without a traceback; the launcher sees a code."""
    wrong = job("wrong", f"model.name_or_path={damaged_for_rank_1(tmp_path, llama_folder)}", fsdp="full")
    code, output = Ranks(2, [wrong], scratch, {}).finish(patience=60)
    assert code == 1 and TRACEBACK not in output, output
    of_rank_1, of_rank_0 = output.splitlines()
    ((reason, code),) = problems(of_rank_1)
    assert code == "damaged-file" and "/model.safetensors" in reason
    assert reports(of_rank_0, "process-failed", "rank 1", reason)


@pytest.mark.parametrize("point", ["load.policy", "load.weights", "step.batch@3", "save.write@2"])
def test_an_error_of_one_rank(job, scratch, point):
    """Any error at any point: the rank that has it shows its traceback, the other one a line."""
    env = {"MINITRAIN_FAULT": f"{point}:raise#1"}
    code, output = Ranks(2, [job("fault", "save_every_steps=1", fsdp="full")], scratch, env).finish(patience=60)
    assert code != 0 and output.count(TRACEBACK) == 1, output
    (line,) = [line for line in output.splitlines() if line.startswith("minitrain: ")]
    assert reports(line, "process-failed", "rank 1", "RuntimeError: fault: raised on purpose")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_under_the_launcher(job, scratch, rank):
    """Also when it is the first rank, which the others wait for while it reads the data; torchrun fails, too."""
    env = {"MINITRAIN_FAULT": f"load.policy:raise#{rank}"}
    options = {"monitor_interval": 20}
    code, output = finish(torchrun(2, [job("fault", fsdp="full")], scratch, env, **options))
    assert code == 1, output
    assert reports(output, "process-failed", f"rank {rank}", "RuntimeError: fault: raised on purpose")
