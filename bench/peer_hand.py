"""The loop that one would write by hand: padded batches, autocast, fused AdamW, clipped gradients.

`kind: hand` multiplies the output matrix with the supervised positions only; `kind: full_logits` takes the
model's logits of all positions.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from meter import DTYPES, Meter, pick_device, read_job, write_result
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM


def collate(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), both [R, T]; labels are shifted: what each place has to predict, -100 for nothing."""
    ids = [torch.tensor(row["ids"]) for row in rows]
    labels = [F.pad(x[1:], (0, 1), value=-100) for x in ids]
    for row, target in zip(rows, labels):
        target[: row["n_prompt"] - 1] = -100
    return pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)


def loss_of_answers(model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    learned = labels != -100
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[learned]
    return F.cross_entropy(model.lm_head(hidden).float(), labels[learned])


def loss_of_all_logits(model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def main() -> None:
    job, device = read_job(), pick_device()
    rows = json.loads((Path(job["folder"]) / "tokens.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(Path(job["folder"]) / "model", dtype=torch.float32).to(device).train()
    if job["lora"]:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, Path(job["folder"]) / "adapter", is_trainable=True)
        model = adapted.get_base_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["lr"], weight_decay=0.0, fused=True)
    compute_loss = loss_of_answers if job["kind"] == "hand" else loss_of_all_logits
    dtype = DTYPES[job["dtype"]]
    losses, supervised, places = [], [], []
    meter = Meter(device)
    meter.begin(model)
    for start in range(0, job["n_steps"] * job["batch"], job["batch"]):
        ids, labels = collate(rows[start : start + job["batch"]])
        supervised.append((labels != -100).sum())
        places.append(ids.numel())
        ids, labels = ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = compute_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        meter.tick()
    write_result(job, meter, losses, supervised, places)


if __name__ == "__main__":
    main()
