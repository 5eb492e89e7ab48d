r"""Choose bit-widths and ranks together, under one price, from how much the loss rises without each of them.

A gate is a Bernoulli variable with a prior that costs $\lambda w$, where $w$ is what closing it saves. With the other
gates held, the evidence bound over $N$ examples is largest at

$$\mathrm{logit}\, P(\mathrm{open}) = N (\Delta - \lambda w),$$

$\Delta$ being the increase of the mean loss when the gate closes. So a gate is open if and only if $\Delta > \lambda
w$: the optimum of the Bayesian-LoRA paper's Equation 15, found without sampling gates. The gates of a tensor are its
widths, the gates of a layer its components, and all share the price $\lambda$, in nats of mean loss per share of a
baseline's cost.

A cost is a sum of products of two widths and a rank, so that what a gate saves depends on other gates. `allocate`
therefore moves one gate at a time and computes the savings that the move has changed again.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple, TypeAlias

from bayeslora.errors import BayesLoraError
from bayeslora.vocabulary import UNQUANTIZED, WIDTHS

TensorKey: TypeAlias = tuple[str, str]
"""A tensor of an adapted layer: the layer's path and one of `vocabulary.ALL_KINDS`."""

_ROUNDS = 20
"""Most rounds of opening and closing; a few are enough, and each but the last lowers the loss."""


@dataclass(frozen=True)
class Product:
    """One term of a cost: amount × width of `left` × width of `right` × rank of `rank_of`.

    Attributes:
        amount: cost at one bit for each operand, such as the MACs of one sequence; per rank if `rank_of` is given.
        left, right: widths of the operands: a fixed number of bits, or the tensor that sets it.
        rank_of: layer whose rank multiplies the term, or None.
    """

    amount: float
    left: int | TensorKey
    right: int | TensorKey = 1
    rank_of: str | None = None


@dataclass(frozen=True)
class CostModel:
    """A cost that is a sum of products, expressed as a share of `baseline`.

    Attributes:
        products: terms of the sum.
        baseline: cost that counts as 1.0; with a baseline of 0 there is nothing to save, and every share is 1.0.
        default_widths, default_ranks: widths and ranks of the tensors and layers that an argument does not name; a
            width that is missing here too is 32.
    """

    products: tuple[Product, ...]
    baseline: float
    default_widths: Mapping[TensorKey, int] = field(default_factory=dict)
    default_ranks: Mapping[str, int] = field(default_factory=dict)

    def share(self, widths: Mapping[TensorKey, int], ranks: Mapping[str, int]) -> float:
        """Return the cost of these widths and ranks, as a share of the baseline.

        Raises:
            BayesLoraError: the cost depends on the rank of a layer that has neither a rank nor a default.
        """
        return self.total(widths, ranks) / self.baseline if self.baseline else 1.0

    def total(self, widths: Mapping[TensorKey, int], ranks: Mapping[str, int]) -> float:
        """Return the cost in the unit of the products; it is exact if their amounts are whole numbers."""
        return sum(self._amount(product, widths, ranks) for product in self.products)

    def _amount(self, product: Product, widths: Mapping[TensorKey, int], ranks: Mapping[str, int]) -> float:
        rank = 1 if product.rank_of is None else self.rank(product.rank_of, ranks)
        return product.amount * self.width(product.left, widths) * self.width(product.right, widths) * rank

    def width(self, operand: int | TensorKey, widths: Mapping[TensorKey, int]) -> int:
        """Return the width of an operand, in bits."""
        if isinstance(operand, int):
            return operand
        return widths[operand] if operand in widths else self.default_widths.get(operand, UNQUANTIZED)

    def rank(self, layer: str, ranks: Mapping[str, int]) -> int:
        """Return the rank of a layer."""
        if layer in ranks:
            return ranks[layer]
        if layer not in self.default_ranks:
            raise BayesLoraError(f"layer {layer!r} has no rank, but its cost depends on one: give its rank")
        return self.default_ranks[layer]


