"""Settings of the C library's memory allocator, and errors that mean too little memory."""

import ctypes
import errno
import sys

__all__ = ["is_out_of_memory", "keep_freed_memory"]

# torch on a CPU, C++, Python's threads and ITK raise RuntimeError; torch on a GPU a subclass of it.
_SHORTAGES = ("allocate memory", "bad_alloc", "can't start new thread", "failed to allocate", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory was short.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    True
    >>> is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    False
    """
    if isinstance(error, RuntimeError):
        return any(words in str(error).lower() for words in _SHORTAGES)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors, which is faster on a CPU.

    By default, glibc returns large blocks to the system at once. The next tensor then gets new pages, which the system
    must fill with zeros: this takes a fifth of the CPU time of a training step of ``dense``, and of a refinement. With
    this setting, the process keeps its peak memory until it ends, and the peak is 4 to 17 % higher, because blocks of
    different sizes leave gaps.

    Returns:
        True if the C library is glibc; other libraries do not have this setting.
    """
    if sys.platform != "linux":  # Windows has no CDLL(None)
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # (parameter, value) of glibc's malloc.h: M_MMAP_MAX, no separate mappings; M_TRIM_THRESHOLD, never shrink
    return mallopt is not None and all([mallopt(-4, 0), mallopt(-1, -1)])
