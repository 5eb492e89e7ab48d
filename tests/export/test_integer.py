"""Integer models: the arithmetic that was trained, on codes, from one folder."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import bayeslora
from bayeslora import BayesLoraError, BLoraConfig, MeLoraConfig, export, load_integer
from bayeslora.export.integer import reader as integer_reader
from bayeslora.export.integer import writer as integer_writer
from bayeslora.quantization import grid_step
from bayeslora.runtime import integer_kernels, integer_linear
from bayeslora.runtime.integer_kernels import FEW_ROWS, SMALL_BATCH, ZERO_POINT
from bayeslora.runtime.integer_linear import IntegerEmbedding, IntegerLinear
from tests.conftest import build_tiny_bert, build_tiny_gpt2, build_tiny_llama
from tests.methods.reference import FROZEN, RANK, WARM_UP, layers_of, randomize, set_widths, tiny_model

TOKENS = torch.arange(24).view(2, 12)
KERNELS = ("has_few_rows_kernel", "has_prepacked_kernel", "has_integer_kernel", "has_weight_kernel")
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WIDTHS = {"weight": 8, "A": 4, "E": 8, "B": 2, "A_out": 8, "E_out": 4, "out": 8}


def _blora(base: nn.Module, targets: list[str], widths: dict[str, int] | None = None, **options: Any) -> nn.Module:
    """A frozen adapter with random factors and the given widths, whose activations' ranges fit what they see."""
    # The gates of the paper, whose ranges are those of the tensors as soon as they learn.
    fixed = {"r": RANK, "lora_alpha": 8, "target_modules": targets, "init_weights": False, "gates": "paper"}
    settings = {**fixed, **options}
    model = get_peft_model(base, BLoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(3)
    for layer in layers_of(model):
        randomize(layer, generator, FROZEN)
        if options.get("mode") == "ra":
            continue
        quantizers = layer.quantizers("default")
        set_widths(layer, **WIDTHS, **({"in": 8} if "in" in quantizers.kinds else {}))
        set_widths(layer, **(widths or {}))
        for kind, bound in {"in": 3.0, "A_out": 2.0, "E_out": 3.0, "out": 5.0}.items():
            if kind in quantizers.kinds:
                quantizers.set_range(kind, torch.tensor(bound))
    return model


BASES: dict[str, Callable[..., nn.Module]] = {
    "bert": lambda layers=2, **options: _blora(
        build_tiny_bert(num_hidden_layers=layers), ["query", "key", "value"], task_type="SEQ_CLS", **options
    ),
    "llama": lambda layers=2, **options: _blora(
        build_tiny_llama(num_hidden_layers=layers), LLAMA, quantize_input=True, **options
    ),
    "gpt2": lambda layers=2, **options: _blora(
        build_tiny_gpt2(n_layer=layers), ["c_attn", "c_proj"], quantize_input=True, **options
    ),
}


@torch.no_grad()
def _logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens).logits.float()


