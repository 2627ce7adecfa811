"""One safeguard of the kernels, taken away."""

from __future__ import annotations

from dataclasses import dataclass

KEYS, COPY, SPAN, TABLE, ERROR = "prefix_keys.cu", "page_copy.cu", "copy_span.h", "table.h", "error.h"
TRANSFER, FRAGMENTS, WARP = "transfer.cu", "batch_copy.h", "warp_codec.h"
FAILURES = ("--api-failures",)


@dataclass
class Mutation:
    """In `file` of csrc/, `original` becomes `replacement`: an expression, or a statement where it ends with ;"""

    file: str
    what: str  # the safeguard
    original: str
    replacement: str = ""
    within: str = ""  # text that occurs once and contains `original`, if that occurs more often
    args: tuple[str, ...] = ()  # the driver's
    driver: str = ""

    def __post_init__(self) -> None:
        self.driver = self.driver or ("transfer_driver.cpp" if self.file in (TRANSFER, FRAGMENTS) else "driver.cpp")


def call(text: str, op: str = "op") -> str:
    return f"LMC_CUDA_CHECK({op}, {text});"
