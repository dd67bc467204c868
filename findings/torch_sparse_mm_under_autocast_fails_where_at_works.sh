#!/usr/bin/env bash
# torch 2.13.0, CPU: under autocast a sparse matrix times a dense one trains as A @ M, and fails as torch.sparse.mm(A, M)
#
# A constant sparse matrix times dense features that are trained is the inner step of a graph network, and of a sparse
# decoder. Expected: torch.sparse.mm(A, M), the documented spelling, and A @ M are one operation, also inside
# torch.autocast("cpu", torch.bfloat16); what autocast cannot do in bfloat16 it leaves in float32.
# What happens: both forwards give the same bfloat16 result for a COO matrix. The backward of A @ M then gives M a float32
# gradient, that of torch.sparse.mm raises a RuntimeError about Float and BFloat16: the operands were cast below the point
# where autograd recorded them. For A's own values neither has a backward (two other errors); without autocast all of
# these work. A CSR matrix fails earlier, in the forward, in both spellings: autocast casts it to a type for which the
# CPU's product is not implemented.
# Why it matters: evaluation runs, and the first training step stops far from the product, at backward(), with an error
# that names neither autocast nor sparse. What helps: A @ M with a COO matrix that needs no gradient, or the product
# inside torch.autocast("cpu", enabled=False).
#
# Output seen, November 2026 (gradient of M, by layout and spelling):
#   coo, @, float32: torch.float32, norm 2.4493
#   coo, sparse.mm, float32: torch.float32, norm 2.4493
#   csr, @, float32: torch.float32, norm 2.4493
#   csr, sparse.mm, float32: torch.float32, norm 2.4493
#   coo, @, autocast: torch.float32, norm 2.4473
#   coo, sparse.mm, autocast: backward: RuntimeError
#   csr, @, autocast: forward: NotImplementedError
#   csr, sparse.mm, autocast: forward: NotImplementedError
#   forwards of coo under autocast equal: True
#   gradient of A's values, coo, @, autocast: backward: RuntimeError
#   gradient of A's values, coo, sparse.mm, autocast: backward: RuntimeError
#   csr, sparse.mm, autocast switched off around it: torch.float32, norm 2.4493
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import warnings
import torch
warnings.filterwarnings("ignore", "Sparse CSR")
rows, columns = [0, 0, 1, 3, 3, 5], [1, 4, 2, 0, 3, 2]
spellings = {"@": lambda A, M: A @ M, "sparse.mm": torch.sparse.mm}

def gradient(layout, spelling, cast, of_A=False, around=False):
    torch.manual_seed(1)
    values, M = torch.rand(6, requires_grad=of_A), torch.rand(5, 3, requires_grad=not of_A)
    A = torch.sparse_coo_tensor([rows, columns], values, (6, 5))
    if layout == "csr":
        A = torch.sparse_csr_tensor(torch.tensor([0, 2, 3, 3, 5, 5, 6]), torch.tensor(columns), values, (6, 5))
    try:
        where = "forward"
        with torch.autocast("cpu", torch.bfloat16, enabled=cast), torch.autocast("cpu", enabled=cast and not around):
            out = spellings[spelling](A, M)
        where = "backward"
        out.float().square().sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        return f"{where}: {type(error).__name__}"
    found = values.grad if of_A else M.grad
    return f"{found.dtype}, norm {found.norm():.4f}"

seen = {}
for cast in (False, True):
    for layout in ("coo", "csr"):
        for spelling in spellings:
            name = f"{layout}, {spelling}, {'autocast' if cast else 'float32'}"
            seen[name] = gradient(layout, spelling, cast)
            print(f"{name}: {seen[name]}")
right = seen["coo, @, float32"]
assert all(seen[f"{layout}, {spelling}, float32"] == right for layout in ("coo", "csr") for spelling in spellings)
assert seen["coo, @, autocast"].startswith("torch.float32")
assert seen["coo, sparse.mm, autocast"] == "backward: RuntimeError"
assert seen["csr, @, autocast"] == seen["csr, sparse.mm, autocast"] == "forward: NotImplementedError"
A, M = torch.sparse_coo_tensor([rows, columns], torch.rand(6), (6, 5)), torch.rand(5, 3)
with torch.autocast("cpu", torch.bfloat16):
    equal = torch.equal(A @ M, torch.sparse.mm(A, M))
print("forwards of coo under autocast equal:", equal)
assert equal
for spelling in spellings:
    found = gradient("coo", spelling, True, of_A=True)
    print(f"gradient of A's values, coo, {spelling}, autocast:", found)
    assert found == "backward: RuntimeError" and gradient("coo", spelling, False, of_A=True).startswith("torch.float32")
found = gradient("csr", "sparse.mm", True, around=True)
print("csr, sparse.mm, autocast switched off around it:", found)
assert found == right
PY
echo "as described"