@torch.no_grad()
def _codes_apart(model: nn.Module, integer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Differences of output codes, in steps: each adapted layer on the very input that it has in the frozen model."""
    found: list[tuple[Tensor, Tensor]] = []
    handles = []
    for path, layer in model.base_model.named_layers("default").items():
        quantizers = layer.quantizers("default")
        step = float(grid_step(quantizers.ranges()[-1].detach(), quantizers.evaluation_widths()[-1]))
        assert quantizers.kinds[-1] == "out"

        twin = integer.get_submodule(path)
        assert isinstance(twin, IntegerLinear) and twin.is_learned

        def compare(_: nn.Module, inputs: Any, output: Tensor, twin: nn.Module = twin, step: float = step) -> None:
            found.append((output / step, twin(inputs[0].to(dtype)).float() / step))

        handles.append(layer.register_forward_hook(compare))
    _logits(model)
    for handle in handles:
        handle.remove()
    return torch.cat([(ours - theirs).abs().round().flatten() for ours, theirs in found])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_outputs_are_the_frozen_models_within_a_step(name: str, per_channel: bool, tmp_path: Path) -> None:
    """In float32 codes differ at rounding ties only, and by one step. bfloat16 moves some, and where it moves a code
    of 4 bits between the factors, the output moves by that code's own step."""
    model = BASES[name](per_channel=per_channel)
    export(model, tmp_path, format="integer", unadapted="float32")
    apart = _codes_apart(model, load_integer(tmp_path))
    assert len(apart) > 4_000 and apart.max() <= 1 and (apart > 0).float().mean() < 0.002
    rounded = _codes_apart(model, load_integer(tmp_path, dtype=torch.bfloat16), torch.bfloat16)
    assert (rounded > 0).float().mean() < 0.1 and (rounded > 1).float().mean() < 0.1
    assert (_logits(model) - _logits(load_integer(tmp_path))).abs().max() < 0.02 * _logits(model).abs().max()
    assert (_logits(model) - _logits(model.get_base_model())).abs().max() == 0  # the same adapted model inside


@pytest.mark.parametrize("width", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("kind", ["weight", "in", "A", "E", "B", "A_out", "E_out", "out"])
def test_every_width_of_everything(kind: str, width: int, tmp_path: Path) -> None:
    model = _blora(build_tiny_bert(num_hidden_layers=1), ["key"], {kind: width}, quantize_input=True)
    export(model, tmp_path, format="integer", unadapted="float32")
    integer = load_integer(tmp_path)
    if (kind, width) in (("out", 16), ("out", 32)):  # no code holds float rounding at these
        assert (_logits(model) - _logits(integer)).abs().max() < 1e-3
        return
    apart = _codes_apart(model, integer)
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.005
    entry = json.loads((tmp_path / "integer.json").read_text())["linear"]["bert.encoder.layer.0.attention.self.key"]
    assert entry["bits"].get(kind, 32) == width


@pytest.mark.parametrize("rows", [1, 4, 5, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [4, 8, 16, 32])
def test_kernels_give_what_dequantizing_gives(
    width: int, dtype: torch.dtype, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"in": width, "A_out": 32, "E_out": 32, "out": 32}
    model = _blora(build_tiny_llama(), LLAMA, wide, quantize_input=True)
    export(model, tmp_path, format="integer")
    integer = load_integer(tmp_path, dtype=dtype)
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    layers = [integer.lm_head, integer.model.layers[0].mlp.up_proj]
    assert layers[0].is_learned is False
    assert (layers[1].takes_codes, layers[1].takes_int16) == (width <= 8, width == 16)
    for layer in layers:
        found = layer(x).float()
        for missing in (KERNELS[:1], KERNELS):
            with monkeypatch.context() as patched:
                for kernel in missing:
                    patched.setattr(integer_linear, kernel, lambda device: False)
                plain = layer(x).float()
            exact = dtype == torch.float32 and layer.is_learned
            assert (found - plain).abs().max() <= (1e-6 if exact else 0.02) * plain.abs().max()


@pytest.mark.parametrize("rows", [1, 4, 5, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", [(), KERNELS[:1], KERNELS])
def test_a_feed_forward_network_passes_the_codes_that_its_parts_would_make(
    missing: tuple[str, ...], dtype: torch.dtype, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For few rows it passes the values instead, which the kernel rounds to these codes."""
    export(BASES["bert"](), tmp_path, format="integer", calibration=[{"input_ids": TOKENS}])
    for kernel in missing:
        monkeypatch.setattr(integer_linear, kernel, lambda device: False)
    fused = load_integer(tmp_path, dtype=dtype).bert.encoder.layer
    monkeypatch.setattr(integer_reader, "_fuse_activations", lambda model, dtype: None)
    parts = load_integer(tmp_path, dtype=dtype).bert.encoder.layer
    x = torch.randn(1, rows, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for ours, theirs in zip(fused, parts, strict=True):
        step = ours.output.dense.input.step
        codes, values = ours.intermediate(x), theirs.intermediate(x).float()
        limit = tolerance * step + (0 if dtype == torch.float32 else 0.01)
        if rows <= FEW_ROWS and integer_linear.has_few_rows_kernel("cpu"):
            assert codes.dtype == torch.float32 and (codes - values).abs().max() <= limit
        else:
            zero = ZERO_POINT if rows > SMALL_BATCH and integer_linear.has_prepacked_kernel("cpu") else 0
            assert codes.dtype == (torch.uint8 if zero else torch.int8) and codes.float().std() > 5
            signed = codes.float() - zero
            assert (signed * step - values.clamp(-127 * step, 127 * step)).abs().max() <= 0.5 * step + limit
        found, expected = ours.output(codes, x), theirs.output(theirs.intermediate(x), x)
        assert found.dtype == expected.dtype == dtype
        assert (found - expected).abs().max() <= tolerance + 4 * step * float(ours.output.dense.weight.abs().max())


def test_activations_stay_where_the_second_layer_reads_no_codes_or_codes_could_pass_the_grids_end(
    tmp_path: Path,
) -> None:
    export(BASES["bert"](), tmp_path / "values", format="integer")
    assert not any(layer.emits_codes for layer in _integer_layers(load_integer(tmp_path / "values")))
    export(BASES["bert"](), tmp_path / "codes", format="integer", calibration=[{"input_ids": TOKENS}])
    layers = _integer_layers(load_integer(tmp_path / "codes"))
    feeding = [layer for layer in layers if layer.emits_codes]
    assert len(feeding) == 2
    following = next(layer for layer in layers if layer.takes_codes and not layer.emits_codes and layer.rank == 0)
    assert feeding[0].can_feed(following)
    following.input.step = 0.17 / 128
    assert not feeding[0].can_feed(following)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("width", [24, 1536])
def test_codes_of_two_bytes_are_multiplied_as_exactly_as_float32_holds(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-32767, 32768, (rows, width), generator=generator).float()
    x[0, :8] = torch.tensor([-32767.0, 32767, 0, -1, 255, 256, -256, -257])
    x[-1, 8:] = 32767
    codes = torch.randint(-127, 128, (40, width), generator=generator).to(torch.int8)
    codes[:, 8:] = torch.where(torch.arange(40)[:, None] < 20, 127, codes[:, 8:])  # sums as large as they can be
    expected = x.double() @ codes.double().T
    found = integer_kernels.int16_product(x, codes, codes.sum(1).float())
    assert (found - expected).abs().max() <= 2**-22 * (x.double().abs() @ codes.double().abs().T).max()


def _integer_layers(model: nn.Module) -> list[IntegerLinear]:
    return [module for module in model.modules() if isinstance(module, IntegerLinear)]


def test_the_kernels_of_this_torch_are_found_on_the_cpu() -> None:
    assert integer_kernels.has_integer_kernel("cpu") and integer_kernels.has_weight_kernel("cpu")
    assert not integer_kernels.has_integer_kernel("no such device")


@pytest.mark.parametrize(
    ("rows", "width", "height"), [(1, 24, 40), (16, 64, 51), (17, 37, 8), (33, 63, 51), (32, 64, 48)]
)
def test_products_in_shapes_that_cuda_accepts_are_the_same(
    rows: int, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, codes = (torch.randint(-127, 128, (n, width), generator=generator, dtype=torch.int8) for n in (rows, height))
    multiply = torch._int_mm

    def as_cuda_does(a: Tensor, b: Tensor) -> Tensor:
        assert len(a) > 16 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
        return multiply(a, b)

    monkeypatch.setattr(torch, "_int_mm", as_cuda_does)
    found = integer_kernels.padded_integer_product(x, codes)
    assert found.dtype == torch.int32 and torch.equal(found.long(), x.long() @ codes.long().T)


def test_a_kernel_that_is_right_but_slow_is_left_alone() -> None:
    def slowly(x: Tensor, codes: Tensor) -> Tensor:
        time.sleep(0.05)
        return integer_kernels.integer_product(x, codes)

    shapes = ((1, 24, 40),)
    assert integer_kernels._is_usable(integer_kernels.integer_product, "cpu", shapes, torch.int8, tolerance=0.0)
    assert not integer_kernels._is_usable(slowly, "cpu", shapes, torch.int8, tolerance=0.0)


def test_a_kernel_whose_sums_overflow_is_left_alone() -> None:
    """Without VNNI, FBGEMM adds two products of an unsigned and a signed byte in 16 bits."""

    def overflowing(x: Tensor, codes: Tensor) -> Tensor:
        pairs = ((x + ZERO_POINT)[:, None] * codes.float()).unflatten(-1, (-1, 2)).sum(-1)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(-1) - ZERO_POINT * codes.float().sum(1)

    shapes = integer_kernels._ANY_SHAPES[::2]  # of an even number of columns
    assert not integer_kernels._is_usable(overflowing, "cpu", shapes, torch.float32, tolerance=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_few_rows_are_what_they_are_among_many(base: str, dtype: torch.dtype, tmp_path: Path) -> None:
    export(BASES[base](), tmp_path, format="integer")
    generator = torch.Generator().manual_seed(2)
    adapted = [layer for layer in _integer_layers(load_integer(tmp_path, dtype=dtype)) if layer.rank]
    assert len(adapted) > 3
    for layer in adapted:
        x = torch.randn(FEW_ROWS, 4, layer.in_features, generator=generator).to(dtype)
        among, few = layer(x)[0], layer(x[0])
        assert few.dtype == dtype and few.shape == (4, layer.out_features)
        assert layer._small_batch is not None
        apart = (few.float() - among.float()).abs() / layer.output.step
        # bfloat16 rounds the grid's values, and that by more than a hundredth of a step where codes differ.
        furthest = 1.01 if dtype == torch.float32 else 1.5
        assert apart.max() <= furthest and float((apart > 0.01).float().mean()) <= 0.002
        moved = layer.to(torch.device("cpu"))
        assert moved._small_batch is None and torch.equal(moved(x[0]), few)


@torch.no_grad()
def test_a_compiled_model_is_one_graph_and_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_linear, "has_weight_kernel", lambda device: False)  # which rounds to bfloat16
    for base in BASES:
        export(BASES[base](layers=1), tmp_path / base, format="integer")
        model = load_integer(tmp_path / base)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for tokens in (TOKENS, TOKENS[:1, :1], TOKENS[:1, :4]):
            torch.testing.assert_close(_logits(compiled, tokens), _logits(model, tokens), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_compiled_model_of_wide_inputs_computes_the_same_for_any_number_of_rows(tmp_path: Path) -> None:
    export(BASES["llama"](layers=1, widths={"in": 16}), tmp_path, format="integer")
    layers = [layer for layer in _integer_layers(load_integer(tmp_path)) if layer.takes_int16]
    assert len(layers) > 3
    for rows in (1, 3, 40):
        for layer in layers:
            torch._dynamo.reset()
            x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(1))
            apart = (torch.compile(layer, backend="eager", fullgraph=True)(x) - layer(x)).abs() / layer.output.step
            assert apart.max() <= 1.01 and float((apart > 0.01).float().mean()) <= 0.002


def test_a_width_that_a_kernel_would_read_past_goes_another_way(tmp_path: Path) -> None:
    codes = torch.randint(-127, 128, (5, 37), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    layer = IntegerLinear(codes, torch.tensor(0.01), is_learned=False)
    x = torch.randn(1, 37, generator=torch.Generator().manual_seed(1))
    assert not layer._suits_weight_kernel(x)
    torch.testing.assert_close(layer(x), x @ (0.01 * codes.float()).T)


def test_a_model_that_has_run_can_be_copied_and_pickled(tmp_path: Path) -> None:
    export(BASES["llama"](), tmp_path, format="integer")
    integer = load_integer(tmp_path)
    expected = _logits(integer)
    torch.save(integer, tmp_path / "model.pt")
    for copied in (copy.deepcopy(integer), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(_logits(copied), expected)


def test_a_generation_is_the_frozen_models(tmp_path: Path) -> None:
    model = BASES["llama"]()
    export(model, tmp_path, format="integer", unadapted="float32")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(TOKENS)
    expected = model.generate(input_ids=TOKENS, attention_mask=mask, **options)
    integer = load_integer(tmp_path)
    assert torch.equal(integer.generate(input_ids=TOKENS, attention_mask=mask, **options), expected)
    assert integer.generate(input_ids=TOKENS[:1], attention_mask=mask[:1], **options).shape == (1, 24)
    fast = load_integer(tmp_path, dtype=torch.bfloat16)
    assert fast.dtype == torch.bfloat16
    assert fast.generate(input_ids=TOKENS, attention_mask=mask, **options).shape == expected.shape


def test_ranges_are_static_so_that_a_row_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    export(BASES["bert"](), tmp_path, format="integer", calibration=[{"input_ids": TOKENS}])
    integer = load_integer(tmp_path)
    together = _logits(integer)
    # Sums of codes are exact, but a kernel may scale them in another order for other batches.
    torch.testing.assert_close(together[1:], _logits(integer, TOKENS[1:]), rtol=0, atol=1e-6)


def test_unadapted_layers_at_8_bits_cost_a_measured_error_and_save_most_of_the_file(tmp_path: Path) -> None:
    model = _blora(build_tiny_bert(hidden_size=64, intermediate_size=256), ["query", "value"], task_type="SEQ_CLS")
    batch = {"input_ids": TOKENS}
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias.copy_(torch.tensor([3.0, -3.0]))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    results, shares = {}, {}
    for form in ("int8", "bfloat16", "float32"):
        results[form] = export(model, tmp_path / form, format="integer", batch=batch, unadapted=form)
        shares[form] = results[form]["file_bytes"] / results[form]["float32_bytes"]
        error = (_logits(load_integer(tmp_path / form)) - _logits(model)).abs().max()
        assert results[form]["max_output_error"] == pytest.approx(float(error), abs=1e-6)
        assert results[form]["file_bytes"] <= 1.05 * results[form]["ideal_bytes"] + 10_000
    errors = {form: result["max_output_error"] for form, result in results.items()}
    assert errors["float32"] <= 1e-5 < min(errors["int8"], errors["bfloat16"]) and errors["int8"] < 0.05
    assert shares["int8"] < shares["bfloat16"] < shares["float32"] < 1
    calibrated = export(model, tmp_path / "static", format="integer", batch=batch, calibration=[batch])
    assert 0 < calibrated["max_output_error"] < 0.5
    integer = load_integer(tmp_path / "static")
    dense = integer.bert.encoder.layer[0].output.dense
    assert dense.takes_codes and not dense.is_learned
    assert isinstance(integer.bert.embeddings.word_embeddings, IntegerEmbedding)
    assert torch.equal(integer.classifier.bias, torch.tensor([3.0, -3.0]))  # trained, and kept as it is
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_tied_head_shares_the_embeddings_codes(tmp_path: Path) -> None:
    base = build_tiny_llama(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = _blora(base, ["q_proj"], quantize_input=True)
    export(model, tmp_path / "int8", format="integer")
    integer = load_integer(tmp_path / "int8")
    assert integer.lm_head.codes.data_ptr() == integer.model.embed_tokens.codes.data_ptr()
    weight = base.model.embed_tokens.weight
    assert (integer.lm_head.weight - weight).abs().max() <= weight.abs().max() / 250
    export(model, tmp_path / "float32", format="integer", unadapted="float32")
    integer = load_integer(tmp_path / "float32")
    assert integer.lm_head.weight.data_ptr() == integer.model.embed_tokens.weight.data_ptr()
    assert (_logits(integer) - _logits(model)).abs().max() < 1e-3


def test_narrow_codes_are_packed(tmp_path: Path) -> None:
    sizes = {}
    for width in (2, 4, 8):
        model = _blora(build_tiny_bert(), ["query"], {"weight": width})
        result = export(model, tmp_path / str(width), format="integer", unadapted="float32")
        sizes[width] = result["ideal_bytes"]
    entries = 2 * 32 * 32
    assert sizes[8] - sizes[4] == entries // 2 and sizes[4] - sizes[2] == entries // 4


@pytest.mark.parametrize("options", [{"mode": "ra"}, {"mode": "q"}, {"use_rslora": True, "r": 3}], ids=str)
def test_modes_and_ranks_that_are_cut(options: dict[str, Any], tmp_path: Path) -> None:
    model = _blora(build_tiny_bert(), ["query", "value"], **options)
    with torch.no_grad():
        layers_of(model)[0].blora_E["default"].zero_()
        layers_of(model)[1].blora_E["default"][1] = 0.0
    export(model, tmp_path, format="integer", unadapted="float32")
    integer = load_integer(tmp_path)
    assert integer.get_submodule("bert.encoder.layer.0.attention.self.query").rank == 0
    assert (_logits(integer) - _logits(model)).abs().max() < 1e-3


def test_an_adapter_in_warm_up_is_not_quantized(tmp_path: Path) -> None:
    model = _blora(build_tiny_bert(), ["query"])
    for layer in layers_of(model):
        layer.progress("default").advance(WARM_UP)
    result = export(model, tmp_path, format="integer", unadapted="float32")
    assert result["max_output_error"] < 1e-5


def test_the_public_predict_and_moves_work_on_it(tmp_path: Path) -> None:
    model = BASES["bert"]()
    export(model, tmp_path, format="integer")
    integer = load_integer(tmp_path)
    expected = _logits(integer)
    prediction = bayeslora.predict(integer, {"input_ids": TOKENS})
    torch.testing.assert_close(torch.as_tensor(prediction.probabilities).float(), expected.softmax(-1))
    scales = integer.get_submodule("bert.encoder.layer.0.attention.self.query").scales
    assert (
        integer.to(torch.bfloat16).get_submodule("bert.encoder.layer.0.attention.self.query").scales.dtype
        == scales.dtype
        == torch.float32
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "integer.json",
        "integer_model.safetensors",
    ]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="is not a Transformers model"):
        export(tiny_model(FROZEN), tmp_path, format="integer")
    melora = get_peft_model(build_tiny_bert(), MeLoraConfig(r=2, target_modules=["query"], num_examples=9))
    with pytest.raises(BayesLoraError, match="is for methods that learn widths"):
        export(melora, tmp_path, format="integer")
    model = _blora(build_tiny_bert(), ["query"])
    with pytest.raises(BayesLoraError, match="unadapted is 'int4', but must be"):
        export(model, tmp_path, format="integer", unadapted="int4")
    with pytest.raises(BayesLoraError, match="calibration is for"):
        export(model, tmp_path, format="integer", unadapted="float32", calibration=[])
    model.base_model.model.bert.encoder.layer[0].attention.self.query.configs["default"].allow_inexact_merge = True
    model.base_model.model.bert.encoder.layer[1].attention.self.query.configs["default"].allow_inexact_merge = True
    model.merge_adapter()
    with pytest.raises(BayesLoraError, match="unmerge_adapter"):
        export(model, tmp_path, format="integer")
    assert list(tmp_path.iterdir()) == []


def test_an_export_whose_check_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were there before stay."""
    model = BASES["bert"]()

    def broken(*_: Any) -> nn.Module:
        raise OSError("the disk is gone")

    monkeypatch.setattr(integer_writer, "load_integer", broken)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    for folder in (tmp_path / "new", mine):
        with pytest.raises(OSError, match="gone"):
            export(model, folder, format="integer", batch={"input_ids": TOKENS})
    assert not (tmp_path / "new").exists()
    assert (mine / "notes.txt").read_text() == "keep"


def test_a_product_over_one_input_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    x, codes = (torch.randint(-127, 128, (n, 1), generator=generator, dtype=torch.int8) for n in (33, 51))
    assert torch.equal(integer_kernels.integer_product(x, codes).long(), x.long() @ codes.long().T)
