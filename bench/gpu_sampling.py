"""How fast responses are sampled: static slots with and without CUDA graphs, and the plain loop."""

import itertools
import statistics

import numpy as np
import torch
from gpu_work import SEED, Job, Recorder


@torch.no_grad()
def sampling(job: Job) -> None:
    """Rounds of responses that all reach their limit, by the loop that the options name. Its losses are mean -logps."""
    from transformers import AutoModelForCausalLM

    from minitrain.inference import slots
    from minitrain.inference.choice import Chooser, Request, TokenChoice
    from minitrain.inference.plain_loop import PlainLoop
    from minitrain.model.attention import attend_by_document
    from minitrain.model.sequence_head import make_policy

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16).to(job.torch_device).eval()
    attend_by_document(model)  # as in packed training
    policy, name = make_policy(model).eval(), job.options["loop"]
    if name == "slots":
        slots.graphs_for = lambda policy: None
    n_slots, limit = job.options["slots"], job.tokens // job.options["slots"]
    generator = np.random.Generator(np.random.PCG64(SEED))
    prompts = generator.integers(3, job.sizes["vocab"], (n_slots, 64)).tolist()
    job.save(tokens=n_slots * limit, squares=0)
    recorder = Recorder(job)
    recorder.begin()
    for _ in range(job.n_steps):
        choice = TokenChoice(policy, Chooser(temperature=1.0), set())
        requests = [Request(prompt, [(i,)], limit) for i, prompt in enumerate(prompts)]
        rows = list(itertools.chain(*choice.rows(requests)))
        loop = PlainLoop(policy, n_slots) if name == "plain" else slots.SlotLoop(policy, n_slots)
        loop.run(rows, choice)
        recorder.step(-statistics.mean(logp for row in rows for logp in row.sample.logps))
    if name == "graphs" and not (loop.graphs and loop.graphs.works):
        job.save(note="not recorded as graphs")
