"""Running a workflow without ComfyUI: the demo, the tests and scripts."""
