#!/usr/bin/env bash
# Reproduces the paper's claims beside their controls: ./reproduce.sh [tiny|small|paper|author|test]
# tiny (the default) needs no GPU and no network beyond the package index. What is done is skipped, so that a call
# after an interruption goes on, and a call after the end only prints.
set -euo pipefail
cd "$(dirname "$0")"
preset=${1:-tiny}
case $preset in tiny|small|paper|author|test) ;; *)
  echo "reproduce.sh: unknown preset '$preset': choose tiny, small, paper, author or test" >&2; exit 2 ;; esac

if ! cmp -s requirements.txt .venv/installed 2>/dev/null; then           # a minute, once
  python3 -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/installed
fi
[ "$preset" = test ] && exec .venv/bin/python -m pytest -q test_dualenc.py

stage() { .venv/bin/python dualenc.py "$1" --preset "$preset" "${@:2}"; }

once=9; case $preset in paper|author) once=1 ;; esac                     # arms at a time: 24 GB hold one

# What each stage costs, on two cores without a GPU; `plan` tells of the memory that the other presets take.
stage plan                      # seconds           what the run needs
stage lm                        # tiny: 3 minutes   the other presets bring their language model along
stage train --at-once "$once"   # tiny: 6 minutes   every arm at every learning rate, one stream of activations
stage recon                     # seconds           claims 1 to 4, each beside its controls
stage kl                        # half a minute     claims 5 to 7
stage gram                      # seconds           claims 8 to 10, 13
stage secondary                 # 1.5 minutes       claim 12
stage anova                     # a minute          claim 11
stage inspect                   # seconds           the pairs of features that interact most
stage report                    # seconds           all of it, with figures: runs/PRESET/report.md
