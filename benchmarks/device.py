"""Everything that an accelerator changes: each method trained, timed against PEFT's LoRA, sampled, exported, moved.

    python benchmarks/device.py --output benchmarks/results/device.json     # on a machine with a GPU, under 6 minutes
    python benchmarks/device.py --cpu --tiny                                # the same code in about a minute on a CPU

Models are random Llamas made from a config, so nothing is downloaded. Needs torch, transformers, peft, accelerate,
safetensors, numpy and the source of bayeslora, which need not be installed. The sections, each with its own checks:

    quantizer       codes, values and gradients equal the CPU's; time against a copy
    noise           seeded numbers equal the CPU's; time against torch.randn
    kernels         the integer kernels that run on the device, and products of integers in shapes of a model
    train METHOD    the loss falls; an adapter that is saved and loaded again gives equal logits
    step            time and peak memory of a training step against LoRA's, and its synchronisations (CUDA)
    predict METHOD  ten draws: time against one pass, repeatable, equal on the CPU
    generate        tokens a second against plain `generate`
    recompute, mixed    gradient checkpointing under the same noise; bfloat16, and float16 with a scaler (CUDA)
    export FORMAT   LoRA, merged, packed and integer, each loaded again
    move METHOD     to the CPU and back, merged and unmerged

A fault in one section is a failed check with its place, and the others go on. After `--budget` seconds the sections
left are listed as skipped. Times are taken in rounds that run every variant in turn: medians over rounds, and medians
of the ratio round by round. The exit status is 1 if a check failed or a section was skipped.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import peft
import torch
import transformers
from device_runs import (
    METHODS,
    TARGETS,
    TINY,
    VARIANTS,
    Bench,
    Report,
    Run,
    Size,
    midway,
    release,
    synchronisations,
    times,
)
from measuring import print_result, processor
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import bayeslora
from bayeslora.posterior.noise import key_of, seeded_normal, seeded_signs, seeded_uniform
from bayeslora.quantization import WIDTHS, codes, mixture_weights, optimal_range, quantize, quantize_mixture
from bayeslora.runtime import integer_kernels


@torch.no_grad()
def logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of two rows in evaluation mode, in float32 on the CPU."""
    device = next(model.parameters()).device
    return model.eval()(**{name: value[:2].to(device) for name, value in inputs.items()}).logits.float().cpu()


def gap(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9))


