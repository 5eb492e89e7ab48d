"""MACs: by hand for tiny models, and against PyTorch's own operation counter on a real forward pass."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bayeslora.cost import macs_by_scope, operations
from bayeslora.errors import BayesLoraError
from tests.cost.models import QKV, adapted, by_name, family_model, tiny_config


def counted_macs(model: nn.Module, tokens: int) -> int:
    """MACs of one forward pass as PyTorch counts them: half the floating-point operations of its matrix products."""
    ids = torch.arange(3, 3 + tokens)[None]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval().requires_grad_(False)(input_ids=ids, attention_mask=torch.ones_like(ids))
    return counter.get_total_flops() // 2


def real(family: str, auto: type = transformers.AutoModel, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    return auto.from_config(tiny_config(family, **changes))


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "albert", "distilbert", "mpnet", "gpt2", "opt"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_macs_are_what_pytorch_counts(family: str, tokens: int) -> None:
    model = real(family)
    assert macs_by_scope(operations(model, tokens))["model"] == counted_macs(model, tokens)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gpt_neox"])
def test_macs_of_rotary_models_are_what_pytorch_counts(family: str) -> None:
    model = real(family, transformers.AutoModelForCausalLM)
    assert macs_by_scope(operations(model, 7))["model"] == counted_macs(model, 7)


@pytest.mark.parametrize(
    ("family", "auto"),
    [
        ("bert", transformers.AutoModelForSequenceClassification),
        ("bert", transformers.AutoModelForTokenClassification),
        ("bert", transformers.AutoModelForQuestionAnswering),
        ("bert", transformers.AutoModelForMaskedLM),
        ("bert", transformers.AutoModelForPreTraining),
        ("roberta", transformers.AutoModelForSequenceClassification),
        ("distilbert", transformers.AutoModelForSequenceClassification),
        ("electra", transformers.AutoModelForSequenceClassification),
        ("albert", transformers.AutoModelForSequenceClassification),
        ("deberta-v2", transformers.AutoModelForSequenceClassification),
        ("deberta-v2", transformers.AutoModelForTokenClassification),
        ("gpt2", transformers.AutoModelForCausalLM),
        ("gpt2", transformers.AutoModelForSequenceClassification),
        ("gpt_bigcode", transformers.AutoModelForCausalLM),
        ("opt", transformers.AutoModelForCausalLM),
    ],
)
def test_heads_count_for_as_many_positions_as_they_see(family: str, auto: type) -> None:
    model = real(family, auto)
    assert macs_by_scope(operations(model, 6))["model"] == counted_macs(model, 6)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "llama", "gpt2"])
def test_macs_with_adapters_are_what_pytorch_counts(family: str) -> None:
    """All but E, which is no matrix product: in LoRA it is the scaling."""
    config = peft.LoraConfig(r=3, target_modules=list(QKV[family]), fan_in_fan_out=family == "gpt2")
    model = peft.get_peft_model(real(family), config)
    found = [operation for operation in operations(model, 6) if not operation.name.endswith(".E")]
    assert macs_by_scope(found)["model"] == counted_macs(model, 6)


@pytest.mark.parametrize("share_att_key", [True, False])
@pytest.mark.parametrize("kinds", ["p2c|c2p", "c2p", "p2c"])
@pytest.mark.parametrize("buckets", [5, -1])
def test_macs_of_deberta_are_what_pytorch_counts(share_att_key: bool, kinds: str, buckets: int) -> None:
    model = real(
        "deberta-v2",
        share_att_key=share_att_key,
        pos_att_type=kinds,
        position_buckets=buckets,
        max_relative_positions=12,
    )
    assert macs_by_scope(operations(model, 6))["model"] == counted_macs(model, 6)


def test_the_convolution_of_large_debertas_counts_as_encoder() -> None:
    model = real("deberta-v2", conv_kernel_size=3, conv_act="gelu")
    found = by_name(model, 6)
    # One kernel of 3 positions from 32 to 32 channels, at 6 positions.
    assert found["encoder.conv.conv.weight"].macs == 6 * 3 * 32 * 32
    assert found["encoder.conv.conv.weight"].scope == "encoder"
    assert macs_by_scope(found.values())["model"] == counted_macs(model, 6)


def test_deberta_follows_appendix_d_corrected() -> None:
    """Per layer 3 d² n + 2 d² e + 2 n² d + 2 n e d in attention, and d² n + 2 n d d_ffn beside it."""
    n, d, d_ffn, e, layers = 6, 32, 48, 2 * 5, 2
    scopes = macs_by_scope(operations(tiny_config("deberta-v2"), n))
    attention = 3 * d * d * n + 2 * d * d * e + 2 * n * n * d + 2 * n * e * d
    assert scopes["attention"] == layers * attention
    assert scopes["encoder"] == layers * (attention + d * d * n + 2 * n * d * d_ffn)
    # Without adapters the query, key and value projections are the "adapted" scope, positions included.
    assert scopes["adapted"] == layers * (3 * d * d * n + 2 * d * d * e)


def test_deberta_without_buckets_has_twice_the_largest_relative_position() -> None:
    config = tiny_config("deberta-v2", position_buckets=-1, max_relative_positions=9)
    found = by_name(config, 6)
    attention = "encoder.layer.1.attention.self"
    assert found[f"{attention}.content_to_position"].macs == 6 * 18 * 32
    assert found[f"{attention}.query_proj.positions.weight"].macs == 18 * 32 * 32


def test_unshared_position_projections_are_attention_but_not_adapted() -> None:
    model = family_model("deberta-v2", share_att_key=False)
    found = by_name(model, 6, adapted(model, QKV["deberta-v2"], 4))
    operation = found["encoder.layer.0.attention.self.pos_key_proj.positions.weight"]
    assert (operation.scope, operation.macs) == ("attention", 10 * 32 * 32)
    assert "encoder.layer.0.attention.self.pos_key_proj.weight" not in found
    assert "encoder.layer.0.attention.self.key_proj.positions.A" not in found


def test_adapters_on_shared_projections_also_run_on_positions() -> None:
    model = family_model("deberta-v2")
    found = by_name(model, 6, adapted(model, QKV["deberta-v2"], 4))
    key = "encoder.layer.0.attention.self.key_proj"
    assert found[f"{key}.positions.A"].macs == 10 * 4 * 32
    assert found[f"{key}.positions.E"].macs == 10 * 4
    assert found[f"{key}.positions.B"].macs == 10 * 4 * 32
    assert "encoder.layer.0.attention.self.value_proj.positions.A" not in found


def test_bert_by_hand() -> None:
    n, d, d_ffn, layers = 5, 32, 48, 2
    scopes = macs_by_scope(operations(tiny_config("bert"), n))
    assert scopes["adapted"] == layers * 3 * n * d * d
    assert scopes["attention"] == layers * (3 * n * d * d + 2 * n * n * d)
    assert scopes["encoder"] == scopes["attention"] + layers * (n * d * d + 2 * n * d * d_ffn)
    assert scopes["model"] == scopes["encoder"] + d * d  # the pooler, for one token


def test_llama_with_grouped_queries_by_hand() -> None:
    """4 heads of 8 dimensions for queries, 2 for keys and values: 16 wide."""
    n, d, d_ffn, layers, vocabulary = 5, 32, 48, 2, 60
    scopes = macs_by_scope(operations(tiny_config("llama"), n))
    assert scopes["adapted"] == layers * n * (d * d + 2 * d * 16)
    assert scopes["attention"] == scopes["adapted"] + layers * 2 * n * n * d
    assert scopes["encoder"] == scopes["attention"] + layers * (n * d * d + 3 * n * d * d_ffn)
    assert scopes["model"] == scopes["encoder"] + n * d * vocabulary


def test_gpt2_holds_query_key_and_value_in_one_matrix() -> None:
    n, d, layers, vocabulary = 5, 32, 2, 60
    model = family_model("gpt2")
    found = by_name(model, n, adapted(model, ("c_attn",), 4))
    assert found["transformer.h.0.attn.c_attn.weight"].macs == n * d * 3 * d
    assert found["transformer.h.0.attn.c_attn.A"].macs == n * 4 * d
    assert found["transformer.h.0.attn.c_attn.B"].macs == n * 4 * 3 * d
    assert found["transformer.h.0.attn.scores"].macs == n * n * d
    scopes = macs_by_scope(operations(model, n))
    assert scopes["encoder"] == layers * (4 * n * d * d + 2 * n * n * d + 2 * n * d * 4 * d)
    assert scopes["model"] == scopes["encoder"] + n * d * vocabulary


def test_opt_projects_its_embeddings_outside_the_encoder() -> None:
    found = by_name(tiny_config("opt"), 5)
    assert found["model.decoder.project_in.weight"].region == "model"
    assert found["model.decoder.layers.1.fc2.weight"].region == "encoder"
    assert found["model.decoder.layers.1.self_attn.k_proj.weight"].region == "attention"


def test_an_adapter_adds_its_three_products() -> None:
    model = family_model("llama")
    plain, with_adapter = by_name(model, 5), by_name(model, 5, adapted(model, ("k_proj",), 3))
    layer = "model.layers.0.self_attn.k_proj"
    assert with_adapter[f"{layer}.A"].macs == 5 * 3 * 32
    assert with_adapter[f"{layer}.E"].macs == 5 * 3
    assert with_adapter[f"{layer}.B"].macs == 5 * 3 * 16
    added = set(with_adapter) - set(plain)
    assert added == {f"model.layers.{i}.self_attn.k_proj.{kind}" for i in (0, 1) for kind in "AEB"}


@pytest.mark.parametrize("family", sorted(QKV))
def test_scopes_are_nested_in_every_family(family: str) -> None:
    model = family_model(family)
    for layers in ([], adapted(model, QKV[family], 4)):
        found = operations(model, 9, layers)
        scopes = macs_by_scope(found)
        assert 0 < scopes["adapted"] < scopes["attention"] < scopes["encoder"] <= scopes["model"]
        assert all(operation.macs > 0 for operation in found)
        assert len({operation.name for operation in found}) == len(found)


def test_an_adapted_feed_forward_layer_stays_out_of_attention() -> None:
    model = family_model("llama")
    layers = adapted(model, ("up_proj",), 4)
    found = by_name(model, 5, layers)
    operation = found["model.layers.0.mlp.up_proj.B"]
    assert operation.scope == "adapted"
    assert [operation.counts_in(scope) for scope in ("adapted", "attention", "encoder", "model")] == [
        True,
        False,
        True,
        True,
    ]
    assert macs_by_scope(found.values())["attention"] == macs_by_scope(operations(model, 5))["attention"]


def test_block_ten_is_not_block_one() -> None:
    found = by_name(tiny_config("bert", num_hidden_layers=12), 4)
    assert found["encoder.layer.10.output.dense.weight"].region == "encoder"
    assert sum(name.endswith(".scores") for name in found) == 12


def test_other_models_count_each_linear_layer_once() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert macs_by_scope(operations(model, 5)) == {
        "adapted": 0,
        "attention": 0,
        "encoder": 0,
        "model": 5 * (4 * 8 + 8 * 3),
    }
    found = by_name(model, 5, adapted(model, ("0",), 2))
    scopes = macs_by_scope(found.values())
    # The adapted layer stands for attention, so that a budget on attention means something here too.
    assert scopes["adapted"] == scopes["attention"] == 5 * (4 * 8 + 2 * 4 + 2 + 2 * 8)
    assert scopes["model"] == scopes["adapted"] + 5 * 8 * 3


def test_an_adapted_embedding_multiplies_only_from_the_rank_up() -> None:
    model = family_model("gpt2")
    layers = adapted(model, ("wte",), 4)
    layers = [type(layers[0])(layers[0].name, 60, 32, 4, {})]
    added = set(operations(model, 5, layers)) - set(operations(model, 5, []))
    assert {(o.name, o.macs) for o in added if "wte" in o.name} == {
        ("transformer.wte.E", 5 * 4),
        ("transformer.wte.B", 5 * 4 * 32),
    }


@pytest.mark.parametrize("tokens", [0, -3, 2.5, True])
def test_a_length_that_is_none_is_refused(tokens: int) -> None:
    with pytest.raises(BayesLoraError, match="tokens is"):
        operations(tiny_config("bert"), tokens)


def test_a_layer_of_another_model_is_refused() -> None:
    layers = adapted(family_model("bert"), ("query",), 4)
    with pytest.raises(
        BayesLoraError,
        match="attention.self.query' is given, but is not a linear layer of the model",
    ):
        operations(family_model("llama"), 5, layers)
    with pytest.raises(BayesLoraError, match="is described as 32 → 32, but the model's is 64 → 64"):
        operations(family_model("bert", hidden_size=64), 5, layers)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(BayesLoraError, match="is a str, but must be"):
        operations("bert-base-uncased", 5)  # type: ignore[arg-type]


def test_modernbert_reads_its_classification_head_at_one_vector() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    ids = {f"{name}_token_id": 0 for name in ("pad", "eos", "bos", "cls", "sep")}
    config = transformers.ModernBertConfig(**sizes, **ids, vocab_size=50)
    for auto, rows in (
        (transformers.AutoModelForSequenceClassification, 1),
        (transformers.AutoModelForTokenClassification, 13),
    ):
        found = {each.name: each.macs for each in operations(auto.from_config(config), 13)}
        assert found["head.dense.weight"] == rows * 32 * 32


@pytest.mark.parametrize(
    ("family", "kind", "auto"),
    [
        ("modernbert", "ModernBertConfig", transformers.AutoModelForQuestionAnswering),
        ("modernbert-decoder", "ModernBertDecoderConfig", transformers.AutoModelForSequenceClassification),
        ("eurobert", "EuroBertConfig", transformers.AutoModelForSequenceClassification),
    ],
)
def test_heads_that_read_every_token_are_what_pytorch_counts(family: str, kind: str, auto: type) -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    ids = {f"{name}_token_id": 0 for name in ("pad", "eos", "bos", "cls", "sep")}
    config = getattr(transformers, kind)(**sizes, **ids, vocab_size=50)
    config._attn_implementation = "eager"
    model = auto.from_config(config)
    assert macs_by_scope(operations(model, 10))["model"] == counted_macs(model, 10)


def test_modernbert_pools_before_its_head_for_choices() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    ids = {f"{name}_token_id": 0 for name in ("pad", "eos", "bos", "cls", "sep")}
    model = transformers.AutoModelForMultipleChoice.from_config(
        transformers.ModernBertConfig(**sizes, **ids, vocab_size=50)
    )
    assert {each.name: each.macs for each in operations(model, 13)}["head.dense.weight"] == 32 * 32


def test_large_falcons_have_groups_of_heads() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2, "vocab_size": 50}
    config = transformers.FalconConfig(**sizes, new_decoder_architecture=True, multi_query=True)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert macs_by_scope(operations(model, 7))["model"] == counted_macs(model, 7)
