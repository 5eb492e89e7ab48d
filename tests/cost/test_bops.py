"""Bit operations: known answers, and what must hold between widths, ranks and scopes."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bayeslora
from bayeslora.cost import SCOPES, bops_by_scope, build_on_meta, from_config, operations, relative_bops
from bayeslora.errors import BayesLoraError
from tests.cost.models import QKV, Layer, adapted, by_name, family_model, tiny_config

KINDS = ("weight", "A", "E", "B", "A_out", "E_out", "out", "in")
BERT = family_model("bert")
DEBERTA = family_model("deberta-v2")
LLAMA = family_model("llama")
MODELS = {"bert": BERT, "deberta-v2": DEBERTA, "llama": LLAMA}


@pytest.mark.parametrize("family", sorted(QKV))
@pytest.mark.parametrize("tokens", [1, 64])
def test_lora_of_rank_16_on_query_key_value_is_exactly_one(family: str, tokens: int) -> None:
    model = family_model(family)
    layers = adapted(model, QKV[family], 16, **dict.fromkeys(KINDS, 32))
    assert relative_bops(model, layers, tokens) == dict.fromkeys(SCOPES, 1.0)
    assert relative_bops(model, adapted(model, QKV[family], 16), tokens) == dict.fromkeys(SCOPES, 1.0)


def test_the_baseline_has_the_rank_it_is_asked_for() -> None:
    assert relative_bops(BERT, adapted(BERT, QKV["bert"], 5), 9, baseline_rank=5) == dict.fromkeys(SCOPES, 1.0)


def test_bert_by_hand() -> None:
    """One layer at rank 3, six tokens, width 32, with a different width on every operand."""
    n, d, r = 6, 32, 3
    bits = {"weight": 8, "A": 4, "E": 16, "B": 2, "A_out": 8, "E_out": 4, "out": 16, "in": 8}
    found = by_name(BERT, n, adapted(BERT, QKV["bert"], r, **bits))
    layer, attention = "encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self"
    assert found[f"{layer}.weight"].bops == n * d * d * 8 * 8
    assert found[f"{layer}.A"].bops == n * r * d * 4 * 8
    assert found[f"{layer}.E"].bops == n * r * 16 * 8
    assert found[f"{layer}.B"].bops == n * r * d * 2 * 4
    assert found[f"{attention}.scores"].bops == n * n * d * 16 * 16
    assert found[f"{attention}.weighted_values"].bops == n * n * d * 32 * 16
    assert found["encoder.layer.0.attention.output.dense.weight"].bops == n * d * d * 32 * 32


def test_relative_bops_by_hand() -> None:
    """4-bit weights at rank 2, four tokens, against LoRA at rank 16; W0 carries nearly all of both."""
    n, d, d_ffn = 4, 32, 48
    shares = relative_bops(BERT, adapted(BERT, QKV["bert"], 2, weight=4), n)
    ours = 3 * (n * d * d * 4 * 32 + (n * 2 * d + n * 2 + n * 2 * d) * 1024)
    baseline = 3 * (n * d * d + n * 16 * d + n * 16 + n * 16 * d) * 1024
    products = 2 * n * n * d * 1024
    frozen = (n * d * d + 2 * n * d * d_ffn) * 1024
    pooler = d * d * 1024  # once a sequence; two layers share it
    assert shares["adapted"] == pytest.approx(ours / baseline, rel=1e-12)
    assert shares["attention"] == pytest.approx((ours + products) / (baseline + products), rel=1e-12)
    assert shares["encoder"] == pytest.approx((ours + products + frozen) / (baseline + products + frozen), rel=1e-12)
    expected = (2 * (ours + products + frozen) + pooler) / (2 * (baseline + products + frozen) + pooler)
    assert shares["model"] == pytest.approx(expected, rel=1e-12)


def test_without_an_input_quantizer_the_input_is_32_bits_wide() -> None:
    found = by_name(BERT, 6, adapted(BERT, QKV["bert"], 3, weight=4, A=2))
    weight = found["encoder.layer.1.attention.self.key.weight"]
    assert (weight.weight_bits, weight.input_bits) == (4, 32)
    assert found["encoder.layer.1.attention.self.key.A"].input_bits == 32


def test_rotary_embeddings_and_norms_widen_queries_and_keys_but_not_values() -> None:
    for family in ("llama", "qwen3", "phi3"):
        model = family_model(family)
        found = by_name(model, 6, adapted(model, QKV[family], 3, out=8))
        scores = found["model.layers.0.self_attn.scores"]
        values = found["model.layers.0.self_attn.weighted_values"]
        assert (scores.weight_bits, scores.input_bits) == (32, 32)
        assert (values.weight_bits, values.input_bits) == (32, 8)


@pytest.mark.parametrize("family", ["bert", "opt", "gpt2", "deberta-v2"])
def test_outputs_that_are_only_permuted_keep_their_width(family: str) -> None:
    model = family_model(family)
    found = operations(model, 6, adapted(model, QKV[family], 3, out=8))
    scores = [operation for operation in found if operation.name.endswith(".scores")]
    assert len(scores) == 2
    assert all((operation.weight_bits, operation.input_bits) == (8, 8) for operation in scores)


def test_deberta_position_products_have_the_widths_of_their_operands() -> None:
    """c2p is content queries × position keys, p2c content keys × position queries, here by shared projections."""
    query, key = adapted(DEBERTA, ("query_proj",), 3, out=4), adapted(DEBERTA, ("key_proj",), 3, out=16)
    found = by_name(DEBERTA, 6, query + key)
    attention = "encoder.layer.0.attention.self"
    c2p, p2c = found[f"{attention}.content_to_position"], found[f"{attention}.position_to_content"]
    assert (c2p.weight_bits, c2p.input_bits) == (4, 16)
    assert (p2c.weight_bits, p2c.input_bits) == (16, 4)
    unshared = family_model("deberta-v2", share_att_key=False)
    found = by_name(unshared, 6, adapted(unshared, ("query_proj", "key_proj"), 3, out=4))
    c2p = found[f"{attention}.content_to_position"]
    assert (c2p.weight_bits, c2p.input_bits) == (4, 32)


def test_rank_zero_costs_the_base_weight_alone() -> None:
    for model, family in ((BERT, "bert"), (DEBERTA, "deberta-v2"), (LLAMA, "llama")):
        empty = operations(model, 6, adapted(model, QKV[family], 0))
        assert bops_by_scope(empty) == bops_by_scope(operations(model, 6, []))


def test_halving_the_bits_of_an_operand_halves_its_products() -> None:
    operands = {  # kind: which products it is an operand of
        "weight": (".weight",),
        "A": (".A",),
        "E": (".E",),
        "B": (".B",),
        "A_out": (".E",),
        "E_out": (".B",),
        "in": (".weight", ".A"),
    }
    for kind, endings in operands.items():
        wide = by_name(DEBERTA, 6, adapted(DEBERTA, QKV["deberta-v2"], 3, **{kind: 16}))
        narrow = by_name(DEBERTA, 6, adapted(DEBERTA, QKV["deberta-v2"], 3, **{kind: 8}))
        for name, operation in wide.items():
            touched = name.endswith(endings) and operation.scope == "adapted"
            assert narrow[name].bops * (2 if touched else 1) == operation.bops, (kind, name)


def test_an_integer_kernel_needs_both_operands() -> None:
    """Four-bit weights alone leave 4 × 32 = 12.5% of a product; with an eight-bit input, 4 × 8 = 3.125%."""
    alone = relative_bops(BERT, adapted(BERT, QKV["bert"], 0, weight=4), 4)
    both = relative_bops(BERT, adapted(BERT, QKV["bert"], 0, weight=4, **{"in": 8}), 4)
    # The baseline's adapters at rank 16, width 32: (1024 + 512 + 16 + 512) / 1024 of the base weight.
    assert alone["adapted"] == pytest.approx(0.125 * 1024 / (1024 + 512 + 16 + 512))
    assert both["adapted"] == pytest.approx(0.03125 * 1024 / (1024 + 512 + 16 + 512))


widths = st.sampled_from([2, 4, 8, 16, 32])


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(sorted(MODELS)),
    bits=st.fixed_dictionaries({kind: widths for kind in KINDS}),
    rank=st.integers(0, 20),
    tokens=st.integers(1, 300),
    kind=st.sampled_from(KINDS),
)
def test_cost_grows_with_every_width_rank_and_scope(
    family: str, bits: dict[str, int], rank: int, tokens: int, kind: str
) -> None:
    model = MODELS[family]
    layers = adapted(model, QKV[family], rank, **bits)
    costs = bops_by_scope(operations(model, tokens, layers))
    assert costs["adapted"] < costs["attention"] < costs["encoder"] <= costs["model"]
    wider = [replace(layer, bits={**layer.bits, kind: 2 * layer.bits[kind]}) for layer in layers]
    higher = [replace(layer, rank=rank + 1) for layer in layers]
    more_bits = bops_by_scope(operations(model, tokens, wider))
    more_rank = bops_by_scope(operations(model, tokens, higher))
    longer = bops_by_scope(operations(model, tokens + 1, layers))
    assert all(more_bits[scope] >= costs[scope] for scope in SCOPES)
    assert all(more_rank[scope] > costs[scope] for scope in SCOPES)
    assert all(longer[scope] > costs[scope] for scope in SCOPES)
    shares = relative_bops(model, layers, tokens)
    assert all(0 < shares[scope] <= 1.01 for scope in SCOPES if rank <= 16)


def test_the_wider_the_scope_the_less_is_saved() -> None:
    """What is not adapted stays at 32 × 32 bits, so it dilutes the saving: attention's share is not the encoder's."""
    for family, model in MODELS.items():
        shares = relative_bops(model, adapted(model, QKV[family], 4, **dict.fromkeys(KINDS, 4)), 32)
        assert shares["adapted"] < shares["attention"] < shares["encoder"] <= shares["model"] < 1


def test_the_saving_on_deberta_base_is_far_smaller_in_the_encoder_than_in_attention() -> None:
    """The published 70% counts attention. Eight-bit weights and outputs, adapters at 2 bits, on the real sizes."""
    config = tiny_config(
        "deberta-v2",
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        position_buckets=256,
    )
    model = build_on_meta(config)
    bits = {"weight": 8, "A": 2, "E": 2, "B": 2, "A_out": 8, "E_out": 8, "out": 8}
    shares = relative_bops(model, adapted(model, QKV["deberta-v2"], 8, **bits), 256)
    assert shares["attention"] < 0.30
    assert 0.5 < shares["encoder"] < 0.7


def test_paper_identity_ranks_two_and_eight_differ_from_the_baseline_in_proportion_to_rank() -> None:
    """(100 − 97.04) / (100 − 98.31) = 1.751 in the paper's Table 2: (16 − 2) / (16 − 8) = 1.75, whatever the scope."""
    for family, model in MODELS.items():
        two = relative_bops(model, adapted(model, QKV[family], 2), 128)
        eight = relative_bops(model, adapted(model, QKV[family], 8), 128)
        for scope in SCOPES:
            assert (1 - two[scope]) / (1 - eight[scope]) == pytest.approx(1.75, rel=1e-9)


