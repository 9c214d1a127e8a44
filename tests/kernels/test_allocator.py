"""Freed memory is kept: a tensor as large as one before it is not mapped anew."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from kernels.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    place = ctypes.c_void_p(library.malloc(size))
    ctypes.memset(place, 1, size)
    library.free(place)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(1 << 26)
print(faults(1 << 26))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_what_was_freed_is_kept() -> None:
    def second(word: str) -> int:
        asked = [sys.executable, "-c", PROGRAM, word]
        return int(subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout)

    assert second("keep") == 0
    assert second("leave") > 0
