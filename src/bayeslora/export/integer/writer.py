r"""Integer models: base and adapter as one folder of codes.

An adapted layer is written as the frozen evaluation model uses it: base weight, A, E and B as codes at their learned
widths, 2- and 4-bit codes packed in bytes, and a fixed range for each activation. Other linear layers and the input
embedding have not learned their widths. By default they become 8-bit codes with one range per row, and the effect on
the outputs is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bayeslora._peft import AuxiliaryTrainingWrapper
from bayeslora.errors import BayesLoraError
from bayeslora.export.calibration import LayerInputs, inputs_of_plain_layers
from bayeslora.export.container import pack, write_container
from bayeslora.export.formats import (
    adapted_parts,
    inputs_for,
    output_error,
    output_of,
    save_config,
    to_take_apart,
    upright,
)
from bayeslora.export.integer.reader import (
    BIAS,
    CODES_SUFFIX,
    INDEX_FILE,
    WEIGHTS_FILE,
    IntegerIndex,
    IntegerLayer,
    load_integer,
    own_tensors,
    seal,
)
from bayeslora.methods.layer import BayesLayer, device_of
from bayeslora.quantization import FLOOR, codes
from bayeslora.vocabulary import ALL_KINDS, BASE_WEIGHT, MATRICES, UNQUANTIZED

UNADAPTED = ("int8", "bfloat16", "float32")
_BYTE = 8


def export_integer(
    model: nn.Module,
    path: str | Path,
    adapter_name: str | None = None,
    batch: Mapping[str, Tensor] | None = None,
    *,
    unadapted: str = "int8",
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """Write base and adapter as one model of integer codes, which `load_integer` loads.

    Args:
        model: a PEFT model with a B-LoRA adapter on a Transformers model. It stays unchanged.
        path: folder for `config.json`, `integer.json` and `integer_model.safetensors`; created if missing.
        adapter_name: name of the adapter, by default the active one.
        batch: inputs on which the output error is measured; by default the model's `dummy_inputs`.
        unadapted: type of the weights of linear layers without an adapter, and of the input embedding: `"int8"`
            (default) with a range per row, `"bfloat16"`, or `"float32"`, which changes nothing. Other trained
            modules, such as a classifier, keep their type.
        calibration: batches of inputs that fix static 8-bit ranges for the inputs of unadapted int8 layers, so that
            their products use integers too; None (default) leaves these inputs unquantized.

    Returns:
        `file_bytes`, the size of the tensor file; `ideal_bytes`, the bits of all stored numbers divided by eight;
        `float32_bytes`, the size of the model in float32; `max_output_error` and `max_output`, over the outputs of
        this model and of the one that was written (None without inputs).

    Raises:
        BayesLoraError: the adapter has another method or is merged, or the base is in 4 or 8 bits or is not a
            Transformers model.
    """
    if unadapted not in UNADAPTED:
        raise BayesLoraError(f"unadapted is {unadapted!r}, but must be one of {', '.join(UNADAPTED)}: choose one")
    if calibration is not None and unadapted != "int8":
        raise BayesLoraError(
            f"unadapted is {unadapted!r}, but calibration is for unadapted='int8' only: leave calibration out"
        )
    original, tuner, name = adapted_parts(model, adapter_name)
    _check(original, tuner.named_layers(name), name)
    whole, layers = to_take_apart(original, tuner, name)
    inputs = inputs_for(whole, batch)
    expected = output_of(whole, inputs)
    adapted_parts(whole, name)[1].shrink(name)
    modules = whole.get_base_model().named_modules()
    trained = [key for key, module in modules if isinstance(module, AuxiliaryTrainingWrapper)]
    inputs_of_layers = {} if calibration is None else inputs_of_plain_layers(whole, calibration)
    base = cast(PreTrainedModel, whole.unload())
    index, tensors = _written(base, layers, name, unadapted, trained, inputs_of_layers)
    _save(Path(path), base, index, tensors)
    found = None if inputs is None else output_of(load_integer(path, device_of(base)), inputs)
    return {
        "file_bytes": (Path(path) / WEIGHTS_FILE).stat().st_size,
        "ideal_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "float32_bytes": 4 * sum(parameter.numel() for parameter in base.parameters()),
        **output_error(expected, found, base, is_dummy=batch is None),
    }


def _check(model: PeftModel, layers: Mapping[str, BayesLayer], name: str) -> None:
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise BayesLoraError(
            f"{type(base).__name__} is not a Transformers model, but only those can be loaded again: "
            "export 'packed' instead"
        )
    for key, layer in layers.items():
        if layer.packed_tensors(name) is None:
            raise BayesLoraError(
                f"{key} is a {type(layer).__name__}, but format 'integer' is for methods that learn widths: "
                "export 'merged' instead"
            )


def _save(folder: Path, base: PreTrainedModel, index: IntegerIndex, tensors: dict[str, Tensor]) -> None:
    """Write all files of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    text = index.to_text()
    write_container(folder / WEIGHTS_FILE, seal(text), tensors)
    (folder / INDEX_FILE).write_text(text, encoding="utf-8")
    base.config.architectures = [index.architecture]
    save_config(base, folder)


