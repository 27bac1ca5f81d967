"""Give memory back between the steps of an export: each holds the weights once more, and none needs the last one's."""

import ctypes
import gc
import sys


def release() -> None:
    """Free what only cycles hold (the exporter's programs), and return to the system what glibc keeps for later."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
        if trim is not None:
            trim(0)
