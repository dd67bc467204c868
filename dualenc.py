#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""dualenc: dual encoding in a language model's activations, reproduced and put to the test.

"Feature Integration Spaces: Joint Training Reveals Dual Encoding in Neural Network Representations" (Claflin,
arXiv 2507.00269, AAAI 2026) holds that activations encode both which features are present (a TopK sparse
autoencoder, SAE, finds them) and how they combine (a neural factorization machine, NFM, finds that). This
module implements the paper and prints each of its numbers beside the control that could refute it.

    ./reproduce.sh          the tiny preset on any laptop: language model, activations, every arm, the tables
    ./reproduce.sh test     the tests

Sections, in dependency order; nothing needs a name that stands below it:
    core maths              TopK encoding, sparse decoding, the factorization machine's interaction
    modules                 TopKSAE, NFM, DualEncoder, the arms of a comparison, the exact fold
    files                   atomic writes, the standardiser, arms on disk
    presets and runs        one table of presets, one of flags, a run's configuration
    language model          finding blocks, capturing activations, loading
    text                    documents, splits, windows, the tiny language model
    activation stream       chunks, batches, held-out activations
    evaluation              errors by path, gains with their intervals
    training                one loop for all arms and learning rates, resumable
    reconstruction          claims 1 to 4 beside their controls
    kl                      splicing, claims 5 to 7 beside their controls
    plan                    what a run costs, before it is started
    command line            one subcommand a stage

Letters, everywhere: B tokens in a batch, T tokens in a window, D width of the residual stream, F features,
k features kept per token, n of them read by the NFM, K embedding width of the NFM, x (B, D) standardised
activations, values and indices (B, k) the sparse code: kept feature values (>= 0, descending) and their ids.
What is known not to work stands in the README under "Limits".
"""
import argparse
import contextlib
import copy
import dataclasses
import fcntl
import glob
import hashlib
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import sys
import time
import types
import zlib

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm


# ------------------------------------------------------------------------------------------ core maths
# A token's code is k values and k feature ids; the dense (B, F) code is never built. All below is a weighted
# sum of rows of a matrix (embedding_bag), or its transpose: past the encoder a token costs O(k·width).
# The factorization machine (Rendle, 2010) sums over all pairs of active features without visiting them: with
# f = (1, 2, 3) and scalar embeddings V = (1, 1, 2), Σ f V = 9 and Σ (f V)² = 1 + 4 + 36 = 41, so that
# z = (81 - 41) / 2 = 20 = 1·2 + 1·6 + 2·6, the three products of pairs. A lone feature has no partner: z = 0.

def sparse_outer(values, indices, x, F):
    """Gᵀ x, where the sparse code stands for G (B, F): values, indices (B, k), x (B, D) -> (F, D)."""
    by_feature = indices.reshape(-1).argsort()            # (B·k,) entries of the code, grouped by feature
    counts = torch.bincount(indices.reshape(-1), minlength=F)
    return torch.nn.functional.embedding_bag(
        by_feature // indices.shape[1], x, counts.cumsum(0) - counts, mode="sum",
        per_sample_weights=values.reshape(-1)[by_feature])

class _DecoderGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, values, indices, W):
        ctx.save_for_backward(values, indices)
        ctx.F = len(W)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        values, indices = ctx.saved_tensors
        needed = ctx.needs_input_grad[3]                  # a frozen decoder wants none
        return grad, None, None, sparse_outer(values, indices, grad.contiguous(), ctx.F) if needed else None

def sparse_decode(values, indices, W):
    """Σ_j values[:, j] W[indices[:, j]]: values, indices (B, k), W (F, width) -> (B, width).
    The dense code times W, at O(k·width) a token. Differentiable (once) in values and W."""
    values, indices = values.contiguous(), indices.contiguous()
    out = torch.nn.functional.embedding_bag(indices, W.detach(), mode="sum", per_sample_weights=values)
    return _DecoderGradient.apply(out, values.detach(), indices, W)   # torch's own gradient of W is slow

class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, k):
        values, indices = torch.addmm(b_enc, x, W_enc.T).topk(k)
        values.clamp_(min=0)
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad, _):
        x, W_enc, values, indices = ctx.saved_tensors
        grad = grad * (values > 0)                        # ReLU passes nothing at or below 0
        grad_x = sparse_decode(grad, indices, W_enc) if ctx.needs_input_grad[0] else None
        grad_W = sparse_outer(grad, indices, x, len(W_enc)) if ctx.needs_input_grad[1] else None
        grad_b = sparse_outer(grad, indices, x.new_ones(len(x), 1), len(W_enc)).squeeze(1)
        return grad_x, grad_W, grad_b, None

def topk_encode(x, W_enc, b_enc, k):
    """TopK_k(ReLU(x W_encᵀ + b_enc)): x (B, D), W_enc (F, D), b_enc (F,) -> values, indices (B, k).
    Values descend; a row with fewer than k positive pre-activations is padded with features of value 0.
    Differentiable (once) in x, W_enc, b_enc, at kept features (Gao et al., 2024). ValueError for a bad k."""
    if not 1 <= k <= len(W_enc):
        raise ValueError(f"k must lie between 1 and F={len(W_enc)}, not {k}")
    return _TopKEncode.apply(x, W_enc, b_enc, k)

def fm_interaction(values, indices, V):
    """z = ½[(Σ_j f_j V_j)² - Σ_j (f_j V_j)²] = Σ_{a<b} f_a f_b V_a∘V_b: (B, n), (B, n), V (F, K) -> (B, K).
    O(n·K) a token, and one pass over V a batch for its squares. The paper prints the middle term without its
    outer brackets; this identity is what its code trains."""
    total = sparse_decode(values, indices, V)
    return 0.5 * (total.square() - sparse_decode(values.square(), indices, V.square()))

def fm_interaction_pairwise(values, indices, V):
    """The definition that fm_interaction computes faster, pair by pair, O(n²·K): for readers and tests."""
    weighted = values.unsqueeze(-1) * V[indices]          # (B, n, K)
    z = torch.zeros_like(weighted[:, 0])
    for a in range(values.shape[1]):
        for b in range(a + 1, values.shape[1]):
            z = z + weighted[:, a] * weighted[:, b]
    return z


# ------------------------------------------------------------------------------------------ modules
# An arm is one model of a comparison. Its forward returns named parts that add up to x_hat, so that one loop
# trains and one evaluator measures every arm, path by path.
# Why the paper's baseline is weak: a linear path on the same code is a second decoder. With n = k,
#     f W_dec + b_dec + f W_lin + b_lin  =  f (W_dec + W_lin) + (b_dec + b_lin),
# exactly one TopK SAE (fold_linear). The model's "own SAE path", f W_dec + b_dec, is that SAE with part of
# its decoder cut off, and what the cut costs is reported as the NFM's gain. Hence the arms `sae` and
# `sae-2dec`.

class UserError(ValueError):
    """A mistake of the user's: main() prints it as one line and exits with status 2."""

class TopKSAE(torch.nn.Module):
    """f = TopK_k(ReLU(x W_encᵀ + b_enc)), x_hat = f W_dec + b_dec; W_enc, W_dec (F, D).
    W_dec ~ U(±1/√F). W_enc starts as a copy of it, not a view: tied storage would train as tied weights.
    b_dec is ours: the published SAE has none, while its linear path has one."""

    def __init__(self, D, F, k):
        super().__init__()
        self.D, self.F, self.k = D, F, k
        self.W_dec = torch.nn.Parameter(torch.empty(F, D).uniform_(-F ** -0.5, F ** -0.5))
        self.W_enc = torch.nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = torch.nn.Parameter(torch.zeros(F))
        self.b_dec = torch.nn.Parameter(torch.zeros(D))

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
    """The paper's integration paths; both read f_n, the n largest of the kept features.
    linear        x_lin = f_n W_lin + b_lin                                   W_lin (F, D)
    interaction   z = fm_interaction(f_n, V), m = W_1 dropout(z) + b_1, x_int = W_2 ReLU(m) + b_2
                                                                              V (F, K), W_1 (K, K), W_2 (D, K)
    pooling is "product" for z as above, "sum" for z = Σ_j f_j V_j (the control that has no product), None for
    no interaction path. dropout is a probability; its mask comes from the generator given to forward."""

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
    """x_hat = x_sae + x_lin + x_int: a TopKSAE and, on its code, an NFM. Every arm is one of these.
    Without nfm it is the plain SAE; with `second`, a TopKSAE that reads the first one's residual, the paper's
    control for its sequential NFM. `learner` is the SAE whose features are counted: the second, if any."""

    def __init__(self, sae, nfm=None, second=None):
        super().__init__()
        if nfm and nfm.n > sae.k:
            raise ValueError(f"the NFM reads n={nfm.n} features, the SAE keeps only k={sae.k}")
        self.sae, self.nfm, self.second = sae, nfm, second

    @property
    def learner(self):
        """The TopKSAE whose features are counted."""
        return self.second or self.sae

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

ARMS = {   # arm: the paths of its NFM (None: it has no NFM)
    "sae": None,
    "sae-2dec": dict(pooling=None),                       # its NFM reads all k: exactly an SAE
    "joint": dict(),
    "joint-linear": dict(pooling=None),
    "joint-interaction": dict(linear=False),
    "joint-mlp": dict(pooling="sum"),
    "sequential": dict(),                                 # on the residual of the frozen, cut `sae`
    "residual-sae": None,                                 # a second SAE on that same residual
}
CHILDREN = ("sequential", "residual-sae")                 # trained after `sae`, on top of it

def count_parameters(model):
    """Number of weights in a module."""
    return sum(p.numel() for p in model.parameters())

