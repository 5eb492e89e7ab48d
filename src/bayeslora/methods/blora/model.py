r"""B-LoRA: ranks and bit-widths learned by Bayesian gates during fine-tuning (Bayesian-LoRA, Algorithm 1).

$$ y = Q_{out}\bigl( Q_w(W_0) x + b + s\, Q_b(B)\, Q_E\bigl( (Q_e(E) \circ G) \circ Q_A(Q_a(A) x) \bigr) \bigr) $$

with $s = \alpha / r$, which the paper's algorithm leaves out together with the bias and dropout. $E$ (r,) is the
diagonal of an SVD-like form, $G$ its rank gates, and every $Q$ a quantizer with its own range and gates. The
loss is the mean negative log-likelihood plus $\lambda_q \sum_k R_k + \lambda_r \sum_k R^{rank}_k$ (Equation 15, whose
sign is that of a log-likelihood to be maximised). That is an expected-L0 penalty, not the divergence of the stated
prior, which at the paper's $\lambda = 1$ would be smallest at an open probability of 1/e.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from bayeslora.errors import BayesLoraError
from bayeslora.methods.allocation import CostModel
from bayeslora.methods.blora.components import Watch, as_if_drawn, deal
from bayeslora.methods.blora.config import BLoraConfig
from bayeslora.methods.blora.decisions import MEMORY, Schedule, apply, check_reachable, choose, pooled, record
from bayeslora.methods.blora.gated_quantizers import Phase
from bayeslora.methods.blora.layer import BLoraLayer, Linear
from bayeslora.methods.blora.length import phases, shortfall
from bayeslora.methods.blora.probe import Probe, logits_of, loss_of, score_seed
from bayeslora.methods.blora.rotation import rotate
from bayeslora.methods.layer import evaluation_mode
from bayeslora.methods.tuner import (
    BayesTuner,
    ParameterRole,
    RowLoss,
    RunState,
    TrainingSetup,
    batch_rows,
    mean_ranks,
)
from bayeslora.posterior.draws import is_sharded
from bayeslora.posterior.noise import key_of, seeded_uniform
from bayeslora.quantization import (
    GATED_WIDTHS,
    OPEN_LOGIT,
    nested_probability,
    open_probability,
    rank_probability,
)
from bayeslora.vocabulary import BASE_WEIGHT


class Batch(NamedTuple):
    """A pass to gather evidence on: the model's output, the tensors that tell rows apart, and the number of rows."""

    output: Callable[[nn.Module], Any]
    inputs: Mapping[str, Any]
    rows: int


@dataclass(kw_only=True)
class BLoraRun(RunState):
    """Phases of a run, as steps counted from 0.

    Attributes:
        setup: the facts that the run has begun with.
        rotated_after: number of steps after which the factors are rotated, near the end of the warm-up.
        warm_up_end: first step in which gates learn.
        frozen_from: first step in which they are frozen.
        schedule: decisions by evidence; None for the paper's gates.
        costs: what bit operations, bytes and ranks cost, by currency.
        found: evidence of the current step, by layer.
        rows: rows of the current step that evidence was gathered from, on this rank.
        watches: what gathers the components' evidence in the current step, by layer.
        terms: terms of the current step's loss, on this rank, where it is watched.
        batches: micro-batches of the current step that a sharded model is still to be measured on.
        watched_step: the current step.
        is_checked: whether a training pass has returned what evidence comes from.
        warning: what was said about the run's length.
    """

    setup: TrainingSetup
    rotated_after: int
    warm_up_end: int
    frozen_from: int
    schedule: Schedule | None = None
    costs: dict[str, CostModel] = field(default_factory=dict)
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rows: int = 0
    watches: dict[str, Watch] = field(default_factory=dict)
    terms: float = 0.0
    batches: list[Batch] = field(default_factory=list)
    watched_step: int = 0
    is_checked: bool = False
    warning: str | None = None


