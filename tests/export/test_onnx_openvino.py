"""OpenVINO computes with ONNX models what onnxruntime does, and on codes. For who has it: `pip install openvino`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from bayeslora import export
from tests.conftest import build_tiny_gpt2, build_tiny_llama, build_tiny_tokenizer
from tests.export import test_onnx, test_onnx_decoder

openvino = pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.slow

Arrays = dict[str, np.ndarray]
ON_CODES = {"weight": 8, "in": 8, "A": 8, "E": 8, "B": 8, "A_out": 8, "E_out": 8, "out": 8}
BUILDS: dict[str, tuple[Any, list[str]]] = {
    "llama": (build_tiny_llama, test_onnx_decoder.LLAMA),
    "gpt2": (build_tiny_gpt2, ["c_attn", "c_fc"]),
}


class Both:
    """A graph in onnxruntime and in OpenVINO."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "model.onnx"
        self.session = onnxruntime.InferenceSession(self.file)
        self.compiled = openvino.Core().compile_model(self.file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def __call__(self, feeds: Arrays) -> tuple[Arrays, Arrays]:
        """Both runtimes' outputs by name."""
        names = [each.name for each in self.session.get_outputs()]
        found = self.compiled(feeds)
        return dict(zip(names, self.session.run(names, feeds), strict=True)), {name: found[name] for name in names}

    def products(self) -> Counter[str]:
        """How many linear layers OpenVINO computes, by the type of what they read or of their weights."""
        info = [each.get_rt_info() for each in self.compiled.get_runtime_model().get_ops()]
        return Counter(
            each["runtimePrecision"].astype(str) for each in info if each["layerType"].astype(str) == "FullyConnected"
        )

    def count(self, operator: str) -> int:
        """How many such operators the graph has."""
        return sum(node.op_type == operator for node in onnx.load(self.file).graph.node)


def _moved(expected: np.ndarray, found: np.ndarray) -> float:
    """The mean difference, as a share of the largest output: at a tie a code may move, and an output by its step."""
    return float(np.abs(found - expected).mean() / np.abs(expected).max())


@pytest.mark.parametrize("method", ["lora", "blora"])
def test_an_encoder_gives_the_same_answers(method: str, tmp_path: Path) -> None:
    """Rounding ties may move a code; of a merged graph there is none."""
    build, targets = test_onnx.BASES["bert"]
    if method == "lora":
        model = get_peft_model(test_onnx._spread(build()), LoraConfig(r=2, target_modules=targets)).eval()
    else:
        model = test_onnx._blora("bert", ON_CODES, per_channel=True)
    rows = test_onnx._batch(model, 4, 17)
    export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer(), batch=rows, calibration=[rows])
    graph = Both(tmp_path)
    for size, length in ((1, 3), (4, 17), (3, 9)):
        batch = test_onnx._batch(model, size, length)
        given = {each.name for each in graph.session.get_inputs()}
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        expected, found = graph({name: values.numpy() for name, values in batch.items() if name in given})
        assert _moved(expected["logits"], found["logits"]) < (1e-5 if method == "lora" else 0.01)
        assert np.array_equal(expected["logits"].argmax(1), found["logits"].argmax(1))
    if method == "blora":
        assert graph.products()["u8"] >= 2 * 5  # query, key, value, output and two of the feed-forward, in each block


def _past(outputs: Arrays) -> Arrays:
    """The keys and values that a call returned, as the next one takes them."""
    return {name.replace("present", "past_key_values"): each for name, each in outputs.items() if name != "logits"}


@pytest.mark.parametrize("kind", list(BUILDS))
@pytest.mark.parametrize("form", ["merged", "on grids", "8 bits", "4 bits"])
def test_a_decoder_writes_the_same_tokens_with_its_cache(kind: str, form: str, tmp_path: Path) -> None:
    build, targets = BUILDS[kind]
    base = test_onnx_decoder._spread(build())
    if form == "merged":
        model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    else:
        wide = {} if form == "on grids" else {**test_onnx_decoder.WIDE, "weight": int(form[0])}
        model = test_onnx_decoder._learned(base, targets, {**ON_CODES, **wide})
    batch = {"input_ids": torch.arange(5, 25).reshape(2, 10)}
    options = {"tokenizer": build_tiny_tokenizer(), "batch": batch, "allow_error": True}
    options |= {"unadapted": "float32"} if form == "on grids" else {}
    export(model, tmp_path, format="onnx", **options)
    graph = Both(tmp_path)
    ids = np.arange(5, 17).reshape(2, 6)
    new, pasts = ids, [{}, {}]
    for each in graph.session.get_inputs():
        if each.name.startswith("past_key_values"):
            for past in pasts:
                past[each.name] = np.zeros((2, each.shape[1], 0, each.shape[3]), dtype=np.float32)
    for _ in range(4):
        total = next(iter(pasts[0].values())).shape[2] + new.shape[1]
        shared = {"input_ids": new, "attention_mask": np.ones((2, total), dtype=np.int64)}
        shared["position_ids"] = np.arange(total - new.shape[1], total)[None].repeat(2, 0)
        expected, found = graph({**shared, **pasts[0]})[0], graph({**shared, **pasts[1]})[1]
        assert _moved(expected["logits"], found["logits"]) < (1e-5 if form == "merged" else 0.01)
        new = expected["logits"][:, -1].argmax(1)[:, None]
        pasts = [_past(expected), _past(found)]
    products = graph.products()
    if form in ("8 bits", "4 bits"):
        assert products["u" + form[0]] >= graph.count("MatMulNBits") // 2 > 0
    elif form == "on grids":
        assert products["u8"] >= len(targets)
