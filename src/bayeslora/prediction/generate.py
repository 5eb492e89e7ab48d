r"""Generate text under draws of the weights, with the model's uncertainty about it.

Each sequence comes from one draw, which all of its tokens and its cached keys and values share: it is the text of one
model of the posterior. With `answers="mean"` it comes from the mean weights instead. For a token $t$ of a sequence
from draw (or mean) $s$, with $p_d$ the probabilities of the next token under draw $d$ given the tokens before it:

- `token_entropy`: $H(p_s)$, the uncertainty of that one model;
- `predictive_entropy`: $H(\bar p)$ of the mean over all draws, and `mutual_information`, its part
  $H(\bar p) - \frac1S \sum_d H(p_d)$ that the draws disagree about (see `Prediction`).

For a sequence $y$, `log_probability` is $\log p_s(y)$ under its own draw, `draw_log_probabilities` are $\log p_d(y)$
under all draws, `mixture_log_probability` is $\log \frac1S \sum_d p_d(y)$, and `log_probability_std` their standard
deviation.
"""

from __future__ import annotations

import inspect
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from bayeslora.errors import BayesLoraError
from bayeslora.methods.layer import device_of, evaluation_mode
from bayeslora.posterior import IndivisibleBatchError
from bayeslora.prediction.batched_sampling import repeat_rows
from bayeslora.prediction.predict import seeded
from bayeslora.prediction.predictor import Predictable, check_adapters, check_finite
from bayeslora.prediction.weights import Weights

_MEAN = -1
"""Number that stands for the mean weights among those of the draws."""

_MAX_NUMBERS = 2**25
"""Maximum of probabilities (rows x tokens x vocabulary) in memory while sequences are scored: 128 MiB in float32."""

_SAMPLING = {
    "do_sample", "temperature", "top_k", "top_p", "num_beams", "max_new_tokens", "eos_token_id", "pad_token_id",
    "num_return_sequences",
}  # fmt: skip
"""Options under which a prompt can be read before `generate` is called."""


@dataclass(frozen=True)
class Generation:
    """Sequences generated under S draws of the weights, on the model's device: n = B × `num_return_sequences` each.

    With `samples=0` or `answers="mean"`, S is 1 and the mean weights generate the sequences.

    Attributes:
        sequences: (S, n, L) token ids as `model.generate` returns them, prompts included for decoder-only models.
            Draw s generated [s, i]; shorter sequences are padded on the right.
        tokens: (S, n, G) the generated part of `sequences`.
        mask: (S, n, G) True for all tokens up to and including the end-of-sequence token.
        token_entropy: (S, n, G) entropy of each token under its own draw, in nats, float32. This and the other
            (S, n, G) entropies are 0 where `mask` is False.
        log_probability: (S, n) log-probability of each sequence under its own draw, in nats.
        predictive_entropy: (S, n, G) entropy of each token's distribution, averaged over D draws before its entropy is
            taken; None without `uncertainty`, like the fields below.
        mutual_information: (S, n, G) the part of `predictive_entropy` due to disagreement of the draws.
        mixture_log_probability: (S, n) log of each sequence's probability averaged over the draws.
        log_probability_std: (S, n) standard deviation of `draw_log_probabilities` over the draws.
        draw_log_probabilities: (D, S, n) log-probability of each sequence under each of the D draws.
    """

    sequences: Tensor
    tokens: Tensor
    mask: Tensor
    token_entropy: Tensor
    log_probability: Tensor
    predictive_entropy: Tensor | None = None
    mutual_information: Tensor | None = None
    mixture_log_probability: Tensor | None = None
    log_probability_std: Tensor | None = None
    draw_log_probabilities: Tensor | None = None


