"""Tests inside a real ComfyUI: COMFYUI_DIR=<checkout> <its python> -m pytest tests/comfyui.

A package, so that its `server` does not hide ComfyUI's module of that name.
"""
