"""Methods from outside the package: registered by a call, found by the command through an entry point."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import bayeslora
from bayeslora import BayesLoraError, register_method
from bayeslora.methods import AdapterConfig, BayesTuner
from bayeslora.methods.melora import MeLoraConfig, MeLoraLayer, MeLoraModel
from bayeslora.methods.registry import METHODS, find_method, package_of, title_of
from tests.methods.reference import Tiny
from tests.methods.registered import forgotten_afterwards, offer
from tests.methods.variational_models import X


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    with forgotten_afterwards():
        yield
    if "method" in vars(MineConfig):
        del MineConfig.method


@dataclass
class MineConfig(MeLoraConfig):
    pass


class MineModel(MeLoraModel):
    title = "Mine"


def test_a_subclass_of_a_method_is_a_method(tmp_path: Path) -> None:
    register_method("mine", MineConfig, MineModel)
    assert MineConfig.method == "mine" and MeLoraConfig.method == "melora" and title_of("mine") == "Mine"
    torch.manual_seed(0)
    base = Tiny()
    model = get_peft_model(copy.deepcopy(base), MineConfig(r=2, target_modules=["first"], init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert isinstance(loaded.base_model, MineModel) and type(loaded.peft_config["default"]) is MineConfig
    assert torch.equal(loaded(X), model(X))
    prediction = bayeslora.predict(loaded, {"x": X[:, 0]}, samples=2, logits=lambda model, batch: model(batch["x"]))
    assert prediction.probabilities.shape == (3, 3) and (prediction.mutual_information > 0).all()
    assert [layer.rank for layer in bayeslora.describe(loaded)] == [2]
    expected = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), expected, rtol=1e-4, atol=1e-5)


def test_a_class_that_is_defined_again_takes_the_place_of_the_first() -> None:
    for _ in range(2):
        again = dataclass(type("MineConfig", (MeLoraConfig,), {"__module__": __name__, "__qualname__": "MineConfig"}))
        register_method("mine", again, MineModel)
    assert METHODS["mine"] is again


class NoPrefix(BayesTuner):
    pass


class WrongLayer(MeLoraLayer):
    adapter_layer_names = ("melora_A", "other_B")


class WrongTensors(MeLoraModel):
    tuner_layer_cls = WrongLayer


@pytest.mark.parametrize(
    ("name", "config", "model", "message"),
    [
        ("Mine", MineConfig, MineModel, "lower-case letters"),
        ("mine_", MineConfig, MineModel, "lower-case letters"),
        ("melora", MineConfig, MineModel, "a method of bayeslora.methods.melora.config already"),
        ("lora", MineConfig, MineModel, "a method of PEFT"),
        ("full", MineConfig, MineModel, "a method of PEFT or of the command"),
        ("mine", MeLoraConfig, MineModel, "derive a configuration class"),
        ("mine", MineConfig, nn.Module, "subclasses of"),
        ("mine", dict, MineModel, "subclasses of"),
        ("mine", MineConfig, NoPrefix, "begins with the prefix"),
        ("mine", MineConfig, WrongTensors, "other_B"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(name: str, config: Any, model: Any, message: str) -> None:
    with pytest.raises(BayesLoraError, match=message) as error:
        register_method(name, config, model)
    assert "\n" not in str(error.value) and name not in set(METHODS) - {"melora"}


MODULE = """
from dataclasses import dataclass
import bayeslora
from bayeslora.methods.melora import MeLoraConfig, MeLoraModel

@dataclass
class FoundConfig(MeLoraConfig):
    pass

class FoundModel(MeLoraModel):
    title = "Found"

bayeslora.register_method("found", FoundConfig, FoundModel)
"""


def test_an_installed_package_is_imported_when_its_method_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(tmp_path, "found", "package_with_method", MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    assert "found" not in METHODS
    assert find_method("found") is METHODS["found"] and package_of("found") == "package_with_method"
    assert find_method("unheard_of") is None


@pytest.mark.parametrize(
    ("content", "message"), [("1 / 0", "cannot be imported"), ("pass", "registers no such method")]
)
def test_a_package_that_does_not_keep_its_word_is_named(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "package_" + "".join(c for c in message if c.isalpha())
    offer(tmp_path, "broken", module, content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BayesLoraError, match=f"{module}, but that {message}"):
        find_method("broken")


def test_every_method_of_the_package_says_its_title() -> None:
    for name in ("blora", "melora", "blob", "bayes_adalora", "dylora"):
        config = METHODS[name]
        assert issubclass(config, AdapterConfig) and title_of(name) != name and package_of(name) == "bayeslora"
    assert title_of("full") == "full fine-tuning" and package_of("lora") is None
