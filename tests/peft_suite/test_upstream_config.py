"""PEFT's tests of configuration classes.

Upstream keeps the classes in a tuple, so the marks are replaced. Its one hub repository, a LoRA adapter, is replaced
by a local folder with such an adapter's configuration.
"""

from __future__ import annotations

from peft_upstream import test_config as config

from . import cases
from .cache import cache_folder
from .models import LORA_FOLDER, build
from .refill import replace_everywhere

MODELS = build(cache_folder() / "models")
config.PEFT_MODELS_TO_TEST[:] = [(MODELS[LORA_FOLDER], "test")]
replace_everywhere(
    config.TestPeftConfig, "config_class, mandatory_kwargs", [(row.config, cases.options(row)) for row in cases.ROWS]
)

TestPeftConfig = config.TestPeftConfig
