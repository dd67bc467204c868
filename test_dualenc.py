# SPDX-License-Identifier: MIT
"""Tests of dualenc. Each formula meets an oracle written another way: loops, dense matrices, numpy."""

import contextlib
import ast
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import timeit
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dualenc as d

SOURCE = pathlib.Path(d.__file__)
WORDS = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=3 + i % 5)) for i in range(150)]
SMALL = [
    "--features",
    "48",
    "--k",
    "6",
    "--n",
    "4",
    "--embedding",
    "5",
    "--top",
    "3",
    "--window",
    "8",
    "--batch",
    "64",
    "--lr",
    "0.003",
    "0.01",
    "--tokens",
    "3000",
    "--chunk",
    "700",
    "--eval-tokens",
    "600",
]
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("repeatable")
seeds = st.integers(0, 2**31)
DEVICE = os.environ.get("DUALENC_DEVICE", "cpu")


def random_code(B, F, k, seed=0, dtype=torch.float64):
    """A code as topk_encode gives it: descending values >= 0, distinct ids."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(B, k, generator=generator, dtype=dtype).sort(1, descending=True).values
    return values, torch.stack([torch.randperm(F, generator=generator)[:k] for _ in range(B)])


def normal(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(values, indices, F):
    """The (B, F) code that a sparse one stands for."""
    return torch.zeros(len(values), F, dtype=values.dtype).scatter_add(1, indices, values)


def same_weights(a, b):
    """Whether two arm files hold the same tensors, bit for bit."""
    from safetensors.torch import load_file

    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- core maths


@given(B=st.integers(1, 4), F=st.integers(8, 20), n=st.integers(2, 8), K=st.integers(1, 5), seed=seeds)
def test_fm_interaction_is_the_sum_over_pairs_and_so_is_its_gradient(B, F, n, K, seed):
    (values, indices), V, weight = (
        random_code(B, F, n, seed),
        normal(F, K, seed=seed),
        normal(B, K, seed=seed + 1),
    )
    grads = []
    for function in (d.fm_interaction, d.fm_interaction_pairwise):
        v, W = values.clone().requires_grad_(), V.clone().requires_grad_()
        z = function(v, indices, W)
        grads.append((z.detach(), *torch.autograd.grad((z * weight).sum(), (v, W), materialize_grads=True)))
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


def test_fm_interaction_worked_example():
    z = d.fm_interaction(
        torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0, 1, 2]]), torch.tensor([[1.0], [1.0], [2.0]])
    )
    assert z.item() == 20


@given(F=st.integers(4, 12), n=st.integers(2, 4), seed=seeds)
def test_fm_interaction_does_not_care_for_order_and_a_lone_feature_gives_zero(F, n, seed):
    (values, indices), V = random_code(3, F, n, seed), normal(F, 4, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        d.fm_interaction(values, indices, V), d.fm_interaction(values[:, order], indices[:, order], V)
    )
    values[:, 1:] = 0
    torch.testing.assert_close(
        d.fm_interaction(values, indices, V), torch.zeros(3, 4, dtype=V.dtype), rtol=0, atol=1e-13
    )


@given(B=st.integers(1, 5), F=st.integers(1, 12), seed=seeds, shift=st.floats(-3, 3), data=st.data())
def test_topk_encode_against_the_dense_definition(B, F, seed, shift, data):
    k, D = data.draw(st.integers(1, F)), 3
    x, W, b = normal(B, D, seed=seed), normal(F, D, seed=seed + 1), normal(F, seed=seed + 2) + shift
    leaves = [t.clone().requires_grad_() for t in (x, W, b)]
    values, indices = d.topk_encode(*leaves, k)
    assert values.shape == indices.shape == (B, k) and (values >= 0).all()
    assert (values.diff(dim=1) <= 0).all() and all(len(set(row.tolist())) == k for row in indices)
    relu = (x @ W.T + b).relu()
    kept = torch.zeros_like(relu, dtype=torch.bool).scatter_(1, indices, True)
    for row in range(B):  # kept >= dropped
        assert k == F or relu[row][kept[row]].min() >= relu[row][~kept[row]].max()
    torch.testing.assert_close(dense(values.detach(), indices, F), relu * kept)
    weight = normal(B, F, seed=seed + 3)
    other = [t.clone().requires_grad_() for t in (x, W, b)]
    reference = ((other[0] @ other[1].T + other[2]).relu() * kept * weight).sum()
    ours = (values * weight.gather(1, indices)).sum()
    for mine, theirs in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(reference, other), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_topk_encode_keeps_k_of_equal_values_and_none_of_negative_ones():
    values, indices = d.topk_encode(torch.ones(2, 1), torch.ones(5, 1), torch.zeros(5), 3)
    assert (values == 1).all() and all(len(set(row.tolist())) == 3 for row in indices)
    values, _ = d.topk_encode(torch.ones(2, 1), -torch.ones(5, 1), torch.zeros(5), 3)
    assert (values == 0).all()
    for k in (0, 6):
        with pytest.raises(ValueError, match="between 1 and F=5"):
            d.topk_encode(torch.ones(2, 1), torch.ones(5, 1), torch.zeros(5), k)


def test_topk_encode_of_more_features_than_a_block_holds():
    x, W, b = normal(5, 4), normal(9000, 4, seed=1), normal(9000, seed=2)
    values, indices = d.topk_encode(x, W, b, 30)
    expected = (x @ W.T + b).relu().topk(30)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices) and (indices >= 8192).any()


@given(seed=seeds, scale=st.floats(0.1, 10))
def test_topk_encode_follows_permutations_of_features_and_positive_scales(seed, scale):
    x, W, b, order = (
        normal(4, 3, seed=seed),
        normal(9, 3, seed=seed + 1),
        normal(9, seed=seed + 2),
        torch.randperm(9),
    )
    values, indices = d.topk_encode(x, W, b, 4)
    permuted, at = d.topk_encode(x, W[order], b[order], 4)
    torch.testing.assert_close(dense(values, indices, 9)[:, order], dense(permuted, at, 9))
    scaled, at = d.topk_encode(x, scale * W, scale * b, 4)
    torch.testing.assert_close(scale * dense(values, indices, 9), dense(scaled, at, 9))


def test_gradients_by_finite_differences():
    x, W, b = (
        normal(3, 4).requires_grad_(),
        normal(7, 4, seed=1).requires_grad_(),
        normal(7, seed=2).requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda *a: d.topk_encode(*a, 3)[0], (x, W, b))
    values, indices = random_code(3, 7, 3)
    assert torch.autograd.gradcheck(lambda v, M: d.sparse_decode(v, indices, M), (values.requires_grad_(), W))
    assert torch.autograd.gradcheck(lambda v, M: d.fm_interaction(v, indices, M), (values, W))


@given(B=st.integers(1, 6), F=st.integers(1, 15), width=st.integers(1, 4), seed=seeds, data=st.data())
def test_sparse_decode_and_outer_against_dense_products(B, F, width, seed, data):
    values, indices = random_code(B, F, data.draw(st.integers(1, F)), seed)
    W, x = normal(F, width, seed=seed), normal(B, width, seed=seed + 1)
    torch.testing.assert_close(d.sparse_decode(values, indices, W), dense(values, indices, F) @ W)
    torch.testing.assert_close(d.sparse_outer(values, indices, x, F), dense(values, indices, F).T @ x)


@pytest.fixture
def all_large(monkeypatch):
    """Every matrix counts as so large that its memory is used again, and a batch is encoded row by row."""
    monkeypatch.setattr(d, "LARGE", 0)
    d.SPARE.clear()
    yield
    d.SPARE.clear()


def test_a_large_outer_product_is_written_to_the_memory_that_was_left(all_large):
    values, indices = random_code(5, 9, 4)
    x, left = normal(5, 3, seed=1), torch.full((9, 3), math.nan, dtype=torch.float64)
    exact = dense(values, indices, 9).T @ x
    d.leave_memory(left)
    found = d.sparse_outer(values, indices, x, 9)
    assert found is left
    torch.testing.assert_close(found, exact)
    assert d.sparse_outer(values, indices, x, 9) is not left  # it is in use now
    for large in (0, 2**25):
        d.LARGE, more = large, normal(9, 3, seed=2)  # the fixture puts LARGE back
        torch.testing.assert_close(d.sparse_outer(values, indices, x, 9, add=more.clone()), exact + more)


def test_large_matrices_train_like_small_ones_and_their_memory_stays_bounded(monkeypatch):
    names = ("sae", "joint", "joint-mlp", "sae-2dec", "sae@40", "residual-sae")
    found = []
    for large in (2**25, 0):
        monkeypatch.setattr(d, "LARGE", large)
        d.SPARE.clear()
        models, kept = [arm(name) for name in names], []
        optimizers = [d.make_optimizer(model, lr=3e-3) for model in models]
        for step in range(12):  # in turn: one takes what another left
            x = normal(9, 6, seed=step, dtype=torch.float32)
            losses = [d.training_step(*pair, x) for pair in zip(models, optimizers, strict=True)]
            kept.append({size: len(memory) for size, memory in d.SPARE.items()})
        assert kept[5] == kept[-1] and max(kept[-1].values()) <= 4
        found.append(losses + [p.detach() for model in models for p in model.parameters()])
    d.SPARE.clear()
    for small, large in zip(*found, strict=True):
        torch.testing.assert_close(large, small, rtol=2e-4, atol=2e-6)


def test_kept_memory_is_neither_read_nor_overwritten_while_in_use(all_large):
    values, indices = random_code(4, 9, 3)
    values, V = values.requires_grad_(), normal(9, 2, seed=3).requires_grad_()

    def loss(function):
        return function(values, indices, V).sum() + function(1 + values.flip(0), indices, V).square().sum()

    exact = torch.autograd.grad(loss(d.fm_interaction_pairwise), (values, V))
    graph, found = loss(d.fm_interaction), []
    for _ in range(3):  # one graph, run again; another one in between
        found.append(torch.autograd.grad(graph, (values, V), retain_graph=True))
        loss(d.fm_interaction).backward()
    for each in found:
        for one, other in zip(each, exact, strict=True):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(V.grad, 3 * exact[1])
    with torch.inference_mode():
        d.topk_encode(normal(3, 2), V, normal(9), 2)
    d.topk_encode(normal(3, 2), V, normal(9), 2)[0].sum().backward()  # refused in an inference tensor


@pytest.mark.parametrize("keeps", [False, True])
def test_a_gradient_that_the_optimizer_keeps_is_not_overwritten(all_large, keeps, monkeypatch):
    class Plain(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            super().zero_grad(set_to_none=not keeps)

    losses = []
    for large in (0, 2**25):
        monkeypatch.setattr(d, "LARGE", large)
        d.SPARE.clear()
        model = arm("joint")
        optimizer = Plain(model.parameters(), lr=0.1)
        losses.append(
            [
                d.training_step(model, optimizer, normal(9, 6, seed=seed, dtype=torch.float32)).item()
                for seed in range(8)
            ]
        )
        assert (sum(map(len, d.SPARE.values())) > 1) == (not keeps and not large)
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_what_the_dense_way_leaves_is_not_kept(monkeypatch):
    monkeypatch.setattr(d, "LARGE", 0)
    d.SPARE.clear()
    for dtype, autocast in ((torch.float16, False), (torch.float32, True)):
        model = arm("joint").to(dtype)
        d.training_step(model, d.make_optimizer(model, lr=1e-3), normal(9, 6, dtype=dtype), autocast=autocast)
    assert not any(d.SPARE.values())


def test_nobody_pays_for_the_gradient_of_what_is_frozen(monkeypatch):
    values, indices = random_code(4, 9, 3)
    V, x, W, b = normal(9, 2, seed=3), normal(4, 2), normal(9, 2, seed=4), normal(9, seed=5)
    called = []
    for name in ("sparse_inner", "sparse_outer"):
        function = getattr(d, name)
        monkeypatch.setattr(
            d, name, lambda *a, name=name, function=function, **k: called.append(name) or function(*a, **k)
        )
    wanted = {"sparse_inner": values, "sparse_outer": V}
    for name, leaf in wanted.items():
        called.clear()
        leaf.requires_grad_()
        d.fm_interaction(values, indices, V).sum().backward()
        assert set(called) == {name}
        leaf.requires_grad_(False)
    called.clear()
    d.topk_encode(x.requires_grad_(), W, b, 3)[0].sum().backward()
    assert not called and x.grad.abs().sum() > 0


def test_a_second_derivative_is_refused_not_wrong():
    values, indices = random_code(4, 9, 3)
    V, x, b = (normal(*size).requires_grad_() for size in ((9, 2), (4, 2), (9,)))
    values.requires_grad_()
    for output, leaf in (
        (d.fm_interaction(values, indices, V), V),
        (d.sparse_decode(values, indices, V), V),
        (d.topk_encode(x, V, b, 3)[0], x),
    ):
        (first,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("without", [False, True])
def test_linear_is_the_product_of_any_size_into_any_memory(dtype, without, monkeypatch):
    if without:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for B, F, D in ((0, 5, 3), (1, 1, 1), (3, 700_000, 2), (60, 30, 40), (700, 900, 3)):
        x, W, b = (normal(*size, dtype=dtype) for size in ((B, D), (F, D), (F, 2)))
        b = b[:, 1]  # every other number of its memory
        wide = torch.full((B, F + 7), math.nan, dtype=dtype)
        found = d.linear(x, W, b, out=wide[:, 3:-4])
        assert found.data_ptr() == wide[:, 3:].data_ptr() and wide[:, :3].isnan().all()
        exact = x.double() @ W.double().T + b.double()
        torch.testing.assert_close(wide[:, 3:-4].double(), exact, rtol=1e-5, atol=1e-5)


@given(B=st.integers(1, 6), F=st.integers(1, 15), width=st.integers(1, 4), seed=seeds, data=st.data())
def test_sparse_products_read_only_the_entries_of_the_code(B, F, width, seed, data):
    _, indices = random_code(B, F, data.draw(st.integers(1, F)), seed)
    W, x = normal(F, width, seed=seed), normal(B, width, seed=seed + 1)
    torch.testing.assert_close(d.sparse_inner(indices, x, W), (x @ W.T).gather(1, indices))
    order, starts = d.group_by_feature(indices, F)
    for feature in range(F):
        places = order[starts[feature] : starts[feature + 1]]
        assert places.tolist() == (indices.flatten() == feature).nonzero().flatten().tolist()


@given(B=st.integers(1, 7), F=st.integers(1, 40), seed=seeds, data=st.data())
def test_top_k_is_torchs_and_takes_what_is_not_a_number_for_the_largest(B, F, seed, data):
    rows, k = normal(B, F, seed=seed), data.draw(st.integers(1, F))
    for ours, theirs in zip(d.top_k(rows, k), rows.topk(k), strict=True):
        assert torch.equal(ours, theirs)
    rows[-1, F // 2] = math.nan
    assert d.top_k(rows, k)[0][-1].isnan().any()


def test_the_dense_way_and_the_sparse_way_are_equal_in_value_and_gradient(monkeypatch):
    x, weight = normal(9, 6, dtype=torch.float32), normal(9, 6, seed=5, dtype=torch.float32)
    found = []
    for way in (False, True):
        monkeypatch.setattr(d, "prefers_dense", lambda W, way=way: way)
        for name in ("joint", "sae-2dec"):
            model, leaf = arm(name), x.clone().requires_grad_()
            loss = (sum(model(leaf).values()) * weight).sum()
            found.append([loss, *torch.autograd.grad(loss, [leaf, *model.parameters()])])
    for sparse, dense_ in zip(found[0] + found[1], found[2] + found[3], strict=True):
        torch.testing.assert_close(dense_, sparse)


def test_half_precision_and_autocast_take_the_dense_way_and_stay_near_fp32():
    W, x = normal(24, 6, dtype=torch.float32), normal(64, 6, dtype=torch.float32)
    assert not d.prefers_dense(W) and d.prefers_dense(W.half()) and d.prefers_dense(W.bfloat16())
    assert d.prefers_dense(torch.empty(2, 2, device="meta"))
    losses = {}
    for kind, dtype in (("fp32", None), ("half", torch.float16), ("autocast", None)):
        model = arm("joint").to(dtype)
        optimizer = d.make_optimizer(model, lr=3e-3, eps=1e-4 if dtype else 1e-8)
        rows = x.to(dtype) if dtype else x
        losses[kind] = [
            d.training_step(model, optimizer, rows, autocast=kind == "autocast").item() for _ in range(40)
        ]
        assert all(p.dtype == (dtype or torch.float32) for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert d.prefers_dense(W) and arm("sae").sae.encode(x)[0].dtype == torch.bfloat16
    for kind in ("half", "autocast"):
        assert losses[kind] != losses["fp32"]
        assert abs(losses[kind][-1] - losses["fp32"][-1]) < 0.05 * losses["fp32"][0]


# ---- modules

SIZES = dict(D=6, F=24, k=5, n=3, K=4)


def arm(name, **changes):
    """An arm of a few weights."""
    torch.manual_seed(1)
    parent = d.make_arm("sae", **SIZES) if name in d.CHILDREN else None
    return d.make_arm(name, **SIZES | changes, parent=parent)


def test_initial_weights_are_as_stated():
    model = d.make_arm("joint", D=64, F=4000, k=8, n=4, K=50)
    bound = 4000**-0.5
    assert (
        model.sae.W_dec.abs().max() <= bound
        and abs(model.sae.W_dec.std().item() / (bound / 3**0.5) - 1) < 0.01
    )
    assert abs((model.sae.W_dec.square().sum(1).mean() / (64 / (3 * 4000))).item() - 1) < 0.02
    assert (
        torch.equal(model.sae.W_enc, model.sae.W_dec)
        and model.sae.W_enc.data_ptr() != model.sae.W_dec.data_ptr()
    )
    for weight, std in (
        (model.nfm.V, 0.05),
        (model.nfm.W_lin, 0.01),
        (model.nfm.W_1, 0.01),
        (model.nfm.W_2, 0.01),
    ):
        assert abs(weight.mean().item()) < 4 * std / weight.numel() ** 0.5
        assert abs(weight.std().item() / std - 1) < 4 / weight.numel() ** 0.5
    for bias in (model.sae.b_enc, model.sae.b_dec, model.nfm.b_lin, model.nfm.b_1, model.nfm.b_2):
        assert not bias.any()


def test_joint_forward_is_the_equations_on_dense_codes():
    model, x = arm("joint"), normal(7, 6, dtype=torch.float32)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    sae, nfm = model.sae, model.nfm
    pre = (x @ sae.W_enc.T + sae.b_enc).relu()
    top = pre.topk(5)
    f = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    f_n = torch.zeros_like(pre).scatter(1, top.indices[:, :3], top.values[:, :3])
    z = 0.5 * ((f_n @ nfm.V) ** 2 - (f_n**2) @ (nfm.V**2))
    parts = model(x)
    torch.testing.assert_close(parts["sae"], f @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(parts["linear"], f_n @ nfm.W_lin + nfm.b_lin)
    torch.testing.assert_close(
        parts["interaction"], (z @ nfm.W_1.T + nfm.b_1).relu() @ nfm.W_2.T + nfm.b_2, rtol=1e-4, atol=1e-4
    )
    counts = torch.zeros(24)
    model(x, counts=counts)
    assert torch.equal(counts, (f > 0).sum(0).float())
    mlp = arm("joint-mlp")
    values, indices = mlp.sae.encode(x)
    torch.testing.assert_close(
        mlp.nfm.post_mlp1(values, indices),
        dense(values[:, :3], indices[:, :3], 24) @ mlp.nfm.V @ mlp.nfm.W_1.T + mlp.nfm.b_1,
    )


@given(seed=seeds, k=st.integers(1, 8))
def test_fold_linear_is_exact_at_n_equal_k(seed, k):
    torch.manual_seed(seed)
    model = d.make_arm("sae-2dec", D=5, F=16, k=k, n=1, K=3).double()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    x = normal(9, 5, seed=seed)
    torch.testing.assert_close(d.fold_linear(model)(x), sum(model(x).values()))


def test_fold_linear_refuses_what_is_no_single_sae():
    for name, reason in (
        ("joint", "linear path, folds"),
        ("joint-interaction", "linear path, folds"),
        ("joint-linear", "n=3 of k=5"),
        ("residual-sae", "linear path, folds"),
    ):
        with pytest.raises(ValueError, match=reason):
            d.fold_linear(arm(name))
    x = normal(3, 6, dtype=torch.float32)
    assert torch.equal(d.fold_linear(arm("sae"))(x), arm("sae")(x)["sae"])


def test_arms_have_the_paths_and_sizes_that_their_names_say():
    paths = {name: set(arm(name)(normal(2, 6, dtype=torch.float32))) for name in d.ARMS}
    assert paths == {
        "sae": {"sae"},
        "sae-2dec": {"sae", "linear"},
        "joint": {"sae", "linear", "interaction"},
        "joint-linear": {"sae", "linear"},
        "joint-interaction": {"sae", "interaction"},
        "joint-mlp": {"sae", "linear", "interaction"},
        "residual-sae": {"sae", "residual"},
        "sequential": {"sae", "linear", "interaction"},
    }
    assert arm("sae-2dec").nfm.n == 5 and arm("joint").nfm.n == 3
    assert (
        arm("sae@12").sae.F == 12 and arm("joint@0.5x").sae.F == 12 and arm("joint@2x").nfm.V.shape == (48, 4)
    )
    joint, matched = d.count_parameters(arm("joint")), d.count_parameters(arm("sae@matched"))
    assert abs(joint - matched) <= (2 * 6 + 1) / 2  # half a feature
    assert d.count_parameters(arm("joint-mlp")) == joint
    for name in ("saé", "joint@matched", "sae@x", "sae@3", "sequential@2x", "sae@-1"):
        with pytest.raises(d.UserError):
            arm(name)
    for name in d.CHILDREN:
        with pytest.raises(d.UserError, match="train that first"):
            d.make_arm(name, **SIZES)
    with pytest.raises(ValueError, match="keeps only k=2"):
        arm("joint", k=2)


def test_sequential_reads_the_top_of_a_frozen_sae():
    torch.manual_seed(0)
    parent = d.make_arm("sae", **SIZES)
    x, before = normal(64, 6, dtype=torch.float32), parent.sae.W_dec.clone()
    for name in d.CHILDREN:
        child = d.make_arm(name, **SIZES, parent=parent, top=2)
        values, indices = parent.sae.encode(x)
        cut = d.sparse_decode(values[:, :2], indices[:, :2], parent.sae.W_dec) + parent.sae.b_dec
        torch.testing.assert_close(child(x)["sae"], cut)
        optimizer = d.make_optimizer(child, lr=0.1)
        for _ in range(5):
            d.training_step(child, optimizer, x)
        assert torch.equal(child.sae.W_dec, before) and torch.equal(parent.sae.W_dec, before)
    assert child.second.k == 2
    torch.testing.assert_close(child(x)["residual"], child.second(x - cut))


def test_training_step_is_adam_on_the_clipped_gradient_of_the_mean_squared_error():
    model, reference, x = arm("joint"), arm("joint"), 30 * normal(16, 6, dtype=torch.float32)
    optimizer, moments = d.make_optimizer(model, lr=0.01), {}
    for step in range(1, 4):
        loss = d.training_step(model, optimizer, x)
        error = ((sum(reference(x).values()) - x) ** 2).mean()
        torch.testing.assert_close(loss, error.detach())
        grads = torch.autograd.grad(error, list(reference.parameters()))
        norm = math.sqrt(sum((g**2).sum().item() for g in grads))
        assert norm > 1  # so that clipping is at work
        with torch.no_grad():
            for p, g in zip(reference.parameters(), grads, strict=True):
                g = g / norm
                m, v = moments.get(p, (0, 0))
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                moments[p] = m, v
                p -= 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_a_step_leaves_no_gradient_behind_and_changes_nothing_where_a_value_is_not_finite():
    model, x = arm("joint"), normal(8, 6, dtype=torch.float32)
    optimizer = d.make_optimizer(model, lr=0.1)
    d.training_step(model, optimizer, x)
    assert all(p.grad is None for p in model.parameters())
    before = [p.clone() for p in model.parameters()]
    for bad in (math.nan, math.inf, 1e30):  # the square of the last overflows
        with pytest.raises(FloatingPointError, match="not finite"):
            d.training_step(model, optimizer, x * bad)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        optimizer.zero_grad()
    half = arm("sae").half()  # in fp16 a loss overflows before its gradient does
    with pytest.raises(FloatingPointError, match="not finite"):
        d.training_step(half, d.make_optimizer(half, lr=0.1, eps=1e-5), torch.full((1, 6), 300.0).half())


def test_learning_rate_falls_to_a_tenth_over_its_span():
    assert [round(d.learning_rate(1, s, 100), 6) for s in (0, 40, 80, 99)] == [1, 0.55, 0.1, 0.1]
    assert round(d.learning_rate(1, 5, 1000, decay=10), 6) == 0.55


def test_dropout_scales_and_depends_on_its_generator_alone():
    model, x = arm("joint"), normal(4000, 6, dtype=torch.float32)
    model.nfm.dropout = 0.25
    torch.nn.init.eye_(model.nfm.W_1)
    with torch.no_grad():
        clean = model.eval().nfm.post_mlp1(*model.sae.encode(x))
        torch.manual_seed(0)
        first = model.train().nfm.post_mlp1(*model.sae.encode(x), torch.Generator().manual_seed(3))
        again = model.nfm.post_mlp1(*model.sae.encode(x), torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
    dropped = (first == 0) & (clean != 0)
    assert abs(dropped.double().mean().item() / (clean != 0).double().mean().item() - 0.25) < 0.02
    torch.testing.assert_close(first[~dropped], clean[~dropped] / 0.75)


LIFTED = ("topk_encode", "sparse_decode", "fm_interaction", "TopKSAE", "NFM", "DualEncoder")


def test_the_core_maths_and_the_modules_can_be_lifted_into_a_file_of_their_own(tmp_path):
    tree = {
        node.name: node
        for node in ast.parse(SOURCE.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    wanted, todo = [], list(LIFTED)
    while todo:  # a name, and what of this module it uses
        name = todo.pop()
        if name not in wanted:
            wanted.append(name)
            todo += [n.id for n in ast.walk(tree[name]) if isinstance(n, ast.Name) and n.id in tree]
    core, _, after = (
        SOURCE.read_text().partition("# - core maths\n".replace("-", "-" * 90))[2].partition("# ---")
    )
    assert after and all(
        f"def {name}(" in core or f"class {name}(" in core for name in set(wanted) - set(LIFTED)
    )
    source = (
        "import collections, concurrent.futures, contextlib, functools, itertools, os, warnings\n"
        "import numpy as np\nimport torch\n" + core
    )
    source += "\n\n".join(ast.get_source_segment(SOURCE.read_text(), tree[name]) for name in LIFTED[3:])
    (tmp_path / "lifted.py").write_text(
        source
        + """

