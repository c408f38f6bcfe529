"""Distillation: the divergences against plain float64 formulas, and a teacher beside the policy in a training."""

import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from minitrain import ConfigError, create_loss
from minitrain.batch import Distillation, PolicyOutput, TopKLogprobs
from minitrain.inference.teacher_cache import cache_teacher_outputs
from minitrain.losses import Models
from minitrain.losses.kd import DIVERGENCES, forward_kl, jsd
from minitrain.model import head_gradient, kd_divergence
from minitrain.model.kd_divergence import divergences, top_k_logprobs
from minitrain.model.logprobs import LMHead, chunked_logprobs
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_tokenizer
from tests.conftest import metrics, random_llama, weights
from tests.messages import raises
from tests.tensors import Largest

pytestmark = pytest.mark.numeric

N, H, V = 11, 6, 17
FORMULAS = {name: f for name, f in DIVERGENCES.items() if name != "jsd"}
FORMULAS |= {f"jsd {b}": functools.partial(jsd, weight=b) for b in (0, 0.3, 0.5, 1)}


def plain(name: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The divergence [N] of two tables of log-probabilities, as a textbook writes it."""

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)

    kind, _, b = name.partition(" ")
    if kind == "forward_kl" or name == "jsd 0":
        return kl(teacher, student)
    if kind == "reverse_kl" or name == "jsd 1":
        return kl(student, teacher)
    if kind == "symmetric":
        return (kl(teacher, student) + kl(student, teacher)) / 2
    b = float(b)
    mixture = ((1 - b) * student.exp() + b * teacher.exp()).log()
    return b * kl(teacher, mixture) + (1 - b) * kl(student, mixture)


def logits_of(hidden, layer: LMHead):
    logits = hidden @ layer.weight.T
    logits = (logits if layer.bias is None else logits + layer.bias) * layer.scale
    return logits if layer.softcap is None else layer.softcap * torch.tanh(logits / layer.softcap)


def case(dtype=torch.float64, rows: int = V, teacher_rows: int = V, bias: bool = True):
    """Student's (hidden, weight, bias), the teacher's states, and targets."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    student = [draw(N, H).requires_grad_(), draw(rows, H).requires_grad_(), draw(rows).requires_grad_()]
    student = student if bias else [*student[:2], None]
    teacher = draw(N, 4), LMHead(draw(teacher_rows, 4), draw(teacher_rows), 0.8, 4.0)
    return student, teacher, torch.randint(min(rows, teacher_rows), (N,), generator=g)


def gradients(outputs, of):
    return torch.autograd.grad(outputs, [tensor for tensor in of if tensor is not None])


# --------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_three_tokens_by_hand(divergence):
    """p_T = (1/2, 1/4, 1/4), p_S = (1/8, 1/8, 3/4): KL(T||S) = 5/4 ln 2 - 1/4 ln 3, KL(S||T) = 3/4 ln 3 - 3/8 ln 2.

    A sum over two tokens whose weight is two; neither the wrong way round, nor a mean over the vocabulary, nor without
    the teacher's entropy (distillm#7).
    """
    student = torch.tensor([[1 / 8, 1 / 8, 3 / 4]] * 2).log().requires_grad_()
    teacher = torch.tensor([[1 / 2, 1 / 4, 1 / 4]] * 2).log()
    layer, batch = LMHead(torch.eye(3)), SimpleNamespace(targets=torch.tensor([0, 2]), n_targets=2, target_weights=None)

    def policy(batch, distillation):
        logps, found, _ = divergences(student, batch.targets, layer, distillation)
        return PolicyOutput(logps, torch.zeros(2, dtype=torch.long), 1, divergence=found)

    loss = create_loss("kd", divergence=divergence, temperature=1.0, alpha=1.0, beta=0.0)
    output = loss(batch, Models(policy, teacher=SimpleNamespace(target_hidden_states=lambda batch: (teacher, layer))))
    ln2, ln3 = math.log(2), math.log(3)
    want = {"forward_kl": 5 / 4 * ln2 - ln3 / 4, "reverse_kl": 3 / 4 * ln3 - 3 / 8 * ln2}[divergence]
    assert output.loss_sum.item() / output.num_items.item() == pytest.approx(want, rel=1e-6)
    total, weight = output.metrics["kl"]
    assert total.item() / weight.item() == pytest.approx(want, rel=1e-6)
    if divergence == "forward_kl":  # p_S - p_T
        output.loss_sum.backward()
        torch.testing.assert_close(student.grad[0], torch.tensor([-3 / 8, -1 / 8, 1 / 2]))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_divergences_equal_the_plain_formula(name, chunk):
    """Values, and the gradient of the announced loss, of the full tables; any chunk gives the same."""
    student, teacher, targets = case()
    layer = LMHead(*student[1:], 0.5, 3.0)
    asked = Distillation(teacher, FORMULAS[name], 2.5, None, (1.7, 0.4))
    logps, found, _ = divergences(student[0], targets, layer, asked, chunk)
    logits, theirs = logits_of(student[0], layer), logits_of(*teacher)
    want_logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    want = plain(name, (logits / 2.5).log_softmax(-1), (theirs / 2.5).log_softmax(-1))
    torch.testing.assert_close(logps, want_logps)
    torch.testing.assert_close(found, want)
    got = gradients((1.7 * found - 0.4 * logps).sum() / 3, student)
    for a, b in zip(got, gradients((1.7 * want - 0.4 * want_logps).sum() / 3, student)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", FORMULAS)
def test_float32_is_close_to_float64(name):
    """Value and gradient to 1e-5."""
    student, teacher, targets = case(torch.float32, bias=False)
    exact = [t.detach().double().requires_grad_() for t in student[:2]]
    _, found, _ = divergences(student[0], targets, LMHead(student[1]), Distillation(teacher, FORMULAS[name], 1.0))
    theirs = logits_of(teacher[0].double(), teacher[1]._replace(weight=teacher[1].weight.double()))
    want = plain(name, (exact[0] @ exact[1].T).log_softmax(-1), theirs.log_softmax(-1))
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(found.sum(), student), gradients(want.sum(), exact)):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("name", FORMULAS)
def test_distributions_that_are_far_apart_are_finite(name, top_k):
    """Logits 300 nats apart, the other way round for student and teacher: value and gradient are finite in float32."""
    student = (300 * torch.eye(V)[:N]).requires_grad_()
    teacher = 300 * torch.eye(V)[torch.arange(N) + 2]
    layer = LMHead(torch.eye(V))
    asked = Distillation((teacher, layer), FORMULAS[name], 1.0, top_k, (1.0, 0.5))
    logps, found, _ = divergences(student, torch.arange(N), layer, asked)
    (found - 0.5 * logps).sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(student.grad).all()
    want = plain(name, student.detach().double().log_softmax(-1), teacher.double().log_softmax(-1))
    if top_k is None:
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 4, V])
@pytest.mark.parametrize("name", FORMULAS)
def test_gradcheck(name, top_k):
    """Both outputs by finite differences, in any mix of them: the backward pass that recomputes."""
    student, teacher, targets = case()

    def run(hidden, weight, bias):
        asked = Distillation(teacher, FORMULAS[name], 1.5, top_k, (0.7, 0.3))
        return divergences(hidden, targets, LMHead(weight, bias, 0.5, 3.0), asked, 4)[:2]

    assert torch.autograd.gradcheck(run, student, fast_mode=True)


