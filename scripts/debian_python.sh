#!/usr/bin/env bash
# Unpacks a CPython of Debian's with the glibc it needs, so that it runs on an older system too, or under qemu-aarch64:
#   scripts/debian_python.sh FOLDER 3.14 [amd64|arm64]     prints FOLDER/usr/bin/python3.14
# For wheels of versions that are not installed here. Nothing is installed: it has headers, venv and pip, and no more.
# Needs apt-get, dpkg and patchelf.
set -euo pipefail
folder=$1 version=$2 arch=${3:-$(dpkg --print-architecture)}
case $arch in
  amd64) triplet=x86_64-linux-gnu loader=ld-linux-x86-64.so.2 ;;
  arm64) triplet=aarch64-linux-gnu loader=ld-linux-aarch64.so.1 ;;
esac
mkdir -p "$folder"/apt/{state/lists/partial,cache/archives/partial} "$folder/packages"
folder=$(realpath "$folder")
site=$(apt-get indextargets --format '$(REPO_URI)' 'Label: Debian' | sort -u | head -n 1)
for suite in bookworm sid; do # 3.11; 3.13 and 3.14
  echo "deb [arch=$arch signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $site $suite main"
done >"$folder/apt/sources.list"
apt=(apt-get -qq -o Dir::Etc::SourceList="$folder/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
  -o Dir::State="$folder/apt/state" -o Dir::State::status=/dev/null -o Dir::Cache="$folder/apt/cache"
  -o APT::Architecture="$arch" -o APT::Architectures="$arch" -o APT::Sandbox::User=root)
"${apt[@]}" update
packages=("python$version" "python$version-minimal" "python$version-venv" "libpython$version-minimal" "libpython$version-stdlib"
  "libpython$version-dev" python3-pip-whl libc6 libgcc-s1 libexpat1 zlib1g libssl3t64 libffi8 libbz2-1.0 liblzma5 libzstd1)
(cd "$folder/packages" && "${apt[@]}" download "${packages[@]}")
for package in "$folder"/packages/*.deb; do dpkg -x "$package" "$folder"; done
rm -rf "$folder/apt" "$folder/packages"

library=$folder/usr/lib/python$version
found=$(find "$folder" -name "$loader" -not -type d | head -n 1)
patchelf --set-interpreter "$found" --force-rpath --set-rpath "$folder/usr/lib/$triplet:$folder/lib/$triplet" \
  "$folder/usr/bin/python$version"
# What names places of the system instead of this folder: pip for venv, and the configuration for headers.
mkdir -p "$library/ensurepip/_bundled"
cp "$folder"/usr/share/python-wheels/pip-*.whl "$library/ensurepip/_bundled"
sed -i "s|'WHEEL_PKG_DIR': '[^']*'|'WHEEL_PKG_DIR': ''|" "$library"/_sysconfigdata*.py
cp --remove-destination "$folder/usr/include/$triplet/python$version/pyconfig.h" "$folder/usr/include/python$version/pyconfig.h"
echo "$folder/usr/bin/python$version"