def test_adapters_on_fewer_layers_are_compared_with_the_same_layers() -> None:
    shares = relative_bops(BERT, adapted(BERT, ("query", "value"), 16), 16)
    assert shares["adapted"] == 1.0
    assert shares["attention"] < 1.0


def test_adapters_on_more_layers_cost_more_than_the_baseline() -> None:
    shares = relative_bops(BERT, adapted(BERT, (*QKV["bert"], "dense"), 16), 16)
    assert shares["attention"] == 1.0
    assert shares["adapted"] > 1 and shares["encoder"] > 1 and shares["model"] > 1


def test_no_adapter_at_all_is_cheaper_than_the_baseline() -> None:
    shares = relative_bops(BERT, [], 16)
    # d = 32 and r = 16: W0 alone against W0 and 2 · 16 · 32 + 16 more.
    assert shares["adapted"] == pytest.approx(1024 / (1024 + 1024 + 16))
    assert relative_bops(tiny_config("bert"), tokens=16) == shares


def test_models_without_attention_have_a_share_too() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    shares = relative_bops(model, [Layer("0", 64, 64, 16, {"weight": 8})], 1)
    assert shares["adapted"] == shares["attention"] < 0.6
    assert shares["attention"] < shares["model"] < 1
    assert relative_bops(model, [], 1) == dict.fromkeys(SCOPES, 1.0)