@dataclass(frozen=True)
class Evidence:
    """Worth of each width and each rank-one component, in nats of mean loss.

    Attributes:
        widths: for each tensor and number of bits (2, 4, 8, 16, 32), the increase of the mean loss over that at the
            widest; usually 0.0 at 32. Only the listed widths can be chosen.
        ranks: for each layer, a list with the increase of the mean loss when each component is removed.
    """

    widths: Mapping[TensorKey, Mapping[int, float]]
    ranks: Mapping[str, Sequence[float]]


@dataclass
class Allocation:
    """The widths and ranks that `allocate` has chosen.

    Attributes:
        widths: bits of each tensor.
        open: for each layer, whether each component stays.
        price: λ, in nats of mean loss per share of the baseline; with a target, the price at which the last gate
            closed, or 0.0 if none had to close.
        share: cost of the choice, as a share of the baseline.
    """

    widths: dict[TensorKey, int]
    open: dict[str, list[bool]]
    price: float
    share: float

    @property
    def ranks(self) -> dict[str, int]:
        """Number of open components of each layer."""
        return {layer: sum(components) for layer, components in self.open.items()}


@dataclass(frozen=True)
class Savings:
    """Savings of closing one more gate now, as shares of the baseline.

    Attributes:
        widths: for each tensor, saving of the next narrower width; 0.0 at the narrowest.
        ranks: for each layer, saving of any one of its components; what a closed one would cost.
    """

    widths: dict[TensorKey, float]
    ranks: dict[str, float]


def allocate(
    evidence: Evidence, cost: CostModel, *, target: float | None = None, price: float | None = None
) -> Allocation:
    """Choose widths and ranks so that a gate is open if and only if it is worth more than its price.

    The search starts with the widest widths and all components. It repeatedly closes the gate with the least loss per
    share saved, over all tensors and layers; a width may narrow by several steps at once if that is better. Closing a
    gate makes its partners cheaper, so gates that are then worth more than their price open again, in rounds. With a
    target, the unused part goes in the end to the gates that are worth the most and still fit. Every move is the best
    single one, so a better choice that needs two moves at once can be missed.

    Negative increases of the loss are noise and count as 0. If an increase is smaller at fewer bits, the larger one
    counts. A tensor that does not change the cost keeps its widest width. Equal gates close in the evidence's order,
    tensors first.

    Args:
        evidence: worth of each width and component.
        cost: cost to lower; tensors and layers that it does not depend on keep all bits and ranks.
        target: share of the baseline to reach.
        price: λ, in nats of mean loss per share of the baseline; 0 removes only what is worth nothing.

    Raises:
        BayesLoraError: `target` and `price` are both given or both missing, the target cannot be reached, or the
            evidence is not finite or lists other widths.
    """
    if (target is None) == (price is None):
        raise BayesLoraError(f"target is {target} and price is {price}, but one of the two is needed: give one")
    _check(evidence)
    choice = _Choice(evidence, cost)
    if target is not None:
        check_target(evidence, cost, target)
        price = choice.meet(target * cost.baseline) * cost.baseline
    else:
        assert price is not None
        if not price >= 0:
            raise BayesLoraError(f"price is {price}, but must be at least 0: give nats of loss per share of the cost")
        choice.settle(price / cost.baseline if cost.baseline else math.inf)
    widths, kept = choice.widths(), choice.kept()
    found = Allocation(widths, kept, price, 0.0)
    found.share = cost.share(widths, found.ranks)
    return found


def least_share(evidence: Evidence, cost: CostModel) -> float:
    """Return the smallest share that can be reached: the narrowest listed widths and all components closed."""
    return cost.share(*_narrowest(evidence))


def falling(progress: float, start: float, target: float) -> float:
    r"""Return the budget at `progress` p in [0, 1]: AdaLoRA's $b_T + (b_0 - b_T)(1 - p)^3$.

    All methods with a budget approach it so. AdaLoRA shares nothing else with `allocate`: its scores order the
    components and are not losses, so that no price can be put on them.
    """
    return (start - target) * (1 - progress) ** 3 + target