torch.manual_seed(0)
model = DualEncoder(TopKSAE(6, 24, 5), NFM(24, 6, 4, 3))
x = torch.randn(10, 6)
loss = (sum(model(x).values()) - x).square().mean()
loss.backward()
print(loss.item(), sorted(model(x)), sum(p.grad is not None for p in model.parameters()))
"""
    )
    out = subprocess.run(
        [sys.executable, "lifted.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    loss, rest = out.split(" ", 1)
    torch.manual_seed(0)
    model = d.DualEncoder(d.TopKSAE(6, 24, 5), d.NFM(24, 6, 4, 3))
    x = torch.randn(10, 6)
    assert float(loss) == (sum(model(x).values()) - x).square().mean().item()
    assert rest.strip() == "['interaction', 'linear', 'sae'] 11"


# ---- text


def write_text(path, documents=120, words=60, seed=0):
    """A .txt file with one document of 20 to `words` words on each line."""
    rng = random.Random(seed)
    path.write_text(
        "\n".join(" ".join(rng.choices(WORDS, k=rng.randint(20, words))) for _ in range(documents))
    )
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def tokenizer(text):
    return d.train_tokenizer(text.read_text().splitlines(), 400)


def config_of(kind, layers=3, vocab=400):
    """The configuration of a language model of some thousand weights."""
    from transformers import AutoConfig

    sizes = dict(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        vocab_size=vocab,
        max_position_embeddings=64,
        intermediate_size=24,
        bos_token_id=0,
        eos_token_id=0,
    )
    if kind == "gpt2":
        sizes = dict(n_embd=16, n_layer=layers, n_head=2, vocab_size=vocab, n_positions=64)
    if kind in ("qwen2", "qwen3", "gemma2"):
        sizes |= dict(num_key_value_heads=1, head_dim=8)
    if kind == "opt":
        sizes |= dict(ffn_dim=24, word_embed_proj_dim=16)
    return AutoConfig.for_model(kind, **sizes)


KINDS = ["llama", "gpt_neox", "gpt2", "qwen2", "qwen3", "gemma2", "opt", "phi"]


def random_lm(kind, **options):
    """A random language model of that kind, and two windows for it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config_of(kind), **options)
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return lm.eval(), torch.randint(0, 400, (2, 9))


@pytest.fixture(scope="session")
def model(tokenizer, tmp_path_factory):
    """A directory with a random language model and its tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "lm"
    lm = AutoModelForCausalLM.from_config(config_of("llama", vocab=len(tokenizer)))
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.3)
    lm.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_documents_of_each_kind_of_text(tmp_path):
    def read(name, content):
        (tmp_path / name).write_text(content)
        return list(d.documents(str(tmp_path / name)))

    wiki = "\n = One = \n\n body a \n\n = = Part = = \n body b\n = Two = \n body c\n = A = B = \nbody d"
    assert read("wiki.txt", wiki) == [
        " = One = \n body a \n = = Part = = \n body b",
        " = Two = \n body c",
        " = A = B = \nbody d",
    ]
    assert read("paragraphs.txt", "a\nb\n\n\nc\n") == ["a\nb", "c"]
    assert read("lines.txt", "a\nb\nc") == ["a", "b", "c"]
    rows = ["x\n\ny", "", "z"]
    assert read("rows.jsonl", "\n".join(json.dumps({"text": row, "id": 1}) for row in rows)) == [
        "x\n\ny",
        "z",
    ]
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "rows.parquet")
    assert list(d.documents(str(tmp_path / "rows.parquet"))) == ["x\n\ny", "z"]


def test_windows_stay_in_their_document_and_splits_share_none(text, tokenizer):
    documents = list(d.documents(str(text)))
    seen = {}
    for split in ("train", "validation", "test"):
        chosen = [doc for doc in documents if d.split_of(doc) == split]
        expected = []
        for number, doc in enumerate(chosen):
            ids = tokenizer(doc, add_special_tokens=False)["input_ids"]
            expected += [(number, [0, *ids[at : at + 8]]) for at in range(0, len(ids) - 7, 8)]
        assert [(n, w.tolist()) for n, w in d.windows(iter(documents), tokenizer, 8, split)] == expected
        seen[split] = set(chosen)
    assert all(seen.values()) and set.union(*seen.values()) == set(documents)
    assert sum(map(len, seen.values())) == len(set(documents))


@given(items=st.lists(st.integers(), max_size=60), size=st.integers(1, 20), seed=seeds)
def test_shuffled_loses_and_invents_nothing(items, size, seed):
    assert sorted(d.shuffled(iter(items), size, random.Random(seed))) == sorted(items)


def test_stream_gives_every_window_once_an_epoch_and_repeats_from_its_seed(text, tokenizer):
    def take(seed, count):
        stream = d.window_stream(str(text), tokenizer, T=8, split="train", seed=seed, buffer=400)
        return [(epoch, number, ids.tolist()) for epoch, number, ids in (next(stream) for _ in range(count))]

    once = [(n, w.tolist()) for n, w in d.windows(d.documents(str(text)), tokenizer, 8, "train")]
    two = take(5, 2 * len(once))
    for epoch in (0, 1):
        assert sorted((n, w) for e, n, w in two if e == epoch) == sorted(once)
    assert two[: len(once)] != [(0, *w) for w in once] and [w[1:] for w in two[: len(once)]] != [
        w[1:] for w in two[len(once) :]
    ]
    assert take(5, 50) == two[:50] and take(6, 50) != two[:50]


def test_docstring_corpus_holds_docstrings_and_no_code(monkeypatch, tmp_path):
    (tmp_path / "__init__.py").write_text(
        '"""Module text."""\ndef f():\n    """Function text."""\n    return "a string"\n'
    )
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text('"""Test text."""')
    import importlib.util

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin=tmp_path / "__init__.py")
    )
    assert list(d.docstring_corpus()) == ["Module text.\n\nFunction text."]  # copies are left out


# ---- language model and stream


@pytest.mark.parametrize("kind", KINDS)
def test_capture_is_hidden_states_and_stops_the_forward(kind):
    lm, tokens = random_lm(kind)
    hidden = lm(input_ids=tokens, output_hidden_states=True).hidden_states
    ran = []
    for number, block in enumerate(d.find_blocks(lm)):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    for layer in range(3):
        ran.clear()
        assert torch.equal(d.capture(lm, layer, tokens), hidden[layer])
        assert ran == list(range(layer))
    for layer in (-1, 3):
        with pytest.raises(d.UserError, match="blocks 0 to 2"):
            d.capture(lm, layer, tokens)


def test_a_truncated_model_gives_the_same_activations(model):
    tokens = torch.randint(0, 150, (2, 9))
    whole, _ = d.load_lm(model)
    short, _ = d.load_lm(model, layer=1)
    assert d.count_parameters(short) < d.count_parameters(whole) and len(d.find_blocks(short)) == 2
    assert torch.equal(d.capture(whole, 1, tokens), d.capture(short, 1, tokens))
    with pytest.raises(d.UserError, match="blocks 0 to 2"):
        d.load_lm(model, layer=3)


def open_stream(model, text, seed=0, skip=1, tokens=2000, chunk=500, epochs=1, start=0, batch=64):
    """Batches of layer-0 activations, tokens' embeddings, with the plan and the windows they came from."""
    lm, tokenizer = d.load_lm(model)
    plan = d.chunk_plan(tokens=tokens, chunk=chunk, batch=batch, rows=9 - skip)

    def stream():
        return d.window_stream(str(text), tokenizer, T=8, split="train", seed=seed)

    standardiser = d.Standardiser(torch.full((16,), 0.5), torch.full((16,), 2.0))
    batches = d.activation_batches(
        lm, 0, stream(), standardiser, plan=plan, epochs=epochs, seed=seed, skip=skip, start=start
    )
    return lm, plan, d.take_windows(stream(), sum(size for size, _ in plan))[2], standardiser, batches


@pytest.mark.parametrize("skip", [0, 1])
def test_every_token_of_a_window_is_trained_on_once(model, text, skip):
    lm, plan, ids, standardiser, batches = open_stream(model, text, skip=skip)
    table = lm.get_input_embeddings().weight
    batches = list(batches)
    assert [step for step, _, _ in batches] == list(range(sum(n for _, n in plan)))
    rows = standardiser.decode(torch.cat([x for _, _, x in batches]))
    tokens = torch.cdist(rows, table).argmin(1)
    torch.testing.assert_close(rows, table[tokens], rtol=1e-5, atol=1e-6)
    assert sorted(tokens.tolist()) == sorted(ids[:, skip:].flatten().tolist())
    assert all(48 <= len(x) <= 80 for _, _, x in batches) and len(rows) >= 2000
    first_chunk = tokens[: plan[0][0] * (9 - skip)].tolist()
    assert first_chunk != ids[: plan[0][0], skip:].flatten().tolist()  # shuffled, yet the same tokens
    assert sorted(first_chunk) == sorted(ids[: plan[0][0], skip:].flatten().tolist())


def test_streams_of_one_seed_are_equal_and_resume_anywhere(model, text):
    whole = list(open_stream(model, text, epochs=2)[-1])
    for start in (0, 1, 7, 20, len(whole) - 1):
        rest = list(open_stream(model, text, epochs=2, start=start)[-1])
        assert [step for step, _, _ in rest] == list(range(start, len(whole)))
        assert all(torch.equal(x, y) for (_, _, x), (_, _, y) in zip(rest, whole[start:], strict=True))
    other = next(open_stream(model, text, seed=1)[-1])
    assert not torch.equal(other[2][:40], whole[0][2][:40])
    plan = open_stream(model, text)[1]  # a chunk's second epoch holds the first's tokens in another order
    first, second = whole[: plan[0][1]], whole[plan[0][1] : 2 * plan[0][1]]
    a, b = torch.cat([x for *_, x in first]), torch.cat([x for *_, x in second])
    assert not torch.equal(a, b) and torch.equal(a.sort(0).values, b.sort(0).values)


def test_no_more_than_a_chunk_is_extracted_at_once(model, text, monkeypatch):
    sizes, extract = [], d.extract
    monkeypatch.setattr(d, "extract", lambda *a, **k: sizes.append(len(rows := extract(*a, **k))) or rows)
    list(open_stream(model, text, tokens=4000, chunk=300)[-1])
    assert len(sizes) == math.ceil(4000 / 296) and max(sizes) <= 300 and sum(sizes) == 4000


def test_standardiser_matches_numpy_and_survives_a_constant_dimension(model, text, tmp_path):
    lm, tokenizer = d.load_lm(model)
    with torch.no_grad():
        lm.get_input_embeddings().weight[:, 3] = 1.5

    def stream():
        return d.window_stream(str(text), tokenizer, T=8, split="train", seed=0)

    standardiser, facts = d.estimate_standardiser(lm, 0, stream(), tokens=5000)
    ids = d.take_windows(stream(), 1000)[2]
    raw = lm.get_input_embeddings().weight[ids[:, 1:]].detach().reshape(-1, 16).double().numpy()
    expected = raw.std(0)
    expected[3] = 1
    np.testing.assert_allclose(standardiser.mean, raw.mean(0), atol=1e-6)
    np.testing.assert_allclose(standardiser.std, expected, rtol=1e-5)
    norms = np.linalg.norm(raw, axis=1)
    assert facts["constant_dimensions"] == 1 and facts["tokens"] == len(raw)
    np.testing.assert_allclose(
        facts["largest_norm_over_median"], norms.max() / np.sort(norms)[(len(norms) - 1) // 2]
    )
    x = torch.from_numpy(raw).float()
    torch.testing.assert_close(standardiser.decode(standardiser.encode(x)), x)
    with torch.no_grad():
        lm.get_input_embeddings().weight[:] = math.nan
    with pytest.raises(d.UserError, match="non-finite"):
        d.estimate_standardiser(lm, 0, stream())


# ---- evaluation


def test_evaluate_against_numpy_and_predicting_the_mean_scores_one():
    models = {name: arm(name).eval() for name in ("sae", "joint", "residual-sae")}
    whole = torch.randint(-9, 9, (50, 6)).float()
    whole = torch.cat([whole, -whole])  # numbers whose mean is exact
    x, numbers, std = (
        2 + normal(90, 6, dtype=torch.float32),
        torch.arange(90) // 20,
        torch.linspace(0.5, 3, 6),
    )
    batches = [(x[at : at + 25], numbers[at : at + 25]) for at in range(0, 90, 25)]

    class Mean(torch.nn.Module):
        learner = models["sae"].sae

        def __init__(self, mean):
            super().__init__()
            self.mean = mean

        def forward(self, x_, counts=None):
            return {"sae": self.mean.expand_as(x_)}

    one = torch.zeros(100).long()
    own = d.evaluate({"mean": Mean(whole.mean(0))}, [(whole, one)], std=std)["mean"]
    assert own["fvu"]["full"] == own["fvu_raw"]["full"] == 1
    assert own["mse"]["full"] == pytest.approx(whole.double().square().mean().item())
    results = d.evaluate(models | {"mean": Mean(x.mean(0))}, batches, std=std)
    assert results["mean"]["fvu"]["full"] == pytest.approx(1, abs=1e-6)
    assert results["mean"]["fvu_raw"]["full"] == pytest.approx(1, abs=1e-6)
    parts = {name: value.detach().double().numpy() for name, value in models["joint"](x).items()}
    x_, std_ = x.double().numpy(), std.double().numpy()
    spread = (x_ - x_.mean(0)) ** 2
    for path, x_hat in {
        "sae": parts["sae"],
        "sae+linear": parts["sae"] + parts["linear"],
        "sae+interaction": parts["sae"] + parts["interaction"],
        "full": sum(parts.values()),
    }.items():
        error = (x_hat - x_) ** 2
        own = results["joint"]
        assert own["mse"][path] == pytest.approx(error.mean(), rel=1e-5)
        assert own["fvu"][path] == pytest.approx(error.sum() / spread.sum(), rel=1e-5)
        assert own["fvu_raw"][path] == pytest.approx(
            (error @ std_**2).sum() / (spread @ std_**2).sum(), rel=1e-5
        )
        np.testing.assert_allclose(own["sse"][path], [error[numbers == n].sum() for n in range(5)], rtol=1e-5)
    assert own["magnitude"]["linear"] == pytest.approx(np.abs(parts["linear"]).mean(), rel=1e-5)
    assert own["l0"] == pytest.approx((models["joint"].sae.encode(x)[0] > 0).sum().item() / 90)
    assert set(results["residual-sae"]["mse"]) == {"sae", "full"} and set(results["sae"]["mse"]) == {"full"}


def test_gain_and_its_interval():
    rng = np.random.default_rng(0)
    base = rng.gamma(2, 10, 400)
    own = base * rng.normal(0.8, 0.1, 400)
    value, low, high = d.gain(own, base)
    assert value == 1 - own.sum() / base.sum() and low < value < high
    # the delta method's standard error of a ratio is another way to the same interval
    ratio = own.sum() / base.sum()
    se = np.sqrt(((own - ratio * base) ** 2).sum()) / base.sum()
    assert (high - low) / (2 * 1.96 * se) == pytest.approx(1, abs=0.1)
    covered = 0
    for seed in range(100):  # and it covers the truth as often as it says
        rng = np.random.default_rng(seed)
        base = rng.gamma(2, 10, 60)
        _, low, high = d.gain(base * rng.normal(0.8, 0.2, 60), base, resamples=300)
        covered += low <= 0.2 <= high
    assert 85 <= covered <= 100
    assert math.isnan(d.gain(np.ones(1), np.ones(1))[1])


# ---- kl


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_splice_of_the_same_is_exact_and_of_another_reaches_the_logits(kind, attention):
    if (kind, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no such Gemma 2")
    lm, tokens = random_lm(kind, attn_implementation=attention)
    clean = lm(input_ids=tokens, use_cache=False).logits
    for layer in range(3):
        same = d.splice(lm, layer, tokens, lambda hidden: hidden.clone())
        assert torch.equal(same, clean) and not d.kl_divergence(clean, same).any()
        other = d.splice(lm, layer, tokens, lambda hidden: torch.cat([hidden[:, :5], hidden[:, 5:] * 0.5], 1))
        kl = d.kl_divergence(clean, other)
        assert not kl[:, :5].any() and (kl[:, 5:] > 0).all()  # attention is causal
    # splicing in what another text gives there continues that text
    donor = torch.randint(0, 400, (2, 9))
    other = d.capture(lm, 1, donor)
    moved = d.splice(lm, 1, tokens, lambda hidden: other)
    torch.testing.assert_close(moved, lm(input_ids=donor).logits)


def test_kl_divergence_of_doubles_is_a_double():
    p = normal(3, 50, seed=1)
    q = p + 1e-4 * normal(3, 50, seed=2)
    found = d.kl_divergence(p, q)
    expected = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert (found > 0).all()  # in single precision it would be noise


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=2), seed=seeds)
def test_kl_divergence_against_a_loop(shape, seed):
    p, q = 3 * normal(*shape, 7, seed=seed), 3 * normal(*shape, 7, seed=seed + 1)
    kl = d.kl_divergence(p, q)
    assert kl.shape == tuple(shape) and (kl >= 0).all()
    for at in np.ndindex(*shape):
        a, b = (np.exp(x[at].numpy()) / np.exp(x[at].numpy()).sum() for x in (p, q))
        assert kl[at].item() == pytest.approx(
            sum(x * math.log(x / y) for x, y in zip(a, b, strict=True)), abs=1e-5
        )
    rows = normal(700, 5, seed=seed)  # more rows than are taken at once
    torch.testing.assert_close(
        d.kl_divergence(rows, -rows)[[3, 650]], d.kl_divergence(rows[[3, 650]], -rows[[3, 650]])
    )


