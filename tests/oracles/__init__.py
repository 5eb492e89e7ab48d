"""One-page references in plain torch, one per method: slow, short, and written from the equations alone."""