def generate(
    model: Predictable,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    samples: int,
    seed: int = 0,
    uncertainty: bool = True,
    antithetic: bool = False,
    answers: Literal["draws", "mean"] = "draws",
    **generate_kwargs: Any,
) -> Generation:
    """Generate a sequence for every prompt under each of `samples` draws of the weights.

    Runs in evaluation mode without gradients, and restores torch's random state. Draw d is the same function as draw d
    of `predict` with the same seed.

    Args:
        model: a causal or encoder-decoder language model with an adapter that has a posterior; or the saved posterior
            of its weights.
        input_ids, attention_mask: (B, T) prompts, padded on the left for decoder-only models. Without a mask, padding
            tokens are masked, unless the padding token is also an end-of-sequence token.
        samples: number of draws of the weights; 0 generates once with the mean weights, for any model.
        seed: seed of the draws and of `do_sample`.
        uncertainty: score each sequence under all draws, not only its own; this takes a pass for each draw.
        antithetic: pair draws with opposite noise.
        answers: `"draws"` generates under every draw; `"mean"` only with the mean weights, and the draws score that.
        generate_kwargs: options of `model.generate`: `max_new_tokens`, `num_beams`, `do_sample`, … Entropies and
            probabilities are the model's own, before any temperature or other processing.

    Raises:
        BayesLoraError: `samples` > 0 for a model without a posterior, the inputs are not (B, T), or
            `return_dict_in_generate` is given.
    """
    run = _Run(model, input_ids, attention_mask, samples, seed, antithetic, answers, generate_kwargs)
    with evaluation_mode(run.model), torch.inference_mode(), seeded(seed, run.device):
        found = run.scored(run.generated(), uncertainty)
    return Generation(**{name: value.clone() for name, value in found.items()})


