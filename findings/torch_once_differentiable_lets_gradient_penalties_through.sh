#!/usr/bin/env bash
# torch 2.13.0: a backward marked once_differentiable takes part in a gradient penalty, and its term is lost in silence
#
# Who writes an autograd function whose backward cannot be differentiated again (a kernel, a sparse product, another
# library) marks it with torch.autograd.function.once_differentiable. Expected: whatever differentiates through that
# backward (a gradient penalty, a Hessian) raises the error that the mark is there for.
# What happens: the mark looks only at the gradient that comes in. Behind a loss that is linear in the function's output,
# such as its sum, that gradient is a constant, so the result is returned as one that needs no gradient, without the node
# that raises; that it depends on the saved input is forgotten. For y = x * x, torch.autograd.functional.hessian of the
# sum is all zeros instead of 2 on the diagonal, and the penalty |dy/dx|^2 adds nothing to a loss's gradient: 2, 4, 6 at
# x = 1, 2, 3 where 10, 20, 30 is right. Only behind a nonlinear loss is there an error. gradgradcheck, which passes
# incoming gradients that need one, does raise.
# Why it matters: a regulariser (WGAN-GP, Jacobian penalties, influence functions) that trains without any effect looks
# like one that was given too small a weight. A test that the error comes must use a sum as its loss. What does refuse:
# the first line of the backward asks torch.is_grad_enabled(), true exactly under create_graph, and raises.
#
# Output seen, November 2026:
#   Hessian of the sum, marked backward: [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
#   Hessian of the sum, torch's square:  [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]
#   gradient of loss + penalty, marked backward: [2.0, 4.0, 6.0]
#   gradient of loss + penalty, torch's square:  [10.0, 20.0, 30.0]
#   behind a square, marked backward: RuntimeError
#   gradgradcheck, marked backward: GradcheckError
#   Hessian, a backward that asks torch.is_grad_enabled(): RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.autograd.function import once_differentiable

class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, = ctx.saved_tensors
        return 2 * x * g

class Asking(torch.autograd.Function):
    forward = Marked.forward

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise RuntimeError("no second derivative")
        x, = ctx.saved_tensors
        return 2 * x * g

def hessian(square):
    return torch.autograd.functional.hessian(lambda x: square(x).sum(), torch.tensor([1.0, 2.0, 3.0])).tolist()

def penalised(square):
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    slope, = torch.autograd.grad(square(x).sum(), x, create_graph=True)
    (square(x).sum() + slope.square().sum()).backward()
    return x.grad.tolist()

def behind_a_square():
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    slope, = torch.autograd.grad(Marked.apply(x).square().sum(), x, create_graph=True)
    slope.sum().backward()

def said(what, function):
    try:
        function()
    except RuntimeError as error:
        print(f"{what}:", type(error).__name__)
        return True

marked, right = hessian(Marked.apply), hessian(torch.square)
print("Hessian of the sum, marked backward:", marked)
print("Hessian of the sum, torch's square: ", right)
assert marked == torch.zeros(3, 3).tolist() and right == (2 * torch.eye(3)).tolist()
marked, right = penalised(Marked.apply), penalised(torch.square)
print("gradient of loss + penalty, marked backward:", marked)
print("gradient of loss + penalty, torch's square: ", right)
assert marked == [2, 4, 6] and right == [10, 20, 30]
assert said("behind a square, marked backward", behind_a_square)
x = torch.rand(3, dtype=torch.float64, requires_grad=True)
assert said("gradgradcheck, marked backward", lambda: torch.autograd.gradgradcheck(Marked.apply, x))
assert said("Hessian, a backward that asks torch.is_grad_enabled()", lambda: hessian(Asking.apply))
PY
echo "as described"
