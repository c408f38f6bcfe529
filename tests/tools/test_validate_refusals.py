"""`validate` refuses what training refuses before its first step, in the same words, and warns of the same."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from minitrain import Trainer, load_config
from minitrain.cli.main import main
from minitrain.errors import MinitrainError
from minitrain.losses import create_loss, registered
from minitrain.model.policy import GROUPS_NOTE
from minitrain.model.positions import UNLIMITED, position_limit, rotary_limit
from minitrain.model.sequence_head import make_policy
from minitrain.model.tiny import tiny_tokenizer
from minitrain.model.trial import check_meta_policy
from minitrain.model.weights import parameters_on_meta
from minitrain.tools.preflight.memory import eval_metrics
from minitrain.tools.preflight.validate import validate
from minitrain.training import atomic_dir
from minitrain.training.atomic_dir import fingerprint
from minitrain.training.setup import dry_run
from tests.messages import reports
from tests.rows import REQUIRED, ROWS
from tests.scorers import TOKENIZERS, random_base

SHAPE = dict(vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
WIDE = SHAPE | {"intermediate_size": 64}
GPT2 = dict(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
MODELS = {
    "llama": lambda: tf.LlamaConfig(**WIDE),
    "gpt2": lambda: tf.GPT2Config(**GPT2),
    "gpt_neo": lambda: tf.GPTNeoConfig(**SHAPE, num_heads=4, num_layers=2, attention_types=[[["global", "local"], 1]]),
    "gptj": lambda: tf.GPTJConfig(**GPT2, rotary_dim=4),
    "codegen": lambda: tf.CodeGenConfig(**GPT2, n_ctx=64, rotary_dim=4),
    "opt": lambda: tf.OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32),
    "biogpt": lambda: tf.BioGptConfig(**WIDE),
    "ctrl": lambda: tf.CTRLConfig(**GPT2, dff=64),
    "mpt": lambda: tf.MptConfig(vocab_size=259, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "whisper": lambda: tf.WhisperConfig(
        vocab_size=259, d_model=32, decoder_layers=2, decoder_attention_heads=4, max_target_positions=64, pad_token_id=0
    ),
    "qwen2": lambda: tf.Qwen2Config(**WIDE, num_key_value_heads=2),
    "mistral": lambda: tf.MistralConfig(**WIDE, num_key_value_heads=2, sliding_window=8),
    "mamba": lambda: tf.MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=8),
    "falcon_h1": lambda: tf.FalconH1Config(
        **WIDE, num_key_value_heads=2, head_dim=8, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8
    ),
    "bamba": lambda: tf.BambaConfig(
        **WIDE, num_key_value_heads=2, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, attn_layer_indices=[1]
    ),
    "mixtral": lambda: tf.MixtralConfig(**WIDE, num_key_value_heads=2, num_local_experts=4),
}
LIMITED = ("gpt2", "gpt_neo", "gptj", "codegen", "opt", "biogpt", "ctrl", "mpt", "whisper")
LEAKY = ("mamba", "falcon_h1", "bamba", "mpt")  # states, and distances that count from the row


def config_file(folder, base, rows: list, /, **options) -> str:
    """The path of a config over these rows."""
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"datasets": [str(folder / "c.jsonl")], "model": {"name_or_path": str(base)}}
    config |= {"batch_size": 4, "n_steps": 1, "output_dir": str(folder / "runs")}
    (folder / "c.yml").write_text(json.dumps(config | options))  # JSON is YAML
    return str(folder / "c.yml")


@pytest.fixture
def write(tmp_path, llama_folder):
    """``write(rows, key=value, ...)``: the path of a config over these rows."""
    return functools.partial(config_file, tmp_path, llama_folder)


def refused(action) -> str | None:
    try:
        action()
    except MinitrainError as error:
        return str(error)
    return None


def both_refuse(path: str) -> str | None:
    """What training and `validate`, with an estimate of memory and without, say alike."""
    trained = refused(lambda: Trainer(load_config(path)))
    assert refused(lambda: validate(load_config(path), with_memory=False)) == trained
    assert refused(lambda: validate(load_config(path))) == trained
    return trained


def saved_model(kind: str, folder) -> str:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(MODELS[kind]())
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------------------------------------ long texts


@pytest.mark.parametrize("kind", [*LIMITED, "llama", "qwen2", "mistral", "mamba"])
def test_the_limit_is_where_the_model_itself_ends(kind):
    """A text of that length is read, and the next longer one is not, or there is no limit; on the meta device too."""
    model = tf.AutoModelForCausalLM.from_config(MODELS[kind]()).eval()
    with parameters_on_meta():
        outline = tf.AutoModelForCausalLM.from_config(MODELS[kind]())
    limit = position_limit(model)
    assert position_limit(outline) == limit == (64 if kind in LIMITED else UNLIMITED)

    def read(n: int):
        places = {} if kind == "mamba" else {"position_ids": torch.arange(n)[None]}
        with torch.no_grad():
            model.base_model(input_ids=torch.ones(1, n, dtype=torch.long), use_cache=False, **places)

    read(64)
    if kind in LIMITED:
        with pytest.raises((IndexError, RuntimeError)):
            read(65)
    else:
        read(100)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_text_longer_than_the_positions(write, kind, packing, tmp_path):
    """Refused before the first step, with its line; a row of shorter ones is fine, and so is max_length."""
    model = {"name_or_path": saved_model(kind, tmp_path / kind)}
    rows = [{"prompt": "a" * 8, "response": "b"}] * 4
    long = {"prompt": "a" * 70, "response": "b"}
    path = write([*rows, long], model=model, packing=packing)
    told = both_refuse(path)
    assert reports(told, "too-large", "max_length: ", "c.jsonl:5 ", "max_length=64")
    assert both_refuse(write([*rows, long], model=model, packing=packing, max_length=64)) is None
    assert both_refuse(write(rows * 3, model=model, packing=packing)) is None
    assert "c.jsonl:2" in both_refuse(
        write([*rows[:1], long], model=model, packing=packing, validation_split=1, seed=1)
    )


ROTARY = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("kind", ROTARY)
def test_texts_whose_rotary_frequencies_depend_on_the_batch(write, kind, tmp_path):
    """They are refused, and not one token earlier: up to the limit the logits are those of the text alone."""
    torch.manual_seed(0)
    options = {"rope_parameters": ROTARY[kind] | {"rope_theta": 1e4}, "initializer_range": 0.2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**WIDE | options)).eval()
    limit = rotary_limit(model)
    assert limit == {"dynamic": 64, "longrope": 32}[kind]

    def depends(length: int, other: int) -> bool:
        """Whether a text's logits are others beside a longer text, which is read in the same batch."""
        ids = torch.arange(other)[None] % 250  # [1, other]
        with torch.no_grad():
            alone, beside = model(ids[:, :length]).logits, model(ids).logits[:, :length]
        return not torch.allclose(alone, beside, atol=1e-3)

    assert not depends(limit - 8, limit) and depends(limit, limit + 30)
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    rows = [{"prompt": "a" * 8, "response": "b"}, {"prompt": "a" * 70, "response": "b"}]
    told = both_refuse(write(rows, model={"name_or_path": str(tmp_path / "m")}))
    assert reports(told, "too-large", "max_length: ", "c.jsonl:2 ", f"max_length={limit}")
    assert both_refuse(write(rows, model={"name_or_path": str(tmp_path / "m")}, max_length=limit)) is None


