"""Other trainers on the documents of `bench/gpu.py`, as their manuals say they are fastest."""

import importlib.util

import torch
from gpu_rows import MAX_LENGTH, Shape
from gpu_work import Job, Recorder, note_work, read_steps


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def trl(job: Job) -> None:
    """TRL's SFTTrainer with the kernels of Liger; without padding where FlashAttention is installed."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    steps = read_steps(job)
    note_work(job, steps)
    padding_free = is_installed("flash_attn")
    job.save(note="padding-free" if padding_free else "padded: flash_attn is not installed")
    attention = {"attn_implementation": "flash_attention_2"} if padding_free else {}
    dtype = getattr(torch, job.options["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, **attention)
    more = {"peft_config": lora_config(job.options["lora"])} if "lora" in job.options else {}
    batch = len(steps[0]) if padding_free else 4
    config = SFTConfig(
        output_dir=job.scratch,
        max_steps=job.n_steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=len(steps[0]) // batch,
        padding_free=padding_free,
        use_liger_kernel=is_installed("liger_kernel"),
        bf16=True,
        use_cpu=job.device == "cpu",
        max_length=MAX_LENGTH,
        **trainer_arguments(),
    )
    SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset_of(steps, Dataset),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[watch(job, TrainerCallback)],
        **more,
    ).train()


def trainer_arguments() -> dict:
    return {
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def dataset_of(steps: list[list[list[int]]], kind):
    documents = [document for step in steps for document in step]
    return kind.from_dict({"input_ids": documents, "labels": [[-100, *document[1:]] for document in documents]})


def lora_config(rank: int):
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def watch(job: Job, base: type):
    """A callback that records each step with the loss that the trainer logs."""
    recorder = Recorder(job)

    class Watch(base):
        def on_train_begin(self, args, state, control, **kwargs):
            recorder.begin()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                recorder.step(logs["loss"])

    return Watch()


def unsloth(job: Job) -> None:
    """Unsloth's patched model in TRL's trainer."""
    from unsloth import FastLanguageModel  # isort: skip (it patches what is imported after it)
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    steps = read_steps(job)
    note_work(job, steps)
    model, tokenizer = FastLanguageModel.from_pretrained(
        job.model, max_seq_length=MAX_LENGTH, dtype=torch.bfloat16, load_in_4bit=False
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, target_modules=targets, use_gradient_checkpointing=False
    )
    config = SFTConfig(
        output_dir=job.scratch,
        max_steps=job.n_steps,
        per_device_train_batch_size=len(steps[0]) // 2,
        gradient_accumulation_steps=2,
        bf16=True,
        max_length=MAX_LENGTH,
        **trainer_arguments(),
    )
    SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset_of(steps, Dataset),
        processing_class=tokenizer,
        callbacks=[watch(job, TrainerCallback)],
    ).train()


def torchtune(job: Job) -> None:
    """torchtune's own Llama, compiled by layer, on rows without padding; its weights are random, too."""
    from torchtune.models.llama3_2 import llama3_2
    from torchtune.modules.attention_utils import packed_block_causal_mask
    from torchtune.modules.loss import LinearCrossEntropyLoss

    steps, shape = read_steps(job), Shape(**job.sizes)
    note_work(job, steps)
    device = job.torch_device
    with device:
        model = llama3_2(
            vocab_size=shape.vocab,
            num_layers=shape.layers,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            embed_dim=shape.hidden,
            intermediate_dim=shape.intermediate,
            max_seq_len=job.tokens,
            tie_word_embeddings=shape.tied,
        )
    loss_of = LinearCrossEntropyLoss()
    loss_of.set_model_output(model)
    for layer in model.layers:
        layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    recorder = Recorder(job)
    recorder.begin()
    for documents in steps:
        ids = torch.tensor([token for document in documents for token in document], device=device)[None]
        labels = torch.tensor([token for d in documents for token in (*d[1:], -100)], device=device)[None]
        places = torch.tensor([place for d in documents for place in range(len(d))], device=device)[None]
        mask = packed_block_causal_mask([torch.tensor([len(d) for d in documents], device=device)])
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model(ids, mask=mask, input_pos=places), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recorder.step(loss.item())
