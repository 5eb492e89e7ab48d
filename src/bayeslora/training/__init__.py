"""Training: optimizer groups, the four calls of a loop, `attach` for a Trainer, and labels for completions."""

from bayeslora.training.attach import attach
from bayeslora.training.completions import prompt_masked
from bayeslora.training.groups import parameter_groups
from bayeslora.training.loop import BayesLoop

__all__ = ["BayesLoop", "attach", "parameter_groups", "prompt_masked"]