def test_soft_prompts_take_positions(write, tmp_path):
    """Trained vectors before a text count."""
    model = {"name_or_path": saved_model("gpt2", tmp_path / "gpt2")}
    rows, prompt = [{"prompt": "a" * 70, "response": "b"}], {"num_virtual_tokens": 10}
    told = both_refuse(write(rows, model=model, max_length=60, soft_prompt=prompt))
    assert reports(told, "too-large", "max_length: ", "max_length=54")
    assert both_refuse(write(rows, model=model, max_length=54, soft_prompt=prompt)) is None


def test_encoders_count_positions_otherwise(write, tmp_path):
    """RoBERTa's begin behind the id of padding: 94 of 96."""
    model = {"name_or_path": str(random_base("roberta", tmp_path / "roberta"))}
    rows = [{"text": "a" * 120, "label": "x"}, {"text": "b", "label": "y"}]
    told = both_refuse(write(rows, model=model, loss="classify"))
    assert reports(told, "too-large", "max_length: ", "max_length=94")
    assert both_refuse(write(rows, model=model, loss="classify", max_length=94)) is None


# ---------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("packing", [False, True])
def test_an_outline_is_tried_as_the_model_is(kind, packing):
    """Without weights the verdict on packed rows is that of the loaded model, and nothing is warned of."""
    from minitrain.model import attention

    with parameters_on_meta():
        outline = make_policy(tf.AutoModelForCausalLM.from_config(MODELS[kind]()))
    if packing:
        attention.attend_by_document(outline.model)
    told = []
    error = refused(lambda: told.extend(check_meta_policy(outline, packing)))
    assert error is None and (told == [] or kind == "falcon_h1")
    assert outline.groups_documents == (packing and kind in LEAKY)