def test_a_quantized_base_counts_at_the_width_it_is_stored_in() -> None:
    """The same shapes under the class names bitsandbytes gives its layers; the baseline stays at 32 bits."""
    four_bit = type("Linear4bit", (nn.Linear,), {})
    model = transformers.AutoModel.from_config(tiny_config("bert"))
    full = by_name(model, 6)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, four_bit(child.in_features, child.out_features))
    found = by_name(model, 6)
    for name, operation in found.items():
        assert operation.bops == full[name].bops // (8 if name.endswith(".weight") else 1)
    assert relative_bops(model, [], 6)["adapted"] == pytest.approx(relative_bops(BERT, [], 6)["adapted"] / 8)


def wrapped(**options: object) -> tuple[nn.Module, nn.Module]:
    config = tiny_config("bert")
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_config(config)
    plain = transformers.AutoModelForSequenceClassification.from_config(config)
    lora = peft.LoraConfig(r=16, target_modules=["query", "key", "value"], **options)
    return peft.get_peft_model(base, lora), plain


def test_adapters_do_not_change_what_the_base_model_is() -> None:
    model, plain = wrapped(modules_to_save=["classifier"])
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["query", "dense"]))
    assert operations(model, 6, []) == operations(plain, 6, [])
    assert operations(nn.DataParallel(model), 6, []) == operations(plain, 6, [])


