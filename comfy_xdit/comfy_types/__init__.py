"""The MODEL, CLIP and VAE that ComfyUI sees. The only folder of the host side that imports ComfyUI."""