@pytest.mark.parametrize("kind", ["mamba", "bamba", "mixtral", "gpt2"])
def test_packed_rows_of_each_kind(write, kind, tmp_path):
    """`validate` and training read them with the model's own files, and report groups of documents."""
    path = write(ROWS["conversation"], model={"name_or_path": saved_model(kind, tmp_path / kind)}, packing=True)
    assert both_refuse(path) is None
    config = load_config(path)
    lines, trainer = validate(config, with_memory=True), Trainer(config)
    assert lines["padding"].endswith(GROUPS_NOTE) == (kind in LEAKY) == trainer.policy.groups_documents
    assert f"packing: {GROUPS_NOTE}" in trainer.notes or kind not in LEAKY
    assert "MiB" in lines["peak memory"] or kind not in LEAKY


# --------------------------------------------------------------------------------------------- pairs of texts


def test_pairs_of_texts_have_the_bos_that_their_tokenizer_writes(write, tmp_path, llama_folder):
    """Llama's writes one before each text of a pair; one more in the text is refused."""
    TOKENIZERS["llama"]().save_pretrained(tmp_path / "tokenizer")
    model = {"name_or_path": str(random_base("llama", tmp_path / "llama"))}
    pairs = [{"text": f"a{i}", "text_pair": f"b{i}", "label": str(i % 2)} for i in range(8)]
    assert both_refuse(write(pairs, model=model, loss="classify")) is None
    singles = [{"text": f"a{i}", "label": str(i % 2)} for i in range(8)]
    assert both_refuse(write(singles, model=model, loss="classify")) is None
    told = refused(
        lambda: validate(load_config(write([*pairs, pairs[0] | {"text": "<s>a"}], model=model, loss="classify")))
    )
    assert reports(told, "wrong-tokens", "c.jsonl:9: ", "'<s>'")


# -------------------------------------------------------------------------------------------- everything else


def run_with_other_options(write, folder, llama):
    Trainer(load_config(write(ROWS["conversation"], lr=1e-3, save_every_steps=1))).train()
    return write(ROWS["conversation"], lr=1e-4, save_every_steps=1), "other-run lr: "


def run_that_is_there(write, folder, llama):
    Trainer(load_config(write(ROWS["conversation"]))).train()
    return write(ROWS["conversation"], resume="never"), "already-exists runs/c"


def run_without_checkpoints(write, folder, llama):
    Trainer(load_config(write(ROWS["conversation"], save_every_steps=0))).train()
    path = write(ROWS["conversation"], n_steps=2, save_every_steps=0)
    return path, "other-run runs/c"


def checkpoint_of_other_parameters(write, folder, llama):
    Trainer(load_config(write(ROWS["conversation"], save_every_steps=1, exp_name="a"))).train()
    checkpoint = str(folder / "runs" / "a" / "checkpoints" / "step-1")
    path = write(ROWS["conversation"], n_steps=2, lora={"rank": 2}, resume=checkpoint, exp_name="b")
    return path, "mismatch runs/a/checkpoints/step-1"


def checkpoint_of_other_data(write, folder, llama):
    Trainer(load_config(write(ROWS["conversation"], save_every_steps=1))).train()
    return write(ROWS["conversation"][1:], n_steps=2, save_every_steps=1), "other-run allow_changes=[datasets]"