def test_epsilon_random_has_the_errors_length_and_no_direction():
    x, x_hat = normal(4000, 6), normal(4000, 6, seed=1)
    error = d.epsilon_random(x, x_hat, torch.Generator().manual_seed(0)) - x
    torch.testing.assert_close(error.norm(dim=1), (x_hat - x).norm(dim=1))
    unit = error / error.norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit.mean(0), torch.zeros(6).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(unit.T @ unit / 4000, torch.eye(6).double() / 6, atol=0.02, rtol=0)


def test_kl_results_against_numpy():
    rng = np.random.default_rng(0)
    kl = {
        name: rng.gamma(2, size=(8, 10)) * scale
        for name, scale in (("own", 3), ("full", 1), ("sae", 1.2), ("random", 0.4))
    }
    ce = {name: 2 + values for name, values in kl.items()}
    keys = {
        "own": ("joint", "sae"),
        "full": ("joint", "full"),
        "sae": ("sae", "full"),
    }

    def sums(kl, ce):
        return np.stack([kl.sum(1), (kl**2).sum(1), np.full(8, 10), ce[:, 1:].sum(1), np.full(8, 9)], 1)

    table = {key: sums(kl[name], ce[name]) for name, key in keys.items()}
    table |= {(*key, "random"): sums(kl["random"], ce["random"]) for key in keys.values()}
    table |= {
        ("clean", ""): sums(kl["sae"] * 0, kl["sae"] * 0 + 2),
        ("mean", ""): sums(kl["own"], kl["own"] * 0 + 7),
    }
    results = d.kl_results(table)
    full = results["arms"]["joint"]["full"]
    assert results["identity_kl"] == 0 and results["clean_ce"] == 2 and results["tokens"] == 80
    assert full["kl"] == pytest.approx(kl["full"].mean()) and full["ce"] == pytest.approx(
        ce["full"][:, 1:].mean()
    )
    assert full["ce_recovered"] == pytest.approx((7 - full["ce"]) / 5) and full["excess_ce"] == pytest.approx(
        full["ce"] - 2
    )
    assert full["kl_over_random"] == pytest.approx(kl["full"].mean() / kl["random"].mean())
    assert full["cut"]["over own SAE path"][0] == pytest.approx(1 - kl["full"].mean() / kl["own"].mean())
    assert full["cut"]["over sae"][0] == pytest.approx(1 - kl["full"].mean() / kl["sae"].mean())
    from scipy import stats

    a, b = kl["full"].ravel(), kl["own"].ravel()
    t = (a.mean() - b.mean()) / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 80)
    assert full["p"]["over own SAE path"]["published"] == pytest.approx(
        2 * stats.t.sf(abs(t), 158), rel=1e-6, abs=0
    )
    difference = (kl["full"] - kl["own"]).mean(1)
    t = difference.mean() / (difference.std(ddof=1) / np.sqrt(8))
    assert full["p"]["over own SAE path"]["paired"] == pytest.approx(2 * stats.t.sf(abs(t), 7))
    assert (
        "over own SAE path" not in results["arms"]["joint"]["sae"]["cut"]
        and "over sae@matched" not in full["cut"]
    )


# ---- the stages, end to end


def stage(name, run, *flags):
    """Run a stage as a user would; the exit status. DUALENC_DEVICE=cuda runs them all on a GPU."""
    return d.main([name, "--run", str(run), "--device", DEVICE, *map(str, flags)])


ARMS = ["sae", "sae-2dec", "joint", "joint-interaction", "sae@matched", "sequential", "residual-sae"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_every_kind_of_language_model(kind, text, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config_of(kind, vocab=len(tokenizer) + 8))  # its class may add some
    for part in (lm, tokenizer):
        part.save_pretrained(tmp_path / "lm")
    flags = ["--model", tmp_path / "lm", "--text", text, "--layer", 2, *SMALL, "--lr", 0.003]
    assert stage("train", tmp_path / "run", "sae", "joint", *flags) == 0
    assert stage("recon", tmp_path / "run") == 0 and stage("kl", tmp_path / "run", "--kl-tokens", 100) == 0
    results = json.loads((tmp_path / "run" / "results" / "kl.json").read_text())
    assert results["identity_kl"] == 0 and results["arms"]["joint"]["full"]["kl"] > 0
    recon = json.loads((tmp_path / "run" / "results" / "recon.json").read_text())
    assert recon["arms"]["sae"]["fvu"] < 1


def openllama(path, lines, *, collapses=True):
    """A directory as the hub holds OpenLLaMA-3B: pytorch_model.bin, tokenizer.model and two configs."""
    import sentencepiece
    from transformers import AutoModelForCausalLM

    path.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=collapses,
        minloglevel=2,
        pad_id=-1,
    )
    (path / "tokenizer.vocab").unlink()
    config = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, bos_token="<s>", eos_token="</s>")
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config_of("llama"))
    lm.config.bos_token_id, lm.config.eos_token_id = 1, 2
    lm.config.architectures = ["LlamaForCausalLM"]
    lm.config.save_pretrained(path)
    torch.save(lm.half().state_dict(), path / "pytorch_model.bin")
    return path


def wikitext(path):
    """A text in WikiText's layout: headings of three levels, blank rows, documents of many lines."""
    rows, rng = [""], random.Random(0)
    for number in range(250):
        rows += [f" = Title {number} = ", ""]
        for _ in range(3):
            rows += [" ".join(rng.choices(WORDS, k=40)), ""]
        rows += [" = = Part = = ", "", " ".join(rng.choices(WORDS, k=30)), ""]
    path.write_text("\n".join(rows))
    return path


def test_the_papers_stages_on_a_directory_as_openllamas_and_text_as_wikitexts(tmp_path):
    text = wikitext(tmp_path / "wiki.txt")
    lm = openllama(tmp_path / "lm", text.read_text().splitlines())
    assert {p.name for p in lm.iterdir()} == {
        "config.json",
        "pytorch_model.bin",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    run, size = tmp_path / "run", [*SMALL, "--chunk", 1000]
    flags = ["--preset", "paper", "--model", lm, "--text", text, "--layer", 1, *size]
    names = ["sae", "joint", "sequential", "residual-sae", "sae@matched"]
    assert stage("train", run, *names, *flags, "--at-once", 1) == 0
    for name, more in dict(recon=[], kl=["--kl-tokens", 300], gram=[], secondary=[], anova=[]).items():
        assert stage(name, run, *more) == 0, name
    assert stage("report", run) == 0
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"
    config = json.loads((run / "config.json").read_text())
    assert config["preset"] == "paper" and config["dropout"] == 0.15 and config["decay"] == 0.8


def test_runs_of_spaces_are_one_where_the_tokenizers_own_model_says_so(tmp_path):
    lines = wikitext(tmp_path / "wiki.txt").read_text().splitlines()
    once, twice = " ".join(WORDS[:60]), "  ".join(WORDS[:60])
    for collapses in (True, False):
        _, tokenizer = d.load_lm(openllama(tmp_path / f"lm{collapses}", lines, collapses=collapses))
        assert tokenizer.collapses_spaces == collapses
        one, two = (
            [w.tolist() for _, w in d.windows([t], tokenizer, 8, d.split_of(t))] for t in (once, twice)
        )
        assert one and (one == two) == collapses


def test_without_network_the_hubs_names_are_refused_at_once(tmp_path, capsys, monkeypatch, model):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(d.socket, "create_connection", refuse)
    d.work_offline_without_network("tiny", str(model), "docstrings")
    assert "HF_HUB_OFFLINE" not in os.environ  # no name of the hub's
    for flags in (
        ["--model", "no-one/nothing"],
        ["--model", model, "--layer", 1, "--text", "no-one/nothing"],
    ):
        command = [sys.executable, SOURCE, "train", "sae", "--run", tmp_path / "run", *flags]
        env = {**os.environ, "HF_ENDPOINT": "https://hub.invalid", "HF_HOME": str(tmp_path / "hub")}
        out = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, timeout=60)
        assert out.returncode == 2 and "the hub cannot be reached: give --" in out.stderr
        assert out.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.fixture(scope="session")
def trained(model, text, tmp_path_factory):
    """A finished run."""
    run = tmp_path_factory.mktemp("runs") / "run"
    assert stage("train", run, *ARMS, "--model", model, "--text", text, "--layer", 1, *SMALL) == 0
    assert stage("recon", run) == 0 and stage("kl", run, "--kl-tokens", 400) == 0
    return run


def test_the_run_holds_what_it_should(trained):
    names = {p.name for p in trained.iterdir()}
    assert names == {f"{arm}.safetensors" for arm in ARMS} | {
        "config.json",
        "standardiser.safetensors",
        "train.jsonl",
        "results",
        ".lock",
    }
    results = json.loads((trained / "results" / "recon.json").read_text())
    assert set(results["arms"]) == set(ARMS)
    joint = results["arms"]["joint"]
    assert {"mse", "fvu", "fvu_raw", "dead", "l0", "params"} <= set(joint)
    assert set(joint["fvu_by_path"]) == {"sae", "sae+linear", "sae+interaction", "full"}
    lone = results["arms"]["joint-interaction"]["fvu_by_path"]  # its one addition is all there is
    assert set(lone) == {"sae", "sae+interaction", "full"} and lone["sae+interaction"] == lone["full"]
    assert joint["improvement"]["published"] == pytest.approx(
        1 - joint["fvu_by_path"]["full"] / joint["fvu_by_path"]["sae"]
    )
    assert joint["improvement"]["matched"] == pytest.approx(1 - joint["mse"] / results["arms"]["sae"]["mse"])
    assert joint["improvement"]["parameter_matched"] == pytest.approx(
        1 - joint["mse"] / results["arms"]["sae@matched"]["mse"]
    )
    mse, gain = joint["fvu_by_path"], {path: entry for path, entry in joint["gain"].items()}
    assert gain["sae+linear"]["over own SAE path"][0] == pytest.approx(1 - mse["sae+linear"] / mse["sae"])
    assert gain["full"]["over sae+interaction"][0] == pytest.approx(1 - mse["full"] / mse["sae+interaction"])
    first = [1 - mse[path] / mse["sae"] for path in ("sae+linear", "sae+interaction", "full")]
    assert joint["sub_additive_by"] == pytest.approx(first[0] + first[1] - first[2])
    assert joint["interaction_share"] == pytest.approx(
        joint["magnitude"]["interaction"] / (joint["magnitude"]["interaction"] + joint["magnitude"]["linear"])
    )
    assert f"{joint['lr']:g}" == min(joint["validation_mse"], key=joint["validation_mse"].get)
    assert (
        results["config"]["tokens"] == 3000
        and len(results["sha256"]) == 64
        and "torch" in results["versions"]
    )
    log = [json.loads(line) for line in (trained / "train.jsonl").read_text().splitlines()]
    steps = {(e["arm"], e["lr"], e["step"]) for e in log}
    assert (
        len(steps) == len(log)
        and {e["arm"] for e in log} == set(ARMS)
        and {e["lr"] for e in log} == {0.003, 0.01}
    )
    for name in ARMS:  # every arm learned something
        curve = [e["mse"] for e in log if e["arm"] == name and e["lr"] == 0.01]
        assert curve[-1] < curve[0]


def test_kl_of_a_run(trained):
    results = json.loads((trained / "results" / "kl.json").read_text())
    assert results["identity_kl"] == 0 and results["tokens"] == 400 and set(results["arms"]) == set(ARMS)
    assert set(results["arms"]["joint"]) == {"sae", "sae+linear", "sae+interaction", "full"}
    assert set(results["arms"]["sae"]) == {"full"} and set(results["arms"]["residual-sae"]) == {"sae", "full"}
    for paths in results["arms"].values():
        for entry in paths.values():
            assert {"kl", "ce", "kl_over_random", "ce_recovered"} <= set(entry)
            assert 0 < entry["kl"] < 10 * results["mean_ablated"]["kl"]
            assert entry["excess_ce"] == pytest.approx(entry["ce"] - results["clean_ce"])


def test_kl_holds_one_spliced_tensor_of_logits_beside_the_clean_rows(trained, monkeypatch):
    import gc

    splice, alive = d.splice, []

    def watched(lm, layer, tokens, replace):
        logits = splice(lm, layer, tokens, replace)
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        found = [o for o in tensors if o.ndim == 3 and o.shape[-1] == logits.shape[-1]]
        alive.append(len({tensor.untyped_storage().data_ptr() for tensor in found}))
        return logits

    cfg = d.resolve(d.parser().parse_args(["kl", "--run", str(trained), "--device", DEVICE]))
    monkeypatch.setattr(d, "splice", watched)
    d.measure_kl(cfg)
    cfg.lock.close()
    assert max(alive) == 1


def test_a_second_call_does_nothing_but_print(trained, capsys):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()}
    assert stage("train", trained, *ARMS) == 0 and stage("recon", trained) == 0 and stage("kl", trained) == 0
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()} == before
    out = capsys.readouterr().out
    assert "all there" in out
    for claim in range(1, 8):
        assert f"claim {claim} " in out
    assert "sae@matched" in out


def test_an_arm_alone_in_several_passes_or_beside_others_ends_with_the_same_weights(
    trained, tmp_path, monkeypatch
):
    shutil.copytree(
        trained, tmp_path / "run", ignore=shutil.ignore_patterns("joint*", "seq*", "results", "train.jsonl")
    )
    assert stage("train", tmp_path / "run", "joint") == 0
    assert same_weights(tmp_path / "run" / "joint.safetensors", trained / "joint.safetensors")
    passes, train_pass = [], d.train_pass
    monkeypatch.setattr(
        d, "train_pass", lambda cfg, data, arms: passes.append(list(arms)) or train_pass(cfg, data, arms)
    )
    (tmp_path / "run" / "joint.safetensors").unlink()
    assert stage("train", tmp_path / "run", "sequential", "joint", "joint-interaction", "--at-once", 1) == 0
    assert passes == [["joint"], ["joint-interaction"], ["sequential"]]  # children after their parent
    for name in ("joint", "joint-interaction", "sequential"):
        assert same_weights(tmp_path / "run" / f"{name}.safetensors", trained / f"{name}.safetensors")


def test_dropout_does_not_depend_on_who_is_trained_beside(model, text, tmp_path):
    flags = ["--model", model, "--text", text, "--layer", 1, *SMALL, "--dropout", 0.3, "--tokens", 1500]
    for run, arms in (("a", ["joint"]), ("b", ["sae", "joint-interaction", "joint"])):
        assert stage("train", tmp_path / run, *arms, *flags) == 0
    assert same_weights(tmp_path / "a" / "joint.safetensors", tmp_path / "b" / "joint.safetensors")


def interrupt_after(monkeypatch, steps):
    """Make the training step raise KeyboardInterrupt after that many calls."""
    calls, training_step = [0], d.training_step

    def step(*args, **options):
        calls[0] += 1
        if calls[0] > steps:
            raise KeyboardInterrupt
        return training_step(*args, **options)

    monkeypatch.setattr(d, "training_step", step)


def test_interrupted_runs_end_with_the_same_weights_also_from_different_steps(
    trained, tmp_path, monkeypatch, capsys
):
    run, flags = tmp_path / "run", ["sae", "joint", "sequential", "--save-minutes", 0]
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("joint*", "s*e*", "results", "train.jsonl"))
    shutil.copy(trained / "standardiser.safetensors", run)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4 * 7)  # two arms at two rates, seven steps
        assert stage("train", run, *flags) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err
    shutil.copy(run / "joint.ckpt", tmp_path)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4 * 20)
        assert stage("train", run, *flags) == 130
    shutil.copy(tmp_path / "joint.ckpt", run)  # as if the crash had come between two files
    steps = [
        torch.load(run / f"{name}.ckpt", weights_only=True)["candidates"][0]["step"]
        for name in ("sae", "joint")
    ]
    assert steps[0] > steps[1] > 0
    assert stage("train", run, *flags) == 0
    for name in ("sae", "joint", "sequential"):
        assert same_weights(run / f"{name}.safetensors", trained / f"{name}.safetensors")

    def log(path):
        return sorted(
            line
            for line in (path / "train.jsonl").read_text().splitlines()
            if json.loads(line)["arm"] in ("sae", "joint", "sequential")
        )

    assert log(run) == log(trained) and not list(run.glob("*.ckpt"))


def test_a_rank_without_a_world_is_an_ordinary_process(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")  # as a job array may leave it
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("joint.*", "results"))
    assert stage("train", run, "joint") == 0
    assert same_weights(run / "joint.safetensors", trained / "joint.safetensors")


def test_stages_other_than_train_refuse_torchrun_and_a_changed_run_is_noticed(
    trained, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("results"))
    cfg = d.resolve(d.parser().parse_args(["recon", "--run", str(run)]))
    d.write_json(run / "config.json", d.read_json(run / "config.json") | {"world_seeds": 7})
    with pytest.raises(d.UserError, match="changed by another process"):
        d.claim_run(cfg)
    cfg.lock.close()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert stage("recon", run) == 2 and "torchrun is for the stage `train`" in capsys.readouterr().err


def test_top_k_works_in_a_forked_child():
    rows = normal(8, 20, dtype=torch.float32)
    d.top_k(rows, 3)
    child = os.fork()
    if not child:
        os._exit(int(not torch.equal(d.top_k(rows, 3)[0], rows.topk(3)[0])))
    for _ in range(500):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        os.kill(child, signal.SIGKILL)
    assert done and status == 0


def torchrun(ranks, run, *flags):
    """`train` by that many processes on this machine: a Popen, its output read as text."""
    where = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "--", SOURCE]
    command = [sys.executable, *where, "train", "--run", run, "--device", "cpu", *flags]
    return subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=run.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_train_what_one_trains_and_one_goes_on_after_them(model, text, tmp_path):
    names = ["sae", "joint", "sequential", "joint~null"]
    flags = [*names, "--model", model, "--text", text, "--layer", 1, *SMALL, "--lr", 0.003]
    assert stage("train", tmp_path / "one", *flags) == 0
    process = torchrun(2, tmp_path / "two", *flags)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    assert out.count("train: joint: validation mse") == 1  # rank 0 alone speaks and writes
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
    for name in names:
        one, two = (d.load_arm(tmp_path / run / f"{name}.safetensors") for run in ("one", "two"))
        for mine, theirs in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5)
        assert one.config["dead"] == pytest.approx(two.config["dead"], abs=0.03)
        assert one.config["dead_tokens"] == two.config["dead_tokens"]
        assert one.config["validation_mse"] == pytest.approx(two.config["validation_mse"], rel=1e-3)


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_a_dead_process_ends_the_training_of_all_and_one_goes_on_from_the_checkpoint(model, text, tmp_path):
    flags = ["joint", "--model", model, "--text", text, "--layer", 1, *SMALL, "--tokens", 12000]
    flags += ["--lr", 0.003, "--save-minutes", 0]
    assert stage("train", tmp_path / "whole", *flags) == 0
    run = tmp_path / "run"
    process, checkpoint = torchrun(2, run, *flags), run / "joint.ckpt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    out = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in out
    assert checkpoint.exists() and not (run / "joint.safetensors").exists()
    assert stage("train", run, *flags) == 0
    one, two = (d.load_arm(of / "joint.safetensors") for of in (tmp_path / "whole", run))
    torch.testing.assert_close(one.sae.W_dec, two.sae.W_dec, rtol=1e-2, atol=1e-4)


def test_kill_nine_and_resume(trained, tmp_path):
    run = tmp_path / "run"
    command = [
        sys.executable,
        str(SOURCE),
        "train",
        "joint",
        "sae",
        "--run",
        str(run),
        "--save-minutes",
        "0",
        "--device",
        DEVICE,
    ]
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("joint*", "sae*", "results", "train.jsonl"))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (run / "sae.ckpt").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (run / "sae.ckpt").exists() or (run / "sae.safetensors").exists()
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "goes on at step" in out or "all there" in out
    for name in ("sae", "joint"):
        assert same_weights(run / f"{name}.safetensors", trained / f"{name}.safetensors")


def test_a_loss_that_is_not_finite_stops_with_arm_and_step_and_keeps_the_checkpoint(
    trained, tmp_path, monkeypatch, capsys
):
    run, calls, training_step = tmp_path / "run", [0], d.training_step
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("joint*", "results", "train.jsonl"))

    def step(model, optimizer, x, **options):
        calls[0] += 1
        return training_step(model, optimizer, x * math.inf if calls[0] > 2 * 30 else x, **options)

    monkeypatch.setattr(d, "training_step", step)
    assert stage("train", run, "joint", "--save-minutes", 0) == 2
    assert "arm joint at lr 0.003: the loss or gradient is not finite at step 30 (" in capsys.readouterr().err
    state = torch.load(run / "joint.ckpt", weights_only=True)
    assert state["candidates"][0]["step"] == 30
    assert all(t.isfinite().all() for t in state["candidates"][0]["model"].values())
    monkeypatch.setattr(d, "training_step", training_step)
    assert stage("train", run, "joint") == 0
    assert same_weights(run / "joint.safetensors", trained / "joint.safetensors")


