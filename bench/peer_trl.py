"""TRL's SFTTrainer on the same tokens in the same order, and what is left out of it left out of all."""

import json
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from meter import Meter, pick_device, read_job, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class Watch(TrainerCallback):
    def __init__(self, meter: Meter):
        self.meter = meter

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.meter.begin(model)

    def on_step_end(self, args, state, control, **kwargs):
        self.meter.tick()


class WatchedTrainer(trl.SFTTrainer):
    """Keeps loss and sizes of each step, which are looked at when the training is over."""

    losses, labels, places = [], [], []

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.losses.append(loss.detach())
        self.labels.append(inputs["labels"])
        self.places.append(inputs["input_ids"].numel())
        return loss


def read_data(job: dict) -> Dataset:
    rows = json.loads((Path(job["folder"]) / "tokens.json").read_text())[: job["n_steps"] * job["batch"]]
    labels = [[-100] * row["n_prompt"] + row["ids"][row["n_prompt"] :] for row in rows]
    return Dataset.from_dict({"input_ids": [row["ids"] for row in rows], "labels": labels})


def arguments(job: dict) -> dict:
    """What is set alike in all its trainers."""
    return {
        "output_dir": job["scratch"],
        "max_steps": job["n_steps"],
        "per_device_train_batch_size": job["batch"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": job["dtype"] == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def main() -> None:
    job, folder = read_job(), Path(read_job()["folder"]) / "model"
    config = trl.SFTConfig(**arguments(job), max_length=job["max_length"])
    meter = Meter(pick_device())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if job["lora"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder.parent / "adapter", is_trainable=True)
    trainer = WatchedTrainer(
        model=model,
        args=config,
        train_dataset=read_data(job),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Watch(meter)],
    )
    trainer.train()
    supervised = [(labels[:, 1:] != -100).sum() for labels in trainer.labels]
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    write_result(job, meter, trainer.losses, supervised, trainer.places, **versions)


if __name__ == "__main__":
    main()
