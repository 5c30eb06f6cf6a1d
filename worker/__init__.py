"""The program of a rank: `python -m worker`. Runs in the ranks only; never imported by ComfyUI."""