@pytest.mark.parametrize(
    "used", [lambda logps, found: (found * torch.arange(N)).sum(), lambda logps, found: logps.sum()]
)
def test_weights_that_were_not_announced(used):
    """The backward pass notices another loss, tokens of unlike weights or one part alone, and makes its gradient."""
    student, teacher, targets = case()
    layer = LMHead(*student[1:])
    asked = Distillation(teacher, forward_kl, 2.0, None, (0.7, 0.3))
    got = gradients(used(*divergences(student[0], targets, layer, asked, 4)[:2]), student)
    logits, theirs = logits_of(student[0], layer), logits_of(*teacher)
    want = plain("forward_kl", (logits / 2).log_softmax(-1), (theirs / 2).log_softmax(-1))
    logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    for a, b in zip(got, gradients(used(logps, want), student)):
        torch.testing.assert_close(a, b)


def test_the_gradient_of_the_announced_loss_is_not_made_twice(monkeypatch):
    """One pass of both heads for the loss that was announced, two for another one."""
    from minitrain.model import kd_divergence

    passes, sweep = [], kd_divergence._run_chunks
    monkeypatch.setattr(kd_divergence, "_run_chunks", lambda *args: passes.append(1) or sweep(*args))
    for factor, n in ((1.0, 1), (torch.rand(N, dtype=torch.float64), 2)):
        student, teacher, targets = case()
        asked = Distillation(teacher, forward_kl, 2.0, None, (0.7, 0.3))
        logps, found, _ = divergences(student[0], targets, LMHead(*student[1:]), asked)
        passes.clear()
        ((0.7 * found - 0.3 * logps) * factor / 5).sum().backward()
        assert len(passes) == n - 1


