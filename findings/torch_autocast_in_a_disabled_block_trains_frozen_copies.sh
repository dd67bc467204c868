#!/usr/bin/env bash
# torch 2.13.0: autocast entered anew for each step, inside a block that switches autocast off, trains without effect
#
# A training loop enters torch.autocast around each forward and leaves it before backward(), as the documentation asks: a
# step's rounded copies of the weights are dropped when its block ends. Expected: a block around the whole loop that
# only switches autocast off (enabled=False, as use_amp flags and trainers write it) changes nothing.
# What happens: the copies are dropped when the *outermost* autocast block ends, whatever it was entered for. Inside a
# disabled block, even one for another device type ("cuda" around a loop on a CPU), the second step's forward still reads
# the first step's copies. Gradients flow to the weights and the optimizer moves them, but every forward is that of the
# weights at the start: the loss does not change by one digit, no error, no warning. An evaluation inside the outer block
# under autocast scores the start too, one without autocast scores weights that drifted along one constant gradient.
# Why it matters: the loop is right by itself and breaks by where it is called from. That one autocast block around a
# whole loop is wrong is known; that a disabled one is enough, and one for a device that is not used, is not what
# enabled=False says. What helps: cache_enabled=False on the step's block, or torch.clear_autocast_cache() after
# optimizer.step().
#
# Output seen, November 2026 (losses of four steps on a linear map):
#   no block around the loop:                [10.3708, 7.7074, 5.7856, 4.3835]
#   autocast("cpu", enabled=False) around:   [10.3708, 10.3708, 10.3708, 10.3708]
#   autocast("cuda", enabled=False) around:  [10.3708, 10.3708, 10.3708, 10.3708]
#   the same, cache_enabled=False in a step: [10.3708, 7.7074, 5.7856, 4.3835]
#   the same, cache cleared after each step: [10.3708, 7.7074, 5.7856, 4.3835]
#   weights moved from the start, no block around: 3.8267, disabled block: 4.8039
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import contextlib
import torch

def train(around, cache=True, clear=False):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(64, 8)
    y, start, losses = x @ torch.randn(8, 8), model.weight.detach().clone(), []
    with around:
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
                prediction = model(x)
            loss = (prediction.float() - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if clear:
                torch.clear_autocast_cache()
            losses.append(round(loss.item(), 4))
    return losses, (model.weight - start).norm().item()

alone, moved = train(contextlib.nullcontext())
cpu, drifted = train(torch.autocast("cpu", enabled=False))
cuda, _ = train(torch.autocast("cuda", enabled=False))
uncached, _ = train(torch.autocast("cpu", enabled=False), cache=False)
cleared, _ = train(torch.autocast("cpu", enabled=False), clear=True)
for name, losses in (("no block around the loop:", alone), ('autocast("cpu", enabled=False) around:', cpu),
                     ('autocast("cuda", enabled=False) around:', cuda),
                     ("the same, cache_enabled=False in a step:", uncached),
                     ("the same, cache cleared after each step:", cleared)):
    print(f"{name:40} {losses}")
print(f"weights moved from the start, no block around: {moved:.4f}, disabled block: {drifted:.4f}")
assert alone[0] > alone[1] > alone[2] > alone[3] and len(set(cpu)) == len(set(cuda)) == 1
assert uncached == cleared == alone and drifted > 1.2 * moved
PY
echo "as described"
