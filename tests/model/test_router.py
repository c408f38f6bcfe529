"""The router's auxiliary loss against transformers' own on all tokens of a step, and the load of the experts."""

import copy
import json

import pytest
import torch
import transformers as tf

from minitrain import ConfigError, Trainer, load_config
from minitrain.batch import Document, collate
from minitrain.distributed.parallel import SingleDevice
from minitrain.losses import Models, create_loss
from minitrain.model import attention
from minitrain.model.policy import Policy
from minitrain.model.recompute import checkpoint_activations
from minitrain.model.router import make_routing
from minitrain.model.tiny import tiny_tokenizer
from minitrain.tools.preflight.validate import validate
from minitrain.training.router_step import RouterStep, load_metrics
from minitrain.training.step import Precision, forward_backward
from tests.conftest import random_llama
from tests.messages import raises
from tests.rows import ROWS

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
COEF = 0.5  # large enough to matter in each gradient
SHAPE = dict(
    vocab_size=288,
    hidden_size=32,
    intermediate_size=24,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MODELS = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SHAPE, num_local_experts=4)),
    "qwen3-moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SHAPE, num_experts=6, head_dim=8)),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**SHAPE, num_experts=5)),
    "gpt-oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**SHAPE, num_local_experts=4, head_dim=8)),
}
LENGTHS = (21, 9, 30, 13)


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().train()


def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in LENGTHS:
        mask = torch.ones(length, dtype=torch.uint8)
        mask[:3] = 0
        made.append(Document(torch.randint(3, 259, (length,), generator=generator, dtype=torch.int32), mask))
    return made


def layouts(docs: list[Document]) -> dict[str, list[list[list[Document]]]]:
    """Micro-batches of rows of documents."""
    a, b, c, d = docs
    return {
        "padded": [[[a], [b], [c], [d]]],
        "three micro-batches": [[[a]], [[b], [c]], [[d]]],
        "packed": [[[a, b], [c, d]]],
        "packed micro-batches": [[[a, b]], [[c, d]], []],
    }


