#!/usr/bin/env bash
# scipy 1.17.1: the inverse of the noncentral F distribution gives 10,000 where the answer is larger, without a word
#
# A confidence interval of an effect size (partial eta squared, Cohen's f, the root mean square effect) inverts the
# noncentral F distribution: which noncentrality puts the observed F at its 5th or 95th percentile? scipy has that as
# one function, scipy.special.ncfdtrinc. Expected: a noncentrality at which scipy.special.ncfdtr gives the percentile
# back, as its sibling for the noncentral chi-square, chndtrinc, does to twelve digits; or nan where it cannot.
# What happens: from F = 20,000 with 1 and 2,000 degrees of freedom it returns 10000.0 for both percentiles, where the
# roots are 21,153 and 18,874; ncfdtr there is 1.0. That number is the bound of its search, returned as if it were the
# answer: no warning, no nan. Only under scipy.special.errstate(all="raise"), which is off by default, it says so. Below
# the bound it has three to six digits: at F = 2,000, df 1000, the 95th percentile comes back as .9511.
# Why it matters: an interval that has one point (partial eta squared .833 for both ends, where .90 and .91 are right)
# passes as a very precise estimate, below the observed effect. Solve ncfdtr for the noncentrality instead
# (scipy.optimize.brentq, or scipy.optimize.elementwise.find_root), with a bracket that grows with F.
#
# Output seen, November 2026:
#   F 20000 df 1, 2000   p 0.05: 10000.0000, root 21153.0532, cdf there 1.0000
#   F 20000 df 1, 2000   p 0.95: 10000.0000, root 18874.1495, cdf there 1.0000
#   F 2000  df 1, 1000   p 0.95: 1795.4525, root 1796.6860, cdf there 0.9511
#   chi-square 50000, df 3, p 0.95: cdf at the inverse 0.950000000000
#   with errstate(all="raise"): SpecialFunctionError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 scipy==1.17.1
"$folder/venv/bin/python" -W error - <<'PY'
from scipy.optimize import brentq
from scipy.special import SpecialFunctionError, chndtr, chndtrinc, errstate, ncfdtr, ncfdtrinc

found = {}
for F, df, p in ((20_000, 2000, 0.05), (20_000, 2000, 0.95), (2000, 1000, 0.95)):
    inverse = ncfdtrinc(1, df, p, F)
    root = brentq(lambda strength: ncfdtr(1, df, strength, F) - p, 1e-9, 3 * F)
    back = ncfdtr(1, df, inverse, F)
    found[F, p] = inverse, root, back
    print(f"F {F:<5} df 1, {df}   p {p}: {inverse:.4f}, root {root:.4f}, cdf there {back:.4f}")
back = chndtr(50_000, 3, chndtrinc(50_000, 3, 0.95))
print(f"chi-square 50000, df 3, p 0.95: cdf at the inverse {back:.12f}")
try:
    with errstate(all="raise"):
        ncfdtrinc(1, 2000, 0.05, 20_000)
except SpecialFunctionError as error:
    print('with errstate(all="raise"):', type(error).__name__)
    said = True
assert said
assert found[20_000, 0.05][0] == found[20_000, 0.95][0] == 10_000
assert found[20_000, 0.05][1] > 21_000 and found[20_000, 0.05][2] > 0.999
assert abs(found[2000, 0.95][2] - 0.95) > 1e-3 and abs(back - 0.95) < 1e-9
PY
echo "as described"
