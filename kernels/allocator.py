"""What a program on a CPU may ask of the C library's allocator."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of giving it back after every tensor.

    A training step on a CPU frees and asks for the same few hundred megabytes again and again; with the
    default thresholds each large tensor is mapped and zeroed anew by the kernel, a fifth of a step. Elsewhere
    than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
