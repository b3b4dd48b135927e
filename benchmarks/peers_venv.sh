#!/usr/bin/env bash
# Make the peers' virtual environments for benchmarks/peers.py: benchmarks/peers_venv.sh DIR
#
# DIR/torch:     torch (the CPU build), torchmetrics and torch-uncertainty, without what they would pull in: their
#                torchvision breaks CPU torch. peers.py reads torch-uncertainty's metric file alone, since importing the
#                package needs lightning.
# DIR/intervals: confidenceinterval, without its own old pins of NumPy's generation.
# fd-shifts is not on the registry (and needs NumPy < 2), so no venv is made for it.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: benchmarks/peers_venv.sh DIR" >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1"
into=$(cd "$1" && pwd)
cd "$root"

make_venv() { # NAME
    [ -x "$into/$1/bin/python" ] || python3 -m venv "$into/$1"
}

make_venv torch
"$into/torch/bin/python" -m pip install -c constraints.txt torch==2.13.0 numpy matplotlib packaging lightning-utilities
"$into/torch/bin/python" -m pip install --no-deps torchmetrics==1.9.0 torch-uncertainty==0.13.0

make_venv intervals
"$into/intervals/bin/python" -m pip install -c constraints.txt numpy scipy pandas scikit-learn statsmodels setuptools
"$into/intervals/bin/python" -m pip install --no-deps confidenceinterval==1.0.5