def check_target(evidence: Evidence, cost: CostModel, target: float, name: str = "target") -> None:
    """Raise BayesLoraError, which calls the target `name`, if not even the narrowest widths reach it."""
    widths, ranks = _narrowest(evidence)
    least = cost.share(widths, ranks)
    if least <= target:
        return

    wide = tuple(p for p in cost.products if UNQUANTIZED in (cost.width(p.left, widths), cost.width(p.right, widths)))
    part = replace(cost, products=wide).share(widths, ranks)
    raise BayesLoraError(
        f"{name} is {target:.4g}, but the least share that these widths and ranks can reach is {least:.4g}, of which "
        f"{part:.4g} is products with an operand fixed at 32 bits: give a larger target, or quantize those operands "
        "(quantize_input=True)"
    )


def savings(allocation: Allocation, cost: CostModel) -> Savings:
    """Return what closing one more gate of each tensor and layer would save at this allocation."""
    widths, ranks = allocation.widths, allocation.ranks
    by_tensor, by_layer = dict.fromkeys(widths, 0.0), dict.fromkeys(ranks, 0.0)
    for product in cost.products:
        left, right = cost.width(product.left, widths), cost.width(product.right, widths)
        rank = 1 if product.rank_of is None else cost.rank(product.rank_of, ranks)
        if product.rank_of in by_layer:
            by_layer[product.rank_of] += product.amount * left * right
        for tensor in by_tensor.keys() & {product.left, product.right}:
            narrow = _next_narrower(widths[tensor])
            ours = (narrow if product.left == tensor else left) * (narrow if product.right == tensor else right)
            by_tensor[tensor] += product.amount * rank * (left * right - ours)
    scale = 1 / cost.baseline if cost.baseline else 0.0
    return Savings(
        {tensor: saved * scale for tensor, saved in by_tensor.items()},
        {layer: saved * scale for layer, saved in by_layer.items()},
    )


def open_probability(delta: float, price: float, saving: float, num_examples: float) -> float:
    r"""Return the posterior probability of a gate, $\sigma(N (\Delta - \lambda w))$.

    Args:
        delta: Δ, increase of the mean loss when the gate closes, in nats.
        price: λ, in nats of mean loss per share of the baseline.
        saving: w, what closing it saves, as a share of the baseline.
        num_examples: N, number of training examples.
    """
    logit = num_examples * (delta - price * saving)
    odds = math.exp(-abs(logit))
    return 1 / (1 + odds) if logit >= 0 else odds / (1 + odds)


def _next_narrower(bits: int) -> int:
    return max((width for width in WIDTHS if width < bits), default=bits)


def _narrowest(evidence: Evidence) -> tuple[dict[TensorKey, int], dict[str, int]]:
    return {tensor: min(table) for tensor, table in evidence.widths.items()}, dict.fromkeys(evidence.ranks, 0)


def _check(evidence: Evidence) -> None:
    for (layer, kind), table in evidence.widths.items():
        if not table or not set(table) <= set(WIDTHS):
            raise BayesLoraError(
                f"the evidence for {kind} of {layer!r} lists widths {sorted(table)}, but must list some of "
                f"{', '.join(map(str, WIDTHS))}: give these only"
            )
        _check_finite(f"{kind} of {layer!r}", table.values())
    for layer, components in evidence.ranks.items():
        _check_finite(f"the components of {layer!r}", components)


def _check_finite(name: str, losses: Iterable[float]) -> None:
    if not all(map(math.isfinite, losses)):
        raise BayesLoraError(
            f"the evidence for {name} is {list(losses)}, but must be finite: estimate it at finite losses"
        )


class _Move(NamedTuple):
    """A step of a ladder: its loss per cost, and the position it leads to."""

    quotient: float
    position: int