def test_a_peft_lora_describes_itself() -> None:
    model, plain = wrapped()
    expected = operations(plain, 6, adapted(plain, ("query", "key", "value"), 16))
    for same in (model, nn.DataParallel(model), torch.compile(model)):
        assert relative_bops(same, tokens=6) == dict.fromkeys(SCOPES, 1.0)
        assert operations(same, 6) == expected


def test_a_new_b_lora_of_rank_16_costs_what_lora_costs() -> None:
    """Before its gates learn nothing is quantized, and every rank is open."""
    base = transformers.AutoModelForSequenceClassification.from_config(tiny_config("deberta-v2"))
    config = bayeslora.BLoraConfig(r=16, target_modules=list(QKV["deberta-v2"]))
    assert relative_bops(peft.get_peft_model(base, config)) == dict.fromkeys(SCOPES, 1.0)


def test_a_model_of_seven_billion_parameters_takes_seconds() -> None:
    config = tiny_config(
        "llama",
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=32000,
    )
    model = build_on_meta(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    n, d = 2048, 4096
    shares = relative_bops(model, [], n)
    base, lora = 3 * n * d * d, 3 * (2 * n * 16 * d + n * 16)
    assert shares["adapted"] == pytest.approx(base / (base + lora), rel=1e-12)


def test_configurations_are_read_from_folders_files_and_dictionaries(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = tiny_config("llama")
    config.save_pretrained(tmp_path)
    expected = operations(config, 5)
    assert operations(from_config(tmp_path), 5) == expected
    assert operations(from_config(str(tmp_path / "config.json")), 5) == expected
    assert operations(from_config(config.to_dict()), 5) == expected


def test_the_architecture_a_configuration_names_is_built() -> None:
    config = tiny_config("bert", architectures=["BertForSequenceClassification"], num_labels=3)
    assert "classifier.weight" in by_name(config, 5)
    assert by_name(config, 5)["classifier.weight"].macs == 32 * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds a JSON list, but must hold an object"),
        ('{"r": 8, "peft_type": "LORA"}', "lacks model_type"),
        ('{"model_type": "no-such-model"}', "cannot read the 'no-such-model' configuration"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(tmp_path, text: str, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(BayesLoraError, match=message) as caught:
        from_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_path_that_does_not_exist_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BayesLoraError, match="does not exist"):
        from_config(tmp_path / "nothing")
    with pytest.raises(BayesLoraError, match="cannot build a BertConfig"):
        operations(tiny_config("bert", num_attention_heads=5), 4)
    with pytest.raises(BayesLoraError, match="cannot build a BertConfig"):
        operations(tiny_config("bert", num_attention_heads=0), 4)
    with pytest.raises(BayesLoraError, match="cannot read the 'bert' configuration"):
        from_config({"model_type": "bert", "hidden_size": "wide"})
