#!/usr/bin/env bash
# Builds for this machine's GPU, tests and measures: scripts/gpu_check.sh OUT [WHEELS] [OPTION]...
#
# Needs a GPU, nvcc, and a python3 with torch; no network. WHEELS: a folder with the packages that this python3 lacks
# (blake3; lmcache too, for comparison). OPTIONs and results are those of scripts/gpu_check.py; --help prints them.
# The most informative steps come first, and all together take less than 10 minutes. CONTRIBUTING.md says how to prepare
# for a machine that is lent for minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 1 ] || [[ $1 == -* ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0"
  exit 2
fi
out=$(realpath -m "$1")
shift
wheels=""
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
  wheels=$(realpath "$1")
  shift
fi
mkdir -p "$out"
venv=$(mktemp -d)/venv
python3 -m venv --without-pip --system-site-packages "$venv"
# If python3 itself is in a virtual environment, its packages are found too, and its programs, such as cmake and ninja,
# which need not be on the PATH if python3 is a link.
programs=$(python3 - "$venv" <<'PYTHON'
import os, site, sys
from pathlib import Path
paths = "\n".join(site.getsitepackages())
next(Path(sys.argv[1]).glob("lib/python3*/site-packages")).joinpath("outer.pth").write_text(paths)
print(Path(sys.executable).parent, Path(sys.prefix) / "bin", Path(sys.executable).resolve().parent, sep=os.pathsep)
PYTHON
)
[ -n "$wheels" ] && python3 -m pip --python "$venv/bin/python" install --quiet --no-index --no-deps "$wheels"/*.whl
PATH="$PATH:$programs" exec "$venv/bin/python" scripts/gpu_check.py "$out" "$@"
