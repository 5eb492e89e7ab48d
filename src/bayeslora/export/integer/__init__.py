"""Integer models: a base model and a B-LoRA adapter as codes at the learned widths."""