def quantizer(bench: Bench) -> None:
    side, cpu = bench.size.side, torch.device("cpu")
    gates = torch.tensor([0.9, 0.7, 0.4, 0.2])
    for rows, columns in ((64, 48), (257, 129), (side, side // 4)):
        torch.manual_seed(rows)
        x, grad = torch.randn(rows, columns), torch.randn(rows, columns)
        for ranges, bound in (("one range", torch.tensor(2.3)), ("row ranges", 1.5 + torch.rand(rows, 1))):
            found: dict[str, list[Tensor]] = {}
            for device in (cpu, bench.device):
                leaves = [each.detach().to(device).requires_grad_() for each in (x, bound, gates)]
                mixed = quantize_mixture(leaves[0], leaves[1], mixture_weights(leaves[2]), WIDTHS)
                gradients = torch.autograd.grad(mixed, leaves, grad.to(device))
                integers = [codes(leaves[0], leaves[1], bits) for bits in WIDTHS[:-1]]
                found[str(device)] = [each.detach().cpu() for each in (torch.stack(integers), mixed, *gradients)]
            pairs = list(zip(found[str(bench.device)], found["cpu"], strict=True))
            other_codes = float((pairs[0][0] != pairs[0][1]).float().mean())
            other_values = float(((pairs[1][0] - pairs[1][1]).abs() > 1e-5).float().mean())
            errors = dict(zip(("x", "range", "gates"), (gap(*pair) for pair in pairs[2:]), strict=True))
            holds = max(other_codes, other_values) <= 1e-5 and errors["x"] < 1e-5 and max(errors.values()) < 2e-3
            facts = {"other_codes": other_codes, "other_values": other_values, "gradient_errors": errors}
            bench.report.check(f"quantizer {rows}x{columns}, {ranges}: equals the CPU's", holds, **facts)
        apart = [gap(optimal_range(x.to(bench.device), 4, dim=d).cpu(), optimal_range(x, 4, dim=d)) for d in (None, 1)]
        bench.report.check(f"ranges of {rows}x{columns}: equal the CPU's", max(apart) < 1e-3, differences=apart)
    x = torch.randn(side, side, device=bench.device, requires_grad=True)
    grad, bound = torch.randn_like(x), torch.tensor(2.3, device=bench.device, requires_grad=True)
    weights = mixture_weights(gates.to(bench.device)).requires_grad_()
    timed: dict[str, Callable[[], object]] = {
        "copy": lambda: x.detach().clone(),
        "one width": lambda: quantize(x, bound, 4).backward(grad),
        "all widths": lambda: quantize_mixture(x, bound, weights, WIDTHS).backward(grad),
    }
    figures: dict[str, Any] = {"side": side, "forward_and_backward": times(bench, timed, "copy")}
    if bench.cuda:
        figures["peak_over_input"] = {name: bench.peak(run) / (4 * x.numel()) for name, run in timed.items()}
    bench.report.figures["quantizer"] = figures


def noise(bench: Bench) -> None:
    cpu, own = torch.device("cpu"), bench.device
    for name, draw in (("normal", seeded_normal), ("uniform", seeded_uniform), ("signs", seeded_signs)):
        found, expected = (draw(key_of("device"), range(5), 40_001, device).cpu() for device in (own, cpu))
        apart = float((found - expected).abs().max())
        # Hashes are integers, and equal; logarithms, sines and cosines may differ in their last bits.
        bench.report.check(
            f"{name} numbers equal the CPU's", apart < (1e-5 if name == "normal" else 1e-12), apart=apart
        )
    count = bench.size.side**2
    timed: dict[str, Callable[[], object]] = {
        "torch.randn": lambda: torch.randn(count, device=own),
        "ours": lambda: seeded_normal(7, range(1), count, own),
        "on the CPU, copied": lambda: torch.randn(count).to(own),
    }
    bench.report.figures["noise"] = {"numbers": count, "time": times(bench, timed, "torch.randn")}


def kernels(bench: Bench) -> None:
    names = ("has_few_rows_kernel", "has_prepacked_kernel", "has_integer_kernel", "has_weight_kernel")
    usable = {name: getattr(integer_kernels, name)(bench.device.type) for name in names}
    hidden, inner = bench.size.hidden, bench.size.inner
    shapes = [(rows, hidden, inner) for rows in (1, 4, 16, 17, 32, 33, 256)]
    shapes += [(33, inner, hidden), (33, hidden, 8), (33, 8, hidden), (33, hidden, inner + 3), (33, hidden - 4, inner)]
    products = {"int_mm": lambda x, weight: torch._int_mm(x, weight.T), "ours": integer_kernels.integer_product}
    found: dict[str, dict[str, str]] = {}
    for rows, width, height in shapes:
        x, weight = (torch.randint(-127, 128, (n, width), device=bench.device).to(torch.int8) for n in (rows, height))
        exact = x.double() @ weight.double().T
        own = found.setdefault(f"{rows}x{width}x{height}", {})
        for name, product in products.items():
            try:
                own[name] = "exact" if torch.equal(product(x, weight).double(), exact) else "wrong"
            except RuntimeError as error:
                own[name] = str(error).splitlines()[0][:120]
    bench.report.figures["kernels"] = {"usable": usable, "products": found}
    wrong = [shape for shape, own in found.items() if own["int_mm"] == "wrong"]
    bench.report.check("torch._int_mm is exact or refuses", not wrong, wrong=wrong)
    inexact = {shape: own["ours"] for shape, own in found.items() if own["ours"] != "exact"}
    # A device without the kernel takes the plain product instead.
    holds = not inexact or not usable["has_integer_kernel"]
    bench.report.check("integer_product is exact in all shapes", holds, others=inexact)


def train(bench: Bench, method: str) -> None:
    data, steps = bench.batches(), bench.size.steps
    begin = time.perf_counter()
    run = Run(bench, method, steps)
    losses = torch.stack([run.step(data[number % len(data)]) for number in range(steps)]).tolist()
    first, last = statistics.mean(losses[: len(data)]), statistics.mean(losses[-len(data) :])
    finite = all(map(math.isfinite, losses)) and all(bool(p.isfinite().all()) for p in run.model.parameters())
    seconds = time.perf_counter() - begin
    bench.report.check(f"{method}: loss falls", finite and last < first, first=first, last=last, seconds=seconds)
    tensors = (*run.model.parameters(), *run.model.buffers())
    strays = {tensor.device.type for tensor in tensors} - {bench.device.type}
    bench.report.check(f"{method}: all tensors are on the device", not strays, others=sorted(strays))
    expected = logits(run.model, bench.inputs())
    run.model.save_pretrained(bench.folder / method)
    if isinstance(run.optimizer, bayeslora.IVON):
        bayeslora.save_posterior(run.model, run.optimizer, bench.folder / method)
    loaded = PeftModel.from_pretrained(bench.base(), bench.folder / method)
    off = gap(logits(loaded, bench.inputs()), expected)
    bench.report.check(f"{method}: loaded equals saved", off <= 1e-3, difference=off)
    bench.trained[method] = run


def step(bench: Bench) -> None:
    batch = bench.batches(1)[0]
    runs: dict[str, Run] = {}
    for variant in VARIANTS:
        bench.report.attempt(f"{variant}, started", lambda v=variant: runs.update({v: midway(bench, v)}))
    figures = times(bench, {name: functools.partial(run.step, batch) for name, run in runs.items()}, "lora")
    for variant, own in figures.items():
        if variant in TARGETS:
            own |= {"target": TARGETS[variant], "within_target": own["ratio"] <= TARGETS[variant]}
        if bench.cuda:
            own["peak_bytes"] = bench.peak(lambda v=variant: runs[v].step(batch))
            own["peak_ratio"] = own["peak_bytes"] / figures["lora"]["peak_bytes"] if "lora" in figures else None
            with synchronisations() as places:
                runs[variant].step(batch)
            own["synchronisations"] = places.total()
            own["synchronisation_places"] = dict(places.most_common(8))
    bench.report.figures["step"] = figures


def last_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Sixteen classes for `predict`: the first tokens of the vocabulary, after the last position."""
    return model(**inputs).logits[:, -1, :16]


def predict(bench: Bench, method: str) -> None:
    run, inputs = bench.trained[method], bench.inputs()
    model: Any = run.model
    if isinstance(run.optimizer, bayeslora.IVON):
        model = bayeslora.load_posterior(run.model, bench.folder / method)
    ask = functools.partial(bayeslora.predict, model, inputs, logits=last_logits)
    first, again, other = (ask(10, seed=seed) for seed in (3, 3, 4))
    repeated, moved = (float((each.probabilities - first.probabilities).abs().max()) for each in (again, other))
    sums = float((first.probabilities.sum(1) - 1).abs().max())
    holds = repeated < 1e-4 < moved and sums < 1e-5 and bool((first.mutual_information >= 0).all())
    facts = {"same_seed": repeated, "other_seed": moved, "information": float(first.mutual_information.mean())}
    bench.report.check(f"{method}: ten draws, repeatable", holds, **facts)
    timed = times(bench, {"one pass": functools.partial(ask, 0), "ten draws": functools.partial(ask, 10)}, "one pass")
    bench.report.figures.setdefault("predict", {})[method] = timed
    found = []
    for device in (bench.device, torch.device("cpu")):
        model = PeftModel.from_pretrained(bench.base(torch.float32, device), bench.folder / method)
        if isinstance(run.optimizer, bayeslora.IVON):
            model = bayeslora.load_posterior(model, bench.folder / method)
        few = {name: value[:2, :16].to(device) for name, value in inputs.items()}
        found.append(bayeslora.predict(model, few, 4, seed=3, logits=last_logits).probabilities)
    off = float((found[0] - found[1]).abs().max())
    bench.report.check(f"{method}: a seed means the same draws on the CPU", off < 2e-3, difference=off)


def generate(bench: Bench) -> None:
    model, count, samples = bench.trained["melora"].model.eval(), bench.size.tokens, 3
    prompts = bench.inputs()["input_ids"][:2, :8]
    options: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    mask = torch.ones_like(prompts)
    ask = functools.partial(bayeslora.generate, model, prompts, mask, samples=samples, **options)
    first, again = ask(), ask()
    same, finite = torch.equal(first.sequences, again.sequences), bool(first.log_probability.isfinite().all())
    bench.report.check("generate: three draws, repeatable", same and finite, shape=list(first.sequences.shape))

    def generate_plainly() -> None:
        with torch.inference_mode():
            model.generate(input_ids=prompts, attention_mask=mask, **options)

    functions: dict[str, Callable[[], object]] = {
        "plain": generate_plainly,
        "draws": functools.partial(ask, uncertainty=False),
        "draws, scored": ask,
    }
    found = times(bench, functions, "plain")
    for name, own in found.items():
        written = len(prompts) * count * (1 if name == "plain" else samples)
        own["tokens_a_second"] = 1e3 * written / own["ms"]
    bench.report.figures["generate"] = found


def recompute(bench: Bench, variant: str) -> None:
    """Gradients with and without gradient checkpointing are the same, noise included."""
    run, batch = midway(bench, variant, torch.float32), bench.batches(1)[0]
    assert run.loop is not None
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, False, True):
        if checkpointing:
            run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            run.model.enable_input_require_grads()
        torch.manual_seed(2)
        run.loop.step_begin()
        run.model(**batch).loss.backward()
        found.append({name: p.grad for name, p in run.model.named_parameters() if p.grad is not None})
        run.optimizer.zero_grad()
    plainly, again, recomputed = found
    worst, repeated = (max(gap(each[n], plainly[n]) for n in plainly) for each in (recomputed, again))
    holds = plainly.keys() == recomputed.keys() and worst < 1e-2
    bench.report.check(f"{variant}: checkpointing sees the same noise", holds, worst=worst, without=repeated)


def mixed(bench: Bench, variant: str, dtype: torch.dtype) -> None:
    """Steps under autocast on a float32 model, for float16 with a scaler."""
    run, batch = midway(bench, variant, torch.float32), bench.batches(1)[0]
    assert run.loop is not None
    scaler = torch.amp.GradScaler(bench.device.type, init_scale=1024.0, enabled=dtype == torch.float16)
    losses, skipped = [], 0
    for _ in range(4):
        run.loop.step_begin()
        with torch.autocast(bench.device.type, dtype):
            loss = run.model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(run.optimizer)
        run.loop.before_optimizer_step()
        before = scaler.get_scale()
        scaler.step(run.optimizer)
        scaler.update()
        if scaler.get_scale() < before:
            run.loop.restore()
            skipped += 1
        else:
            run.loop.step_end()
        run.optimizer.zero_grad()
        losses.append(float(loss.detach()))
    holds = all(map(math.isfinite, losses)) and skipped < len(losses)
    bench.report.check(f"{variant}: autocast {str(dtype)[6:]}", holds, losses=losses, skipped=skipped)


def export(bench: Bench, form: str, method: str, limit: float) -> None:
    """Export as `form`, load it as others do, and compare the logits."""
    model, folder, inputs = bench.trained[method].model.eval(), bench.folder / f"{method}-{form}", bench.inputs()
    options = {} if form == "packed" else {"allow_error": method == "blora" or form == "merged"}
    bayeslora.export(model, folder, form, batch=inputs, **options)
    if form == "merged":
        loaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(bench.device)
    else:
        loaded = PeftModel.from_pretrained(bench.base(), folder)
    off = gap(logits(loaded, inputs), logits(model, inputs))
    bench.report.check(f"{method}: exported as {form}, loaded", off <= limit, difference=off, limit=limit)


def export_integer(bench: Bench) -> None:
    """The integer model of a float32 run, so that only kernels and the type between layers differ."""
    run, data, inputs = Run(bench, "blora", bench.size.steps, torch.float32), bench.batches(), bench.inputs()
    for number in range(bench.size.steps):
        run.step(data[number % len(data)])
    expected = logits(run.model, inputs)
    bayeslora.export(run.model, bench.folder / "integer", "integer", batch=inputs, unadapted="float32")
    figures: dict[str, Any] = {}
    for dtype, limit in ((torch.float32, 0.05), (torch.bfloat16, 0.5)):
        name = str(dtype)[6:]
        loaded, on_cpu = (bayeslora.load_integer(bench.folder / "integer", d, dtype) for d in (bench.device, "cpu"))
        found = logits(loaded, inputs)
        off, from_cpu = gap(found, expected), gap(found, logits(on_cpu, inputs))
        facts = {"from_adapter": off, "from_cpu": from_cpu, "limit": limit}
        bench.report.check(f"integer model, {name}: equals the CPU's", max(off, from_cpu) <= limit, **facts)
        for work, length in (("prefill", bench.size.length), ("one token", 1)):
            ids = inputs["input_ids"][:1, :length]
            forward = {
                "adapter": torch.inference_mode()(functools.partial(run.model, input_ids=ids)),
                "integer": torch.inference_mode()(functools.partial(loaded, input_ids=ids)),
            }
            figures[f"{name}, {work}"] = times(bench, forward, "adapter")
    bench.report.figures["integer"] = figures


def move(bench: Bench, method: str) -> None:
    model, inputs, facts = bench.trained[method].model, bench.inputs(), {}
    expected = logits(model, inputs)
    model.cpu()
    facts["on_cpu"] = gap(logits(model, inputs), expected)
    model.to(bench.device)
    facts["back"] = gap(logits(model, inputs), expected)
    holds = facts["on_cpu"] <= 0.1 and facts["back"] <= 1e-3
    if method != "blora":  # whose quantized activations cannot be merged
        model.merge_adapter()
        facts["merged"] = gap(logits(model, inputs), expected)
        model.unmerge_adapter()
        facts["unmerged"] = gap(logits(model, inputs), expected)
        holds = holds and facts["merged"] <= 0.1 and facts["unmerged"] <= 0.02
    bench.report.check(f"{method}: moves and merges", holds, **facts)


def sections(bench: Bench) -> dict[str, Callable[[], None]]:
    bind = functools.partial
    firsts: dict[str, Callable[[Bench], None]] = {"quantizer": quantizer, "noise": noise, "kernels": kernels}
    found: dict[str, Callable[[], None]] = {name: bind(section, bench) for name, section in firsts.items()}
    found |= {f"train {method}": bind(train, bench, method) for method in METHODS}
    found["step"] = bind(step, bench)
    for method in ("melora", "blob", "lora_ivon", "bayes_adalora_ivon"):
        found[f"predict {method}"] = bind(predict, bench, method)
    found["generate"] = bind(generate, bench)
    for variant in ("blora-learning", "melora", "blob", "dylora"):
        found[f"recompute {variant}"] = bind(recompute, bench, variant)
    for dtype in (torch.bfloat16, torch.float16) if bench.cuda else (torch.bfloat16,):
        for variant in ("blora-learning", "melora", "bayes_adalora_ivon"):
            found[f"mixed {variant} {str(dtype)[6:]}"] = bind(mixed, bench, variant, dtype)
    # Plain LoRA lacks B-LoRA's quantized activations, and weights in bfloat16 round what is merged into them.
    for method in ("melora", "blob", "dylora", "bayes_adalora", "blora"):
        found[f"export lora {method}"] = bind(export, bench, "lora", method, 0.5 if method == "blora" else 0.05)
    for method in ("lora", "melora", "dylora"):
        found[f"export merged {method}"] = bind(export, bench, "merged", method, 0.1)
    found["export packed"] = bind(export, bench, "packed", "blora", 0.02)
    found["export integer"] = bind(export_integer, bench)
    found |= {f"move {method}": bind(move, bench, method) for method in METHODS}
    return found


def machine(device: torch.device) -> dict[str, Any]:
    packages = (torch, transformers, peft, numpy, bayeslora)
    found = {
        "device": "cpu",
        **processor(),
        "versions": {"python": platform.python_version(), **{p.__name__: p.__version__ for p in packages}},
        "missing": [name for name in ("triton", "jinja2", "datasets") if importlib.util.find_spec(name) is None],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["capability"] = [properties.major, properties.minor]
        found["memory_bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
    return found


def leave_out_cards() -> None:
    """PEFT writes a card next to each adapter, for which alone it needs jinja2."""
    if importlib.util.find_spec("jinja2") is None:
        PeftModel.create_or_update_model_card = lambda self, output_dir: None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, to check this script")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, few rounds")
    parser.add_argument("--budget", type=float, default=330.0, help="seconds after which sections are skipped")
    parser.add_argument("--output", type=Path, help="JSON file for the report")
    given = parser.parse_args()
    if not given.cpu and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: run it where there is one, or give --cpu --tiny")
    device, report = torch.device("cpu" if given.cpu else "cuda"), Report(given.budget)
    report.figures["machine"] = machine(device)
    leave_out_cards()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # Transformers of its own names
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, TINY if given.tiny else Size(), report, Path(folder))
        report.figures["size"] = vars(bench.size)
        report.section("base", bench.write_base)
        for name, run in sections(bench).items():
            report.section(name, run)
            release(bench)
    result = report.result()
    print_result(result, given.output)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
