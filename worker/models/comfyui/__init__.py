"""Any transformer of the ComfyUI that the host runs: its class, weights, patches and tokens.

ComfyUI is imported in this folder alone; only `installation` and `spreading` may be imported before it is.
"""