def make_arm(name, *, D, F, k, n, K, parent=None, top=None, dropout=0.0):
    """Build the arm called `name`, its weights drawn from torch's global generator: a DualEncoder.
    A size may follow the name: joint@0.5x has F / 2 features, sae@12000 has 12,000, sae@matched as many as
    make its parameters joint's. parent: the trained `sae` arm under `sequential` and `residual-sae`: copied,
    frozen, cut to its `top` largest features (default n). UserError for a bad name or a missing parent."""
    base, at, size = name.partition("@")
    if base not in ARMS or (at and base in CHILDREN) or (at and not size):
        raise UserError(f"unknown arm {name!r}: choose from {', '.join(ARMS)}; all but the last two "
                        f"also take a size: sae@12000, sae@0.5x, sae@matched")
    if size == "matched" and base == "sae":
        with torch.device("meta"):
            joint = count_parameters(DualEncoder(TopKSAE(D, F, k), NFM(F, D, K, n)))
        F = round((joint - D) / (2 * D + 1))              # an SAE holds F·(2D + 1) + D weights
    elif re.fullmatch(r"[0-9]+|[0-9]*\.?[0-9]+x", size):
        F = round(float(size[:-1]) * F) if size[-1] == "x" else int(size)
    elif size:
        raise UserError(f"arm {name!r}: a size is a number of features, a multiple (0.5x), or sae@matched")
    if F < k:
        raise UserError(f"arm {name!r} has {F} features, fewer than k={k}")
    paths = ARMS[base]
    if base not in CHILDREN:
        sae = TopKSAE(D, F, k)                            # first: one seed, one SAE to start from in any arm
        n = k if base == "sae-2dec" else n
        return DualEncoder(sae, None if paths is None else NFM(F, D, K, n, dropout=dropout, **paths))
    if parent is None:
        raise UserError(f"arm {name!r} is built on a trained `sae`: train that first")
    frozen, top = copy.deepcopy(parent.sae).requires_grad_(False), top or n
    frozen.k = top                                        # both sides of the comparison read the top ones
    if paths is None:
        return DualEncoder(frozen, second=TopKSAE(D, F, top))
    return DualEncoder(frozen, NFM(F, D, K, top, dropout=dropout, **paths))

def fold_linear(model):
    """The one TopKSAE that a DualEncoder with a linear path alone equals: W_dec + W_lin, b_dec + b_lin.
    Raises ValueError where no such SAE exists: an interaction path, n < k, a second SAE."""
    nfm = model.nfm
    if model.second or (nfm and nfm.pooling):
        raise ValueError("only an SAE, alone or with a linear path, folds into one SAE")
    if nfm and nfm.n < model.sae.k:
        raise ValueError(f"the linear path reads n={nfm.n} of k={model.sae.k} features: the fold needs n = k")
    folded = copy.deepcopy(model.sae)
    if nfm:
        with torch.no_grad():
            folded.W_dec += nfm.W_lin
            folded.b_dec += nfm.b_lin
    return folded


# ------------------------------------------------------------------------------------------ files
# What is on disk is whole: a file is written beside its place and moved there. An arm's file is
# self-contained: weights, the standardiser of its run, the configuration that made it.

@contextlib.contextmanager
def blame(what):
    """Turn whatever a library raises inside into a UserError of one line: what, and the library's reason."""
    try:
        yield
    except Exception as error:                            # foreign files and networks fail in many ways
        if isinstance(error, (UserError, torch.OutOfMemoryError)):
            raise
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"{what}: {reason.splitlines()[0][:300]}") from error

@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path; what was written there replaces `path` at the end, or vanishes on an error.
    Raises UserError where the disk refuses (full, not writable)."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with blame(f"cannot write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
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
    """One mean and one standard deviation per dimension, (D,), fixed for a run."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def encode(self, raw):
        """Raw activations (…, D) -> standardised x (…, D)."""
        return (raw - self.mean) / self.std

    def decode(self, x):
        """Standardised x (…, D) -> raw activations (…, D)."""
        return x * self.std + self.mean

def save_arm(path, model, standardiser, config):
    """Write an arm as safetensors: weights, standardiser, and config (a JSON object) as metadata."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()
               if not name.startswith("standardiser.")}   # a loaded arm carries one
    tensors |= {f"standardiser.{name}": tensor for name, tensor in standardiser.state_dict().items()}
    with replacing(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary,
                  metadata={"dualenc": json.dumps(config)})

