#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""dualenc: dual encoding in a language model's activations, reproduced and put to the test.

"Feature Integration Spaces: Joint Training Reveals Dual Encoding in Neural Network Representations" (Claflin,
arXiv 2507.00269, AAAI 2026) holds that activations encode both which features are present (a TopK sparse
autoencoder, SAE, finds them) and how they combine (a neural factorization machine, NFM, finds that). This
module implements the paper and prints each of its numbers beside the control that could refute it:
./reproduce.sh runs it all. No section needs a name that stands below it; the README lists them and, under
"Limits", what is known not to work.

The paper's feature identity is the part "sae" of x_hat here, its linear and nonlinear feature integration are
the parts "linear" and "interaction". Letters: B tokens in a batch, T tokens in a window, D width of the
residual stream, F features, k features kept per token, n of them read by the NFM, K embedding width of the
NFM, x (B, D) standardised activations, values and indices (B, k) the sparse code: kept feature values (>= 0,
descending) and their ids.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import copy
import datetime
import fcntl
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
import timeit
import types
import urllib.parse
import urllib.request
import warnings
import zipfile
import zlib

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm


# ------------------------------------------------------------------------------------------ core maths
# A token's code is k values and k feature ids. On a CPU the dense (B, F) code is never built: all is a sum of
# weighted rows of a matrix, or its transpose, and past the encoder a token costs O(k·width). A factorization
# machine (Rendle, 2010) sums over pairs of active features without visiting them: f = (1, 2, 3) with scalar
# V = (1, 1, 2) has Σ f V = 9 and Σ (f V)² = 1 + 4 + 36 = 41, so z = (81 - 41) / 2 = 20 = 1·2 + 1·6
# + 2·6, the three products of pairs. A lone feature has no partner: z = 0.

thread_pool = functools.cache(concurrent.futures.ThreadPoolExecutor)
os.register_at_fork(after_in_child=thread_pool.cache_clear)      # a fork has none of its parent's threads

def prefers_dense(W):
    """Whether products with W (F, width) go through dense (B, F) codes. On a GPU: to gather 1024 of 50,000
    rows for each of 3,200 tokens an RTX 3090 reads 42 GB, by its data sheet three times as long as the dense
    bf16 product takes. In half precision: a CPU has no other."""
    return not W.is_cpu or torch.is_autocast_enabled("cpu") or W.dtype in (torch.float16, torch.bfloat16)

LARGE = 2 ** 25       # bytes: from here on glibc gets memory from the system, anew each time. At the paper's
# size, touching the new pages of its gradients takes a step longer than all else: so SPARE keeps such memory.
SPARE = collections.defaultdict(functools.partial(collections.deque, maxlen=4))   # a step needs three

def take_memory(x, *size):
    """A tensor like x, of a size and of any contents: one that leave_memory kept, if any fits."""
    with contextlib.suppress(IndexError):
        return SPARE[x.dtype, size].pop()
    return x.new_empty(size)

def leave_memory(tensor):
    """Keep a tensor that nobody will read any more for take_memory, if it is large."""
    if tensor.nbytes >= LARGE and not tensor.is_inference():      # else it could not be trained with
        SPARE[tensor.dtype, tuple(tensor.shape)].append(tensor)

def group_by_feature(indices, F):
    """Entries of a code by feature: indices (B, k) -> (order (B·k,), starts (F + 1,)); those of feature i are
    order[starts[i]:starts[i + 1]], as places in the flattened code."""
    flat = indices.reshape(-1)
    if flat.is_cpu and F <= 2 ** 16:                      # a radix sort: 1.6 to 12 times as fast
        order = torch.from_numpy(flat.numpy().astype("uint16").argsort(kind="stable"))
    else:
        order = flat.argsort(stable=True)
    return order, torch.nn.functional.pad(torch.bincount(flat, minlength=F).cumsum(0), (1, 0))

def csr(starts, columns, entries, size):
    """A sparse matrix in compressed rows: those of row i are entries[starts[i]:starts[i + 1]]."""
    with warnings.catch_warnings(action="ignore"):        # torch calls this format a beta
        return torch.sparse_csr_tensor(starts, columns, entries, size, check_invariants=False)

def sparse_outer(values, indices, x, F, add=None):
    """Gᵀ x, where the sparse code stands for G (B, F): values, indices (B, k), x (B, D) -> (F, D). add: a
    matrix to add it to in place."""
    order, starts = group_by_feature(indices, F)
    tokens, entries = order // indices.shape[1], values.reshape(-1)[order]
    if x.element_size() * F * x.shape[1] < LARGE:         # faster, up to twice, but always in new memory
        product = torch.nn.functional.embedding_bag(
            tokens, x, starts[:-1], mode="sum", per_sample_weights=entries)
        return product if add is None else add.add_(product)
    out = take_memory(x, F, x.shape[1]) if add is None else add
    return torch.addmm(out, csr(starts, tokens, entries, (F, len(x))), x, beta=int(out is add), out=out)

