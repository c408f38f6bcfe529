"""Classifiers and reward models: every kind of model gives what transformers gives, saved, adapted, merged."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from minitrain import ConfigError
from minitrain.batch import Batch, Document, collate
from minitrain.config.schema import Config
from minitrain.config.sections import LoRAConfig, ModelConfig, SoftPromptConfig
from minitrain.data.encode import TruncationConfig, encode
from minitrain.data.examples import ClassificationExample
from minitrain.data.template import Template
from minitrain.model.adapter_config import read_adapter_outputs
from minitrain.model.adapter_files import adapt_model, load_adapter
from minitrain.model.load import build_policy, load_merged, load_model, load_tokenizer, trained_outputs
from minitrain.model.save import save_model
from minitrain.model.sequence_head import make_policy
from tests.conftest import SHARED
from tests.messages import raises
from tests.scorers import BASES, DECODERS, ENCODERS, TOKENIZERS, random_base
from tests.tensors import close, shaken

NAMES = ["no", "yes", "maybe"]
TEXTS = [("a", None), ("a longer text, é ☃", None), ("one", "two of a pair"), ("one that is long enough", "b")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each kind as a folder with a base model."""
    return {kind: random_base(kind, tmp_path_factory.mktemp(kind)) for kind in BASES}


def loaded(folder, packing=False, **options):
    """(policy, tokenizer) of a config over a folder."""
    config = Config(model=ModelConfig(str(folder), **options.pop("model", {})), packing=packing, **options)
    tokenizer = load_tokenizer(config.model, scores=True)
    policy, _ = build_policy(config, tokenizer, outputs=NAMES)
    return policy.eval(), tokenizer


def documents(tokenizer, texts=TEXTS) -> list[Document]:
    """As the token cache has them."""
    template, made = Template(tokenizer, "none"), []
    for text, pair in texts:
        record = ClassificationExample(text, pair, "yes")
        (tokens,) = encode(record, template, TruncationConfig(96))
        columns = {name: torch.tensor(column) for name, column in tokens.token_features.items()}
        made.append(Document(torch.tensor(tokens.ids), torch.tensor(tokens.mask), token_features=columns))
    return made


def widened(batch: Batch, more: int, ids: int) -> Batch:
    """More padding on the right, of any token."""

    def wide(tensor, value):
        return torch.cat([tensor, torch.full((len(tensor), more), value, dtype=tensor.dtype)], 1)

    positions = torch.arange(batch.input_ids.shape[1] + more).expand(len(batch.input_ids), -1)
    columns = {name: wide(column, 1) for name, column in batch.token_features.items()}
    places = wide(batch.input_ids, ids), positions, wide(batch.labels, -100), wide(batch.doc_ids, -1)
    return Batch(*places, batch.n_docs, token_features=columns)