@torch.no_grad()
def _written(
    base: PreTrainedModel,
    adapted: dict[str, BayesLayer],
    name: str,
    unadapted: str,
    trained: list[str],
    inputs: Mapping[str, LayerInputs],
) -> tuple[IntegerIndex, dict[str, Tensor]]:
    """Return the index and the tensors by key: codes by layer, the rest by their path in the model."""
    index, tensors = IntegerIndex(type(base).__name__), {}
    embedding, head = _input_embedding(base), base.get_output_embeddings()
    modules = dict(base.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    is_tied = head is not None and embedding is not None and head.weight is embedding.weight
    tie = paths.get(id(embedding)) if is_tied else None
    for path, module in modules.items():
        kept = _is_within(path, trained)
        if path in adapted:
            layer, parts = _adapted(path, adapted[path], name)
        elif kept or unadapted != "int8" or type(module) not in (nn.Linear, Conv1D, nn.Embedding):
            continue
        elif module is head and tie is not None:
            layer, parts = _tied(path, module, tie)
        elif type(module) is nn.Embedding and module is not embedding:
            continue  # position or token-type embeddings are small, and some models read their weight
        else:
            layer, parts = _rounded(path, module, inputs[path].best_range() if path in inputs else None)
        (index.embeddings if type(module) is nn.Embedding else index.linear)[path] = layer
        if parts:
            tensors[path + CODES_SUFFIX] = torch.cat(parts)
    _add_the_rest(base, index, tensors, unadapted, trained)
    return index, tensors


def _add_the_rest(
    base: PreTrainedModel, index: IntegerIndex, tensors: dict[str, Tensor], unadapted: str, trained: list[str]
) -> None:
    """Add every parameter and buffer outside the layers of `index`; shared ones are stored once."""
    coded, embedding = {*index.linear, *index.embeddings}, _input_embedding(base)
    first: dict[int, str] = {}
    for owner, module, leaf, tensor in own_tensors(base):
        path = f"{owner}.{leaf}" if owner else leaf
        if owner in coded:
            continue
        if id(tensor) in first:
            index.shared[path] = first[id(tensor)]
            continue
        first[id(tensor)] = path
        stored = tensor.detach().cpu().contiguous()
        is_weight = leaf == "weight" and (module is embedding or type(module) in (nn.Linear, Conv1D))
        is_narrow = unadapted == "bfloat16" and is_weight and not _is_within(owner, trained)
        # safetensors refuses two tensors that share memory, so copy.
        tensors[path] = stored.to(torch.bfloat16) if is_narrow else stored.clone()


def _input_embedding(base: PreTrainedModel) -> nn.Module | None:
    """Return the layer that embeds tokens; None for a model without one, such as one that hashes characters."""
    try:
        return base.get_input_embeddings()
    except NotImplementedError:
        return None


def _is_within(path: str, modules: list[str]) -> bool:
    return any(path == module or path.startswith(module + ".") for module in modules)


def _adapted(path: str, layer: BayesLayer, name: str) -> tuple[IntegerLayer, list[Tensor]]:
    """Return the entry of an adapted layer and its bytes, as evaluation uses it."""
    packed = layer.packed_tensors(name)
    assert packed is not None
    found, bounds = {BASE_WEIGHT: UNQUANTIZED, **packed.widths}, packed.ranges
    if found[BASE_WEIGHT] < UNQUANTIZED and bounds[BASE_WEIGHT].numel() > layer.out_features:
        raise BayesLoraError(
            f"{path} has a range for each group of its inputs, but a product of integers has one a row: "
            "export 'gguf' or 'onnx', or train without group_size"
        )
    rank = len(packed.matrices["E"])
    wanted = [kind for kind in ALL_KINDS if kind in found and (rank or kind in (BASE_WEIGHT, "in", "out"))]
    bits = {kind: found[kind] for kind in wanted if found[kind] < UNQUANTIZED or kind in (BASE_WEIGHT, *MATRICES)}
    narrow = [kind for kind, width in bits.items() if width < UNQUANTIZED]
    bias = cast("Tensor | None", layer.get_base_layer().bias)
    described = IntegerLayer(
        path,
        layer.out_features,
        layer.in_features,
        bits,
        {kind: float(bounds[kind]) for kind in narrow if bounds[kind].ndim == 0},
        tuple(kind for kind in narrow if bounds[kind].ndim),
        rank,
        float(layer.scaling[name]),
        bias is not None,
        learned=True,
    )
    weight = layer.get_base_weight().detach()
    matrices = {BASE_WEIGHT: weight.T if layer.is_transposed else weight, **packed.matrices}
    return described, _packed(described, matrices, bounds, bias)


def _packed(
    layer: IntegerLayer, matrices: Mapping[str, Tensor], bounds: Mapping[str, Tensor], bias: Tensor | None
) -> list[Tensor]:
    """Return the bytes of a layer's parts."""
    given = dict(matrices) if bias is None else {BIAS: bias, **matrices}
    found = []
    for part in layer.parts():
        values = bounds[part.kind] if part.is_range else given[part.kind]
        if part.bits < UNQUANTIZED:
            values = codes(values, bounds[part.kind], part.bits)
        found.append(pack(values, part.bits))
    return found


def _rounded(path: str, module: nn.Module, input_range: float | None) -> tuple[IntegerLayer, list[Tensor]]:
    """Return the entry and bytes of a layer without an adapter, at 8 bits with a range per row."""
    weight = upright(module)
    bias = cast("Tensor | None", getattr(module, "bias", None))
    d_out, d_in = weight.shape
    ranges = {} if input_range is None else {"in": input_range}
    bits = dict.fromkeys((BASE_WEIGHT, *ranges), _BYTE)
    layer = IntegerLayer(path, d_out, d_in, bits, ranges, (BASE_WEIGHT,), bias=bias is not None)
    bound = weight.float().abs().amax(1, keepdim=True).clamp_min(FLOOR)
    return layer, _packed(layer, {BASE_WEIGHT: weight}, {BASE_WEIGHT: bound}, bias)


def _tied(path: str, head: nn.Module, embedding: str) -> tuple[IntegerLayer, list[Tensor]]:
    """Return the entry and bytes of a head that shares an embedding's codes."""
    bias = cast("Tensor | None", getattr(head, "bias", None))
    d_out, d_in = cast(Tensor, head.weight).shape
    layer = IntegerLayer(path, d_out, d_in, {}, bias=bias is not None, tied_to=embedding)
    return layer, _packed(layer, {}, {}, bias)
