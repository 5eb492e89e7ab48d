"""`export --format gguf` and `--format torchao` on finished runs of a language model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bayeslora
from bayeslora.cli.main import main
from bayeslora.errors import BayesLoraError
from tests.cli.conftest import write_jsonl
from tests.conftest import EMPTY_PNG, build_tiny_llama
from tests.export.test_gguf import SIZES, byte_tokenizer
from tests.runs.text_runs import chat

pytest.importorskip("gguf")

QUICK = ["--learning-rate", "0.02", "--r", "4", "--target-modules", "q_proj,v_proj"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("language")
    rows = write_jsonl(folder / "chat.jsonl", chat(30))
    build_tiny_llama(**SIZES, pad_token_id=2, max_position_embeddings=1024).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bayeslora.report.page.png_bytes", lambda figure: EMPTY_PNG)
        for method, steps in (("lora", "2"), ("blora", "20")):
            options = [
                "--method",
                method,
                "--model",
                str(folder / "base"),
                "--train-file",
                str(rows),
                "--max-steps",
                steps,
            ]
            assert main(["train", *options, *QUICK, "--output-dir", str(folder / method)]) == 0
    return {method: folder / method for method in ("lora", "blora")}


@pytest.mark.parametrize(
    ("method", "options", "files"),
    [
        ("lora", [], {"model.gguf", "config.json"}),
        ("lora", ["--adapter", "only"], {"adapter.gguf"}),
        ("blora", ["--allow-error", "--unadapted", "float16"], {"model.gguf", "adapter.gguf", "config.json"}),
    ],
)
def test_a_run_becomes_files_and_a_card(
    method: str,
    options: list[str],
    files: set[str],
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "out"
    capsys.readouterr()
    assert (
        main(["export", str(runs[method]), "--format", "gguf", *options, "--output-dir", str(target), "--json"]) == 0
    )
    measured = json.loads(capsys.readouterr().out)
    said = {"README.md", "export.json", "run.json", "digests.json"}
    said |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in target.iterdir()} == files | said
    for path in target.iterdir():  # nothing says where they were made
        content = path.read_bytes()
        assert str(runs[method].parent).encode() not in content and b"/tmp/" not in content
    assert measured["file_bytes"] == sum((target / name).stat().st_size for name in files if name.endswith(".gguf"))
    assert measured["rows"] > 20 and measured["loss_before"] > 0
    base = str(runs[method].parent / "base") if "config.json" not in files else None
    own = bayeslora.load(target, base).generate(["Hello"], max_new_tokens=8)[0]
    if method == "lora":
        assert own.text == bayeslora.load(runs[method]).generate(["Hello"], max_new_tokens=8)[0].text
        assert measured["changed"] < 0.01 and measured["divergence"] < 1e-5
    else:
        assert measured["types"] and measured["left_out"].startswith("activations")


def test_options_of_gguf_need_it(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(runs["lora"]), "--output-dir", str(tmp_path / "out")]
    assert main([*command, "--format", "lora", "--adapter", "only"]) == 2
    assert "--adapter is given with --format lora, but needs --format gguf" in capsys.readouterr().err
    assert main([*command, "--format", "gguf", "--adapter", "inside"]) == 2
    assert "must be one of beside, merged, only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("method", "options"), [("lora", ["--adapter", "only"]), ("blora", ["--allow-error"])])
def test_verify_reads_the_files(
    method: str, options: list[str], runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(runs[method]), "--format", "gguf", *options, "--output-dir", str(tmp_path / "out")]
    assert main([*command, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    against = ["verify", str(tmp_path / "out"), "--against", str(runs[method]), "--json"]
    assert main(against) == 0
    found = json.loads(capsys.readouterr().out)
    # The rows that scored the run are others than those of the export, but as long and about the same things.
    assert found["format"] == "gguf" and found["metric"] == "nll" and found["answers"] > 3 * found["rows"]
    assert found["score_before"] == pytest.approx(measured["loss_before"], rel=0.2)
    assert found["divergence"] <= 2 * max(measured["divergence"], 1e-4)
    assert main([*against, "--max-divergence", "0", "--limit", "2"]) == 1
    assert json.loads(capsys.readouterr().out)["rows"] == 2


def test_a_run_becomes_weights_in_torchaos_layout(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao")
    target = tmp_path / "out"
    command = ["export", str(runs["blora"]), "--format", "torchao", "--allow-error", "--output-dir", str(target)]
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["left_out"].startswith("activations") and measured["loss_before"] > 0
    for path in (path for path in target.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert str(runs["blora"].parent).encode() not in content and b"/tmp/" not in content, path
    assert main(["verify", str(target), "--against", str(runs["blora"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "torchao" and found["divergence"] <= 2 * max(measured["divergence"], 1e-4)
    own, of_run = (bayeslora.load(each).generate(["Hello"], max_new_tokens=4)[0] for each in (target, runs["blora"]))
    assert own.log_probability == pytest.approx(of_run.log_probability, rel=0.05)
    config = target / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 17}))
    with pytest.raises(BayesLoraError, match="adapter/adapter_config.json is not the file that was saved here"):
        bayeslora.load(target)
    assert main(["export", str(runs["lora"]), "--format", "torchao", "--output-dir", str(tmp_path / "no")]) == 2
    assert "this format needs one: other programs read an adapter of PEFT as it is" in capsys.readouterr().err