class BLoraModel(BayesTuner):
    """B-LoRA over a whole model: its penalty, its phases and its budget."""

    title = "B-LoRA"
    without_a_run = "no rank closes and no width narrows"
    prefix = "blora_"
    tuner_layer_cls = BLoraLayer
    linear_class = Linear
    needs_whole_factors = True
    _measured_step: int | None = None
    """The current step if evidence is gathered in it."""
    _hooked = False
    _outer_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    """Arguments of the call of a sharded model that is under way."""
    _outer_hooks: Sequence[RemovableHandle] = ()

    def config_of(self, name: str) -> BLoraConfig:
        return cast(BLoraConfig, self.peft_config[name])

    @property
    def penalty_names(self) -> tuple[str, ...]:
        config = self.config_of(self.training_adapter())
        if config.gates == "evidence":
            return ()
        return ("bits",) * config.learns_bits + ("rank",) * config.learns_ranks

    def penalty(self) -> dict[str, Tensor]:
        r"""$\lambda_q \sum_k R_k$ (`bits`) and $\lambda_r \sum_k R^{rank}_k$ (`rank`), while gates learn."""
        terms: dict[str, Tensor] = {}
        name = self.training_adapter()
        config = self.config_of(name)
        if config.gates == "paper" and (layers := self._learning(name)):
            if config.learns_bits:
                terms["bits"] = self._bit_penalty(name, layers)
            if config.learns_ranks:
                logits = _stacked([layer.rank_gates(name).all_logits for layer in layers])
                expected = torch.stack([rank_probability(rows).sum() for rows in logits]).sum()
                terms["rank"] = config.rank_penalty * expected
        return terms

    def _bit_penalty(self, name: str, layers: list[BLoraLayer]) -> Tensor:
        config = self.config_of(name)
        gates = torch.cat([layer.quantizers(name).gate_logits for layer in layers])
        terms = nested_probability(gates)
        if config.bit_weighting != "const":
            terms = terms * torch.tensor(GATED_WIDTHS, dtype=terms.dtype, device=terms.device)
        if config.bit_weighting == "bops":
            macs = torch.tensor([m for layer in layers for m in _quantizer_macs(layer, name)], device=terms.device)
            terms = terms * (macs / macs.max()).unsqueeze(1)
        return config.bit_penalty * terms.sum()

    def _learning(self, name: str) -> list[BLoraLayer]:
        return [layer for layer in self.adapted_layers(name) if layer.progress(name).current == Phase.LEARN]

    def role_of(self, parameter_name: str) -> ParameterRole:
        if ".blora_rank." in parameter_name:
            return "rank gates"
        if ".blora_quantizers." not in parameter_name:
            return "weights"
        if parameter_name.endswith(".gates"):
            return "bit gates"
        return "weight ranges" if parameter_name.endswith(".log_weight_range") else "ranges"

    def begin(self, setup: TrainingSetup) -> None:
        """Fit the phases into `setup.total_steps` and check that the gates can close; raises `BayesLoraError`."""
        name = self.training_adapter()
        config = self.config_of(name)
        warm_up_end, frozen_from = phases(config, setup.total_steps)
        steps = frozen_from - warm_up_end
        if steps < 2:
            raise BayesLoraError(
                f"{setup.total_steps} training steps leave {max(steps, 0)} for the gates of B-LoRA: "
                "train longer, or lower warmup_fraction and freeze_fraction"
            )
        # Ranks alone need no observed ranges: rotated as late as can be, training is LoRA's until then.
        observed = 0 if config.closes_ranks_alone else max(1, warm_up_end // OBSERVED_SHARE)
        run = BLoraRun(
            setup=setup,
            rotated_after=max(1, warm_up_end - observed),
            warm_up_end=warm_up_end,
            frozen_from=frozen_from,
        )
        self._run = run
        if config.learns_bits:
            self.learning_rates["ranges"] = config.range_learning_rate
            # By evidence a base weight keeps the best range for its width.
            if config.gates == "paper" and any(layer.has_plain_weight for layer in self.adapted_layers(name)):
                self.learning_rates["weight ranges"] = config.range_learning_rate
        if config.gates == "paper":
            self._begin_paper(config, steps)
        else:
            self._begin_evidence(config, setup)
        for layer in self.adapted_layers(name):
            layer.training_adapters.add(name)

    def _begin_paper(self, config: BLoraConfig, steps: int) -> None:
        if config.learns_bits:
            self._set_gate_rate("bit gates", steps, max(config.initial_bit_logits) - OPEN_LOGIT)
        if config.learns_ranks:
            # The last rank closes when the product of all gates falls to a half, the second only at a logit of 0.
            self._set_gate_rate("rank gates", steps, config.initial_rank_logit)
            if config.r > 1 and _all_open(config.initial_rank_logit, config.r) <= 0.5:
                raise BayesLoraError(
                    f"initial_rank_logit {config.initial_rank_logit} starts r = {config.r} with ranks already closed: "
                    "raise it"
                )

    def _begin_evidence(self, config: BLoraConfig, setup: TrainingSetup) -> None:
        run = self.run_state()
        run.schedule = Schedule.of(run.warm_up_end, run.frozen_from, setup.total_steps, learns_bits=config.learns_bits)
        if setup.cost_of is None:
            raise BayesLoraError(
                "TrainingSetup lacks cost_of, but gates='evidence' weigh the loss against a cost: train with "
                "BayesLoop or attach"
            )
        run.costs["rank"] = setup.cost_of("rank", None)
        if config.learns_bits:
            currency, target = config.currency
            cost = run.costs[currency] = setup.cost_of(currency, config.bops_scope)
            if target is not None:
                name = self.training_adapter()
                check_reachable(self.named_layers(name), name, config, cost, target)
        if (bits := (config.fixed_bits or {}).get(BASE_WEIGHT)) is not None:
            for layer in self.adapted_layers(self.training_adapter()):
                layer.give_weight_its_width(self.training_adapter(), bits)
        self._warn_if_short(setup.rows)
        if not self._hooked:
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            self.model.register_forward_hook(self._after_forward, with_kwargs=True)
            self._hooked = True
        for hook in self._outer_hooks:
            hook.remove()
        self._outer_hooks = ()
        if setup.model is not None and (is_sharded(setup.model) or self._is_part_of(setup.model)):
            self._outer_hooks = [
                setup.model.register_forward_pre_hook(self._before_outer_call, with_kwargs=True),
                setup.model.register_forward_hook(self._check_output),
            ]

    def _is_part_of(self, model: nn.Module) -> bool:
        """Return True if `model` has the adapted model as a part, beside others such as a head of its own."""
        path = next((name for name, module in model.named_modules() if module is self), "")
        return bool({*path.split(".")} - {"", "module", "_orig_mod", "base_model"})

    def _warn_if_short(self, rows: float | None) -> None:
        """Warn if the run is too short for good choices; of unknown rows nothing is said until they are counted."""
        run, config = self.run_state(), self.config_of(self.training_adapter())
        sentence = shortfall(config, run.setup.total_steps, rows)
        if sentence is not None and sentence != run.warning and not self.is_final:
            warnings.warn(sentence, stacklevel=2)
        run.warning = sentence

    def run_state(self) -> BLoraRun:
        return cast(BLoraRun, super().run_state())

    def _set_gate_rate(self, role: ParameterRole, steps: int, travel: float) -> None:
        """Gates move by about one rate a step at most (Adam normalises the penalty): it decides if they close."""
        chosen = self.config_of(self.training_adapter()).gate_learning_rate
        if chosen is not None and chosen * steps < travel:
            raise BayesLoraError(
                f"{role} cannot close: {steps} steps at gate_learning_rate {chosen} move a logit by about "
                f"{chosen * steps:.2g} and {travel:.2g} is needed; use {travel / steps:.1e} or more, or leave it unset"
            )
        self.learning_rates[role] = chosen if chosen is not None else GATE_TRAVEL * travel / steps

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Gather evidence on a batch that is about to be trained on, in the steps that the schedule names."""
        if not self.training or not torch.is_grad_enabled():
            return
        self._watch(args, kwargs)
        if self._measured_step is None:
            return
        outer, self._outer_call = self._outer_call, None
        call = outer or (args, kwargs)
        output = functools.partial(_called, *call) if self.row_loss is None else self.row_loss.logits
        batch = Batch(output, self._told_apart_by(args, kwargs), batch_rows(args, kwargs))
        if outer is None:
            self._measure(self.model, batch, self._measured_step)
        else:  # FSDP allows no pass inside a pass: `observe` makes up for it
            self.run_state().batches.append(batch)

    def _before_outer_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._outer_call = (args, kwargs)

    def _watch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = self.run_state()
        if not run.watches:
            return
        rows = batch_rows(args, kwargs)
        run.terms += float(self.terms_in(kwargs, rows).sum())
        dealt = deal(self._told_apart_by(args, kwargs), rows, run.watched_step)
        for watch in run.watches.values():
            watch.dealt = dealt

    def _told_apart_by(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
        """Return the tensors whose rows decide the draws of each."""
        if self.row_loss is not None:
            return self.row_loss.inputs
        labels = {} if self.kept_labels is None else {"labels": self.labels_in(kwargs)}
        return {**kwargs, **labels, **{str(place): value for place, value in enumerate(args)}}

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.row_loss is None:  # otherwise its logits are still to come
            if not self._outer_hooks:
                self._check_output(model, args, output)
            problem = getattr(getattr(model, "config", None), "problem_type", None)
            self._scale_rows(logits_of(output), self.labels_in(kwargs), problem)

    def _check_output(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Raise in the first training pass, and not when evidence is due, if the model shows none."""
        run = cast(BLoraRun, self._run)
        if run is None or run.schedule is None or run.is_checked or not (self.training and torch.is_grad_enabled()):
            return
        run.is_checked = True
        if logits_of(output) is None:
            loss_of(output)

    def row_logits(self, model: nn.Module, loss: RowLoss) -> Tensor:
        logits = super().row_logits(model, loss)
        if self._run is not None:
            self._scale_rows(logits, loss.labels, None)
        return logits

    def _scale_rows(self, logits: Tensor | None, labels: Any, problem: str | None) -> None:
        """Scale the rows' gradients, which are about to come, as if the model had drawn their labels."""
        watch = next(iter(self.run_state().watches.values()), None)
        if not self.training or watch is None or watch.dealt is None:
            return
        signs = watch.dealt.signs
        factors = None if logits is None else as_if_drawn(logits, labels, problem)
        # Of a row whose gradient cannot be scaled nothing is kept: then the passes alone count.
        signs.mul_(factors if factors is not None and len(factors) == len(signs) else 0.0)

    def _measure(self, model: nn.Module, batch: Batch, step: int) -> None:
        """Gather the evidence of one batch in a pass through `model`: the one inside, or all of it."""
        name, run = self.training_adapter(), self.run_state()
        layers, config = self.named_layers(name), self.config_of(name)
        rows, fixed = batch.rows, frozenset(config.fixed_bits or {})
        run.rows += rows
        probes = {}
        for path, layer in layers.items():
            kinds, rank = layer.quantized_kinds(name), len(layer.blora_E[name])
            ranges = functools.partial(layer.weight_range, name)
            probes[path] = layer.probe = Probe(kinds, rank, rows, fixed, config.calibration, ranges)
        try:
            # The tuner is in evaluation mode as well, so that its own hooks leave this pass alone.
            with evaluation_mode(model), evaluation_mode(self), torch.enable_grad():
                logits, seed, terms = score_seed(batch.output(model), batch.inputs, self.model, step)
                used = [probe.anchor for probe in probes.values() if probe.used]
                torch.autograd.grad(logits, used, seed, allow_unused=True)
        finally:
            for layer in layers.values():
                layer.probe = None
        for path, probe in probes.items():
            sums = {**probe.found, "terms": torch.tensor(float(terms))}
            known = run.found.get(path)
            run.found[path] = sums if known is None else {key: known[key] + value for key, value in sums.items()}

    def step_begin(self, step: int, seed: int) -> None:
        """Draw the gates' noise of optimizer step `step`, the same on every rank and for every micro-batch."""
        name, run = self.training_adapter(), self.run_state()
        if run.schedule is not None:
            self._measured_step = step if step in run.schedule.passes and self._learning(name) else None
            run.rows = 0
            self._begin_watching(step)
            return
        layers = self.adapted_layers(name)
        if layers[0].progress(name).current == Phase.WARM_UP:
            spread = math.ceil((run.warm_up_end - run.rotated_after) / OBSERVED_STEPS)
            observes = step == run.warm_up_end - 1 or (step >= run.rotated_after and step % spread == 0)
            for layer in layers:
                layer.collects_ranges = observes
        learning = self._learning(name) if self.config_of(name).learns_bits else []
        if not learning:
            return
        gates = [layer.quantizers(name).gates for layer in learning]
        sizes, key = [each.numel() for each in gates], key_of(f"{seed}/gates/{step}")
        drawn = seeded_uniform(key, range(1), sum(sizes), gates[0].device)[0].split(sizes)
        for layer, each, noise in zip(learning, gates, drawn, strict=True):
            layer.quantizers(name).draw(noise.view(each.shape))

    def _begin_watching(self, step: int) -> None:
        """Watch the components from the rotation to the last decision."""
        name, run = self.training_adapter(), self.run_state()
        assert run.schedule is not None
        run.watches, run.terms, run.watched_step = {}, 0.0, step
        due = self.config_of(name).learns_ranks and run.rotated_after <= step <= run.schedule.decisions[-1]
        for path, layer in self.named_layers(name).items():
            layer.watch = None
            if due and layer.progress(name).current != Phase.FROZEN:
                diagonal = layer.blora_E[name]
                layer.watch = run.watches[path] = Watch(len(diagonal), diagonal.device)

    @torch.no_grad()
    def observe(self, step: int, optimizer: Optimizer, scale: float = 1.0) -> None:
        super().observe(step, optimizer, scale)
        name, run = self.training_adapter(), self.run_state()
        watches, run.watches = run.watches, {}
        batches, run.batches = run.batches, []
        for batch in batches:
            assert run.setup.model is not None
            self._measure(run.setup.model, batch, step)
        if not watches:
            return
        # A rank's loss is the mean of its own terms: times their number it is a sum, as the sketch wants.
        found = pooled(
            [{"sketch": watch.sketch.cpu() * (run.terms / self.backward_scale)} for watch in watches.values()]
        )
        for path, sums in zip(watches, found, strict=True):
            layer = self.named_layers(name)[path]
            layer.watch = None
            if bool(sums["sketch"].isfinite().all()):  # of a step that the loss scale skips it is not
                layer.evidence(name).add_sketch(sums["sketch"])

    def rate_of(self, role: ParameterRole, step: int) -> float | None:
        if role not in self.learning_rates:
            return None
        learning = self.run_state().warm_up_end <= step < self.run_state().frozen_from
        return self.learning_rates[role] if learning else 0.0

    @torch.no_grad()
    def allocate(self, step: int, optimizer: Optimizer) -> None:
        """Rotate the factors near the end of the warm-up; later choose widths and ranks at the scheduled steps."""
        name, run = self.training_adapter(), self.run_state()
        layers, config = self.named_layers(name), self.config_of(name)
        phases = {layer.progress(name).current for layer in layers.values()}
        if step + 1 == run.rotated_after and config.rotate and phases == {Phase.WARM_UP}:
            for layer in layers.values():
                rotate(layer.blora_A[name], layer.blora_E[name], layer.blora_B[name], optimizer)
        if run.schedule is None or phases != {Phase.LEARN}:
            return  # an adapter whose gates are frozen trains on as it is
        self._measured_step = None
        if step in run.schedule.passes:
            found, run.found = run.found, {}
            if not found:
                raise BayesLoraError(
                    f"step {step + 1} has shown no evidence for the gates, but a decision needs it: call the model "
                    "itself in training, not its parts"
                )
            for path, sums in zip(layers, pooled([found[path] for path in layers]), strict=True):
                layers[path].evidence(name).add(sums)
        if step in run.schedule.decisions:
            self._decide(step)

    def _decide(self, step: int) -> None:
        name, run = self.training_adapter(), self.run_state()
        assert run.schedule is not None
        layers, config = self.named_layers(name), self.config_of(name)
        choice = choose(layers, name, config, run.costs, run.schedule.progress(step))
        apply(layers, name, choice)
        if run.setup.rows is None and step == run.schedule.decisions[0]:
            (counted,) = pooled([{"rows": torch.tensor(float(run.rows))}])
            self._warn_if_short(float(counted["rows"]))
        if step == run.schedule.decisions[-1]:
            record(layers, name, choice, run.costs.get(config.currency[0]), run.setup.num_examples)
            for layer in layers.values():
                layer.evidence(name).drop_sketch()
            return
        for layer in layers.values():
            layer.evidence(name).forget(MEMORY)

    def step_end(self, step: int) -> None:
        """Move to the next phase if it begins after optimizer step `step` (from 0)."""
        name = self.training_adapter()
        layers, config = self.adapted_layers(name), self.config_of(name)
        phase = layers[0].progress(name).current
        if phase == Phase.WARM_UP:
            if config.learns_bits and config.gates == "paper":
                # Every step: DDP overwrites other ranks' buffers with the first's.
                _share_observations([layer.quantizers(name).observed for layer in layers])
            if step + 1 >= self.run_state().warm_up_end:
                for layer in layers:
                    layer.start_learning(name)
        elif phase == Phase.LEARN and step + 1 >= self.run_state().frozen_from:
            for layer in layers:
                layer.progress(name).advance(Phase.FROZEN)

    @property
    def is_final(self) -> bool:
        """True if the gates are frozen; during the warm-up, the model has all ranks and full precision."""
        name = self.training_adapter()
        return all(layer.progress(name).current == Phase.FROZEN for layer in self.adapted_layers(name))

    @property
    def final_from(self) -> int:
        return 0 if self.is_final else self.run_state().frozen_from

    def statistics(self) -> dict[str, float]:
        """Return phase, mean widths, open probabilities and mean ranks, to log with the loss."""
        name = self.training_adapter()
        layers, config = self.adapted_layers(name), self.config_of(name)
        values = {"phase": float(layers[0].progress(name).current)}
        described = self.describe(name)
        if config.learns_bits:
            kinds = [kind for kind in described[0].bits]
            by_kind = {kind: sum(d.bits[kind] for d in described) / len(described) for kind in kinds}
            values["mean_bits"] = sum(by_kind.values()) / len(by_kind)
            values.update({f"bits/{kind}": bits for kind, bits in by_kind.items()})
            if config.gates == "paper":
                gates = torch.cat([layer.quantizers(name).gate_logits.detach() for layer in layers])
                means = open_probability(gates).mean(0).tolist()
                values.update({f"gates/{bits}": p for bits, p in zip(GATED_WIDTHS, means, strict=True)})
        values.update(mean_ranks({layer.name: float(layer.rank) for layer in described}))
        return values


GATE_TRAVEL = 2.0
"""Distance that a gate may move in its phase, as a multiple of the distance to closing: it sets the default rate."""

OBSERVED_STEPS = 32
"""Most steps in which activations are observed: a search for the best range costs about a step."""

OBSERVED_SHARE = 4
"""The last quarter of the warm-up comes after the rotation: activations are observed in it."""


def _called(args: tuple[Any, ...], kwargs: dict[str, Any], model: nn.Module) -> Any:
    return model(*args, **kwargs)


def _all_open(logit: float, rank: int) -> float:
    return (1 / (1 + math.exp(-logit))) ** (rank - 1)


def _stacked(logits: Sequence[Tensor]) -> list[Tensor]:
    """Rows of equal length stacked into matrices, so that the penalty is a few operations instead of a few a layer."""
    by_length: dict[int, list[Tensor]] = {}
    for row in logits:
        by_length.setdefault(len(row), []).append(row)
    return [torch.stack(rows) for rows in by_length.values()]


def _quantizer_macs(layer: BLoraLayer, name: str) -> list[float]:
    """MACs a token that each quantizer's tensor takes part in; the layer's output is taken to feed a square layer."""
    d_in, d_out, rank = layer.in_features, layer.out_features, layer.initial_rank[name]
    macs = {"weight": d_in * d_out, "in": d_in * d_out, "A": rank * d_in, "E": rank, "B": rank * d_out}
    macs |= {"A_out": rank, "E_out": rank * d_out, "out": d_out * d_out}
    return [float(macs[kind]) for kind in layer.quantizers(name).kinds]


def _share_observations(observed: list[Tensor]) -> None:
    """Every rank calibrates on what any rank has seen."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in observed:
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
