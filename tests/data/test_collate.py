"""Documents -> Batch: rows, positions, labels; and that packed documents do not see each other."""

import pytest
import torch

from minitrain.batch import IGNORE_INDEX, Document, collate
from minitrain.model.tiny import tiny_model
from tests.tensors import Written

PAD = 9


def document(*ids: int, learned: int = 1) -> Document:
    """A document whose last `learned` tokens are learned."""
    mask = [int(i >= len(ids) - learned) for i in range(len(ids))]
    return Document(torch.tensor(ids, dtype=torch.int32), torch.tensor(mask, dtype=torch.uint8))


def test_layout():
    """Documents side by side, padded on the right; ids of padding are -1, its labels -100; positions restart at each
    document, and go on over padding."""
    batch = collate([[document(1, 2, 3), document(4, 5, learned=1)], [document(6, PAD, learned=1)]], PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, PAD, PAD, PAD, PAD]]
    assert batch.doc_ids.tolist() == [[0, 0, 0, 1, 1], [2, 2, -1, -1, -1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    i = IGNORE_INDEX
    assert batch.labels.tolist() == [[i, i, 3, i, 5], [i, PAD, i, i, i]]  # pad == eos: the real one is learned
    assert (batch.n_docs, batch.n_targets, batch.n_tokens) == (3, 3, 7)
    assert batch.targets.tolist() == [3, 5, PAD] and batch.target_docs.tolist() == [0, 1, 2]
    assert batch.predict_positions.tolist() == [1, 3, 5]
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.doc_ids.dtype} == {torch.int64}


def test_a_row_is_written_once_however_many_documents_it_holds():
    """Twice the documents of the same length in a row write twice the elements, not four times."""
    written = []
    for n_documents in (100, 200):
        documents = [document(*range(1, 9)) for _ in range(n_documents)]
        with Written() as seen:
            collate([documents], PAD)
        written.append(seen.numel)
    assert written[1] <= 2.1 * written[0]


def test_nothing_to_collate():
    """A rank without documents in a micro-batch still has a batch, one that nothing is learned from."""
    batch = collate([], PAD)
    assert (batch.n_docs, batch.n_targets, batch.n_tokens) == (0, 0, 0)
    assert batch.input_ids.tolist() == [[PAD, PAD]] and batch.position_ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(attention):
    """The gradient of one document's loss with respect to the embeddings of another in its row is exactly 0, and
    packed documents have the log-probabilities they have alone (transformers#31629)."""
    model = tiny_model(0, 32, eos_token_id=1, pad_token_id=0).eval()
    model.set_attn_implementation(attention)
    a, b, c = document(3, 4, 5, 6, learned=3), document(7, 8, 9, learned=2), document(10, 11, learned=1)
    packed = collate([[a, b], [c]], PAD)

    def logps(batch, row, part):
        embeddings = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        output = model(inputs_embeds=embeddings, position_ids=batch.position_ids, use_cache=False)
        places = output.logits[row, part].log_softmax(-1)
        chosen = places[:-1].gather(-1, batch.input_ids[row, part][1:, None])
        chosen.sum().backward()
        return chosen.detach(), embeddings.grad

    together, gradient = logps(packed, 0, slice(4, 7))
    alone, _ = logps(collate([[b]], PAD), 0, slice(0, 3))
    assert (gradient[0, :4] == 0).all() and (gradient[1] == 0).all() and (gradient[0, 4:7] != 0).any()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    padded, _ = logps(packed, 1, slice(0, 2))
    alone, _ = logps(collate([[c]], PAD), 0, slice(0, 2))
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)


def test_a_shared_prompt_is_laid_out_once():
    """The second answer goes on from the prompt: its positions, and the place that predicts its first token."""
    a, b, c = document(1, 2, 3, 4, 5, learned=2), document(1, 2, 3, 6, 7, learned=2), document(8, 9, learned=1)
    for each in (a, b, c):
        each.doc_features, each.token_features = (
            {"score": float(each.ids[-1])},
            {"place": torch.arange(len(each.ids)).float()},
        )
    b.shared = 3
    batch = collate([[c, a, b], [c]], PAD)
    assert batch.input_ids.tolist() == [[8, 9, 1, 2, 3, 4, 5, 6, 7], [8, 9] + [PAD] * 7]
    assert batch.position_ids[0].tolist() == [0, 1, 0, 1, 2, 3, 4, 3, 4]
    assert batch.doc_ids[0].tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2]
    assert batch.prefixes.tolist() == [[0, 0], [0, 0], [2, 5], [0, 0]]
    assert batch.targets.tolist() == [9, 4, 5, 6, 7, 9] and batch.target_docs.tolist() == [0, 1, 1, 2, 2, 3]
    assert batch.predict_positions.tolist() == [0, 4, 5, 4, 7, 9]
    assert batch.doc_feature("score").tolist() == [9, 5, 7, 9] and batch.target_feature("place").tolist() == [
        1,
        3,
        4,
        3,
        4,
        1,
    ]
    assert batch.last_token_positions.tolist() == [1, 6, 8, 10]
    with pytest.raises(AssertionError):
        collate([[b]], PAD)
