"""`Tiny` with a variational adapter in a known random state, and the one-page references on that state."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

import bayeslora
from bayeslora import BlobConfig, MeLoraConfig
from bayeslora.posterior import Noise
from tests.methods.reference import D_IN, RANK, Tiny, layers_of, seeded
from tests.oracles import blob, melora

X = torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(7))
CPU = torch.device("cpu")
METHODS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "melora": (MeLoraConfig, {"variance": "learned"}),
    "melora-diagonal": (MeLoraConfig, {"variance": "learned", "core": "diagonal"}),
    "blob": (BlobConfig, {}),
}


def config(method: str, **options: Any) -> Any:
    config_class, fixed = METHODS[method]
    settings = {"r": RANK, "lora_alpha": 6, "target_modules": ["first", "second"], "num_examples": 50}
    return config_class(**{**settings, **fixed, **options})


def tiny(method: str, kind: str = "linear", bias: bool = True, **options: Any) -> nn.Module:
    """In training mode, with every tensor of the adapter away from its start and deviations of visible size."""
    model = get_peft_model(seeded(lambda: Tiny(kind, bias)), config(method, **options))
    for index, layer in enumerate(layers_of(model)):
        randomize(layer, seed=index)
    return model.train()


@torch.no_grad()
def randomize(layer: Any, name: str = "default", seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)

    def around(tensor: Tensor, centre: float, spread: float) -> None:
        tensor.copy_(centre + spread * (torch.rand(tensor.shape, generator=generator) - 0.5))

    if hasattr(layer, "blob_M"):
        around(layer.blob_M[name], 0.0, 1.0)
        around(layer.blob_G[name], 0.5, 0.3)
        around(layer.blob_B[name], 0.0, 1.0)
        return
    around(layer.melora_A[name], 0.0, 1.0)
    around(layer.melora_B[name], 0.0, 1.0)
    layer.melora_M[name].add_(0.4 * torch.rand(layer.melora_M[name].shape, generator=generator))
    around(layer.melora_rho[name], -0.7, 1.0)


def melora_adapter(layer: Any, name: str = "default") -> melora.Adapter:
    tensors = (getattr(layer, f"melora_{part}")[name].detach().clone() for part in ("A", "B", "M", "rho"))
    return melora.Adapter(*tensors, layer.scaling[name])


def blob_adapter(layer: Any, name: str = "default") -> blob.Adapter:
    tensors = (getattr(layer, f"blob_{part}")[name].detach().clone() for part in ("M", "G", "B"))
    return blob.Adapter(*tensors, layer.scaling[name])


def oracle(layer: Any, x: Tensor, noise: list[Tensor | None], name: str = "default") -> Tensor:
    """What the method's reference gives when row i of `x` is computed under `noise[i]`; None is the mean."""
    base = layer.get_base_layer()
    weight = (base.weight.T if layer.is_transposed else base.weight).detach()
    if hasattr(layer, "blob_M"):
        return blob.forward(x, weight, base.bias, blob_adapter(layer, name), noise)
    return melora.forward(x, weight, base.bias, melora_adapter(layer, name), noise)


def noise_shape(layer: Any, name: str = "default") -> torch.Size:
    return layer.posterior(name)[0].shape


def examples(layer: Any, key: str, seed: int, rows: int) -> list[Tensor | None]:
    """The noise of each row of a batch under `sampling(scope="example", seed)`."""
    return list(Noise("example", seed, key).normal(rows, noise_shape(layer), CPU))


def draw(layer: Any, key: str, seed: int, number: int, antithetic: bool = False) -> Tensor:
    """The noise of draw `number` under `sampling(scope="batch", seed)`."""
    return Noise("batch", seed, key, [number], antithetic).normal(1, noise_shape(layer), CPU)[0]


def sampled(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    with bayeslora.sampling(model, **options), torch.no_grad():
        return model(x)
