"""How this process holds memory: it keeps what it has had."""

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> None:
    """Tell the C library to keep freed memory for the next tensor, instead of handing it to the
    system and back.

    A training step on a CPU frees and takes the same tensors again and again; glibc returns the
    large ones at once, and the system fills each page anew with zeros when it is first touched: a
    fifth of a step (docs/log.md). Where the C library is another one, nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 64 * 2**20)
