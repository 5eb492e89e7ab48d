"""`import bayeslora` is quick, and still teaches PEFT, in whatever order and way the two are imported.

Each scenario is a few lines in a process of its own, forked from one that has imported what PEFT and we import.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from peft import get_peft_model

import bayeslora
from tests.conftest import build_tiny_bert

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "peft", "numpy", "datasets", "scipy", "sklearn", "pandas", "matplotlib", "jinja2")

DRIVER = """
import json, os, sys, traceback
import contextlib, datasets, networkx, scipy.stats, sklearn.metrics, torch._dynamo
with contextlib.suppress(ImportError):
    import bitsandbytes
import transformers.models.bert.modeling_bert
assert "peft" not in sys.modules and "bayeslora" not in sys.modules
failed = {}
for name, code in json.load(sys.stdin).items():
    reading, writing = os.pipe()
    if not os.fork():
        try:
            exec(code, {"sys": sys})
            said = ""
        except BaseException:
            said = traceback.format_exc()
        os.write(writing, said.encode()[-4000:])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        if said := pipe.read():
            failed[name] = said
    os.wait()
print(json.dumps(failed))
"""
KNOWS = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
import peft, bayeslora
assert {"blora", "melora", "blob", "bayes_adalora", "dylora"} <= {str(name.value).lower() for name in known}, known
assert peft.utils.save_and_load.safe_load_file.__module__ == "bayeslora._peft"
assert not any(type(finder).__module__ == "bayeslora._peft_hook" for finder in sys.meta_path)
"""
PACKAGES = ("_peft", "posterior", "optim", "methods", "methods.layer", "prediction", "export", "report", "runs")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base model, an adapter on it, and the adapter in the packed form."""
    folder = tmp_path_factory.mktemp("import")
    build_tiny_bert().save_pretrained(folder / "base")
    config = bayeslora.BLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_weights=False)
    model = get_peft_model(type(build_tiny_bert()).from_pretrained(folder / "base"), config)
    model.save_pretrained(folder / "adapter")
    bayeslora.export(model, folder / "packed", format="packed")
    return {name: str(folder / name) for name in ("base", "adapter", "packed")}


def scenarios(folders: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The lines of each scenario, by what they show."""
    base = (
        f"from transformers import BertForSequenceClassification as B\nbase = B.from_pretrained({folders['base']!r})\n"
    )
    adapter, packed = repr(folders["adapter"]), repr(folders["packed"])
    broken = tmp_path / "peft"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('half installed')\n")
    configuration = pickle.dumps(bayeslora.BLoraConfig(r=3))
    found: dict[str, str] = {
        "nothing heavy": "import bayeslora\nassert 'peft' not in sys.modules and len(dir(bayeslora)) > 40\n",
        "bayeslora then peft": f"import bayeslora\nfrom peft import PeftModel\n{base}"
        f"model = PeftModel.from_pretrained(base, {adapter})\nassert bayeslora.describe(model)[0].rank == 2",
        "peft then bayeslora": f"from peft import PeftModel\nimport bayeslora\n{base}"
        f"assert bayeslora.describe(PeftModel.from_pretrained(base, {adapter}))",
        "packed": f"import bayeslora\nfrom peft import PeftModel\n{base}PeftModel.from_pretrained(base, {packed})",
        "AutoPeftModel": "import bayeslora\nfrom peft import AutoPeftModelForSequenceClassification as Auto\n"
        f"assert bayeslora.describe(Auto.from_pretrained({adapter}))",
        "load_adapter of transformers": f"import bayeslora\n{base}base.load_adapter({adapter})\n"
        "assert any('blora_A' in name for name, _ in base.named_parameters())",
        "a submodule of peft first": "import bayeslora\nfrom peft.tuners.lora import LoraLayer",
        "the Trainer imports peft": "import bayeslora\nfrom transformers import Trainer",
        "a name of bayeslora first": "import bayeslora\nassert 'blora' in bayeslora.METHODS",
        "a pickle": f"import pickle\nassert pickle.loads({configuration!r}).r == 3",
        "reload": "import importlib, bayeslora\nimportlib.reload(bayeslora)\nimport peft\nimportlib.reload(peft)\n"
        "importlib.reload(bayeslora)\nassert bayeslora.export.__name__ == 'export' and callable(bayeslora.export)",
        "a failed import": f"import bayeslora\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "try:\n    import peft\nexcept OSError:\n    pass\nelse:\n    raise AssertionError\ndel sys.path[0]\n"
        "sys.path_importer_cache.clear()",
        "peft looked for, not imported": "import importlib.util, bayeslora\n"
        "spec = importlib.util.find_spec('peft')\nassert 'peft' not in sys.modules\n"
        "assert type(spec.loader).__name__ == 'SourceFileLoader' and spec.loader.get_source('peft')",
        "export the function, export the package": "import bayeslora.export.packed.reader\nimport bayeslora\n"
        "from bayeslora import export\nfrom bayeslora.export import FORMATS\n"
        "assert bayeslora.export is export is sys.modules['bayeslora.export'].export",
        "threads": "import threading, bayeslora, importlib\n"
        "names = ['peft', 'bayeslora.methods', 'bayeslora.export', 'transformers.trainer']\nerrors = []\n"
        "def load(name):\n    try:\n        importlib.import_module(name)\n"
        "    except BaseException as error:\n        errors.append((name, error))\n"
        "threads = [threading.Thread(target=load, args=(name,)) for name in names]\n"
        "[t.start() for t in threads]\n[t.join() for t in threads]\nassert not errors, errors",
    }
    found |= {f"import bayeslora.{name}": f"import bayeslora.{name}" for name in PACKAGES}
    return {name: code + "\n" + ("" if name == "nothing heavy" else KNOWS) for name, code in found.items()}


def test_peft_knows_the_methods_whoever_imports_it(folders: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(scenarios(folders, tmp_path)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout.splitlines()[-1])
    assert not failed, "\n\n".join(f"{name}:\n{said}" for name, said in failed.items())


@pytest.mark.parametrize(
    "module", ["bayeslora", "bayeslora.errors", "bayeslora.cli.main", "bayeslora.runs.plan", "benchmarks.records"]
)
def test_modules_that_need_nothing_heavy_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not set(HEAVY) & set(done.stdout.split())


def test_the_report_needs_no_torch() -> None:
    code = "import sys, bayeslora.report\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"torch", "transformers", "peft", "datasets"} & set(done.stdout.split())


def test_every_public_name_is_there_and_listed() -> None:
    assert all(getattr(bayeslora, name) is not None for name in bayeslora.__all__)
    assert set(bayeslora.__all__) <= set(dir(bayeslora))
    assert {name for names in bayeslora._NAMES.values() for name in names} == {*bayeslora.__all__} - {"BayesLoraError"}
    with pytest.raises(AttributeError, match="no attribute 'BLoraConfigg'"):
        _ = bayeslora.BLoraConfigg
