"""The C library's allocator, told to keep what tensors free: on CPUs they come and go by the megabyte, many times a second."""

import ctypes
import functools
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Numbers of glibc's `mallopt`."""
_ALL, _LARGE, _SOME = 2**31 - 1, 2**30, 2**26


@functools.cache
def keep_freed_memory() -> bool:
    """Keep freed memory in the process in place of giving it back to the system; whether that could be arranged (glibc only).

    By default glibc maps every large tensor anew, and the system fills its pages with zeros at the first touch: a tenth of the time of
    a training step of a 135M model, for 6% less memory at the peak.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all([libc.mallopt(_MMAP_THRESHOLD, _LARGE), libc.mallopt(_TRIM_THRESHOLD, _ALL), libc.mallopt(_TOP_PAD, _SOME)])
