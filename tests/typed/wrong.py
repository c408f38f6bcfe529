"""Uses of the public API that a type checker refuses, each with the code of its error. Nothing runs this file."""

from minitrain import (
    Batch,
    Loss,
    Models,
    Sampling,
    Trainer,
    create_loss,
    load_config,
    load_generator,
    merge_adapters,
    register_loss,
)

Trainer("config.yml", modle=None)  # E: call-arg
Trainer("config.yml", on_step_ended=print)  # E: call-arg
Trainer("config.yml", on_step_end=3)  # E: arg-type
Trainer("config.yml", on_step_end=lambda trainer: trainer.steps)  # E: attr-defined
Trainer("config.yml", optimizer=3)  # E: arg-type
Trainer("config.yml", train_dataset="rows.jsonl")  # E: arg-type
Trainer("config.yml", eval_dataset=["a"])  # E: list-item
Trainer("config.yml", callbacks=3)  # E: arg-type
Trainer("config.yml", loss=3)  # E: arg-type
Trainer(3)  # E: arg-type
print(Trainer("config.yml").train().loss)  # E: attr-defined
Trainer("config.yml").forward_backward(3)  # E: arg-type
load_config(lr="x")  # E: call-arg
load_config("config.yml", 3)  # E: arg-type
print(load_config("config.yml").learning_rate)  # E: attr-defined
print(load_config("config.yml").lr + 1)  # E: operator
Sampling(max_tokens=3)  # E: call-arg
Sampling(temperature="hot")  # E: arg-type
Trainer("config.yml").generate(["a"], tools=3)  # E: arg-type
load_generator("runs/a").generate(["a"], chat_template_kwargs="x")  # E: arg-type
merge_adapters(["runs/a"], "merged", weights="x")  # E: arg-type
merge_adapters(["runs/a"])  # E: call-arg
create_loss(3)  # E: arg-type
register_loss("mine")  # E: call-arg


class Mine(Loss):
    def __call__(self, batch: Batch, models: Models) -> int:  # E: override
        return 3