@dataclass(eq=False, slots=True)
class _Ladder:
    """The widths of one tensor, or the numbers of open components of one layer, from the most down.

    Attributes:
        steps: the widths or ranks, descending.
        losses: increase of the mean loss at each step, not decreasing.
        is_convex: whether the next step always has the least loss per cost, as it has for sorted components.
        terms: products that the ladder is a factor of: amount, the other ladders, whether it is a factor twice.
        position: the present step.
        value: the present width or rank.
    """

    steps: list[int]
    losses: list[float]
    is_convex: bool
    terms: list[tuple[float, tuple[_Ladder, ...], bool]] = field(default_factory=list)
    position: int = 0
    value: int = 0

    def move_to(self, position: int) -> None:
        self.position, self.value = position, self.steps[position]

    @property
    def loss(self) -> float:
        return self.losses[self.position]

    def rates(self) -> tuple[float, float]:
        """Return the cost of one unit, and of one unit squared, with the other ladders where they are."""
        slope = curve = 0.0
        for amount, others, is_squared in self.terms:
            for other in others:
                amount *= other.value
            if is_squared:
                curve += amount
            else:
                slope += amount
        return slope, curve

    def change(self, position: int) -> float:
        """Return the change of the cost between the present step and another; negative if that is cheaper."""
        slope, curve = self.rates()
        step = self.steps[position]
        return (step - self.value) * (slope + curve * (step + self.value))

    def down(self) -> _Move | None:
        """Return the move with the least loss per cost saved, the shortest of equal ones; None if none saves."""
        slope, curve = self.rates()
        now, best = self.position, None
        for position in range(now + 1, min(now + 2, len(self.steps)) if self.is_convex else len(self.steps)):
            step = self.steps[position]
            saved = (self.value - step) * (slope + curve * (self.value + step))
            if saved <= 0:
                continue
            quotient = (self.losses[position] - self.losses[now]) / saved
            if best is None or quotient < best.quotient:
                best = _Move(quotient, position)
        return best

    def up(self, room: float) -> _Move | None:
        """Return the move with the most loss avoided per cost, of those that cost at most `room`; None if none is."""
        slope, curve = self.rates()
        now, best = self.position, None
        for position in range(now - 1, max(now - 2, -1) if self.is_convex else -1, -1):
            step = self.steps[position]
            added = (step - self.value) * (slope + curve * (self.value + step))
            gain = self.losses[now] - self.losses[position]
            if gain <= 0 or not 0 < added <= room:
                continue
            if best is None or gain / added > best.quotient:
                best = _Move(gain / added, position)
        return best