def generate_tokens(
    model: Predictable,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    samples: int,
    seed: int = 0,
    **generate_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return the `tokens` and the `mask` of `generate`, (S, n, G) each, without the passes that score them.

    Args, Raises: as `generate`.
    """
    run = _Run(model, input_ids, attention_mask, samples, seed, False, "draws", generate_kwargs)
    with evaluation_mode(run.model), torch.inference_mode(), seeded(seed, run.device):
        tokens = run.answered(run.generated())
    return tokens.clone(), _until_end(tokens, run.end)


def _check_prompts(input_ids: Any, attention_mask: Any) -> None:
    """Raise `BayesLoraError` for anything but (B, T) token ids with a mask of their shape."""
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
        given = f"of {input_ids.dtype}" if isinstance(input_ids, Tensor) else f"a {type(input_ids).__name__}"
        raise BayesLoraError(
            f"input_ids are {given}, but must be a tensor of token ids: give "
            'tokenizer(prompts, padding=True, return_tensors="pt").input_ids'
        )
    if input_ids.ndim != 2 or not input_ids.numel():
        raise BayesLoraError(
            f"input_ids have shape {tuple(input_ids.shape)}, but must be (prompts, tokens): tokenize the prompts"
        )
    if attention_mask is not None and getattr(attention_mask, "shape", None) != input_ids.shape:
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise BayesLoraError(
            f"the attention mask has shape {shape}, but must be {tuple(input_ids.shape)} as the prompts: give the "
            "tokenizer's, or leave it out"
        )


class _Run:
    """State of one call: the weights, and B prompts to answer with their mean or under every draw."""

    def __init__(
        self,
        model: Predictable,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        samples: int,
        seed: int,
        antithetic: bool,
        answers: str,
        options: dict[str, Any],
    ) -> None:
        self.weights = Weights(model, samples, seed, antithetic)
        self.model = self.weights.model
        if answers not in ("draws", "mean"):
            raise BayesLoraError(f"answers is {answers!r}, but must be 'draws' or 'mean': give one of them")
        _check_prompts(input_ids, attention_mask)
        if options.pop("return_dict_in_generate", False):
            raise BayesLoraError("return_dict_in_generate is True, but generate returns a Generation: leave it out")
        self.device = device_of(self.model)
        self.owners = [_MEAN] if samples == 0 or answers == "mean" else list(range(samples))
        base: Any = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator]
        if not hasattr(base, "generate"):
            raise BayesLoraError(
                f"{type(base).__name__} reads texts but cannot generate them: give the run or another export of it"
            )
        self.base, config = base, base.config
        self.encodes = bool(getattr(config, "is_encoder_decoder", False))
        self.settings = getattr(base, "generation_config", None) or config
        self.parameters = inspect.signature(base.forward).parameters
        self.end = _ids(options.get("eos_token_id", getattr(self.settings, "eos_token_id", None)))
        self.padding = options.get("pad_token_id", getattr(self.settings, "pad_token_id", None))
        if attention_mask is None:  # as Transformers does, where padding and the end of a text are told apart
            attention_mask = torch.ones_like(input_ids)
            if self.padding is not None and self.padding not in self.end:
                attention_mask = input_ids.ne(self.padding).long()
        self.prompts = {"input_ids": input_ids.to(self.device), "attention_mask": attention_mask.to(self.device)}
        if self.padding is None:
            self.padding = self.end[0] if self.end else 0
        self.options = {**options, "pad_token_id": self.padding}

    def generated(self) -> Tensor:
        """Generate (S, n, L) sequences, one of S for each owner."""
        parts: list[Tensor] = []
        if self.owners != [_MEAN] and self.weights.draws_share_a_pass:
            with suppress(IndivisibleBatchError):
                parts = [self._generate(range(self.weights.samples))]
        parts = parts or [self._generate(_only(owner)) for owner in self.owners]
        longest = max(part.shape[1] for part in parts)
        padded = [nn.functional.pad(part, (0, longest - part.shape[1]), value=self.padding) for part in parts]
        return torch.cat(padded).view(len(self.owners), -1, longest)

    def _generate(self, draws: range | None) -> Tensor:
        rows = len(self.prompts["input_ids"])
        inputs = repeat_rows(self.prompts, rows, 1 if draws is None else len(draws))
        options = self.options
        with self.weights.at(draws):
            cache = self._read_prompts(inputs)
            if cache is not None:
                count = options["num_return_sequences"]
                inputs = {name: each.repeat_interleave(count, dim=0) for name, each in inputs.items()}
                options = {**options, "num_return_sequences": 1, "past_key_values": cache}
            with self.base.register_forward_hook(self._check_logits):
                sequences: Tensor = self.model.generate(**inputs, **options)  # type: ignore[operator]
            check_adapters(self.model)
        return sequences

    def _check_logits(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Raise where the logits that a token is chosen from are not finite, as those of a broken adapter."""
        check_finite(output.logits[None, :, -1], self.model, of="sequence")

    def _read_prompts(self, inputs: dict[str, Tensor]) -> DynamicCache | None:
        """Return keys and values of all but the last token, once for each sequence; None where `generate` must read.

        Transformers would read a prompt as often as it is answered.
        """
        count, ids = self.options.get("num_return_sequences") or 1, inputs["input_ids"]
        is_plain = self.options.get("do_sample") and self.options.get("num_beams", 1) == 1 and not self.encodes
        is_usual = set(self.options) <= _SAMPLING and not getattr(self.settings, "cache_implementation", None)
        if count == 1 or ids.shape[1] < 2 or not is_plain or not is_usual:
            return None
        mask = inputs["attention_mask"][:, :-1]
        read = self.model(
            input_ids=ids[:, :-1], attention_mask=mask, **self._positions(mask), **self._keeping(1), use_cache=True
        )
        cache = getattr(read, "past_key_values", None)
        repeatable = {DynamicLayer, DynamicSlidingWindowLayer}
        if type(cache) is not DynamicCache or not repeatable.issuperset(map(type, cache.layers)):
            return None
        cache.batch_repeat_interleave(count)
        return cache

    def _positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Return the positions of tokens that may be padded on the left, for a model that takes them."""
        if "position_ids" not in self.parameters:
            return {}
        return {"position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}

    def _keeping(self, count: int) -> dict[str, int]:
        """Return the option that leaves out all logits but the last `count`, for a model that takes it."""
        return {"logits_to_keep": count} if "logits_to_keep" in self.parameters else {}

    def answered(self, sequences: Tensor) -> Tensor:
        """Return the generated part of `sequences`."""
        return sequences[..., 1 if self.encodes else self.prompts["input_ids"].shape[1] :]

    def scored(self, sequences: Tensor, uncertainty: bool) -> dict[str, Tensor]:
        """Return the fields of a `Generation`."""
        samples, count, length = sequences.shape
        tokens = self.answered(sequences)
        start = length - tokens.shape[-1]
        mask = _until_end(tokens, self.end)
        rows, valid = sequences.flatten(0, 1), mask.flatten(0, 1)
        own = torch.tensor(self.owners, device=rows.device).repeat_interleave(count)
        sizes = getattr(self.model, "config", None)
        vocabulary = int(getattr(getattr(sizes, "get_text_config", lambda: sizes)(), "vocab_size", 2**15))
        scored = tokens.shape[-1] if self._keeping(1) else length
        step = max(1, _MAX_NUMBERS // (max(1, scored) * vocabulary))
        # Sequence i of the n of a draw answers prompt i // (sequences per prompt).
        prompt = (torch.arange(len(rows), device=rows.device) % count) // (count // len(self.prompts["input_ids"]))
        parts = []
        for at in range(0, len(rows), step):
            part = slice(at, at + step)
            parts.append(self._score(rows[part], valid[part], own[part], prompt[part], start, uncertainty))
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        shaped = {name: value.view(samples, count, *value.shape[1:]) for name, value in found.items()}
        if uncertainty:
            shaped["draw_log_probabilities"] = shaped["draw_log_probabilities"].movedim(-1, 0)
        return {"sequences": sequences, "tokens": tokens, "mask": mask, **shaped}

    def _score(
        self, rows: Tensor, mask: Tensor, own: Tensor, prompt: Tensor, start: int, uncertainty: bool
    ) -> dict[str, Tensor]:
        """Return (rows, G) entropies and (rows,) log-probabilities, given each row's `own` draw and its `prompt`."""
        targets, device = rows[:, start:], rows.device
        entropy, log_probability = torch.zeros(mask.shape, device=device), torch.zeros(len(rows), device=device)
        mean, expected = torch.zeros((), device=device), torch.zeros((), device=device)
        of_draws = []
        draws = list(range(self.weights.samples)) or [_MEAN]
        for number in dict.fromkeys([*self.owners, *draws]):
            mine = own == number
            scores = uncertainty and number in draws
            if not scores and not bool(mine.any()):
                continue
            with self.weights.at(_only(number)):
                log_p = self._logits(rows, mask, prompt, start).float().log_softmax(dim=-1)
            check_finite(log_p.amax(dim=-1, keepdim=True)[mask][None], self.model, of="token")
            p = log_p.exp()
            entropy_here = torch.special.entr(p).sum(dim=-1) * mask
            chosen = (log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1) * mask).sum(dim=-1)
            entropy[mine], log_probability[mine] = entropy_here[mine], chosen[mine]
            if scores:
                mean, expected = mean + p / len(draws), expected + entropy_here / len(draws)
                of_draws.append(chosen)
        found = {"token_entropy": entropy, "log_probability": log_probability}
        if uncertainty:
            total = torch.special.entr(mean).sum(dim=-1) * mask
            stacked = torch.stack(of_draws)
            found["predictive_entropy"] = total
            found["mutual_information"] = (total - expected).clamp_min(0)
            found["mixture_log_probability"] = stacked.logsumexp(dim=0) - math.log(len(draws))
            found["log_probability_std"] = stacked.std(dim=0, correction=0)
            found["draw_log_probabilities"] = stacked.T
        return found

    def _logits(self, rows: Tensor, mask: Tensor, prompt: Tensor, start: int) -> Tensor:
        """Return the logits (rows, G, V) that each generated token was chosen from."""
        prompt_mask = self.prompts["attention_mask"][prompt]
        if self.encodes:
            ids = self.prompts["input_ids"][prompt]
            output = self.model(input_ids=ids, attention_mask=prompt_mask, decoder_input_ids=rows[:, :-1])
            return output.logits
        whole = torch.cat([prompt_mask, mask.to(prompt_mask.dtype)], dim=1)[:, :-1]
        count = rows.shape[1] - start
        kept = self._keeping(count)
        output = self.model(input_ids=rows[:, :-1], attention_mask=whole, **self._positions(whole), **kept)
        return output.logits[:, -count:]


def _only(number: int) -> range | None:
    """Return the draw of this number alone, as `Weights.at` takes it."""
    return None if number == _MEAN else range(number, number + 1)


def _until_end(tokens: Tensor, end: list[int]) -> Tensor:
    """Return the mask of the tokens up to and including the first of the ids in `end`."""
    is_end = torch.isin(tokens, torch.tensor(end, device=tokens.device, dtype=tokens.dtype))
    return is_end.long().cumsum(dim=-1) - is_end.long() == 0


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(each) for each in value] if isinstance(value, (list, tuple, Tensor)) and len(value) else [int(value)]
