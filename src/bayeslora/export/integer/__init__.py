"""Models of integer codes: the base and a B-LoRA adapter at the learned widths."""