class _Choice:
    """All ladders of a model, and the cost where they stand.

    A move downwards lowers what other moves downwards save, and so raises their loss per cost; a move upwards does the
    reverse. The key of a queued move is therefore a bound, and only the first in the queue must be computed again.
    """

    def __init__(self, evidence: Evidence, cost: CostModel) -> None:
        self.tensors = {tensor: _width_ladder(table) for tensor, table in evidence.widths.items()}
        self.order = {
            # Of equal components the last closes first: after a rotation they are sorted.
            layer: [-i for _, i in sorted((max(delta, 0.0), -i) for i, delta in enumerate(deltas))]
            for layer, deltas in evidence.ranks.items()
        }
        self.layers = {
            layer: _rank_ladder([evidence.ranks[layer][i] for i in order]) for layer, order in self.order.items()
        }
        self.ladders = [*self.tensors.values(), *self.layers.values()]
        self.cost = cost
        for product in cost.products:
            self._connect(product)
        self.total = self._total()

    def _connect(self, product: Product) -> None:
        amount, factors = product.amount, []
        for operand in (product.left, product.right):
            if not isinstance(operand, int) and operand in self.tensors:
                factors.append(self.tensors[operand])
            else:
                amount *= self.cost.width(operand, {})
        if product.rank_of in self.layers:
            factors.append(self.layers[product.rank_of])
        elif product.rank_of is not None:
            amount *= self.cost.rank(product.rank_of, {})
        for ladder in dict.fromkeys(factors):
            others = tuple(other for other in factors if other is not ladder)
            ladder.terms.append((amount, others, factors.count(ladder) == 2))

    def _total(self) -> float:
        ranks = {layer: ladder.value for layer, ladder in self.layers.items()}
        return self.cost.total(self.widths(), ranks)

    def widths(self) -> dict[TensorKey, int]:
        return {tensor: ladder.value for tensor, ladder in self.tensors.items()}

    def kept(self) -> dict[str, list[bool]]:
        kept = {}
        for layer, order in self.order.items():
            closed = set(order[: self.layers[layer].position])
            kept[layer] = [i not in closed for i in range(len(order))]
        return kept

    def settle(self, price: float) -> None:
        """Open and close gates, at a price per cost, until none is on the wrong side of it."""
        self.close(price=price)
        for _ in range(_ROUNDS):
            if not self.open(price=price):
                break
            self.close(price=price)

    def meet(self, limit: float) -> float:
        """Bring the cost to at most `limit` at the least loss, and return the price per cost of the last gate."""
        price = self.close(limit=limit)
        self.open(limit=limit)
        for _ in range(_ROUNDS):
            before = [ladder.position for ladder in self.ladders], self.loss()
            if not self.open(price=price):
                break
            again = self.close(limit=limit)
            self.open(limit=limit)
            if self.loss() >= before[1]:
                self._restore(before[0])
                break
            price = again
        return price

    def loss(self) -> float:
        return math.fsum(ladder.loss for ladder in self.ladders)

    def _restore(self, positions: list[int]) -> None:
        for ladder, position in zip(self.ladders, positions, strict=True):
            ladder.move_to(position)
        self.total = self._total()

    def close(self, limit: float = -math.inf, price: float = math.inf) -> float:
        """Close gates, cheapest first, while the cost is above `limit` and they are worth no more than `price`.

        Returns the loss per cost of the last one, 0.0 if there was none.
        """
        moves = self._walk(
            _Ladder.down,
            key=lambda move: move.quotient,
            goes_on=lambda move: self.total > limit and move.quotient <= price,
        )
        return moves[-1].quotient if moves else 0.0

    def open(self, limit: float = math.inf, price: float = 0.0) -> int:
        """Open gates, dearest first, that are worth more than `price` and keep the cost at or below `limit`.

        Returns their number.
        """
        return len(
            self._walk(
                lambda ladder: ladder.up(limit - self.total),
                key=lambda move: -move.quotient,
                goes_on=lambda move: move.quotient > price,
            )
        )

    def _walk(
        self,
        find: Callable[[_Ladder], _Move | None],
        key: Callable[[_Move], float],
        goes_on: Callable[[_Move], bool],
    ) -> list[_Move]:
        """Make the moves that `find` gives, the lowest key first, as long as `goes_on`."""
        queue = [(key(move), i) for i, ladder in enumerate(self.ladders) if (move := find(ladder)) is not None]
        heapq.heapify(queue)
        made: list[_Move] = []
        while queue:
            _, index = heapq.heappop(queue)
            ladder = self.ladders[index]
            move = find(ladder)
            if move is None:
                continue
            if queue and (key(move), index) > queue[0]:
                heapq.heappush(queue, (key(move), index))
                continue
            if not goes_on(move):
                break
            self.total += ladder.change(move.position)
            ladder.move_to(move.position)
            made.append(move)
            if (following := find(ladder)) is not None:
                heapq.heappush(queue, (key(following), index))
        return made


def _width_ladder(table: Mapping[int, float]) -> _Ladder:
    steps = sorted(table, reverse=True)
    losses = list(accumulate((max(table[bits], 0.0) for bits in steps), max))
    return _Ladder(steps, losses, is_convex=False, value=steps[0])


def _rank_ladder(deltas: Sequence[float]) -> _Ladder:
    """Return the ladder of components whose increases of the loss are sorted, the least first."""
    losses = list(accumulate((max(delta, 0.0) for delta in deltas), initial=0.0))
    return _Ladder(list(range(len(deltas), -1, -1)), losses, is_convex=True, value=len(deltas))