def sparse_inner(indices, x, W):
    """x Wᵀ at the entries of a code alone: indices (B, k), x (B, D), W (F, D) -> (B, k). Feature by feature,
    so that a row of W is read once: five times as fast as token by token."""
    order, starts = group_by_feature(indices, len(W))
    pattern = csr(starts, order // indices.shape[1], x.new_zeros(len(order)), (len(W), len(x)))
    products = torch.sparse.sampled_addmm(pattern, W, x.T, beta=0.0).values()
    return torch.empty_like(products).index_copy_(0, order, products).view(indices.shape)

class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, W):
        ctx.save_for_backward(values, indices, W)
        return torch.nn.functional.embedding_bag(indices, W, mode="sum", per_sample_weights=values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (values, indices, W), grad, needs = ctx.saved_tensors, grad.contiguous(), ctx.needs_input_grad
        return (sparse_inner(indices, grad, W) if needs[0] else None, None,
                sparse_outer(values, indices, grad, len(W)) if needs[2] else None)

def sparse_decode(values, indices, W):
    """Σ_j values[:, j] W[indices[:, j]]: values, indices (B, k), W (F, width) -> (B, width), the code times W
    at O(k·width) a token. Differentiable (on a CPU once) in values and W."""
    if prefers_dense(W):
        return values.new_zeros(len(values), len(W)).scatter_add(1, indices, values) @ W
    return _SparseDecode.apply(values.contiguous(), indices.contiguous(), W)

def linear(x, W, b, *, out):
    """x Wᵀ + b, written to out: x (B, D), W (F, D), b (F,), out (B, F). In float32 on a CPU by oneDNN, which
    at the paper's size takes 0.43 of the time of MKL, torch's own choice, on an AMD EPYC."""
    if not x.is_cpu or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return torch.addmm(b, x, W.T, out=out)
    size, x, b = max(1, 2 ** 19 // max(1, len(x))), x.to_mkldnn(), b.contiguous()   # else it is read wrongly
    for W_part, b_part, part in zip(W.split(size), b.split(size), out.split(size, 1), strict=True):
        part.copy_(torch.nn.functional.linear(x, W_part, b_part).to_dense())
    return out

def top_k(rows, k):
    """The k largest of each row, descending: rows (B, F) -> values, indices (B, k). By numpy, whose selection
    takes a third of the time of torch's."""
    F, threads = rows.shape[1], torch.get_num_threads()
    def select(some):
        return some.argpartition(F - k, axis=1)[:, F - k:]
    parts = thread_pool(threads).map(select, np.array_split(rows.numpy(), threads))   # in parallel
    indices = torch.from_numpy(np.concatenate(list(parts)))
    values, order = rows.gather(1, indices).sort(descending=True)
    return values, indices.gather(1, order)

class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, k):
        F, found = len(W_enc), []
        memory = take_memory(x, max(F, LARGE // 4))
        for some in x.split(len(memory) // F):
            found.append(top_k(linear(some, W_enc, b_enc, out=memory[:len(some) * F].view(-1, F)), k))
        leave_memory(memory)
        values, indices = map(torch.cat, zip(*found, strict=True))
        values.clamp_(min=0)
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        (x, W_enc, values, indices), needs = ctx.saved_tensors, ctx.needs_input_grad
        grad = grad * (values > 0)                        # ReLU passes nothing at or below 0
        grad_x = sparse_decode(grad, indices, W_enc) if needs[0] else None
        grad_W = sparse_outer(grad, indices, x, len(W_enc)) if needs[1] else None
        grad_b = grad.new_zeros(len(W_enc)).index_add_(0, indices.flatten(), grad.flatten())
        return grad_x, grad_W, grad_b, None

def topk_encode(x, W_enc, b_enc, k):
    """TopK_k(ReLU(x W_encᵀ + b_enc)): x (B, D), W_enc (F, D), b_enc (F,) -> values, indices (B, k).
    Values descend; a row with fewer than k positive pre-activations is padded with features of value 0.
    Differentiable (on a CPU once) in x, W_enc, b_enc, at kept features (Gao et al., 2024). ValueError for a
    bad k."""
    if not 1 <= k <= len(W_enc):
        raise ValueError(f"k must lie between 1 and F={len(W_enc)}, not {k}")
    if prefers_dense(W_enc):
        values, indices = torch.addmm(b_enc, x, W_enc.T).topk(k)
        return values.relu(), indices
    return _TopKEncode.apply(x, W_enc, b_enc, k)

class _Interaction(torch.autograd.Function):
    """fm_interaction with a gradient of its own, in which nothing as large as V lies in new memory."""
    @staticmethod
    def forward(ctx, values, indices, V):
        total, squared = sparse_decode(values, indices, V), torch.square(V, out=take_memory(V, *V.shape))
        ctx.save_for_backward(values, indices, V, total)
        z = 0.5 * (total.square() - sparse_decode(values.square(), indices, squared))
        leave_memory(squared)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (values, indices, V, total), needs, grad = ctx.saved_tensors, ctx.needs_input_grad, grad.contiguous()
        grad_total, grad_values, grad_V = grad * total, None, None
        if needs[0]:
            squared = torch.square(V, out=take_memory(V, *V.shape))
            grad_values = sparse_inner(indices, grad_total, V) - values * sparse_inner(indices, grad, squared)
            leave_memory(squared)
        if needs[2]:
            grad_V = sparse_outer(-values.square(), indices, grad, len(V)).mul_(V)
            grad_V = sparse_outer(values, indices, grad_total, len(V), add=grad_V)
        return grad_values, None, grad_V

def fm_interaction(values, indices, V):
    """z = ½[(Σ_j f_j V_j)² - Σ_j (f_j V_j)²] = Σ_{a<b} f_a f_b V_a∘V_b: (B, n), (B, n), V (F, K) -> (B, K).
    O(n·K) a token. The paper prints the middle term without its outer brackets; its code trains this.
    Differentiable (on a CPU once) in values and V."""
    if not prefers_dense(V):
        return _Interaction.apply(values.contiguous(), indices.contiguous(), V)
    total = sparse_decode(values, indices, V)
    return 0.5 * (total.square() - sparse_decode(values.square(), indices, V.square()))

def fm_interaction_pairwise(values, indices, V):
    """The definition that fm_interaction computes faster, pair by pair, O(n²·K): for readers and tests."""
    weighted = values.unsqueeze(-1) * V[indices]          # (B, n, K)
    z = torch.zeros_like(weighted[:, 0])
    for one, other in itertools.combinations(weighted.unbind(1), 2):
        z = z + one * other
    return z


# ------------------------------------------------------------------------------------------ modules
# An arm is one model of a comparison; its forward returns named parts that add up to x_hat. Why the paper's
# baseline is weak: a linear path on the same code is a second decoder. With n = k,
#     f W_dec + b_dec + f W_lin + b_lin  =  f (W_dec + W_lin) + (b_dec + b_lin),
# exactly one TopK SAE (fold_linear). The model's "own SAE path", f W_dec + b_dec, is that SAE with part of
# its decoder cut off; what the cut costs is reported as the NFM's gain. Hence the arms `sae` and `sae-2dec`.

class UserError(ValueError):
    """A mistake of the user's: main() prints it as one line and exits with status 2."""

class TopKSAE(torch.nn.Module):
    """f = TopK_k(ReLU(x W_encᵀ + b_enc)), x_hat = f W_dec + b_dec; W_dec (F, D) ~ U(±1/√F). W_enc starts as a
    copy of it: a view would train as tied weights. b_dec is ours; the published SAE has no bias there."""
    def __init__(self, D, F, k):
        super().__init__()
        self.F, self.k = F, k
        self.W_dec = torch.nn.Parameter(torch.empty(F, D).uniform_(-F ** -0.5, F ** -0.5))
        self.W_enc = torch.nn.Parameter(self.W_dec.detach().clone())
        self.b_enc, self.b_dec = (torch.nn.Parameter(torch.zeros(size)) for size in (F, D))

    def encode(self, x):
        """Sparse code of x: (B, D) -> values, indices (B, k)."""
        return topk_encode(x, self.W_enc, self.b_enc, self.k)

    def decode(self, values, indices):
        """x_hat of a sparse code: (B, k), (B, k) -> (B, D)."""
        return sparse_decode(values, indices, self.W_dec) + self.b_dec

    def forward(self, x):
        """x_hat of x: (B, D) -> (B, D)."""
        return self.decode(*self.encode(x))

class NFM(torch.nn.Module):
    """The paper's two paths, on f_n, the n largest kept features: x_lin = f_n W_lin + b_lin, and
    x_int = W_2 ReLU(m) + b_2, where m = W_1 dropout(z) + b_1; W_lin (F, D), V (F, K), W_1 (K, K), W_2 (D, K).
    pooling: "product" for z = fm_interaction(f_n, V), "sum" for z = Σ_j f_j V_j (the control: no products),
    None for no interaction path. dropout is a probability; its mask comes from the generator of forward."""
    def __init__(self, F, D, K, n, *, linear=True, pooling="product", dropout=0.0):
        super().__init__()
        def normal(std, *shape):
            return torch.nn.Parameter(torch.randn(shape) * std)
        self.n, self.has_linear, self.pooling, self.dropout = n, linear, pooling, dropout
        if linear:
            self.W_lin, self.b_lin = normal(0.01, F, D), torch.nn.Parameter(torch.zeros(D))
        if pooling:
            self.V = normal(0.05, F, K)
            self.W_1, self.b_1 = normal(0.01, K, K), torch.nn.Parameter(torch.zeros(K))
            self.W_2, self.b_2 = normal(0.01, D, K), torch.nn.Parameter(torch.zeros(D))

    def post_mlp1(self, values, indices, generator=None):
        """m, what the secondary SAE decomposes: values, indices (B, >= n) -> (B, K)."""
        pool = fm_interaction if self.pooling == "product" else sparse_decode
        z = pool(values[:, :self.n], indices[:, :self.n], self.V)
        if self.training and self.dropout:
            keep = torch.rand(z.shape, generator=generator, device=z.device) >= self.dropout
            z = z * keep / (1 - self.dropout)
        return torch.nn.functional.linear(z, self.W_1, self.b_1)

    def interaction(self, m):
        """x_int of m: (B, K) -> (B, D)."""
        return torch.nn.functional.linear(m.relu(), self.W_2, self.b_2)

    def forward(self, values, indices, generator=None):
        """The paths' outputs, "linear" and "interaction", (B, D) each: values, indices (B, >= n)."""
        parts = {}
        if self.has_linear:
            parts["linear"] = sparse_decode(values[:, :self.n], indices[:, :self.n], self.W_lin) + self.b_lin
        if self.pooling:
            parts["interaction"] = self.interaction(self.post_mlp1(values, indices, generator))
        return parts

class DualEncoder(torch.nn.Module):
    """x_hat = x_sae + x_lin + x_int: a TopKSAE and, on its code, an NFM. Every arm is one of these: without
    nfm the plain SAE; with `second`, an SAE of the first one's residual, the control for a sequential NFM."""
    learner = property(lambda self: self.second or self.sae)        # the SAE whose features are counted

    def __init__(self, sae, nfm=None, second=None):
        super().__init__()
        if nfm and nfm.n > sae.k:
            raise ValueError(f"the NFM reads n={nfm.n} features, the SAE keeps only k={sae.k}")
        self.sae, self.nfm, self.second = sae, nfm, second

    def forward(self, x, generator=None, counts=None):
        """x (B, D) -> parts (B, D) that add up to x_hat: "sae", and "linear", "interaction" or "residual".
        counts: optional (F,) tensor; the number of tokens that kept each feature is added to it in place."""
        values, indices = self.sae.encode(x)
        parts = {"sae": self.sae.decode(values, indices)}
        if self.nfm:
            parts |= self.nfm(values, indices, generator)
        if self.second:
            values, indices = self.second.encode(x - parts["sae"])
            parts["residual"] = self.second.decode(values, indices)
        if counts is not None:
            counts.index_add_(0, indices.reshape(-1), (values > 0).reshape(-1).to(counts.dtype))
        return parts

ARMS = {   # arm: options of its NFM (None: it has none); that of sae-2dec reads all k, so that it is an SAE
    "sae": None, "sae-2dec": dict(pooling=None),
    "joint": {}, "joint-linear": dict(pooling=None), "joint-interaction": dict(linear=False),
    "joint-mlp": dict(pooling="sum"), "sequential": {}, "residual-sae": None}
CHILDREN = ("sequential", "residual-sae")                 # trained on the residual of the frozen, cut `sae`
NULL = "~null"          # what ends the name of an arm that is trained on the null twin of the activations

def count_parameters(model):
    """Number of weights in a module."""
    return sum(p.numel() for p in model.parameters())

def make_arm(name, *, D, F, k, n, K, parent=None, top=None, dropout=0.0):
    """The arm called `name`, a DualEncoder with weights from torch's global generator. A size may follow:
    sae@12000 has 12,000 features, joint@0.5x F / 2, sae@matched as many weights as joint; joint~null is a
    joint model. CHILDREN stand on a frozen copy of parent, a trained `sae`, cut to `top` (default n)
    features. UserError for a bad name."""
    base, at, size = name.removesuffix(NULL).partition("@")
    is_size = re.fullmatch(r"[0-9]+|[0-9]*\.?[0-9]+x", size) or name == "sae@matched"
    if base not in ARMS or (at and not is_size) or (base in CHILDREN and name != base):
        raise UserError(f"unknown arm {name!r}: choose from {', '.join(ARMS)}; all but the last two also "
                        "take a size (sae@12000, sae@0.5x, sae@matched) and a null twin (joint~null)")
    if size == "matched":
        with torch.device("meta"):
            F += round(count_parameters(NFM(F, D, K, n)) / (2 * D + 1))     # weights of an SAE's feature
    elif size:
        F = round(float(size[:-1]) * F) if size[-1] == "x" else int(size)
    if F < k:
        raise UserError(f"arm {name!r} has {F} features, fewer than k={k}")
    if base not in CHILDREN:
        sae = TopKSAE(D, F, k)                            # first: one seed, one SAE to start from in any arm
        n = k if base == "sae-2dec" else n
    elif parent is None:
        raise UserError(f"arm {name!r} is built on a trained `sae`: train that first")
    else:
        sae = copy.deepcopy(parent.sae).requires_grad_(False)
        sae.k = n = top or n                              # both sides of the comparison read the top ones
    nfm = None if ARMS[base] is None else NFM(F, D, K, n, dropout=dropout, **ARMS[base])
    return DualEncoder(sae, nfm, TopKSAE(D, F, n) if base == "residual-sae" else None)

@torch.no_grad()
def fold_linear(model):
    """The one TopKSAE that a DualEncoder with a linear path alone equals: W_dec + W_lin, b_dec + b_lin.
    ValueError where no such SAE exists: an interaction path, n < k, a second SAE."""
    nfm, folded = model.nfm, copy.deepcopy(model.sae)
    if model.second or (nfm and (nfm.pooling or nfm.n < folded.k)):
        reads = f"; this NFM reads n={nfm.n} of k={folded.k}" if nfm else ""
        raise ValueError(f"only an SAE, alone or with a linear path, folds into one SAE, at n = k{reads}")
    if nfm:
        folded.W_dec += nfm.W_lin
        folded.b_dec += nfm.b_lin
    return folded


# ------------------------------------------------------------------------------------------ files
# What is on disk is whole: a file is written beside its place and moved there. An arm's file is complete too:
# weights, the standardiser of its run, the configuration that made it.

@contextlib.contextmanager
def blame(what):
    """Turn whatever a library raises inside into a UserError of one line: what, and the library's reason."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:                            # foreign files and networks fail in many ways
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"{what}: {reason.splitlines()[0][:300]}") from error

@contextlib.contextmanager
def replacing(path):
    """A temporary path: it replaces `path` at the end, or vanishes on an error. Raises UserError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with blame(f"cannot write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if temporary.is_dir() and path.is_dir():
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()

def write_json(path, data):
    """Write data as JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n")

def read_json(path):
    """Read a JSON object. Raises UserError if the file holds none."""
    with blame(f"cannot read {path}"):
        return dict(json.loads(pathlib.Path(path).read_text()))

def read_log(path):
    """Entries of a file of JSON lines, but for a last line that a crash cut short; none of a missing file."""
    with blame(f"{path} is damaged"):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.strip() and line.endswith("\n")]

class Standardiser(torch.nn.Module):
    """Mean and std per dimension (D,), fixed for a run; read takes raw activations to what they describe."""
    def __init__(self, mean, std, read=lambda raw: raw):
        super().__init__()
        self.mean, self.std, self.read = torch.nn.Buffer(mean), torch.nn.Buffer(std), read

    def encode(self, raw):
        """Raw activations (…, D) -> standardised x (…, D)."""
        return (self.read(raw) - self.mean) / self.std

    def decode(self, x):
        """Standardised x (…, D) -> raw activations (…, D)."""
        return x * self.std + self.mean

def checksum(tensors, text):
    """CRC-32 of named tensors on a CPU and a text: a bit that flipped on disk is not to pass for a result."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return str(crc)

def save_tensors(path, tensors, config):
    """Write named tensors as safetensors, with config (a JSON object) and their checksum as metadata."""
    tensors, text = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, json.dumps(config)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=dict(dualenc=text, crc32=checksum(tensors, text)))

def load_tensors(path):
    """(tensors, config) that save_tensors wrote. Raises UserError for a damaged or foreign file."""
    with blame(f"{path} was not written by this program, or is damaged"), safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        if metadata["crc32"] != checksum(tensors, metadata["dualenc"]):
            raise ValueError("its checksum differs")
        return tensors, json.loads(metadata["dualenc"])

def save_arm(path, model, standardiser, config):
    """Write an arm: weights, standardiser, and config (a JSON object), as one safetensors file."""
    state = torch.nn.ModuleDict(dict(model=model, standardiser=standardiser)).state_dict()
    save_tensors(path, {name: tensor for name, tensor in state.items()
                        if not name.startswith("model.standardiser.")}, config)    # a loaded arm carries one

def load_arm(path):
    """Load an arm that `train` wrote: a module in eval mode, with its `standardiser` and `config` attached.
    model(model.standardiser.encode(raw)) gives the parts of x_hat. Raises UserError for a damaged file."""
    tensors, config = load_tensors(path)
    with blame(f"{path} is not an arm that this program wrote"):
        sizes = {name: config[name] for name in ("D", "F", "k", "n", "K", "top", "dropout")}
        arm = "sae" if config["arm"].endswith(".secondary") else config["arm"]
        with torch.device("meta"):                        # shapes only; the file's tensors take their places
            model = make_arm(arm, parent=DualEncoder(TopKSAE(sizes["D"], sizes["F"], sizes["k"])), **sizes)
            model.standardiser = Standardiser(*torch.empty(2, sizes["D"]))
        model.load_state_dict({name.removeprefix("model."): W for name, W in tensors.items()}, assign=True)
        model.config = config
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------ presets and runs
# A run is a directory. Its config.json holds every field that some stage of it has read; later stages take
# those from there, so that a flag is given once, and refuse a flag that contradicts it.

WORLD = {   # constants of the worlds of `synth` and of the arms trained in them: (default, help)
    "dims": (64, "D"), "features": (96, "true features, and F of the arms"),
    "planted": (24, "pairs of features that interact; as many decoys do not"),
    "gamma": (0.7, "strength of an interaction"), "noise": (0.05, "std of the noise in each dimension"),
    "alone": (0.04, "probability that a feature is active by itself"),
    "together": (0.015, "probability that the two of a pair are, besides"),
    "k": (8, "features kept per token, all of which the NFM reads"), "embedding": (48, "K"),
    "steps": (2000, "training steps"), "batch": (512, "tokens in a batch"),
    "lr": ([5e-3], "learning rates; each arm keeps its best on validation"),
    "tests": (20_000, "tokens to test on"), "seeds": (3, "training seeds"), "worlds": (2, "how many worlds")}

PRESETS = {"paper": dict(
    model="openlm-research/open_llama_3b", text="Salesforce/wikitext:wikitext-103-raw-v1", layer=16,
    features=50_000, k=1024, n=512, embedding=300, top=250, dropout=0.15, window=50, batch=3200, decay=0.8,
    lr=[1e-4, 4e-4], tokens=5_000_000, chunk=10_000, chunk_epochs=1, eval_tokens=200_000, kl_tokens=20_000,
    stimuli="formality-emotion,docs", param_dtype="float32", autocast=False, adam_eps=1e-8, keep_first=False,
    lm_steps=840,
    **{f"world_{name}": default for name, (default, _) in WORLD.items()})}
PRESETS["author"] = PRESETS["paper"] | dict(              # what the published code ran: each chunk ten times
    window=128, batch=64, lr=[1e-4], decay=4000.0, chunk_epochs=10, param_dtype="float16", adam_eps=1e-5)
PRESETS["small"] = PRESETS["paper"] | dict(
    model="EleutherAI/pythia-70m", layer=3, features=8192, k=164, n=82, embedding=48, top=40, dropout=0.0,
    lr=[1e-3, 2e-3], chunk=100_000)
PRESETS["tiny"] = PRESETS["small"] | dict(
    model="tiny", text="docstrings", layer=2, features=1024, k=20, n=10, embedding=32, top=5, batch=512,
    lr=[4e-3, 8e-3, 16e-3, 32e-3], tokens=800_000, eval_tokens=100_000, stimuli="docs,formality-emotion")

READERS = "train recon kl gram secondary anova pairs inspect"   # the stages that read activations
FLAGS = {   # field: (type, stages that read it, help); the flag is --field
    "model": (str, "plan lm " + READERS, "causal LM, hub name or directory; 'tiny' trains one"),
    "text": (str, "lm " + READERS, "docstrings, a .txt, .jsonl or .parquet file, or HUB_ID[:CONFIG]"),
    "layer": (int, "plan " + READERS, "block whose input is read, from 0 (paper: 16 of 26)"),
    "features": (int, "plan train", "F, features of the SAE (paper: 50,000)"),
    "k": (int, "plan train", "features kept per token (paper: 1024)"),
    "n": (int, "plan train", "how many of the k the NFM reads (paper: 512)"),
    "embedding": (int, "plan train", "K, embedding width of the NFM (paper: 300)"),
    "top": (int, "plan train", "features that sequential and residual-sae read (paper: 250)"),
    "dropout": (float, "plan train", "probability, on z (published code: 0.15)"),
    "window": (int, "plan " + READERS, "T, tokens in a window (paper: 50)"),
    "batch": (int, "plan train", "B, tokens in a batch (paper: 3200)"),
    "lr": (float, "plan train", "learning rates; each arm keeps its best on validation (paper: 1e-4)"),
    "decay": (float, "train", "share of the steps (above 1: steps) over which lr falls to a tenth"),
    "tokens": (int, "plan train", "tokens to train on; a shorter text is read again (paper: 5,000,000)"),
    "chunk": (int, "plan train", "tokens whose activations are held at once (paper: 10,000)"),
    "chunk_epochs": (int, "plan train", "times that each chunk is trained on (published code: 10)"),
    "eval_tokens": (int, "plan train recon gram secondary pairs inspect", "to test on; a quarter chooses lr"),
    "kl_tokens": (int, "plan kl", "tokens of the test split to splice"),
    "stimuli": (str, "anova", "formality-emotion, docs, or FILE.json of the same form; several: A,B"),
    "param_dtype": (str, "plan train", "of the weights: float32, or float16 as in the published code"),
    "autocast": (bool, "plan train", "matrix products in bfloat16: faster on a GPU, less exact"),
    "adam_eps": (float, "train", "Adam's epsilon (published code: 1e-5)"),
    "keep_first": (bool, READERS, "keep each window's first position, an attention sink"),
    "lm_steps": (int, "plan lm", "training steps of the tiny language model"),
} | {f"world_{name}": (float if name == "lr" else type(default), "synth", text)
     for name, (default, text) in WORLD.items()}

def number(text):
    """A finite number, for a flag."""
    if not math.isfinite(float(text)):
        raise ValueError(text)
    return float(text)

def validate(cfg):
    """Refuse a configuration that cannot run. Raises UserError naming the flag or the field."""
    fields, known = cfg.fields, PRESETS["tiny"] | dict(preset="tiny", seed=0)
    for name, value in fields.items():                    # nothing in JSON is a tuple
        if type(value) is not type(known.get(name, ())) or (
                isinstance(value, list) and {*map(type, value)} != {float}):
            raise UserError(f"{cfg.run}/config.json is damaged or of another version, in {name}")
    counts = {name for name, (kind, *_) in FLAGS.items() if kind is int} - {"layer"} | {"pairs", "at_once"}
    rules = {f"--{name.replace('_', '-')} must be at least 1, not {value}": value >= 1
             for name, value in vars(cfg).items() if name in counts}
    rules |= {f"--{part} {fields[part]} is more than --{whole} {fields[whole]}": fields[part] <= fields[whole]
              for part, whole in (("k", "features"), ("n", "k"), ("top", "k"))}
    rules |= {f"--{name} takes different rates above 0": min(rates) > 0 and len({*rates}) == len(rates)
              for name, rates in (("lr", cfg.lr), ("world-lr", cfg.world_lr))}
    rules |= {"--world-k is more than --world-features": cfg.world_k <= cfg.world_features,
              "--world-features must be at least 4 times --world-planted": (
                  cfg.world_features >= 4 * cfg.world_planted),
              "--world-alone and --world-together are probabilities": (
                  0 <= cfg.world_alone <= 1 and 0 <= cfg.world_together <= 1),
              "--dropout must lie in [0, 1)": 0 <= cfg.dropout < 1,
              "--decay and --adam-eps must be above 0": cfg.decay > 0 and cfg.adam_eps > 0,
              "--param-dtype is float32 or float16": cfg.param_dtype in ("float32", "float16"),
              "--seed must lie in [0, 2^63)": 0 <= cfg.seed < 2 ** 63,
              "--window must be at least 2: the first position may be left out": cfg.window > 1}
    if broken := [rule for rule, kept in rules.items() if not kept]:
        raise UserError(broken[0])

def resolve(args):
    """A stage's settings: the flags given, else the run's config.json, else its preset; and `run`, `device`.
    UserError for an unknown preset or device, and for a flag that contradicts the run."""
    asked, *more = args.run if isinstance(args.run, list) else [args.run]
    run = pathlib.Path(asked or f"runs/{args.preset or 'tiny'}")
    if run.exists() and not run.is_dir():
        raise UserError(f"--run {run} is a file, not a directory")
    stored = read_json(run / "config.json") if (run / "config.json").exists() else {}
    given = {name: value for name, value in vars(args).items()
             if name in ("preset", "seed", *FLAGS) and value is not None}
    for name, new in given.items():
        if name in ("model", "text") and new not in ("tiny", "docstrings") and pathlib.Path(new).exists():
            given[name] = new = str(pathlib.Path(new).resolve())   # the same, wherever a stage is started
        settled = name not in FLAGS or {"lm", "train"} & set(FLAGS[name][1].split())
        if settled and stored.get(name, new) != new:
            raise UserError(f"{run} was made with {name} = {stored[name]}, not {new}: choose another --run")
    fields = dict(preset="tiny", seed=0) | stored | given
    if fields["preset"] not in list(PRESETS):
        raise UserError(f"unknown preset {fields['preset']!r}: choose from {', '.join(PRESETS)}")
    fields = PRESETS[fields["preset"]] | fields
    rank, ranks, local = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))                # set by torchrun
    if ranks > 1 and args.stage != "train":
        raise UserError(f"torchrun is for the stage `train`, not for `{args.stage}`")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = f"cuda:{local}" if ranks > 1 and device == "cuda" else device
    with blame(f"--device is cpu or cuda[:N], and {device!r} cannot be used"):
        torch.ones(1, dtype=torch.float64, device=device).item()   # errors are summed in float64
    cfg = types.SimpleNamespace(**vars(args) | fields | dict(
        fields=fields, stored=stored, run=run, more=[*map(pathlib.Path, more)], device=device, lock=None,
        rank=rank if ranks > 1 else 0, ranks=ranks))
    validate(cfg)
    return cfg

def fields_of(cfg, stage):
    """The fields of a configuration that a stage reads."""
    return {name: cfg.fields[name] for name in ("preset", "seed", *FLAGS)
            if name not in FLAGS or stage in FLAGS[name][1].split()}

def claim_run(cfg):
    """Keep other processes off the run (UserError if one is there); add the stage's fields to config.json."""
    if cfg.rank:                                          # rank 0 has done it
        return
    cfg.run.mkdir(parents=True, exist_ok=True)
    cfg.lock = open(cfg.run / ".lock", "w")
    try:
        fcntl.flock(cfg.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"another process is at work on {cfg.run}") from error
    for stale in cfg.run.glob(".*.tmp"):                  # left by a process that was killed
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    path = cfg.run / "config.json"
    if cfg.stored != (read_json(path) if path.exists() else {}):
        raise UserError(f"{path} was changed by another process meanwhile: give the command again")
    cfg.stored |= fields_of(cfg, cfg.stage)
    write_json(path, cfg.stored)

def source_hash():
    """sha256 of this file: what another version of it has measured is measured again."""
    return hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()

def stage_results(cfg, compute):
    """The contents of results/STAGE.json, made by compute() unless they are of today's arms (from which
    secondary SAEs are made), settings and source. What traces them stands beside them."""
    path = cfg.run / "results" / f"{cfg.stage}.json"
    options = ("arm", "pairs", "asked", "peer")
    made = fields_of(cfg, cfg.stage) | {name: getattr(cfg, name, None) for name in options}
    files = {file.name: file for file in cfg.run.glob("*.safetensors") if ".secondary" not in file.name}
    files |= {name: pathlib.Path(name) for name in made.get("stimuli", "").split(",")}
    files |= {"pairs.json": path.with_name("pairs.json")} if cfg.stage == "inspect" else {}
    files |= {str(file): file for peer in made["peer"] or () for file in pathlib.Path(peer).glob("joint*")}
    made |= {name: file.stat().st_mtime_ns for name, file in files.items() if file.is_file()}
    trace = dict(sha256=source_hash(), made_from=made)
    if not path.exists() or not trace.items() <= read_json(path).items():
        versions = dict(torch=torch.__version__, numpy=np.__version__)
        write_json(path, compute() | trace | dict(config=cfg.fields, versions=versions))
    return read_json(path)


# ------------------------------------------------------------------------------------------ language model
# An activation is the residual stream entering block `layer`, hidden_states[layer] in transformers' counting.
# A pre-hook on that block reads it and stops the forward there; later blocks and logits are never computed.

LM_CONFIGS = {   # known without a download, for `plan`; "tiny" is what `lm` trains
    "tiny": dict(model_type="llama", vocab_size=4096, bos_token_id=0, eos_token_id=0, hidden_size=128,
                 intermediate_size=344, num_hidden_layers=4, num_attention_heads=4, tie_word_embeddings=True),
    "EleutherAI/pythia-70m": dict(model_type="gpt_neox", hidden_size=512, intermediate_size=2048,
                                  num_hidden_layers=6, num_attention_heads=8, vocab_size=50304),
    "openlm-research/open_llama_3b": dict(model_type="llama", hidden_size=3200, intermediate_size=8640,
                                          num_hidden_layers=26, num_attention_heads=32, vocab_size=32000)}

class _Captured(Exception):
    """Carries the activations out of a forward that is stopped on purpose."""

def find_blocks(lm, layer=0):
    """The transformer blocks: the one ModuleList as long as the model is deep. UserError without `layer`."""
    depth = lm.config.get_text_config().num_hidden_layers
    found = [m for m in lm.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise UserError(f"cannot tell the blocks of {type(lm).__name__}: {len(found)} lists are {depth} long")
    if not 0 <= layer < depth:
        raise UserError(f"layer {layer} is out of range: {type(lm).__name__} has blocks 0 to {depth - 1}")
    return found[0]

def splice(lm, layer, tokens, replace):
    """Logits (B, T, vocabulary) of tokens (B, T) with the residual stream entering block `layer` replaced:
    replace maps the captured (B, T, D) to another of its kind. UserError for a layer out of range."""
    def hook(module, args, kwargs):
        if args:
            return (replace(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": replace(kwargs["hidden_states"])}
    with find_blocks(lm, layer)[layer].register_forward_pre_hook(hook, with_kwargs=True), torch.no_grad():
        return lm(input_ids=tokens, use_cache=False).logits

def capture(lm, layer, tokens):
    """Residual stream (B, T, D) that enters block `layer`, of tokens (B, T). UserError for no such block."""
    def stop(hidden):
        raise _Captured(hidden)
    try:
        splice(lm, layer, tokens, stop)
    except _Captured as stopped:
        return stopped.args[0]

def work_offline_without_network(*names):
    """Where a hub name is among the names and the hub out of reach, have its library use what it has stored,
    instead of trying for a minute."""
    hub_at = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    hub = [name for name in names if "/" in name and not pathlib.Path(name).exists()]
    if urllib.request.getproxies() or not hub:
        return
    try:
        port = hub_at.port or dict(http=80).get(hub_at.scheme, 443)
        socket.create_connection((hub_at.hostname, port), timeout=5).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"

def collapses_spaces(tokenizer):
    """Whether a tokenizer's own sentencepiece model takes a run of spaces for one: transformers does not."""
    file = str(getattr(tokenizer, "vocab_file", None))
    if not file.endswith(".model"):
        return False
    import sentencepiece
    model = sentencepiece.SentencePieceProcessor(model_file=file)
    return model.encode("a  b") == model.encode("a b")

def load_lm(path, *, device="cpu", layer=None):
    """A causal language model and its tokenizer, from hub or directory; fp32 on a CPU, as stored on a GPU.
    layer: keep only what `capture` at that layer runs, no later blocks and no head. Raises UserError."""
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"    # else some hub models are fetched twice
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if str(path).startswith((".", "/", "~")) and not pathlib.Path(path).is_dir():
        raise UserError(f"there is no directory {path} to load a language model from")
    offline = "; the hub cannot be reached: give --model a directory" * ("HF_HUB_OFFLINE" in os.environ)
    with blame(f"cannot load the language model {path}{offline}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        tokenizer.collapses_spaces = collapses_spaces(tokenizer)
        lm, found = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype="auto" if device != "cpu" else torch.float32, output_loading_info=True)
        if missing := sorted(found["missing_keys"]):      # transformers would fill them with random numbers
            raise ValueError(f"{len(missing)} weights are missing, {missing[0]} among them")
        if len(tokenizer) > (rows := lm.get_input_embeddings().weight.shape[0]):
            raise ValueError(f"its tokenizer knows {len(tokenizer)} tokens, its embedding {rows}")
    if layer is not None:
        lm = lm.base_model
        del find_blocks(lm, layer)[layer + 1:]
        lm.config.get_text_config().num_hidden_layers = layer + 1
    return lm.to(device).eval().requires_grad_(False), tokenizer


# ------------------------------------------------------------------------------------------ text
# Text becomes documents, documents become windows of T tokens that never leave their document. Training,
# validation and test differ by document: its hash decides, so that copies of one document fall together.

def docstring_corpus():
    """Docstrings of the installed numpy, scipy and torch, one document a source file: an iterator."""
    import ast
    files, seen = [], set()
    for package in ("numpy", "scipy", "torch"):
        files += sorted(pathlib.Path(importlib.util.find_spec(package).origin).parent.rglob("*.py"))
    files = [file for file in files if not {"tests", "testing"} & set(file.parts)]
    for file in tqdm(files, desc="parsing docstrings", unit="file", disable=None):
        with contextlib.suppress(SyntaxError, UnicodeDecodeError), warnings.catch_warnings(action="ignore"):
            docstrings = [text for node in ast.walk(ast.parse(file.read_text("utf-8")))
                          if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                          and (text := ast.get_docstring(node)) and text not in seen]
            seen.update(docstrings)
            if docstrings:
                yield "\n\n".join(docstrings)

def text_rows(source):
    """Rows of a .txt, .jsonl or .parquet file, or of a hub data set, HUB_ID[:CONFIGURATION], streamed."""
    import datasets
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    path, (hub_id, _, configuration) = pathlib.Path(source), source.partition(":")
    kind = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}.get(path.suffix.lower())
    if not (path.is_file() if kind else "/" in source and not path.exists()):
        raise UserError(f"{source} is not docstrings; there is no text file so named (txt, jsonl, parquet)")
    where = dict(data_files=glob.escape(source)) if kind else dict(name=configuration or None)
    offline = "; the hub cannot be reached: give --text a file" * ("HF_HUB_OFFLINE" in os.environ)
    with blame(f"cannot read the text {source}" + ("" if kind else offline)):
        rows = datasets.load_dataset(kind or hub_id, **where, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get("text"), str):
                raise UserError(f"{source}: row {number} has no string called 'text', but {str(row)[:60]}")
            yield row["text"].rstrip("\n")

def documents(source):
    """Documents of a text, source as in text_rows: an iterator of strings. A level-1 heading as in WikiText,
    ` = Title = `, starts one; where there is none, blank lines separate the documents of a .txt file that has
    any; else each row is one. The first 2,000 rows decide."""
    rows = text_rows(source)
    first = list(itertools.islice(rows, 2000))
    heading = re.compile(r" ?= [^=](.*[^=])? = ?")
    headings = any(map(heading.fullmatch, first))
    blanks = source.endswith(".txt") and not all(row.strip() for row in first)
    lines = []
    for row in itertools.chain(first, rows):
        starts = heading.fullmatch(row) if headings else not blanks or not row.strip()
        if starts and lines:
            yield "\n".join(lines)
            lines = []
        if row.strip():
            lines.append(row)
    if lines:
        yield "\n".join(lines)

def split_of(document):
    """The split of a document, by its hash: a tenth "validation", a tenth "test", the rest "train"."""
    return {0: "validation", 1: "test"}.get(zlib.crc32(document.encode("utf-8", "replace")) % 10, "train")

def windows(texts, tokenizer, T, split):
    """Windows of T tokens inside the documents of one split: an iterator of (document's number, ids).
    ids is an int32 array, behind the tokenizer's BOS if it has one; an incomplete last window is left out."""
    front = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    chosen = (text for text in texts if split_of(text) == split)
    for number, text in enumerate(chosen):
        if getattr(tokenizer, "collapses_spaces", False):
            text = re.sub(" +", " ", text)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for at in range(0, len(ids) - T + 1, T):
            yield number, np.array(front + ids[at:at + T], dtype=np.int32)

def shuffled(items, size, rng):
    """Shuffle an iterator through a buffer of `size` items; rng is a random.Random."""
    buffer = list(itertools.islice(items, size))
    for item in items:
        at = rng.randrange(size)
        yield buffer[at]
        buffer[at] = item
    rng.shuffle(buffer)
    yield from buffer

def window_stream(source, tokenizer, *, T, split, seed, buffer=1_000_000):
    """Endless shuffled windows, epoch after epoch, fixed by the seed: (epoch, document's number, ids).
    buffer is in tokens. Raises UserError if the split has not one window."""
    for epoch in itertools.count():
        number, in_order = None, windows(documents(source), tokenizer, T, split)
        for number, ids in shuffled(in_order, max(1, buffer // T), random.Random(f"{seed}/{split}/{epoch}")):
            yield epoch, number, ids
        if number is None:
            raise UserError(f"{source}: no document of the {split} split has {T} tokens: give more or longer "
                            f"documents (a tenth validates, a tenth tests), or lower --window")

def take_windows(stream, count):
    """The next windows of a stream: (epoch of the last, documents' numbers (count,), ids (count, T))."""
    epochs, numbers, ids = zip(*itertools.islice(stream, count), strict=True)
    return epochs[-1], torch.tensor(numbers), torch.from_numpy(np.stack(ids)).long()

def text_source(cfg):
    """What `documents` reads for this run; docstrings are parsed once and kept in the run directory."""
    corpus = cfg.run / "corpus.jsonl"
    if cfg.text == "docstrings" and not corpus.exists():
        with replacing(corpus) as temporary, open(temporary, "w") as file:
            file.writelines(json.dumps({"text": document}) + "\n" for document in docstring_corpus())
    return str(corpus) if cfg.text == "docstrings" else cfg.text

def train_tokenizer(texts, vocab_size):
    """Byte-level BPE with a BOS token, as a transformers tokenizer."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size, min_frequency=0, show_progress=False, special_tokens=["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), bos_token="<s>")

def run_lm(cfg):
    """Stage `lm`: train the tiny language model on the run's text, print its held-out perplexity, save it."""
    import transformers
    transformers.logging.disable_progress_bar()
    if cfg.model != "tiny" or (cfg.run / "lm" / "config.json").exists():
        return print(f"lm: nothing to train, the model is {cfg.model}")
    source = text_source(cfg)
    tokenizer = train_tokenizer((text for text in documents(source) if split_of(text) == "train"), 4096)
    torch.manual_seed(0)                                  # one language model, whatever the seed of the run
    shape = transformers.AutoConfig.for_model(**LM_CONFIGS["tiny"] | dict(vocab_size=len(tokenizer)))
    lm = transformers.AutoModelForCausalLM.from_config(shape).to(cfg.device)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=cfg.lm_steps, pct_start=0.1)
    def nats(ids):
        return lm(input_ids=ids.to(cfg.device), labels=ids.to(cfg.device), use_cache=False).loss
    held_out = take_windows(window_stream(source, tokenizer, T=127, split="validation", seed=0), 256)[2]
    stream = window_stream(source, tokenizer, T=127, split="train", seed=0)
    for _ in tqdm(range(cfg.lm_steps), desc="language model", unit="step", disable=None):
        optimizer.zero_grad()
        nats(take_windows(stream, 16)[2]).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        loss = float(np.mean([nats(ids).item() for ids in held_out.split(32)]))
    claim_run(cfg)
    with replacing(cfg.run / "lm") as temporary:
        lm.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    stage_results(cfg, lambda: dict(nats_per_token=loss, perplexity=math.exp(loss)))
    print(f"lm: held-out {loss:.3f} nats per token, perplexity {math.exp(loss):.1f}")


# ------------------------------------------------------------------------------------------ activation stream
# Activations exist for one chunk of windows at a time. Its tokens are shuffled and cut into batches of about
# B: every token is used once, and (seed, step) fixes the batch, so that all arms of a run see the same data
# and an interrupted run goes on where it was. The first position is left out (skip = 1): an attention sink,
# whose norm in large models dwarfs all others.

def extract(lm, layer, ids, *, skip=1, at_once=64):
    """Activations of windows: ids (W, T) -> (W·(T - skip), D) in fp32, at_once windows in each forward."""
    device, D = next(lm.parameters()).device, lm.config.get_text_config().hidden_size
    rows = torch.empty(len(ids), ids.shape[1] - skip, D, device=device)
    for some, place in zip(ids.split(at_once), rows.split(at_once), strict=True):
        place.copy_(capture(lm, layer, some.to(device))[:, skip:])
    return rows.flatten(0, 1)

def chunk_plan(*, tokens, chunk, batch, rows):
    """(windows, batches) of each chunk, all about alike; rows is how many tokens of a window are used."""
    total = math.ceil(tokens / rows)
    chunks = math.ceil(total / max(1, chunk // rows))
    sizes = [total // chunks + (number < total % chunks) for number in range(chunks)]
    return [(size, max(1, round(size * rows / batch))) for size in sizes]

def activation_batches(lm, layer, stream, standardiser, *, plan, epochs=1, seed=0, skip=1, start=0):
    """Shuffled batches of standardised activations: an iterator of (step, epoch of the text, x (B, D)). Each
    chunk of the plan (chunk_plan's) is used `epochs` times; those before the step `start` cost no forward."""
    step = 0
    for number, (size, steps) in enumerate(plan):
        text_epoch, _, ids = take_windows(stream, size)
        x = extract(lm, layer, ids, skip=skip) if step + steps * epochs > start else None
        for epoch in range(epochs):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{number}/{epoch}".encode()))
            for picked in torch.randperm(ids[:, skip:].numel(), generator=generator).tensor_split(steps):
                if step >= start:
                    yield step, text_epoch, standardiser.encode(x[picked.to(x.device)])
                step += 1
        x = None                                          # before the next chunk is made

@torch.no_grad()
def estimate_standardiser(lm, layer, stream, *, tokens=100_000, skip=1, read=lambda raw: raw):
    """Mean and std per dimension over at least `tokens` activations: (Standardiser, facts about them).
    A dimension that never varies gets std 1, and is counted. Raises UserError on non-finite values."""
    count, total, squares, norms = 0, 0, 0, []
    while count < tokens:
        raw = extract(lm, layer, take_windows(stream, 500)[2], skip=skip)
        raw = torch.cat([read(rows) for rows in raw.split(2048)]).double()
        count, total, squares = count + len(raw), total + raw.sum(0), squares + raw.square().sum(0)
        norms.append(raw.norm(dim=1))
    if not squares.isfinite().all():
        raise UserError(f"the language model gives non-finite activations at layer {layer}")
    mean, norms = total / count, torch.cat(norms)
    variance = squares / count - mean.square()
    constant = variance <= 1e-12 * squares / count
    facts = dict(tokens=count, constant_dimensions=int(constant.sum()),
                 largest_norm_over_median=float(norms.max() / norms.median()))
    return Standardiser(mean.float(), variance.sqrt().masked_fill(constant, 1.0).float(), read), facts

def open_data(cfg, *, whole=False):
    """What a stage reads: lm (whole, or up to cfg.layer), tokenizer, D, stream(split), skip, rows that a
    window gives, standardiser. A run's first call writes its config.json and its standardiser."""
    path = cfg.run / "lm" if cfg.model == "tiny" else cfg.model
    if cfg.model == "tiny" and not (path / "config.json").exists():
        raise UserError(f"there is no {path}: run the stage `lm` first")
    lm, tokenizer = load_lm(path, device=cfg.device, layer=None if whole else cfg.layer)
    source, skip, config = text_source(cfg), 0 if cfg.keep_first else 1, lm.config.get_text_config()
    positions = cfg.window + (tokenizer.bos_token_id is not None)
    if positions > (longest := getattr(config, "max_position_embeddings", None) or math.inf):
        raise UserError(f"--window {cfg.window} is more than the {longest} positions of {path}")
    def stream(split, **options):
        return window_stream(source, tokenizer, T=cfg.window, split=split, seed=cfg.seed, **options)
    path = cfg.run / "standardiser.safetensors"
    if not path.exists():
        for split in ("validation", "test"):              # better refused now than after the training
            next(stream(split, buffer=1))
        standardiser, facts = estimate_standardiser(lm, cfg.layer, stream("train"), skip=skip)
    claim_run(cfg)
    if not path.exists():
        save_tensors(path, standardiser.state_dict(), facts)
        print("standardiser:", ", ".join(f"{fact} {value:g}" for fact, value in facts.items()))
    standardiser = Standardiser(**load_tensors(path)[0]).to(cfg.device)
    return types.SimpleNamespace(lm=lm, tokenizer=tokenizer, D=config.hidden_size, stream=stream, skip=skip,
                                 rows=positions - skip, standardiser=standardiser)


# ------------------------------------------------------------------------------------------ evaluation
# Held-out documents only. Errors are summed in float64 by arm, path and document: a document's tokens are not
# independent, so a gain's interval comes from resampling documents, on both sides the same (Efron, 1979).

BASES = {   # what a path of an arm is compared with: label -> (arm, path); None is the arm itself
    "over own SAE path": (None, "sae"), "over sae+linear": (None, "sae+linear"),
    "over sae+interaction": (None, "sae+interaction"), **{f"over {arm}": (arm, "full") for arm in (
        "sae", "sae@matched", "sae-2dec", "residual-sae", "joint-linear", "joint-interaction")}}

def path_sums(parts):
    """x_hat by path, from an arm's parts: "sae", the SAE alone; with one part added, of several; "full"."""
    added = {f"sae+{name}": parts["sae"] + part for name, part in parts.items() if name != "sae"}
    own = {"sae": parts["sae"]} if added else {}
    return own | (added if len(added) > 1 else {}) | {"full": sum(parts.values())}

def held_out_windows(cfg, data, split, tokens):
    """Windows of a held-out split, each once: an iterator of (ids (32, T), documents' numbers (32,))."""
    once = itertools.takewhile(lambda window: window[0] == 0, data.stream(split))
    _, numbers, ids = take_windows(once, math.ceil(tokens / data.rows))
    numbers = numbers.unique(return_inverse=True)[1]
    batches = list(zip(ids.to(cfg.device).split(32), numbers.to(cfg.device).split(32), strict=True))
    return tqdm(batches, desc=f"{cfg.stage}: {split}", unit="batch", disable=None)

def held_out_batches(cfg, data, split, tokens):
    """Held-out activations, as evaluate takes them: an iterator of (x (B, D), documents' numbers (B,))."""
    for ids, numbers in held_out_windows(cfg, data, split, tokens):
        x = data.standardiser.encode(extract(data.lm, cfg.layer, ids, skip=data.skip))
        yield x, numbers.repeat_interleave(data.rows)

def add_by_document(sums, key, numbers, rows):
    """Add rows (B, columns) to sums[key] (documents, columns), which grows as documents come, in float64."""
    so_far = sums.get(key, rows.new_zeros(0, rows.shape[1], dtype=torch.float64))
    new = max(0, int(numbers.max()) + 1 - len(so_far))
    sums[key] = torch.nn.functional.pad(so_far, (0, 0, 0, new)).index_add_(0, numbers, rows.double())

def gain(own, base, *, resamples=2000, seed=0):
    """Share of the base's error that is gone, 1 - Σ own / Σ base: [gain, low, high].
    own, base (documents,): low and high bound 95 % by a percentile bootstrap over documents."""
    from scipy.stats import bootstrap
    def share(own, base, axis=-1):
        return 1 - own.sum(axis) / base.sum(axis)
    interval = math.nan, math.nan
    if len(own) > 1:
        interval = bootstrap(
            (own, base), share, paired=True, vectorized=True, n_resamples=resamples, batch=100,
            method="percentile", rng=np.random.default_rng(seed)).confidence_interval
    return [float(value) for value in (share(own, base), *interval)]

def gains(errors):
    """The gain of every path of every arm over every base that is there: errors {(arm, path): (documents,)}
    -> {arm: {path: {label of the base: [gain, low, high]}}}."""
    found = {}
    for (arm, path), own in errors.items():
        null = NULL if arm.endswith(NULL) else ""         # a twin is compared with twins
        bases = {label: (base + null if base else arm, of) for label, (base, of) in BASES.items()}
        found.setdefault(arm, {})[path] = {label: gain(own, errors[base]) for label, base in bases.items()
                                           if base in errors and base != (arm, path)}
    return found

@torch.no_grad()
def evaluate(models, batches, *, std):
    """{model: results} of models over the same batches of (x (B, D), documents' numbers (B,)). By path: mse,
    fvu = Σ‖x_hat - x‖² / Σ‖x - mean x‖², fvu_raw (in raw units, by std (D,)), sse, an array by document; by
    part: magnitude, mean |part|; l0: the mean number of kept features above 0."""
    tokens, total, squares, variance = 0, 0, 0, std.double().square()
    kept = {name: torch.zeros(model.learner.F, device=std.device) for name, model in models.items()}
    errors, magnitudes = ({name: {} for name in models} for _ in range(2))
    for x, numbers in batches:
        exact = x.double()
        tokens, total, squares = tokens + len(x), total + exact.sum(0), squares + exact.square().sum(0)
        for name, model in models.items():
            parts = model(x, counts=kept[name])
            for part, value in parts.items():
                magnitudes[name][part] = magnitudes[name].get(part, 0) + value.double().abs().sum().item()
            for path, x_hat in path_sums(parts).items():
                error = (x_hat - x).double().square()     # (B, D)
                add_by_document(errors[name], path, numbers, torch.stack([error.sum(1), error @ variance], 1))
    spread, size = squares - total.square() / tokens, tokens * len(std)    # (D,), Σ (x - mean)²
    scales = dict(mse=(0, size), fvu=(0, spread.sum().item()), fvu_raw=(1, (spread @ variance).item()))
    return {name: dict(
        tokens=tokens, l0=kept[name].sum().item() / tokens,
        magnitude={part: value / size for part, value in magnitudes[name].items()},
        sse={path: sums[:, 0].cpu().numpy() for path, sums in errors[name].items()},
        **{measure: {path: sums[:, column].sum().item() / scale for path, sums in errors[name].items()}
           for measure, (column, scale) in scales.items()}) for name in models}


# ------------------------------------------------------------------------------------------ training
# One flat loop. A candidate is an arm at one learning rate; all take each batch in turn, so that they see the
# same tokens. Each arm is then represented by its best rate on validation documents: at one fixed rate, a
# comparison of arms is mostly a comparison of step sizes.

def make_optimizer(model, *, lr, eps=1e-8):
    """Adam (β 0.9, 0.999) on the trainable weights, in one fused pass."""
    return torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=lr, eps=eps, fused=True)

def learning_rate(lr, step, steps, decay=0.8):
    """Falls linearly from lr to lr / 10 over the first `decay` of all steps (above 1: that many steps)."""
    return lr * (1 - 0.9 * min(1.0, step / (decay * steps if decay <= 1 else decay)))

def sum_over_ranks(tensors):
    """Add up tensors over the processes that torchrun started, in place. UserError if one of them died."""
    with blame("another process of this training died, and all stop; the last checkpoint is kept"):
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)

def training_step(model, optimizer, x, *, generator=None, counts=None, autocast=False):
    """One step of a DualEncoder on mean((x_hat - x)²), x (B, D), gradient norm clipped at 1; returns that
    loss. autocast: its matrix products in bfloat16. Where torch.distributed runs, every process is given the
    whole of x and takes its share of the rows. Raises FloatingPointError, before any weight has changed, if
    loss or gradient is not finite. The next step overwrites large gradients: a hook copies what it keeps."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    shared, size = torch.distributed.is_initialized(), x.numel()
    if shared:
        x = x.tensor_split(torch.distributed.get_world_size())[torch.distributed.get_rank()]
    kept = counts if not shared or counts is None else torch.zeros_like(counts)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        parts = model(x, generator, kept)
    loss = (sum(parts.values()) - x).square().mean() * (x.numel() / size)
    loss.backward()
    loss = loss.detach()
    if shared:
        sum_over_ranks([loss, *(p.grad for p in weights), *([] if kept is None else [kept])])
        if kept is not None:
            counts += kept
    # by rows, since one float32 sum of 160 M squares comes out 2 % low
    norm = torch.nn.utils.get_total_norm([torch.linalg.vector_norm(p.grad, dim=-1) for p in weights])
    if not (norm + loss).isfinite():
        optimizer.zero_grad()
        raise FloatingPointError("loss or gradient is not finite")
    if norm > 1:
        torch.nn.utils.clip_grads_with_norm_(weights, 1.0, norm)
    optimizer.step()
    grads = [p.grad for p in weights]
    optimizer.zero_grad()                                 # no candidate's gradients outlive its step
    for p, grad in zip(weights, grads, strict=True):
        if p.grad is None and not (autocast or prefers_dense(p)):
            leave_memory(grad)
    return loss

def sizes_of(cfg, D):
    """make_arm's sizes, from a configuration."""
    return dict(D=D, F=cfg.features, k=cfg.k, n=cfg.n, K=cfg.embedding, top=cfg.top, dropout=cfg.dropout)

def meta_arms(cfg, names, D):
    """Arms on torch's meta device, which holds no data: {name: module}. Raises UserError for a bad name."""
    with torch.device("meta"):
        parent = DualEncoder(TopKSAE(D, cfg.features, cfg.k))
        return {name: make_arm(name, parent=parent, **sizes_of(cfg, D)) for name in names}

def load_arm_of(cfg, name, D):
    """A trained arm of the run, on its device. Raises UserError for one that does not fit the run."""
    model = load_arm(cfg.run / f"{name}.safetensors").to(cfg.device)
    there = model.config | model.config["run"]
    for key, value in (fields_of(cfg, "train") | dict(D=D, arm=name)).items():
        if (old := there.get(key)) != value:
            raise UserError(f"{cfg.run}/{name}.safetensors was trained with {key} = {old}, here it is "
                            f"{value}: remove that file or choose another --run")
    return model

def null_twin(cfg, data):
    """What open_data gives, but for its activations: null twins x~, which are x_hat of the trained arm `sae`
    and what that leaves of another token of the same (shuffled) batch. x_hat tells nothing of it any more."""
    sae, real = load_arm_of(cfg, "sae", data.D), data.standardiser
    @torch.no_grad()
    def read(raw):
        x = real.encode(raw)
        x_hat = sum(sae(x).values())
        other = torch.randperm(len(x), generator=torch.Generator().manual_seed(cfg.seed)).to(x.device)
        return real.decode(x_hat + (x - x_hat)[other])
    return types.SimpleNamespace(**vars(data) | dict(standardiser=Standardiser(real.mean, real.std, read)))

def new_candidate(cfg, name, lr, D):
    """An arm, or a secondary SAE, at one rate, before its first step. losses: those since the last log;
    counts (F,): how many of the last `counted` tokens of training kept each feature."""
    parent = load_arm_of(cfg, "sae", D) if name in CHILDREN else None
    torch.manual_seed(cfg.seed)                           # one draw for all arms and rates
    model = make_arm("sae" if name.endswith(".secondary") else name, parent=parent, **sizes_of(cfg, D))
    model = model.to(cfg.device, getattr(torch, cfg.param_dtype)).train()
    return types.SimpleNamespace(
        arm=name, lr=lr, step=0, model=model, optimizer=make_optimizer(model, lr=lr, eps=cfg.adam_eps),
        losses=[], counts=torch.zeros(model.learner.F, device=cfg.device), counted=0)

def save_checkpoint(path, candidates, config):
    """Write all that the training of an arm's candidates resumes from."""
    state = dict(arm=candidates[0].arm, config=json.dumps(config), candidates=[
        vars(c) | dict(model=c.model.state_dict(), optimizer=c.optimizer.state_dict()) for c in candidates])
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:                     # torch hides why a file could not be written
            raise error.__context__ or error from None

def load_checkpoint(path, candidates, config):
    """Bring an arm's candidates to where save_checkpoint left them. UserError for a damaged file."""
    with blame(f"{path} is not a checkpoint of this run; delete it to train that arm from the start"):
        if damaged := zipfile.ZipFile(path).testzip():
            raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location=candidates[0].counts.device, weights_only=True)
        if (state["arm"], state["config"]) != (candidates[0].arm, json.dumps(config)):
            raise ValueError("it belongs to another arm or another configuration")
        for c, stored in zip(candidates, state["candidates"], strict=True):
            c.model.load_state_dict(stored.pop("model"))
            c.optimizer.load_state_dict(stored.pop("optimizer"))
            vars(c).update(stored)

@torch.no_grad()
def log_entry(c, epoch, x):
    """A line of train.jsonl: mean loss since the last one, mean |output| of each part on x (B, D), share of
    decoder rows with a squared norm below 0.2. It starts c.losses anew."""
    mse, parts, c.losses = torch.stack(c.losses).mean().item(), c.model(x), []
    return dict(arm=c.arm, lr=c.lr, step=c.step, text_epoch=epoch + 1, mse=mse,
                magnitude={name: part.abs().mean().item() for name, part in parts.items()},
                low_norm=(c.model.learner.W_dec.square().sum(1) < 0.2).double().mean().item())

def rewind_log(path, ages):
    """Drop what a log holds of arms beyond their steps, {arm: step}: what follows is logged again."""
    old = [entry for entry in read_log(path) if entry["step"] <= ages.get(entry["arm"], math.inf)]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in old))

def train_pass(cfg, data, arms):
    """Train arms, {name: candidates}, side by side over the stream, from where their checkpoints stand.
    Each arm's best becomes ARM.safetensors. UserError, with arm and step, for a value that is not finite."""
    everyone, fields = list(itertools.chain(*arms.values())), fields_of(cfg, "train")
    plan = chunk_plan(tokens=cfg.tokens, chunk=cfg.chunk, batch=cfg.batch, rows=data.rows)
    steps = cfg.chunk_epochs * sum(batches for _, batches in plan)
    for name, candidates in arms.items():
        if (path := cfg.run / f"{name}.ckpt").exists():
            load_checkpoint(path, candidates, fields)
            print(f"train: {name} goes on at step {candidates[0].step} of {steps}")
    log, ages = cfg.run / "train.jsonl", {c.arm: c.step for c in everyone}
    if not cfg.rank:
        rewind_log(log, ages)
    start, saved, every = min(ages.values()), time.monotonic(), max(1, min(steps // 50, 500))
    batches = activation_batches(data.lm, cfg.layer, data.stream("train"), data.standardiser, plan=plan,
                                 epochs=cfg.chunk_epochs, seed=cfg.seed, skip=data.skip, start=start)
    for step, epoch, x in tqdm(batches, desc="train", unit="step", total=steps, initial=start,
                               disable=cfg.rank > 0 or None):
        counting = step >= steps - max(1, min(math.ceil(1e6 / cfg.batch), steps // 2))   # for dead features
        x = x.to(getattr(torch, cfg.param_dtype))
        for c in everyone:
            if step < c.step:                             # it had this batch before the run was interrupted
                continue
            for group in c.optimizer.param_groups:
                group["lr"] = learning_rate(c.lr, step, steps, cfg.decay)
            drawn_from = f"{cfg.seed}/{c.arm}/{step}" + f"/{cfg.rank}" * (cfg.rank > 0)
            mask_seed = zlib.crc32(drawn_from.encode())   # no other arm changes it
            try:
                loss = training_step(
                    c.model, c.optimizer, x, autocast=cfg.autocast, counts=c.counts if counting else None,
                    generator=torch.Generator(x.device).manual_seed(mask_seed))
            except FloatingPointError as error:
                raise UserError(f"arm {c.arm} at lr {c.lr:g}: the {error} at step {step} (the last "
                                f"checkpoint is kept); lower --lr in another --run") from error
            c.losses += [loss] if not cfg.rank else []    # only rank 0 logs them
            c.counted, c.step = c.counted + len(x) * counting, step + 1
        if cfg.rank or ((step + 1) % every and step + 1 < steps):
            continue
        lines = [json.dumps(log_entry(c, epoch, x)) + "\n" for c in everyone if c.losses]
        with blame(f"cannot write {log}"), open(log, "a") as file:
            file.writelines(lines)
        if time.monotonic() - saved >= 60 * cfg.save_minutes:
            for name, candidates in arms.items():
                save_checkpoint(cfg.run / f"{name}.ckpt", candidates, fields)
            saved = time.monotonic()

    SPARE.clear()                                         # other passes may be of other sizes
    if cfg.rank:                                          # rank 0 writes
        return
    validation = held_out_batches(cfg, data, "validation", math.ceil(cfg.eval_tokens / 4))
    models = {(c.arm, c.lr): c.model.float().eval() for c in everyone}
    validated = evaluate(models, validation, std=data.standardiser.std)
    for name, candidates in arms.items():
        errors = {c.lr: validated[name, c.lr]["mse"]["full"] for c in candidates}
        best = min(candidates, key=lambda c: errors[c.lr])
        save_arm(cfg.run / f"{name}.safetensors", best.model, data.standardiser, dict(
            sizes_of(cfg, data.D), arm=name, steps=steps, lr=best.lr, run=fields, dead_tokens=best.counted,
            dead=(best.counts == 0).double().mean().item(),
            validation_mse={f"{lr:g}": mse for lr, mse in errors.items()}))
        (cfg.run / f"{name}.ckpt").unlink(missing_ok=True)
        print(f"train: {name}: validation mse", *(f"{mse:.4f} at lr {lr:g}" for lr, mse in errors.items()))

def wait_for_all(cfg):
    """Let all processes that torchrun started reach this point."""
    if cfg.ranks > 1:
        here = torch.zeros(1, device=cfg.device)
        sum_over_ranks([here])
        here.item()                                       # a GPU's sum is only under way until it is read

def run_train(cfg):
    """Stage `train`: train the arms named that are not there yet, --at-once in a pass. With torchrun
    each process takes its share of every batch, gradients are added up, and rank 0 writes."""
    meta_arms(cfg, cfg.arms, D=1)                         # a name that cannot be is refused before any work
    wanted = [name for name in dict.fromkeys(cfg.arms) if not (cfg.run / f"{name}.safetensors").exists()]
    if not wanted:
        return print(f"train: all there: {' '.join(cfg.arms)}")
    def kind(name):
        return 2 if name.endswith(NULL) else 1 if name in CHILDREN else 0
    if any(map(kind, wanted)) and "sae" not in wanted and not (cfg.run / "sae.safetensors").exists():
        raise UserError(f"{', '.join(CHILDREN)} and null twins need a trained `sae`: train that first")
    if cfg.ranks > 1:
        if 2 * cfg.ranks > cfg.batch:
            raise UserError(f"--batch {cfg.batch} is too small for {cfg.ranks} processes")
        patient = datetime.timedelta(days=1)              # while rank 0 validates and writes
        torch.distributed.init_process_group("gloo" if cfg.device == "cpu" else "nccl", timeout=patient)
    data = open_data(cfg) if not cfg.rank else None       # first rank 0: it writes
    wait_for_all(cfg)
    data = data or open_data(cfg)
    for each in range(3):                                 # what is built on `sae` comes after it
        names = [name for name in wanted if kind(name) == each]
        source = null_twin(cfg, data) if names and each == 2 else data
        for at in range(0, len(names), cfg.at_once):
            train_pass(cfg, source, {name: [new_candidate(cfg, name, lr, data.D) for lr in cfg.lr]
                                     for name in names[at:at + cfg.at_once]})
            wait_for_all(cfg)


# ------------------------------------------------------------------------------------------ claims
# A claim of the paper stands under the paper's own metric and beside the controls that could refute it; the
# first ones decide. It is data: a figure is named by where it stands in results/STAGE.json, below "arms".

CLAIMS = (   # title (paper's value), stage, paper's metric, controls, what the first n controls must show, n
    # A to C are not the paper's
    ("A pair test of nonlinear integration: the product of two features predicts what sae leaves",
     "pairs", ["joint/whole/r2", "joint-interaction/whole/r2"],
     ["joint/whole/p", "joint-interaction/whole/p", "joint/whole/r2_controls",
      "joint-interaction/whole/r2_controls", "joint/along/p", "joint-interaction/along/p"],
     ("<", 0.05, "products of the pairs that joint ranks first predict it better than of pairs alike"), 1),
    ("B joint gains more over sae than on null twins, whose residuals tell nothing", "recon",
     ["joint/gain/full/over sae", "joint-interaction/gain/full/over sae"],
     ["joint/gain_less_twin", "joint-interaction/gain_less_twin", "joint~null/gain/full/over sae",
      "joint-interaction~null/gain/full/over sae"],
     (">", 0, "joint gains more than on twins (a biased zero: they also lose what TopK left behind)"), 1),
    ("C in worlds whose answer is known, the NFM tells planted pairs of features from decoys", "synth",
     ["joint-interaction/planted/auroc", "joint-interaction/planted/gain/over sae"],
     [f"joint-interaction{part}" for part in ("/planted/auroc", "/null/auroc", "/planted/above_decoys",
      "/null/above_decoys", "/null/gain/over sae", "/null, both/gain/over sae", "@2x/planted/auroc")]
     + ["joint-mlp/null/gain/over sae", "sae/planted/conjunctions", "sae@2x/planted/conjunctions"],
     (">", 0.5, "planted pairs rank above decoys in every world and seed"), 1),
    ("1 joint training cuts the reconstruction error (41.3 %, mse 0.275 to 0.162)", "recon",
     ["joint/gain/full/over own SAE path"], ["joint/gain/full/over sae", "joint/gain/full/over sae@matched",
      "joint/gain/full/over sae-2dec", "sae-2dec/gain/full/over own SAE path"],
     (">", 0, "joint's error is below that of an SAE on the same tokens, and of one of its size"), 2),
    ("2 an NFM on a trained SAE's residual cuts its error (23.4 % on validation)", "recon",
     ["sequential/gain/full/over own SAE path"],
     ["sequential/gain/full/over residual-sae", "residual-sae/gain/full/over own SAE path",
      "sequential/gain/full/over sae"], (">", 0, "the NFM cuts more of the residual than a second SAE"), 1),
    ("3 the interaction is a small share of the NFM, 6 %, sequential 4.5 %; paths are sub-additive", "recon",
     ["joint/interaction_share", "sequential/interaction_share"],
     [f"joint/{part}" for part in ("gain/full/over joint-linear", "gain/full/over joint-interaction",
      "gain/sae+linear/over own SAE path", "gain/full/over sae+interaction",
      "gain/sae+interaction/over own SAE path", "gain/full/over sae+linear", "sub_additive_by")],
     (">", 0, "the interaction, trained along, cuts the error at all"), 1),
    ("4 the SAE alone explains most of the variance (86.4 %, mse 0.136)", "recon", ["sae/explained/mse"],
     ["sae/explained/fvu", "sae/explained/fvu_raw", "sae/dead"],
     (">", 0.5, "the SAE explains more than half of the variance of held-out documents"), 1),
    ("5 joint training cuts KL (51.9 %, linear 50.9, nonlinear 8.6; sequential 29.8), CE (26.2 %)", "kl",
     ["joint/full/cut/over own SAE path", "joint/sae+linear/cut/over own SAE path",
      "joint/sae+interaction/cut/over own SAE path", "joint/full/ce_cut_of_total",
      "sequential/full/cut/over own SAE path", "joint/full/p/over own SAE path/published"],
     ["joint/full/cut/over sae", "joint/full/cut/over sae@matched", "joint/full/p/over sae/paired",
      "sae-2dec/full/cut/over own SAE path", "sae/full/ce_recovered", "joint/full/ce_recovered"],
     (">", 0, "joint's KL is below that of an SAE on the same tokens, and of one of its size"), 2),
    ("6 SAE errors cost more than random ones of their size (2.99 times the KL, sequential 2.1)", "kl",
     ["joint/sae/over_random", "sequential/sae/over_random"],
     ["sae/full/over_random", "joint/full/over_random"],
     (">", 1, "the error of an SAE that is no cut-off part costs more KL than a random one"), 1),
    ("7 the nonlinear path's 3 % of parameters give a sixth of the gain (8.6 of 51.9)", "kl",
     ["joint/sae+interaction/cut/over own SAE path"],
     ["joint/full/cut/over joint-linear", "joint-mlp/full/cut/over joint-linear"],
     (">", 0, "the nonlinear path, trained along, cuts KL at all"), 1),
    ("8 squared decoder norms turn bimodal (modes at 0.05 and 0.37; SAE one mode at 0.4)", "gram",
     ["joint/below_0.2", "sae/below_0.2", "joint/modes"],
     ["joint/bimodality_less_sae", "sae/modes", "joint folded/modes", "joint/bimodality", "sae/bimodality",
      "joint/initial_squared_norm"], (">", 0, "joint's norms have modes, more clearly than sae's"), 1),
    ("9 norm and NFM share correlate (Spearman -0.987, linear -0.866, interaction -0.922)", "gram",
     ["joint/share/r/nfm", "joint/share/r/linear", "joint/share/r/interaction", "joint/share/above_0.2/nfm"],
     [f"joint/share/{part}" for part in ("r_less_lowest_shuffled", "r_shuffled/nfm", "r_untouched/nfm",
      "above_0.2_untouched/nfm", "r_norms/linear", "r_norms/interaction", "r_function")],
     ("<", 0, "the correlation is stronger than with NFM norms shuffled among features"), 1),
    ("10 some 860 components hold 90 % in both; joint needs more of the first 50", "gram",
     ["joint/components_90_published", "sae/components_90_published"],
     ["joint folded/first_50_less_sae", "joint folded/first_50", "sae/first_50_untouched", "joint/first_50",
      "sae/first_50", "joint/components_90", "sae/components_90", "joint folded/components_90"],
     ("<", 0, "the first 50 hold less of joint's decoder, folded, than of sae's with an untouched W_lin"), 1),
    ("11 a secondary feature's clamp shows an interaction (formality × emotion, F = 5.06, p = .027)", "anova",
     ["joint/interaction/words/F_ab", "joint/interaction/words/p_ab", "joint/interaction/stimuli"],
     [f"joint/interaction/{part}" for part in ("kl/p", "contrast/p", "kl/p_crossed", "words/p_permuted",
      "words/p_random", "words/p_primary", "words/p_secondary")],
     ("<", 0.05, "the clamp's effect depends on the sentence's own cell, more than that of its nulls"), 1),
    ("12 secondary features split by whether a lone primary feature contributes", "secondary",
     ["joint/fvu", "joint/dead"],
     ["joint/moved_by_one", "joint/moved_by_two", "joint/mse", "joint/mse_replaced", "joint/mse_without"],
     (">", 0, "a lone feature moves m, though its z is 0"), 1),
    ("13 the NFM's cost grows faster than its features; an SAE has no negative signs", "gram",
     ["joint/cost_exponent/pairwise"], ["joint/cost_exponent/identity", "sae/negative"],
     (">", 1.25, "the cost grows faster than in proportion to n"), 1))

COLUMNS = {   # what a stage's table shows of each entry
    "recon": "params, lr, mse, fvu, fvu_raw, l0, dead, gain/full/over sae",
    "kl": "kl, over_random, excess_ce, ce_recovered, cut/over sae",
    "gram": "features, fires, value, moved, norm, scale_free, function, ablation",
    "secondary": "features, fvu, dead, mse, mse_replaced, mse_without",
    "anova": "feature, nulls/secondary, words/F_ab, words/p_ab, words/p_permuted, words/p_secondary, "
             "kl/F_ab, kl/p_crossed, kl/p",
    "pairs": "r2, r2_controls, passed, p", "inspect": "fires",
    "synth": "matched, conjunctions, gain/over sae, gain/over sae@matched, auroc, strength/planted, "
             "strength/decoy, cosine"}

FORMATS = (   # (pattern in a figure's name, format); all others are shares
    ("params|features?$|modes|components|nulls|passed|shared", ","), ("conjunctions", "g"),
    ("auroc|cosine|strength", ".2f"), ("(^|/)p([_/]|$)", ".2g"), ("lr$", "g"),
    ("explained|_0.2", "%"), ("mse|fvu|r2|(^|/)kl$|excess|initial|ablation|function", ".4f"),
    ("F_ab|l0|random$|exponent|value|moved$|norm$|scale_free|bimodality|share/", ".3f"))

def lookup(results, where):
    """What stands at a/b/c in nested dicts, or None."""
    for key in where.split("/"):
        results = results.get(key) if isinstance(results, dict) else None
    return results

def show(value, where=""):
    """A figure as text, in its name's format: "12.3 %", or [value, low, high] as "12.3 % [11.0, 13.6]"."""
    if value is None or value != value or isinstance(value, str):
        return value if isinstance(value, str) else "-"
    spec = next((spec for pattern, spec in FORMATS if re.search(pattern, where)), "%")
    spec = ",.1f" if spec == "," and np.mod(value, 1).any() else spec       # the mean of counts
    own, *ends = [f"{100 * v:.1f}" if spec == "%" else format(v, spec) for v in np.atleast_1d(value).tolist()]
    return own + (" %" if spec == "%" else "") + (f" [{', '.join(ends)}]" if ends else "")

def verdict(values, relation, bound, what):
    """One sentence: do the deciding figures, with all of their intervals, lie beyond the bound?"""
    ends = [np.broadcast_to(value, 3)[1:] for value in values if value is not None]   # low and high
    if not ends:
        return "not measured"
    beyond = (np.array(ends) - bound) * (1 if relation == ">" else -1)
    short, all_there = (beyond <= 0).all(1).any(), len(ends) == len(values)
    upheld = (beyond > 0).all() and all_there
    return ("upheld that " if upheld else "not upheld that " if short else "not decided whether ") + what

def table(*rows):
    """Lines of aligned columns from rows of strings, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + first.ljust(widths[0]) + "".join(map(str.rjust, rest, [width + 2 for width in widths[1:]]))
            for first, *rest in rows]

def stage_lines(stage, results):
    """What a stage found, as lines: its table, then its claims, each beside its controls."""
    columns, arms = COLUMNS[stage].split(", "), results["arms"]
    parts = {f"{name}, {part}": entry for name, arm in arms.items() for part, entry in arm.items()}
    rows = [(name, *(show(lookup(entry, where), where) for where in columns))
            for name, entry in (arms | parts).items() if isinstance(entry, dict) and columns[0] in entry]
    lines = ["", *results["about"], *table(("arm", *columns), *rows)]
    for title, of, metrics, controls, decided, n in CLAIMS:
        if of == stage:
            lines += ["", f"claim {title}"]
            for kind, figures in (("paper's metric", metrics), ("control", controls)):
                lines += [f"  {kind if where == figures[0] else '':16}{where.replace('/', ' '):52}"
                          f"{show(lookup(arms, where), where):>26}" for where in figures]
            lines.append(f"  {verdict([lookup(arms, where) for where in controls[:n]], *decided)}")
    return lines


# ------------------------------------------------------------------------------------------ reconstruction
# Claims 1 to 4: how much of the activations an arm rebuilds. fvu is the share of their variance that is left:
# 0 is perfect, 1 is what their mean leaves. From fvu .10 of the own SAE path to .04 in full is a gain of 60 %
# as published; if `sae` has .038 on the same tokens, the gain over that is 1 - .04/.038 = -5 %.

def arm_results(own, cuts, config, params):
    """An arm's entry in recon.json, from what evaluate and gains have of it, its config and its size."""
    entry = {measure: own[measure]["full"] for measure in ("mse", "fvu", "fvu_raw")}
    entry["explained"] = {measure: 1 - error for measure, error in entry.items()}
    entry |= {key: config[key] for key in ("dead", "dead_tokens", "lr", "validation_mse")}
    labels = dict(published="over own SAE path", matched="over sae", parameter_matched="over sae@matched")
    entry |= dict(l0=own["l0"], params=params, magnitude=own["magnitude"], gain=cuts,
                  fvu_by_path=own["fvu"], improvement={
                      name: cut[0] for name, label in labels.items() if (cut := cuts["full"].get(label))})
    _, *added = own["magnitude"]
    if len(added) == 1:                                   # the path of the only part added is the full one
        own["fvu"][f"sae+{added[0]}"] = entry["fvu"]
    if len(added) == 2:
        linear, interaction = (own["magnitude"][part] for part in added)
        one, other, both = (cut["over own SAE path"][0] for path, cut in cuts.items() if path != "sae")
        entry |= dict(interaction_share=interaction / (linear + interaction),
                      sub_additive_by=one + other - both)
    return entry

def family(arms, name):
    """Parameters and fvu of an arm in all its sizes: [(parameters, fvu), …], by size."""
    return sorted((arm["params"], arm["fvu"]) for each, arm in arms.items()
                  if each.partition("@")[0] == name and not each.endswith(NULL))

def capacity_lines(arms):
    """What each size of joint saves: the parameters of an `sae` of the same error, by interpolation between
    the sizes that were trained (of logs), over its own; no lines with fewer than three sizes of sae."""
    sizes = family(arms, "sae")
    if len(sizes) < 3:
        return []
    best, lines = itertools.accumulate((fvu for _, fvu in sizes), min), []
    sae = np.log([size for size, low in zip(sizes, best, strict=True) if size[1] == low])[::-1]
    for params, fvu in family(arms, "joint"):
        same = math.exp(np.interp(math.log(fvu), sae[:, 1], sae[:, 0], left=math.nan, right=math.nan))
        lines.append(f"joint of {params:,} parameters, fvu {fvu:.4f}: " + (
            f"an sae of that error has {same / params:.2f} times as many" if same == same else
            "an sae of that error is beyond the sizes trained"))
    return lines

def open_arms(cfg, *, only=(), of=(), **options):
    """What open_data gives, and trained arms of the run, {name: model}: `only` those and, of `of`, those that
    are there; given neither, all. UserError for one that does not fit the run, or if one of `only`, or, where
    it is empty, all of `of`, or `sae`, are not there."""
    there = [name for name in of if (cfg.run / f"{name}.safetensors").exists()]
    for name in only or there or of[:1] or ("sae",):
        if not (cfg.run / f"{name}.safetensors").exists():
            raise UserError(f"{cfg.run} has no trained arm {name!r}: run the stage `train` first")
    data = open_data(cfg, **options)
    stems = sorted(path.stem for path in cfg.run.glob("*.safetensors"))
    names = [*only, *there] or [stem for arm in ARMS for stem in stems
                                if stem.partition("@")[0] == arm and not stem.endswith(NULL)]
    return data, {name: load_arm_of(cfg, name, data.D) for name in names}

def measure_recon(cfg):
    """Stage `recon`: errors of every arm on test documents; claims 1 to 4 beside their controls."""
    (data, models), measured, about_arm = open_arms(cfg), {}, {}
    twins = [path.stem for path in sorted(cfg.run.glob(f"*{NULL}.safetensors"))]
    for source in [data, *(null_twin(cfg, data) for _ in twins[:1])]:
        if source is not data:                            # in the others' place, who may fill the memory
            models = {name: load_arm_of(cfg, name, data.D) for name in twins}
        about_arm |= {name: (model.config, count_parameters(model)) for name, model in models.items()}
        measured |= evaluate(models, held_out_batches(cfg, source, "test", cfg.eval_tokens),
                             std=data.standardiser.std)
    cuts = gains({(name, path): sse for name, own in measured.items() for path, sse in own["sse"].items()})
    arms = {name: arm_results(own, cuts[name], *about_arm[name]) for name, own in measured.items()}
    for name in twins:
        real, twin = (lookup(cuts, f"{arm}/full/over sae") for arm in (name.removesuffix(NULL), name))
        if real and twin:                                 # the widest interval that both allow
            arms[name.removesuffix(NULL)]["gain_less_twin"] = [
                real[0] - twin[0], real[1] - twin[2], real[2] - twin[1]]
    tokens, documents = measured["sae"]["tokens"], len(measured["sae"]["sse"]["full"])
    edge = [name for name, a in arms.items() if len(cfg.lr) > 1 and a["lr"] in (min(cfg.lr), max(cfg.lr))]
    return dict(tokens=tokens, documents=documents, arms=arms, about=[
        f"Reconstruction of {tokens:,} tokens of {documents} held-out documents, layer {cfg.layer}, after "
        f"{cfg.tokens:,} training tokens, seed {cfg.seed}; intervals: bootstrap over documents",
        f"dead: kept by none of the last {arms['sae']['dead_tokens']:,} training tokens; best learning rate "
        f"at an edge of --lr, so perhaps beyond it: {' '.join(edge) or 'none'}", *capacity_lines(arms)])


# ------------------------------------------------------------------------------------------ kl
# Splicing puts x_hat, in raw units, where its activation was read, and lets the forward go on: what does the
# language model lose? An error's direction matters as well as its size, so each path stands beside an
# isotropic error of its own size; a cut of KL stands beside `sae` too, not only beside the own SAE path.

def log_probabilities(logits):
    """Log-softmax over the vocabulary, in single precision at least: like logits (…, vocabulary)."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

def kl_divergence(logits_p, logits_q):
    """KL(p ‖ q) of next-token distributions, in nats: logits (…, vocabulary), twice -> (…)."""
    rows = (map(log_probabilities, logits.flatten(0, -2).split(256)) for logits in (logits_p, logits_q))
    kl = [(p.exp() * (p - q)).sum(-1) for p, q in zip(*rows, strict=True)]
    return torch.cat(kl).view(logits_p.shape[:-1])

def epsilon_random(x, x_hat, generator):
    """x with an isotropic error as long as x_hat - x, a direction a row: (…, D) -> like x (Gurnee, 2024)."""
    direction = torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype)
    return x + direction * ((x_hat - x).norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True))

def replacements(models, standardiser, raw, generator):
    """What is spliced in for raw (windows, positions, D): an iterator of (key of its sums, like raw)."""
    yield from {("clean", ""): raw, ("mean", ""): standardiser.mean.expand_as(raw)}.items()
    x = standardiser.encode(raw).flatten(0, 1)
    for name, model in models.items():
        for path, x_hat in path_sums(model(x)).items():
            new = standardiser.decode(x_hat).view_as(raw)
            yield (name, path), new
            yield (name, path, "random"), epsilon_random(raw, new, generator)

def splice_in(data, layer, ids, new):
    """Logits (windows, T, vocabulary) with raw `new` (windows, positions, D) behind the skipped ones."""
    return splice(data.lm, layer, ids,
                  lambda hidden: torch.cat([hidden[:, :data.skip], new.to(hidden.dtype)], 1))

def judge(clean, logits, following):
    """KL (windows, T) of logits (windows, T, vocabulary) from `clean`, a window's log-probabilities and
    probabilities each, and the cross-entropy (windows, T - 1) of the tokens that follow; window by window,
    for memory."""
    kl, ce = [], []
    for (p, share), row, next_ids in zip(clean, logits, following, strict=True):
        q = log_probabilities(row)
        kl.append((share * (p - q)).sum(-1))
        ce.append(-q[:-1].gather(1, next_ids[:, None])[:, 0])
    return torch.stack(kl).double(), torch.stack(ce).double()

def measure_kl(cfg):
    """Stage `kl`: KL and cross-entropy with each path spliced in; claims 5 to 7 beside their controls."""
    (data, models), sums = open_arms(cfg, whole=True), {}
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    for ids, numbers in held_out_windows(cfg, data, "test", cfg.kl_tokens):
        raw, following = capture(data.lm, cfg.layer, ids)[:, data.skip:].float(), ids[:, data.skip + 1:]
        clean = map(log_probabilities, data.lm(input_ids=ids, use_cache=False).logits[:, data.skip:])
        clean = [(p, p.exp()) for p in clean]
        for key, new in replacements(models, data.standardiser, raw, generator):
            kl, ce = judge(clean, splice_in(data, cfg.layer, ids, new)[:, data.skip:], following)
            ones = torch.ones_like(kl)
            columns = [part.sum(1) for part in (kl, kl.square(), ones, ce, ones[:, 1:])]
            add_by_document(sums, key, numbers, torch.stack(columns, 1))
    return kl_results({key: total.cpu().numpy() for key, total in sums.items()})

def kl_results(sums):
    """What kl.json holds, from sums {key: (documents, 5)} of KL, KL², tokens, cross-entropy, tokens with a
    next one. CE recovered is 1 for the clean model, 0 for activations replaced by their mean. A cut of KL has
    two p-values: as published, unpaired, over tokens as if independent, and paired, over documents."""
    from scipy.stats import ttest_ind_from_stats, ttest_rel
    kl, ce = ({key: total[:, at].sum() / total[:, count].sum() for key, total in sums.items()}
              for at, count in ((0, 2), (3, 4)))
    clean, lost, arms = ce["clean", ""], ce["mean", ""], {}
    def p_values(*keys):
        total, square, tokens = np.stack([sums[key][:, :3].sum(0) for key in keys], 1)   # (2,) each
        std = (np.maximum(0, square - total ** 2 / tokens) / np.maximum(1, tokens - 1)) ** 0.5
        moments = np.stack([total / tokens, std, tokens], 1)
        by_document = (sums[key][:, 0] / sums[key][:, 2] for key in keys)
        return dict(published=float(ttest_ind_from_stats(*moments.flatten()).pvalue),
                    paired=float(ttest_rel(*by_document).pvalue))
    by_path = {key: total[:, 0] for key, total in sums.items() if len(key) == 2 and key[1]}
    for name, cuts in gains(by_path).items():
        for path, cut in cuts.items():
            key = name, path
            less, low, high = gain(by_path[key], sums[*key, "random"][:, 0])
            arms.setdefault(name, {})[path] = entry = dict(
                kl=kl[key], ce=ce[key], kl_random=kl[*key, "random"], kl_over_random=1 - less,
                over_random=[1 - less, 1 - high, 1 - low], excess_ce=ce[key] - clean,
                ce_recovered=(lost - ce[key]) / (lost - clean), cut=cut,
                p={label: p_values(key, (BASES[label][0] or name, BASES[label][1])) for label in cut})
            if "over own SAE path" in cut:
                entry["ce_cut_of_total"] = 1 - ce[key] / ce[name, "sae"]
    tokens, documents = int(sums["clean", ""][:, 2].sum()), len(sums["clean", ""])
    about = [f"Splicing on {tokens:,} tokens of {documents} held-out documents; clean CE {clean:.4f}, "
             f"mean-ablated CE {lost:.4f}"]
    return dict(arms=arms, clean_ce=clean, mean_ablated=dict(kl=kl["mean", ""], ce=lost), about=about,
                identity_kl=kl["clean", ""], tokens=tokens, documents=documents)


# ------------------------------------------------------------------------------------------ structure
# Claims 8 to 10 and 13: what the weights look like. A norm says little by itself. Every decoder row starts at
# a squared norm of D/(3F), every row of W_lin and V at .01√D and .05√K, so that a small one may be a row that
# hardly trained; the shares that the paper correlates with a norm contain it; what decodes is W_dec + W_lin.

@torch.no_grad()
def gram_stats(W, *, block=512):
    """Geometry of the rows of W (F, width), in blocks, never (F, F): squared_norms (F,); mean, std, largest
    size of the product and cosine of two rows; spectrum (width,), exact centred principal variances, share of
    the first_50, components_90 to hold 90 %; components_90_published, of the top 1,000, uncentred."""
    F, blocks, largest = len(W), W.split(4096), dict(product=0.0, cosine=0.0)
    squared = torch.cat([rows.square().sum(1) for rows in blocks])
    stats, scale = dict(squared_norms=squared), squared.clamp_min(1e-30).rsqrt()
    room, none = W.new_empty(min(block, F), F), W.new_zeros(F)
    for at in range(0, F, block):                         # each pair once, no row with itself
        rows = W[at:at + block]
        pairs = linear(rows, W[at:], none[at:], out=room[:len(rows), at:])
        pairs[:, :block].triu_(1)
        for kind in largest:
            if kind == "cosine":
                pairs.mul_(scale[at:at + block, None]).mul_(scale[at:])
            largest[kind] = max(largest[kind], *(end.abs().item() for end in pairs.aminmax()))
    def moments(rows):
        return sum((some.T @ some).double() for some in rows)
    centre = sum(rows.double().sum(0) for rows in blocks) / F
    centred = moments(rows - centre.to(rows) for rows in blocks)
    uncentred, units = centred + F * torch.outer(centre, centre), scale[:, None].split(4096)
    of_units = moments(rows * unit for rows, unit in zip(blocks, units, strict=True))
    sum_of_units = sum((rows * unit).double().sum(0) for rows, unit in zip(blocks, units, strict=True))
    for kind, total, square, own in (                     # Σ_{i≠j} w_i·w_j = ‖Σ w‖² - Σ ‖w‖², and so squared
            ("product", F * centre, uncentred, squared.double()),
            ("cosine", sum_of_units, of_units, (squared > 0).double())):
        mean, squares = ((whole - each.sum()).item() / max(1, F * (F - 1)) for whole, each in (
            (total @ total, own), (square.square().sum(), own.square())))
        stats[kind] = dict(mean=mean, std=max(0.0, squares - mean ** 2) ** 0.5, largest=largest[kind])
    spectrum, uncentred = (torch.linalg.eigvalsh(matrix).flip(0).clamp_min(0)
                           for matrix in (centred, uncentred))
    def components(variances):
        return 1 + int((variances.cumsum(0) < 0.9 * variances.sum() * (1 - 1e-9)).sum())
    return stats | dict(
        spectrum=spectrum, first_50=(spectrum[:50].sum() / spectrum.sum()).item(),
        components_90=components(spectrum), components_90_published=components(uncentred[:1000]))

def find_modes(squared_norms, *, resamples=300, seed=0):
    """Of squared norms (F,), by a kernel density of their logs: modes, peaks that rise by a twentieth of the
    highest; antimode, between the two highest, or None; bimodality, Sarle's (skewness² + 1) / kurtosis (5/9
    for a uniform density), and bootstrap resamples of it."""
    from scipy import signal, stats
    logs, rng = np.log10(squared_norms), np.random.default_rng(seed)
    grid = np.linspace(logs.min() - 0.3, logs.max() + 0.3, 512)
    density = stats.gaussian_kde(logs)(grid)
    peaks = signal.find_peaks(density, prominence=density.max() / 20)[0]
    low, high = sorted(peaks[density[peaks].argsort()[-2:]]) if len(peaks) > 1 else (0, 0)
    antimode = float(10 ** grid[low + density[low:high].argmin()]) if high else None
    own, *drawn = (float((stats.skew(y) ** 2 + 1) / stats.kurtosis(y, fisher=False))
                   for y in (logs, *(rng.choice(logs, len(logs)) for _ in range(resamples))))
    return dict(modes=len(peaks), antimode=antimode, bimodality=own, resamples=np.array(drawn))

def norm_shares(dec, lin, V, untouched, *, shuffles=200, seed=0):
    """Claim 9 on norms (F,) of the rows of W_dec, W_lin and V, as published; with `untouched` (lin, V), of
    before training; with (lin, V) shuffled among features as a pair, [median, 2.5 %, 97.5 %]. r: Spearman's,
    of dec with the shares of the norms' sum, nfm being lin and V; below_0.2, above_0.2: mean shares on the
    two sides of the paper's dec² of 0.2; nfm_by_norm: that of nfm in 20 bins of dec²."""
    from scipy.stats import spearmanr
    names, low = ("nfm", "linear", "interaction", "residual"), dec ** 2 < 0.2
    bins = np.array_split(dec.argsort(), min(20, len(dec)))
    def describe(lin, V):
        shares = np.stack([lin + V, lin, V, dec]) / (dec + lin + V)
        below, above = (shares[:, of].mean(1).tolist() if of.any() else [None] * 4 for of in (low, ~low))
        r = [spearmanr(dec, share).statistic for share in shares]
        named = {key: dict(zip(names, four, strict=True)) for key, four in (
            ("r", r), ("below_0.2", below), ("above_0.2", above))}
        return named | dict(nfm_by_norm=[float(shares[0, of].mean()) for of in bins])
    def band(values):
        return np.percentile(values, (50, 2.5, 97.5), axis=0).T.tolist()
    rng, result = np.random.default_rng(seed), describe(lin, V)
    drawn = [describe(*rng.permutation([lin, V], axis=1)) for _ in range(shuffles)]
    r_shuffled = {name: band([each["r"][name] for each in drawn]) for name in names}
    return result | {f"{key}_untouched": value for key, value in describe(*untouched).items()} | dict(
        r_shuffled=r_shuffled, r_less_lowest_shuffled=result["r"]["nfm"] - r_shuffled["nfm"][1],
        r_norms=dict(linear=spearmanr(dec, lin).statistic, interaction=spearmanr(dec, V).statistic),
        nfm_by_norm_shuffled=band([each["nfm_by_norm"] for each in drawn]),
        bins=[float((dec[of] ** 2).mean()) for of in bins])

@torch.no_grad()
def feature_use(model, batches):
    """How an arm uses its features, a token: {path ("sae", "linear"): (3, F)}, the share of tokens that kept
    one, its mean value, and the squared error that cutting it would add."""
    F, tokens, use, paths = model.sae.F, 0, {}, {"sae": (model.sae.k, model.sae.W_dec)}
    if model.nfm:
        paths["linear"] = model.nfm.n, model.nfm.W_lin
    for x, _ in batches:
        code = model.sae.encode(x)
        error, tokens = sum(model(x).values()) - x, tokens + len(x)
        for path, (kept, W) in paths.items():
            f, ids = (part[:, :kept].contiguous() for part in code)
            fires, value, squares = (torch.bincount(ids.flatten(), each.double().flatten(), F)
                                     for each in (f > 0, f, f.square()))
            overlap = (sparse_outer(f, ids, error, F) * W).sum(1)
            added = squares * W.square().sum(1) - 2 * overlap              # |e - f w|² - |e|²
            use[path] = use.get(path, 0) + torch.stack([fires, value, added])
    return {path: (total / tokens).cpu().numpy() for path, total in use.items()}

def cost_exponent(interaction, n):
    """p in cost ~ n**p of an interaction function, from its best time of five at n and at 4 n features."""
    def seconds(size):
        code = torch.rand(256, size), torch.randint(1024, (256, size)), torch.rand(1024, 32)
        return min(timeit.repeat(functools.partial(interaction, *code), number=1, repeat=5))
    return math.log(seconds(4 * n) / seconds(n), 4)

def measure_decoder(W, W_start, use, seed):
    """What gram.json says of a decoder W (F, D), where it started, and its features' use; and resamples."""
    stats, (fires, value, added) = gram_stats(W), use
    squared, spectrum = (stats.pop(key).cpu().numpy() for key in ("squared_norms", "spectrum"))
    stats |= find_modes(squared, seed=seed)
    boundary, active = stats["antimode"] or 0.2, value / np.maximum(fires, 1e-30)      # where it fires
    norm, moved = (rows.norm(dim=1).cpu().numpy() for rows in (W, W - W_start))
    columns = dict(fires=fires, value=active, moved=moved, norm=norm, scale_free=norm * active,
                   function=norm * value, ablation=added / W.shape[1])
    for label, here in (("below", squared < boundary), ("above", squared >= boundary)):
        if here.any():
            stats[f"norm² {label} {boundary:.2g}"] = dict(features=int(here.sum())) | {
                key: float(column[here].mean()) for key, column in columns.items()}
    counts, edges = np.histogram(np.log10(squared), 60)
    return stats | {"below_0.2": float((squared < 0.2).mean()), "negative": (W < 0).double().mean().item(),
                    "initial_squared_norm": W_start.square().sum(1).mean().item(),
                    "explained": (spectrum.cumsum() / spectrum.sum()).tolist(),
                    "edges": (10 ** edges).tolist(), "counts": counts.tolist()}

def measure_gram(cfg):
    """Stage `gram`: decoders of sae and joint, same tokens; claims 8 to 10 and 13 beside their controls."""
    from scipy.stats import spearmanr
    data, models = open_arms(cfg, only=("sae", "joint"))
    torch.manual_seed(cfg.seed)                           # where the training of both started from
    start = make_arm("joint", **sizes_of(cfg, data.D)).to(cfg.device).requires_grad_(False)
    joint, sae = models["joint"], models["sae"]
    use_sae, use = (feature_use(model, held_out_batches(cfg, data, "test", cfg.eval_tokens))
                    for model in (sae, joint))
    both = np.stack([*use["sae"][:2], np.full(sae.sae.F, math.nan)])       # no one cut is of both decoders
    arms = {name: measure_decoder(*decoder, cfg.seed) for name, *decoder in (
        ("sae", sae.sae.W_dec, start.sae.W_dec, use_sae["sae"]),
        ("joint", joint.sae.W_dec, start.sae.W_dec, use["sae"]),
        ("joint W_lin", joint.nfm.W_lin, start.nfm.W_lin, use["linear"]),
        ("joint folded", joint.sae.W_dec + joint.nfm.W_lin, start.sae.W_dec + start.nfm.W_lin, both))}
    drawn_sae, drawn, *_ = (arm.pop("resamples") for arm in arms.values())
    more = [arms["joint"]["bimodality"] - arms["sae"]["bimodality"],
            *np.percentile(drawn - drawn_sae, (2.5, 97.5))]
    (dec, lin, V), (_, *untouched) = (
        [W.norm(dim=1).cpu().numpy() for W in (m.sae.W_dec, m.nfm.W_lin, m.nfm.V)] for m in (joint, start))
    f_dec, f_lin, used = dec * use["sae"][1], lin * use["linear"][1], use["linear"][0] > 0
    by_function = spearmanr(dec[used], (f_lin / (f_dec + f_lin + 1e-30))[used]).statistic
    arms["joint"] |= dict(
        share=norm_shares(dec, lin, V, untouched, seed=cfg.seed) | dict(r_function=by_function),
        bimodality_less_sae=np.minimum(more, math.inf if arms["joint"]["modes"] > 1 else 0).tolist(),
        cost_exponent=dict(pairwise=cost_exponent(fm_interaction_pairwise, 16),
                           identity=cost_exponent(fm_interaction, 256)))
    arms["sae"]["first_50_untouched"] = first_50 = gram_stats(sae.sae.W_dec + start.nfm.W_lin)["first_50"]
    arms["joint folded"]["first_50_less_sae"] = arms["joint folded"]["first_50"] - first_50
    about = ["Decoder rows by squared norm: below and above the antimode, or else 0.2"]
    for name, arm in arms.items():
        low, *rest = (entry for part, entry in arm.items() if part.startswith("norm²"))
        for high in rest:                                 # one, or none
            fires, moved = (low[key] / max(high[key], 1e-30) for key in ("fires", "moved"))
            about.append(f"{name}: features of low norm fire {fires:.2f} times as often as the others, and "
                         f"moved {moved:.2f} times as far")
    return dict(arms=arms, about=about)


# ------------------------------------------------------------------------------------------ secondary
# Claim 12: a second TopK SAE decomposes m, what the interaction holds behind its first matrix; its features
# are meant to be combinations. The same loop trains it, on the same stream, read by an encoder that goes on
# to m.

def secondary_of(cfg, name, model, data):
    """The secondary SAE of an arm, which stage `secondary` trains, and what open_data gives, but for m: D is
    K, and the standardiser takes raw activations to standardised m. UserError if there is none."""
    path, K = cfg.run / f"{name}.secondary.safetensors", cfg.embedding
    mine = types.SimpleNamespace(**vars(data) | dict(D=K))
    def read(raw):
        return model.nfm.post_mlp1(*model.sae.encode(data.standardiser.encode(raw)))
    if not path.exists() and cfg.stage != "secondary":
        raise UserError(f"there is no {path}: run the stage `secondary` first")
    if not path.exists():
        own = types.SimpleNamespace(**vars(cfg) | dict(features=25 * K, k=max(1, K // 2)))   # k: 2 % of them
        mine.standardiser, _ = estimate_standardiser(
            data.lm, cfg.layer, data.stream("train"), skip=data.skip, read=read)
        train_pass(own, mine, {path.stem: [new_candidate(own, path.stem, lr, K) for lr in cfg.lr]})
    secondary = load_arm(path).to(cfg.device)
    mine.standardiser = Standardiser(secondary.standardiser.mean, secondary.standardiser.std, read)
    return secondary, mine

def secondary_code(secondary, m):
    """Dense features of a secondary SAE: m (B, K) -> (B, 25·K)."""
    values, indices = secondary.sae.encode(secondary.standardiser.encode(m))
    return values.new_zeros(len(m), secondary.sae.F).scatter_add(1, indices, values)

def measure_secondary(cfg):
    """Stage `secondary`: a TopK SAE on the m of joint and of sequential; claim 12 beside its controls."""
    (data, models), arms = open_arms(cfg, of=("joint", "sequential")), {}
    for name, model in models.items():
        secondary, mine = secondary_of(cfg, name, model, data)
        replaced = copy.deepcopy(model)                   # its x_int is that of the reconstructed m
        replaced.nfm.interaction = lambda m, nfm=model.nfm, sae=secondary: nfm.interaction(
            sae.standardiser.decode(sae(sae.standardiser.encode(m))["sae"]))
        of_m, of_x = (
            evaluate(those, held_out_batches(cfg, of, "test", cfg.eval_tokens), std=of.standardiser.std)
            for those, of in (({"m": secondary}, mine), ({"m": model, "m_hat": replaced}, data)))
        values, indices = model.sae.encode(next(held_out_batches(cfg, data, "test", cfg.eval_tokens))[0])
        none, one, two = (secondary_code(secondary, model.nfm.post_mlp1(       # of a token's largest features
            values[:, :2] * values.new_tensor(kept), indices[:, :2])) for kept in ([0, 0], [1, 0], [1, 1]))
        moved = [((code - none).abs() > 1e-3).any(0).double().mean().item() for code in (one, two)]
        mse, mse_replaced = of_x["m"]["mse"], of_x["m_hat"]["mse"]["full"]
        arms[name] = dict(
            features=secondary.sae.F, fvu=of_m["m"]["fvu"]["full"], dead=secondary.config["dead"],
            mse=mse["full"], mse_replaced=mse_replaced, mse_without=mse["sae+linear"],
            moved_by_one=moved[0], moved_by_two=moved[1])
    return dict(arms=arms, about=["Secondary SAEs: 25·K features on standardised m, the tokens of the arms"])


# ------------------------------------------------------------------------------------------ anova
# Claim 11: clamp one secondary feature: do two factors of a text interact in what the model says next? The
# paper reads the logits of four word lists, but any fixed vector moves those non-additively, so random ones
# stand beside. Integration is where the clamp does more in some cells of sentences than factors add up to.
# Openings and continuations are crossed: no word goes with a factor by accident. Half chooses, half tests.

STIMULI = {   # two factors of two levels each: openings vary the first, continuations the second
    "docs": dict(openings=dict(
            reference=["Return type and behavior:", "Class reference:", "Method of the base class:",
                       "Function signature and result:", "Attributes and values:", "Low level interface:"],
            tutorial=["In this example we see that", "Let us try it now:", "As you can see below,",
                      "First, you can check that", "Suppose you run it:", "To get started, note that"]),
        continuations=dict(
            error=["the call raises a ValueError for this input", "an exception is raised if shapes differ",
                   "the operation fails on empty arrays", "a warning is issued, the result is nan",
                   "it is not supported and raises a TypeError", "the index is out of bounds"],
            success=["the call returns a new array of the same shape", "the result has the given dtype",
                     "the values are sorted along the last axis", "the output is as large as the input",
                     "it is equal to the sum of the elements", "the matrix is computed in place"]),
        words={"reference/error": "raise error exception warning deprecated nan None empty",
               "reference/success": "returns array dtype axis shape object default float",
               "tutorial/error": "not cannot fail but errors zero negative should",
               "tutorial/success": "example we you see use now can here"},
        prompts=["The following is", "It is the", "This value and the", "See also the", "For the input of"]),
    "formality-emotion": dict(openings=dict(
            formal=["The committee wishes to state that", "We hereby inform you that", "It is noted that",
                    "The undersigned confirms that", "Please be advised that", "The board concluded that"],
            informal=["Hey, so guess what,", "Ok look, honestly,", "Dude, I swear", "Yeah so anyway,",
                      "You know what,", "Oh man, turns out"]),
        continuations=dict(
            emotional=["they are heartbroken about the loss", "everyone is terrified of the storm",
                       "the family is so happy about the baby", "she is furious about the lie",
                       "he loves this old house so much", "the children cried all night"],
            neutral=["the meeting starts at noon", "the paper has ten pages", "the office is upstairs",
                     "the train leaves at six", "the table is made of wood", "the box is next to the door"]),
        words={"formal/emotional": "grief sorrow gratitude delighted anguish admiration joy regret",
               "formal/neutral": "document procedure committee report item provision notice therefore",
               "informal/emotional": "love hate awesome crazy sad happy mad scared",
               "informal/neutral": "stuff thing guy okay bit kind lot got"},
        prompts=["The next word is", "It was the", "They said that the", "This is about the", "And then a"])}

def load_stimuli(source):
    """Stimuli by name, or from a JSON file of the same form. UserError naming the cell that is malformed."""
    stimuli = STIMULI.get(source) or read_json(source)
    parts = {part: cells for part, cells in stimuli.items() if isinstance(cells, dict)}
    lists, words = {"prompts": stimuli.get("prompts")}, {}
    for part in ("openings", "continuations"):
        sizes = [len(texts) if isinstance(texts, list) else 0 for texts in parts.get(part, {}).values()]
        if len(sizes) != 2 or sizes[0] != sizes[1] or sizes[0] < 4 or sizes[0] % 2:
            raise UserError(f"stimuli {source}: {part!r} must be two levels, lists of 4, 6, … strings each")
        lists |= {f"{part}/{level}": texts for level, texts in parts[part].items()}
    for cell in map("/".join, itertools.product(parts["openings"], parts["continuations"])):
        texts = parts.get("words", {}).get(cell)
        words[cell] = lists[f"words/{cell}"] = texts.split() if isinstance(texts, str) else texts
    for cell, texts in lists.items():
        if not (isinstance(texts, list) and texts and all(isinstance(t, str) and t.strip() for t in texts)):
            raise UserError(f"stimuli {source}: {cell!r} must be a list of strings")
    return stimuli | dict(words=words)

def word_tokens(tokenizer, words, source):
    """A word stands for its first token after a space: {cell: words} -> ({cell: ids}, words that are dropped,
    their token being unknown or shared). Raises UserError where fewer than 4 are left in a cell."""
    def first(word):
        bare, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", f"a {word}"))
        return ids[len(bare)] if len(ids) > len(bare) else None
    every = [(cell, word, first(word)) for cell, listed in words.items() for word in listed]
    tokens = [token for *_, token in every]
    bad = {token for token in tokens if tokens.count(token) > 1} | {None, tokenizer.unk_token_id}
    kept = {cell: [token for its, _, token in every if its == cell and token not in bad] for cell in words}
    if short := [f"{cell} ({len(ids)})" for cell, ids in kept.items() if len(ids) < 4]:
        raise UserError(f"stimuli {source}: fewer than 4 words have own tokens in {', '.join(short)}")
    return kept, [word for _, word, token in every if token in bad]

def fitted(y, *effects):
    """Least-squares fit of y (units, …) by a constant and effects, arrays of labels (units,)."""
    X = np.hstack([np.ones((len(y), 1))] + [np.equal.outer(labels, np.unique(labels)) for labels in effects])
    return X @ np.linalg.lstsq(X, y)[0]

@np.errstate(divide="ignore", invalid="ignore")
def two_way_anova(y, a, b):
    """Two-way ANOVA: y (units,) or (units, columns), labels a, b (units,) -> F_a p_a F_b p_b F_ab p_ab and
    eta2_ab (partial), for each column. Type II: a main effect is beyond the other, not beyond the interaction
    (Yates, 1934), over the full model's error. ValueError for an empty cell, or none of two units."""
    from scipy.stats import f as f_distribution
    a, b = (np.unique(labels, return_inverse=True)[1] for labels in (a, b))
    y, cell, n_a, n_b = np.asarray(y, dtype=float), a * (b.max() + 1) + b, a.max() + 1, b.max() + 1
    freedom = len(y) - n_a * n_b
    if len(np.unique(cell)) < n_a * n_b or not freedom:
        raise ValueError("every cell needs a unit, and one of them two")
    no_a, no_b, additive, error = (((y - fitted(y, *effects)) ** 2).sum(0)
                                   for effects in ([b], [a], [a, b], [cell]))
    result = dict(eta2_ab=(additive - error) / np.maximum(additive, 1e-300))
    for name, gone, df in (("a", no_a - additive, n_a - 1), ("b", no_b - additive, n_b - 1),
                           ("ab", additive - error, (n_a - 1) * (n_b - 1))):
        result[f"F_{name}"] = F = gone / df / (error / freedom)
        result[f"p_{name}"] = f_distribution.sf(F, df, freedom)
    return result

def share_beyond(statistics, own):
    """Share of the finite statistics that reach `own`; nan if it is not finite itself."""
    return float((statistics[np.isfinite(statistics)] >= own).mean()) if np.isfinite(own) else math.nan

def freedman_lane(y, a, b, *, permutations=999, seed=0):
    """Permutation p of the interaction in y (units,), of additive residuals (Freedman and Lane, 1983)."""
    rng, fit = np.random.default_rng(seed), fitted(y, a, b)
    left = np.stack([y - fit] + [rng.permutation(y - fit) for _ in range(permutations)], 1)
    statistic = two_way_anova(fit[:, None] + left, a, b)["F_ab"]
    return share_beyond(statistic, statistic[0] * (1 - 1e-9))

def crossed_p(y):
    """p of an interaction in y (openings, continuations), the first half of each of one level: the larger p
    of two t-tests, on a contrast an opening and on one a continuation, which cells share (Clark, 1973)."""
    from scipy.stats import ttest_ind
    halves = (np.split(table, 2, axis=1) for table in (y, y.T))
    contrasts = [first.mean(1) - second.mean(1) for first, second in halves]
    return float(np.max([ttest_ind(*np.split(each, 2)).pvalue for each in contrasts]))

def spliced_texts(cfg, data, model, secondary, texts):
    """Texts with x_hat spliced in behind the first position: a namespace of `of` (rows,), the text of each
    such row, -1 on padding; codes {"secondary", "primary" (as the NFM reads it): (rows, features)}, there 0;
    logits(secondary=change of m, primary=change of x_hat), (texts, vocabulary), of the next token."""
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    bos = [data.tokenizer.bos_token_id] * (data.tokenizer.bos_token_id is not None)
    ids = [torch.tensor(bos + data.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    tokens, last = pad(ids).to(cfg.device), torch.tensor([len(row) - 1 for row in ids])
    of = pad([torch.full_like(row[data.skip:], at) for at, row in enumerate(ids)], padding_value=-1)
    of = of.flatten().to(cfg.device)
    x = data.standardiser.encode(capture(data.lm, cfg.layer, tokens)[:, data.skip:].float()).flatten(0, 1)
    values, indices = model.sae.encode(x)
    parts, m, n = model(x), model.nfm.post_mlp1(values, indices), model.nfm.n
    read = x.new_zeros(len(x), model.sae.F).scatter_add(1, indices[:, :n], values[:, :n])
    codes = {path: code * (of >= 0)[:, None]
             for path, code in (("secondary", secondary_code(secondary, m)), ("primary", read))}
    def logits(secondary=0.0, primary=0.0):
        x_hat = parts["sae"] + parts["linear"] + model.nfm.interaction(m + secondary) + primary
        new = data.standardiser.decode(x_hat).view(len(ids), -1, data.D)
        return splice_in(data, cfg.layer, tokens, new)[torch.arange(len(ids)), last].double()
    return types.SimpleNamespace(of=of, logits=logits, codes=codes)

def choose_features(found, tested, prompts, a, b):
    """Features that stand out in `found`, {why: (path, feature)}: secondary by variance over the cells or
    interaction F, primary by the F of a factor; of those active in both a prompt and a sentence of `tested`:
    how often they are there, {path: (features,)}. Raises UserError if none is."""
    chosen, activity, lengths = {}, {}, (found.of >= 0).view(len(a), -1).sum(1, keepdim=True)
    for path, code in tested.codes.items():
        active, in_prompt = code > 0, tested.of < prompts
        in_both = active[in_prompt].any(0) & active[~in_prompt].any(0)
        activity[path] = (active.sum(0) * in_both).cpu().numpy()
        if not in_both.any():
            raise UserError(f"no {path} feature is active both in a prompt and in a sentence")
        means = (found.codes[path].view(len(a), -1, code.shape[1]).sum(1) / lengths).cpu().numpy()
        anova, cells = two_way_anova(means, a, b), [means[2 * a + b == cell].mean(0) for cell in range(4)]
        scores = {"secondary": dict(variance=np.var(cells, axis=0), interaction=anova["F_ab"]),
                  "primary": {"first factor": anova["F_a"], "second factor": anova["F_b"]}}[path]
        for why, score in scores.items():
            chosen[why] = path, int(np.where(activity[path] > 0, np.nan_to_num(score), -1).argmax())
    return chosen, activity

def measure_clamps(cfg, data, model, secondary, stimuli, words):
    """Claim 11 for one arm and set of stimuli: {why chosen: results} of features chosen on one half of these
    and clamped to -4 times themselves on the other, beside their nulls. UserError if none can be."""
    openings, continuations = (np.array([*stimuli[part].values()]).reshape(2, 2, -1)   # (level, half, text)
                               for part in ("openings", "continuations"))
    first, second = ([*map(" ".join, itertools.product(openings[:, half].flat, continuations[:, half].flat))]
                     for half in (0, 1))
    prompts, shape = len(stimuli["prompts"]), (2, openings.shape[2], 2, continuations.shape[2])
    a, b = np.indices(shape)[::2].reshape(2, -1)          # levels of each sentence
    cell = np.repeat(range(4), [*map(len, words.values())])                # of each word
    word_ids, generator = list(itertools.chain(*words.values())), torch.Generator().manual_seed(cfg.seed)
    signs = torch.tensor(np.array([1, -1, -1, 1])[cell] / np.bincount(cell)[cell])
    found, tested = (spliced_texts(cfg, data, model, secondary, texts)
                     for texts in (first, stimuli["prompts"] + second))
    chosen, activity = choose_features(found, tested, prompts, a, b)
    rows = {"secondary": secondary.sae.W_dec * secondary.standardiser.std, "primary": model.nfm.W_lin}
    unclamped, results = tested.logits(), {}

    @functools.cache
    def clamp(path, feature, c=-4, direction=None):
        """Effects on the words' logits, over prompts, and on the token after each sentence."""
        row = rows[path][feature] if direction is None else direction
        logits = tested.logits(**{path: (c - 1) * tested.codes[path][:, feature, None] * row})
        moved = (logits - unclamped)[:, word_ids].cpu()
        return dict(words=moved[:prompts].mean(0).numpy(), contrast=(moved[prompts:] @ signs).numpy(),
                    kl=kl_divergence(unclamped, logits)[prompts:].cpu().numpy())

    for why, (path, feature) in chosen.items():
        own, v = clamp(path, feature), torch.randn(100, rows[path].shape[1], generator=generator)
        v = v * rows[path][feature].norm().cpu() / v.norm(dim=1, keepdim=True)
        nulls = {"random": [clamp(path, feature, direction=row) for row in v.to(rows[path])]}
        for other, counts in activity.items():            # nearest in activity first
            near = np.argsort(abs(counts - activity[path][feature]), kind="stable").tolist()
            near = [(other, i) for i in near if counts[i] and (other, i) != (path, feature)]
            nulls[other] = [clamp(*each) for each in near[:100]]
        results[why] = entries = dict(
            feature=feature, stimuli="/".join([*stimuli["openings"], *stimuli["continuations"]]),
            nulls={null: len(many) for null, many in nulls.items()},
            dose={c: [float(clamp(path, feature, c)["words"][cell == k].mean()) for k in range(4)]
                  for c in (-4, 0, 1, 4)})
        for measure, labels in (("words", (cell // 2, cell % 2)), ("kl", (a, b)), ("contrast", (a, b))):
            y = own[measure]
            entries[measure] = entry = {key: float(value) for key, value in two_way_anova(y, *labels).items()}
            for null, many in nulls.items():
                F = [entry["F_ab"], *(two_way_anova(each[measure], *labels)["F_ab"] for each in many)]
                entry[f"p_{null}"] = share_beyond(np.array(F), F[0])
            if measure == "words":
                entry["p_permuted"] = freedman_lane(y, *labels, seed=cfg.seed)
            else:   # the worst of three: t-tests with texts as units; random directions, which fire alike, so
                # that firing more in one cell is not taken for integration; the clamps of other features
                entry["p_crossed"] = crossed_p(y.reshape(2 * shape[1], -1))
                entry["p"] = max(entry["p_crossed"], entry["p_random"], entry["p_secondary"])
    return results | dict(cells=list(words))

def measure_anova(cfg):
    """Stage `anova`: clamp secondary features on texts of two factors; claim 11 beside its controls."""
    sets, arms = {source: load_stimuli(source) for source in cfg.stimuli.split(",")}, {}
    data, models = open_arms(cfg, of=("joint", "sequential"), whole=True)
    data.lm.float()                                       # half precision is coarser than the effects
    about = ["Clamping to -4 times. `words` alone shows no integration: any fixed vector moves four lists of "
             "words non-additively.", "Effects proportional to |c - 1| are one observation, however many "
             "multipliers c; a p against nulls is at least 1 / (1 + their number)."]
    for (source, stimuli), (name, model) in itertools.product(sets.items(), models.items()):
        secondary, _ = secondary_of(cfg, name, model, data)
        key = f"{name} ({source})" if name in arms else name
        try:
            words, dropped = word_tokens(data.tokenizer, stimuli["words"], source)
            arms[key] = measure_clamps(cfg, data, model, secondary, stimuli, words)
            if name == "joint":
                about += [f"{source}: words dropped, token unknown or shared: {' '.join(dropped) or 'none'}"]
        except UserError as error:
            about.append(f"refused, {name} on {source}: {error}")
    return dict(arms=arms, about=about)


# ------------------------------------------------------------------------------------------ pairs
# Is there nonlinear integration in a real model? A gain does not tell, so ask without one: where both
# features of a pair are active, does the product of their values predict what `sae` leaves, beyond either
# value and its square? Asked on held-out documents, of the pairs that a trained NFM ranks highest by their
# interaction: the second difference of its nonlinear path, q(a+b) - q(a) - q(b) + q(0), at the features' mean
# values. And asked of pairs alike in how often and how strongly they meet, which the ranking passed over.

FOLDS = 5                                                 # of documents, for cross-fitting

def count_pairs(model, batches, *, most=16):
    """Pairs that meet among the `most` largest features of a token that the NFM reads: pairs (P, 2), the
    tokens in which each meets (P, FOLDS), by the document's number modulo FOLDS, and every feature's mean
    value where it is active (F,)."""
    F, n, device = model.sae.F, model.nfm.n, model.sae.W_dec.device
    total, fires = torch.zeros(2, F, device=device)
    keys, counts = torch.zeros(2, 0, dtype=torch.long, device=device)
    places = torch.triu_indices(min(most, n), min(most, n), 1)
    for x, numbers in batches:
        values, indices = (code[:, :n].contiguous() for code in model.sae.encode(x))
        total.index_add_(0, indices.flatten(), values.flatten())
        fires.index_add_(0, indices.flatten(), (values > 0).float().flatten())
        first, second = indices[:, places].sort(1).values.unbind(1)
        new = ((first * F + second) * FOLDS + numbers[:, None] % FOLDS)[values[:, places[1]] > 0]
        keys, at = torch.cat([keys, new]).unique(return_inverse=True)
        counts = torch.zeros_like(keys).index_add_(0, at, torch.cat([counts, torch.ones_like(new)]))
    pairs, at = (keys // FOLDS).unique(return_inverse=True)
    by_fold = counts.new_zeros(len(pairs), FOLDS).index_put((at, keys % FOLDS), counts)
    return torch.stack([pairs // F, pairs % F], 1), by_fold, total / fires.clamp_min(1)

def pair_interaction(nfm, pairs, mean):
    """Second difference (P, D) of the nonlinear path for pairs (P, 2), at features' mean values (F,)."""
    both, first, second, none = (nfm.interaction(nfm.post_mlp1(mean[pairs] * pairs.new_tensor(mask), pairs))
                                 for mask in ((1, 1), (1, 0), (0, 1), (0, 0)))
    return both - first - second + none

def partial_r2(y, a, b, folds):
    """Cross-fitted partial R² of a·b in y (N, D), beyond a, b, a², b² and a constant: a, b (N,). Each fold, a
    label of folds (N,), is predicted by least squares from the others. Below 0 where the product adds nothing
    but noise, 0 where there is nothing to predict."""
    X = np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], 1)
    X[:, 1:] = (X[:, 1:] - X[:, 1:].mean(0)) / (X[:, 1:].std(0) + 1e-12)
    errors = np.zeros(2)                                  # without the product, with it
    for fold in np.unique(folds):
        fit, held = folds != fold, folds == fold
        for number, some in enumerate((X[:, :5], X)):
            predicted = some[held] @ np.linalg.lstsq(some[fit], y[fit])[0]
            errors[number] += ((y[held] - predicted) ** 2).sum()
    return float(1 - errors[1] / errors[0]) if errors[0] else 0.0

@torch.no_grad()
def pair_r2(model, sae, batches, pairs, directions):
    """partial_r2 of pairs (P, 2) of a model's features, as its NFM reads them, in what the arm `sae` leaves
    of the tokens in which both are active, folds being of documents: (2, P), in all of that, and in that
    along each pair's own of the directions (P, D)."""
    met, left, rows = [], [], 0
    for x, numbers in batches:
        values, indices = (code[:, :model.nfm.n] for code in model.sae.encode(x))
        a, b = x.new_zeros(len(x), model.sae.F).scatter_add(1, indices, values)[:, pairs].unbind(2)   # (B, P)
        row, pair = ((a > 0) & (b > 0)).nonzero(as_tuple=True)
        met.append(torch.stack([part.double() for part in (
            pair, row + rows, numbers[row] % FOLDS, a[row, pair], b[row, pair])]).cpu())
        left.append((x - sum(sae(x).values())).cpu())
        rows += len(x)
    met, left = torch.cat(met, 1).numpy(), torch.cat(left).numpy()
    met = met[:, met[0].argsort(kind="stable")]
    by_pair = np.split(met, np.searchsorted(met[0], range(1, len(pairs))), axis=1)
    ys = ((left[row.astype(int)], *rest) for _, row, *rest in by_pair)
    return np.transpose([(partial_r2(y, a, b, fold), partial_r2(y @ direction[:, None], a, b, fold))
                         for (y, fold, a, b), direction in zip(ys, directions.cpu().numpy(), strict=True)])

def matched_controls(covariates, top, *, each=20):
    """For each of the first `top` rows of covariates (P, columns), by turns, the nearest of the other rows
    that is not taken yet, in units of the columns' std: indices (top, each), or fewer where rows are few."""
    scaled, free = covariates / (covariates.std(0) + 1e-12), list(range(top, len(covariates)))
    chosen = [[] for _ in range(top)]
    for _, row in itertools.product(range(min(each, len(free) // top)), range(top)):
        nearest = ((scaled[free] - scaled[row]) ** 2).sum(1).argmin()
        chosen[row].append(free.pop(int(nearest)))
    return np.array(chosen)

def rank_test(own, controls, *, permutations=9999, seed=0):
    """One-sided permutation p that own (N,) exceed their controls (N, m), by their mean rank among these:
    were they alike, any of the 1 + m could stand for its set."""
    from scipy.stats import rankdata
    ranks, rng = rankdata(np.column_stack([own, controls]), axis=1), np.random.default_rng(seed)
    drawn = ranks[range(len(own)), rng.integers(ranks.shape[1], size=(permutations, len(own)))].sum(1)
    return float((1 + (drawn >= ranks[:, 0].sum()).sum()) / (1 + permutations))

def ranked_pairs(cfg, data, model):
    """Pairs of features that meet often enough to be tested, in 30 tokens of test text or more, in every fold
    and not in one alone, by falling interaction: pairs (P, 2), counts (P,), interactions (P, D), and mean
    values of all features (F,). Raises UserError if there are none."""
    pairs, by_fold, mean = count_pairs(model, held_out_batches(cfg, data, "test", cfg.eval_tokens))
    counts = by_fold.sum(1)
    often = (counts >= 30) & (by_fold.amin(1) > 0) & (counts - by_fold.amax(1) >= 12)
    if not often.any():
        raise UserError("no pair of features meets in 30 tokens of the test text: raise --eval-tokens")
    pairs, counts = pairs[often], counts[often]
    q = torch.cat([pair_interaction(model.nfm, some, mean) for some in pairs.split(4096)])
    order = q.norm(dim=1).argsort(descending=True)
    return pairs[order], counts[order], q[order], mean

@torch.no_grad()
def pair_test(cfg, data, model, sae, *, most=50):
    """The test of integration: the first `most` pairs of an arm's ranking that share no feature, for
    independence, against 20 controls each, alike in count and mean values but ranked below. Partial R² in
    what `sae` leaves, "whole" and "along" the interaction's direction (p there is too small: the NFM learned
    it from what TopK left): medians, permutation p, how many pass, beyond 0 and all controls: by chance 1 in
    21."""
    pairs, counts, q, mean = ranked_pairs(cfg, data, model)
    first, seen = [], set()
    for row, pair in enumerate(pairs[:len(pairs) // 2].tolist()):
        if not seen & {*pair} and len(first) < most:
            first.append(row)
            seen |= {*pair}
    if not first:
        raise UserError("only one pair of features meets in 30 tokens of test text: raise --eval-tokens")
    rest = list(range(first[-1] + 1, len(pairs)))
    rows = torch.tensor(first + rest, device=pairs.device)
    covariates = torch.cat([counts[rows, None].log(), mean[pairs[rows]].sort(1).values.log()], 1)
    controls = matched_controls(covariates.cpu().numpy(), len(first))
    tested = rows[[*range(len(first)), *controls.flat]]
    r2 = pair_r2(model, sae, held_out_batches(cfg, data, "test", cfg.eval_tokens), pairs[tested],
                 torch.nn.functional.normalize(q[tested], dim=1))
    result = dict(pairs=len(pairs), tested=len(first), controls=controls.shape[1])
    for part, each in zip(("whole", "along"), r2, strict=True):
        own, others = np.split(each, [len(first)])
        others = others.reshape(controls.shape)
        passed = own > np.maximum(0, others.max(1))
        result[part] = dict(r2=float(np.median(own)), r2_controls=float(np.median(others)),
                            p=rank_test(own, others, seed=cfg.seed), passed=int(passed.sum()))
        result.setdefault("passed", pairs[first][passed].tolist())          # of "whole"
    return result

@torch.no_grad()
def agreement(cfg, data, model, peer):
    """Do two training seeds rank pairs alike? Of ranked_pairs whose features both have a counterpart in the
    peer, each the other's nearest decoder row with a cosine of .7 or more: how many, and Spearman's r of
    their interactions over the product of their mean values, with which any NFM's would grow."""
    from scipy.stats import spearmanr
    (pairs, _, _, mean), ours, theirs = ranked_pairs(cfg, data, model), model.sae.W_dec, peer.sae.W_dec
    def nearest(A, B):
        B = torch.nn.functional.normalize(B, dim=1).T
        found = ((torch.nn.functional.normalize(rows, dim=1) @ B).max(1) for rows in A.split(1024))
        return map(torch.cat, zip(*found, strict=True))
    (cosine, there), (_, back) = nearest(ours, theirs), nearest(theirs, ours)
    same = (back[there] == torch.arange(len(there), device=there.device)) & (cosine >= 0.7)
    pairs = pairs[same[pairs].all(1)]
    mean_there = torch.zeros_like(mean).index_copy(0, there[same], mean[same])
    own, other = (pair_interaction(*of).norm(dim=1) / mean[pairs].prod(1) for of in (
        (model.nfm, pairs, mean), (peer.nfm, there[pairs], mean_there)))
    r = spearmanr(own.cpu(), other.cpu()).statistic if len(pairs) > 2 else math.nan
    return dict(shared=len(pairs), r=None if r != r else float(r))

def measure_pairs(cfg):
    """Stage `pairs`: does the product of two features predict what `sae` leaves? The test of integration."""
    data, models = open_arms(cfg, only=("sae",), of=("joint", "joint-interaction"))
    sae, about, peers = models.pop("sae"), [], {}
    for name, peer in itertools.product(models, cfg.peer or ()):
        path = pathlib.Path(peer) / f"{name}.safetensors"
        other = peers[name, peer] = load_arm(path).to(cfg.device)
        ours, theirs = (each.config["run"] | dict(D=each.config["D"], seed=None)
                        for each in (models[name], other))
        if ours != theirs or other.config["run"]["seed"] == cfg.seed:
            raise UserError(f"--peer: {path} must differ from this run in its seed, and in nothing else")
    arms = {name: pair_test(cfg, data, model, sae) for name, model in models.items()}
    for name, arm in arms.items():
        chance = arm["tested"] / (1 + arm["controls"])
        about.append(f"{name}: {arm['tested']} of {arm['pairs']:,} pairs that meet in 30 tokens or more, "
                     f"with {arm['controls']} controls each; {chance:.1f} would pass by chance")
    for (name, peer), other in peers.items():
        agreed = agreement(cfg, data, models[name], other)
        arms[name].setdefault("agreement", {})[f"seed {other.config['run']['seed']}"] = agreed
        about.append(f"{name} of {peer}: {agreed['shared']:,} of the pairs are there too; Spearman's r of "
                     f"the two rankings: {show(agreed['r'], 'share/r')}")
    return dict(arms=arms, about=about)


# ------------------------------------------------------------------------------------------ inspect
# What a feature or a pair of them stands for: where in held-out text it is strongest, which words it raises.
# A pair is strongest where the product of its two values is; the words are those whose logits its effect on x
# raises most, read off by the language model's last matrix as if no block came between.

def top_contexts(cfg, data, model, probes, *, count=4):
    """Where probes (make_probes) are largest in test text, a pair by the product of its features' values:
    {label: (share of tokens above 0, [(value, window's ids, position), …])}."""
    best, fires, tokens = {label: [] for label in probes}, dict.fromkeys(probes, 0), 0
    for ids, _ in held_out_windows(cfg, data, "test", cfg.eval_tokens):
        x = data.standardiser.encode(extract(data.lm, cfg.layer, ids, skip=data.skip))
        (values, indices), tokens = model.sae.encode(x), tokens + len(x)
        for label, (features, secondary, _) in probes.items():
            if secondary:
                scores = secondary_code(secondary, model.nfm.post_mlp1(values, indices))[:, features[0]]
            else:
                read = model.nfm.n if len(features) > 1 else model.sae.k     # a pair: read by the NFM
                scores = math.prod((values * (indices == feature))[:, :read].sum(1) for feature in features)
            fires[label] += int((scores > 0).sum())
            top = zip(*map(torch.Tensor.tolist, scores.topk(min(count, len(scores)))), strict=True)
            best[label] += [(value, ids[row // data.rows].tolist(), row % data.rows + data.skip)
                            for value, row in top if value > 0]
            best[label] = sorted(best[label], key=lambda hit: -hit[0])[:count]
    return {label: (fires[label] / tokens, best[label]) for label in probes}

def make_probes(cfg, data, model):
    """What to look at: {label: (features, secondary SAE or None, effect on x (D,))}: the features asked for,
    12 or s12, a secondary one; else pairs that pass the test of stage `pairs`; without such, those that meet
    in 30 tokens or more and interact most. Raises UserError."""
    probes, nfm = {}, model.nfm
    for asked in cfg.asked:
        secondary = secondary_of(cfg, cfg.arm, model, data)[0] if asked.startswith("s") else None
        W, number = (secondary or model).sae.W_dec, asked.removeprefix("s")
        if not re.fullmatch("[0-9]+", number) or int(number) >= len(W):
            raise UserError(f"arm {cfg.arm!r} has no feature {asked!r}: 12 is primary, s12 secondary")
        feature, row = int(number), W[int(number)]
        if secondary:
            standardiser = secondary.standardiser
            effect = nfm.interaction(standardiser.decode(row)) - nfm.interaction(standardiser.mean)
        else:
            effect = row + (nfm.W_lin[feature] if nfm.has_linear else 0)
        probes[f"feature {asked}"] = [feature], secondary, effect
    if not cfg.asked:
        path, arm = cfg.run / "results" / "pairs.json", f"{cfg.arm}.safetensors"
        tested = read_json(path) if path.exists() else {}
        fresh = lookup(tested, f"made_from/{arm}") == (cfg.run / arm).stat().st_mtime_ns
        passed = lookup(tested, f"arms/{cfg.arm}/passed") if fresh else None
        pairs, _, q, _ = ranked_pairs(cfg, data, model)
        chosen = [at for at, pair in enumerate(pairs.tolist()) if not passed or pair in passed]
        for (a, b), effect in zip(pairs[chosen[:cfg.pairs]].tolist(), q[chosen[:cfg.pairs]], strict=True):
            note = ", passes the pair test" if passed else ""
            probes[f"features {a} and {b}, interaction {effect.norm():.3f}{note}"] = [a, b], None, effect
    return probes

@torch.no_grad()
def measure_inspect(cfg):
    """Stage `inspect`: contexts and words of the features asked for, else of the pairs that interact most."""
    options = ARMS.get(cfg.arm.partition("@")[0])
    if options is None or options.get("pooling", "product") is None:
        raise UserError(f"arm {cfg.arm!r} has no interaction to inspect")
    (data, models), about, arms = open_arms(cfg, only=(cfg.arm,), whole=True), [], {}
    probes, head = make_probes(cfg, data, models[cfg.arm]), data.lm.get_output_embeddings().weight.float()
    def text(ids):
        return data.tokenizer.decode(ids, skip_special_tokens=True).replace("\n", " ")
    for label, (fires, best) in top_contexts(cfg, data, models[cfg.arm], probes).items():
        logits = head @ (probes[label][2] * data.standardiser.std)
        words = [text([token]) for token in logits.topk(6).indices.tolist()]
        shown = [f"{value:8.2f}  {text(ids[:at][-12:])}«{text([ids[at]])}»{text(ids[at + 1:at + 6])}"
                 for value, ids, at in best]
        about += [f"{label}; words raised: {' | '.join(words)}", *shown, ""]
        arms[label] = dict(fires=fires, words=words, contexts=shown)
    return dict(arms=arms, about=about)


# ------------------------------------------------------------------------------------------ ground truth
# Worlds whose answer is known. For the training loop a world is a language model of one block, and a token's
# id is the seed of what happens there. Planted and decoy pairs are equally often active together, but only
# planted ones then add a direction of their own, and in the null world (gamma = 0) none does. What an NFM
# finds in decoys, and what it gains in the null world, it shows where there is nothing to be found.

class World(torch.nn.Module):
    """x = Σ_i f_i d_i + gamma Σ_{planted (i, j)} f_i f_j c_ij + noise, as the input of a language model's
    only block. The seed draws unit directions d (G, D) and c (planted, D), and disjoint pairs (2·planted, 2),
    planted ones first, then decoys. An active f_i is uniform in [0.5, 1.5]; it is active by itself with
    probability `alone`, and together with its partner with probability `together`."""
    def __init__(self, seed, *, dims, features, planted, gamma, noise, alone, together):
        super().__init__()
        from transformers import PretrainedConfig
        self.config = PretrainedConfig(hidden_size=dims, num_hidden_layers=1)
        self.blocks = torch.nn.ModuleList([torch.nn.Identity()])
        self.gamma, self.noise, self.alone, self.together = gamma, noise, alone, together
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(features + planted, dims, generator=generator)
        self.d, self.c = (torch.nn.Parameter(rows, requires_grad=False) for rows in (
            torch.nn.functional.normalize(directions, dim=1).split([features, planted])))
        self.pairs = torch.randperm(features, generator=generator)[:4 * planted].view(-1, 2)

    def draw(self, ids):
        """f (W, T, G) and x (W, T, D) of windows of ids (W, T), each made from its first id."""
        drawn, T = [], ids.shape[1]
        for first in ids[:, 0].tolist():
            generator = torch.Generator().manual_seed(first)
            active = torch.rand(T, len(self.d), generator=generator) < self.alone
            active[:, self.pairs] |= torch.rand(T, len(self.pairs), 1, generator=generator) < self.together
            f = active * (0.5 + torch.rand(active.shape, generator=generator))
            drawn.append((f, torch.randn(T, self.d.shape[1], generator=generator)))
        f, noise = (torch.stack(parts).to(self.d.device) for parts in zip(*drawn, strict=True))
        products = f[..., self.pairs[:len(self.c)]].prod(-1)                # (W, T, planted)
        return f, f @ self.d + self.gamma * products @ self.c + self.noise * noise

    def forward(self, input_ids, use_cache=False):
        """As a language model's: what enters the block comes out as logits."""
        return types.SimpleNamespace(logits=self.blocks[0](self.draw(input_ids)[1]))

def train_in_world(cfg, constants, number, seed, names):
    """Train arms in a world, its `number` the seed, of constants (as in WORLD) through the ordinary loop:
    (cfg, data) as other stages have them, and {name: model}."""
    own = types.SimpleNamespace(**constants)
    fields = PRESETS["tiny"] | dict(
        preset="tiny", seed=seed, layer=0, features=own.features, k=own.k, n=own.k, top=own.k, window=256,
        embedding=own.embedding, batch=own.batch, lr=own.lr, tokens=own.steps * own.batch,
        chunk=20 * own.batch, eval_tokens=own.tests)
    key = zlib.crc32(f"{constants} {number} {seed}".encode())               # another world, another place
    run = cfg.run / "worlds" / f"{key:08x}"
    cfg = types.SimpleNamespace(**vars(cfg) | fields | dict(fields=fields, run=run, save_minutes=3))
    lm = World(number, **{name: constants[name] for name in (
        "dims", "features", "planted", "gamma", "noise", "alone", "together")}).to(cfg.device)
    def stream(split, **options):
        first = {"validation": 0, "test": 10 ** 6}.get(split, 10 ** 7 * (1 + seed))
        return ((0, window, np.full(256, first + window)) for window in itertools.count())
    data = types.SimpleNamespace(lm=lm, D=own.dims, stream=stream, skip=0, rows=256, standardiser=(
        estimate_standardiser(lm, 0, stream("validation"), skip=0)[0]))
    untrained = [name for name in names if not (run / f"{name}.safetensors").exists()]
    if untrained:
        train_pass(cfg, data, {name: [new_candidate(cfg, name, lr, data.D) for lr in cfg.lr]
                               for name in untrained})
    return cfg, data, {name: load_arm_of(cfg, name, data.D) for name in names}

@torch.no_grad()
def judge_arms(cfg, data, models):
    """What train_in_world gives, held against the truth: {arm: results}. matched: share of the true features
    with a decoder row, one each, of cosine .9 or more; conjunctions: planted pairs for which a feature fires
    in more than half of the tokens with both, and in less than a tenth of those with one; gain over `sae`
    (sae@2x for arms of that size) and over sae@matched. Of a pair's learned interaction: its strength, in raw
    units; auroc of planted against decoys; above_decoys, planted above 95 % of decoys; cosine with c_ij, the
    median."""
    from scipy.optimize import linear_sum_assignment
    from scipy.stats import mannwhitneyu
    world, std, P = data.lm, data.standardiser.std, len(data.lm.c)
    ids = torch.cat([ids for ids, _ in held_out_windows(cfg, data, "test", cfg.eval_tokens)])
    f, raw = (each.flatten(0, 1) for each in world.draw(ids))
    x, active, found = data.standardiser.encode(raw), f[:, world.pairs] > 0, {}
    both, one = active.all(2).float(), active.sum(2).eq(1).float()          # (B, 2·planted)
    mse = {name: (sum(model(x).values()) - x).square().mean().item() for name, model in models.items()}
    for name, model in models.items():
        cosine = torch.nn.functional.normalize(model.sae.W_dec * std, dim=1) @ world.d.T
        rows, features = linear_sum_assignment(-cosine.cpu())
        matched = torch.as_tensor(rows[features.argsort()], device=x.device)                   # (G,)
        values, indices = model.sae.encode(x)
        fires = x.new_zeros(len(x), model.sae.F).scatter_add(1, indices, (values > 0).float())
        conjunction = ((both.T @ fires > 0.5 * both.sum(0)[:, None])
                       & (one.T @ fires < 0.1 * one.sum(0)[:, None])).any(1)
        bases = ("sae@2x",) if name.endswith("@2x") else ("sae", "sae@matched")
        found[name] = entry = dict(
            mse=mse[name], matched=(cosine[rows, features] >= 0.9).double().mean().item(),
            conjunctions=int(conjunction[:P].sum()), decoy_conjunctions=int(conjunction[P:].sum()),
            gain={f"over {base.removesuffix('@2x')}": 1 - mse[name] / mse[base]
                  for base in bases if base in mse and base != name})
        if model.nfm:
            mean = count_pairs(model, [(x, torch.zeros_like(ids).flatten())])[2]
            q = pair_interaction(model.nfm, matched[world.pairs], mean) * std
            planted, decoy = q.norm(dim=1).cpu().double().numpy().reshape(2, P)
            entry |= dict(
                auroc=float(mannwhitneyu(planted, decoy).statistic) / P ** 2,
                above_decoys=float((planted > np.percentile(decoy, 95)).mean()),
                strength=dict(planted=float(np.median(planted)), decoy=float(np.median(decoy))),
                strengths=dict(planted=planted.tolist(), decoy=decoy.tolist()),
                cosine=torch.cosine_similarity(q[:P], world.c).median().item())
    return found

def in_world(job):
    """(label, what judge_arms finds) for a job (label, *arguments of train_in_world), silently, in a process
    of its own: on one thread, and Ctrl-C is its parent's business."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())                      # its own is a semaphore, left if we are ended
    label, *arguments = job
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
        return label, judge_arms(*train_in_world(*arguments))

def spread(entries):
    """Of nested dicts of figures, alike: each figure's [median, lowest, highest]; lists are joined."""
    def join(values):
        if isinstance(values[0], dict):
            return spread(values)
        if isinstance(values[0], list):
            return [*itertools.chain(*values)]
        return [float(np.median(values)), min(values), max(values)]
    return {key: join([entry[key] for entry in entries]) for key in entries[0]}

def measure_synth(cfg):
    """Stage `synth`: worlds whose answer is known: is it found, and what is gained from nothing?"""
    claim_run(cfg)
    bare = types.SimpleNamespace(**vars(cfg) | dict(lock=None))             # what can be sent to a process
    constants, null = {name: cfg.fields[f"world_{name}"] for name in WORLD}, dict(gamma=0.0)
    room, wide = dict(dims=4 * cfg.world_dims), dict(k=min(2 * cfg.world_k, cfg.world_features))
    kinds = {"planted": {}, "null": null, "null, 4x dims": null | room, "null, 2x k": null | wide,
             "null, both": null | room | wide, "null, none together": null | dict(together=0.0),
             "null, half the lr": null | dict(lr=[lr / 2 for lr in cfg.world_lr])}
    names = ("sae", "joint-interaction", "joint-mlp", "sae@matched", "sae@2x", "joint-interaction@2x")
    jobs = [(kind, bare, constants | changed, 1000 * cfg.seed + world, 1000 * cfg.seed + seed,
             names[:2] if "," in kind else names)         # the causes of a gain: two arms in one world
            for kind, changed in kinds.items() for seed in range(cfg.world_seeds)
            for world in range(1 if "," in kind else cfg.world_worlds)]
    arms, found = {name: {} for name in names}, {kind: [] for kind in kinds}
    with concurrent.futures.ProcessPoolExecutor(
            min(len(jobs), os.cpu_count()), multiprocessing.get_context("spawn")) as pool:
        try:
            for kind, judged in tqdm(pool.map(in_world, jobs), desc="worlds", total=len(jobs), disable=None):
                found[kind].append(judged)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError("a process that trained in a world died, for lack of memory perhaps; the same "
                            "command goes on after the worlds that are done") from error
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    for kind, judged in found.items():
        for name in judged[0]:
            arms[name][kind] = spread([each[name] for each in judged])
    gained = {kind: show(arm["gain"]["over sae"]) for kind, arm in arms["joint-interaction"].items()}
    return dict(arms=arms, about=[
        f"{cfg.world_worlds} worlds, {cfg.world_seeds} training seeds in each: medians [lowest, highest]; "
        "the causes: in the first world",
        f"Why does joint-interaction gain {gained['null']} where nothing interacts? With 4 times the "
        f"dimensions and twice the k, so",
        f"that sae leaves neither crosstalk between directions nor features beyond the k-th, it gains "
        f"{gained['null, both']}.",
        f"The first alone leaves {gained['null, 4x dims']}, the second {gained['null, 2x k']}; no pair "
        f"active together: {gained['null, none together']};",
        f"half the step size: {gained['null, half the lr']}."])


# ------------------------------------------------------------------------------------------ export
# Other libraries know one SAE on raw activations. A linear path on all k features folds into its decoder, and
# x = (raw - mean) / std into its weights, both exactly; an interaction into nothing.

@torch.no_grad()
def fold_standardiser(sae, standardiser):
    """The TopKSAE that reads and gives raw activations as `sae` does standardised ones."""
    folded, (mean, std) = copy.deepcopy(sae).double(), (each.double() for each in standardiser.buffers())
    folded.W_enc /= std
    folded.b_enc -= folded.W_enc @ mean
    folded.W_dec *= std
    folded.b_dec.mul_(std).add_(mean)
    return folded

def exported(sae, layer, language_model, form):
    """(folder, weights' file, weights, cfg.json) of a TopKSAE on raw activations, as form, "saelens" (version
    6) or "sparsify" (1.3), loads it."""
    W_enc, b_enc, W_dec, b_dec = (p.detach() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    F, D = W_enc.shape
    if form == "sparsify":                                # which takes b_dec off its input
        weights = {"encoder.weight": W_enc, "encoder.bias": b_enc + W_enc @ b_dec}
        weights |= dict(W_dec=W_dec, b_dec=b_dec)
        return f"layers.{layer - 1}" if layer else "embed_tokens", "sae.safetensors", weights, dict(
            activation="topk", expansion_factor=F // D, normalize_decoder=False, num_latents=F, k=sae.k,
            multi_topk=False, skip_connection=False, transcode=False, d_in=D)
    hook = f"blocks.{layer}.hook_resid_pre"
    about = dict(sae_lens_version="6.0.0", model_name=language_model, hook_name=hook)
    return ".", "sae_weights.safetensors", dict(W_enc=W_enc.T, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec), dict(
        architecture="topk", d_in=D, d_sae=F, k=sae.k, dtype="float32", device="cpu", metadata=about,
        apply_b_dec_to_input=False, normalize_activations="none", reshape_activations="none",
        rescale_acts_by_decoder_norm=False)

def run_export(cfg):
    """Stage `export`: write an arm that is one SAE as SAELens or sparsify load it, for raw activations."""
    path = cfg.run / f"{cfg.arm}.safetensors"
    if not path.exists():
        raise UserError(f"{cfg.run} has no trained arm {cfg.arm!r}: run the stage `train` first")
    model = load_arm(path)
    with blame(f"{cfg.arm} cannot be exported"):
        sae = fold_standardiser(fold_linear(model), model.standardiser)
    of, target = model.config["run"], cfg.run / "export" / f"{cfg.arm}-{cfg.format}"
    folder, name, weights, config = exported(sae, of["layer"], of["model"], cfg.format)
    with replacing(target) as temporary:
        (temporary / folder).mkdir(parents=True)
        save_file({key: W.float().contiguous() for key, W in weights.items()}, temporary / folder / name)
        write_json(temporary / folder / "cfg.json", config)
    print(f"export: {target}, {cfg.arm} of F = {sae.F:,} on raw activations entering block {of['layer']}")


# ------------------------------------------------------------------------------------------ plan
# What a run costs, before anything is downloaded. --measure times a step of each arm beside its limit, what
# no exact one goes without: the encoder's product and TopK, each by torch's usual function, and an Adam pass
# over the SAE's weights. From these times and a random language model's it projects those of the stages; text
# is taken to cost nothing.

def seconds(function, device="cpu", least=1.5):
    """Median time of a call, in the latter half of four or of as many as `least` seconds hold."""
    def call():
        function()
        if device != "cpu":
            torch.cuda.synchronize(device)
    times = []
    while len(times) < 4 or sum(times) < least:
        times.append(timeit.timeit(call, number=1))
    return float(np.median(times[len(times) // 2:]))

IN_NO_CACHE = 2 ** 22   # weights, with gradients and moments 64 MB: what is timed takes turns with others

def time_limit(cfg, D):
    """Seconds of what no training step of `sae` goes without."""
    x, W = (torch.randn(rows, D, device=cfg.device) for rows in (cfg.batch, cfg.features))
    pre, several = x @ W.T, 1 + IN_NO_CACHE // W.numel()
    weights = [torch.nn.Parameter(torch.zeros_like(W)) for _ in range(2 * several)]
    for weight in weights:
        weight.grad = torch.zeros_like(W)
    adam = torch.optim.Adam(weights, fused=True)
    return seconds(lambda: (x @ W.T, pre.topk(cfg.k)), cfg.device) + seconds(adam.step, cfg.device) / several

def time_arm(cfg, name, D, sizes):
    """Seconds of a training step of an arm of make_arm's `sizes` on B random tokens, and of evaluating it on
    one token."""
    dtype, x = getattr(torch, cfg.param_dtype), torch.randn(cfg.batch, D, device=cfg.device)
    parent = DualEncoder(TopKSAE(D, sizes["F"], sizes["k"])) if name in CHILDREN else None
    model = make_arm(name, D=D, parent=parent, **sizes).to(cfg.device, dtype).train()
    several = [model] + [copy.deepcopy(model) for _ in range(IN_NO_CACHE // count_parameters(model))]
    pairs = [(each, make_optimizer(each, lr=1e-4)) for each in several]
    step = seconds(lambda: [training_step(*pair, x.to(dtype), autocast=cfg.autocast) for pair in pairs],
                   cfg.device) / len(pairs)
    SPARE.clear()
    models, std = {name: model.float().eval()}, torch.ones(D, device=x.device)
    numbers = torch.zeros_like(x[:, 0], dtype=torch.long)
    return step, seconds(lambda: evaluate(models, [(x, numbers)], std=std), cfg.device) / len(x)

def time_lm(cfg, config):
    """Seconds a token of a random language model's forward up to cfg.layer, and of a whole one, spliced and
    judged; and of one of its training steps, where the run trains it."""
    from transformers import AutoModelForCausalLM
    with torch.device(cfg.device):
        dtype = torch.float32 if cfg.device == "cpu" else torch.bfloat16
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ids = torch.randint(lm.config.get_text_config().vocab_size, (32, cfg.window + 1), device=cfg.device)
    raw, data = capture(lm, cfg.layer, ids)[:, 1:], types.SimpleNamespace(lm=lm, skip=1)
    long, clean = ids.repeat(1, 128)[:16, :128], log_probabilities(splice_in(data, cfg.layer, ids, raw))
    clean = [(p, p.exp()) for p in clean]
    read, judged = (seconds(each, cfg.device) / ids.numel() for each in (
        lambda: extract(lm, cfg.layer, ids),
        lambda: judge(clean, splice_in(data, cfg.layer, ids, raw), ids[:, 1:])))
    if cfg.model != "tiny":
        return read, judged, 0.0
    return read, judged, seconds(lambda: lm(input_ids=long, labels=long).loss.backward(), cfg.device, least=5)

def time_worlds(cfg):
    """Seconds of stage `synth`: its jobs, one thread each, on all cores."""
    world = {name: getattr(cfg, f"world_{name}") for name in WORLD}
    own = types.SimpleNamespace(**world | dict(device="cpu", param_dtype="float32", autocast=False))
    lm = World(0, **{name: world[name] for name in (
        "dims", "features", "planted", "gamma", "noise", "alone", "together")})
    threads, ids = torch.get_num_threads(), torch.randint(1000, (math.ceil(own.batch / 256), 256))
    torch.set_num_threads(1)
    sizes = dict(F=own.features, k=own.k, n=own.k, K=own.embedding)
    step = sum(time_arm(own, name, own.dims, sizes)[0] for name in ("sae", "joint-interaction")) / 2
    drawn = seconds(lambda: lm.draw(ids))
    torch.set_num_threads(threads)
    full, short = 2 * own.worlds * own.seeds, 5 * own.seeds     # jobs of six arms, of two
    total = own.steps * ((full + short) * drawn + (6 * full + 2 * short) * len(own.lr) * step)
    return total / min(full + short, os.cpu_count())

def free_memory(device):
    """Bytes that are free on a device; without bound where the system does not tell."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", pathlib.Path("/proc/meminfo").read_text())[1])
    return math.inf

def project(cfg, config, needs, lm_needs):
    """Print how long a step of each arm takes on this machine and, projected, each stage of reproduce.sh.
    What needs more than the free memory is not timed: needs {arm: bytes}, lm_needs bytes."""
    for package in ("datasets", "scipy.stats"):           # which stages import
        importlib.import_module(package)
    start = time.process_time()
    D, rates, room, nothing = config.hidden_size, len(cfg.lr), free_memory(cfg.device), (math.nan,) * 3
    sizes = {name: size for name, size in sizes_of(cfg, D).items() if name != "D"}
    read, judged, learn = time_lm(cfg, config) if lm_needs < room else nothing
    alike = {name.removesuffix(NULL): need for name, need in needs.items()}      # a null twin costs the same
    timed = {name: time_arm(cfg, name, D, sizes) if need < room else nothing[:2]
             for name, need in alike.items()}
    limit = time_limit(cfg, D) if min(needs.values()) < room else math.nan
    print(*table(("arm", "ms a step", "x limit", "tokens a second"), *(
        (name, f"{1000 * step:.1f}", f"{step / limit:.2f}", f"{cfg.batch / step:,.0f}")
        for name, (step, _) in timed.items())), sep="\n")
    step, forward = (sum(timed[name.removesuffix(NULL)][at] for name in needs) for at in (0, 1))
    waves = [name.endswith(NULL) + (name.endswith(NULL) or name in CHILDREN) for name in needs]
    passes = sum(math.ceil(waves.count(wave) / cfg.at_once) for wave in range(3))
    paths = sum(1 if ARMS[name.partition("@")[0]] is None else 3 for name in needs if NULL not in name)
    T, E, B, F, K = cfg.tokens, cfg.eval_tokens, cfg.batch, cfg.features, cfg.embedding
    steps, code = cfg.chunk_epochs * math.ceil(T / B), read + np.max([each for _, each in timed.values()])
    small = time_arm(cfg, "sae", K, dict(F=25 * K, k=max(1, K // 2), n=1, K=1))[0]
    rows = torch.randn(min(4096, F), D, device=cfg.device)
    gram = seconds(lambda: gram_stats(rows), cfg.device) * (F / len(rows)) ** 2
    norms = np.random.default_rng(0).random((3, F))
    shares, modes = (seconds(each, least=0) for each in (
        lambda: norm_shares(*norms, norms[1:]), lambda: find_modes(norms[0])))
    of = dict(
        plan=0.0, lm=cfg.lm_steps * learn,
        train=(1e5 + passes * (T + E / 4)) * read         # the standardiser's, every pass's, validation
        + rates * (steps * step + (E / 4 + 50 * B) * forward),              # 50 entries of the log
        recon=E * (2 * read + forward),                   # of activations and of their null twins
        kl=cfg.kl_tokens * (2 * read + 2 * (1 + paths) * judged),           # and as many random errors
        gram=3 * E * code + 5 * gram + 4 * modes + shares,                  # of two arms and five decoders
        secondary=2 * ((1e5 + T + 3 * E) * code + rates * steps * small),   # of joint and of sequential
        anova=2 * 2 * 550 * 840 * judged,                 # arms, stimuli, clamps with nulls, tokens of texts
        pairs=9 * E * code, inspect=2 * E * code, synth=time_worlds(cfg), report=0.0)
    of = {stage: start + each for stage, each in of.items()}
    of["all"] = sum(of.values())
    print(*table(("stage", "minutes"), *(
        (name, f"{each / 60:.2f}" if each == each else "does not fit") for name, each in of.items())),
          sep="\n")

def run_plan(cfg):
    """Stage `plan`: parameters of a run and the memory that it takes; with --measure, the time as well."""
    from transformers import AutoConfig, AutoModelForCausalLM
    if cfg.model not in LM_CONFIGS and not pathlib.Path(cfg.model).is_dir():
        raise UserError(f"plan knows {', '.join(LM_CONFIGS)} and directories; {cfg.model} is neither")
    known = LM_CONFIGS.get(cfg.model) or read_json(pathlib.Path(cfg.model) / "config.json")
    with blame(f"{cfg.model} is not a language model that plan can read"), torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known))
    D, later = lm.config.get_text_config().hidden_size, find_blocks(lm, cfg.layer)[cfg.layer + 1:]
    used = count_parameters(lm.base_model) - count_parameters(later)
    arms, size = meta_arms(cfg, ("joint", *cfg.arms), D), getattr(torch, cfg.param_dtype).itemsize
    joint, sae = count_parameters(arms["joint"]), count_parameters(arms["joint"].sae)
    linear = (cfg.features + 1) * D
    print(f"preset {cfg.preset}: D={D:,} F={cfg.features:,} k={cfg.k:,} n={cfg.n} K={cfg.embedding}\n"
          f"joint: {joint / 1e6:.1f} M parameters:", ", ".join(
              f"{part} {count / 1e6:.1f} M ({show(count / joint)})" for part, count in (
                  ("SAE", sae), ("linear", linear), ("nonlinear", joint - sae - linear))))
    needs, rows = {}, [("arm", "M parameters", f"GB at {len(cfg.lr)} learning rate(s)", "more in a step")]
    for name in cfg.arms:                                 # weights, Adam's two moments; gradients, two (B, F)
        whole = count_parameters(arms[name])
        trained = sum(p.numel() for p in arms[name].parameters() if p.requires_grad)
        held, on_top = len(cfg.lr) * (whole + 2 * trained), trained + 2 * cfg.batch * arms[name].learner.F
        needs[name] = 4 * (whole + 3 * trained + 3 * cfg.batch * arms[name].learner.F)
        rows.append((name, f"{whole / 1e6:.1f}", f"{size * held / 1e9:.2f}", f"{size * on_top / 1e9:.2f}"))
    print(*table(*rows), sep="\n")
    print(f"language model: {count_parameters(lm) / 1e6:,.1f} M parameters, {used / 1e6:,.1f} M in use: "
          f"{2 * used / 1e9:.2f} GB on a GPU, twice that on a CPU; a chunk of activations: "
          f"{4 * D * min(cfg.chunk, cfg.tokens) / 1e9:.2f} GB")
    if cfg.measure:
        width = 4 if cfg.device == "cpu" else 2           # bytes
        project(cfg, lm.config.get_text_config(), needs, width * count_parameters(lm))


# ------------------------------------------------------------------------------------------ report
# Every claim beside its control in one file, and a figure for each question that a table answers badly.

def draw(path, panels):
    """Draw panels, (axes' settings, series), side by side; a series: (Axes' method, label, its arguments)."""
    from matplotlib.figure import Figure
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]   # of Okabe and Ito, 2008
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (settings, series) in zip(axes, panels, strict=True):
        for number, (method, label, *values) in enumerate(series):
            style = dict(axvline=dict(linestyle="--", linewidth=1), fill_between=dict(alpha=0.3, linewidth=0),
                         errorbar=dict(fmt="osD^vX"[number % 6], capsize=3),
                         scatter=dict(marker="osD^vX"[number % 6], zorder=2), stairs=dict(linewidth=1.5))
            getattr(axis, method)(*values, label=label, color=colours[number % 6], **style.get(method, {}))
            axis.yaxis.set_inverted(method in ("scatter", "errorbar"))      # the first name on top
        axis.set(**settings)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2 + (len(panels) == 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")

def weight_figures(arms):
    """The figures of gram's results, as in figures_of."""
    share, paper = arms["joint"]["share"], ("axvline", "the paper's 0.2", 0.2)
    bins, (_, *band) = share["bins"], np.transpose(share["nfm_by_norm_shuffled"])
    decoders = {name: arms[name] for name in ("sae", "joint", "joint folded")}
    norms = [("stairs", name, arm["counts"], arm["edges"]) for name, arm in decoders.items()]
    norms += [paper, *(("axvline", f"{name}'s start", decoders[name]["initial_squared_norm"])
                       for name in ("joint", "joint folded"))]
    return {"norms": (
        "Squared norms of decoder rows. Claim 8 falls if `sae`, on the same tokens, has as many modes, "
        "or if the low mode holds the features that hardly fired and hardly moved.",
        [(dict(xlabel="squared norm", ylabel="features", xscale="log"), norms)]), "shares": (
        "The NFM's share of a feature's norms. Claim 9 falls where the trained curve lies in the band: a "
        "share falls with a norm that is part of it.",
        [(dict(xlabel="squared norm of the decoder row", ylabel="NFM share", xscale="log"), [
            ("fill_between", "shuffled, 95 %", bins, *band), paper,
            ("plot", "trained", bins, share["nfm_by_norm"]),
            ("plot", "W_lin and V untouched", bins, share["nfm_by_norm_untouched"])])]), "pca": (
        "Variance of decoder rows by principal component, centred. Claim 10 falls if the curves differ "
        "at 90 %, or if folding W_lin in removes what differs in the first 50.",
        [(dict(xlabel="components", ylabel="share of variance"), [
            ("plot", name, range(1, 1 + len(arm["explained"])), arm["explained"])
            for name, arm in decoders.items()])])}

def world_figure(arms):
    """The figure of synth's results, as in figures_of."""
    arm = arms["joint-interaction"]
    names = [name for name in arms if name.startswith("joint")]
    strengths = [("plot", label, np.sort(arm[kind]["strengths"][pairs])[::-1]) for label, kind, pairs in (
        ("planted", "planted", "planted"), ("decoys", "planted", "decoy"), ("null world", "null", "planted"))]
    gained = {kind: np.transpose([arms[name][kind]["gain"]["over sae"] for name in names])
              for kind in ("planted", "null")}
    return (
        "Worlds whose answer is known. Left: what joint-interaction learned of pairs, in all worlds and "
        "seeds; it finds what is there if planted pairs lie above decoys. Right: gains, medians and ranges; "
        "in the null world there is nothing to find.",
        [(dict(xlabel="pairs, strongest first", ylabel="interaction's strength", yscale="log"), strengths),
         (dict(xlabel="gain over sae of the same F"), [
             ("errorbar", kind, own, names, None, [own - low, high - own])
             for kind, (own, low, high) in gained.items()])])

def figures_of(found, log):
    """The figures that results {stage: arms} and the entries of train.jsonl allow: {name: (caption, panels)};
    a caption says what would refute the claim."""
    figures, paths = {}, ("sae", "sae+linear", "sae+interaction", "full")
    def by_arm(arms, xlabel, places):                     # places {label: where an arm's figure stands}
        return [(dict(xlabel=xlabel, xscale="log"), [
            ("scatter", label, np.array([lookup(arm, place) for arm in arms.values()], float), [*arms])
            for label, place in places.items()])]
    if arms := found.get("recon"):
        figures["reconstruction"] = (
            "Error by arm and path on held-out documents. Claim 1 falls if `sae` or `sae@matched` is as low "
            "as `joint` in full, whatever joint's own SAE path leaves.",
            by_arm(arms, "fraction of variance unexplained", {at: f"fvu_by_path/{at}" for at in paths}))
    if len(family(arms := found.get("recon", {}), "sae")) > 2:
        figures["capacity"] = (
            "Error against parameters, in all sizes trained. Where the curve of `joint` lies to the left of "
            "that of `sae`, its parameters are the better spent.",
            [(dict(xlabel="parameters", ylabel="fvu", xscale="log", yscale="log"),
              [("plot", name, *zip(*family(arms, name), strict=True)) for name in ("sae", "joint")])])
    if arms := found.get("kl"):
        places = {path: f"{path}/kl" for path in paths} | {"random error": "full/kl_random"}
        figures["kl"] = (
            "KL by arm and path, beside that of a random error as large as the full path's. Claim 5 falls if "
            "`sae` is as low as `joint` in full, claim 6 if random errors cost as much.",
            by_arm(arms, "KL from the clean model, nats a token", places))
    if arms := found.get("gram"):
        figures |= weight_figures(arms)
    if arms := found.get("synth"):
        figures["worlds"] = world_figure(arms)
    if arms := found.get("anova"):
        name, arm = next(iter(arms.items()))
        figures["dose"] = (
            f"Clamp dose, {name} on {arm['variance']['stimuli']}: change of the words' logits by cell. Lines "
            "through 0 at c = 1 are one observation, not one for each dose; lines that differ are no "
            "integration: see the nulls.",
            [(dict(xlabel=f"multiplier c of feature {arm[why]['feature']}, by {why}", ylabel="logits"), [
                ("plot", cell, [*map(float, arm[why]["dose"])], moved) for cell, moved in zip(
                    arm["cells"], np.transpose([*arm[why]["dose"].values()]), strict=True)])
             for why in ("variance", "interaction")])
    def curve(arm, key):
        entries = [e for e in log if e["arm"] == arm and e["lr"] == lookup(found, f"recon/{arm}/lr")]
        return [e["step"] for e in entries], [lookup(e, key) for e in entries]
    if "joint" in (arms := found.get("recon", {})):
        figures["training"] = (
            "Left: mean size of joint's parts; right: decoder rows with a squared norm below 0.2. If the "
            "share of low norms only falls from 1, they are rows that did not train: nothing crystallises.",
            [(dict(xlabel="step", ylabel="joint: mean |output|"), [
                ("plot", part, *curve("joint", f"magnitude/{part}")) for part in arms["joint"]["magnitude"]]),
             (dict(xlabel="step", ylabel="share of squared norms below 0.2"), [
                 ("plot", arm, *curve(arm, "low_norm")) for arm in ("sae", "joint")])])
    return figures

def read_results(runs):
    """What this version of the program measured in runs of one configuration: [{stage: contents of its file},
    …]. UserError where that is nothing, or where runs differ in more than the seed."""
    found = []
    for run in runs:
        paths = [run / "results" / f"{stage}.json" for stage in COLUMNS]
        results = {path.stem: read_json(path) for path in paths if path.exists()}
        found.append({stage: of for stage, of in results.items() if of.get("sha256") == source_hash()})
        if not found[-1]:
            raise UserError(f"{run} holds no results of this version: run the stage `recon` first")
        for stage in found[0].keys() & found[-1].keys():
            first, this = (each[stage]["config"] for each in (found[0], found[-1]))
            behind = {stage} if stage == "synth" else {stage, "lm", "train"}
            read = (name for name, (_, readers, _) in FLAGS.items() if behind & set(readers.split()))
            if differ := [name for name in read if this[name] != first[name]]:
                raise UserError(f"{run} and {runs[0]} differ in more than the seed: {stage}, {differ[0]}")
    seeds = [next(iter(results.values()))["config"]["seed"] for results in found]
    if len({*seeds}) < len(seeds):
        raise UserError(f"these runs are to differ in their seeds, which are {', '.join(map(str, seeds))}")
    return found

def across(found, stage, where):
    """A figure in the results of several runs: (value, text). Of one run, as it is; of more, its [mean,
    lowest, highest], ends of intervals included, and as text mean ± standard deviation."""
    values = [lookup(results, f"{stage}/arms/{where}") for results in found]
    if None in values:
        return None, "-"
    if len(values) == 1 or isinstance(values[0], str):
        return values[0], show(values[0], where)
    own, low, high = np.transpose([np.broadcast_to(value, 3) for value in values])
    return ([own.mean(), low.min(), high.max()],
            f"{show(own.mean(), where)} ± {show(own.std(ddof=1), where)}")

def run_report(cfg):
    """Stage `report`: every claim beside its control, and figures, in report.md; verdicts on the console."""
    found = read_results([cfg.run, *cfg.more])
    results, seeds = found[0], [next(iter(each.values()))["config"]["seed"] for each in found]
    missing = " ".join(stage for stage in COLUMNS if stage not in results) or "none"
    lines = [f"# Report of {cfg.run.name}", "", f"Stages missing: {missing}.", ""]
    if len(seeds) > 1:
        lines += [f"Claims: mean ± standard deviation over the training seeds {', '.join(map(str, seeds))}. "
                  f"Figures and tables: seed {seeds[0]}.", ""]
    lines += ["| claim (paper's value) | paper's metric | controls, the deciding first | verdict |",
              "|---|---|---|---|"]
    for title, stage, metrics, controls, decided, n in CLAIMS:
        judged = verdict([across(found, stage, where)[0] for where in controls[:n]], *decided)
        cells = ["<br>".join(f"{where.replace('/', ' ')}: {across(found, stage, where)[1]}"
                             for where in figures) for figures in (metrics, controls)]
        lines.append(f"| {title} | {' | '.join(cells)} | {judged} |")
        print(f"claim {title}\n  {judged}")
    arms = {stage: result["arms"] for stage, result in results.items()}
    for name, (caption, panels) in figures_of(arms, read_log(cfg.run / "train.jsonl")).items():
        draw(cfg.run / "figures" / f"{name}.png", panels)
        lines += ["", f"![{name}](figures/{name}.png)", "", caption]
    for stage, result in results.items():
        lines += ["", f"## {stage}", "~~~", *stage_lines(stage, result), "~~~"]
    with replacing(cfg.run / "report.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print(f"{lines[2]} The whole report: {cfg.run / 'report.md'}")


# ------------------------------------------------------------------------------------------ command line
# A subcommand is a stage; its flags are those of FLAGS that it reads. A user's mistake is one line and exit
# status 2, and nothing is half-written; Ctrl-C is 130.

MEASURES = dict(recon=measure_recon, kl=measure_kl, gram=measure_gram, secondary=measure_secondary,
                anova=measure_anova, pairs=measure_pairs, inspect=measure_inspect, synth=measure_synth)
STAGES = dict(plan=run_plan, lm=run_lm, train=run_train, **MEASURES, report=run_report,
              export=run_export)
DEFAULT_ARMS = [*(arm for arm in ARMS if arm not in CHILDREN), "sae@matched", *CHILDREN,
                *(arm + NULL for arm in ("sae", "joint", "joint-interaction"))]

def parser():
    """The command line: one subparser a stage, each with the flags that it reads."""
    top = argparse.ArgumentParser(prog="dualenc.py", allow_abbrev=False, description=__doc__.split("\n\n")[0])
    stages, arms = top.add_subparsers(dest="stage", required=True, metavar="STAGE"), " ".join(DEFAULT_ARMS)
    for stage, function in STAGES.items():
        summary = function.__doc__.split(": ", 1)[1]
        add = stages.add_parser(stage, help=summary, description=summary, allow_abbrev=False).add_argument
        if stage in ("plan", "train"):
            add("arms", nargs="*", default=DEFAULT_ARMS, metavar="ARM", help=f"default: {arms}")
        if stage == "inspect":
            add("asked", nargs="*", metavar="FEATURE",
                help="12, or s12 for a secondary one (default: the pairs that interact most)")
            add("--arm", default="joint", help="arm to look at (default: joint)")
            add("--pairs", type=int, default=5, help="how many pairs (default: 5)")
        if stage == "export":
            add("--arm", default="sae", help="sae, of any size, or sae-2dec (default: sae)")
            add("--format", choices=("saelens", "sparsify"), default="saelens", help="(default: saelens)")
        if stage == "pairs":
            add("--peer", nargs="+", metavar="RUN", help="runs of other seeds: do they rank pairs alike?")
        if stage == "plan":
            add("--measure", action="store_true", help="time a step of each arm here, and project all stages")
        if stage in ("plan", "train"):
            add("--at-once", type=int, default=9, help="arms in one pass (default: 9)")
        if stage in ("train", "secondary"):
            add("--save-minutes", type=number, default=3, help="between checkpoints (default: 3)")
        add("--preset", help=f"{', '.join(PRESETS)} (default: the run's own, else tiny)")
        add("--run", action="append" if stage == "report" else "store",
            help="run directory (default: runs/PRESET)" + "; more: other seeds" * (stage == "report"))
        add("--seed", type=int, help="of data order, weights, dropout; not of the tiny LM (default: 0)")
        add("--device", help="cpu or cuda[:N] (default: cuda where there is one)")
        for field, (kind, readers, text) in FLAGS.items():
            if stage in readers.split():
                tiny = PRESETS["tiny"][field]
                options = dict(action="store_true", default=None) if kind is bool else dict(
                    type=number if kind is float else kind, nargs="+" if isinstance(tiny, list) else None)
                add(f"--{field.replace('_', '-')}", help=f"{text}; tiny: {tiny}", **options)
    for each in (top, *stages.choices.values()):          # complaints on one line
        each.error = lambda message, each=each: each.exit(2, f"dualenc: {message} (see {each.prog} --help)\n")
    return top

def main(argv=None):
    """Run a stage. Returns the exit status: 0; 2 after one line about the user's mistake; 130 if stopped."""
    args, cfg, status = parser().parse_args(argv), None, 2
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")   # else a line for each of its many tries
    try:
        cfg = resolve(args)
        if args.stage in READERS.split():
            work_offline_without_network(cfg.model, cfg.text.partition(":")[0])
        if args.stage in MEASURES:
            text = "\n".join(stage_lines(args.stage, stage_results(cfg, lambda: MEASURES[args.stage](cfg))))
            print(text.replace("«", "\033[7m").replace("»", "\033[0m") if sys.stdout.isatty() else text)
        else:
            STAGES[args.stage](cfg)
        return 0
    except KeyboardInterrupt:
        status, message = 130, "stopped; the same command goes on from the last checkpoint, if any"
    except torch.OutOfMemoryError as error:
        message = (f"out of GPU memory: lower --at-once; or, in another --run, lower --batch, --features or "
                   f"the number of --lr ({str(error).splitlines()[0]})")
    except (UserError, OSError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        message = "out of memory: lower --features, --batch or --chunk, or train fewer arms at a time"
    finally:
        if cfg and cfg.lock:
            cfg.lock.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    print(f"dualenc: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
