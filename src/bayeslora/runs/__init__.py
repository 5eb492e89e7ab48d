"""A training run as an object: planned, trained, scored, recorded and loaded again.

`bayeslora.load` is the way in. This file imports nothing: the command reads `runs.plan` before it needs torch.
"""
