"""The configuration of B-LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from bayeslora.errors import BayesLoraError
from bayeslora.methods.config import AdapterConfig
from bayeslora.quantization import GATED_WIDTHS, fixed_logits
from bayeslora.vocabulary import ALL_KINDS, KINDS, WIDTHS

PHASES = (0.6, 0.3)
"""Default shares of the steps before gates learn and after they do."""

LATE_PHASES = (0.9, 0.0)
"""The same where only ranks are learned, by evidence."""

GATE_SHARE = 0.1
"""Share of the steps that a default leaves to the gates beside a share that is given."""

RANK_PRICE = 1e-3
"""Default price of a rank, in nats of mean loss, in a run without a budget for widths."""


@dataclass
class BLoraConfig(AdapterConfig):
    """Configuration of B-LoRA, on top of the fields shared with `peft.LoraConfig`.

    `attach` or `BayesLoop` decides the gates by evidence. In a training loop without either, the adapter keeps full
    precision and all its ranks.
    """

    method = "blora"

    mode: Literal["q+ra", "q", "ra"] = field(
        default="q+ra", metadata={"help": "Learn bit-widths and ranks (q+ra), only bit-widths (q) or only ranks (ra)."}
    )
    quantize_input: bool = field(
        default=False, metadata={"help": "Also quantize the layer's input, which integer kernels need."}
    )
    per_channel: bool = field(default=False, metadata={"help": "One range an output channel for W0 and for A."})
    group_size: int | None = field(
        default=None,
        metadata={"help": "One range for every this many inputs of each row of W0, such as 32, the blocks of GGUF."},
    )
    gates: Literal["evidence", "paper"] | None = field(
        default=None,
        metadata={
            "help": "Close gates by their evidence and one price (evidence, the default), or as the paper does."
        },
    )
    rotate: bool = field(
        default=True, metadata={"help": "Rotate A, E, B into their singular value decomposition before gates close."}
    )
    target_bops: float | None = field(
        default=None, metadata={"help": "Share of the bit operations of LoRA r=16 at 32 bits to reach."}
    )
    bops_scope: Literal["adapted", "attention", "encoder"] | None = field(
        default=None,
        metadata={
            "help": "Bit operations that count: by default attention's, or the encoder's where more is adapted."
        },
    )
    target_bytes: float | None = field(
        default=None,
        metadata={"help": "Share of the bytes of the adapted layers under LoRA r=16 in float32 to reach."},
    )
    target_rank: float | None = field(default=None, metadata={"help": "Mean rank to reach."})
    bops_price: float = field(
        default=0.05, metadata={"help": "Nats of mean loss that all bit operations of LoRA r=16 are worth."}
    )
    rank_price: float | None = field(
        default=None,
        metadata={
            "help": "Nats of mean loss that a rank is worth: by default 1e-3, or 0 where a budget closes ranks."
        },
    )
    bit_penalty: float = field(default=4e-4, metadata={"help": "lambda_q, the weight of the bit penalty (paper)."})
    rank_penalty: float = field(default=1e-5, metadata={"help": "lambda_r, the weight of the rank penalty (paper)."})
    bit_weighting: Literal["const", "bits", "bops"] = field(
        default="const", metadata={"help": "Weight of the gate of b bits: 1, b, or b x MACs relative to the largest."}
    )
    initial_bit_logits: list[float] = field(
        default_factory=lambda: [4.0, 4.0, 1.0, 0.0],
        metadata={"help": "Starting logits of the gates of 4, 8, 16 and 32 bits."},
    )
    fixed_bits: dict[str, int] | None = field(
        default=None,
        metadata={"help": "Widths that are not learned: bits by kind, of weight, in, A, E, B, A_out, E_out, out."},
    )
    initial_rank_logit: float = field(default=6.0, metadata={"help": "Starting logit of the rank gates."})
    calibration: Literal["mse", "absmax"] = field(
        default="mse", metadata={"help": "Ranges: least squared error, or largest magnitude."}
    )
    warmup_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the steps in full precision: by default 0.6, or 0.9 where only ranks are learned."
        },
    )
    freeze_fraction: float | None = field(
        default=None,
        metadata={"help": "Share at the end under frozen gates: by default 0.3, or 0 where only ranks are learned."},
    )
    gate_learning_rate: float | None = field(
        default=None, metadata={"help": "Constant rate of the gates; by default derived from the number of steps."}
    )
    range_learning_rate: float = field(default=1e-2, metadata={"help": "Rate of the ranges' logarithms."})
    allow_inexact_merge: bool = field(
        default=False, metadata={"help": "Merge although quantized activations cannot be folded into a weight."}
    )

    def __post_init__(self) -> None:
        if self.gates is None:
            # A file from before there was a choice names a version of PEFT, but no gates.
            self.gates = "evidence" if self.peft_version is None else "paper"
        super().__post_init__()
        self._check_choice("mode", ("q+ra", "q", "ra"))
        self._check_choice("bit_weighting", ("const", "bits", "bops"))
        self._check_choice("calibration", ("mse", "absmax"))
        self._check_choice("gates", ("evidence", "paper"))
        for name in ("bit_penalty", "rank_penalty", "bops_price", "rank_price"):
            self._check(name, (getattr(self, name) or 0) >= 0, "at least 0", "give 0 for none")
        if self.bops_scope is not None:
            self._check_choice("bops_scope", ("adapted", "attention", "encoder"))
        self._check_targets()
        four = len(self.initial_bit_logits) == len(GATED_WIDTHS)
        self._check("initial_bit_logits", four, "4 numbers", "give those of the gates of 4, 8, 16 and 32 bits")
        self._check_fixed_bits()
        shares = self.phase_shares
        if min(shares) < 0 or sum(shares) >= 1:
            raise BayesLoraError(
                f"warmup_fraction and freeze_fraction are {shares[0]} and {shares[1]}, but must leave steps for the "
                "gates: keep their sum below 1"
            )

    def _check_targets(self) -> None:
        for name in ("target_bops", "target_bytes"):
            target = getattr(self, name)
            self._check(name, target is None or 0 < target < 1, "between 0 and 1", "give a share of LoRA's cost")
        rank = self.target_rank
        self._check(
            "target_rank",
            rank is None or 0 < rank < self.r,
            f"above 0 and below {self.r}, the initial rank",
            "give a mean rank",
        )
        size = self.group_size
        self._check("group_size", size is None or size > 1, "at least 2", "give the number of inputs, such as 32")
        for name in ("target_bops", "target_bytes", "quantize_input", "fixed_bits", "group_size"):
            if getattr(self, name) and not self.learns_bits:
                raise BayesLoraError(f"{name} is given, but mode 'ra' has no bit-widths: drop it, or use 'q+ra'")
        if rank is not None and not self.learns_ranks:
            raise BayesLoraError("target_rank is given, but mode 'q' keeps all ranks: drop it, or use 'q+ra'")
        if self.target_bops is not None and self.target_bytes is not None:
            raise BayesLoraError("target_bops and target_bytes are given, but widths have one price: drop one of them")
        for name in ("target_bops", "target_bytes", "target_rank"):
            if getattr(self, name) is not None and self.gates == "paper":
                raise BayesLoraError(f"{name} is given, but gates='paper' follow penalties: use gates='evidence'")

    def _check_fixed_bits(self) -> None:
        kinds = ALL_KINDS if self.quantize_input else KINDS
        for kind, bits in (self.fixed_bits or {}).items():
            if kind == "in" and kind not in kinds:
                raise BayesLoraError("fixed_bits names in, but the input is not quantized: set quantize_input=True")
            if kind not in kinds:
                raise BayesLoraError(
                    f"fixed_bits names {kind!r}, but the kinds of tensors are {', '.join(kinds)}: name one of these"
                )
            if bits not in WIDTHS:
                raise BayesLoraError(
                    f"fixed_bits gives {kind} {bits} bits, but widths are {', '.join(map(str, WIDTHS))}: choose one"
                )
        self.require_something_to_learn(kinds)

    def require_something_to_learn(self, kinds: Sequence[str]) -> None:
        """Raise `BayesLoraError` if the widths of all these kinds of tensors are fixed and ranks are not learned."""
        if self.mode == "q" and set(kinds) <= set(self.fixed_bits or {}):
            raise BayesLoraError(
                "fixed_bits names every kind of tensor, but mode 'q' must learn a width: leave one out, or use 'q+ra'"
            )

    def bit_logits(self, kind: str) -> list[float]:
        """Return the initial logits of the gates for 4, 8, 16 and 32 bits of one kind of tensor."""
        fixed = (self.fixed_bits or {}).get(kind)
        return self.initial_bit_logits if fixed is None else fixed_logits(fixed)

    @property
    def phase_shares(self) -> tuple[float, float]:
        """Shares of the steps before gates learn and after they have learned.

        Ranks that close by evidence can close at the end of the run: the others take over, and nothing is learned
        anew. After widths or the paper's gates have been decided, the network needs steps to adapt to them.
        """
        defaults = LATE_PHASES if self.closes_ranks_alone else PHASES
        first, last = self.warmup_fraction, self.freeze_fraction
        if first is None:
            first = defaults[0] if last is None else max(0.0, min(defaults[0], 1 - GATE_SHARE - last))
        if last is None:
            last = max(0.0, min(defaults[1], 1 - GATE_SHARE - first))
        return first, last

    @property
    def closes_ranks_alone(self) -> bool:
        """True if ranks close by evidence and no widths are learned."""
        return self.gates == "evidence" and not self.learns_bits

    @property
    def currency(self) -> tuple[str, float | None]:
        """Unit of the widths' cost, `"bops"` or `"bytes"`, and the budget in that unit, or None."""
        return ("bops", self.target_bops) if self.target_bytes is None else ("bytes", self.target_bytes)

    @property
    def price_of_rank(self) -> float:
        """Price of a rank in nats of mean loss, in addition to the price that a budget for widths gives it."""
        if self.rank_price is not None:
            return self.rank_price
        return RANK_PRICE if self.currency[1] is None else 0.0

    @property
    def learns_bits(self) -> bool:
        return "q" in self.mode

    @property
    def learns_ranks(self) -> bool:
        return "ra" in self.mode