def test_a_full_disk_gives_one_line_and_leaves_good_files(trained, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("joint.*", "results", "train.jsonl"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2 * 9)
        assert stage("train", run, "joint", "--save-minutes", 0) == 130
    good, save = (run / "joint.ckpt").read_bytes(), torch.save

    def full(state, file):  # as torch.save does where the disk is full
        file.write(b"half of it")
        try:
            with open("/dev/full", "wb", buffering=0) as device:
                save(state, device)
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904

    capsys.readouterr()
    monkeypatch.setattr(torch, "save", full)
    assert stage("train", run, "joint", "--save-minutes", 0) == 2
    assert (
        capsys.readouterr().err
        == f"dualenc: cannot write {run}/joint.ckpt: [Errno 28] No space left on device\n"
    )
    assert (run / "joint.ckpt").read_bytes() == good and not list(run.glob(".*.tmp"))


def test_load_arm_reconstructs_raw_activations(trained, text, model):
    lm, tokenizer = d.load_lm(model)
    ids = d.take_windows(d.window_stream(str(text), tokenizer, T=8, split="test", seed=0), 10)[2]
    raw = d.extract(lm, 1, ids)
    loaded = d.load_arm(trained / "sae-2dec.safetensors")
    x = loaded.standardiser.encode(raw)
    error = (sum(loaded(x).values()) - x).square().mean() / x.var(0).mean()
    assert 0 < error < 0.9 and not loaded.training
    torch.testing.assert_close(d.fold_linear(loaded)(x), sum(loaded(x).values()))
    assert loaded.config["arm"] == "sae-2dec" and loaded.standardiser.mean.shape == (16,)


def test_float16_weights_and_published_epsilon_train(trained, model, text, tmp_path):
    flags = [
        "--model",
        model,
        "--text",
        text,
        "--layer",
        1,
        *SMALL,
        "--param-dtype",
        "float16",
        "--adam-eps",
        "1e-5",
    ]
    assert stage("train", tmp_path / "half", "sae", *flags) == 0
    loaded = d.load_arm(tmp_path / "half" / "sae.safetensors")
    assert loaded.sae.W_dec.dtype == torch.float32
    assert torch.equal(loaded.sae.W_dec, loaded.sae.W_dec.half().float())  # values that fp16 can hold
    assert not same_weights(tmp_path / "half" / "sae.safetensors", trained / "sae.safetensors")


def test_the_tiny_language_model_is_an_ordinary_one(tmp_path, text, capsys):
    assert (
        stage(
            "lm",
            tmp_path / "run",
            "--text",
            write_text(tmp_path / "more.txt", 150, words=500),
            "--lm-steps",
            3,
        )
        == 0
    )
    assert "perplexity" in capsys.readouterr().out
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm, tokenizer = (
        c.from_pretrained(tmp_path / "run" / "lm") for c in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert tokenizer.decode(tokenizer("some words").input_ids) == "some words" and tokenizer.bos_token_id == 0
    assert lm.config.num_hidden_layers == 4 and lm.config.vocab_size == len(tokenizer)
    assert set(json.loads((tmp_path / "run" / "config.json").read_text())) == {
        "preset",
        "seed",
        "model",
        "text",
        "lm_steps",
    }
    assert stage("lm", tmp_path / "run") == 0
    assert "nothing to train" in capsys.readouterr().out
    assert stage("train", tmp_path / "run", "sae", *SMALL) == 0  # other fields are still free
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lm_steps"] == 3
    assert stage("recon", tmp_path / "run") == 0


def test_held_out_windows_come_once_however_many_are_asked_for(trained):
    cfg = d.resolve(d.parser().parse_args(["recon", "--run", str(trained), "--device", DEVICE]))
    data = d.open_data(cfg)
    batches = list(d.held_out_windows(cfg, data, "test", 10**6))
    ids = torch.cat([ids for ids, _ in batches])
    assert len({tuple(row.tolist()) for row in ids}) == len(ids) and len(ids) * 8 < 10**6
    documents = torch.cat([numbers for _, numbers in batches])
    assert sorted(set(documents.tolist())) == list(range(int(documents.max()) + 1))
    few = torch.cat([ids for ids, _ in d.held_out_windows(cfg, data, "test", 80)])
    assert torch.equal(few, ids[:10])


def test_what_would_fail_at_the_end_is_refused_at_the_start(
    trained, model, text, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(d, "training_step", None)  # no step may be taken
    one_split = [line for line in text.read_text().splitlines() if d.split_of(line) != "test"]
    (tmp_path / "no_test.txt").write_text("\n".join(one_split))
    flags = ["--model", model, "--text", tmp_path / "no_test.txt", "--layer", 1, *SMALL]
    assert stage("train", tmp_path / "run", "sae", *flags) == 2
    assert "no document of the test split has 8 tokens" in capsys.readouterr().err
    assert stage("lm", tmp_path / "run", "--text", text, "--lm-steps", 0) == 2
    assert "--lm-steps must be at least 1" in capsys.readouterr().err and not (tmp_path / "run").exists()
    other = tmp_path / "other"
    shutil.copytree(trained, other, ignore=shutil.ignore_patterns("seq*", "results"))
    stranger = d.load_arm(trained / "sae.safetensors")
    d.save_arm(other / "sae.safetensors", stranger, stranger.standardiser, stranger.config | {"run": {}})
    assert stage("train", other, "sequential") == 2
    assert "sae.safetensors was trained with preset = None, here it is tiny" in capsys.readouterr().err


def test_first_position_can_be_kept(trained, model, text, tmp_path):
    flags = ["--model", model, "--text", text, "--layer", 1, *SMALL, "--keep-first"]
    assert stage("train", tmp_path / "run", "sae", *flags) == 0 and stage("recon", tmp_path / "run") == 0
    kept, left = (
        json.loads((run / "results" / "recon.json").read_text()) for run in (tmp_path / "run", trained)
    )
    assert kept["tokens"] == math.ceil(600 / 9) * 9 and left["tokens"] == 600


# ---- the README

README = SOURCE.with_name("README.md").read_text()


def readme_commands(start):
    """Command lines of the README's indented blocks and of its running text."""
    found = [line.strip() for line in README.splitlines() if line.startswith("    ")]
    found += re.findall("`([^`\n]+)`", README)
    return [line.partition("  #")[0].strip() for line in found if line.startswith(start)]


def test_every_command_of_the_readme_runs(model, text, tmp_path, monkeypatch):
    """Those of a run of one's own, in order, on small sizes; of reproduce.sh, that it calls known stages."""
    monkeypatch.chdir(tmp_path)
    small, made = [*map(str, SMALL)], []
    for line in readme_commands((".venv/bin/python dualenc.py", ".venv/bin/torchrun")):
        words = line.replace("PATH_OR_HUB_ID", str(model)).replace("mine.txt", str(text)).split()
        command = words[words.index("dualenc.py") + 1 :]
        args = d.parser().parse_args(command)
        made.append(args.stage)
        if "runs/mine" not in command or "torchrun" in words[0]:
            continue
        more = {
            "train": [*small, "--layer", "1", *ARMS, "--eval-tokens", "3000"],
            "kl": ["--kl-tokens", "300"],
            "pairs": [],
            "synth": "--world-steps 20 --world-worlds 1 --world-seeds 1 --world-tests 2000".split(),
        }
        assert d.main([*command, *more.get(args.stage, [])]) == 0, line
    assert set(made) >= set(d.STAGES) - {"lm"}
    assert (tmp_path / "runs/mine/report.md").exists() and (tmp_path / "runs/mine/export").exists()

    shutil.copy(SOURCE.with_name("reproduce.sh"), tmp_path)
    shutil.copy(SOURCE.with_name("requirements.txt"), tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(tmp_path / "requirements.txt", tmp_path / ".venv/installed")
    (tmp_path / ".venv/bin/python").write_text('#!/bin/sh\necho "$@" >> called\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    for line in {*readme_commands(("./reproduce.sh", "SIZES=1"))}:
        (tmp_path / "called").unlink(missing_ok=True)
        subprocess.run(line, shell=True, cwd=tmp_path, check=True)
        called = [words.split() for words in (tmp_path / "called").read_text().splitlines()]
        if line == "./reproduce.sh test":
            assert called == [["-m", "pytest", "-q", "test_dualenc.py"]]
            continue
        stages = [d.parser().parse_args(words[1:]).stage for words in called]
        assert [name for at, name in enumerate(stages) if name not in stages[:at]] == [
            name for name in d.STAGES if name != "export"
        ]


def test_every_snippet_of_the_readme_runs(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    shutil.copy(trained / "joint.safetensors", tmp_path / "runs/tiny")
    monkeypatch.chdir(tmp_path)
    snippets = [part.partition("```")[0] for part in README.split("```python\n")[1:]]
    assert len(snippets) == 4
    for snippet in snippets:
        names = dict(raw=normal(5, 16, dtype=torch.float32))
        exec(snippet, names)
        if "z" in names:
            values, indices = names["values"], names["indices"]
            assert values.shape == indices.shape == (256, 64) and names["x_hat"].shape == (256, 128)
            pairwise = d.fm_interaction_pairwise(values, indices, names["V"])
            assert (names["z"] - pairwise).abs().max() < 1e-5 * pairwise.abs().max()
        if "parts" in names:
            assert set(names["parts"]) == {"sae", "linear", "interaction"}
    assert "cosine" not in capsys.readouterr().err


# ---- export


def reconstruct(arm, raw):
    """What a trained arm makes of raw activations, in raw units."""
    return arm.standardiser.decode(sum(arm(arm.standardiser.encode(raw)).values()))


@given(seed=seeds, form=st.sampled_from(["saelens", "sparsify"]), name=st.sampled_from(["sae", "sae-2dec"]))
def test_what_is_exported_reads_and_gives_raw_activations(seed, form, name):
    torch.manual_seed(seed)
    arm = d.make_arm(name, D=5, F=16, k=4, n=2, K=3).double()
    for p in arm.parameters():
        torch.nn.init.normal_(p)
    arm.standardiser = d.Standardiser(10 * torch.randn(5).double(), torch.rand(5).double() + 0.1)
    raw = arm.standardiser.decode(normal(20, 5, seed=seed))
    sae = d.fold_standardiser(d.fold_linear(arm), arm.standardiser)
    torch.testing.assert_close(sae(raw), reconstruct(arm, raw))
    _, _, W, config = d.exported(sae, 3, "model", form)
    if form == "saelens":  # relu(topk(x W_enc + b_enc)) W_dec + b_dec
        pre = raw @ W["W_enc"] + W["b_enc"]
        assert W["W_enc"].shape == (config["d_in"], config["d_sae"]) == (5, 16)
    else:  # it takes b_dec off first
        pre = (raw - W["b_dec"]) @ W["encoder.weight"].T + W["encoder.bias"]
        assert config["num_latents"] == 16 and config["d_in"] == 5
    top = pre.topk(config["k"])
    code = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    torch.testing.assert_close(code @ W["W_dec"] + W["b_dec"], reconstruct(arm, raw))


def test_export_writes_what_other_libraries_load_and_refuses_what_is_no_single_sae(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("results", "train.jsonl"))
    for form, files in (
        ("saelens", {"sae_weights.safetensors", "cfg.json"}),
        ("sparsify", {"sae.safetensors", "cfg.json"}),
    ):
        for name in ("sae", "sae-2dec", "sae@matched"):
            assert stage("export", run, "--arm", name, "--format", form) == 0
            folder = run / "export" / f"{name}-{form}" / ("." if form == "saelens" else "layers.0")
            assert {file.name for file in folder.iterdir()} == files
    assert (
        stage("export", run, "--arm", "sae", "--format", "sparsify") == 0
    )  # again, in the place of the first
    capsys.readouterr()
    for name, reason in (("joint", "n=4 of k=6"), ("residual-sae", "folds into"), ("none", "no trained arm")):
        assert stage("export", run, "--arm", name) == 2
        err = capsys.readouterr().err
        assert reason in err and err.count("\n") == 1
    assert not list((run / "export").glob("joint*")) and not list((run / "export").glob(".*"))


@pytest.mark.parametrize("name", ["sae", "sae-2dec"])
def test_sae_lens_and_sparsify_load_what_is_exported(trained, tmp_path, name):
    sae_lens, sparsify = pytest.importorskip("sae_lens"), pytest.importorskip("sparsify")
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("results", "train.jsonl"))
    for form in ("saelens", "sparsify"):
        assert stage("export", run, "--arm", name, "--format", form) == 0
    arm = d.load_arm(run / f"{name}.safetensors")
    raw = arm.standardiser.decode(normal(300, len(arm.standardiser.mean), dtype=torch.float32))
    ours = reconstruct(arm, raw)
    theirs = sae_lens.SAE.load_from_disk(str(run / "export" / f"{name}-saelens"))(raw)
    others = sparsify.SparseCoder.load_from_disk(str(run / "export" / f"{name}-sparsify" / "layers.0"))(raw)
    for each in (theirs, others.sae_out):
        assert (each - ours).abs().max() <= 1e-4 * ours.abs().max()


# ---- plan and command line


@pytest.fixture
def measured_once(monkeypatch):
    """Of `plan --measure`: each thing is timed by a single call."""

    def seconds(function, device="cpu", least=0):
        return timeit.timeit(function, number=1)

    monkeypatch.setattr(d, "seconds", seconds)


def test_seconds_is_the_median_of_the_later_calls(monkeypatch):
    clock = iter([9, 9, 1, 3, 2, 9, 9, 1, 1, 1, 1])
    monkeypatch.setattr(timeit, "timeit", lambda call, number: next(clock))
    assert d.seconds(None) == 2  # of 1 and 3
    clock = iter([0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125])
    monkeypatch.setattr(timeit, "timeit", lambda call, number: next(clock))
    assert d.seconds(None, least=2) == 0.1875  # seven calls hold two seconds


def test_plan_measures_steps_and_projects_every_stage(capsys, tmp_path, model, measured_once):
    small = ["--model", model, "--layer", 1, *SMALL, "--measure"]
    assert stage("plan", tmp_path / "run", "sae", "joint", "sequential", "joint~null", *small) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[8:]}
    for name in ("sae", "joint", "sequential"):
        ms, ratio, rate = (float(cell.replace(",", "")) for cell in rows[name])
        assert ms > 0 and ratio > 0 and rate > 0
    stages = set(d.STAGES) - {"plan", "report", "export"}
    assert stages < set(rows) and float(rows["all"][0]) >= 0


def test_plan_does_not_time_what_does_not_fit(capsys, tmp_path, model, monkeypatch, measured_once):
    monkeypatch.setattr(d, "free_memory", lambda device: 0)
    assert stage("plan", tmp_path / "run", "joint", "--model", model, "--layer", 1, *SMALL, "--measure") == 0
    assert "does not fit" in capsys.readouterr().out


def test_plan_of_the_papers_size_counts_as_the_paper_does(capsys, tmp_path):
    assert stage("plan", tmp_path / "run", "--preset", "paper") == 0
    out = capsys.readouterr().out
    assert (
        "joint: 496.1 M parameters: SAE 320.1 M (64.5 %), linear 160.0 M (32.3 %), nonlinear 16.1 M (3.2 %)"
        in out
    )
    assert "3,426.5 M parameters" in out and not (tmp_path / "run").exists()
    assert ["joint", "496.1", "11.91", "3.26"] in [line.split() for line in out.splitlines()]
    D, F, K = 3200, 50_000, 300
    assert D * F * 3 + F * K + K * K + K * D + F + 3 * D + K == pytest.approx(496.1e6, abs=5e4)


def test_plan_of_other_presets_and_local_models(capsys, model, tmp_path):
    for preset in ("tiny", "small", "author"):
        assert stage("plan", tmp_path / "run", "--preset", preset) == 0
    assert stage("plan", tmp_path / "run", "sae", "--model", model, "--layer", 1) == 0
    assert "D=16 " in capsys.readouterr().out


def test_plan_counts_bytes_as_by_hand(tmp_path, model, capsys):
    flags = [
        "--model",
        model,
        "--layer",
        1,
        "--features",
        100,
        "--k",
        6,
        "--n",
        4,
        "--top",
        3,
        "--embedding",
        5,
    ]
    flags += ["--batch", 7, "--lr", 0.001, 0.002]
    D, F, K = 24, 100, 5
    sae, nfm = 2 * F * D + F + D, F * D + D + F * K + K * K + K + D * K + D
    joint = [3 * 2 * (sae + nfm), sae + nfm + 2 * 7 * F]  # weights and two moments; gradients and two (B, F)
    child = [2 * (sae + 3 * nfm), nfm + 2 * 7 * F]
    for dtype, size in (("float32", 4), ("float16", 2)):
        assert stage("plan", tmp_path / "run", "joint", "sequential", *flags, "--param-dtype", dtype) == 0
        rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
        for name, (held, on_top) in (("joint", joint), ("sequential", child)):
            assert rows[name] == [
                f"{(sae + nfm) / 1e6:.1f}",
                f"{size * held / 1e9:.2f}",
                f"{size * on_top / 1e9:.2f}",
            ]


def test_each_flag_reaches_the_configuration_of_its_stages(tmp_path):
    values = {int: "7", float: "0.5", str: "word", bool: None}
    for name, (kind, readers, text_) in d.FLAGS.items():
        assert text_ and name in d.PRESETS["tiny"] and all(name in preset for preset in d.PRESETS.values())
        for reader in readers.split():
            flag = f"--{name.replace('_', '-')}"
            value = "float16" if name == "param_dtype" else values[kind]
            args = d.parser().parse_args(
                [reader, "--run", str(tmp_path / "none"), flag, *([value] if value else [])]
            )
            world = {"world_features": ("world_planted", "world_k"), "world_planted": ()}
            for other in ({"features": ("k", "n", "top"), "k": ("n", "top")} | world).get(name, ()):
                setattr(args, other, 1)  # 7 must be a possible value
            cfg = d.resolve(args)
            expected = True if kind is bool else [0.5] if name.endswith("lr") else kind(value)
            assert getattr(cfg, name) == cfg.fields[name] == expected
    assert {reader for _, readers, _ in d.FLAGS.values() for reader in readers.split()} <= set(d.STAGES)


@pytest.mark.parametrize("stage_name", list(d.STAGES))
def test_help_names_the_papers_values_and_imports_nothing_heavy(stage_name):
    command = [sys.executable, str(SOURCE), stage_name, "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--preset" in out and ("(paper:" in out) == (stage_name not in ("lm", "synth", "report", "export"))
    code = (
        f"import sys; sys.argv = ['x', {stage_name!r}, '--help']; sys.path[:0] = [{str(SOURCE.parent)!r}]\n"
        "import dualenc\ntry: dualenc.main()\nexcept SystemExit: pass\n"
        "assert not {'transformers', 'datasets', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_bad_input_is_one_line_and_exit_status_two(model, text, trained, tmp_path, capsys):
    base = ["--model", model, "--text", text, "--layer", 1, *SMALL]
    files = dict(empty=b"", blank=b"\n\n", latin=b"caf\xe9 " * 500, short=b"a b c\nd e f\n" * 100)
    for name, content in files.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "column.jsonl").write_text('{"words": "a b"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a b"\n{')
    shutil.copytree(model, tmp_path / "nonsense")
    (tmp_path / "nonsense" / "model.safetensors").write_bytes(b"nonsense")
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    for name, kept in (
        ("holes", {k: v for k, v in weights.items() if "layers.0" not in k}),
        ("few", {k: v[:100].clone() if v.shape[0] > 100 else v for k, v in weights.items()}),
    ):
        shutil.copytree(model, tmp_path / name)
        save_file(kept, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "few" / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    cases = [
        (["train", "--preset", "huge"], "unknown preset 'huge'"),
        (["train", "sea", *base], "unknown arm 'sea'"),
        (["train", "sae@2y", *base], "take a size"),
        (["train", *base, "--layer", 3], "layer 3 is out of range"),
        (["train", *base, "--layer", -1], "layer -1 is out of range"),
        (["train", *base, "--k", 49], "--k 49 is more than --features 48"),
        (["train", *base, "--n", 7], "--n 7 is more than --k 6"),
        (["train", *base, "--top", 7], "--top 7 is more than --k 6"),
        (["train", *base, "--lr", 0.1, 0.1], "--lr takes different rates"),
        (["train", *base, "--tokens", 0], "--tokens must be at least 1"),
        (["train", *base, "--tokens", "many"], "argument --tokens"),
        (["train", *base, "--dropout", 1.5], "--dropout must lie in"),
        (["train", *base, "--param-dtype", "int8"], "--param-dtype is float32 or float16"),
        (["train", *base, "--window", 1], "--window must be at least 2"),
        (["train", *base, "--window", 5000], "--window 5000 is more than the 64 positions"),
        (["train", *base, "--device", "abacus"], "--device is cpu or cuda[:N]"),
        (["train", *base, "--model", tmp_path / "none"], "there is no directory"),
        (["train", *base, "--model", tmp_path / "nonsense"], "cannot load the language model"),
        (["train", *base, "--text", tmp_path / "none.txt"], "there is no text file"),
        (["train", *base, "--text", "nothing"], "is not docstrings"),
        (["train", *base, "--text", tmp_path / "empty.txt"], "no document of the validation split"),
        (["train", *base, "--text", tmp_path / "blank.txt"], "no document of the validation split"),
        (["train", *base, "--text", tmp_path / "short.txt"], "has 8 tokens"),
        (["train", *base, "--text", tmp_path / "latin.txt"], "cannot read the text"),
        (
            ["train", *base, "--text", tmp_path / "column.jsonl"],
            "row 1 has no string called 'text', but {'words'",
        ),
        (["train", *base, "--text", tmp_path / "broken.jsonl"], "cannot read the text"),
        (["train", "sequential", *base], "train that first"),
        (["train", "--preset", "tiny"], "run the stage `lm` first"),
        (["recon", "--preset", "tiny"], "run the stage `train` first"),
        (["kl", "--model", model, "--text", text, "--layer", 1], "run the stage `train` first"),
        (["train", *base, "--lr", 0.01, "nan"], "invalid number value: 'nan'"),
        (["train", *base, "--decay", "inf"], "invalid number value: 'inf'"),
        (["train", *base, "--seed", 2**70], "--seed must lie in"),
        (["train", "sae@", *base], "unknown arm 'sae@'"),
        (["train", *base, "--keep"], "unrecognized arguments: --keep"),
        (["train", *base, "--window", 64], "more than the 64 positions"),
        (["train", *base, "--model", tmp_path / "holes"], "weights are missing"),
        (["train", *base, "--model", tmp_path / "few"], "its tokenizer knows"),
        (["plan", "--model", "someone/something"], "plan knows"),
        (["plan", "--model", model, "--layer", 9], "layer 9 is out of range"),
        (["recon", "--features", 12], "unrecognized arguments"),
        (["fly"], "invalid choice"),
        ([], "the following arguments are required"),
    ]
    for number, (command, message) in enumerate(cases):
        run = tmp_path / f"run{number}"
        try:
            status = d.main([*map(str, command), *(["--run", str(run)] if command else [])])
        except SystemExit as stop:  # argparse's own complaints
            status = stop.code
        error = capsys.readouterr().err.strip()
        assert status == 2 and message in error and error.count("\n") == 0, (command, error)
        assert error.startswith("dualenc: ") and "Traceback" not in error
        assert not run.exists(), command  # nothing half-written
    for flags, message in (
        (["--features", 50], "was made with features = 48, not 50"),
        (["--seed", 3], "seed = 0, not 3"),
        (["--preset", "small"], "was made with preset = tiny, not small"),
    ):
        assert stage("train", trained, *flags) == 2
        assert message in capsys.readouterr().err


def test_what_weights_are_made_with_is_settled_at_once_and_the_rest_stays_free(
    model, text, tmp_path, monkeypatch, capsys
):
    run, flags = tmp_path / "run", ["sae", "--model", model, "--text", text, "--layer", 1, *SMALL]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        assert stage("train", run, *flags) == 130
    before = {name: (run / name).read_bytes() for name in ("config.json", "standardiser.safetensors")}
    for changed, message in (
        (["--layer", 2], "layer = 1, not 2"),
        (["--lr", 0.01], "lr = [0.003, 0.01], not [0.01]"),
        (["--text", "docstrings"], f"text = {text}, not docstrings"),
        (["--eval-tokens", 700], "eval_tokens = 600, not 700"),  # these choose the rate, too
        (["--seed", 1], "seed = 0, not 1"),
        (["--preset", "small"], "preset = tiny, not small"),
    ):
        capsys.readouterr()
        assert stage("train", run, *flags, *changed) == 2
        error = capsys.readouterr().err
        assert error == f"dualenc: {run} was made with {message}: choose another --run\n"
    assert {name: (run / name).read_bytes() for name in before} == before
    assert stage("train", run, *flags) == 0 and stage("recon", run) == 0
    assert (run / "standardiser.safetensors").read_bytes() == before["standardiser.safetensors"]
    assert stage("kl", run, "--kl-tokens", 80) == 0 and stage("kl", run, "--kl-tokens", 160) == 0
    assert json.loads((run / "results" / "kl.json").read_text())["tokens"] == 160


def test_a_second_process_is_refused_and_a_killed_ones_scraps_are_cleared(trained, tmp_path, capsys):
    import fcntl

    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("results"))
    (run / ".joint.ckpt.123.tmp").write_text("half of it")
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert stage("recon", run) == 2
    assert capsys.readouterr().err == f"dualenc: another process is at work on {run}\n"
    assert stage("recon", run) == 0 and not list(run.glob(".*.tmp"))


def test_configurations_that_were_tampered_with_and_stray_files(trained, tmp_path, capsys):
    good = json.loads((trained / "config.json").read_text())
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("results"))
    for change in (
        {"k": "6"},
        {"k": 6.0},
        {"lr": 0.01},
        {"lr": []},
        {"text": None},
        {"keep_first": "no"},
        {"new": 1},
    ):
        (run / "config.json").write_text(json.dumps(good | change))
        assert stage("recon", run) == 2
        assert f"is damaged or of another version, in {next(iter(change))}" in capsys.readouterr().err
    (run / "config.json").write_text(json.dumps({k: v for k, v in good.items() if k != "window"}))
    assert stage("recon", run) == 2
    assert "was trained with window = 8, here it is 50" in capsys.readouterr().err
    (run / "config.json").write_text(json.dumps(good))
    shutil.copy(run / "joint.safetensors", run / "joint-linear.safetensors")
    assert stage("recon", run) == 2
    assert "joint-linear.safetensors was trained with arm = joint, here" in capsys.readouterr().err
    (run / "joint-linear.safetensors").unlink()
    (run / "._sae.safetensors").write_bytes(b"")
    (run / "notes.safetensors").write_bytes(b"")
    assert stage("recon", run) == 0
    (run / "train.jsonl").write_bytes(b"\xff\xfe\n")
    assert stage("report", run) == 2 and "train.jsonl is damaged" in capsys.readouterr().err


def test_a_file_name_is_taken_literally(tmp_path):
    (tmp_path / "t1.txt").write_text("wrong")
    (tmp_path / "t[1].TXT").write_text("right")
    assert list(d.documents(str(tmp_path / "t[1].TXT"))) == ["right"]


def test_damaged_and_foreign_files_are_refused(trained, tmp_path, monkeypatch, capsys):
    from safetensors.torch import save_file

    whole = (trained / "sae.safetensors").read_bytes()
    foreign = tmp_path / "foreign.safetensors"
    save_file({"W": torch.zeros(2)}, foreign)
    narrow = d.make_arm("sae", **SIZES)
    d.save_arm(
        tmp_path / "narrow.safetensors",
        narrow,
        d.Standardiser(torch.zeros(6), torch.ones(6)),
        d.load_arm(trained / "sae.safetensors").config | SIZES,
    )
    wrong = [
        (whole[: len(whole) // 2], "is damaged"),
        (b"", "is damaged"),
        (os.urandom(999), "is damaged"),
        (foreign.read_bytes(), "not written by this program"),
        ((tmp_path / "narrow.safetensors").read_bytes(), "trained with D = 6, here it is 16"),
    ]
    for number, (content, message) in enumerate(wrong):
        run = tmp_path / f"run{number}"
        shutil.copytree(trained, run, ignore=shutil.ignore_patterns("results"))
        (run / "sae.safetensors").write_bytes(content)
        assert stage("recon", run) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (run / "results").exists()
    run = tmp_path / "resumed"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("joint*", "results", "train.jsonl"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2 * 9)
        assert stage("train", run, "joint", "--save-minutes", 0) == 130
    state = torch.load(run / "joint.ckpt", weights_only=True)
    good = (run / "joint.ckpt").read_bytes()
    torch.save(state | {"arm": "joint-linear"}, tmp_path / "other.ckpt")
    torch.save([os.system], tmp_path / "code.ckpt")  # a pickle that names a function is not executed
    for content in (
        good[: len(good) // 2],
        b"",
        os.urandom(2000),
        (tmp_path / "other.ckpt").read_bytes(),
        (tmp_path / "code.ckpt").read_bytes(),
    ):
        (run / "joint.ckpt").write_bytes(content)
        capsys.readouterr()
        assert stage("train", run, "joint") == 2
        error = capsys.readouterr().err
        assert "joint.ckpt is not a checkpoint of this run; delete it" in error and error.count("\n") == 1
        assert (run / "joint.ckpt").read_bytes() == content
    (run / "config.json").write_text("{")
    assert stage("train", run, "joint") == 2 and "cannot read" in capsys.readouterr().err


def flipped(content, seed):
    """Bytes with one of them changed, or cut short."""
    rng = random.Random(seed)
    at = rng.randrange(len(content))
    return (
        content[:at]
        if seed % 3 == 0
        else content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    )


def test_no_flipped_bit_and_no_cut_tail_passes_for_a_result(trained, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("joint.*", "results", "train.jsonl"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2 * 9)
        assert stage("train", run, "joint", "--save-minutes", 0) == 130
    for name, command in (
        ("sae.safetensors", "recon"),
        ("standardiser.safetensors", "recon"),
        ("joint.ckpt", "train"),
    ):
        good = (run / name).read_bytes()
        for seed in range(25):
            (run / name).write_bytes(flipped(good, seed))
            capsys.readouterr()
            status = stage(command, run, *(["joint"] if command == "train" else []))
            error = capsys.readouterr().err
            if status == 0 and name == "joint.ckpt":  # it hit what means nothing, as a date in the archive
                assert same_weights(run / "joint.safetensors", trained / "joint.safetensors")
                (run / "joint.safetensors").unlink()
                continue
            assert status == 2 and name in error and error.count("\n") == 1, (name, seed, error)
        (run / name).write_bytes(good)
        assert not (run / "results").exists() and not (run / "joint.safetensors").exists()


@given(content=st.binary(max_size=60), seed=seeds)
@settings(max_examples=60)
def test_settings_results_and_stimuli_of_any_bytes_are_read_or_refused(tmp_path_factory, content, seed):
    path = tmp_path_factory.mktemp("fuzz") / "file.json"
    whole = json.dumps(d.STIMULI["docs"] if isinstance(d.STIMULI, dict) else {"a": [1, None]}).encode()
    for bytes_ in (content, flipped(whole, seed)):
        path.write_bytes(bytes_)
        for read in (d.read_json, lambda path: d.load_stimuli(str(path))):
            try:
                read(path)
            except d.UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    "rows",
    [
        ["x" * 2_000_000],
        ["a\x00b" * 50] * 40,
        [""] * 5000,
        ["\ufeff" + "ä ö 中 \U0001f600 " * 30] * 30,
        [" ".join(random.Random(1).choices(WORDS, k=200_000))],
        [" ".join(WORDS)] * 300,
    ],
    ids=["one long line", "nulls", "all empty", "odd letters", "one document", "constant"],
)
def test_odd_texts_are_read_or_refused_in_one_line(rows, model, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes("\n".join(rows).encode())
    flags = ["--model", model, "--text", tmp_path / "text.txt", "--layer", 1, *SMALL]
    status = stage("train", tmp_path / "run", "sae", *flags)
    error = capsys.readouterr().err
    assert status == 2 and "no document of the" in error and error.count("\n") == 1
    assert not (tmp_path / "run" / "sae.safetensors").exists()
    (tmp_path / "text.txt").write_bytes(b"caf\xe9 \xff\xfe\n" * 300)  # no UTF-8
    assert stage("train", tmp_path / "run", "sae", *flags) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("limit", [300, 3000, 12_000])
def test_a_full_disk_is_told_and_what_was_good_stays(trained, tmp_path, limit):
    import resource

    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("joint.*", "results"))
    before = {p.name: p.read_bytes() for p in run.glob("*.safetensors")}
    out = subprocess.run(
        [
            sys.executable,
            str(SOURCE),
            "train",
            "joint",
            "--run",
            str(run),
            "--save-minutes",
            "0",
            "--device",
            "cpu",
        ],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert out.returncode == 2 and "cannot write" in out.stderr and out.stderr.count("\n") == 1, out.stderr
    assert {p.name: p.read_bytes() for p in run.glob("*.safetensors")} == before
    assert not [p for p in run.iterdir() if p.name.endswith(".tmp")]
    assert stage("train", run, "joint") == 0
    assert same_weights(run / "joint.safetensors", trained / "joint.safetensors")


@pytest.mark.parametrize("name", ["train", "synth"])
def test_ctrl_c_stops_at_once_and_says_how_to_go_on(name, trained, model, text, tmp_path):
    run, command = tmp_path / "run", [sys.executable, str(SOURCE), name, "--run", str(tmp_path / "run")]
    if name == "train":
        command += map(
            str, ["joint", "--model", model, "--text", text, "--layer", 1, *SMALL, "--tokens", 10**6]
        )
        command += ["--save-minutes", "0"]
    process = subprocess.Popen(  # a shell's background jobs, and so their children, are deaf to SIGINT
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    started = (
        (lambda: (run / "joint.ckpt").exists()) if name == "train" else (lambda: (run / "worlds").exists())
    )
    try:
        while not started() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)  # on an idle machine it takes less than one second
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "the same command goes on" in error and "Traceback" not in error


def test_gpu_memory_running_out_names_the_flags(monkeypatch, capsys):
    def run_out(cfg):
        """Stage `plan`: fails."""
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.\nMore text.")

    monkeypatch.setitem(d.STAGES, "plan", run_out)
    assert d.main(["plan"]) == 2
    error = capsys.readouterr().err
    assert "lower --batch, --features or" in error and error.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_trains_what_the_cpu_trains(model, text, trained, tmp_path):
    flags = ["--model", model, "--text", text, "--layer", 1, *SMALL, "--device", "cuda"]
    assert (
        stage("train", tmp_path / "run", "sae", "joint", *flags) == 0
        and stage("recon", tmp_path / "run") == 0
    )
    ours, theirs = (
        json.loads((run / "results" / "recon.json").read_text())["arms"]
        for run in (tmp_path / "run", trained)
    )
    for name in ("sae", "joint"):
        assert ours[name]["mse"] == pytest.approx(theirs[name]["mse"], rel=0.02)


# ---- structure


def components_by_loop(variances):
    """How many of the largest variances hold 90 % of their sum."""
    so_far = 0
    for number, variance in enumerate(sorted(variances, reverse=True), 1):
        so_far += variance
        if so_far >= 0.9 * sum(variances):
            return number


@given(
    F=st.integers(3, 40),
    width=st.integers(1, 7),
    block=st.integers(1, 50),
    shift=st.floats(-2, 2),
    seed=seeds,
)
def test_gram_stats_against_dense_matrices(F, width, block, shift, seed):
    W = normal(F, width, seed=seed) + shift
    stats, dense_W = d.gram_stats(W, block=block), W.numpy()
    norms = np.sqrt((dense_W**2).sum(1))
    pairs = [(i, j) for i in range(F) for j in range(i)]
    product = np.array([sum(dense_W[i] * dense_W[j]) for i, j in pairs])
    cosine = product / [norms[i] * norms[j] for i, j in pairs]
    for kind, values in (("product", product), ("cosine", cosine)):
        found = [stats[kind][name] for name in ("mean", "std", "largest")]
        np.testing.assert_allclose(
            found, [values.mean(), values.std(), abs(values).max()], rtol=1e-6, atol=1e-7
        )
    np.testing.assert_allclose(stats["squared_norms"], norms**2)
    singular = np.linalg.svd(dense_W - dense_W.mean(0), compute_uv=False) ** 2
    expected = np.pad(singular, (0, max(0, width - F)))
    np.testing.assert_allclose(stats["spectrum"], expected, atol=1e-9 * (1 + F * shift**2) * expected[0])
    assert stats["components_90"] == components_by_loop(singular)
    whole = np.linalg.svd(dense_W, compute_uv=False) ** 2
    assert stats["components_90_published"] == components_by_loop(whole)
    assert stats["first_50"] == pytest.approx(1)


def test_gram_stats_of_many_components():
    W = (normal(90, 70) * torch.linspace(0.1, 2, 70)).float() + 0.5
    stats, centred = d.gram_stats(W), W.double().numpy() - W.double().numpy().mean(0)
    spectrum = np.linalg.eigvalsh(centred.T @ centred)[::-1]
    half_ulp = np.finfo(np.float32).eps / 2  # products are of single precision, sums of double
    np.testing.assert_allclose(stats["spectrum"], spectrum, rtol=1e-6, atol=half_ulp * spectrum[0])
    assert (
        stats["first_50"] == pytest.approx(spectrum[:50].sum() / spectrum.sum()) and stats["first_50"] < 0.999
    )
    # the published recipe knows of a thousand components only: here they are known, the rows are orthogonal
    size = torch.linspace(1, 2, 1100, dtype=torch.float64)
    stats, squared = d.gram_stats(torch.diag(size), block=400), sorted(size.square().tolist(), reverse=True)
    assert stats["components_90_published"] == components_by_loop(squared[:1000]) < stats["components_90"]
    assert stats["product"] == stats["cosine"] == dict(mean=0, std=0, largest=0)


def test_gram_stats_makes_no_matrix_of_all_pairs():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            parts = out if isinstance(out, (tuple, list)) else [out]
            self.most = max([self.most] + [part.numel() for part in parts if isinstance(part, torch.Tensor)])
            return out

    with Largest() as seen:
        d.gram_stats(normal(600, 8), block=50)
    assert 8 * 600 <= seen.most <= 50 * 600


def test_find_modes_of_one_and_of_two_log_normals():
    rng = np.random.default_rng(0)
    one, low, high = (10 ** rng.normal(at, 0.1, 1500) for at in (-0.4, -1.3, -0.4))
    single, double = d.find_modes(one, resamples=5), d.find_modes(np.concatenate([low, high]), resamples=5)
    assert single["modes"] == 1 and single["antimode"] is None
    assert double["modes"] == 2 and 10**-1.2 < double["antimode"] < 10**-0.5
    assert double["bimodality"] > 5 / 9 > single["bimodality"]
    uneven = d.find_modes(np.concatenate([low[:300], high]), resamples=5)
    assert uneven["modes"] == 2 and 10**-1.2 < uneven["antimode"] < 10**-0.5


def test_bimodality_by_hand_and_its_bootstrap():
    def sarle(squared_norms):
        y = np.log10(squared_norms)
        y = (y - y.mean()) / y.std()
        return ((y**3).mean() ** 2 + 1) / (y**4).mean()

    rng = np.random.default_rng(0)
    sample = rng.gamma(2, size=400)
    found = d.find_modes(sample, seed=3)
    assert found["bimodality"] == pytest.approx(sarle(sample)) and len(found["resamples"]) == 300
    spread = np.std([sarle(rng.gamma(2, size=400)) for _ in range(400)])  # over fresh samples
    assert found["resamples"].std() == pytest.approx(spread, rel=0.3)
    assert abs(found["resamples"].mean() - found["bimodality"]) < spread
    assert np.array_equal(found["resamples"], d.find_modes(sample, seed=3)["resamples"])
    assert not np.array_equal(found["resamples"], d.find_modes(sample, seed=4)["resamples"])


def spearman(x, y):
    """Spearman's correlation of numbers without ties."""
    ranks = [
        [sum(other < value for other in values) for value in values] for values in (x.tolist(), y.tolist())
    ]
    return np.corrcoef(ranks)[0, 1]


def test_norm_shares_against_own_ranks_and_bins():
    rng = np.random.default_rng(0)
    dec, lin, V = (rng.gamma(3, size=130) for _ in range(3))
    found = d.norm_shares(dec, lin, V, (0.3 * np.ones(130), 0.2 * np.ones(130)), shuffles=40)
    total = dec + lin + V
    for name, share in dict(nfm=(lin + V) / total, linear=lin / total, interaction=V / total).items():
        assert found["r"][name] == pytest.approx(spearman(dec**2, share))
        median, low, high = found["r_shuffled"][name]
        assert low < median < high < 0  # from the norm in the denominator alone
    assert found["r"]["residual"] == pytest.approx(-found["r"]["nfm"])  # the shares add up to 1
    assert found["r_untouched"]["nfm"] == pytest.approx(-1)
    assert found["r_less_lowest_shuffled"] == pytest.approx(found["r"]["nfm"] - found["r_shuffled"]["nfm"][1])
    order = sorted(range(130), key=lambda i: dec[i])
    bins = [
        [order.pop(0) for _ in range(7 if b < 10 else 6)] for b in range(20)
    ]  # 130 into 20, the first larger
    np.testing.assert_allclose(found["bins"], [(dec[here] ** 2).mean() for here in bins])
    low = dec**2 < 0.2
    for label, norms in (("", (lin, V)), ("_untouched", (0.3 + 0 * dec, 0.2 + 0 * dec))):
        for name, norm in dict(
            nfm=norms[0] + norms[1], linear=norms[0], interaction=norms[1], residual=dec
        ).items():
            share = norm / (dec + norms[0] + norms[1])
            assert found["below_0.2" + label][name] == pytest.approx(share[low].mean())
            assert found["above_0.2" + label][name] == pytest.approx(share[~low].mean())
            if name == "nfm":
                np.testing.assert_allclose(
                    found["nfm_by_norm" + label], [share[here].mean() for here in bins]
                )
    assert low.any() and all(under <= median <= over for median, under, over in found["nfm_by_norm_shuffled"])
    assert d.norm_shares(1 + dec, lin, V, (lin, V), shuffles=5)["below_0.2"]["nfm"] is None
    again = d.norm_shares(dec, lin, V, (lin, V), shuffles=40)
    assert again["r_shuffled"] == found["r_shuffled"] and again["r_untouched"] == again["r"]


def test_norm_shares_of_independent_norms_lie_in_the_shuffled_band_and_of_dependent_ones_do_not():
    inside = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        dec, lin, V = (rng.gamma(3, size=100) for _ in range(3))
        found = d.norm_shares(dec, lin, V, (lin, V), shuffles=60, seed=seed)
        _, low, high = found["r_shuffled"]["nfm"]
        inside += low <= found["r"]["nfm"] <= high
    assert 16 <= inside <= 20
    falling = d.norm_shares(dec, lin / dec, V / dec, (lin, V), shuffles=60)
    assert falling["r_less_lowest_shuffled"] < -0.05
    u = rng.random(100)  # lin and V are shuffled as a pair: here they always add up to 1
    pair = d.norm_shares(dec, u, 1 - u, (lin, V), shuffles=5)
    assert pair["r_shuffled"]["nfm"] == pytest.approx([-1, -1, -1])
    rising = d.norm_shares(dec, lin * dec, V * dec, (lin, V), shuffles=60)
    assert rising["r_less_lowest_shuffled"] > 0 and rising["r"]["nfm"] > rising["r_shuffled"]["nfm"][2]


def test_feature_use_against_cutting_each_feature():
    model, x = arm("joint").double(), normal(40, 6)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    use = d.feature_use(model, [(x[:25], None), (x[25:], None)])
    values, indices = model.sae.encode(x)

    def error(changed):
        return (sum(changed(x).values()) - x).square().sum(1).mean().item()

    with torch.no_grad():
        for path, weight, kept in (("sae", "sae.W_dec", 5), ("linear", "nfm.W_lin", 3)):
            code = dense(values[:, :kept], indices[:, :kept], 24)
            np.testing.assert_allclose(use[path][0], (code > 0).double().mean(0))
            np.testing.assert_allclose(use[path][1], code.mean(0))
            added = []
            for feature in range(24):
                cut = arm("joint").double()
                cut.load_state_dict(model.state_dict())
                cut.get_parameter(weight)[feature] = 0
                added.append(error(cut) - error(model))
            np.testing.assert_allclose(use[path][2], added, rtol=1e-9, atol=1e-9)
    assert set(d.feature_use(arm("sae"), [(x.float(), None)])) == {"sae"}


# ---- anova


def test_two_way_anova_of_a_balanced_table_by_explicit_sums():
    from scipy import stats

    table = [
        [[4, 5, 6, 5], [7, 9, 8, 12], [10, 12, 11, 9]],
        [[6, 6, 4, 4], [13, 15, 12, 12], [12, 13, 10, 13]],
    ]
    y = np.array(table, dtype=float)  # (a, b, units of a cell)
    grand, cell, row, column = y.mean(), y.mean(2), y.mean((1, 2)), y.mean((0, 2))
    sums = dict(a=12 * ((row - grand) ** 2).sum(), b=8 * ((column - grand) ** 2).sum())
    sums["ab"] = sum(4 * (cell[i, j] - row[i] - column[j] + grand) ** 2 for i in range(2) for j in range(3))
    within = sum((y[i, j, k] - cell[i, j]) ** 2 for i, j, k in np.ndindex(2, 3, 4))
    assert sum(sums.values()) + within == pytest.approx(((y - grand) ** 2).sum())
    a, b, _ = (index.ravel() for index in np.indices(y.shape))
    found = d.two_way_anova(y.ravel(), a, b)
    for name, freedom in (("a", 1), ("b", 2), ("ab", 2)):
        statistic = sums[name] / freedom / (within / 18)
        assert found[f"F_{name}"] == pytest.approx(statistic)
        assert found[f"p_{name}"] == pytest.approx(stats.f.sf(statistic, freedom, 18))
    assert found["eta2_ab"] == pytest.approx(sums["ab"] / (sums["ab"] + within))
    order = np.random.default_rng(0).permutation(24)
    named = d.two_way_anova(y.ravel()[order], a[order], b[order])
    assert {key: pytest.approx(value) for key, value in found.items()} == named


@given(levels=st.tuples(st.integers(2, 3), st.integers(2, 4)), seed=seeds)
def test_two_way_anova_of_an_unbalanced_table_by_nested_projections(levels, seed):
    from scipy import stats

    rng = np.random.default_rng(seed)
    cells = [cell for cell in np.ndindex(levels) for _ in range(rng.integers(1, 5))] + [(0, 0)]
    a, b = np.array(cells).T
    y = rng.normal(size=(len(a), 3)) + a[:, None] * [0, 1, 2]

    def sum_coded(labels, size):  # another coding than one column for each level but the first
        return np.vstack([np.eye(size - 1), -np.ones(size - 1)])[labels]

    A, B = sum_coded(a, levels[0]), sum_coded(b, levels[1])
    one = np.ones((len(a), 1))
    full = np.array([[cell == where for where in np.ndindex(levels)] for cell in cells], dtype=float)

    def left(*columns):
        X = np.hstack(columns)
        residual = y - X @ (np.linalg.pinv(X) @ y)
        return (residual**2).sum(0), np.linalg.matrix_rank(X)

    found = d.two_way_anova(y, a, b)
    error, rank = left(full)
    for name, without, with_it in (
        ("a", (one, B), (one, A, B)),
        ("b", (one, A), (one, A, B)),
        ("ab", (one, A, B), (full,)),
    ):
        (large, few), (small, many) = left(*without), left(*with_it)
        statistic = (large - small) / (many - few) / (error / (len(a) - rank))
        np.testing.assert_allclose(found[f"F_{name}"], statistic, rtol=1e-7, atol=1e-9)
        expected = stats.f.sf(statistic, many - few, len(a) - rank)
        np.testing.assert_allclose(found[f"p_{name}"], expected, rtol=1e-6)
    for column in range(3):  # a column's results don't depend on the others
        alone = d.two_way_anova(y[:, column], a, b)
        assert all(value[column] == pytest.approx(alone[key]) for key, value in found.items())


def test_two_way_anova_is_uniform_without_an_effect_and_finds_a_planted_one():
    from scipy import stats

    rng, cells = np.random.default_rng(0), [(0, 0)] * 3 + [(0, 1)] * 5 + [(1, 0)] * 2 + [(1, 1)] * 6
    a, b = np.array(cells).T
    noise = rng.normal(size=(16, 4000))
    null = d.two_way_anova(noise, a, b)
    for key in ("p_a", "p_b", "p_ab"):
        assert stats.kstest(null[key], "uniform").pvalue > 0.01
    additive = d.two_way_anova(noise + 3 * a[:, None] - 2 * b[:, None], a, b)
    np.testing.assert_allclose(additive["F_ab"], null["F_ab"], rtol=1e-6, atol=1e-8)
    assert (additive["p_a"] < 0.05).mean() > 0.99 and (additive["p_b"] < 0.05).mean() > 0.9
    planted = d.two_way_anova(noise + 6 * (a * b)[:, None], a, b)
    assert (planted["p_ab"] < 0.05).mean() > 0.9
    for bad in (
        [(0, 0), (0, 1), (1, 0), (1, 0)],
        [(0, 0), (0, 1), (1, 0), (1, 1)],
    ):  # an empty cell; no error
        with pytest.raises(ValueError):
            d.two_way_anova(np.arange(4.0), *np.array(bad).T)


def test_freedman_lane_is_uniform_without_an_interaction_and_finds_a_planted_one():
    rng = np.random.default_rng(1)
    a, b = np.array([(0, 0)] * 4 + [(0, 1)] * 5 + [(1, 0)] * 6 + [(1, 1)] * 4).T
    ps = []
    for seed in range(400):
        noise = rng.normal(size=19)
        ps.append(d.freedman_lane(4 * a - 7 * b + noise, a, b, permutations=99, seed=seed))
        if seed < 20:
            assert ps[-1] == d.freedman_lane(noise, a, b, permutations=99, seed=seed)
    assert all(round(100 * p) == pytest.approx(100 * p) and p >= 0.01 for p in ps)
    for level in (0.05, 0.25, 0.5, 0.75):  # four standard errors
        assert abs(np.mean(np.array(ps) <= level) - level) < 4 * (level * (1 - level) / 400) ** 0.5
    assert d.freedman_lane(9 * a * b + noise, a, b, permutations=99) == 0.01
    assert d.freedman_lane(9 * a * b + noise, a, b) == 0.001


def test_no_effect_is_never_significant():
    a, b = np.repeat([0, 1], 8), np.tile([0, 1], 8)
    assert math.isnan(d.freedman_lane(np.zeros(16), a, b, permutations=9))
    assert math.isnan(d.crossed_p(np.zeros((4, 4))))
    assert math.isnan(d.share_beyond(np.array([1.0, 2.0]), math.nan))
    assert d.share_beyond(np.array([math.nan, 1.0, 3.0, math.inf]), 1.5) == 0.5  # the finite ones count
    assert d.verdict([math.nan], "<", 0.05, "what") == "not decided whether what" and d.show(math.nan) == "-"


@given(rows=st.sampled_from([4, 6, 8]), columns=st.sampled_from([4, 6]), seed=seeds)
def test_crossed_p_is_the_larger_p_of_two_t_tests_by_hand(rows, columns, seed):
    from scipy import stats

    y = normal(rows, columns, seed=seed).numpy()

    def p_of(table):  # one contrast for each row; do those of the first half differ from the others?
        width, ps = (
            len(table[0]) // 2,
            [sum(row[: len(row) // 2]) - sum(row[len(row) // 2 :]) for row in table],
        )
        first, second = np.array(ps[: len(ps) // 2]) / width, np.array(ps[len(ps) // 2 :]) / width
        pooled = (((first - first.mean()) ** 2).sum() + ((second - second.mean()) ** 2).sum()) / (len(ps) - 2)
        t = (first.mean() - second.mean()) / (pooled * 4 / len(ps)) ** 0.5
        return 2 * stats.t.sf(abs(t), len(ps) - 2)

    assert d.crossed_p(y) == pytest.approx(max(p_of(y.tolist()), p_of(y.T.tolist())))
    shifted = y + normal(rows, 1, seed=seed + 1).numpy() + normal(columns, seed=seed + 2).numpy()
    assert d.crossed_p(shifted) == pytest.approx(d.crossed_p(y))  # main effects don't count


@pytest.mark.parametrize("by_opening", [0, 3])
@pytest.mark.parametrize("by_continuation", [0, 3])
def test_crossed_p_keeps_its_level_and_finds_a_planted_interaction(by_opening, by_continuation):
    rng, ps, level_of = np.random.default_rng(2), [], np.repeat([1, -1], 3)
    for _ in range(600):  # sentences have effects of their own, and react to the other factor each in its way
        y = 5 * rng.normal(size=(6, 1)) + 5 * rng.normal(size=6) + rng.normal(size=(6, 6))
        y += by_continuation * np.outer(level_of, rng.normal(size=6))
        y += by_opening * np.outer(rng.normal(size=6), level_of)
        ps.append(d.crossed_p(y))
    for level in (0.05, 0.1, 0.3):
        rate, error = (np.array(ps) <= level).mean(), (level * (1 - level) / 600) ** 0.5
        assert rate <= level + 3 * error
        assert rate >= level / 2 or not (by_opening or by_continuation)  # careful without such reactions
    assert d.crossed_p(y + 30 * np.outer(level_of, level_of)) < 0.01


def stimuli_of(words):
    """A small set of stimuli with those 16 words or more."""
    rng = random.Random(3)

    def texts(count):
        return [" ".join(rng.choices(WORDS, k=rng.randint(2, 4))) for _ in range(count)]

    cells = [f"{first}/{second}" for first in ("old", "new") for second in ("wet", "dry")]
    return dict(
        openings=dict(old=texts(4), new=texts(4)),
        continuations=dict(wet=texts(4), dry=texts(4)),
        words={cell: words[number::4] for number, cell in enumerate(cells)},
        prompts=texts(3),
    )


def test_stimuli_load_and_malformed_ones_name_their_cell(tmp_path):
    path, good = tmp_path / "own.json", stimuli_of(WORDS[:16])
    for source in ("docs", "formality-emotion"):
        found = d.load_stimuli(source)
        first, second = (list(found[part]) for part in ("openings", "continuations"))
        assert list(found["words"]) == [f"{a}/{b}" for a in first for b in second]
        assert all(len(words) >= 4 and " " not in "".join(words) for words in found["words"].values())
    path.write_text(json.dumps(good))
    assert d.load_stimuli(str(path)) == good
    path.write_text(json.dumps(good | {"words": {cell: " ".join(w) for cell, w in good["words"].items()}}))
    assert d.load_stimuli(str(path)) == good

    def but(part, **levels):
        return good | {
            part: {name: texts for name, texts in (good[part] | levels).items() if texts is not None}
        }

    cases = [
        ({key: value for key, value in good.items() if key != "openings"}, "'openings'"),
        (but("openings", new=None), "'openings'"),
        (but("continuations", third=["a"] * 4), "'continuations'"),
        (good | {"openings": ["a"] * 4}, "'openings'"),
        (but("openings", new=["a"] * 6), "'openings'"),
        (but("openings", old=["a"] * 5, new=["b"] * 5), "'openings'"),
        (but("continuations", wet=["a"] * 2, dry=["b"] * 2), "'continuations'"),
        (but("continuations", wet=[], dry=[]), "'continuations'"),
        (but("openings", new=["a", "b", 3, "c"]), "'openings/new'"),
        (but("continuations", dry=["a", "b", " ", "c"]), "'continuations/dry'"),
        (
            good | {"words": {cell: w for cell, w in good["words"].items() if cell != "new/dry"}},
            "'words/new/dry'",
        ),
        (good | {"words": good["words"] | {"old/wet": 7}}, "'words/old/wet'"),
        ({key: value for key, value in good.items() if key != "words"}, "'words/old/wet'"),
        ({key: value for key, value in good.items() if key != "prompts"}, "'prompts'"),
        (good | {"prompts": []}, "'prompts'"),
        (good | {"prompts": "a string"}, "'prompts'"),
        (["no", "object"], "cannot read"),
    ]
    for stimuli, message in cases:
        path.write_text(json.dumps(stimuli))
        with pytest.raises(d.UserError, match=message):
            d.load_stimuli(str(path))
    path.write_text("{")
    for source in (path, tmp_path / "none.json"):
        with pytest.raises(d.UserError, match="cannot read"):
            d.load_stimuli(str(source))


def test_word_tokens_drops_shared_and_unknown_first_tokens():
    pieces = {word: [10 + number] for number, word in enumerate("ant bee cat dog eel fox gnu hen".split())}
    pieces |= {"a": [5], "antler": [10, 30], "zebra": [1], "beetle": [40, 11], "owl": []}

    def tokenizer(text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [token for word in text.split() for token in pieces[word]]}

    tokenizer = type("Fake", (), dict(unk_token_id=1, __call__=staticmethod(tokenizer)))()
    words = {
        "x": ["bee", "ant", "cat", "zebra", "dog", "eel"],
        "y": ["beetle", "antler", "owl", "fox", "gnu", "hen"],
    }
    kept, dropped = d.word_tokens(tokenizer, words, "own")
    assert kept == {"x": [11, 12, 13, 14], "y": [40, 15, 16, 17]}
    assert sorted(dropped) == ["ant", "antler", "owl", "zebra"]
    with pytest.raises(d.UserError, match=r"own.* x \(3\)"):
        d.word_tokens(tokenizer, words | {"x": words["x"][:5]}, "own")


@pytest.fixture
def spliced(model):
    """The arguments of spliced_texts: a configuration, data, an arm, and texts of several lengths."""
    lm, tokenizer = d.load_lm(model)
    standardiser = d.Standardiser(normal(16, seed=1).float() / 9, torch.linspace(0.5, 2, 16))
    data = types.SimpleNamespace(lm=lm, tokenizer=tokenizer, D=16, skip=1, standardiser=standardiser)
    torch.manual_seed(0)
    joint = d.make_arm("joint", D=16, F=40, k=6, n=4, K=5).eval().requires_grad_(False)
    for p in joint.parameters():
        torch.nn.init.normal_(p, std=0.3)
    secondary = d.make_arm("sae", D=5, F=30, k=3, n=1, K=1).eval().requires_grad_(False)
    secondary.standardiser = d.Standardiser(normal(5, seed=2).float() / 9, torch.linspace(0.5, 2, 5))
    texts = [" ".join(WORDS[7 * i : 7 * i + length]) for i, length in enumerate((3, 1, 6, 2, 6))]
    return types.SimpleNamespace(layer=1, device="cpu", seed=0), data, joint, secondary, texts


def spliced_alone(cfg, data, model, text, change):
    """Logits after one text, x_hat + change(values, indices) in place; and its number of positions."""
    tokens = torch.tensor(
        [[data.tokenizer.bos_token_id, *data.tokenizer(text, add_special_tokens=False)["input_ids"]]]
    )
    tokens = tokens.to(cfg.device)
    raw = d.capture(data.lm, cfg.layer, tokens)
    values, indices = model.sae.encode((raw[0, data.skip :] - data.standardiser.mean) / data.standardiser.std)
    new = change(values, indices) * data.standardiser.std + data.standardiser.mean
    logits = d.splice(
        data.lm, cfg.layer, tokens, lambda hidden: torch.cat([hidden[:, : data.skip], new[None]], 1)
    )
    return logits[0, -1], len(new)


def test_spliced_texts_is_the_pipeline_text_by_text(spliced):
    cfg, data, joint, secondary, texts = spliced
    whole, at = d.spliced_texts(cfg, data, joint, secondary, texts), []
    row, rest = normal(5, seed=3).float(), normal(16, seed=4).float()

    def x_hat(values, indices, m_more=0, x_more=0):
        linear = d.sparse_decode(values[:, :4], indices[:, :4], joint.nfm.W_lin) + joint.nfm.b_lin
        m = joint.nfm.post_mlp1(values, indices) + m_more
        return joint.sae.decode(values, indices) + linear + joint.nfm.interaction(m) + x_more

    seen = []
    for more in ({}, {"secondary": row * torch.ones(len(whole.of), 1)}, {"primary": rest}):
        logits, by_hand = whole.logits(**more), (row * ("secondary" in more), rest * ("primary" in more))
        for number, text in enumerate(texts):

            def change(values, indices, more=by_hand):
                seen.append((values, indices))
                return x_hat(values, indices, *more)

            alone, rows = spliced_alone(cfg, data, joint, text, change)
            torch.testing.assert_close(logits[number], alone.double(), rtol=1e-5, atol=1e-5)
            at += [number] * rows if not more else []
        assert not more or ((logits - whole.logits()).abs().amax(1) > 1e-3).all()
    assert whole.of[whole.of >= 0].tolist() == at
    assert len(whole.of) > len(at) and whole.of.min() == -1
    values, indices = (torch.cat(parts) for parts in zip(*seen[: len(texts)], strict=True))
    expected = dense(values[:, :4], indices[:, :4], 40)
    torch.testing.assert_close(whole.codes["primary"][whole.of >= 0], expected)
    second = d.secondary_code(secondary, joint.nfm.post_mlp1(values, indices))
    torch.testing.assert_close(whole.codes["secondary"][whole.of >= 0], second)
    assert all((code[whole.of < 0] == 0).all() for code in whole.codes.values())


def test_a_clamp_to_once_itself_changes_nothing_and_a_text_does_not_mind_its_batch(spliced):
    cfg, data, joint, secondary, texts = spliced
    whole = d.spliced_texts(cfg, data, joint, secondary, texts)
    for path, width in (("secondary", 5), ("primary", 16)):
        same = whole.logits(**{path: (1 - 1) * whole.codes[path][:, :1] * normal(width).float()})
        assert torch.equal(whole.logits(), same)
    for chosen in ([1], [3, 1], [4, 0, 2]):
        few = d.spliced_texts(cfg, data, joint, secondary, [texts[i] for i in chosen])
        torch.testing.assert_close(few.logits(), whole.logits()[chosen], rtol=1e-5, atol=1e-5)


# ---- the later stages, end to end


@pytest.fixture(scope="session")
def measured(trained, tokenizer, tmp_path_factory):
    """A run of sae and joint with all stages but kl, and its stimuli."""
    run = tmp_path_factory.mktemp("measured") / "run"
    others = (f"{name}.safetensors" for name in ARMS if name not in ("sae", "joint"))
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("results", *others))
    tokens = {}
    for word in WORDS:  # one word for each first token
        tokens.setdefault(tokenizer("a " + word, add_special_tokens=False)["input_ids"][1], word)
    stimuli = stimuli_of([*tokens.values()][:20])
    (run / "own.json").write_text(json.dumps(stimuli))
    assert stage("recon", run) == 0
    before = (run / "results" / "recon.json").stat().st_mtime_ns
    for name, *flags in (
        ("secondary",),
        ("gram",),
        ("anova", "--stimuli", f"docs,formality-emotion,{run / 'own.json'}"),
        ("recon",),
        ("report",),
    ):
        assert stage(name, run, *flags) == 0
    assert (run / "results" / "recon.json").stat().st_mtime_ns == before  # a secondary SAE is no arm
    return run


def results_of(run, name):
    """A stage's results."""
    return json.loads((run / "results" / f"{name}.json").read_text())


def opened(run, name, *flags):
    """Configuration, data, arms and held-out raw activations, ids and documents of a stage of a run."""
    cfg = d.resolve(d.parser().parse_args([name, "--run", str(run), "--device", DEVICE, *flags]))
    data, models = d.open_arms(cfg, whole=True)
    ids = torch.cat([ids for ids, _ in d.held_out_windows(cfg, data, "test", cfg.eval_tokens)])
    raw = torch.cat([d.capture(data.lm, cfg.layer, window[None])[0, 1:] for window in ids])
    cfg.lock.close()
    return cfg, data, models, ids, raw


def test_secondary_stage_against_a_recomputation(measured):
    cfg, data, models, ids, raw = opened(measured, "secondary")
    found, joint = results_of(measured, "secondary")["arms"]["joint"], models["joint"]
    secondary = d.load_arm(measured / "joint.secondary.safetensors").to(DEVICE)
    assert (*secondary.sae.W_dec.shape, secondary.sae.k) == (125, 5, 2) and found["features"] == 125
    assert set(models) == {"sae", "joint"} and set(results_of(measured, "recon")["arms"]) == {"sae", "joint"}
    x = (raw - data.standardiser.mean) / data.standardiser.std
    values, indices = joint.sae.encode(x)
    m = joint.nfm.post_mlp1(values, indices)
    standard = (m - secondary.standardiser.mean) / secondary.standardiser.std
    m_hat = secondary(standard)["sae"]
    spread = (standard - standard.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(((m_hat - standard).square().sum() / spread).item(), rel=1e-4)
    parts = joint(x)
    rest = parts["sae"] + parts["linear"]
    new = m_hat * secondary.standardiser.std + secondary.standardiser.mean
    for key, added in (
        ("mse", parts["interaction"]),
        ("mse_replaced", new.relu() @ joint.nfm.W_2.T + joint.nfm.b_2),
        ("mse_without", 0),
    ):
        assert found[key] == pytest.approx((rest + added - x).square().mean().item(), rel=1e-5)
    assert found["mse"] == pytest.approx(results_of(measured, "recon")["arms"]["joint"]["mse"], rel=1e-6)
    assert len({found["mse"], found["mse_replaced"], found["mse_without"]}) == 3
    assert found["moved_by_one"] == 0 < found["moved_by_two"] <= 1


def test_an_interrupted_secondary_ends_with_the_same_weights(measured, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(measured, run, ignore=shutil.ignore_patterns("*.secondary.*", "results"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2 * 20)
        assert stage("secondary", run, "--save-minutes", 0) == 130
    assert (run / "joint.secondary.ckpt").exists() and stage("recon", run) == 0
    assert stage("secondary", run) == 0 and not list(run.glob("*.ckpt"))
    assert same_weights(run / "joint.secondary.safetensors", measured / "joint.secondary.safetensors")


def test_gram_stage_against_a_recomputation(measured):
    found = results_of(measured, "gram")["arms"]
    sae, joint = (d.load_arm(measured / f"{name}.safetensors") for name in ("sae", "joint"))
    decoders = {"sae": sae.sae.W_dec, "joint": joint.sae.W_dec}
    decoders["joint folded"] = joint.sae.W_dec + joint.nfm.W_lin
    decoders["joint W_lin"] = joint.nfm.W_lin
    assert set(found) == set(decoders)
    for name, W in decoders.items():
        W, own = W.double().numpy(), found[name]
        assert own["below_0.2"] == ((W**2).sum(1) < 0.2).mean()
        spectrum = np.linalg.svd(W - W.mean(0), compute_uv=False) ** 2
        np.testing.assert_allclose(own["explained"], spectrum.cumsum() / spectrum.sum(), rtol=1e-5)
        assert own["components_90"] == components_by_loop(spectrum) and sum(own["counts"]) == 48
    torch.manual_seed(0)
    start, dec = d.make_arm("joint", D=16, F=48, k=6, n=4, K=5, top=3), joint.sae.W_dec.norm(dim=1).numpy()
    begun = start.sae.W_dec + start.nfm.W_lin
    assert found["joint folded"]["initial_squared_norm"] == pytest.approx(begun.square().sum(1).mean().item())
    assert found["sae"]["initial_squared_norm"] == pytest.approx(16 / (3 * 48), rel=0.1)
    untouched = d.gram_stats(sae.sae.W_dec + start.nfm.W_lin.detach())["first_50"]
    folded = found["joint folded"]
    assert folded["first_50_less_sae"] == pytest.approx(folded["first_50"] - untouched, abs=1e-12)
    if found["joint"]["modes"] < 2:  # without modes it cannot be more bimodal
        assert found["joint"]["bimodality_less_sae"][2] <= 0
    for label, nfm in (("r", joint.nfm), ("r_untouched", start.nfm)):
        V, lin = (W.detach().norm(dim=1).numpy() for W in (nfm.V, nfm.W_lin))
        expected = spearman(dec**2, (lin + V) / (dec + lin + V))
        assert found["joint"]["share"][label]["nfm"] == pytest.approx(expected)
    difference, low, high = found["joint"]["bimodality_less_sae"]
    expected = found["joint"]["bimodality"] - found["sae"]["bimodality"]
    assert difference == pytest.approx(expected if found["joint"]["modes"] > 1 else min(0, expected))
    assert low <= high


def test_every_figure_of_a_claim_is_measured(measured):
    found = {name: results_of(measured, name)["arms"] for name in ("gram", "secondary", "anova")}
    for _, of, metrics, controls, _, n in d.CLAIMS:
        assert 1 <= n <= len(controls)
        for where in (*metrics, *controls):
            assert of not in found or d.lookup(found[of], where) is not None, where


def test_anova_stage_has_sound_p_values_and_clamps_as_by_hand(measured, tokenizer):
    results = results_of(measured, "anova")
    assert set(results["arms"]) == {"joint"}  # of the user's stimuli
    assert (
        sum("refused" in line for line in results["about"]) == 2
    )  # the built-in words are unknown to this tokenizer
    cfg, data, models, _, _ = opened(measured, "secondary")
    joint, stimuli = models["joint"], json.loads((measured / "own.json").read_text())
    secondary = d.load_arm(measured / "joint.secondary.safetensors").to(DEVICE)
    words = [
        tokenizer("a " + word)["input_ids"][1] for listed in stimuli["words"].values() for word in listed
    ]
    found = results["arms"]["joint"]
    assert found["cells"] == list(stimuli["words"])
    chosen = {why: entry for why, entry in found.items() if why != "cells"}
    assert set(chosen) == {"variance", "interaction", "first factor", "second factor"}
    for why, entry in chosen.items():
        assert entry["nulls"]["random"] == 100 and all(1 <= n <= 100 for n in entry["nulls"].values())
        assert set(entry["dose"]) == {"-4", "0", "1", "4"} and entry["dose"]["1"] == [0, 0, 0, 0]
        for measure in ("words", "kl", "contrast"):
            for null, many in entry["nulls"].items():
                p = entry[measure][f"p_{null}"] * (many + 1)
                assert 1 <= round(p) <= many + 1 and p == pytest.approx(round(p))
        count = entry["words"]["p_permuted"] * 1000
        assert count == pytest.approx(round(count)) and round(count) >= 1
        for measure in ("kl", "contrast"):
            ps = [entry[measure][f"p_{which}"] for which in ("crossed", "random", "secondary")]
            assert all(0 <= p <= 1 for p in ps) and entry[measure]["p"] == max(ps)
        assert entry["stimuli"] == "old/new/wet/dry"
        feature, primary = entry["feature"], why in ("first factor", "second factor")

        def x_hat(values, indices, factor=1, feature=feature, primary=primary):
            m = joint.nfm.post_mlp1(values, indices)
            n, more = joint.nfm.n, 0
            if primary:
                f = (values[:, :n] * (indices[:, :n] == feature)).sum(1, keepdim=True)
                more = (factor - 1) * f * joint.nfm.W_lin[feature]
            else:
                f = d.secondary_code(secondary, m)[:, feature, None]
                m = m + (factor - 1) * f * secondary.sae.W_dec[feature] * secondary.standardiser.std
            linear = d.sparse_decode(values[:, :n], indices[:, :n], joint.nfm.W_lin) + joint.nfm.b_lin
            return joint.sae.decode(values, indices) + linear + joint.nfm.interaction(m) + more

        moved = 0
        for prompt in stimuli["prompts"]:
            clean, _ = spliced_alone(cfg, data, joint, prompt, x_hat)
            clamped, _ = spliced_alone(cfg, data, joint, prompt, lambda v, i, x_hat=x_hat: x_hat(v, i, -4))
            moved = moved + (clamped - clean)[words].cpu().numpy() / len(stimuli["prompts"])
        assert entry["dose"]["-4"] == pytest.approx(moved.reshape(4, 5).mean(1).tolist(), rel=0.01, abs=1e-5)
    cell = np.arange(20) // 5  # the last feature, a primary one: its moves are larger than rounding
    expected = d.two_way_anova(moved, cell // 2, cell % 2)["F_ab"]
    assert entry["words"]["F_ab"] == pytest.approx(expected, rel=0.01) and abs(moved).max() > 1e-3


def test_edited_stimuli_are_read_again_and_an_arm_is_refused_alone(measured, tmp_path, monkeypatch, capsys):
    run, own = tmp_path / "run", tmp_path / "own.json"
    shutil.copytree(measured, run, ignore=shutil.ignore_patterns("results"))
    good = json.loads((measured / "own.json").read_text())
    own.write_text(json.dumps(good | {"words": {cell: ["same"] * 4 for cell in good["words"]}}))
    assert stage("anova", run, "--stimuli", own) == 0
    assert "refused, joint on" in capsys.readouterr().out and results_of(run, "anova")["arms"] == {}
    assert stage("report", run) == 0
    own.write_text(json.dumps(good))
    assert stage("anova", run, "--stimuli", own) == 0
    assert set(results_of(run, "anova")["arms"]) == {"joint"}
    shutil.copy(run / "joint.safetensors", run / "sequential.safetensors")
    monkeypatch.setattr(d, "load_arm_of", lambda cfg, name, D: d.load_arm(cfg.run / f"{name}.safetensors"))
    shutil.copy(run / "joint.secondary.safetensors", run / "sequential.secondary.safetensors")
    clamps, calls = d.measure_clamps, []

    def second_fails(*args):
        calls.append(args)
        if len(calls) > 1:
            raise d.UserError("no feature")
        return clamps(*args)

    monkeypatch.setattr(d, "measure_clamps", second_fails)
    assert stage("anova", run) == 0 and set(results_of(run, "anova")["arms"]) == {"joint"}
    assert any("refused, sequential on" in line for line in results_of(run, "anova")["about"])


# ---- pairs


def r2_by_hand(y, a, b, folds):
    """partial_r2 by normal equations, output by output."""
    without = full = 0
    for fold in set(folds.tolist()):
        fit, held = folds != fold, folds == fold
        for column in y.T:
            for size in (5, 6):
                X = np.array([[1, p, q, p * p, q * q, p * q][:size] for p, q in zip(a, b, strict=True)])
                weights = np.linalg.solve(X[fit].T @ X[fit], X[fit].T @ column[fit])
                error = sum((column[held] - X[held] @ weights) ** 2)
                without, full = without + error * (size == 5), full + error * (size == 6)
    return 1 - full / without


@given(
    seed=st.integers(0, 10**6), rows=st.integers(25, 60), columns=st.integers(1, 4), strength=st.floats(0, 2)
)
def test_partial_r2_against_normal_equations(seed, rows, columns, strength):
    rng = np.random.default_rng(seed)
    a, b, folds = rng.uniform(0.5, 1.5, rows), rng.exponential(1, rows), rng.integers(3, size=rows)
    y = rng.normal(size=(rows, columns)) + strength * (a * b)[:, None]
    if min((folds != fold).sum() for fold in set(folds.tolist())) >= 12:
        assert d.partial_r2(y, a, b, folds) == pytest.approx(r2_by_hand(y, a, b, folds), rel=1e-4, abs=1e-6)


def test_partial_r2_sees_products_and_nothing_else():
    rng = np.random.default_rng(0)
    a, b, folds = *rng.uniform(0.5, 1.5, (2, 4000)), np.arange(4000) % 5
    noise = rng.normal(size=(4000, 3))
    curved = np.stack([a * a, 3 * b, a - b * b], 1)
    assert abs(d.partial_r2(curved + noise, a, b, folds)) < 0.002  # curvature is no interaction
    signal = (a - a.mean()) * (b - b.mean())
    expected = signal.var() / (signal.var() + 0.01)
    assert d.partial_r2(curved[:, :1] + signal[:, None] + 0.1 * noise[:, :1], a, b, folds) == pytest.approx(
        expected, abs=0.05
    )
    assert d.partial_r2(0 * noise, a, b, folds) == 0  # nothing to predict


def test_pair_r2_against_a_loop_over_tokens():
    model, sae = (arm(name, F=12, k=6, n=5).requires_grad_(False) for name in ("joint", "sae"))
    x, documents = normal(3000, 6, seed=3).float(), torch.arange(3000) // 7
    pairs = torch.tensor([[0, 3], [5, 2], [11, 4]])
    directions = torch.nn.functional.normalize(normal(3, 6, seed=4).float(), dim=1)
    batches = [(x[:150], documents[:150]), (x[150:], documents[150:])]
    found = d.pair_r2(model, sae, batches, pairs, directions)
    values, indices = model.sae.encode(x)
    code, left = dense(values[:, :5], indices[:, :5], 12).double(), (x - sae(x)["sae"]).double()
    for (a, b), direction, *r2 in zip(pairs, directions.double(), *found, strict=True):
        both = (code[:, a] > 0) & (code[:, b] > 0)
        rest = [part[both].numpy() for part in (code[:, a], code[:, b], documents % 5)]
        assert both.sum() > 30
        assert r2 == pytest.approx(
            [r2_by_hand(y[both].numpy(), *rest) for y in (left, (left @ direction)[:, None])], abs=1e-4
        )


def test_matched_controls_takes_the_nearest_that_is_free():
    covariates = np.random.default_rng(1).normal(size=(40, 3)) * [1, 10, 100]
    found, free = d.matched_controls(covariates, 4, each=5), list(range(4, 40))
    assert found.shape == (4, 5)
    scaled = covariates / covariates.std(0)
    for turn, row in ((turn, row) for turn in range(5) for row in range(4)):
        nearest = min(free, key=lambda other: np.linalg.norm(scaled[other] - scaled[row]))
        assert found[row, turn] == nearest
        free.remove(nearest)
    assert d.matched_controls(covariates, 20).shape == (20, 1)


def test_rank_test_against_all_choices_and_is_uniform_without_a_difference():
    import itertools

    rng = np.random.default_rng(2)
    own, controls = rng.normal(size=3) + 1, rng.normal(size=(3, 4))
    sets = np.column_stack([own, controls])
    ranks = (sets[:, :, None] > sets[:, None]).sum(2)
    sums = [sum(choice) for choice in itertools.product(*ranks)]
    assert d.rank_test(own, controls) == pytest.approx(
        np.mean([total >= ranks[:, 0].sum() for total in sums]), abs=0.015
    )
    from scipy.stats import kstest

    p = [d.rank_test(rng.normal(size=20), rng.normal(size=(20, 5)), permutations=199) for _ in range(300)]
    assert kstest(p, "uniform").pvalue > 0.001
    assert d.rank_test(rng.normal(size=50) + 1, rng.normal(size=(50, 20))) < 0.001


def test_agreement_of_a_model_with_itself_reordered_and_with_another(monkeypatch):
    model, other = (arm("joint", F=40, D=9, K=8).requires_grad_(False) for _ in range(2))
    for p in model.parameters():
        torch.nn.init.normal_(p)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    other.load_state_dict({name: p[order] if len(p) == 40 else p for name, p in model.state_dict().items()})
    mean = torch.rand(40, generator=torch.Generator().manual_seed(2)) ** 4
    pairs = torch.combinations(torch.arange(40))
    monkeypatch.setattr(d, "ranked_pairs", lambda *_: (pairs, None, None, mean))
    found = d.agreement(None, None, model, other)
    assert found == dict(shared=780, r=pytest.approx(1, abs=1e-3))
    stranger = arm("joint", F=40, D=9, K=8).requires_grad_(False)
    torch.manual_seed(8)
    for p in stranger.nfm.parameters():
        torch.nn.init.normal_(p)
    stranger.sae.W_dec = model.sae.W_dec
    assert abs(d.agreement(None, None, model, stranger)["r"]) < 0.3  # though both grow with the mean values
    other.sae.W_dec[order.argsort()[7]] *= -1  # feature 7 has no counterpart now
    assert d.agreement(None, None, model, other)["shared"] == 780 - 39
    other.sae.W_dec[:] = normal(40, 9, seed=9)
    other.sae.W_dec[:, 1:] = 0
    assert d.agreement(None, None, model, other)["r"] is None


@pytest.fixture(scope="module")
def paired(model, text, tmp_path_factory):
    """A run with enough held-out tokens for pairs to meet."""
    run, more = tmp_path_factory.mktemp("paired") / "run", ["--eval-tokens", 2000]
    arms = ["sae", "joint", "joint-interaction"]
    assert stage("train", run, *arms, "--model", model, "--text", text, "--layer", 1, *SMALL, *more) == 0
    return run


def test_pairs_stage_against_a_recomputation(paired, capsys):
    run, peer = paired, paired.parent / "peer"
    stored = json.loads((run / "config.json").read_text())
    flags = [
        "--model",
        stored["model"],
        "--text",
        stored["text"],
        "--layer",
        1,
        *SMALL,
        "--eval-tokens",
        2000,
    ]
    assert stage("train", peer, "sae", "joint", "joint-interaction", *flags, "--seed", 1) == 0
    assert stage("pairs", run, "--peer", peer) == 0
    out = capsys.readouterr().out
    assert "would pass" in out and f"joint of {peer}: " in out
    cfg, data, models, *_ = opened(run, "pairs")
    found = results_of(run, "pairs")["arms"]
    assert list(found) == ["joint", "joint-interaction"]
    for _, of, metrics, controls, *_ in d.CLAIMS:
        assert of != "pairs" or all(d.lookup(found, where) is not None for where in (*metrics, *controls))
    batches = list(d.held_out_batches(cfg, data, "test", cfg.eval_tokens))
    for name, entry in found.items():
        pairs, by_fold, mean = d.count_pairs(models[name], batches)
        counts = by_fold.sum(1)
        often = torch.tensor([sum(row) >= 30 and min(row) > 0 and sum(row) - max(row) >= 12
                              for row in by_fold.tolist()], device=pairs.device)  # fmt: skip
        pairs, counts = pairs[often], counts[often]
        q = d.pair_interaction(models[name].nfm, pairs, mean)
        order = q.norm(dim=1).argsort(descending=True)
        pairs, counts, q = pairs[order], counts[order], q[order]
        assert entry["pairs"] == len(pairs) > 9
        top = []
        for row, (a, b) in enumerate(pairs[: len(pairs) // 2].tolist()):
            if not any({a, b} & {*pairs[other].tolist()} for other in top):
                top.append(row)
        rest = [row for row in range(max(top), len(pairs)) if row not in top]
        assert entry["tested"] == len(top) and len({*pairs[top].flatten().tolist()}) == 2 * len(top)
        rows = torch.tensor(top + rest)
        covariates = torch.stack([counts.log(), *mean[pairs].sort(1).values.log().T], 1)[rows]
        controls = rows[d.matched_controls(covariates.cpu().numpy(), len(top))]
        r2 = d.pair_r2(models[name], models["sae"], batches, pairs, torch.nn.functional.normalize(q, dim=1))
        for part, each in zip(("whole", "along"), r2, strict=True):
            own, others = each[top], each[controls]
            assert entry[part]["r2"] == pytest.approx(np.median(own), abs=1e-5)
            assert entry[part]["r2_controls"] == pytest.approx(np.median(others), abs=1e-5)
            assert entry[part]["p"] == pytest.approx(d.rank_test(own, others), abs=0.02)
            passed = [pair for pair, r2, rest in zip(pairs[top].tolist(), own, others, strict=True)
                      if r2 > 0 and r2 > max(rest)]  # fmt: skip
            assert entry[part]["passed"] == len(passed) and (part == "along" or entry["passed"] == passed)
        agreed = entry["agreement"]["seed 1"]
        other = d.load_arm(peer / f"{name}.safetensors").to(DEVICE)
        assert agreed == d.agreement(cfg, data, models[name], other)
    made = results_of(run, "pairs")
    os.utime(peer / "joint.safetensors")  # a peer that was trained anew is read anew
    assert stage("pairs", run, "--peer", peer) == 0
    assert results_of(run, "pairs")["made_from"] != made["made_from"]


def test_a_peer_must_differ_in_its_seed_alone(paired, model, text, tmp_path, capsys):
    flags = ["--model", model, "--text", text, "--layer", 1, *SMALL]
    assert stage("train", tmp_path / "other", "sae", "joint", *flags, "--seed", 2) == 0  # other --eval-tokens
    for peer, message in (
        (paired, "in its seed"),
        (tmp_path / "other", "nothing else"),
        (tmp_path / "none", "not written by this program"),
    ):
        assert stage("pairs", paired, "--peer", peer) == 2
        assert message in capsys.readouterr().err


def test_inspect_shows_the_pairs_that_pass(paired):
    assert stage("pairs", paired) == 0 and stage("inspect", paired, "--pairs", 7) == 0
    labels = list(results_of(paired, "inspect")["arms"])
    a, b = (int(part) for part in labels[-1].replace(",", "").split() if part.isdigit())
    path, results = paired / "results" / "pairs.json", results_of(paired, "pairs")
    for made, shown in ((results["made_from"], 1), (results["made_from"] | {"joint.safetensors": 1}, 7)):
        results["arms"]["joint"]["passed"], results["made_from"] = [[a, b]], made
        path.write_text(json.dumps(results))
        assert stage("inspect", paired, "--pairs", 7) == 0
        labels = list(results_of(paired, "inspect")["arms"])
        assert len(labels) == shown and ("passes" in labels[0]) == (
            shown == 1
        )  # a test of another arm is none
        assert shown > 1 or f"features {a} and {b}," in labels[0]
    path.unlink()
    counts = []
    for pairs in (2, 3):
        assert stage("inspect", paired, "--pairs", pairs) == 0
        counts.append(len(results_of(paired, "inspect")["arms"]))
    assert counts == [2, 3]


# ---- inspect


@given(seed=seeds, most=st.integers(2, 6))
def test_count_pairs_against_a_double_loop(seed, most):
    model, x = arm("joint", F=12, k=6, n=4).requires_grad_(False), normal(30, 6, seed=seed).float()
    numbers = torch.arange(30) // 2 * 7
    pairs, counts, mean = d.count_pairs(model, [(x[:13], numbers[:13]), (x[13:], numbers[13:])], most=most)
    met, seen = {}, {feature: [] for feature in range(12)}
    code = (code.tolist() for code in model.sae.encode(x))
    for values, indices, document in zip(*code, numbers.tolist(), strict=True):
        active = [(i, v) for i, v in zip(indices, values, strict=True) if v > 0][:4]
        for number, (one, value) in enumerate(active):
            seen[one].append(value)
            for other, _ in active[:number] if number < most else ():
                pair = (min(one, other), max(one, other))
                met.setdefault(pair, [0] * d.FOLDS)[document % d.FOLDS] += 1
    assert len(pairs) == len(met)
    assert dict(zip(map(tuple, pairs.tolist()), counts.tolist(), strict=True)) == met
    np.testing.assert_allclose(mean, [sum(v) / max(1, len(v)) for v in seen.values()], rtol=1e-5)


def test_pair_interaction_is_what_the_product_adds():
    nfm = arm("joint").nfm.double()
    for p in nfm.parameters():
        torch.nn.init.normal_(p)
    mean, pairs = normal(24, seed=5).abs(), torch.tensor([[0, 3], [7, 2], [20, 23]])
    for (a, b), found in zip(pairs.tolist(), d.pair_interaction(nfm, pairs, mean), strict=True):
        z = mean[a] * mean[b] * nfm.V[a] * nfm.V[b]
        expected = nfm.W_2 @ ((nfm.W_1 @ z + nfm.b_1).relu() - nfm.b_1.relu())
        torch.testing.assert_close(found, expected)


def test_inspect_finds_the_true_maxima(measured, capsys):
    cfg, data, models, ids, raw = opened(measured, "inspect")
    joint, secondary = models["joint"], d.load_arm(measured / "joint.secondary.safetensors").to(DEVICE)
    values, indices = joint.sae.encode((raw - data.standardiser.mean) / data.standardiser.std)
    second = d.secondary_code(secondary, joint.nfm.post_mlp1(values, indices))
    often = int((second > 0).sum(0).argmax())
    codes = {"3": dense(values, indices, 48)[:, 3], f"s{often}": second[:, often]}
    assert stage("inspect", measured, *codes) == 0
    found, out = results_of(measured, "inspect")["arms"], capsys.readouterr().out
    assert list(found) == ["feature 3", f"feature s{often}"] and all(label in out for label in found)
    for entry, code in zip(found.values(), codes.values(), strict=True):
        assert code.max() > 0 and entry["fires"] == pytest.approx((code > 0).double().mean().item())
        shown = [float(line.split()[0]) for line in entry["contexts"]]
        assert shown == pytest.approx([v for v in code.topk(4).values.tolist() if v > 0], abs=0.00501)
        for line, value in zip(entry["contexts"], shown, strict=True):  # the token and what stands before it
            head, _, rest = line.strip().partition("  ")[2].partition("«")
            places = [divmod(int(row), 8) for row in ((code - value).abs() < 0.00501).nonzero()]
            whole = [[ids[row, : at + 1], ids[row, at + 1 : at + 2]] for row, at in places]
            texts = [
                tuple(data.tokenizer.decode(part, skip_special_tokens=True) for part in parts)
                for parts in whole
            ]
            assert (head, rest.partition("»")[0]) in texts
    effect = (joint.sae.W_dec + joint.nfm.W_lin)[3] * data.standardiser.std
    raised = (data.lm.get_output_embeddings().weight @ effect).topk(6).indices.tolist()
    assert found["feature 3"]["words"] == [data.tokenizer.decode([token]) for token in raised]


def test_inspect_of_pairs_that_meet(measured):
    assert stage("inspect", measured, "--pairs", 2) == 0
    found = results_of(measured, "inspect")["arms"]
    assert len(found) == 2 and all("interaction" in label for label in found)
    for entry in found.values():
        assert entry["fires"] >= 30 / 600 and len(entry["contexts"]) == 4


@pytest.mark.parametrize("flags", ["48", "-1", "s125", "3 999", "--arm sae", "--arm joint-mlp", "foo", "s"])
def test_inspect_refuses_in_one_line(measured, flags, capsys):
    assert stage("inspect", measured, *flags.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flags", ["--arm joint.secondary", "--arm standardiser", "--pairs -1"])
def test_inspect_refuses_flags_that_make_no_sense(measured, flags, capsys):
    with contextlib.suppress(SystemExit):  # argparse's own complaint will do
        assert stage("inspect", measured, *flags.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_inspect_of_a_secondary_feature_needs_the_stage_before(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    assert stage("inspect", tmp_path / "run", "s1") == 2
    assert "run the stage `secondary` first" in capsys.readouterr().err


# ---- ground truth


CONSTANTS = dict(dims=30, features=20, planted=3, gamma=0.7, noise=0.1, alone=0.2, together=0.1)


def test_a_world_is_its_formula_and_its_windows_do_not_mind_company():
    world, ids = d.World(5, **CONSTANTS), torch.arange(40)[:, None].repeat(1, 100)
    f, x = world.draw(ids)
    assert f.shape == (40, 100, 20) and x.shape == (40, 100, 30)
    assert len(set(world.pairs.flatten().tolist())) == 4 * 3
    for rows in (world.d, world.c):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    expected = torch.zeros(40, 100, 30)
    for i in range(20):
        expected += f[..., i, None] * world.d[i]
    for number, (i, j) in enumerate(world.pairs[:3].tolist()):
        expected += 0.7 * (f[..., i] * f[..., j])[..., None] * world.c[number]
    noise = x - expected
    assert abs(noise.std() - 0.1) < 0.002 and abs(noise.mean()) < 0.002
    active = (f > 0).double().mean((0, 1))
    paired = torch.zeros(20, dtype=torch.bool).index_fill(0, world.pairs.flatten(), True)
    assert (active[~paired] - 0.2).abs().max() < 0.03 and (active[paired] - 0.28).abs().max() < 0.03
    both = (f[..., world.pairs] > 0).all(-1).double().mean((0, 1))
    assert (both - (0.1 + 0.9 * 0.04)).abs().max() < 0.02
    assert f[f > 0].min() >= 0.5 and f.max() <= 1.5
    assert torch.equal(d.extract(world, 0, ids[7:9], skip=0, at_once=1), x[7:9].flatten(0, 1))
    null = d.World(5, **CONSTANTS | dict(gamma=0.0))
    assert torch.equal(null.draw(ids)[0], f) and torch.equal(null.d, world.d)


def perfect_arms(world):
    """An SAE and an NFM that know the world, and an SAE with one feature for the first planted pair."""
    P, G, D = len(world.c), *world.d.shape
    order = torch.randperm(G, generator=torch.Generator().manual_seed(0))
    models = dict(sae=d.make_arm("sae", D=D, F=G, k=12, n=12, K=P))
    models["joint-interaction"] = d.make_arm("joint-interaction", D=D, F=G, k=12, n=12, K=P)
    models["sae@2x"] = d.make_arm("sae@2x", D=D, F=G, k=12, n=12, K=P)
    inverse = torch.linalg.pinv(torch.cat([world.d, world.c])).T
    for model in models.values():
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        model.sae.W_dec[:G], model.sae.W_enc[:G] = world.d[order], inverse[:G][order]
        model.sae.b_enc[:] = -0.25
        model.eval()
    nfm, place = models["joint-interaction"].nfm, order.argsort()
    for number, pair in enumerate(world.pairs[:P]):
        nfm.V[place[pair], number] = 1
    nfm.W_1[:], nfm.W_2[:] = torch.eye(P), 0.7 * world.c.T
    i, j = world.pairs[0]
    models["sae@2x"].sae.W_enc[G], models["sae@2x"].sae.b_enc[G] = inverse[i] + inverse[j], -1.6
    return models


@torch.no_grad()
def test_judge_arms_of_models_that_know_the_world():
    world = d.World(3, **CONSTANTS | dict(noise=0.0))

    def stream(split, **options):
        return ((0, number, np.full(50, number)) for number in range(10**6))

    data = types.SimpleNamespace(
        lm=world, stream=stream, rows=50, standardiser=d.Standardiser(torch.zeros(30), torch.full((30,), 0.5))
    )  # fmt: skip
    models = perfect_arms(world)
    for model in models.values():
        model.sae.W_dec *= 2  # standardised units
        model.sae.W_enc /= 2
    models["joint-interaction"].nfm.W_2 *= 2
    cfg = types.SimpleNamespace(stage="synth", device="cpu", eval_tokens=4000)
    found = d.judge_arms(cfg, data, models)
    assert all(entry["matched"] == 1 for entry in found.values())
    assert [entry["conjunctions"] for entry in found.values()] == [0, 0, 1]
    assert all(entry["decoy_conjunctions"] == 0 for entry in found.values())
    nfm = found["joint-interaction"]
    assert nfm["auroc"] == 1 and nfm["above_decoys"] == 1 and nfm["cosine"] == pytest.approx(1, abs=1e-5)
    assert nfm["strength"]["planted"] == pytest.approx(0.7 * 0.75**2, rel=0.02)  # values 1 - .25
    assert nfm["strength"]["decoy"] == pytest.approx(0, abs=1e-5)
    x = data.standardiser.encode(world.draw(torch.arange(80)[:, None].repeat(1, 50))[1].flatten(0, 1))
    mse = [((sum(models[name](x).values()) - x) ** 2).mean() for name in ("sae", "joint-interaction")]
    assert nfm["gain"]["over sae"] == pytest.approx(1 - (mse[1] / mse[0]).item(), abs=1e-5) and (
        nfm["gain"]["over sae"] > 0
    )
    assert "over sae" not in found["sae"]["gain"] and "over sae" not in found["sae@2x"]["gain"]


def test_spread_of_nested_figures():
    entries = [dict(a=1, b=dict(c=2.0, d=[1]), e=0.5), dict(a=4, b=dict(c=5.0, d=[2, 3]), e=0.5)]
    entries.append(dict(a=2, b=dict(c=-1.0, d=[]), e=0.5))
    assert d.spread(entries) == dict(a=[2, 1, 4], b=dict(c=[2, -1, 5], d=[1, 2, 3]), e=[0.5, 0.5, 0.5])


def test_synth_gives_the_same_numbers_again_and_goes_on_where_it_was(tmp_path, capsys):
    flags = ["--world-steps", 12, "--world-tests", 500, "--world-worlds", 1, "--world-seeds", 2]
    flags += ["--world-dims", 12, "--world-features", 24, "--world-planted", 5, "--world-k", 4]
    assert stage("synth", tmp_path / "one", *flags) == 0 and stage("synth", tmp_path / "two", *flags) == 0
    one, two = (results_of(tmp_path / name, "synth")["arms"] for name in ("one", "two"))
    assert one == two and set(one["joint-interaction"]) > {"planted", "null", "null, both"}
    for _, of, metrics, controls, *_ in d.CLAIMS:
        assert of != "synth" or all(d.lookup(one, where) is not None for where in (*metrics, *controls))
    assert capsys.readouterr().out.count("nothing interacts") == 2
    worlds = sorted((tmp_path / "one" / "worlds").iterdir())
    assert len(worlds) == 2 * 7  # seeds, kinds
    (tmp_path / "one" / "results" / "synth.json").unlink()
    shutil.rmtree(worlds[0])
    made = {path: path.stat().st_mtime_ns for path in worlds[1].glob("*.safetensors")}
    assert stage("synth", tmp_path / "one") == 0 and results_of(tmp_path / "one", "synth")["arms"] == one
    assert made and made == {path: path.stat().st_mtime_ns for path in worlds[1].glob("*.safetensors")}
    assert stage("report", tmp_path / "one") == 0
    assert (tmp_path / "one" / "figures" / "worlds.png").stat().st_size > 10_000


def test_the_pair_test_is_calibrated_where_the_truth_is_known(tmp_path):
    from scipy.stats import mannwhitneyu

    cfg = d.resolve(d.parser().parse_args(["synth", "--run", str(tmp_path), "--device", DEVICE]))
    constants = {name: cfg.fields[f"world_{name}"] for name in d.WORLD}
    for gamma in (0.7, 0.0):
        names = ("sae", "joint-interaction")
        own, data, models = d.train_in_world(cfg, constants | dict(gamma=gamma), 0, 0, names)
        model, world, std = models["joint-interaction"], data.lm, data.standardiser.std
        rows = torch.nn.functional.normalize(model.sae.W_dec * std, dim=1)
        pairs = (rows @ world.d.T).argmax(0)[world.pairs]
        batches = list(d.held_out_batches(own, data, "test", 20_000))
        q = d.pair_interaction(model.nfm, pairs, d.count_pairs(model, batches)[2])
        both = d.pair_r2(model, models["sae"], batches, pairs, torch.nn.functional.normalize(q, dim=1))
        auroc = [mannwhitneyu(r2[:24], r2[24:]).statistic / 24**2 for r2 in both]
        assert (abs(np.median(both[:, 24:], 1)) < 0.01).all(), "decoys"
        test = d.pair_test(own, data, model, models["sae"], most=24)
        assert test["tested"] == 24 and test["controls"] == 20
        if gamma:
            assert min(auroc) > 0.85 and (np.median(both[:, :24], 1) > [0.002, 0.1]).all()
            assert test["whole"]["p"] < 0.001 and test["whole"]["passed"] > 10
            planted = {tuple(sorted(pair)) for pair in pairs[:24].tolist()}
            found = sum(tuple(sorted(pair)) in planted for pair in test["passed"])
            assert found > 0.8 * test["whole"]["passed"]
        else:
            assert (
                all(0.25 < each < 0.75 for each in auroc) and (abs(np.median(both[:, :24], 1)) < 0.01).all()
            )
            assert test["whole"]["p"] > 0.02 and test["whole"]["passed"] < 6


# ---- null twins, sizes, seeds


@pytest.fixture(scope="module")
def twins(trained, tmp_path_factory):
    """A run with null twins and several sizes, and another of the same, but for its seed."""
    runs = [tmp_path_factory.mktemp("twins") / name for name in ("first", "second")]
    shutil.copytree(trained, runs[0], ignore=shutil.ignore_patterns("results"))
    stored = json.loads((trained / "config.json").read_text())
    assert stage("train", runs[1], "sae", "joint", "--seed", 1, "--model", stored["model"], "--text",
                 stored["text"], "--layer", 1, *SMALL) == 0  # fmt: skip
    for run in runs:
        assert stage("train", run, "sae~null", "joint~null") == 0 and stage("recon", run) == 0
    return runs


def test_a_null_twin_keeps_the_code_and_shuffles_what_is_left(trained):
    cfg, data, models, _, raw = opened(trained, "recon")
    twin, x = d.null_twin(cfg, data), data.standardiser.encode(raw[:300])
    x_hat = models["sae"](x)["sae"]
    made = twin.standardiser.encode(data.standardiser.decode(x))
    left, shuffled = x - x_hat, made - x_hat
    torch.testing.assert_close(shuffled.sort(0).values, left.sort(0).values, rtol=0, atol=1e-4)
    distance = torch.cdist(shuffled.double(), left.double())
    assert distance.min(1).values.max() < 1e-4  # rows stay whole
    assert (distance.diagonal() > 1e-3).double().mean() > 0.9


def test_twins_train_as_their_counterparts_and_are_compared_with_twins(twins, trained, capsys):
    run = twins[0]
    results = results_of(run, "recon")["arms"]
    assert {"sae~null", "joint~null"} <= set(results) and set(results) > set(ARMS)
    joint, null = results["joint"], results["joint~null"]
    assert null["gain"]["full"]["over sae"][0] == pytest.approx(1 - null["mse"] / results["sae~null"]["mse"])
    difference = joint["gain"]["full"]["over sae"][0] - null["gain"]["full"]["over sae"][0]
    assert joint["gain_less_twin"][0] == pytest.approx(difference)
    assert joint["gain_less_twin"][1] < difference < joint["gain_less_twin"][2]
    real, twin = (d.load_arm(run / f"joint{end}.safetensors").config for end in ("", "~null"))
    assert {k: v for k, v in real.items() if k in ("steps", "D", "F", "run")} == {
        k: v for k, v in twin.items() if k in ("steps", "D", "F", "run")
    }
    assert stage("kl", run, "--kl-tokens", 400) == 0  # twins are no arms of a language model
    assert set(results_of(run, "kl")["arms"]) == set(ARMS)
    assert stage("train", run, "sequential~null") == 2 and "unknown arm" in capsys.readouterr().err
    assert stage("train", run.parent / "none", "joint~null") == 2
    assert "need a trained `sae`" in capsys.readouterr().err


def test_capacity_by_hand():
    arms = {
        "sae@0.5x": (100, 0.4),
        "sae": (200, 0.2),
        "sae@matched": (400, 0.1),
        "joint": (150, 0.2),
        "joint@2x": (300, 0.2 / 2**0.5),
        "joint@4x": (900, 0.05),
        "sae~null": (1, 1),
        "sae-2dec": (1, 1),
    }
    arms = {name: dict(params=params, fvu=fvu) for name, (params, fvu) in arms.items()}  # fmt: skip
    assert d.family(arms, "sae") == [(100, 0.4), (200, 0.2), (400, 0.1)]
    lines = d.capacity_lines(arms)
    assert [line.split("has ")[-1].split(" times")[0] for line in lines[:2]] == ["1.33", f"{2**1.5 / 3:.2f}"]
    assert len(lines) == 3 and "beyond" in lines[2]
    arms["sae@8x"] = dict(params=800, fvu=0.19)  # larger, yet no better: no size to compare with
    assert d.capacity_lines(arms) == lines
    arms = {name: arm for name, arm in arms.items() if name not in ("sae", "sae@8x")}
    assert d.capacity_lines(arms) == []


def test_report_over_seeds_gives_mean_and_standard_deviation(twins, trained, capsys):
    first, second = twins
    assert stage("report", first, "--run", second) == 0
    text = (first / "report.md").read_text()
    assert "training seeds 0, 1" in text and "joint~null" in text
    gains = [results_of(run, "recon")["arms"]["joint"]["gain"]["full"]["over sae"][0] for run in twins]
    assert f"{100 * np.mean(gains):.1f} % ± {100 * abs(gains[0] - gains[1]) / 2**0.5:.1f} %" in text
    where = "joint/gain/full/over sae"
    found = d.read_results(twins)
    ends = np.array([results_of(run, "recon")["arms"]["joint"]["gain"]["full"]["over sae"] for run in twins])
    expected = [np.mean(gains), ends[:, 1].min(), ends[:, 2].max()]  # beyond a bound: in every run
    assert d.across(found, "recon", where)[0] == pytest.approx(expected)
    assert d.across(found[:1], "recon", where) == (
        results_of(first, "recon")["arms"]["joint"]["gain"]["full"]["over sae"],
        d.show(results_of(first, "recon")["arms"]["joint"]["gain"]["full"]["over sae"], where),
    )
    assert d.across(found, "recon", "sequential/mse") == (None, "-")  # one of them lacks it
    results = results_of(second, "recon")
    results["config"]["eval_tokens"] = 1
    (second / "results" / "recon.json").write_text(json.dumps(results))
    assert stage("report", first, "--run", second) == 2
    assert "differ in more than the seed: recon, eval_tokens" in capsys.readouterr().err
    assert stage("report", first, "--run", first) == 2
    assert "differ in their seeds, which are 0, 0" in capsys.readouterr().err


# ---- report


def test_report_holds_every_claim_and_valid_figures(measured, trained, tmp_path, capsys):
    from matplotlib.image import imread

    text = (measured / "report.md").read_text()
    missing = next(line for line in text.splitlines() if "missing" in line)
    assert "kl" in missing and not any(name in missing for name in ("recon", "gram", "secondary", "anova"))
    assert all(title in text for title, *_ in d.CLAIMS) and len(d.CLAIMS) == 16
    assert stage("report", measured) == 0
    out = capsys.readouterr().out
    assert all(title in out for title, *_ in d.CLAIMS)
    pictures = {path.name for path in (measured / "figures").iterdir()}
    assert (
        pictures == {part.partition(")")[0] for part in text.split("](figures/")[1:]} and len(pictures) >= 6
    )
    for name in pictures:
        path = measured / "figures" / name
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        image = imread(path)
        assert min(image.shape[:2]) > 200 and image.std() > 0.01
    joint = results_of(measured, "recon")["arms"]["joint"]["gain"]["full"]["over sae"]
    assert d.show(joint) in text
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("results"))
    assert stage("report", tmp_path / "run") == 2 and capsys.readouterr().err.count("\n") == 1
    shutil.copytree(measured, tmp_path / "damaged")
    (tmp_path / "damaged" / "train.jsonl").write_bytes(b"\xff\xfe\n")
    assert stage("report", tmp_path / "damaged") == 2
    assert "train.jsonl is damaged" in capsys.readouterr().err


def test_each_row_of_the_reports_table_has_its_four_cells(measured):
    rows = [line for line in (measured / "report.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 16
    for row in rows:
        assert row.replace("\\|", "").count("|") == 5, row


def test_a_verdict_follows_the_whole_interval():
    undecided = "not decided whether"
    up, over, not_yet = [0.2, 0.1, 0.3], [-0.2, -0.3, -0.1], [0.2, -0.1, 0.3]
    cases = [(up, ">", 0, "upheld that"), (not_yet, ">", 0, undecided), (over, ">", 0, "not upheld that")]
    cases += [(up, "<", 0, "not upheld that"), (not_yet, "<", 0, undecided), (over, "<", 0, "upheld that")]
    cases += [(up, ">", 0.2, undecided), ([0.2, math.nan, math.nan], ">", 0, undecided)]
    cases += [
        (0.04, "<", 0.05, "upheld that"),
        (0.06, "<", 0.05, "not upheld that"),
        (0.0, ">", 0, "not upheld that"),
    ]
    for value, relation, bound, word in cases:
        assert d.verdict([value], relation, bound, "what") == f"{word} what", value
        short_of_one = d.verdict([value, None, value], relation, bound, "what")
        assert short_of_one == f"{undecided if word == 'upheld that' else word} what", value
    assert d.verdict([None], ">", 0, "what") == "not measured" == d.verdict([], ">", 0, "what")
    for values, word in (
        ([up, up], "upheld that"),
        ([up, over], "not upheld that"),
        ([over, not_yet], "not upheld that"),
    ):
        assert d.verdict(values, ">", 0, "what") == f"{word} what"  # all the deciding ones have to agree
    assert d.verdict([up, not_yet], ">", 0, "what") == "not decided whether what"


def test_figures_as_text():
    assert d.show(None) == "-" and d.show(0.1234) == "12.3 %" and d.show(12345, "sae/params") == "12,345"
    assert d.show([0.123, 0.11, 0.136], "joint/gain/full/over sae") == "12.3 % [11.0, 13.6]"
    assert d.show([1.5, 1.25, 2], "sae/full/over_random") == "1.500 [1.250, 2.000]"
    assert d.show(1234.5, "joint/components_90") == "1,234.5" and d.show(2, "modes") == "2"
    for where, text in (
        ("words/p_ab", "0.12"), ("joint/full/p/over sae/paired", "0.12"), ("kl/F_ab", "0.123"),
        ("sae/explained/fvu", "12.3 %"), ("fvu", "0.1230"), ("mse_replaced", "0.1230"), ("kl", "0.1230"),
        ("joint/share/r/nfm", "0.123"), ("joint/interaction_share", "12.3 %"), ("joint/first_50", "12.3 %"),
        ("joint/moved_by_one", "12.3 %"), ("moved", "0.123"), ("joint/below_0.2", "12.3 %"),
    ):  # fmt: skip
        assert d.show(0.123, where) == text, where
    assert d.lookup({"a": {"b": {"c": 1}}}, "a/b/c") == 1
    assert d.lookup({"a": {"b": 1}}, "a/x/c") is None and d.lookup({"a": {"b": 1}}, "a/b/c") is None


def test_the_log_follows_magnitudes_and_low_norms(trained):
    log = d.read_log(trained / "train.jsonl")
    assert all(size > 0 for entry in log for size in entry["magnitude"].values())
    assert all((48 * entry["low_norm"]) % 1 == 0 for entry in log if entry["arm"] == "joint")
    for name, parts in dict(sae={"sae"}, joint={"sae", "linear", "interaction"}).items():
        kept = d.load_arm(trained / f"{name}.safetensors")
        last = [entry for entry in log if entry["arm"] == name and entry["lr"] == kept.config["lr"]][-1]
        assert set(last["magnitude"]) == parts and last["step"] == kept.config["steps"]
        assert last["low_norm"] == (kept.sae.W_dec.square().sum(1) < 0.2).double().mean().item()
    model, x = arm("joint").double(), normal(9, 6)
    torch.nn.init.normal_(model.sae.W_dec, std=0.2)
    c = types.SimpleNamespace(
        arm="joint", lr=1.0, step=7, model=model, losses=[torch.tensor(1.0), torch.tensor(2.0)]
    )
    found, parts = d.log_entry(c, 0, x), model(x)
    assert (found["mse"], found["step"], found["text_epoch"]) == (1.5, 7, 1)
    assert found["magnitude"] == {name: pytest.approx(p.abs().mean().item()) for name, p in parts.items()}
    below = sum(sum(w * w for w in row) < 0.2 for row in model.sae.W_dec.tolist())
    assert found["low_norm"] == below / 24 and 0 < below < 24