@pytest.mark.parametrize(("rows", "teacher_rows"), [(17, 13), (13, 17)])
def test_padded_vocabularies_are_compared_on_the_shared_part(rows, teacher_rows):
    """Rows beyond the smaller matrix take no part: both distributions sum to 1 over those that both have."""
    student, teacher, targets = case(rows=rows, teacher_rows=teacher_rows)
    layer = LMHead(*student[1:])
    logps, found, _ = divergences(student[0], targets, layer, Distillation(teacher, forward_kl, 2.0, None, (1.0, 0.5)))
    logits, theirs = logits_of(student[0], layer), logits_of(*teacher)
    want = plain("forward_kl", (logits[:, :13] / 2).log_softmax(-1), (theirs[:, :13] / 2).log_softmax(-1))
    want_logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(logps, want_logps)
    got = gradients((found - 0.5 * logps).sum(), student)
    for a, b in zip(got, gradients((want - 0.5 * want_logps).sum(), student)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_of_the_first_pass(name, monkeypatch):
    """The sum that the weights describe; its gradient needs no look at any value, and is the same if compiled."""
    monkeypatch.setattr(head_gradient, "match_up_to_scale", None)
    eager = functools.cache(lambda function: torch.compile(function, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr(kd_divergence, "compiled", eager)
    found = []
    for compile in (False, True):
        student, teacher, targets = case(rows=17, teacher_rows=13)
        asked = Distillation(teacher, FORMULAS[name], 2.0, None, (1.5, 0.5))
        logps, divergence, total = divergences(student[0], targets, LMHead(*student[1:]), asked, 4, compile)
        torch.testing.assert_close(total, 1.5 * divergence.sum() - 0.5 * logps.sum())
        found.append([total, *gradients(3 * total, student)])
    asked = asked._replace(weights=(0.0, 0.0))
    monkeypatch.undo()
    logps, divergence, _ = divergences(student[0], targets, LMHead(*student[1:]), asked, 4)
    found.append([total, *gradients(3 * (1.5 * divergence - 0.5 * logps).sum(), student)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ top k


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("noted", [False, True])
def test_the_likeliest_and_the_rest(name, noted):
    """k tokens and all others as one outcome, for teacher and student alike; live, or from what was noted."""
    student, teacher, targets = case(rows=V + 3)
    layer, k = LMHead(*student[1:]), 4
    source = top_k_logprobs(*teacher, 2.0, k, chunk=3) if noted else teacher
    _, found, _ = divergences(student[0], targets, layer, Distillation(source, FORMULAS[name], 2.0, k), 4)
    logits, theirs = logits_of(student[0], layer)[:, :V] / 2, logits_of(*teacher) / 2
    ids = theirs.topk(k).indices

    def outcomes(table):
        probs = table.softmax(-1)
        chosen = probs.gather(1, ids)
        return torch.cat([chosen, 1 - chosen.sum(1, keepdim=True)], 1).log()

    want = plain(name, outcomes(logits), outcomes(theirs))
    torch.testing.assert_close(found, want)
    for a, b in zip(gradients(found.sum(), student), gradients(want.sum(), student)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", FORMULAS)
def test_all_tokens_as_the_likeliest_are_exact(name):
    """k = V is the divergence itself, live and noted, and there is no NaN of an empty rest."""
    student, teacher, targets = case()
    layer = LMHead(*student[1:])
    sources = [(teacher, None), (teacher, V), (top_k_logprobs(*teacher, 2.0, V), V)]
    found = [divergences(student[0], targets, layer, Distillation(s, FORMULAS[name], 2.0, k))[1] for s, k in sources]
    grads = [gradients(each.sum(), student) for each in found]
    for other in (1, 2):
        torch.testing.assert_close(found[other], found[0])
        for a, b in zip(grads[other], grads[0]):
            torch.testing.assert_close(a, b)


def test_a_certain_teacher_gives_finite_numbers():
    """A rest of probability e^-200 is neither 0 nor 1e-8: its logarithm is exact, and no gradient is NaN."""
    student, _, targets = case()
    logits = torch.zeros(N, V, dtype=torch.float64)
    logits[:, 0] = 200.0
    noted = top_k_logprobs(logits.float(), LMHead(torch.eye(V)), 1.0, 2)
    assert noted.logps[0].tolist() == pytest.approx([0.0, -200.0, -200.0 + math.log(V - 2)], rel=1e-6)
    for name, formula in FORMULAS.items():
        _, found, _ = divergences(student[0], targets, LMHead(student[1]), Distillation(noted, formula, 1.0, 2))
        assert all(torch.isfinite(g).all() for g in gradients(found.sum(), student[:2])), name


# --------------------------------------------------------------------------------------------------- the chunked head


@pytest.mark.parametrize("top_k", [None, 3])
def test_no_table_of_tokens_by_vocabulary_is_ever_made(top_k):
    """Forward, backward and the pass that recomputes hold no tensor larger than a chunk of it."""
    hidden, weight = torch.randn(512, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    teacher = torch.randn(512, 4), LMHead(torch.randn(1000, 4))
    for factor in (1.0, torch.rand(512)):
        with Largest() as seen:
            asked = Distillation(teacher, forward_kl, 2.0, top_k)
            _, found, _ = divergences(hidden, torch.zeros(512).long(), LMHead(weight), asked, chunk=32)
            (found * factor).sum().backward()
            top_k_logprobs(*teacher, 2.0, 3, chunk=32)
        assert seen.numel == 32 * 1000


def test_no_supervised_token_gives_an_attached_zero():
    """A fully masked micro-batch: the loss is 0 and the gradients are zeros; the teacher may be noted or not."""
    _, teacher, _ = case()
    weight, hidden = torch.randn(V, H, requires_grad=True), torch.zeros(0, H, requires_grad=True)
    for source in ((teacher[0][:0], teacher[1]), TopKLogprobs(torch.zeros(0), torch.zeros(0), V)):
        asked = Distillation(source, forward_kl, 2.0)
        logps, found, _ = divergences(hidden, torch.zeros(0).long(), LMHead(weight), asked)
        (found.sum() - logps.sum()).backward()
        assert found.sum() == 0 and not weight.grad.any()
    assert top_k_logprobs(teacher[0][:0], teacher[1], 1.0, 3).logps.shape == (0, 4)


def test_the_log_softmax_is_done_in_float32_inside_autocast():
    """bfloat16 products, 50,000 rows: the divergence stays within 1e-3 of float64 on the same logits (OpenRLHF#634)."""
    g = torch.Generator().manual_seed(0)
    hidden, theirs = (torch.randn(16, 64, generator=g).bfloat16().float() for _ in range(2))
    weight, matrix = ((torch.randn(50_000, 64, generator=g) * 0.2).bfloat16().float() for _ in range(2))
    hidden.requires_grad_()
    asked = Distillation((theirs, LMHead(matrix)), forward_kl, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        _, found, _ = divergences(hidden, torch.zeros(16).long(), LMHead(weight), asked)
    assert found.dtype == torch.float32
    student, teacher = ((h.double() @ w.double().T).log_softmax(-1) for h, w in ((hidden, weight), (theirs, matrix)))
    want = plain("forward_kl", student, teacher)
    assert ((found - want) / want).abs().max() < 1e-3


@pytest.mark.parametrize("weigh", [None, torch.ones_like])
def test_autocast_does_not_round_the_heads_gradients(weigh, monkeypatch):
    """Where bfloat16 would be emulated, all products of the head are float32, in the single pass too."""
    monkeypatch.setattr("minitrain.model.logprobs.cpu_has_bfloat16", lambda: False)
    student, teacher, targets = case(torch.float32)
    layer = LMHead(*student[1:])
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logps = chunked_logprobs(student[0], targets, layer, weigh).logps
            divergence = divergences(student[0], targets, layer, Distillation(teacher, forward_kl, 2.0))[1]
        found.append([gradients(part.sum(), student) for part in (logps, divergence)])
    for ours, exact in zip(*found):
        for a, b in zip(ours, exact):
            assert torch.equal(a, b)


# -------------------------------------------------------------------------------------------------------- in a training


def padded_model(folder, rows: int, **shape):
    """A random model whose output matrix has so many rows of padding, which would count for much if they counted."""
    model = random_llama(tie_word_embeddings=False, **shape)
    model.resize_token_embeddings(len(tiny_tokenizer()) + rows, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[len(tiny_tokenizer()) :] = 5.0
    save_model(model, tiny_tokenizer(), folder, torch.float32)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """A teacher of another shape than the student, padded."""
    return padded_model(tmp_path_factory.mktemp("teacher"), 5, hidden_size=48)


def kd(folder, *more: str) -> list[str]:
    return ["loss.name=kd", f"loss.teacher={folder}", *more]


def test_a_teacher_that_is_the_student(make_trainer, llama_folder):
    """The divergence is 0, and what is left is beta times the cross entropy, which SFT logs."""
    trainer = make_trainer(*kd(llama_folder), "n_steps=1", "exp_name=kd")
    trainer.train()
    sft = make_trainer("n_steps=1", "exp_name=sft")
    sft.train()
    assert trainer.train_metrics["kl"] == pytest.approx(0, abs=1e-9)
    assert trainer.train_metrics["loss"] == pytest.approx(0.3 * sft.train_metrics["loss"], rel=1e-6)
    assert trainer.train_metrics["perplexity"] == pytest.approx(sft.train_metrics["perplexity"], rel=1e-6)


@pytest.mark.parametrize("options", [(), ("packing=true", "loss.divergence=jsd", "loss.temperature=2")])
@pytest.mark.parametrize("padding", [0, 3])
def test_the_loss_of_a_training_is_its_formula(make_trainer, teacher_folder, tmp_path, options, padding):
    """alpha T^2 D + beta CE (no T^2 of a jsd) from transformers' logits, D over the tokenizer's tokens only."""
    from transformers import AutoModelForCausalLM

    student = padded_model(tmp_path / "student", padding, hidden_size=32)
    trainer = make_trainer(*kd(teacher_folder), *options, f"model.name_or_path={student}")
    n_tokens = len(trainer.tokenizer)
    o = trainer.loss.options
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    total = kl = n = 0
    for i in trainer.train_loader.order(0)[:8]:
        (document,) = trainer.train_loader.examples[int(i)]
        ids, learned = document.ids[None].long(), document.mask[1:].bool()
        with torch.no_grad():
            mine, theirs = (m(input_ids=ids).logits[0, :-1][learned].double() for m in (trainer.policy.model, teacher))
        name = o.divergence if o.divergence != "jsd" else f"jsd {o.jsd_weight}"
        found = plain(name, *((table[:, :n_tokens] / o.temperature).log_softmax(-1) for table in (mine, theirs)))
        kl, n = kl + found.sum().item(), n + len(found)
        total += F.cross_entropy(mine, ids[0, 1:][learned], reduction="sum").item() * o.beta
    total += o.alpha * kl * (1 if o.divergence == "jsd" else o.temperature**2)
    trainer.train()
    first = metrics(trainer)[0]
    assert first["loss"] == pytest.approx(total / n, rel=1e-5)
    assert first["kl"] == pytest.approx(kl / n, rel=1e-4)


@pytest.mark.parametrize("name", ["tiny", None])
def test_the_teacher_only_teaches(make_trainer, teacher_folder, name):
    """It is in eval mode without gradients, in its own dtype, and no weight of it moves."""
    trainer = make_trainer(*kd(name or teacher_folder, "loss.teacher_dtype=bfloat16"))
    teacher = trainer.models.teacher.policy
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    student = weights(trainer)
    trainer.train()
    assert not any(module.training for module in teacher.modules())
    for name, parameter in teacher.named_parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.grad is None and not parameter.requires_grad
        assert torch.equal(parameter, before[name])
    assert all(not torch.equal(p, student[name]) for name, p in weights(trainer).items())


def test_a_teacher_in_bfloat16_is_nearly_the_same(make_trainer, teacher_folder):
    """A student in float32 may have a teacher in bfloat16, and the other way round."""
    found = []
    for i, dtypes in enumerate([("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")]):
        options = [f"model.policy_dtype={dtypes[0]}", f"loss.teacher_dtype={dtypes[1]}", f"exp_name=r{i}", "n_steps=1"]
        trainer = make_trainer(*kd(teacher_folder), *options)
        trainer.train()
        found.append(trainer.train_metrics["kl"])
    assert found[1:] == pytest.approx([found[0]] * 2, rel=0.05) and len(set(found)) == 3


def test_distillation_brings_the_student_nearer(make_trainer, teacher_folder):
    """Twenty steps towards the teacher alone lower the KL to it more than twenty steps on the data alone."""
    found = {}
    for name, weights_ in {"kd": ("loss.alpha=1", "loss.beta=0"), "sft": ("loss.alpha=0", "loss.beta=1")}.items():
        trainer = make_trainer(
            *kd(teacher_folder, *weights_, "loss.temperature=1"), f"exp_name={name}", "n_steps=20", "validation_split=8"
        )
        trainer.train()
        found[name] = metrics(trainer, "eval")[-1]["kl"]
    assert found["kd"] < 0.8 * found["sft"]


def test_another_tokenizer_is_refused(make_trainer, tmp_path):
    """A teacher whose ids stand for other tokens; the error names one, and says why."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = tiny_tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    vocabulary["A"], vocabulary["a"] = vocabulary["a"], vocabulary["A"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(described)),
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
    )
    save_model(random_llama(), other, tmp_path / "other", torch.float32)
    with raises(ConfigError, "mismatch", "loss.teacher: ", "2 ", "'A'"):
        make_trainer(*kd(tmp_path / "other"))


# ---------------------------------------------------------------------------------------------------- teacher's outputs


@pytest.fixture
def outputs(make_trainer, teacher_folder, tmp_path):
    """``outputs("loss.top_k=5")``: the options, and the file that `cache_teacher_outputs` makes with them."""

    def make(*more: str):
        options = kd(teacher_folder, "validation_split=8", "loss.temperature=2", *more)
        return options, cache_teacher_outputs(
            make_trainer(*options, "exp_name=unused").config, tmp_path / "t.safetensors"
        )

    return make


@pytest.mark.parametrize("more", [("loss.top_k=5",), ("loss.top_k=259", "packing=true")])
def test_a_file_of_outputs_trains_as_the_teacher_does(make_trainer, outputs, more):
    """The same losses, evaluations and weights; no teacher is loaded, and the columns stay on disk."""
    options, file = outputs(*more)
    live = make_trainer(*options, "exp_name=live")
    live.train()
    noted = make_trainer(*options, f"loss.teacher_outputs={file}", "exp_name=noted")
    assert not noted.models.frozen()
    noted.train()
    for kind in ("train", "eval"):
        for ours, theirs in zip(metrics(noted, kind), metrics(live, kind), strict=True):
            for key in ("loss", "kl", "perplexity"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    for name, parameter in weights(noted).items():
        torch.testing.assert_close(parameter, weights(live)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changed, parts",
    [
        ("loss.temperature=3", ("loss.temperature: ", "2.0", "3.0")),
        ("loss.top_k=6", ("loss.top_k: ", "5", "6")),
        ("loss.top_k=null", ("loss.top_k: ", "5", "None")),
        ("loss.teacher=tiny", ("loss.teacher: ", "tiny")),
        ("loss.teacher_dtype=bfloat16", ("loss.teacher_dtype: ", "float32", "bfloat16")),
        ("max_length=20", ("loss.teacher_outputs: ", "rows.jsonl")),
    ],
)
def test_outputs_for_something_else_are_refused(make_trainer, outputs, changed, parts):
    """Another temperature, k, teacher or other tokens; without `teacher` it is not asked who it was."""
    options, file = outputs("loss.top_k=5")
    with raises(ConfigError, "mismatch", *parts):
        make_trainer(*options, f"loss.teacher_outputs={file}", changed)
    make_trainer(*options, f"loss.teacher_outputs={file}", "loss.teacher=null")


def test_a_file_that_is_no_file_of_outputs(make_trainer, tmp_path, teacher_folder):
    """Neither a text nor a model's weights."""
    (tmp_path / "x").write_text("no safetensors")
    for file, code in ((tmp_path / "x", "wrong-path"), (teacher_folder / "model.safetensors", "mismatch")):
        with raises(ConfigError, code, f"loss.teacher_outputs: {file} "):
            make_trainer("loss.name=kd", "loss.top_k=5", f"loss.teacher_outputs={file}")


def test_a_disk_that_is_full_leaves_no_file(make_trainer, teacher_folder, tmp_path, monkeypatch):
    """Nothing half written stays, and the error says what to do."""
    from minitrain.inference import teacher_cache as module

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module._Writer, "write", full)
    config = make_trainer(*kd(teacher_folder, "loss.top_k=5")).config
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        cache_teacher_outputs(config, tmp_path / "out" / "t.safetensors")
    assert not list((tmp_path / "out").iterdir())
