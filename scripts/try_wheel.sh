#!/usr/bin/env bash
# Installs the wheel in dist/ for $PYTHON beside each torch of $TORCHS, and runs examples and tests against it.
set -euo pipefail
unset PYTHONPATH
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
wheel=$(ls -t "$PWD"/dist/lmcache_mm-*-"$tag-$tag"-manylinux*_"$(uname -m)".whl | head -n 1)
work=$PWD/build/try_wheel
oldest=2.6.0
if [ "$tag" = cp314 ]; then oldest=2.10.0; fi # the first whose torch.compile runs there
for torch in ${TORCHS:-torch==$oldest torch}; do
  rm -rf "$work"
  "$python" -m venv "$work/env"
  mkdir "$work/clone" # without the package's folder, which would hide the installed one
  cp -r csrc examples tests pyproject.toml "$work/clone"
  "$work/env/bin/pip" install -q "$torch" "$wheel" 'pytest>=8' pytest-timeout hypothesis
  (
    cd "$work/clone"
    "$work/env/bin/python" -c 'import torch, lmcache_mm; print("torch", torch.__version__, lmcache_mm.__file__)'
    for example in own_loop chat layouts; do "$work/env/bin/python" "examples/$example.py"; done
    "$work/env/bin/pytest" -q tests/test_cache.py tests/test_encoder_cache.py tests/test_copies.py tests/test_operators.py
  )
done
rm -rf "$work"
