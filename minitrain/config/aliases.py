"""Options that exclude one another, and values that are accepted but say nothing."""

# Beside the first of a pair the second would be ignored, so both together are refused. One that is given in
# the overrides takes the place of the other one in the file.
MUTUALLY_EXCLUSIVE = (
    ("n_steps", "n_epochs"),
    ("warmup_steps", "warmup_ratio"),
    ("eval_datasets", "validation_split"),
    ("packing", "group_by_length"),
)

# Types of `datasets` of the chat SFT/DPO trainer: where a data set comes from, which its path says here.
UNTYPED = ("custom_dataset", "huggingface_dataset")