def load_arm(path):
    """Load an arm that `train` wrote: a module in eval mode, with its `standardiser` and `config` attached.
    model(model.standardiser.encode(raw)) gives the parts of x_hat. Raises UserError for a damaged file."""
    with blame(f"{path} is not an arm that this program wrote, or is damaged"):
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["dualenc"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        sizes = {name: config[name] for name in ("D", "F", "k", "n", "K", "top", "dropout")}
        with torch.device("meta"):                        # shapes only; the file's tensors take their places
            parent = DualEncoder(TopKSAE(config["D"], config["F"], config["k"]))
            model = make_arm(config["arm"], parent=parent, **sizes)
        weights = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
        model.load_state_dict(weights, assign=True)
        model.standardiser = Standardiser(tensors["standardiser.mean"], tensors["standardiser.std"])
        model.config = config
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------ presets and runs
# A run is a directory. Its config.json holds every field that some stage of it has read; later stages take
# those from there, so that a flag is given once, and refuse a flag that contradicts it.

PRESETS = {"paper": dict(
    model="openlm-research/open_llama_3b", text="Salesforce/wikitext:wikitext-103-raw-v1", layer=16,
    features=50_000, k=1024, n=512, embedding=300, top=250, dropout=0.15, window=50, batch=3200,
    lr=[1e-4, 4e-4], decay=0.8, tokens=5_000_000, chunk=10_000, chunk_epochs=1, eval_tokens=200_000,
    kl_tokens=20_000, param_dtype="float32", adam_eps=1e-8, keep_first=False, lm_steps=0)}
PRESETS["author"] = PRESETS["paper"] | dict(              # what the published code ran: each chunk ten times
    window=128, batch=64, lr=[1e-4], decay=4000.0, chunk_epochs=10, param_dtype="float16", adam_eps=1e-5)
PRESETS["small"] = PRESETS["paper"] | dict(
    model="EleutherAI/pythia-70m", layer=3, features=8192, k=164, n=82, embedding=48, top=40, dropout=0.0,
    lr=[1e-3, 2e-3], chunk=100_000)
PRESETS["tiny"] = PRESETS["small"] | dict(
    model="tiny", text="docstrings", layer=2, features=1024, k=20, n=10, embedding=32, top=5, batch=512,
    lr=[4e-3, 8e-3, 1.6e-2, 3.2e-2], tokens=800_000, eval_tokens=100_000, lm_steps=840)

FLAGS = {   # field: (type, stages that read it, help); the flag is --field
    "model": (str, "plan lm train recon kl", "causal LM, hub name or directory; 'tiny' trains one"),
    "text": (str, "lm train recon kl", "docstrings, a .txt, .jsonl or .parquet file, or HUB_ID[:CONFIG]"),
    "layer": (int, "plan train recon kl", "block whose input is read, from 0 (paper: 16 of 26)"),
    "features": (int, "plan train", "F, features of the SAE (paper: 50,000)"),
    "k": (int, "plan train", "features kept per token (paper: 1024)"),
    "n": (int, "plan train", "how many of the k the NFM reads (paper: 512)"),
    "embedding": (int, "plan train", "K, embedding width of the NFM (paper: 300)"),
    "top": (int, "plan train", "features that sequential and residual-sae read (paper: 250)"),
    "dropout": (float, "plan train", "probability, on z (published code: 0.15)"),
    "window": (int, "plan train recon kl", "T, tokens in a window (paper: 50)"),
    "batch": (int, "plan train", "B, tokens in a batch (paper: 3200)"),
    "lr": (float, "plan train", "learning rates; each arm keeps its best on validation (paper: 1e-4)"),
    "decay": (float, "train", "share of the steps (above 1: steps) over which lr falls to a tenth"),
    "tokens": (int, "plan train", "tokens to train on; a shorter text is read again (paper: 5,000,000)"),
    "chunk": (int, "plan train", "tokens whose activations are held at once (paper: 10,000)"),
    "chunk_epochs": (int, "plan train", "times that each chunk is trained on (published code: 10)"),
    "eval_tokens": (int, "train recon", "tokens of the test split; a quarter as many choose the rate"),
    "kl_tokens": (int, "kl", "tokens of the test split to splice"),
    "param_dtype": (str, "plan train", "of the weights: float32, or float16 as in the published code"),
    "adam_eps": (float, "train", "Adam's epsilon (published code: 1e-5)"),
    "keep_first": (bool, "train recon kl", "keep each window's first position, an attention sink"),
    "lm_steps": (int, "lm", "training steps of the tiny language model"),
}

def number(text):
    """A finite number, for a flag."""
    if not math.isfinite(float(text)):
        raise ValueError(text)
    return float(text)

def validate(cfg):
    """Refuse a configuration that cannot run. Raises UserError naming the flag."""
    for field, (kind, *_) in FLAGS.items():
        if kind is int and field not in ("layer", "lm_steps") and getattr(cfg, field) < 1:
            raise UserError(f"--{field.replace('_', '-')} must be at least 1, not {getattr(cfg, field)}")
    for small, large in (("k", "features"), ("n", "k"), ("top", "k")):
        if getattr(cfg, small) > getattr(cfg, large):
            raise UserError(f"--{small} {getattr(cfg, small)} is more than --{large} {getattr(cfg, large)}")
    for good, rule in (
            (min(cfg.lr) > 0 and len(set(cfg.lr)) == len(cfg.lr), "--lr takes different rates above 0"),
            (0 <= cfg.dropout < 1, "--dropout must lie in [0, 1)"),
            (cfg.decay > 0 and cfg.adam_eps > 0, "--decay and --adam-eps must be above 0"),
            (cfg.param_dtype in ("float32", "float16"), "--param-dtype is float32 or float16"),
            (0 <= cfg.seed < 2 ** 63, "--seed must lie in [0, 2^63)"),
            (cfg.window > 1, "--window must be at least 2: the first position may be left out")):
        if not good:
            raise UserError(rule)

def resolve(args):
    """Settings of a stage: the run's config.json, else the preset and the flags given; and `run`, `device`,
    `arms`. Raises UserError for an unknown preset or device, and for a flag that contradicts the run."""
    if args.preset not in (None, *PRESETS):
        raise UserError(f"unknown preset {args.preset!r}: choose from {', '.join(PRESETS)}")
    run = pathlib.Path(args.run or f"runs/{args.preset or 'tiny'}")
    if run.exists() and not run.is_dir():
        raise UserError(f"--run {run} is a file, not a directory")
    given = {name: getattr(args, name, None) for name in ("preset", "seed", *FLAGS)}
    given = {name: value for name, value in given.items() if value is not None}
    for name in {"model", "text"} & set(given):           # a path must mean the same in any stage
        if given[name] not in ("tiny", "docstrings") and pathlib.Path(given[name]).exists():
            given[name] = str(pathlib.Path(given[name]).resolve())
    stored = read_json(run / "config.json") if (run / "config.json").exists() else {}
    started = any(path.suffix == ".ckpt" or path.name.partition(".")[0].partition("@")[0] in ARMS
                  for path in (run.iterdir() if run.exists() else ()))
    done = {stage for stage, there in (("train", started), ("lm", (run / "lm").exists())) if there}
    for name in stored:                                   # what finished work was made with is settled
        settled = name not in FLAGS or done & set(FLAGS[name][1].split())
        if done and settled and given.get(name, stored[name]) != stored[name]:
            raise UserError(f"{run} was made with {name} = {stored[name]}, not {given[name]}: drop that flag "
                            f"or choose another --run")
    preset = stored.get("preset", args.preset or "tiny")
    fields = {"preset": preset, "seed": 0} | PRESETS.get(str(preset), {}) | stored | given
    if started and not {name for name, row in FLAGS.items() if "train" in row[1].split()} <= set(stored):
        raise UserError(f"{run}/config.json lacks fields with which its arms were trained")
    kinds = {"preset": str, "seed": int} | {name: kind for name, (kind, *_) in FLAGS.items()}
    odd = set(fields) ^ set(kinds)
    for name, kind in kinds.items():
        values = fields.get(name) if name == "lr" else [fields.get(name)]
        if type(values) is not list or not values or {type(value) for value in values} != {kind}:
            odd.add(name)
    if odd:
        raise UserError(f"{run}/config.json is damaged or of another version, in {', '.join(sorted(odd))}")
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", args.device or "cpu"):
        raise UserError(f"--device is cpu or cuda[:N], not {args.device!r}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with blame(f"cannot use the device {device!r}"):
        torch.empty(0, device=device)
    cfg = types.SimpleNamespace(**vars(args) | fields | dict(fields=fields, run=run, device=device,
                                started=started, lock=None))
    validate(cfg)
    return cfg

def fields_of(cfg, stage):
    """The fields of a configuration that a stage reads."""
    return {name: cfg.fields[name] for name in ("preset", "seed", *FLAGS)
            if name not in FLAGS or stage in FLAGS[name][1].split()}

def claim_run(cfg):
    """Add the fields that this stage reads to the run's config.json, and keep other processes off the run.
    Raises UserError if another process is at work there."""
    with blame(f"cannot write in {cfg.run}"):
        cfg.run.mkdir(parents=True, exist_ok=True)
        cfg.lock = open(cfg.run / ".lock", "w")
    try:
        fcntl.flock(cfg.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"another process is at work on {cfg.run}") from error
    for stale in cfg.run.glob(".*.tmp"):                  # left by a process that was killed
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    path = cfg.run / "config.json"
    write_json(path, (read_json(path) if path.exists() else {}) | fields_of(cfg, cfg.stage))

def stage_results(cfg, compute):
    """The contents of results/STAGE.json; compute() makes them first, unless the file was made from the arms
    and with the settings of now. Beside them stands what traces them: configuration, versions, source."""
    path = cfg.run / "results" / f"{cfg.stage}.json"
    arms = {file.name: file.stat().st_mtime_ns for file in sorted(cfg.run.glob("*.safetensors"))}
    old = read_json(path) if path.exists() else {}
    if old.get("made_from") != arms or old["config"] | fields_of(cfg, cfg.stage) != old["config"]:
        write_json(path, compute() | dict(
            made_from=arms, config=cfg.fields, versions={"torch": torch.__version__, "numpy": np.__version__},
            sha256=hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()))
    return read_json(path)

def table(*rows):
    """Print rows of strings as aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        print(" ", first.ljust(widths[0]), *map(str.rjust, rest, [width + 1 for width in widths[1:]]))


# ------------------------------------------------------------------------------------------ language model
# An activation is the residual stream that enters block `layer`: hidden_states[layer] in transformers'
# counting. A pre-hook on that block reads it and stops the forward there; later blocks and logits are never
# computed.

LM_CONFIGS = {   # known without a download, for `plan`; "tiny" is what `lm` trains
    "tiny": dict(model_type="llama", hidden_size=128, intermediate_size=344, num_hidden_layers=4,
                 num_attention_heads=4, vocab_size=4096, tie_word_embeddings=True),
    "EleutherAI/pythia-70m": dict(model_type="gpt_neox", hidden_size=512, intermediate_size=2048,
                                  num_hidden_layers=6, num_attention_heads=8, vocab_size=50304),
    "openlm-research/open_llama_3b": dict(model_type="llama", hidden_size=3200, intermediate_size=8640,
                                          num_hidden_layers=26, num_attention_heads=32, vocab_size=32000)}

class _Captured(Exception):
    """Carries the activations out of a forward that is stopped on purpose."""

def find_blocks(lm, layer=0):
    """The transformer blocks: the one ModuleList as long as the model is deep.
    Raises UserError if there is no such list, or if it has no block `layer`."""
    depth = lm.config.get_text_config().num_hidden_layers
    found = [m for m in lm.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise UserError(f"cannot tell the blocks of {type(lm).__name__}: {len(found)} lists are {depth} long")
    if not 0 <= layer < depth:
        raise UserError(f"layer {layer} is out of range: {type(lm).__name__} has blocks 0 to {depth - 1}")
    return found[0]

def splice(lm, layer, tokens, replace):
    """Logits with the residual stream entering block `layer` replaced: tokens (B, T) -> (B, T, vocabulary).
    replace maps the captured (B, T, D) to another of its kind. Raises UserError for a layer out of range."""
    def hook(module, args, kwargs):
        if args:
            return (replace(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": replace(kwargs["hidden_states"])}

    handle = find_blocks(lm, layer)[layer].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            return lm(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()

def capture(lm, layer, tokens):
    """Residual stream that enters block `layer`: tokens (B, T) -> (B, T, D), equal to hidden_states[layer].
    The forward stops there. Raises UserError for a layer that the model does not have."""
    def stop(hidden):
        raise _Captured(hidden)

    try:
        splice(lm, layer, tokens, stop)
    except _Captured as stopped:
        return stopped.args[0]

def load_lm(path, *, device="cpu", layer=None):
    """A causal language model and its tokenizer, from the hub or a directory; fp32 on a CPU, as stored on a
    GPU. layer: keep only what `capture` at that layer runs, no later blocks and no head. Raises UserError."""
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"    # else some hub models are fetched twice
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if os.sep in str(path) and str(path)[0] in "./~" and not pathlib.Path(path).is_dir():
        raise UserError(f"there is no directory {path} to load a language model from")
    with blame(f"cannot load the language model {path}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
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
    import importlib.util
    import warnings
    files = [file for package in ("numpy", "scipy", "torch")
             for file in sorted(pathlib.Path(importlib.util.find_spec(package).origin).parent.rglob("*.py"))
             if not {"tests", "testing"} & set(file.parts)]
    seen = set()
    for file in tqdm(files, desc="parsing docstrings", unit="file", disable=None):
        with contextlib.suppress(SyntaxError, UnicodeDecodeError), warnings.catch_warnings(action="ignore"):
            nodes = [n for n in ast.walk(ast.parse(file.read_text("utf-8")))
                     if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
            docstrings = [text for text in map(ast.get_docstring, nodes) if text and text not in seen]
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
    if kind and not path.is_file():
        raise UserError(f"there is no text file {source}")
    if not kind and (path.exists() or "/" not in source):
        raise UserError(f"text {source!r} is not docstrings, a .txt, .jsonl or .parquet file, or on the hub")
    with blame(f"cannot read the text {source}"):
        if kind:
            rows = datasets.load_dataset(kind, data_files=glob.escape(source), split="train", streaming=True)
        else:
            rows = datasets.load_dataset(hub_id, configuration or None, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get("text"), str):
                raise UserError(f"{source}: row {number} has no string called 'text', but {str(row)[:60]}")
            yield row["text"].rstrip("\n")

def documents(source):
    """Documents of a text: an iterator of strings; source as in text_rows.
    A level-1 heading in WikiText's style (` = Title = `) starts a document. Where there is none, blank lines
    separate the documents of a .txt file that has any; else each row is one. The first 2,000 rows decide."""
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
    for first in itertools.count(step=64):                # documents that are tokenised at once
        batch = list(itertools.islice(chosen, 64))
        if not batch:
            return
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        for number, ids in enumerate(encoded, first):
            for at in range(0, len(ids) - T + 1, T):
                yield number, np.array(front + ids[at:at + T], dtype=np.int32)

def shuffled(items, size, rng):
    """Shuffle a stream through a buffer of `size` items; rng is a random.Random."""
    buffer = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
        else:
            at = rng.randrange(size)
            buffer[at], item = item, buffer[at]
            yield item
    rng.shuffle(buffer)
    yield from buffer

def window_stream(source, tokenizer, *, T, split, seed, buffer=1_000_000):
    """Endless shuffled windows, epoch after epoch, fixed by the seed: (epoch, document's number, ids).
    buffer is in tokens. Raises UserError if the split has not one window."""
    for epoch in itertools.count():
        in_order, number = windows(documents(source), tokenizer, T, split), None
        for number, ids in shuffled(in_order, max(1, buffer // T), random.Random(f"{seed}/{split}/{epoch}")):
            yield epoch, number, ids
        if number is None:
            raise UserError(f"{source}: no document of the {split} split has {T} tokens; give longer or "
                            f"more documents (a tenth validates, a tenth tests), or lower --window")

def take_windows(stream, count):
    """The next windows of a stream: (epoch of the last, documents' numbers (count,), ids (count, T))."""
    epochs, numbers, ids = zip(*itertools.islice(stream, count), strict=True)
    return epochs[-1], torch.tensor(numbers), torch.from_numpy(np.stack(ids)).long()

def text_source(cfg):
    """What `documents` reads for this run; docstrings are parsed once and kept in the run directory."""
    if cfg.text != "docstrings":
        return cfg.text
    corpus = cfg.run / "corpus.jsonl"
    if not corpus.exists():
        with replacing(corpus) as temporary, open(temporary, "w") as file:
            file.writelines(json.dumps({"text": document}) + "\n" for document in docstring_corpus())
    return str(corpus)

def train_tokenizer(texts, vocab_size):
    """Byte-level BPE with a BOS token, as a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")

def run_lm(cfg):
    """Stage `lm`: train the tiny language model on the run's text, print its held-out perplexity, save it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    if cfg.model != "tiny" or (cfg.run / "lm" / "config.json").exists():
        return print(f"lm: nothing to train, the model is {cfg.model}")
    if cfg.lm_steps < 1:
        raise UserError(f"--lm-steps must be at least 1, not {cfg.lm_steps}")
    source = text_source(cfg)
    tokenizer = train_tokenizer((text for text in documents(source) if split_of(text) == "train"), 4096)
    torch.manual_seed(cfg.seed)
    shape = LM_CONFIGS["tiny"] | dict(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).to(cfg.device)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=cfg.lm_steps, pct_start=0.1)
    def nats(tokens):
        return lm(input_ids=tokens.to(cfg.device), labels=tokens.to(cfg.device), use_cache=False).loss
    held_out_ids = take_windows(window_stream(source, tokenizer, T=127, split="validation", seed=0), 256)[2]
    stream = window_stream(source, tokenizer, T=127, split="train", seed=cfg.seed)
    for _ in (bar := tqdm(range(cfg.lm_steps), desc="language model", unit="step", disable=None)):
        loss = nats(take_windows(stream, 16)[2])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(nats=f"{loss.item():.2f}", refresh=False)
    with torch.no_grad():
        loss = float(np.mean([nats(tokens).item() for tokens in held_out_ids.split(32)]))
    claim_run(cfg)
    with replacing(cfg.run / "lm") as temporary:
        lm.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    stage_results(cfg, lambda: dict(nats_per_token=loss, perplexity=math.exp(loss)))
    print(f"lm: held-out {loss:.3f} nats per token, perplexity {math.exp(loss):.1f}")


# ------------------------------------------------------------------------------------------ activation stream
# Windows are extracted a chunk at a time, so that activations exist for one chunk only. Inside a chunk tokens
# are shuffled and cut into equal batches of about B: every token of a window is used once, and (seed, step)
# fixes the batch, whoever reads it. So all arms of a run see the same data, and an interrupted run goes on
# where it was. The first position is left out (skip = 1): an attention sink, whose norm in large models
# dwarfs all others.

def extract(lm, layer, ids, *, skip=1, at_once=64):
    """Activations of windows: ids (W, T) -> (W·(T - skip), D) in fp32, at_once windows in each forward."""
    device, width, rows = next(lm.parameters()).device, ids.shape[1] - skip, None
    for at in range(0, len(ids), at_once):
        raw = capture(lm, layer, ids[at:at + at_once].to(device))[:, skip:].flatten(0, 1)
        if rows is None:
            rows = torch.empty(len(ids) * width, raw.shape[1], device=device)
        rows[at * width:at * width + len(raw)] = raw
    return rows

def chunk_plan(*, tokens, chunk, batch, rows):
    """(windows, batches) of each chunk, all about alike; rows is how many tokens of a window are used."""
    total = math.ceil(tokens / rows)
    chunks = math.ceil(total / max(1, chunk // rows))
    sizes = [total // chunks + (number < total % chunks) for number in range(chunks)]
    return [(size, max(1, round(size * rows / batch))) for size in sizes]

def activation_batches(lm, layer, stream, standardiser, *, plan, epochs=1, seed=0, skip=1, start=0):
    """Shuffled batches of standardised activations: an iterator of (step, epoch of the text, x (B, D)).
    stream as from window_stream, plan as from chunk_plan; epochs: how often each chunk is used. start is the
    first step wanted: chunks that lie before it cost no forward."""
    step = 0
    for number, (size, steps) in enumerate(plan):
        text_epoch, _, ids = take_windows(stream, size)
        if step + steps * epochs <= start:
            step += steps * epochs
            continue
        x = extract(lm, layer, ids, skip=skip)
        for epoch in range(epochs):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{number}/{epoch}".encode()))
            for picked in torch.randperm(len(x), generator=generator).to(x.device).tensor_split(steps):
                if step >= start:
                    yield step, text_epoch, standardiser.encode(x[picked])
                step += 1
        x = None                                          # before the next chunk is made

def estimate_standardiser(lm, layer, stream, *, tokens=100_000, skip=1):
    """Mean and std per dimension over at least `tokens` activations: (Standardiser, facts about them).
    A dimension that never varies gets std 1, and is counted. Raises UserError on non-finite values."""
    count, total, squares, norms = 0, 0, 0, []
    bar = tqdm(total=tokens, desc="standardiser", unit="token", disable=None)
    while count < tokens:
        raw = extract(lm, layer, take_windows(stream, 500)[2], skip=skip).double()
        if not raw.isfinite().all():
            raise UserError(f"the language model gives non-finite activations at layer {layer}")
        count, total, squares = count + len(raw), total + raw.sum(0), squares + raw.square().sum(0)
        norms.append(raw.norm(dim=1))
        bar.update(len(raw))
    bar.close()
    mean, norms = total / count, torch.cat(norms)
    variance = squares / count - mean.square()
    constant = variance <= 1e-12 * squares / count
    facts = dict(tokens=count, constant_dimensions=int(constant.sum()),
                 largest_norm_over_median=float(norms.max() / norms.median()))
    return Standardiser(mean.float(), variance.sqrt().masked_fill(constant, 1.0).float()), facts

def open_data(cfg, *, whole=False):
    """What a stage reads: lm (whole, or up to cfg.layer), D, stream(split), rows that a window gives,
    standardiser. A run's first call writes its config.json and its standardiser."""
    path = cfg.run / "lm" if cfg.model == "tiny" else cfg.model
    if cfg.model == "tiny" and not (path / "config.json").exists():
        raise UserError(f"there is no {path}: run the stage `lm` first")
    lm, tokenizer = load_lm(path, device=cfg.device, layer=None if whole else cfg.layer)
    longest = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if cfg.window + (tokenizer.bos_token_id is not None) > longest:
        raise UserError(f"--window {cfg.window} is more than the {longest} positions of {path}")
    source, skip = text_source(cfg), 0 if cfg.keep_first else 1
    def stream(split):
        return window_stream(source, tokenizer, T=cfg.window, split=split, seed=cfg.seed)
    path, D = cfg.run / "standardiser.safetensors", lm.config.get_text_config().hidden_size
    if not (path.exists() and cfg.started):               # before an arm is started, flags may still change
        for split in ("validation", "test"):              # better refused now than after the training
            next(window_stream(source, tokenizer, T=cfg.window, split=split, seed=0, buffer=1))
        standardiser, facts = estimate_standardiser(lm, cfg.layer, stream("train"), skip=skip)
        claim_run(cfg)
        with replacing(path) as temporary:
            save_file(standardiser.state_dict(), temporary)
        print("standardiser: {tokens:,} tokens; the largest norm is {largest_norm_over_median:.1f} times the "
              "median; {constant_dimensions} constant dimensions".format(**facts))
    else:
        claim_run(cfg)
    with blame(f"{path} is damaged"):
        standardiser = Standardiser(**load_file(path, device=cfg.device))
    if len(standardiser.mean) != D:
        raise UserError(f"{path} has D={len(standardiser.mean)}, the model has D={D}")
    return types.SimpleNamespace(lm=lm, D=D, stream=stream, skip=skip,
                                 rows=cfg.window + (tokenizer.bos_token_id is not None) - skip,
                                 standardiser=standardiser)


# ------------------------------------------------------------------------------------------ evaluation
# Held-out documents only. Errors are summed in float64 by arm, path and document: a document's tokens are
# not independent, so a gain's interval comes from resampling documents, on both sides the same (Efron, 1979).

BASES = {   # what a path of an arm is compared with: label -> (arm, path); None is the arm itself
    "published": (None, "sae"), "matched": ("sae", "full"), "parameter_matched": ("sae@matched", "full"),
    "sae-2dec": ("sae-2dec", "full"), "joint-linear": ("joint-linear", "full"),
    "joint-interaction": ("joint-interaction", "full"),
    "without-linear": (None, "sae+interaction"), "without-interaction": (None, "sae+linear")}

def path_sums(parts):
    """x_hat by path, from an arm's parts: "sae", the SAE alone; with one part added, of several; "full"."""
    added = {f"sae+{name}": parts["sae"] + part for name, part in parts.items() if name != "sae"}
    own = {"sae": parts["sae"]} if added else {}
    return own | (added if len(added) > 1 else {}) | {"full": sum(parts.values())}

def held_out_windows(cfg, data, split, tokens):
    """Windows of a held-out split, 32 at a time: an iterator of (ids (32, T), documents' numbers (32,)).
    None comes twice, so that a small split gives fewer tokens."""
    once = itertools.takewhile(lambda window: window[0] == 0, data.stream(split))
    _, numbers, ids = take_windows(once, math.ceil(tokens / data.rows))
    numbers = numbers.unique(return_inverse=True)[1]
    batches = list(zip(ids.to(cfg.device).split(32), numbers.to(cfg.device).split(32), strict=True))
    return tqdm(batches, desc=f"{cfg.stage}: {split}", unit="batch", disable=None)

def add_by_document(sums, key, numbers, rows):
    """Add rows (B, columns) to sums[key] (documents, columns), in float64 and in place."""
    so_far = sums.get(key, rows.new_zeros(0, rows.shape[1], dtype=torch.float64))
    total = so_far.new_zeros(max(len(so_far), int(numbers.max()) + 1), rows.shape[1])
    total[:len(so_far)] = so_far
    sums[key] = total.index_add_(0, numbers, rows.double())

def gain(own, base, *, resamples=2000, seed=0):
    """Share of the base's error that is gone, 1 - Σ own / Σ base: [gain, low, high].
    own, base (documents,): low and high bound 95 % by a percentile bootstrap over documents."""
    from scipy.stats import bootstrap
    def statistic(a, b, axis=-1):
        return 1 - a.sum(axis) / b.sum(axis)
    if len(own) < 2:
        return [float(statistic(own, base)), math.nan, math.nan]
    low, high = bootstrap((own, base), statistic, paired=True, vectorized=True, n_resamples=resamples,
                          batch=100, method="percentile", rng=np.random.default_rng(seed)).confidence_interval
    return [float(statistic(own, base)), float(low), float(high)]

def gains(errors):
    """The gain of every path of every arm over every base that is there: errors {(arm, path): (documents,)}
    -> {arm: {path: {label of the base: [gain, low, high]}}}."""
    found = {}
    for (arm, path), own in errors.items():
        here = found.setdefault(arm, {}).setdefault(path, {})
        for label, (base_arm, base_path) in BASES.items():
            base = (base_arm or arm, base_path)
            if base in errors and base != (arm, path):
                here[label] = gain(own, errors[base])
    return found

@torch.no_grad()
def evaluate(models, batches, *, std):
    """Errors of several models over the same batches of (x (B, D), documents' numbers (B,)).
    std (D,) turns errors into raw units. Returns {model: results}: mse, fvu, fvu_raw and sse, an array by
    document, go by path; magnitude, mean |part|, by part; l0 is the mean number of kept features above 0.
    fvu = Σ‖x_hat - x‖² / Σ‖x - mean x‖²: predicting the mean scores 1."""
    tokens, total, squares, variance = 0, 0, 0, std.double().square()
    kept = {name: torch.zeros(model.learner.F, device=std.device) for name, model in models.items()}
    errors, magnitudes = {}, {name: {} for name in models}
    for x, numbers in batches:
        exact = x.double()
        tokens, total, squares = tokens + len(x), total + exact.sum(0), squares + exact.square().sum(0)
        for name, model in models.items():
            parts = model(x, counts=kept[name])
            for part, value in parts.items():
                magnitudes[name][part] = magnitudes[name].get(part, 0) + value.double().abs().sum().item()
            for path, x_hat in path_sums(parts).items():
                error = (x_hat - x).double().square()     # (B, D)
                by_space = torch.stack([error.sum(1), error @ variance], 1)
                add_by_document(errors, (name, path), numbers, by_space)
    spread = squares - total.square() / tokens            # (D,) Σ (x - mean)²
    scale = dict(mse=tokens * len(std), fvu=spread.sum().item(), fvu_raw=(spread @ variance).item())
    results = {}
    for name in models:
        paths = {path: total for (of, path), total in errors.items() if of == name}
        results[name] = dict(
            tokens=tokens, l0=kept[name].sum().item() / tokens,
            magnitude={part: value / scale["mse"] for part, value in magnitudes[name].items()},
            sse={path: total[:, 0].cpu().numpy() for path, total in paths.items()},
            **{measure: {path: total[:, int(measure == "fvu_raw")].sum().item() / scale[measure]
                         for path, total in paths.items()} for measure in scale})
    return results

def held_out_batches(cfg, data, split, tokens):
    """Held-out activations, as evaluate takes them: an iterator of (x (B, D), documents' numbers (B,))."""
    for ids, numbers in held_out_windows(cfg, data, split, tokens):
        x = data.standardiser.encode(extract(data.lm, cfg.layer, ids, skip=data.skip))
        yield x, numbers.repeat_interleave(data.rows)


# ------------------------------------------------------------------------------------------ training
# One flat loop. A candidate is an arm at one learning rate; all candidates take each batch in turn, so that
# they are compared on the same tokens in the same order. Each arm is then represented by its best rate on
# validation documents: at one fixed rate, a comparison of arms is mostly a comparison of step sizes.

@dataclasses.dataclass
class Candidate:
    """An arm at one learning rate, `step` steps old; losses since the last log.
    counts (F,): how many of the last `counted` tokens of training kept each feature."""

    arm: str
    lr: float
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    counts: torch.Tensor
    counted: int = 0
    step: int = 0
    losses: list = dataclasses.field(default_factory=list)

def make_optimizer(model, *, lr, eps=1e-8):
    """Adam (β 0.9, 0.999) on the trainable weights, in one fused pass."""
    return torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=lr, eps=eps, fused=True)

def learning_rate(lr, step, steps, decay=0.8):
    """Falls linearly from lr to lr / 10 over the first `decay` of all steps (above 1: that many steps)."""
    return lr * (1 - 0.9 * min(1.0, step / (decay * steps if decay <= 1 else decay)))

def training_step(model, optimizer, x, *, generator=None, counts=None):
    """One step on x (B, D): loss = mean((x_hat - x)²), gradient norm clipped at 1, Adam. Returns the loss.
    generator draws the dropout mask; counts as in DualEncoder.forward. Raises FloatingPointError, before any
    weight has changed, if loss or gradient is not finite."""
    loss = (sum(model(x, generator, counts).values()) - x).square().mean()
    loss.backward()
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    if not (torch.nn.utils.clip_grad_norm_(weights, 1.0) + loss.detach()).isfinite():
        raise FloatingPointError("loss or gradient is not finite")
    optimizer.step()
    optimizer.zero_grad()                                 # no candidate's gradients outlive its step
    return loss.detach()

def train_candidates(candidates, batches, *, steps, batch, seed=0, decay=0.8, dropout=0.0):
    """The loop: every candidate takes every batch (step, epoch, x) that it has not had yet.
    A generator of epochs: it pauses fifty times a run or more, for its caller to log and to save.
    Raises UserError, naming arm and step, where training_step finds a value that is not finite."""
    every = max(1, min(steps // 50, 500))
    counted_steps = max(1, min(math.ceil(1e6 / batch), steps // 2))   # a feature is dead if none kept it
    for step, epoch, x in batches:
        for c in candidates:
            if step < c.step:                             # it had this batch before the run was interrupted
                continue
            for group in c.optimizer.param_groups:
                group["lr"] = learning_rate(c.lr, step, steps, decay)
            generator = None
            if dropout:                                   # a mask of its own, whoever is trained beside
                generator = torch.Generator(x.device)
                generator.manual_seed(zlib.crc32(f"{seed}/{c.arm}/{step}".encode()))
            counting = step >= steps - counted_steps
            try:
                c.losses.append(training_step(c.model, c.optimizer, x.to(c.model.sae.W_dec.dtype),
                                              generator=generator, counts=c.counts if counting else None))
            except FloatingPointError as error:
                raise UserError(f"arm {c.arm} at lr {c.lr:g}: the {error} at step {step} (the last "
                                f"checkpoint is kept); lower --lr in another --run") from error
            c.counted += len(x) * counting
            c.step = step + 1
        if (step + 1) % every == 0 or step + 1 == steps:
            yield epoch
            for c in candidates:
                c.losses.clear()

def save_checkpoint(path, candidates, config):
    """Write all that the training of an arm's candidates resumes from."""
    state = dict(arm=candidates[0].arm, config=json.dumps(config), candidates=[
        dict(step=c.step, model=c.model.state_dict(), optimizer=c.optimizer.state_dict(), counts=c.counts,
             counted=c.counted) for c in candidates])
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:                     # torch hides why a file could not be written
            raise error.__context__ or error from None

def load_checkpoint(path, candidates, config):
    """Bring an arm's candidates to where save_checkpoint left them. UserError for a damaged file."""
    with blame(f"{path} is not a checkpoint of this run; delete it to train that arm from the start"):
        state = torch.load(path, map_location=candidates[0].counts.device, weights_only=True)
        if state["arm"] != candidates[0].arm or json.loads(state["config"]) != config:
            raise ValueError("it belongs to another arm or another configuration")
        for c, stored in zip(candidates, state["candidates"], strict=True):
            c.model.load_state_dict(stored["model"])
            c.optimizer.load_state_dict(stored["optimizer"])
            c.counts.copy_(stored["counts"])
            c.counted, c.step = stored["counted"], stored["step"]

def sizes_of(cfg, D):
    """make_arm's sizes, from a configuration."""
    return dict(D=D, F=cfg.features, k=cfg.k, n=cfg.n, K=cfg.embedding, top=cfg.top, dropout=cfg.dropout)

def meta_arms(cfg, names, D):
    """Arms on torch's meta device, which holds no data: {name: module}. Raises UserError for a bad name."""
    with torch.device("meta"):
        parent = DualEncoder(TopKSAE(D, cfg.features, cfg.k))
        return {name: make_arm(name, parent=parent, **sizes_of(cfg, D)) for name in names}

def arm_bytes(model, cfg):
    """Bytes of training an arm at all rates: weights and Adam's moments, held throughout; gradients and the
    two largest temporaries, (B, F) each, needed on top in a step."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rates, size = len(cfg.lr), getattr(torch, cfg.param_dtype).itemsize
    return tuple(size * number for number in (
        rates * count_parameters(model), rates * 2 * trained, trained, 2 * cfg.batch * model.learner.F))

def memory_budget(device):
    """Bytes to plan with: nine tenths of what is free on a GPU, half of this machine's memory for a CPU."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

def group_passes(costs, budget):
    """Group arms so that each group fits, children after parents: costs {arm: arm_bytes} -> lists of arms."""
    groups = []
    for generation in (set(costs) - set(CHILDREN), set(costs) & set(CHILDREN)):
        group = []
        for name in filter(generation.__contains__, costs):
            together = [costs[other] for other in (*group, name)]
            if group and sum(sum(c[:2]) for c in together) + max(sum(c[2:]) for c in together) > budget:
                groups.append(group)
                group = []
            group.append(name)
        groups += [group] if group else []
    return groups

def load_arm_of(cfg, name, D):
    """A trained arm of the run, on its device. Raises UserError for one that does not fit the run."""
    model = load_arm(cfg.run / f"{name}.safetensors").to(cfg.device)
    here = fields_of(cfg, "train") | dict(D=D, arm=name)
    there = model.config["run"] | {key: model.config[key] for key in ("D", "arm")}
    for key, value in here.items():
        if there.get(key) != value:
            raise UserError(f"{cfg.run}/{name}.safetensors was trained with {key} = {there.get(key)}, here "
                            f"it is {value}: remove that file or choose another --run")
    return model

def train_pass(cfg, data, arms):
    """Train arms, {name: candidates}, side by side over the stream, from where their checkpoints stand.
    Each arm's best candidate becomes ARM.safetensors."""
    everyone = list(itertools.chain(*arms.values()))
    plan = chunk_plan(tokens=cfg.tokens, chunk=cfg.chunk, batch=cfg.batch, rows=data.rows)
    steps = cfg.chunk_epochs * sum(batches for _, batches in plan)
    log = cfg.run / "train.jsonl"
    for name, candidates in arms.items():
        if (cfg.run / f"{name}.ckpt").exists():
            load_checkpoint(cfg.run / f"{name}.ckpt", candidates, fields_of(cfg, "train"))
            print(f"train: {name} goes on at step {candidates[0].step} of {steps}")
    start, saved = min(c.step for c in everyone), time.monotonic()
    ages = {c.arm: c.step for c in everyone}
    old = [entry for entry in read_log(log) if entry["step"] <= ages.get(entry["arm"], math.inf)]
    with replacing(log) as temporary:                     # what came after a checkpoint is logged again
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in old))

    batches = activation_batches(
        data.lm, cfg.layer, data.stream("train"), data.standardiser, plan=plan, epochs=cfg.chunk_epochs,
        seed=cfg.seed, skip=data.skip, start=start)
    bar = tqdm(batches, desc="train", unit="step", total=steps, initial=start, disable=None)
    for epoch in train_candidates(everyone, bar, steps=steps, batch=cfg.batch, seed=cfg.seed, decay=cfg.decay,
                                  dropout=cfg.dropout):
        new = [dict(arm=c.arm, lr=c.lr, step=c.step, text_epoch=epoch + 1,
                    mse=torch.stack(c.losses).mean().item()) for c in everyone if c.losses]
        with blame(f"cannot write {log}"), open(log, "a") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in new))
        if time.monotonic() - saved >= 60 * cfg.save_minutes:
            for name, candidates in arms.items():
                save_checkpoint(cfg.run / f"{name}.ckpt", candidates, fields_of(cfg, "train"))
            saved = time.monotonic()
    validation = held_out_batches(cfg, data, "validation", math.ceil(cfg.eval_tokens / 4))
    validated = evaluate({(c.arm, c.lr): c.model.float().eval() for c in everyone}, validation,
                         std=data.standardiser.std)
    for name, candidates in arms.items():
        errors = {c.lr: validated[name, c.lr]["mse"]["full"] for c in candidates}
        best = min(candidates, key=lambda c: errors[c.lr])
        save_arm(cfg.run / f"{name}.safetensors", best.model, data.standardiser, dict(
            sizes_of(cfg, data.D), arm=name, steps=steps, lr=best.lr,
            validation_mse={f"{lr:g}": mse for lr, mse in errors.items()},
            dead=(best.counts == 0).double().mean().item(), dead_tokens=best.counted,
            run=fields_of(cfg, "train")))
        (cfg.run / f"{name}.ckpt").unlink(missing_ok=True)
        print(f"train: {name}: validation mse", *(f"{mse:.4f} at lr {lr:g}" for lr, mse in errors.items()))

def run_train(cfg):
    """Stage `train`: train the arms named that are not there yet, in as few passes as memory allows."""
    meta_arms(cfg, cfg.arms, D=1)                         # a name that cannot be is refused before any work
    wanted = [name for name in dict.fromkeys(cfg.arms) if not (cfg.run / f"{name}.safetensors").exists()]
    if not wanted:
        return print(f"train: all there: {' '.join(cfg.arms)}")
    children = [name for name in wanted if name in CHILDREN]
    if children and "sae" not in wanted and not (cfg.run / "sae.safetensors").exists():
        raise UserError(f"arm {children[0]} is built on a trained `sae`: train that first")
    data = open_data(cfg)

    def candidate(name, lr):
        parent = load_arm_of(cfg, "sae", data.D) if name in CHILDREN else None
        torch.manual_seed(cfg.seed)                       # one draw for all arms and rates
        model = make_arm(name, parent=parent, **sizes_of(cfg, data.D))
        model = model.to(cfg.device, getattr(torch, cfg.param_dtype))
        return Candidate(name, lr, model.train(), make_optimizer(model, lr=lr, eps=cfg.adam_eps),
                         torch.zeros(model.learner.F, device=cfg.device))
    costs = {name: arm_bytes(model, cfg) for name, model in meta_arms(cfg, wanted, D=data.D).items()}
    for names in group_passes(costs, memory_budget(cfg.device)):
        train_pass(cfg, data, {name: [candidate(name, lr) for lr in cfg.lr] for name in names})


# ------------------------------------------------------------------------------------------ reconstruction
# A claim of the paper stands under the paper's own metric and under the controls that could refute it. It is
# data: what it says, the paper's value, and where its figures are, as STAGE/ARM/… for results/STAGE.json.

CLAIMS = (
    ("claim 1: joint training cuts the reconstruction error (paper: 41.3 %, mse 0.275 to 0.162)", (
        ("paper's metric", "joint against its own SAE path", "recon/joint/gain/full/published"),
        ("control", "joint against sae", "recon/joint/gain/full/matched"),
        ("", "sae-2dec, exactly an SAE, against its own SAE path", "recon/sae-2dec/gain/full/published"),
        ("", "sae-2dec against sae", "recon/sae-2dec/gain/full/matched"),
        ("", "joint against sae-2dec", "recon/joint/gain/full/sae-2dec"),
        ("", "joint against sae@matched, as many parameters", "recon/joint/gain/full/parameter_matched"))),
    ("claim 2: an NFM on a trained SAE's residual cuts its error (paper: 23.4 % on validation)", (
        ("paper's metric", "sequential against the cut SAE", "recon/sequential/gain/full/published"),
        ("control", "residual-sae against the same", "recon/residual-sae/gain/full/published"),
        ("", "sequential against the uncut sae", "recon/sequential/gain/full/matched"),
        ("", "residual-sae against the uncut sae", "recon/residual-sae/gain/full/matched"))),
    ("claim 3: the interaction is a small share of the NFM; paths sub-additive (paper: 6 %, 4.5 %)", (
        ("paper's metric", "joint: interaction's share of mean |output|", "recon/joint/interaction_share"),
        ("", "sequential: interaction's share of mean |output|", "recon/sequential/interaction_share"),
        ("control", "joint: error cut by linear, added first", "recon/joint/gain/sae+linear/published"),
        ("", "joint: by interaction, added first", "recon/joint/gain/sae+interaction/published"),
        ("", "joint: the two first cuts less the cut by both", "recon/joint/cuts_less_joint_cut"),
        ("", "joint: by linear, added last", "recon/joint/gain/full/without-linear"),
        ("", "joint: by interaction, added last", "recon/joint/gain/full/without-interaction"),
        ("", "joint against joint-linear", "recon/joint/gain/full/joint-linear"),
        ("", "joint against joint-interaction", "recon/joint/gain/full/joint-interaction"),
        ("", "joint-linear against sae", "recon/joint-linear/gain/full/matched"),
        ("", "joint-interaction against sae", "recon/joint-interaction/gain/full/matched"),
        ("", "joint-mlp, without a product, against sae", "recon/joint-mlp/gain/full/matched"))),
    ("claim 4: the SAE alone explains most of the variance (paper: 86.4 %, mse 0.136)", (
        ("paper's metric", "sae: 1 - mse, yet on documents held out", "recon/sae/explained/mse"),
        ("control", "sae: 1 - fvu", "recon/sae/explained/fvu"),
        ("", "sae: 1 - fvu in raw space", "recon/sae/explained/fvu_raw"),
        ("", "sae: dead features", "recon/sae/dead"))),
    ("claim 5: joint training cuts KL (paper: 51.9 %, linear 50.9, nonlinear 8.6), CE (26.2 % of all)", (
        ("paper's metric", "KL, joint against its own SAE path", "kl/joint/full/cut/published"),
        ("", "its linear path alone", "kl/joint/sae+linear/cut/published"),
        ("", "its interaction alone", "kl/joint/sae+interaction/cut/published"),
        ("", "CE, joint against its own SAE path, of all CE", "kl/joint/full/ce_cut_of_total"),
        ("", "KL, sequential against the cut SAE (29.8 %)", "kl/sequential/full/cut/published"),
        ("control", "KL, joint against sae", "kl/joint/full/cut/matched"),
        ("", "KL, joint against sae@matched", "kl/joint/full/cut/parameter_matched"),
        ("", "KL, sae-2dec against its own SAE path", "kl/sae-2dec/full/cut/published"),
        ("", "CE recovered, sae", "kl/sae/full/ce_recovered"),
        ("", "CE recovered, joint", "kl/joint/full/ce_recovered"))),
    ("claim 6: SAE errors cost more than random ones of their size (paper: 299 % of the KL; 210 %)", (
        ("paper's metric", "joint's own SAE path, KL over random error's", "kl/joint/sae/kl_over_random"),
        ("", "sequential's cut SAE, KL over random error's", "kl/sequential/sae/kl_over_random"),
        ("control", "sae, KL over random error's", "kl/sae/full/kl_over_random"),
        ("", "joint in full, KL over random error's", "kl/joint/full/kl_over_random"))),
    ("claim 7: the nonlinear path's 3 % of parameters give a sixth of the gain (paper: 8.6 of 51.9)", (
        ("paper's metric", "KL, interaction added to the own SAE path",
         "kl/joint/sae+interaction/cut/published"),
        ("control", "KL, joint against joint-linear", "kl/joint/full/cut/joint-linear"),
        ("", "KL, joint-mlp, without a product, against it", "kl/joint-mlp/full/cut/joint-linear"))))

def percent(value):
    """A share as text, "12.3 %"; one with its interval (value, low, high) as "12.3 % [11.0, 13.6]"."""
    if isinstance(value, list):
        return f"{100 * value[0]:.1f} % [{100 * value[1]:.1f}, {100 * value[2]:.1f}]"
    return "-" if value is None else f"{100 * value:.1f} %"

def print_claims(stage, arms):
    """Print the claims that a stage measures, from the arms' entries of its results."""
    for claim, rows in CLAIMS:
        if not rows[0][2].startswith(f"{stage}/"):
            continue
        print(f"\n{claim}")
        for kind, label, where in rows:
            value = arms
            for key in where.split("/")[1:]:
                value = value.get(key) if value else None
            print(f"  {kind:16}{label:54}{percent(value):>24}")

def arm_results(own, cuts, model):
    """An arm's entry in recon.json, from what evaluate and gains have of it."""
    entry = {measure: own[measure]["full"] for measure in ("mse", "fvu", "fvu_raw")}
    entry["explained"] = {measure: 1 - value for measure, value in entry.items()}
    entry |= {key: model.config[key] for key in ("dead", "dead_tokens", "lr", "validation_mse")}
    entry |= dict(l0=own["l0"], params=count_parameters(model), gain=cuts,
                  improvement={label: value[0] for label, value in cuts["full"].items()})
    if "sae" in own["mse"]:
        entry |= dict(fvu_by_path=own["fvu"], mse_by_path=own["mse"], magnitude=own["magnitude"])
    if len(own["magnitude"]) == 2:                        # the full path is the SAE and its one addition
        entry["fvu_by_path"][f"sae+{[*own['magnitude']][1]}"] = own["fvu"]["full"]
    if "sae+interaction" in own["mse"]:
        linear, interaction = own["magnitude"]["linear"], own["magnitude"]["interaction"]
        first = [cuts[path]["published"][0] for path in ("sae+linear", "sae+interaction", "full")]
        entry |= dict(interaction_share=interaction / (linear + interaction),
                      cuts_less_joint_cut=first[0] + first[1] - first[2])
    return entry

def open_arms(cfg, **options):
    """What open_data gives, and the run's trained arms on its device, {name: model}. Raises UserError if one
    does not fit the run, or if there is no `sae` to compare with."""
    if not (cfg.run / "sae.safetensors").exists():
        raise UserError(f"{cfg.run} has no trained arm `sae` to compare with: run the stage `train` first")
    data = open_data(cfg, **options)
    stems = sorted(path.stem for path in cfg.run.glob("*.safetensors"))
    names = [stem for arm in ARMS for stem in stems if stem.partition("@")[0] == arm]
    return data, {name: load_arm_of(cfg, name, data.D) for name in names}

def measure_recon(cfg):
    """Errors of every arm on test documents: the contents of results/recon.json."""
    data, models = open_arms(cfg)
    batches = held_out_batches(cfg, data, "test", cfg.eval_tokens)
    measured = evaluate(models, batches, std=data.standardiser.std)
    cuts = gains({(name, path): sse for name, own in measured.items() for path, sse in own["sse"].items()})
    return dict(tokens=measured["sae"]["tokens"], documents=len(measured["sae"]["sse"]["full"]),
                arms={name: arm_results(measured[name], cuts[name], model) for name, model in models.items()})

def run_recon(cfg):
    """Stage `recon`: errors of every arm on test documents; prints claims 1 to 4 beside their controls."""
    results = stage_results(cfg, lambda: measure_recon(cfg))
    arms, paths = results["arms"], ("sae", "sae+linear", "sae+interaction", "sae+residual", "full")
    print(f"\nReconstruction of {results['tokens']:,} tokens of {results['documents']} held-out documents, "
          f"layer {cfg.layer}, after {cfg.tokens:,} training tokens, seed {cfg.seed}")
    table(("arm", "parameters", "lr", "mse", "fvu", "fvu raw", "L0", "dead", "gain over sae [95 %]"), *(
        (name, f"{a['params']:,}", f"{a['lr']:g}", *(f"{a[key]:.4f}" for key in ("mse", "fvu", "fvu_raw")),
         f"{a['l0']:.1f}", percent(a["dead"]), percent(a["gain"]["full"].get("matched")))
        for name, a in arms.items()))
    print(f"  dead: kept by none of the last {arms['sae']['dead_tokens']:,} training tokens; intervals: "
          f"bootstrap over documents, one training seed\n\nfvu by path")
    by_path = {name: a["fvu_by_path"] for name, a in arms.items() if "fvu_by_path" in a}
    table(("arm", *paths), *((name, *(f"{fvu[path]:.4f}" if path in fvu else "-" for path in paths))
                             for name, fvu in by_path.items()))
    print_claims("recon", arms)
    print("\nConvergence: validation mse at each learning rate; training mse at the best, along the steps")
    log, rows = read_log(cfg.run / "train.jsonl"), []
    for name, a in arms.items():
        curve = [e["mse"] for e in log if (e["arm"], e["lr"]) == (name, a["lr"])] or [math.nan]
        along = [curve[math.ceil(share * len(curve)) - 1] for share in (0.25, 0.5, 0.75, 1)]
        rows.append((name, *(f"{value:.4f}" for value in (*a["validation_mse"].values(), *along))))
    table(("arm", *(f"lr {lr:g}" for lr in cfg.lr), "25 %", "50 %", "75 %", "100 %"), *rows)
    edge = [name for name, a in arms.items() if len(cfg.lr) > 1 and a["lr"] in (min(cfg.lr), max(cfg.lr))]
    print(f"  training read {max((e['text_epoch'] for e in log), default=0)} epoch(s) of the text; best rate "
          f"at an edge of --lr, so perhaps beyond it: {' '.join(edge) or 'none'}")


# ------------------------------------------------------------------------------------------ kl
# Splicing puts x_hat, in raw units, where its activation was read, and lets the forward go on: what does the
# language model lose? An error's direction matters as well as its size, so each path stands beside an
# isotropic error of its own size; a cut of KL stands beside `sae` too, not only beside the own SAE path.

def kl_divergence(logits_p, logits_q):
    """KL(p ‖ q) of next-token distributions, in nats: logits (…, vocabulary), twice -> (…).
    A few rows at a time, so that no third tensor of that size is made."""
    parts = []
    rows_p, rows_q = (logits.reshape(-1, logits.shape[-1]).split(256) for logits in (logits_p, logits_q))
    for p, q in zip(rows_p, rows_q, strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts).view(logits_p.shape[:-1])

def epsilon_random(x, x_hat, generator):
    """x with an isotropic error as long as x_hat - x, a direction a row: (…, D) -> like x (Gurnee, 2024)."""
    direction = torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype)
    return x + direction * ((x_hat - x).norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True))

def measure_kl(cfg):
    """What each path of each arm costs the language model on test documents, as kl_results tells it.
    Summed by document are KL, KL², tokens, cross-entropy, and tokens that have a next one."""
    (data, models), sums = open_arms(cfg, whole=True), {}
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    for tokens, numbers in held_out_windows(cfg, data, "test", cfg.kl_tokens):
        read = []

        def keep(hidden, read=read):
            read.append(hidden)
            return hidden
        clean = splice(data.lm, cfg.layer, tokens, keep)
        raw = read[0][:, data.skip:].float()              # (windows, tokens of each, D)

        def score(key, new, tokens=tokens, numbers=numbers, clean=clean):
            logits = splice(data.lm, cfg.layer, tokens, lambda hidden: torch.cat(
                [hidden[:, :data.skip], new.view(len(tokens), -1, data.D).to(hidden.dtype)], 1))
            kl = kl_divergence(clean, logits)[:, data.skip:].double()
            ce = torch.nn.functional.cross_entropy(
                logits[:, data.skip:-1].transpose(1, 2).float(), tokens[:, data.skip + 1:], reduction="none")
            ones = torch.ones_like(kl)
            row = [part.double().sum(1) for part in (kl, kl.square(), ones, ce, ones[:, 1:])]
            add_by_document(sums, key, numbers, torch.stack(row, 1))
        score(("clean", ""), raw)
        score(("mean", ""), data.standardiser.mean.expand_as(raw))
        x = data.standardiser.encode(raw).flatten(0, 1)
        for name, model in models.items():
            with torch.no_grad():
                paths = path_sums(model(x))
            for path, x_hat in paths.items():
                new = data.standardiser.decode(x_hat).view_as(raw)
                score((name, path), new)
                score((name, path, "random"), epsilon_random(raw, new, generator))
    return kl_results({key: total.cpu().numpy() for key, total in sums.items()})

def kl_results(sums):
    """The contents of results/kl.json, from measure_kl's sums. CE recovered is 1 for the clean model, 0 for
    activations replaced by their mean. Each cut of KL stands with two p-values: the published test, unpaired,
    over tokens as if they were independent, and the paired one over documents."""
    from scipy.stats import ttest_ind_from_stats, ttest_rel
    means = {key: (total[:, 0].sum() / total[:, 2].sum(), total[:, 3].sum() / total[:, 4].sum())
             for key, total in sums.items()}

    def moments(key):
        kl, square, tokens = sums[key][:, :3].sum(0)
        return kl / tokens, (max(0.0, square - kl ** 2 / tokens) / max(1, tokens - 1)) ** 0.5, tokens
    (identity, clean), (lost_kl, lost), arms = means["clean", ""], means["mean", ""], {}
    spliced = {key: total[:, 0] for key, total in sums.items() if len(key) == 2 and key[1]}
    for name, paths in gains(spliced).items():
        for path, cut in paths.items():
            key, (kl, ce) = (name, path), means[name, path]
            arms.setdefault(name, {})[path] = entry = dict(
                kl=kl, ce=ce, kl_over_random=kl / means[name, path, "random"][0], excess_ce=ce - clean,
                ce_recovered=(lost - ce) / (lost - clean), cut=cut, p={})
            for label in cut:
                base = (BASES[label][0] or name, BASES[label][1])
                by_document = [sums[which][:, 0] / sums[which][:, 2] for which in (key, base)]
                entry["p"][label] = dict(
                    published=float(ttest_ind_from_stats(*moments(key), *moments(base)).pvalue),
                    paired=float(ttest_rel(*by_document).pvalue))
            if "published" in cut:
                entry["ce_cut_of_total"] = 1 - ce / means[name, "sae"][1]
    return dict(arms=arms, clean_ce=clean, mean_ablated=dict(kl=lost_kl, ce=lost), identity_kl=identity,
                tokens=int(sums["clean", ""][:, 2].sum()), documents=len(sums["clean", ""]))

def run_kl(cfg):
    """Stage `kl`: KL and cross-entropy with each path spliced in; prints claims 5 to 7 and their controls."""
    results = stage_results(cfg, lambda: measure_kl(cfg))
    arms = results["arms"]
    print(f"\nSplicing on {results['tokens']:,} tokens of {results['documents']} held-out documents; clean "
          f"CE {results['clean_ce']:.4f}, mean-ablated CE {results['mean_ablated']['ce']:.4f}")
    table(("arm, path", "KL", "over random's", "excess CE", "CE recovered", "KL cut against sae [95 %]"), *(
        (f"{name}, {path}", f"{p['kl']:.4f}", f"{p['kl_over_random']:.2f}", f"{p['excess_ce']:.4f}",
         percent(p["ce_recovered"]), percent(p["cut"].get("matched")))
        for name, paths in arms.items() for path, p in paths.items()))
    print_claims("kl", arms)


# ------------------------------------------------------------------------------------------ plan
# What a run costs, before anything is downloaded. Modules are built on torch's meta device, which holds no
# data.

def lm_shape(cfg):
    """(parameters, those in use, those that run before the layer, D) of the run's language model."""
    from transformers import AutoConfig, AutoModelForCausalLM
    known = LM_CONFIGS.get(cfg.model)
    if known is None and not pathlib.Path(cfg.model).is_dir():
        raise UserError(f"plan knows {', '.join(LM_CONFIGS)} and directories; {cfg.model} is neither")
    known = known or read_json(pathlib.Path(cfg.model) / "config.json")
    with blame(f"{cfg.model} is not a language model that plan can read"), torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known))
    blocks = find_blocks(lm, cfg.layer)
    used = count_parameters(lm.base_model) - sum(map(count_parameters, blocks[cfg.layer + 1:]))
    run = sum(map(count_parameters, blocks[:cfg.layer]))
    return count_parameters(lm), used, run, lm.config.get_text_config().hidden_size

def step_flops(model, D):
    """Operations of one training step, a token: two for each multiply-add of the products and gradients."""
    def sae_products(sae):
        return D * sae.F + (4 if sae.W_dec.requires_grad else 1) * sae.k * D
    sae, nfm = model.sae, model.nfm
    products = sae_products(sae) + (sae_products(model.second) if model.second else 0)
    if nfm and nfm.has_linear:
        products += 3 * nfm.n * D
    if nfm and nfm.pooling:
        K = nfm.V.shape[1]
        products += 3 * ((2 if nfm.pooling == "product" else 1) * nfm.n * K + K * K + K * D)
    return 2 * products

def run_plan(cfg):
    """Stage `plan`: parameters, memory, operations and disk of a run, and whether it fits."""
    lm_parameters, lm_used, lm_run, D = lm_shape(cfg)
    arms = meta_arms(cfg, ("joint", *cfg.arms), D)
    joint, whole = arms["joint"], count_parameters(arms["joint"])
    linear = joint.nfm.W_lin.numel() + joint.nfm.b_lin.numel()
    parts = dict(SAE=count_parameters(joint.sae), linear=linear)
    parts["nonlinear"] = whole - sum(parts.values())
    print(f"preset {cfg.preset}: D={D:,} F={cfg.features:,} k={cfg.k:,} n={cfg.n} K={cfg.embedding}\njoint: "
          f"{whole / 1e6:.1f} M parameters:", ", ".join(
              f"{part} {number / 1e6:.1f} M ({percent(number / whole)})" for part, number in parts.items()))
    costs = {name: arm_bytes(arms[name], cfg) for name in cfg.arms}
    table(("arm", "M parameters", "MFLOP a token", "GB: weights", "moments", "gradients", "two (B, F)"), *(
        (name, f"{count_parameters(arms[name]) / 1e6:.1f}", f"{step_flops(arms[name], D) / 1e6:.1f}",
         *(f"{size / 1e9:.2f}" for size in cost)) for name, cost in costs.items()))
    print(f"  at {len(cfg.lr)} learning rate(s); gradients and temporaries are one candidate's")
    chunk = 4 * D * min(cfg.chunk, cfg.tokens)
    print(f"language model: {lm_parameters / 1e6:,.1f} M parameters, {lm_used / 1e6:,.1f} M of them in use, "
          f"{2 * lm_run / 1e6:,.0f} MFLOP a token; a chunk of activations: {chunk / 1e9:.2f} GB\n"
          f"disk: {sum(4 * count_parameters(arms[name]) for name in costs) / 1e9:.2f} GB of arms at the end")
    cpu = cfg.device == "cpu"
    for label, size, budget in ((f"here, on {cfg.device}", 4 if cpu else 2, memory_budget(cfg.device)),
                                ("on a GPU of 24 GB", 2, 0.9 * 24e9 - 2 * lm_used)):
        passes = group_passes(costs, budget - chunk)
        misfits = [name for name in costs if sum(costs[name]) > budget - chunk]
        disk = max(sum(sum(costs[name][:2]) for name in names) + max(sum(costs[name][:2]) for name in names)
                   for names in passes)
        verdict = "passes: " + " | ".join(map(" ".join, passes))
        if misfits:
            verdict = f"{' '.join(misfits)} won't fit: fewer --lr, a smaller --features or --batch"
        print(f"{label}: language model {size * lm_used / 1e9:.2f} GB, {max(0, budget) / 1e9:.1f} GB for the "
              f"rest, checkpoints {disk / 1e9:.2f} GB on disk; {verdict}")


# ------------------------------------------------------------------------------------------ command line

STAGES = {"plan": run_plan, "lm": run_lm, "train": run_train, "recon": run_recon, "kl": run_kl}
DEFAULT_ARMS = ["sae", "sae-2dec", "joint", "joint-linear", "joint-interaction", "joint-mlp", "sae@matched",
                "sequential", "residual-sae"]

def parser():
    """The command line: one subparser a stage, each with the flags that it reads."""
    top = argparse.ArgumentParser(prog="dualenc.py", allow_abbrev=False, description=__doc__.split("\n\n")[0])
    stages = top.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage, function in STAGES.items():
        summary = function.__doc__.split(": ", 1)[1]
        sub = stages.add_parser(stage, help=summary, description=summary, allow_abbrev=False)
        if stage in ("plan", "train"):
            sub.add_argument("arms", nargs="*", default=DEFAULT_ARMS, metavar="ARM",
                             help=f"default: {' '.join(DEFAULT_ARMS)}")
        sub.add_argument("--preset", help=f"{', '.join(PRESETS)} (default: the run's own, else tiny)")
        sub.add_argument("--run", help="run directory (default: runs/PRESET)")
        sub.add_argument("--seed", type=int, help="of data order, weights and dropout (default: 0)")
        sub.add_argument("--device", help="cpu or cuda[:N] (default: cuda where there is one)")
        if stage == "train":
            sub.add_argument("--save-minutes", type=number, default=3, help="from checkpoint to checkpoint")
        for field, (kind, readers, text) in FLAGS.items():
            if stage in readers.split():
                tiny = PRESETS["tiny"][field]
                options = dict(action="store_true", default=None) if kind is bool else dict(
                    type=number if kind is float else kind, nargs="+" if isinstance(tiny, list) else None)
                sub.add_argument(f"--{field.replace('_', '-')}", help=f"{text}; tiny: {tiny}", **options)
    for each in (top, *stages.choices.values()):          # complaints on one line
        each.error = lambda message, each=each: each.exit(2, f"dualenc: {message} (see {each.prog} --help)\n")
    return top

def main(argv=None):
    """Run a stage. Returns the exit status: 0; 2 after one line about the user's mistake; 130 if stopped."""
    args, cfg = parser().parse_args(argv), None
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")   # else a line for each of its many tries
    try:
        cfg = resolve(args)
        STAGES[args.stage](cfg)
        return 0
    except torch.OutOfMemoryError as error:
        message = (f"out of GPU memory: lower --batch, --features or the number of --lr, in another --run "
                   f"({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        print("dualenc: stopped; the same command goes on from the last checkpoint, if any", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        message = str(error)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        message = "out of memory: lower --features, --batch or --chunk, or train fewer arms at a time"
    finally:
        if cfg and cfg.lock:
            cfg.lock.close()
    print(f"dualenc: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
