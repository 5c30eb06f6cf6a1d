"""LoRA and other weight patches, by content and by file."""