def theirs(model: torch.nn.Module, docs: list[Document]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Auxiliary loss, loss and gradients of transformers: all documents as one padded batch."""
    model.zero_grad(set_to_none=True)
    batch = collate([[doc] for doc in docs], 0)
    mask = (batch.doc_ids >= 0).long()
    out = model(
        input_ids=batch.input_ids, attention_mask=mask, labels=batch.labels, output_router_logits=True, use_cache=False
    )
    loss = out.loss + (COEF - model.router_aux_loss_coef) * out.aux_loss
    loss.backward()
    return float(out.aux_loss.detach()), float(loss.detach()), gradients(model)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def policy_of(model: torch.nn.Module, coef: float | None = COEF) -> Policy:
    model.zero_grad(set_to_none=True)
    policy = Policy(model)
    policy.routing = make_routing(model, coef)
    return policy


def our_step(policy: Policy, micro_batches: list, dtype: torch.dtype = torch.float32, loss: str = "sft"):
    batches = [collate(rows, 0) for rows in micro_batches]
    return forward_backward(create_loss(loss), batches, Models(policy), SingleDevice(CPU), Precision(dtype, CPU))


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 2e-5) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        atol = tolerance * gradient.abs().max().item() + 1e-7
        torch.testing.assert_close(got[name], gradient, rtol=tolerance, atol=atol, msg=name)


@pytest.mark.parametrize("layout", layouts([None] * 4))
@pytest.mark.parametrize("name", MODELS)
def test_the_auxiliary_loss_is_that_of_transformers_on_the_full_step(name, layout):
    """Its value, the loss and all gradients, however the step is split, and without the padding."""
    model, docs = model_of(name), documents()
    aux_loss, loss, want = theirs(model, docs)
    if "packed" in layout:
        if model.config._attn_implementation != "sdpa":
            pytest.skip("its attention does not separate documents")
        attention.attend_by_document(model)
    output = our_step(policy_of(model), layouts(docs)[layout])
    assert output.metrics()["router/aux_loss"] == pytest.approx(aux_loss, rel=1e-5)
    assert float(output.loss) == pytest.approx(loss, rel=1e-5)
    assert_same(gradients(model), want)


def test_the_loss_metric_is_without_the_auxiliary_loss():
    """So it compares with the loss of an evaluation."""
    model = model_of("mixtral")
    output = our_step(policy_of(model), layouts(documents())["three micro-batches"])
    metrics = output.metrics()
    assert float(output.loss) == pytest.approx(metrics["loss"] + COEF * metrics["router/aux_loss"], rel=1e-5)
    without = our_step(policy_of(model, 0.0), layouts(documents())["padded"])
    assert "router/aux_loss" not in without.metrics()
    assert float(without.loss) == pytest.approx(metrics["loss"], rel=1e-5)


def test_recomputed_blocks_count_once():
    """With activation checkpointing, the backward pass runs the router again."""
    model, docs = model_of("mixtral"), documents()
    aux_loss, _, want = theirs(model, docs)
    load = our_step(policy_of(model), layouts(docs)["padded"]).load
    checkpoint_activations(model)
    output = our_step(policy_of(model), layouts(docs)["three micro-batches"])
    assert output.metrics()["router/aux_loss"] == pytest.approx(aux_loss, rel=1e-5)
    assert_same(gradients(model), want)
    assert torch.equal(output.load, load)


def test_a_shared_prompt_counts_in_each_document_that_has_it():
    """The step is that of the documents in rows of their own."""
    model, docs = model_of("qwen3-moe"), documents()
    for i in (0, 2):
        docs[i + 1].ids[:5] = docs[i].ids[:5]
        docs[i].mask[:5], docs[i + 1].mask[:5] = 0, 0
    aux_loss, _, want = theirs(model, docs)
    load = our_step(policy_of(model), layouts(docs)["padded"]).load
    attention.attend_by_document(model)
    shared = [Document(doc.ids, doc.mask, 5 * (i % 2)) for i, doc in enumerate(docs)]
    output = our_step(policy_of(model), [[shared]])
    assert output.metrics()["router/aux_loss"] == pytest.approx(aux_loss, rel=1e-5)
    assert_same(gradients(model), want)
    assert torch.equal(output.load, load)


def test_choices_are_counted_with_the_dropout_of_the_step():
    """The passes that count them leave the random state alone, so the step drops the same activations."""
    torch.manual_seed(0)
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**SHAPE, num_local_experts=4, attention_dropout=0.5)).train()
    policy, batches = policy_of(model), [collate(rows, 0) for rows in layouts(documents())["three micro-batches"]]
    step = RouterStep(policy, batches, SingleDevice(CPU))
    total = 0
    for batch in batches:
        with step.recording():
            policy(batch)
        total += torch.cat([step.record.choices, step.record.n_tokens[None]])
    assert torch.equal(step.choices, total)
    model.eval()
    assert not torch.equal(RouterStep(policy, batches, SingleDevice(CPU)).choices, total)


def test_passes_without_gradients_do_not_count():
    """Such as those of a reference that is the policy with its initial weights."""
    policy, batch = policy_of(model_of("mixtral")), collate([[doc] for doc in documents()], 0)
    with policy.routing.recording() as once:
        policy(batch)
    with policy.routing.recording() as record:
        policy(batch)
        with torch.no_grad():
            policy(batch)
    assert torch.equal(record.choices, once.choices) and torch.equal(record.load, once.load)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_finite_and_near(name):
    """Under autocast and with weights in bfloat16."""
    model, docs = model_of(name), documents()
    aux_loss, _, _ = theirs(model, docs)
    for policy in (policy_of(model), policy_of(copy.deepcopy(model).bfloat16())):
        output = our_step(policy, layouts(docs)["three micro-batches"], torch.bfloat16)
        assert output.metrics()["router/aux_loss"] == pytest.approx(aux_loss, rel=0.05)
        assert all(gradient.isfinite().all() for gradient in gradients(policy.model).values())


# ------------------------------------------------------------------------------------------------------------- the load


@pytest.mark.parametrize("name", MODELS)
def test_the_load_is_what_transformers_experts_receive(name):
    """Counted by a hook on the experts of each layer, of documents without padding."""
    model, docs = model_of(name), documents()
    output = our_step(policy_of(model, 0.0), layouts(docs)["three micro-batches"])
    seen = {}
    for layer, block in enumerate(model.model.layers):
        block.mlp.experts.register_forward_pre_hook(
            lambda module, args, layer=layer: seen.setdefault(layer, []).append(args[1])
        )
    for doc in docs:
        model(input_ids=doc.ids[None].long())
    n_experts = output.load.shape[1]
    want = torch.stack([torch.bincount(torch.cat(seen[i]).flatten(), minlength=n_experts) for i in range(2)])
    assert torch.equal(output.load, want)
    assert int(output.load.sum()) == 2 * 2 * sum(LENGTHS)  # layers, experts of a token


def test_metrics_of_the_load():
    """Means over layers of (largest - mean) / mean, and of the fraction of experts without tokens."""
    metrics = load_metrics(torch.tensor([[3, 3, 3, 3], [0, 0, 8, 4], [0, 0, 0, 0]]))
    assert metrics == pytest.approx({"router/max_violation": (0 + 5 / 3) / 2, "router/unused_experts": 0.25})
    assert load_metrics(torch.zeros(2, 4)) == {}


# ------------------------------------------------------------------------------------------------- options and refusals


def test_the_model_config_is_obeyed_and_reported(capsys, moe_config):
    """output_router_logits in config.json adds its own coefficient; 0 is off."""
    model = model_of("mixtral")
    assert make_routing(model, None).aux_loss is None
    model.config.output_router_logits = True
    model.router_aux_loss_coef = 0.02
    aux_loss = make_routing(model, None).aux_loss
    assert aux_loss.coef == 0.02 and aux_loss.from_config
    assert make_routing(model, 0.0).aux_loss is None
    assert make_routing(model, 0.3).aux_loss[:3] == (0.3, 4, 2)
    config = moe_config("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.25})
    assert validate(config)["router"].startswith("auxiliary loss times 0.25 (the model's config")
    Trainer(config).train()
    assert "router: auxiliary loss times 0.25" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["dense", "other balancing", "another formula"])
def test_a_model_without_this_loss_is_refused(kind, wording):
    """With the reason, before the first step."""
    made = {
        "dense": random_llama,
        "other balancing": lambda: tf.DeepseekV3ForCausalLM(
            tf.DeepseekV3Config(**SHAPE, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=0)
        ),
        "another formula": lambda: tf.DogeForCausalLM(tf.DogeConfig(**SHAPE, is_moe=True, num_experts=4)),
    }
    model = made[kind]()
    with raises(ConfigError, "unsupported-model", "model.router_aux_loss_coef: ", type(model).__name__) as caught:
        make_routing(model, 0.1)
    wording(caught.value)
    assert make_routing(model, None) is None or make_routing(model, None).aux_loss is None


@pytest.mark.parametrize(
    "loss, overrides",
    [
        ("sft", ("packing=true", "lora.rank=4")),
        ("dft", ("model.policy_dtype=bfloat16",)),
        ("dpo", ("packing=true",)),
        ("kto", ("lora.rank=4",)),
        ("policy", ("soft_prompt.num_virtual_tokens=3",)),
        ("policy", ("loss.vf_coef=0.1", "activation_checkpointing=true")),
        ("kd", ("loss.teacher=tiny",)),
    ],
)
def test_every_loss_trains_with_it(loss, overrides, moe_config):
    """Two steps of two micro-batches, with metrics in their range; the loss of an even router is top_k."""
    example_type = create_loss(loss, **({"teacher": "tiny"} if loss == "kd" else {})).example_type
    overrides = (f"loss.name={loss}", "model.router_aux_loss_coef=0.1", *overrides)
    trainer = Trainer(moe_config("qwen3-moe", {}, *overrides, rows=ROWS[example_type]))
    trainer.train()
    metrics = trainer.train_metrics
    assert 1.9 < metrics["router/aux_loss"] < 6
    assert 0 < metrics["router/max_violation"] <= 5 and 0 <= metrics["router/unused_experts"] < 1


def test_a_loss_without_lm_head_refuses_it(moe_config, wording):
    """Its models have no auxiliary loss in transformers."""
    with raises(ConfigError, "no-effect", "model.router_aux_loss_coef: ", "value") as caught:
        moe_config("mixtral", {}, "loss.name=value", "model.router_aux_loss_coef=0.1")
    wording(caught.value)


@pytest.fixture
def moe_config(tmp_path):
    """``moe_config("mixtral", {"router_aux_loss_coef": 0.1}, "lr=0.1")``: a run of two steps with a saved model."""

    def make(name: str, changes: dict, *overrides: str, rows: list[dict] = ROWS["conversation"]):
        model = model_of(name)
        for key, value in changes.items():
            setattr(model.config, key, value)
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        base = {
            "model": {"name_or_path": str(tmp_path / name)},
            "datasets": [{"path": str(tmp_path / "rows.jsonl")}],
            "output_dir": str(tmp_path / "runs"),
            "exp_name": "run",
            "chat_template": "chatml",
            "total_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "n_steps": 2,
            "log_every_steps": 1,
            "num_proc": 1,
            "device": "cpu",
        }
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_config(base, list(overrides))

    return make
