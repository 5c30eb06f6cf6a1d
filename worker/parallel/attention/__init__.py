"""Attention between ranks: caught at the seam, exchanged, over blocks of keys that PipeFusion may keep."""
