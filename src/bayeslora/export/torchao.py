r"""A Transformers folder in torchao's layout, for vLLM and Transformers.

An adapted layer with a learned width of at most 8 bits computes $Q_w(W_0) x + c\, Q_b(B) (E \circ Q_a(A) x)$. The
codes of $Q_w(W_0)$ and the step of each row are written as they are, as torchao's `Int8Tensor`. The low-rank part is
written beside them, as a plain LoRA: their sum is on no grid. Quantizers of activations are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig
from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TorchAoConfig
from transformers.quantizers import AutoHfQuantizer

from bayeslora.errors import BayesLoraError
from bayeslora.export.agreement import check_divergence, difference
from bayeslora.export.formats import adapted_parts, save_model, to_take_apart
from bayeslora.export.lora import export_lora
from bayeslora.export.merged import left_out_activations
from bayeslora.export.onnx.products import BYTE, learned, rounded_rows
from bayeslora.methods.layer import BayesLayer
from bayeslora.model_card import CARD_FILE, base_name, error_of, front_matter
from bayeslora.vocabulary import BASE_WEIGHT, UNQUANTIZED

ADAPTER_FOLDER = "adapter"


def export_torchao(
    model: nn.Module,
    path: str | Path,
    adapter_name: str | None = None,
    batch: Mapping[str, Tensor] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    unadapted: str = "int8",
    rows: Iterable[Mapping[str, Tensor]] | None = None,
    allow_error: bool = False,
) -> dict[str, Any]:
    """Write the base with int8 weights in torchao's layout, and the adapter beside it as a plain LoRA.

    Args:
        model: a Transformers model with an adapter on linear layers that learned the widths of base weights. It stays
            unchanged.
        path: folder for `model.safetensors`, `config.json`, the tokenizer, `README.md` and a folder `adapter`; created
            if missing.
        adapter_name: name of the adapter, by default the active one.
        batch: inputs on which the error is measured, if `rows` is None; by default the model's `dummy_inputs`.
        tokenizer: tokenizer to save with the weights.
        unadapted: `"int8"` (default) also rounds the other linear layers, with a range per row, except the output
            head; `"float32"` leaves them. vLLM then needs adapters on query, key and value, and on gate and up.
        rows: batches of inputs on which the error is measured.
        allow_error: write the files even if the mean divergence exceeds 0.01 nats.

    Returns:
        `file_bytes` of base and adapter; `float32_bytes` of the model; `weights`, the number of int8 matrices;
        `widened`, the learned weight widths below 8 bits, which take 8 here, or None; `left_out`, the learned widths
        of activations, or None; and the error, as `bayeslora.export` measures it for ONNX.

    Raises:
        BayesLoraError: no base weight has a learned width of at most 8 bits, a weight has ranges for groups or is
            stored transposed, or the error is not allowed.
    """
    _check_options(unadapted)
    inner, tuner, name = adapted_parts(model, adapter_name)
    whole, layers = to_take_apart(inner, tuner, name)
    codes = _codes(layers, name)
    folder, config = Path(path), cast(Any, whole.peft_config[name])
    base = cast(PreTrainedModel, whole.unload())
    count = _save(base, codes, folder, config.modules_to_save or (), round_others=unadapted == "int8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    source = base_name(config, base)
    uniform = not config.modules_to_save  # servers load no other trained modules, so one rank would be for nobody
    export_lora(model, folder / ADAPTER_FOLDER, adapter_name, batch, uniform=uniform, allow_error=True)
    rank = _renamed(folder / ADAPTER_FOLDER / "adapter_config.json", source)
    files = [folder / "model.safetensors", folder / ADAPTER_FOLDER / "adapter_model.safetensors"]
    result = {
        "file_bytes": sum(file.stat().st_size for file in files),
        "float32_bytes": 4 * sum(parameter.numel() for parameter in inner.get_base_model().parameters()),
        "weights": count,
        **_not_kept(layers, name),
        **difference(model, load_torchao(folder, type(base)), [batch] if rows is None else rows),
    }
    if not allow_error:
        check_divergence(result, "the torchao form", "answers")
    _write_card(folder, source, str(getattr(config, "method", "blora")), type(base).__name__, rank, result)
    return result


def _codes(layers: Mapping[str, BayesLayer], name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return codes (d_out, d_in), int8, and steps (d_out,) of the base weights with a learned width, by path."""
    found = {}
    for path, layer in layers.items():
        if layer.packed_tensors(name) is None or layer.widths(name).get(BASE_WEIGHT, UNQUANTIZED) > BYTE:
            continue
        product = learned(layer, name)
        if layer.is_transposed or product.is_grouped:
            why = "stored as (d_in, d_out)" if layer.is_transposed else "in groups of inputs"
            raise BayesLoraError(
                f"the base weight of {path} is {why}, but torchao's int8 layout has one step for each row of "
                "(d_out, d_in): export 'gguf' instead"
            )
        found[path] = torch.from_numpy(product.weight), torch.from_numpy(product.steps.copy())
    if not found:
        raise BayesLoraError(
            "no base weight has a learned width of at most 8 bits, but torchao's layout is for those: export 'merged' "
            "and quantize that with torchao"
        )
    return found


