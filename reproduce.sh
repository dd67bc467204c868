#!/usr/bin/env bash
# Reproduces the paper's claims beside their controls: ./reproduce.sh [tiny|small|paper|author|test] [SEED]
# tiny (the default) needs no GPU and no network beyond the package index. What is done is skipped, so that a call
# after an interruption goes on, and a call after the end only prints. A seed above 0 trains another run of the
# same language model, in runs/PRESET-SEED, and compares its pairs of features with those of the first. SIZES=1
# adds arms of other sizes: does joint's gain survive capacity?
set -euo pipefail
cd "$(dirname "$0")"
preset=${1:-tiny} seed=${2:-0}
case $preset in tiny|small|paper|author|test) ;; *)
  echo "reproduce.sh: unknown preset '$preset': choose tiny, small, paper, author or test" >&2; exit 2 ;; esac

if ! cmp -s requirements.txt .venv/installed 2>/dev/null; then           # a minute, once
  python3 -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/installed
fi
[ "$preset" = test ] && exec .venv/bin/python -m pytest -q test_dualenc.py

run=runs/$preset peer=
if [ "$seed" != 0 ]; then
  [ ! -d "$run" ] || peer="--peer $run"
  run=$run-$seed
  mkdir -p "$run"
  for part in lm corpus.jsonl; do                                        # the same language model, if it is ours
    [ -e "$run/$part" ] || [ ! -e "runs/$preset/$part" ] || cp -r "runs/$preset/$part" "$run/"
  done
fi
stage() { .venv/bin/python dualenc.py "$1" --preset "$preset" --seed "$seed" --run "$run" "${@:2}"; }

once=9; case $preset in paper|author) once=1 ;; esac                     # arms at a time: 24 GB hold one

# What each stage costs, on two cores without a GPU; `plan` tells of the memory that the other presets take.
stage plan                      # seconds           what the run needs
stage lm                        # tiny: 3 minutes   the other presets bring their language model along
stage train --at-once "$once"   # tiny: 6 minutes   every arm at every learning rate, one stream of activations
[ -z "${SIZES:-}" ] || stage train {sae,joint}@{0.25x,0.5x,2x} --at-once "$once"
stage recon                     # seconds           claims 1 to 4, each beside its controls
stage kl                        # half a minute     claims 5 to 7
stage gram                      # seconds           claims 8 to 10, 13
stage secondary                 # a minute          claim 12
stage anova                     # a minute          claim 11
stage pairs $peer               # seconds           the pair test of integration, which needs no gain
stage inspect                   # seconds           the pairs that pass it, in their contexts
stage synth                     # 4 minutes         worlds whose answer is known: what a gain proves
stage report                    # seconds           all of it, with figures: runs/PRESET/report.md
