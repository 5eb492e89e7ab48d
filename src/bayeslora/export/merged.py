r"""Merged models: base and adapter as one ordinary Transformers folder, exact unless an error is allowed.

With $W = Q_w(W_0) + s\, Q_b(B)\, \mathrm{diag}(Q_e(E) \circ G)\, Q_a(A)$ in place of $W_0$ a float32 layer computes
the same to float rounding; a posterior is merged at its mean. A merge is inexact if activations are quantized or the
base has fewer bits and rounds the sum. Such a model is merged only on request, with the measured error in its card.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.export.formats import (
    adapted_parts,
    check_unmerged,
    inputs_for,
    lora_layers,
    only_active,
    output_error,
    output_of,
    save_model,
    sharing_base,
)
from bayeslora.methods.layer import undo_cpu_order
from bayeslora.methods.tuner import BayesTuner, tuner_of
from bayeslora.model_card import CARD_FILE, base_name, error_of, front_matter
from bayeslora.vocabulary import ACTIVATIONS

TOLERANCE = 1e-4
"""Largest output error, as a share of the largest output, that counts as float rounding through a deep model."""


def export_merged(
    model: nn.Module,
    path: str | Path,
    adapter_name: str | None = None,
    batch: Mapping[str, Tensor] | None = None,
    *,
    allow_error: bool = False,
) -> dict[str, Any]:
    """Write base and adapter, at its learned widths and its posterior mean, as one Transformers model.

    Args:
        model: a PEFT model on a Transformers model, with this library's adapter or PEFT's LoRA. It stays unchanged.
        path: folder for the model and its `README.md`; created if missing.
        adapter_name: name of the adapter, by default the active one.
        batch: inputs on which the output error is measured; by default the model's `dummy_inputs`.
        allow_error: merge even if the outputs will differ, by default False.

    Returns:
        `max_output_error` and `max_output`, over the outputs of this model and of the merged one on the batch (None
        without inputs), and `inexact`, the reason why they differ by more than float rounding, or None.

    Raises:
        BayesLoraError: merging cannot be exact and `allow_error` is False, an adapter is merged already, or the base
            is not a Transformers model.
    """
    original, tuner, name = _parts(model, adapter_name)
    base = original.get_base_model()
    if not hasattr(base, "save_pretrained"):
        raise BayesLoraError(
            f"{type(base).__name__} is not a Transformers model, but only those can be merged: export 'packed' instead"
        )
    layers: Mapping[str, Any] = lora_layers(original, name) if tuner is None else tuner.named_layers(name)
    check_unmerged(layers)
    reason = next((found for key, layer in layers.items() if (found := _why_inexact(key, layer, name))), None)
    if reason is not None and not allow_error:
        raise _refusal(reason)
    whole = copy.deepcopy(original) if tuner is None else sharing_base(original, tuner)
    whole.set_adapter(name)
    whole.eval()
    inputs = inputs_for(whole, batch)
    ours = output_of(whole, inputs)
    merged = merge_into_base(whole, name)
    theirs = output_of(merged, inputs)
    measured: dict[str, Any] = {**output_error(ours, theirs, merged, is_dummy=batch is None), "inexact": reason}
    far = theirs is not None and not measured["max_output_error"] <= TOLERANCE * max(1.0, measured["max_output"])
    if far and reason is None:
        measured["inexact"] = "a merged weight is used in a second place, such as a tied embedding"
        if not allow_error:
            raise _refusal(f"{measured['inexact']} (outputs differ by {measured['max_output_error']:.2g})")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for module in merged.modules():
        undo_cpu_order(module)
    save_model(merged, folder)
    (folder / CARD_FILE).write_text(_card(original.peft_config[name], base, measured), encoding="utf-8")
    return measured


def _parts(model: nn.Module, adapter_name: str | None) -> tuple[PeftModel, BayesTuner | None, str]:
    """Return the PEFT model, its tuner (None of PEFT's LoRA) and the name of the adapter to merge."""
    if tuner_of(model) is None and isinstance(model, PeftModel):
        name = adapter_name or only_active(model)
        if lora_layers(model, name):
            return model, None, name
    return adapted_parts(model, adapter_name)


def _refusal(reason: str) -> BayesLoraError:
    return BayesLoraError(
        f"the merged model would have other outputs, because {reason}: export another format, or allow and measure "
        "the error with allow_error=True"
    )


def _why_inexact(key: str, layer: Any, name: str) -> str | None:
    """Return the reason why a stored weight cannot compute the same as `layer` with its adapter, or None."""
    if narrow := narrow_activations(layer, name):
        listed = ", ".join(f"{kind} {bits}" for kind, bits in narrow.items())
        return f"{key} quantizes activations ({listed} bits), which a weight cannot hold"
    if getattr(layer, "quantization_backend", None) is not None:
        return f"the base weight of {key} has {layer.base_width} bits, to which the sum has to be rounded again"
    dtype = cast(Tensor, layer.get_base_layer().weight).dtype
    if dtype not in (torch.float32, torch.float64):
        return f"the base weight of {key} is {str(dtype).removeprefix('torch.')}, to which the sum is rounded"
    return None


def narrow_activations(layer: Any, name: str) -> dict[str, int]:
    """Return the learned widths below 32 bits of a layer's activations, by kind."""
    found = getattr(layer, "quantized_activations", None)
    return {} if found is None else dict(found(name))


def left_out_activations(layers: Iterable[Any], name: str) -> str | None:
    """Return the learned widths of activations, which a form leaves out, such as `activations (out 8 and 16 bits)`."""
    narrow = [narrow_activations(layer, name) for layer in layers]
    widths = {kind: sorted({each[kind] for each in narrow if kind in each}) for kind in ACTIVATIONS}
    listed = ", ".join(f"{kind} {' and '.join(map(str, bits))}" for kind, bits in widths.items() if bits)
    return f"activations ({listed} bits)" if listed else None


def merge_into_base(whole: PeftModel, name: str) -> Any:
    """Merge the adapter, or PEFT's LoRA, into the copy `whole` and return its base model."""
    if tuner_of(whole) is None:
        return whole.merge_and_unload(safe_merge=True, adapter_names=[name])
    _, tuner, _ = adapted_parts(whole, name)
    config: Any = whole.peft_config[name]
    if hasattr(config, "allow_inexact_merge"):
        config.allow_inexact_merge = True  # the caller has allowed it, or it is exact
    for layer in tuner.adapted_layers(name):
        if layer.quantization_backend is not None:  # its weight is still the caller's
            base = layer.get_base_layer()
            base.weight = weight = copy.deepcopy(base.weight)
            if hasattr(weight, "module"):  # where bitsandbytes notes a new state of a 4-bit weight
                weight.module = base
            undo_cpu_order(base)
    try:
        return whole.merge_and_unload(safe_merge=True, adapter_names=[name])
    except (TypeError, NotImplementedError) as error:
        raise BayesLoraError(
            f"this base cannot take new weights ({error}): load it in float32 and merge there"
        ) from error
    except ValueError as error:
        raise BayesLoraError(f"merging failed ({error}): train the adapter again") from error


def _card(config: Any, base: nn.Module, measured: dict[str, Any]) -> str:
    """Return a model card with the merged parts and the difference in outputs."""
    name, reason = base_name(config, base), measured["inexact"]
    exact = "The merge is exact: outputs are those of base and adapter, to float rounding"
    said = exact if reason is None else f"**The merge is not exact**: {reason}"
    method = getattr(config, "method", "lora")
    trained, how = "PEFT's LoRA", ""
    if hasattr(config, "method"):
        trained = f"the method `{method}` of bayeslora"
        how = " at the learned widths; a posterior over the weights is merged at its mean"
    front = front_matter(f"{name} merged", name, library="transformers", relation="merge", tags=["bayeslora", method])
    return f"""---
{front}
---

# A merged model

`{name}` with an adapter trained with {trained}, merged into its weights{how}.
It is an ordinary Transformers model and needs no library besides Transformers. In this folder:

```python
from transformers import {type(base).__name__}

model = {type(base).__name__}.from_pretrained(".")
```

{said}. {error_of(measured)}
"""