def _check_options(unadapted: str) -> None:
    if "zero_point" not in getattr(Int8Tensor, "optional_tensor_data_names", ()):
        raise BayesLoraError("torchao is older than 0.17, whose int8 layout vLLM reads: pip install -U torchao")
    if unadapted not in ("int8", "float32"):
        raise BayesLoraError(f"unadapted is {unadapted!r}, but must be int8 or float32: choose one")


@torch.no_grad()
def _save(
    base: PreTrainedModel,
    codes: Mapping[str, tuple[Tensor, Tensor]],
    folder: Path,
    saved: Iterable[str],
    *,
    round_others: bool,
) -> int:
    """Write the base, and return the number of matrices in torchao's layout.

    Modules whose paths end in one of `saved` stay as they are, because the adapter's files replace them.
    """
    kept, count, head = [], 0, cast(Any, base.get_output_embeddings())
    for path, module in base.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if path in codes:
            rows, steps = codes[path]
        elif round_others and module is not head and not path.endswith(tuple(saved)):
            rounded, scales = rounded_rows(module.weight)
            rows, steps = torch.from_numpy(rounded), torch.from_numpy(scales)
        else:
            kept.append(path)
            continue
        dtype, steps = module.weight.dtype, steps.float()[:, None]
        zeros = torch.zeros_like(steps, dtype=torch.int8)
        tensor = Int8Tensor(rows, steps, [1, rows.shape[1]], dtype, zero_point=zeros)
        module.weight = nn.Parameter(tensor, requires_grad=False)
        count += 1
    config = TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=kept)
    quantized: Any = base
    quantized.config.quantization_config = config
    quantized.hf_quantizer, quantized.is_quantized = AutoHfQuantizer.from_config(config, pre_quantized=True), True
    save_model(base, folder, max_shard_size="1000GB")
    return count


def _renamed(file: Path, base: str) -> int:
    """Give the adapter's base its public name, which says nothing of this machine, and return the adapter's rank."""
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, "base_model_name_or_path": base}, indent=2) + "\n", encoding="utf-8")
    return int(content["r"])


def _not_kept(layers: Mapping[str, BayesLayer], name: str) -> dict[str, str | None]:
    """Return the learned widths that the files hold in more bits, and those of activations, which they leave out."""
    widths = [layer.widths(name) for layer in layers.values()]
    narrow = sorted({each[BASE_WEIGHT] for each in widths if each.get(BASE_WEIGHT, UNQUANTIZED) < BYTE})
    return {
        "widened": f"{BASE_WEIGHT} {' and '.join(map(str, narrow))} as {BYTE}" if narrow else None,
        "left_out": left_out_activations(layers.values(), name),
    }


def load_torchao(folder: Path, family: type[PreTrainedModel]) -> PeftModel:
    """Return the model of a folder that `export` wrote with `format="torchao"`, with its adapter.

    Raises:
        BayesLoraError: files that are missing or damaged.
    """
    try:
        base = family.from_pretrained(folder)
        return PeftModel.from_pretrained(cast(Any, base), str(folder / ADAPTER_FOLDER)).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise BayesLoraError(f"{folder} cannot be read ({str(error).splitlines()[0]}): export it again") from error


def _write_card(folder: Path, base: str, method: str, family: str, rank: int, measured: Mapping[str, Any]) -> None:
    front = front_matter(
        f"{base} in int8",
        base,
        library="transformers",
        relation="quantized",
        tags=["bayeslora", method, "torchao", "vllm"],
    )
    kept = " ".join(
        f"{text}: {measured[key]}."
        for key, text in (("widened", "In more bits than learned"), ("left_out", "Left out"))
        if measured[key]
    )
    text = f"""---
{front}
---

# `{base}` in int8, with an adapter

`{base}` with an adapter that was trained with the method `{method}` of bayeslora. {measured["weights"]} matrices have
8-bit codes in torchao's layout. The adapter is a plain LoRA in the folder `{ADAPTER_FOLDER}`; a posterior is used at
its mean. {kept}

## How to load it

With `pip install transformers peft torchao`, in this folder:

```python
from peft import PeftModel
from transformers import {family}

model = PeftModel.from_pretrained({family}.from_pretrained("."), "{ADAPTER_FOLDER}").eval()
```

vLLM serves a language model, with torchao installed beside it:

    vllm serve . --enable-lora --max-lora-rank {rank} --lora-modules trained={ADAPTER_FOLDER}

## Error

{error_of(measured)}
"""
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
