"""Measurements: `make bench`, `make parity`, `make simulate`. Times of tiny models are not remembered."""

import os
import tempfile

if "XDIT_CACHE_DIR" not in os.environ:  # ranks inherit it: one that is killed could not remove its own
    _CACHE = tempfile.TemporaryDirectory(prefix="comfy_xdit_bench_")
    os.environ["XDIT_CACHE_DIR"] = _CACHE.name
