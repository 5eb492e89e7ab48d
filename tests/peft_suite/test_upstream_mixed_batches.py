"""Mixed-adapter batches on transformers, with upstream's gate lifted.

Upstream runs these two tests for a fixed list of its own classes and skips everybody else. For the length of a test,
the name it compares with is bound to the class under test.
"""

from __future__ import annotations

from typing import Any

import pytest
from peft_upstream import test_decoder_models as decoder
from peft_upstream import test_encoder_decoder_models as encoder_decoder
from peft_upstream import testing_common as common

from . import test_upstream  # noqa: F401  (fills the parameter lists)


@pytest.fixture(autouse=True)
def lifted_gate(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (common, decoder, encoder_decoder):
        monkeypatch.setattr(module, "LoraConfig", request.node.callspec.params["config_cls"])


class TestMixedBatchesOfDecoders(common.PeftCommonTester):
    transformers_class = decoder.TestDecoderModels.transformers_class
    prepare_inputs_for_testing = decoder.TestDecoderModels.prepare_inputs_for_testing
    test_mixed_adapter_batches = decoder.TestDecoderModels.test_mixed_adapter_batches
    test_generate_with_mixed_adapter_batches = decoder.TestDecoderModels.test_generate_with_mixed_adapter_batches


class TestMixedBatchesOfEncoderDecoders(common.PeftCommonTester):
    transformers_class = encoder_decoder.TestEncoderDecoderModels.transformers_class
    prepare_inputs_for_testing = encoder_decoder.TestEncoderDecoderModels.prepare_inputs_for_testing
    test_mixed_adapter_batches = encoder_decoder.TestEncoderDecoderModels.test_mixed_adapter_batches
    test_generate_with_mixed_adapter_batches = (
        encoder_decoder.TestEncoderDecoderModels.test_generate_with_mixed_adapter_batches
    )
