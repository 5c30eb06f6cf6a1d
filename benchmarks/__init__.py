"""Measurements: `make bench`, `make parity`, `make simulate`. Times of tiny models are not remembered."""

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="comfy_xdit_bench_")
os.environ.setdefault("XDIT_CACHE_DIR", _CACHE.name)
