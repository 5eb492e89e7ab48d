"""PEFT's tests of custom models, decoders, encoder-decoders, feature extraction, classification and QA.

The classes are upstream's; only what they are parametrised over is ours.
"""

from __future__ import annotations

from peft_upstream import test_custom_models as custom
from peft_upstream import test_decoder_models as decoder
from peft_upstream import test_encoder_decoder_models as encoder_decoder
from peft_upstream import test_feature_extraction_models as features
from peft_upstream import test_seq_classifier as sequences
from peft_upstream import test_token_classification_qa as tokens

from . import cases
from .cache import cache_folder
from .models import DECODERS, build
from .refill import replace_everywhere, replace_parameters

MODELS = build(cache_folder() / "models")
CLASSES = list(cases.CLASSES.values())
LIN0 = {"target_modules": ["lin0"]}
LIN1 = {"target_modules": ["lin1"]}
SAVED = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}

custom.TEST_CASES[:] = cases.custom_cases()
custom.ALL_PEFT_CONFIG_CLASSES[:] = CLASSES
custom.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = cases.several_active_cases()
custom.MIXED_ADAPTER_TEST_CASES[:] = cases.pairs(LIN0, {**LIN0, "r": 16})
replace_everywhere(custom.TestDefaultTargetModules, "config_cls", CLASSES)
for name in (
    "test_multiple_adapters_mixed_modules_to_save",
    "test_multiple_adapters_mixed_modules_to_save_order_switched",
):
    replace_parameters(custom.TestPeftCustomModel, name, "config_cls", CLASSES)
replace_parameters(
    custom.TestPeftCustomModel,
    "test_adapter_name_makes_no_difference",
    "config0",
    [cases.instance(row, **LIN0, init_weights=False) for row in cases.ROWS],
)
for name, pairs in {
    "test_mixed_adapter_batches_different_target_layers": cases.pairs(LIN0, LIN1),
    "test_mixed_adapter_batches_multiple_modules_to_save": cases.pairs(SAVED, SAVED),
}.items():
    replace_parameters(custom.TestMixedAdapterBatches, name, "test_name, config0, config1", pairs)
replace_parameters(
    custom.TestMixedAdapterBatches,
    "test_mixed_adapter_batches_lora_wrong_adapter_name_raises",
    "test_name, config",
    [(row.label, cases.instance(row, **LIN0, init_weights=False)) for row in cases.ROWS if row.mixed_batches],
)

decoder.PEFT_DECODER_MODELS_TO_TEST[:] = [MODELS[name] for name in DECODERS]
decoder.ALL_CONFIGS[:] = cases.task_cases("CAUSAL_LM")
encoder_decoder.PEFT_ENCODER_DECODER_MODELS_TO_TEST[:] = [MODELS["tiny-t5"]]
encoder_decoder.ALL_CONFIGS[:] = cases.task_cases("SEQ_2_SEQ_LM")
features.PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST[:] = [MODELS["tiny-Bert"]]
features.ALL_CONFIGS[:] = cases.task_cases("FEATURE_EXTRACTION")
sequences.PEFT_SEQ_CLS_MODELS_TO_TEST[:] = [MODELS["tiny-Bert-classifier"]]
sequences.ALL_CONFIGS[:] = cases.task_cases("SEQ_CLS")
tokens.PEFT_TOKEN_CLS_MODELS_TO_TEST[:] = [MODELS["tiny-Bert-classifier"]]  # the list of the QA models too
tokens.TOKEN_CLS_CONFIGS[:] = cases.task_cases("TOKEN_CLS")
tokens.QA_CONFIGS[:] = cases.task_cases("QUESTION_ANS")

TestPeftCustomModel = custom.TestPeftCustomModel
TestMultipleActiveAdapters = custom.TestMultipleActiveAdapters
TestRequiresGrad = custom.TestRequiresGrad
TestMixedAdapterBatches = custom.TestMixedAdapterBatches
TestDefaultTargetModules = custom.TestDefaultTargetModules
TestPeftFsdpStateDict = custom.TestPeftFsdpStateDict
TestDecoderModels = decoder.TestDecoderModels
TestEncoderDecoderModels = encoder_decoder.TestEncoderDecoderModels
TestPeftFeatureExtractionModel = features.TestPeftFeatureExtractionModel
TestSequenceClassificationModels = sequences.TestSequenceClassificationModels
TestTokenClassificationModels = tokens.TestTokenClassificationModels
TestQuestionAnsweringModels = tokens.TestQuestionAnsweringModels