def one_by_one(model, tokenizer, texts=TEXTS) -> torch.Tensor:
    """transformers' own logits of each text alone -> [n, L]."""
    rows = [model(**tokenizer(*(part for part in text if part), return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(rows).float()


def ours(policy, tokenizer, texts=TEXTS) -> torch.Tensor:
    return policy(collate([[document] for document in documents(tokenizer, texts)], tokenizer.pad_token_id)).scores


# ------------------------------------------------------------------------------------------------- plain models


@pytest.mark.parametrize("kind", BASES)
def test_scores_are_those_of_the_model_alone(folders, kind):
    """Single texts and pairs, in one batch, however much padding there is and whatever stands in it."""
    policy, tokenizer = loaded(folders[kind])
    want = one_by_one(policy.model, tokenizer)
    assert want.std(0).min() > 1e-2  # the texts matter
    batch = collate([[document] for document in documents(tokenizer)], tokenizer.pad_token_id)
    close(policy(batch).scores, want)
    for more, ids in ((1, 40), (9, 7)):
        close(policy(widened(batch, more, ids)).scores, want)
    empty = policy(collate([], tokenizer.pad_token_id)).scores
    assert empty.shape == (0, 3) and empty.requires_grad


@pytest.mark.parametrize("kind", DECODERS)
def test_packed_scores(folders, kind):
    """Several documents in a row: each as if it were alone."""
    policy, tokenizer = loaded(folders[kind], packing=True)
    assert policy.supports_document_masking
    close(policy(collate([documents(tokenizer)], tokenizer.pad_token_id)).scores, one_by_one(policy.model, tokenizer))


@pytest.mark.parametrize("kind", BASES)
def test_what_is_saved_is_what_transformers_loads(folders, tmp_path, kind):
    """Names of labels, and equal logits in a batch that its own tokenizer has padded, on either side for a decoder."""
    policy, tokenizer = loaded(folders[kind])
    save_model(policy.model, tokenizer, tmp_path, torch.float32)
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert model.config.id2label == dict(enumerate(NAMES)) and model.config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert model.config.problem_type == "single_label_classification"
    singles = [*TEXTS[:2], ("a third", None)]
    want = ours(policy, tokenizer, singles)
    theirs = tf.AutoTokenizer.from_pretrained(tmp_path)
    for side in ("right", "left") if kind in ("llama", "qwen2") else ("right",):
        theirs.padding_side = side
        batch = theirs([text for text, _ in singles], padding=True, return_tensors="pt")
        close(model(**batch).logits, want)
    assert trained_outputs(ModelConfig(str(tmp_path))) == NAMES
    again = load_model(ModelConfig(str(tmp_path)), theirs, 5, outputs=NAMES)
    close(ours(make_policy(again).eval(), theirs, singles), want)


@pytest.mark.parametrize("kind", DECODERS)
def test_an_end_token_inside_the_text(folders, tmp_path, kind):
    """The score is that of the last token, though the text holds EOS, or ends with it, and EOS was the pad token
    (transformers#35352)."""
    policy, tokenizer = loaded(folders[kind])
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    end = tokenizer.eos_token
    texts = [(f"a{end}b", None), (f"the end{end}", None), (f"{end}{end}x", None)]
    found = ours(policy, tokenizer, texts)
    for row, (text, _) in zip(found, texts, strict=True):
        hidden = policy.model.base_model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        close(row, policy.model.score(hidden))
    save_model(policy.model, tokenizer, tmp_path, torch.float32)
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = tf.AutoTokenizer.from_pretrained(tmp_path)([t for t, _ in texts], padding=True, return_tensors="pt")
    close(model(**batch).logits, found)


def test_roberta_counts_positions_from_its_own_pad_id(tmp_path):
    """A tokenizer that pads by another id changes nothing, neither now nor after saving."""
    words = TOKENIZERS["roberta"]()
    words.pad_token = "<mask>"
    policy, tokenizer = loaded(random_base("roberta", tmp_path / "base", words))
    assert tokenizer.pad_token_id == 4 and policy.model.config.pad_token_id == 1
    want = one_by_one(policy.model, tokenizer)
    close(ours(policy, tokenizer), want)
    save_model(policy.model, tokenizer, tmp_path / "saved", torch.float32)
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    close(one_by_one(model, tokenizer), want)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_new_head_depends_on_the_seed_alone(folders, kind):
    """So all ranks have the same one, whatever they have drawn before."""
    tokenizer, config = load_tokenizer(ModelConfig(str(folders[kind])), scores=True), ModelConfig(str(folders[kind]))
    heads = []
    for before, seed in ((0, 3), (1, 3), (1, 4)):
        torch.manual_seed(before)
        model = load_model(config, tokenizer, seed, outputs=NAMES)
        heads.append(
            torch.cat([p.flatten() for name in model.heads.new for p in model.get_submodule(name).parameters()])
        )
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert model.heads.new == {"bert": ["bert.pooler.dense", "classifier"], "llama": ["score"]}[kind]


def test_what_does_not_fit_is_told(folders, tmp_path):
    """Labels in another order, files of another model, packing; what positions there are."""
    policy, tokenizer = loaded(folders["roberta"])
    assert policy.position_limit == policy.n_positions == 94
    policy, tokenizer = loaded(folders["bert"])
    assert policy.position_limit == policy.n_positions == 96
    with raises(ConfigError, "conflict", "packing: "):
        loaded(folders["bert"], packing=True)
    save_model(policy.model, tokenizer, tmp_path / "saved", torch.float32)
    with raises(ConfigError, "mismatch", "loss.labels=[no,yes,maybe]"):
        load_model(ModelConfig(str(tmp_path / "saved")), tokenizer, 0, outputs=["maybe", "no", "yes"])
    with raises(ConfigError, "mismatch", "2 outputs"):
        load_model(ModelConfig(str(tmp_path / "saved")), tokenizer, 0, outputs=["a", "b"])
    file = tmp_path / "saved" / "model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if "layer.1.attention" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with raises(ConfigError, "damaged-file", "bert.encoder.layer.1.attention"):
        load_model(ModelConfig(str(tmp_path / "saved")), tokenizer, 0, outputs=NAMES)


@pytest.mark.parametrize("kind, name", [("bert", "bert-base-uncased"), ("gpt2", "gpt2"), ("llama", "mistral-v3")])
def test_with_real_tokenizers(tmp_path, kind, name):
    """Vocabularies of 30,522, 50,257 and 32,768: scores, and the saved model in transformers' hands, are one."""
    if not SHARED.exists():
        pytest.skip("the tokenizers are not there")
    words = tf.AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    policy, tokenizer = loaded(random_base(kind, tmp_path / "base", words))
    close(ours(policy, tokenizer), one_by_one(policy.model, tokenizer))
    save_model(policy.model, tokenizer, tmp_path / "saved", torch.float32)
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    theirs = tf.AutoTokenizer.from_pretrained(tmp_path / "saved")
    batch = theirs([text for text, _ in TEXTS[:2]], padding=True, return_tensors="pt")
    close(model(**batch).logits, ours(policy, tokenizer, TEXTS[:2]))


# ----------------------------------------------------------------------------------------------------- adapters

QUERY_VALUE = {"bert": ["query", "value"], "roberta": ["query", "value"], "distilbert": ["q_lin", "v_lin"]}
QUERY_VALUE |= {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "qwen2": ["q_proj", "v_proj"]}
HEADS = {
    "bert": {"classifier", "bert.pooler.dense"},
    "roberta": {"classifier"},
    "distilbert": {"classifier", "pre_classifier"},
}
HEADS |= {kind: {"score"} for kind in DECODERS}


def adapted(folder, **options):
    policy, tokenizer = loaded(folder, lora=LoRAConfig(**({"rank": 4, "alpha": 8.0} | options)))
    shaken(policy.model)
    return policy, tokenizer


def their_base(folder, tokenizer, n: int = 3):
    """As a user of PEFT makes it: with a random head."""
    model = tf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=n)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = (
        tokenizer.pad_token_id if model.config.pad_token_id is None else model.config.pad_token_id
    )
    return model.eval()


@pytest.mark.parametrize(
    "options", [{}, {"target_modules": "all-linear", "use_dora": True}], ids=["query-value", "all"]
)
@pytest.mark.parametrize("kind", BASES)
def test_peft_loads_a_lora(folders, tmp_path, kind, options):
    """On query and value or on all layers but the head: the head, and all that the base lacks, is trained whole and in
    the file, so that PEFT comes to equal logits over a base with another random head."""
    peft = pytest.importorskip("peft")
    policy, tokenizer = adapted(folders[kind], **({"target_modules": QUERY_VALUE[kind]} | options))
    trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    whole = {n.rpartition(".")[0] for n in trained if "lora" not in n}
    assert {next(head for head in HEADS[kind] if f"{n}.".startswith(f"{head}.")) for n in whole} == HEADS[kind]
    assert not any("lora" in n and n.startswith(("score", "classifier", "pre_cl")) for n in trained)
    save_model(policy.model, tokenizer, tmp_path, torch.float32)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and set(config["modules_to_save"]) == HEADS[kind]
    theirs = peft.PeftModel.from_pretrained(their_base(folders[kind], tokenizer), tmp_path).eval()
    close(one_by_one(theirs, tokenizer), ours(policy, tokenizer), 1e-4)
    assert read_adapter_outputs(tmp_path) == NAMES
    config = ModelConfig(str(folders[kind]), adapter=str(tmp_path))
    merged = make_policy(load_merged(config, tokenizer)).eval()
    assert list(merged.model.config.id2label.values()) == NAMES
    close(ours(merged, tokenizer), ours(policy, tokenizer), 1e-4)


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "llama"])
def test_a_lora_of_peft_is_loaded(folders, tmp_path, kind):
    """With the head as PEFT saves it, which names no labels; and again by PEFT after it was saved here."""
    peft = pytest.importorskip("peft")
    tokenizer = load_tokenizer(ModelConfig(str(folders[kind])), scores=True)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=QUERY_VALUE[kind])
    theirs = shaken(peft.get_peft_model(their_base(folders[kind], tokenizer, 2), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    assert read_adapter_outputs(tmp_path / "theirs") == ["LABEL_0", "LABEL_1"]
    source = ModelConfig(str(folders[kind]), adapter=str(tmp_path / "theirs"))
    model = load_model(source, tokenizer, 1, outputs=["LABEL_0", "LABEL_1"])
    model.adapter = load_adapter(model, tmp_path / "theirs")
    close(ours(make_policy(model).eval(), tokenizer), one_by_one(theirs, tokenizer), 1e-4)
    close(ours(make_policy(load_merged(source, tokenizer)).eval(), tokenizer), one_by_one(theirs, tokenizer), 1e-4)
    model.adapter.freeze(model, torch.float32)
    save_model(model, tokenizer, tmp_path / "ours", torch.float32)
    again = peft.PeftModel.from_pretrained(their_base(folders[kind], tokenizer, 2), tmp_path / "ours").eval()
    close(one_by_one(again, tokenizer), one_by_one(theirs, tokenizer), 1e-4)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("kind", DECODERS)
def test_soft_prompts_of_decoders(folders, tmp_path, kind, method):
    """Vectors and head are trained and saved as PEFT does it: equal logits there, and here after loading."""
    peft = pytest.importorskip("peft")
    policy, tokenizer = loaded(folders[kind], soft_prompt=SoftPromptConfig(num_virtual_tokens=5, method=method))
    shaken(policy.model)
    trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trained == {"soft_prompt.weight", "score.weight"}
    save_model(policy.model, tokenizer, tmp_path, torch.float32)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings", "base_model.score.weight"}
    theirs = peft.PeftModel.from_pretrained(their_base(folders[kind], tokenizer), tmp_path).eval()
    want = ours(policy, tokenizer)
    close(one_by_one(theirs, tokenizer), want, 1e-4)
    again = load_merged(ModelConfig(str(folders[kind]), adapter=str(tmp_path)), tokenizer)
    close(ours(make_policy(again).eval(), tokenizer), want, 1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_merged(ModelConfig(str(folders[kind]), adapter=str(tmp_path / "theirs")), tokenizer)
    close(ours(make_policy(again).eval(), tokenizer), want, 1e-4)


@pytest.mark.parametrize("kind", ENCODERS)
def test_soft_prompts_of_encoders_are_refused(folders, kind):
    """By name, and with what to do."""
    with raises(ConfigError, "conflict", "soft_prompt: ", "lora"):
        loaded(folders[kind], soft_prompt=SoftPromptConfig(num_virtual_tokens=5))


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_a_quantised_base_keeps_its_head(folders, tmp_path, kind, bits):
    """The head and what the base lacks stay whole and trained; scores are those of the rounded weights."""
    pytest.importorskip("bitsandbytes")
    config = {"model": {"quantization": bits}, "lora": LoRAConfig(rank=4)}
    policy, tokenizer = loaded(folders[kind], **config)
    shaken(policy.model)
    kinds = {n: p.dtype for n, p in policy.model.named_parameters()}
    assert any(dtype in (torch.uint8, torch.int8) for dtype in kinds.values())
    heads = [n for n in kinds if any(n.startswith(f"{head}.") for head in HEADS[kind])]
    assert heads and all(kinds[n] == torch.float32 for n in heads)
    save_model(policy.model, tokenizer, tmp_path, torch.float32)
    merged = load_merged(ModelConfig(str(folders[kind]), adapter=str(tmp_path), quantization=bits), tokenizer)
    close(ours(make_policy(merged).eval(), tokenizer), ours(policy, tokenizer), 1e-4)


def test_an_adapter_of_another_end_is_refused(folders, tmp_path):
    """Of a vocabulary, of other labels, or without the part that its base lacks."""
    policy, tokenizer = adapted(folders["bert"])
    save_model(policy.model, tokenizer, tmp_path, torch.float32)
    model = load_model(ModelConfig(str(folders["bert"])), tokenizer, 0, outputs=["a", "b", "c"])
    with raises(ConfigError, "mismatch", f"{tmp_path}: ", "no, yes, maybe", "a, b, c"):
        load_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["classifier"]}))
    with raises(ConfigError, "mismatch", f"{tmp_path}: ", "bert.pooler.dense"):
        load_adapter(load_model(ModelConfig(str(folders["bert"])), tokenizer, 0, outputs=NAMES), tmp_path)
    words = load_tokenizer(ModelConfig(str(folders["llama"])))
    plain = load_model(ModelConfig(str(folders["llama"])), words, 0)
    plain.adapter = adapt_model(Config(model=ModelConfig("x"), lora=LoRAConfig(rank=2)), plain, words, None)
    save_model(plain, words, tmp_path / "plain", torch.float32)
    scorer = load_model(ModelConfig(str(folders["llama"])), words, 0, outputs=NAMES)
    with raises(ConfigError, "mismatch", "plain: ", "no, yes, maybe"):
        load_adapter(scorer, tmp_path / "plain")


def test_lora_never_adapts_what_is_trained_whole(folders):
    """`dense` names layers of RoBERTa's body and of its head; as with PEFT the head's gets no matrices."""
    policy, _ = adapted(folders["roberta"], target_modules=["dense"])
    names = [n for n, _ in policy.model.named_parameters() if "lora" in n]
    assert len(names) == 2 * 3 * 2 and not any("classifier" in n for n in names)
