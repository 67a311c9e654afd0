"""A context run once for all its questions gives what a prompt per question gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from scripts.reader.branches import Branch, Tree, block_mask, dense_mask, pack
from scripts.reader.training import Trainer

TREES = [
    Tree(tuple(range(40, 90)), (Branch((1, 2, 3), (4, 5)), Branch((6, 7), (8,)), Branch((9, 9, 9, 9), (10, 11, 12)))),
    Tree(tuple(range(100, 120)), (Branch((21, 22), (23, 24)),)),
    Tree(tuple(range(60, 160)), (Branch((5,), (250,)), Branch((6, 6), (7, 7)))),
]


def separate_losses(model, trees):
    """The same loss, from a forward pass of its own for each question: plain causal prompts."""
    losses, weights = [], []
    for tree in trees:
        for branch in tree.branches:
            ids = torch.tensor([tree.context_ids + branch.question_ids + branch.answer_ids])
            logits = model.get_base_model()(input_ids=ids).logits[0]
            n = len(branch.answer_ids)
            losses.append(F.cross_entropy(logits[-n - 1 : -1], torch.tensor(branch.answer_ids), reduction="none"))
            weights += [n**-0.5] * n
    weight = torch.tensor(weights)
    return (torch.cat(losses) * weight).sum() / weight.sum()


def test_branches_of_packed_contexts_equal_separate_forward_passes(make_peft, small):
    model = make_peft()
    rows = next(pack(TREES, num_rows=2, row_tokens=128))
    with torch.no_grad():
        together, _ = Trainer(model, small).loss(rows)
        apart = separate_losses(model, TREES)
    assert abs(float(together - apart)) <= 1e-4
    assert float(apart) > 1  # the comparison is of a loss that is not nothing


def test_gradients_of_branches_equal_those_of_separate_passes(make_peft, small):
    model = make_peft()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    together, _ = Trainer(model, small).loss(next(pack(TREES, num_rows=2, row_tokens=128)))
    expected = torch.autograd.grad(separate_losses(model, TREES), trained)
    for got, want in zip(torch.autograd.grad(together, trained), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


def test_flex_attention_is_given_the_same_mask():
    rows = next(pack(TREES, num_rows=2, row_tokens=128))
    mask_mod = block_mask(rows).mask_mod
    batch, length = rows.ids.shape
    places = torch.arange(length)
    for b in range(batch):
        allowed = mask_mod(torch.tensor(b), torch.tensor(0), places[:, None], places[None, :])
        assert torch.equal(allowed, dense_mask(rows)[b, 0])


def test_every_token_attends_to_itself_so_that_padding_is_no_nan():
    mask = dense_mask(next(pack(TREES, num_rows=4, row_tokens=256)))
    assert mask.diagonal(dim1=-2, dim2=-1).all()


def test_positions_of_a_branch_go_on_where_its_context_ends():
    rows = next(pack(TREES[:1], num_rows=1, row_tokens=128))
    for branch, length in ((0, 5), (1, 3), (2, 7)):
        assert rows.positions[rows.branches == branch].tolist() == list(range(50, 50 + length))


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30))
def test_packing_loses_no_tree_that_fits(shapes):
    trees = [Tree((1,) * a, (Branch((2,) * b, (3,) * c),)) for a, b, c in shapes]
    found = [r for rows in pack(trees, num_rows=2, row_tokens=64) for r in zip(rows.ids, rows.branches, strict=True)]
    fitting = [t for t in trees if len(t) <= 64]
    assert sum(int((ids == 3).sum()) for ids, _ in found) == sum(len(t.branches[0].answer_ids) for t in fitting)
    assert sum(int((ids == 1).sum()) for ids, _ in found) == sum(len(t.context_ids) for t in fitting)


def test_a_tree_longer_than_a_row_is_left_out():
    assert list(pack([Tree((1,) * 100, ())], num_rows=1, row_tokens=64)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_attention_gives_the_loss_of_dense_attention(make_config, make_hf, small):
    from scripts.reader.adapter import add_adapter

    rows = next(pack(TREES, num_rows=2, row_tokens=128)).to(torch.device("cuda"))
    config = make_config("llama", hidden_size=96)
    losses = [
        float(Trainer(add_adapter(make_hf(config, kind).cuda(), small), small).loss(rows)[0])
        for kind in ("sdpa", "flex_attention")
    ]
    assert abs(losses[0] - losses[1]) < 0.05
