#!/usr/bin/env bash
# Make one virtual environment per peer package under .venv-peers/ (about 5.5 GB with CPU builds of torch).
#   benchmarks/peers/setup.sh [saelens] [sparsify] [dictionary_learning] [delphi]   default: the first three
# TORCH chooses the torch to install first, e.g. TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu".
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3.11}
peers=("$@")
[ ${#peers[@]} -gt 0 ] || peers=(saelens sparsify dictionary_learning)
for peer in "${peers[@]}"; do
  pins=benchmarks/peers/requirements-$peer.txt
  [ -f "$pins" ] || { echo "unknown peer '$peer', expected saelens, sparsify, dictionary_learning or delphi" >&2; exit 2; }
  venv=.venv-peers/$peer
  "$python" -m venv "$venv"
  # torch first and alone: its build (CPU or CUDA) is chosen here and nothing after it may change it
  "$venv/bin/pip" install --quiet --disable-pip-version-check ${TORCH:-torch==2.13.0}
  # the pins are complete, so pip resolves nothing and cannot pull in a second torch
  grep -v '^torch==' "$pins" | "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r /dev/stdin
  echo "$peer: $("$venv/bin/python" -W ignore benchmarks/peers/checkpoint.py --peer "$peer" --list 2>/dev/null)"
done
