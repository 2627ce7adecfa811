"""Makes FOLDER hold what programs are linked with so that they run with glibc 2.28, on whatever system they are linked:

    python scripts/old_glibc.py FOLDER [x86_64|aarch64]
    LDFLAGS="-LFOLDER -static-libstdc++" ...

Zig (from PyPI) knows the symbols of all versions of glibc and makes stubs of its libraries. libstdc++ comes from the
compiler and is newer than what systems of that age have, so it is linked statically.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

VERSION = "2.28"
LIBRARIES = {"libm": 6, "libpthread": 0, "libdl": 2, "librt": 1}
# Of glibc 2.32, for libstdc++ to leave out atomic operations in a process with one thread: 0 says that there are more.
SINGLE_THREADED = 'char __libc_single_threaded __attribute__((visibility("hidden")));\n'


def make(folder: Path, machine: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "single_threaded.c"
    source.write_text(SINGLE_THREADED)
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu.{VERSION}"]
    caches = {"ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"), "ZIG_LOCAL_CACHE_DIR": str(folder / "zig")}
    environment = {**os.environ, **caches}
    linking = [*zig, "-shared", str(source), "-o", str(folder / "unused.so"), "-v", "-lpthread", "-ldl", "-lrt", "-lm"]
    said = subprocess.run(linking, check=True, capture_output=True, text=True, env=environment).stderr
    paths = [Path(path).resolve() for path in re.findall(r"\S+/lib\w+(?:\.so\.\d+|_nonshared\.a)", said)]
    made = {path.name: path for path in paths}
    for name, version in LIBRARIES.items():
        link = folder / f"{name}.so"
        link.unlink(missing_ok=True)
        link.symlink_to(made[f"{name}.so.{version}"])
    compiled = folder / "single_threaded.o"
    subprocess.run([*zig, "-fPIC", "-c", str(source), "-o", str(compiled)], check=True, env=environment)
    group = " ".join(str(one) for one in (made["libc.so.6"], made["libc_nonshared.a"], compiled))
    (folder / "libc.so").write_text(f"GROUP ( {group} )\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve(), sys.argv[2] if len(sys.argv) > 2 else "x86_64")