def checkpoint_that_contradicts_itself(write, folder, llama):
    Trainer(load_config(write(ROWS["conversation"], save_every_steps=1))).train()
    checkpoint = folder / "runs" / "c" / "checkpoints" / "step-1"
    file, manifest = checkpoint / "model-0.safetensors", checkpoint / "manifest.json"
    tensors = load_file(file)
    save_file({name: tensor[:1] for name, tensor in tensors.items()}, file)
    whole = json.loads(manifest.read_text())
    whole["files"][file.name] = fingerprint(file)
    manifest.write_text(json.dumps(whole))
    return write(ROWS["conversation"], n_steps=2, save_every_steps=1), "damaged-file step-1/model-0.safetensors"


def spoilt_run(edit, reported: str, n_steps: int = 2, sealed: bool = True):
    """A run whose folder `edit(folder, checkpoint)` has changed; with `sealed`, the manifest fits what it wrote."""

    def case(write, folder, llama):
        path = write(ROWS["conversation"], save_every_steps=1)
        Trainer(load_config(path)).train()
        run = folder / "runs" / "c"
        checkpoint = run / "checkpoints" / "step-1"
        edit(run, checkpoint)
        if sealed:
            manifest = json.loads((checkpoint / "manifest.json").read_text())
            manifest["files"] = {name: fingerprint(checkpoint / name) for name in manifest["files"]}
            (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        return write(ROWS["conversation"], n_steps=n_steps, save_every_steps=1), reported

    return case


def edit_json(name: str, change):
    """Let `change` edit what a JSON file of the checkpoint holds."""

    def edit(run, checkpoint):
        content = json.loads((checkpoint / name).read_text())
        change(content)
        (checkpoint / name).write_text(json.dumps(content))

    return edit


def without_a_row(index: dict) -> None:
    pieces = next(iter(index["model"].values()))["pieces"]
    pieces.clear()


def in_another_folder(index: dict) -> None:
    next(iter(index["model"].values()))["pieces"][0][0] = "../model-0.safetensors"


def encoder(reported: str, **options):
    def case(write, folder, llama):
        model = {"name_or_path": str(random_base("roberta", folder / "roberta"))}
        return write(ROWS["classification"], model=model, loss="classify", max_length=60, **options), reported

    return case


def scorer(reported: str, loss, edit=lambda folder: None):
    """The model that a classification has made."""

    def case(write, folder, llama):
        Trainer(load_config(write(ROWS["classification"], loss="classify", exp_name="a"))).train()
        final = folder / "runs" / "a" / "final"
        edit(final)
        return write(ROWS["classification"], model={"name_or_path": str(final)}, loss=loss, exp_name="b"), reported

    return case


def lose_a_block(folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def file_in_place_of_checkpoints(write, folder, llama):
    (folder / "runs" / "c").mkdir(parents=True)
    (folder / "runs" / "c" / "checkpoints").write_text("")
    return write(ROWS["conversation"]), "wrong-path runs/c/checkpoints: "


def folder_in_place_of_metrics(write, folder, llama):
    (folder / "runs" / "c" / "metrics.jsonl").mkdir(parents=True)
    return write(ROWS["conversation"]), "wrong-path runs/c/metrics.jsonl: "


def another_archive(write, folder, llama):
    (folder / "a.safetensors").parent.mkdir(exist_ok=True)
    save_file({"x": torch.zeros(2)}, folder / "a.safetensors")
    model = {"name_or_path": str(llama), "archive": str(folder / "a.safetensors")}
    return write(ROWS["conversation"], model=model), "mismatch model.archive: "


def another_teacher(write, folder, llama):
    model = saved_model("gpt2", folder / "gpt2")
    TOKENIZERS["llama"]().save_pretrained(model)
    return write(ROWS["conversation"], loss={"name": "kd", "teacher": model}), "mismatch loss.teacher: "


def short_teacher(write, folder, llama):
    model = saved_model("gpt2", folder / "gpt2")
    rows = [{"prompt": "a" * 70, "response": "b"}]
    return write(rows, loss={"name": "kd", "teacher": model}), "too-large GPT2LMHeadModel"


def unfit_adapter(write, folder, llama):
    Trainer(load_config(write(ROWS["conversation"], lora={"rank": 2}, exp_name="a"))).train()
    shutil.copytree(folder / "runs" / "a" / "final", folder / "adapter")
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    model = {"name_or_path": str(llama), "adapter": str(folder / "adapter")}
    return write(ROWS["conversation"], model=model), "mismatch lora_A"


def damaged_adapter(write, folder, llama):
    path, _ = unfit_adapter(write, folder, llama)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    return path, "unreadable adapter_model.safetensors"


def weights_that_lack_one(write, folder, llama):
    shutil.copytree(llama, folder / "m")
    tensors = load_file(folder / "m" / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "m" / "model.safetensors", metadata={"format": "pt"})
    model = {"name_or_path": str(folder / "m")}
    return write(ROWS["conversation"], model=model), "damaged-file model.layers.1.mlp.up_proj.weight"


def weights_of_another_shape(write, folder, llama):
    shutil.copytree(llama, folder / "m")
    tensors = load_file(folder / "m" / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "m" / "model.safetensors", metadata={"format": "pt"})
    return write(ROWS["conversation"], model={"name_or_path": str(folder / "m")}), "mismatch model.norm.weight"


def damaged_weights(write, folder, llama):
    shutil.copytree(llama, folder / "m")
    (folder / "m" / "model.safetensors").write_bytes(b"version https://git-lfs")
    return write(ROWS["conversation"], model={"name_or_path": str(folder / "m")}), "damaged-file model.safetensors"


def of_options(reported: str, rows=ROWS["conversation"], **options):
    return lambda write, folder, llama: (write(rows, **options), reported)


# What makes a run that cannot start, and the code of the error with what its message names.
CASES = {
    "fused and foreach": of_options("invalid-value optimizer: ", optimizer_args={"foreach": True}),
    "a text as a number": of_options("invalid-value optimizer: ", optimizer="SGD", optimizer_args={"momentum": "x"}),
    "a value out of bounds": of_options("invalid-value optimizer: ", optimizer="SGD", optimizer_args={"momentum": -1}),
    "a block that is not there": of_options("out-of-range freeze_layers: 7 ", freeze_layers=[7]),
    "nothing left to train on": of_options("no-data validation_split: ", validation_split=24),
    "no layer of a name": of_options(
        "not-a-choice lora.target_modules: ", lora={"rank": 2, "target_modules": ["nothing"]}
    ),
    "a bad row": of_options("invalid-row c.jsonl:1: ", rows=[{"prompt": "a"}]),
    "more steps to warm up than there are": of_options("out-of-range warmup_steps: 7 ", warmup_steps=7, n_steps=None),
    "documents to draw that no row has": lambda write, folder, llama: (
        write(ROWS["conversation"], datasets=[{"path": str(folder / "c.jsonl"), "p_oracle": 0.5}]),
        "no-effect c.jsonl:1: ",
    ),
    "more bad rows than may be": of_options(
        "invalid-row max_bad_rows=1",
        rows=[*ROWS["conversation"], {}, {}],
        on_bad_row="skip",
        max_bad_rows=1,
    ),
    "rows of another kind": of_options("invalid-row c.jsonl:1: ", loss="dpo"),
    "no model": lambda write, folder, llama: (
        write(ROWS["conversation"], model={"name_or_path": str(folder)}),
        "wrong-path model.name_or_path: ",
    ),
    "other options": run_with_other_options,
    "a run that is there": run_that_is_there,
    "a shorter run without checkpoints": run_without_checkpoints,
    "a checkpoint of other parameters": checkpoint_of_other_parameters,
    "a checkpoint of other data": checkpoint_of_other_data,
    "a checkpoint that contradicts itself": checkpoint_that_contradicts_itself,
    "a checkpoint that is none": lambda write, folder, llama: (
        write(ROWS["conversation"], resume=str(llama)),
        "damaged-file manifest.json",
    ),
    "a checkpoint without a row": spoilt_run(edit_json("index.json", without_a_row), "damaged-file index.json: "),
    "a checkpoint in two folders": spoilt_run(
        edit_json("index.json", in_another_folder), "damaged-file '../model-0.safetensors'"
    ),
    "a checkpoint without an index": spoilt_run(edit_json("index.json", dict.clear), "damaged-file step-1: "),
    "a checkpoint of another step": spoilt_run(
        edit_json("manifest.json", lambda manifest: manifest.update(step=7)),
        "damaged-file step-7",
        sealed=False,
    ),
    "a manifest without a state": spoilt_run(
        edit_json("manifest.json", lambda manifest: manifest["files"].pop("state.json")), "damaged-file state.json"
    ),
    "a manifest that names another folder": spoilt_run(
        edit_json("manifest.json", lambda manifest: manifest["files"].update({"../x": {}})),
        "damaged-file '../x'",
        sealed=False,
    ),
    "a damaged checkpoint": spoilt_run(
        lambda run, checkpoint: (checkpoint / "state.json").write_text("{"), "damaged-file state.json", sealed=False
    ),
    "a damaged end of a run": spoilt_run(
        lambda run, checkpoint: (run / "run.json").write_text("{"), "damaged-file run.json"
    ),
    "a damaged config of a run": spoilt_run(
        lambda run, checkpoint: ((run / "config.yml").write_text("\0"), (checkpoint / "state.json").write_text("{}")),
        "damaged-file config.yml",
    ),
    "a soft prompt before an encoder": encoder("conflict soft_prompt: ", soft_prompt={"num_virtual_tokens": 2}),
    "packed rows of an encoder": encoder("conflict packing: ", packing=True),
    "outputs in another order": scorer("mismatch loss.labels: ", {"name": "classify", "labels": ["odd", "even"]}),
    "a scorer without a block": scorer("damaged-file model.layers.1.", "classify", lose_a_block),
    "a file in the place of checkpoints": file_in_place_of_checkpoints,
    "a folder in the place of metrics": folder_in_place_of_metrics,
    "a place that nobody can write to": of_options("not-writable /dev/null/c: ", output_dir="/dev/null"),
    "a name that is too long": of_options("not-writable File name too long", exp_name="x" * 300),
    "an unknown metric": of_options(
        "not-a-choice early_stopping.metric: ",
        validation_split=4,
        early_stopping={"metric": "perplexty"},
        save_best=True,
    ),
    "another archive": another_archive,
    "another teacher": another_teacher,
    "a teacher's positions": short_teacher,
    "an adapter that does not fit": unfit_adapter,
    "a damaged adapter": damaged_adapter,
    "a missing weight": weights_that_lack_one,
    "a weight of another shape": weights_of_another_shape,
    "a pointer instead of weights": damaged_weights,
}


@pytest.mark.parametrize("case", CASES)
def test_what_training_refuses(case, write, tmp_path, llama_folder):
    """Refused by both before the first step, in the same words."""
    path, reported = CASES[case](write, tmp_path, llama_folder)
    code, _, part = reported.partition(" ")
    told = refused(lambda: validate(load_config(path), with_memory=False))
    assert reports(told, code, part)
    assert refused(lambda: validate(load_config(path))) == told
    steps = []
    assert refused(lambda: Trainer(load_config(path), on_step_end=steps.append).train()) == told and not steps


# --------------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize("loss", registered())
def test_the_metrics_of_an_evaluation_are_known_before(write, loss):
    """Without weights, in the order in which training logs them."""
    options = {"name": loss} | REQUIRED.get(loss, {})
    kind = create_loss(**options).example_type
    more = {"eval_generate": {"n_examples": 1, "max_new_tokens": 2}} if loss in ("sft", "kd", "dpo") else {}
    path = write(ROWS[kind], loss=options, validation_split=8, model={"name_or_path": "tiny"}, **more)
    trainer = Trainer(load_config(path))
    trainer.train()
    assert [*eval_metrics(dry_run(load_config(path))), "seconds"] == list(trainer.eval_metrics)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba", "bert"])
def test_tensors_without_a_place(write, kind, tmp_path, caplog):
    """Training and `validate` name the same tensors of the model's files, and none where all are used."""
    if kind == "bert":
        random_base("bert", tmp_path / "m")
    else:
        saved_model(kind, tmp_path / "m")
    file, path = tmp_path / "m" / "model.safetensors", None
    for more, n in (({}, 0), ({"visual.weight": torch.ones(2), "visual.bias": torch.ones(2)}, 1)):
        save_file(load_file(file) | more, file, metadata={"format": "pt"})
        labels = {"loss": "classify", "max_length": 60} if kind == "bert" else {}
        rows = ROWS["classification" if kind == "bert" else "conversation"]
        path = write(rows, model={"name_or_path": str(tmp_path / "m")}, **labels)
        caplog.clear()
        Trainer(load_config(path))
        trained = list(caplog.messages)
        caplog.clear()
        validate(load_config(path))
        assert caplog.messages == trained and len(trained) == max(n, kind == "bert")


def test_a_run_that_is_finished(write):
    """Training says so and does nothing; `validate` warns of it."""
    path = write(ROWS["conversation"])
    Trainer(load_config(path)).train()
    assert "runs/c " in validate(load_config(path))["warning"]


def test_a_checkpoint_is_hashed_only_to_go_on_from_it(write, monkeypatch):
    """Each file of the newest one once, by training and by `validate`; none when the run is finished or a row is wrong.

    A checkpoint can be as large as 100 GB.
    """
    hashed, fingerprint = [], atomic_dir.fingerprint
    monkeypatch.setattr(atomic_dir, "fingerprint", lambda file: hashed.append(file) or fingerprint(file))
    rows, options = ROWS["conversation"], {"save_every_steps": 1}
    Trainer(load_config(write(rows, **options | {"n_steps": 2}))).train()
    longer = load_config(write(rows, **options | {"n_steps": 3}))
    newest = Path(longer.output_dir, "c", "checkpoints", "step-2")
    files = sorted(path for path in newest.iterdir() if path.name != "manifest.json")
    for with_memory in (False, True):
        hashed.clear()
        validate(longer, with_memory=with_memory)
        assert sorted(hashed) == files
    hashed.clear()
    assert refused(lambda: validate(load_config(write([*rows, {"prompt": 1}], **options | {"n_steps": 3}))))
    finished = load_config(write(rows, **options | {"n_steps": 2}))
    assert "is finished" in validate(finished)["warning"]
    Trainer(finished).train()
    assert not hashed
    Trainer(longer).train()
    assert [file for file in hashed if file.parent == newest and file.name == "index.json"] == [newest / "index.json"]


def test_shares_of_what_is_cut(write, capsys, tmp_path):
    """Counts with `of` and a share, in both; more than a third is a warning, even where only warnings are shown."""
    rows = [{"prompt": "a" * (100 if i < 9 else 2), "response": "b"} for i in range(20)]
    path = write(rows, max_length=40)
    cut = f"{tmp_path / 'c.jsonl'}: 9 truncated examples of 20 (45.0%)"
    warning = f"{cut}, more than a third. Raise max_length=40."
    for quiet in ([], ["--quiet"]):
        assert main(["train", path, "--overrides", f"exp_name=x{len(quiet)}", *quiet]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"warning: {warning}" in lines and (cut in lines) == (not quiet)
    for options in ([], ["--all", str(tmp_path)]):
        assert main(["validate", *(options or [path])]) == 0
        assert warning in capsys.readouterr().out
    assert main(["train", write(rows[8:], max_length=40), "--overrides", "exp_name=y"]) == 0
    out = capsys.readouterr().out
    assert "1 truncated examples of 12 (8.3%)" in out and "warning" not in out


@pytest.mark.parametrize("n", [1, 5, 16, 17, 300])
def test_what_is_cut_is_counted_among_the_examples_that_are_used(write, n):
    """n_examples: 5 of a long file, of which the first 16 rows are short and each sixth one is left out."""
    rows = [{"prompt": "a" * (100 if i >= 16 else 2), "response": "b" * (90 if i % 6 == 5 else 1)} for i in range(600)]
    path = write(rows, max_length=60, truncation="prompt")
    data = {"path": json.loads((open(path)).read())["datasets"][0], "n_examples": n}
    figures = validate(load_config(write(rows, max_length=60, datasets=[data])), with_memory=False)
    cut = sum(i >= 16 or i % 6 == 5 for i in range(n))
    want = f"{cut} truncated examples of {n} ({100 * cut / n:.1f}%)" if cut else "nothing"
    assert figures["left out"] == want
    drop = write(rows, max_length=60, datasets=[data], truncation="drop")
    if n < 14:
        fits = [i for i in range(600) if i < 16 and i % 6 != 5][:n]
        lost = max(fits) + 1 - n
        want = (
            f"{lost} examples dropped (longer than max_length) of {n + lost} ({100 * lost / (n + lost):.1f}%)"
            if lost
            else "nothing"
        )
        assert validate(load_config(drop), with_memory=False)["left out"] == want
