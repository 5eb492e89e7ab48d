"""Answers of a language model, with their uncertainty.

The answer is the text of the mean weights. S draws of the weights score it, token by token and as a whole, and each
writes its own. `clusters` groups those that say the same, and has the entropy of the groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bayeslora.data.chat import answer_of, asked_of, end_tokens, prompt_tokens
from bayeslora.data.encode import pad_id
from bayeslora.data.generation import rows_to_answer
from bayeslora.errors import BayesLoraError, counted
from bayeslora.methods.variational import has_posterior
from bayeslora.posterior import WeightPosterior
from bayeslora.prediction import Generation, check_samples, generate
from bayeslora.prediction.generate import generate_tokens
from bayeslora.runs.clusters import SIMILARITY, Cluster, Embedder, clustered, semantic_entropy
from bayeslora.runs.info import RunInfo
from bayeslora.vocabulary import MESSAGES, PROMPT

MAX_NEW_TOKENS = 128
"""Default maximum of tokens of an answer, less where the model has no room for them."""


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt.

    Attributes:
        prompt: the text, or the last message before the answer.
        text: the answer of the mean weights.
        tokens: the T tokens of `text` as strings, including the end token.
        entropy: entropy of each token's distribution after averaging it over the draws, in nats.
        mutual_information: for each token, the part of `entropy` due to disagreement of the draws; 0 without draws.
        log_probability: log-probability of `text` under the mean weights, in nats.
        mixture_log_probability: log-probability of `text` under the average of the draws, in nats.
        draw_log_probabilities: log-probability of `text` under each draw, in nats; empty without draws.
        draws: one answer from each draw (a deterministic model samples tokens instead); empty without draws.
        clusters: groups of `draws` with the same meaning, the largest first.
        semantic_entropy: entropy of the sizes of `clusters`, in nats; None without draws.
        is_finished: False if the answer was cut off at the maximum number of new tokens.
        reference: the known answer, if the row has one.
        ask_a_human: whether the answer is too uncertain to give, if a risk was asked for; otherwise None.
    """

    prompt: str
    text: str
    tokens: list[str]
    entropy: list[float]
    mutual_information: list[float]
    log_probability: float
    mixture_log_probability: float
    draw_log_probabilities: list[float] = field(default_factory=list)
    draws: list[str] = field(default_factory=list)
    clusters: list[Cluster] = field(default_factory=list)
    semantic_entropy: float | None = None
    is_finished: bool = True
    reference: str | None = None
    ask_a_human: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that `bayeslora generate` writes."""
        clusters = [vars(cluster) for cluster in self.clusters]
        return {name: value for name, value in {**vars(self), "clusters": clusters}.items() if value is not None}


@dataclass(frozen=True)
class Sampling:
    """Settings of the answers.

    Attributes:
        samples: number of draws.
        seed: seed of the draws.
        max_new_tokens: maximum length of an answer; None for what the task needs or the model has room for.
        temperature: temperature of the draws' answers; 0 for the most probable tokens.
        cluster_with: encoder whose embeddings group the draws' answers by meaning; None groups equal words only.
        similarity: cosine of two embeddings from which two answers are in one group.
    """

    samples: int = 0
    seed: int = 0
    max_new_tokens: int | None = None
    temperature: float = 0.0
    cluster_with: str | None = None
    similarity: float = SIMILARITY

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise BayesLoraError(f"max_new_tokens is {self.max_new_tokens}, but must be at least 1: give a larger one")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise BayesLoraError(
                f"temperature is {self.temperature}, but must be at least 0: give 0 for the most probable tokens"
            )
        if not 0 < self.similarity <= 1:
            raise BayesLoraError(
                f"similarity is {self.similarity}, but must be above 0 and at most 1: give a cosine such as 0.9"
            )


def check_generates(info: RunInfo) -> None:
    """Raise `BayesLoraError` unless the run generates text."""
    if info.kind != "generation":
        raise BayesLoraError(
            f"the run has {len(info.labels) or 'no'} labels of {info.kind.replace('_', ' ')}, but generate needs a "
            "language model that was trained on text: use `bayeslora predict`, or in Python run.predict(…)"
        )


def read_prompts(inputs: Any, info: RunInfo) -> list[dict[str, Any]]:
    """Return rows with `messages` or `prompt`, from `inputs` as `Run.generate` takes them.

    Raises:
        BayesLoraError: there are 0 rows, or one has another form.
    """
    if isinstance(inputs, Path):
        return rows_to_answer(inputs)
    if isinstance(inputs, (str, Mapping)) or _is_conversation(inputs):
        inputs = [inputs]
    if not isinstance(inputs, Iterable):
        raise BayesLoraError(
            f"the input is of type {type(inputs).__name__}, but must be a text, a row or a list of them: give a list"
        )
    rows = [_row(number, value, info) for number, value in enumerate(inputs, start=1)]
    if not rows:
        raise BayesLoraError("the input has 0 rows, but must have at least 1: give a text")
    if len({MESSAGES in row for row in rows}) == 1:
        return rows_to_answer(rows)
    return [row for each in rows for row in rows_to_answer([each])]


def _row(number: int, value: Any, info: RunInfo) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if _is_conversation(value):
        return {MESSAGES: list(value)}
    if not isinstance(value, str):
        raise BayesLoraError(
            f"row {number} is of type {type(value).__name__}, but must be a text, a list of messages or a row with "
            "messages or prompt: give one of them"
        )
    return {MESSAGES: [{"role": "user", "content": value}]} if info.text_columns == [MESSAGES] else {PROMPT: value}


def _is_conversation(value: Any) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    return is_list and all(isinstance(message, Mapping) and "role" in message for message in value)


def answer_rows(
    predictor: nn.Module | WeightPosterior,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    sampling: Sampling,
    batch_size: int = 8,
) -> list[Answer]:
    """Answer rows of `read_prompts`, in their order, with a model or with the posterior of its weights.

    Raises:
        BayesLoraError: draws are wanted but the model is deterministic and the temperature is 0, or a prompt is too
            long for the model.
    """
    writer = _Writer(predictor, tokenizer, sampling)
    prompts = [writer.read(number, row) for number, row in enumerate(rows, start=1)]
    order = sorted(range(len(rows)), key=lambda row: -len(prompts[row]))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        answers = writer.answers([prompts[row] for row in chosen], [rows[row] for row in chosen])
        found.update(zip(chosen, answers, strict=True))
    return [found[row] for row in range(len(rows))]


def is_random(predictor: nn.Module | WeightPosterior) -> bool:
    """Return whether the weights can be drawn."""
    return isinstance(predictor, WeightPosterior) or has_posterior(predictor)


class _Writer:
    """Writes the answers to batches of prompts."""

    def __init__(self, predictor: nn.Module | WeightPosterior, tokenizer: Any, sampling: Sampling) -> None:
        self.predictor, self.tokenizer, self.sampling = predictor, tokenizer, sampling
        model = predictor.model if isinstance(predictor, WeightPosterior) else predictor
        self.is_random = is_random(predictor)
        base: Any = model
        if not self.is_random and sampling.temperature == 0:
            check_samples(predictor, sampling.samples)
        self.embed = Embedder(sampling.cluster_with) if sampling.cluster_with and sampling.samples else None
        config = base.config.get_text_config()
        self.encodes = bool(getattr(config, "is_encoder_decoder", False))
        self.pad = pad_id(tokenizer)
        self.limit = getattr(config, "max_position_embeddings", None)
        stated = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
        own = [] if stated is None else stated if isinstance(stated, list) else [stated]
        self.ends = list(dict.fromkeys([*end_tokens(tokenizer), *own]))

    def read(self, number: int, row: Mapping[str, Any]) -> list[int]:
        """Return the tokens of a prompt; raise `BayesLoraError` if the model cannot read them and write its answer."""
        if self.encodes and MESSAGES in row:
            raise BayesLoraError(
                f"row {number} is a conversation, but an encoder-decoder reads a text: give a text or a prompt"
            )
        prompt = self.tokenizer(row[PROMPT]).input_ids if self.encodes else prompt_tokens(row, self.tokenizer)
        tokens, new = len(prompt), self.sampling.max_new_tokens or 1
        if self.limit is not None and (max(tokens, new) if self.encodes else tokens + new) > self.limit:
            raise BayesLoraError(
                f"prompt {number} has {counted(tokens, 'token')} and the answer {new}, but the model reads "
                f"{self.limit} {'of each' if self.encodes else 'in all'}: shorten the prompt or lower max_new_tokens"
            )
        return list(prompt)

    def answers(self, prompts: list[list[int]], rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Return an `Answer` to each prompt."""
        samples = self.sampling.samples
        side = "right" if self.encodes else "left"
        batch = self.tokenizer.pad(
            {"input_ids": prompts}, padding_side=side, return_attention_mask=True, return_tensors="pt"
        )
        drawn = samples if self.is_random else 0
        found = generate(**self._asked(batch, drawn, answers="mean", do_sample=False))
        own = self._own_answers(batch) if samples else []
        return [self._answer(found, place, row, [texts[place] for texts in own]) for place, row in enumerate(rows)]

    def _own_answers(self, batch: Mapping[str, Tensor]) -> list[list[str]]:
        """Return the texts of every draw: S lists of one for each prompt."""
        heat, samples = self.sampling.temperature, self.sampling.samples
        options: dict[str, Any] = {"do_sample": False}
        if heat:
            options = {"do_sample": True, "temperature": heat, "top_k": 0, "top_p": 1.0}
        if self.is_random:
            tokens, mask = generate_tokens(**self._asked(batch, samples, **options))
        else:
            found = generate_tokens(**self._asked(batch, 0, num_return_sequences=samples, **options))
            # One after the other for each prompt.
            tokens, mask = (part[0].unflatten(0, (-1, samples)).transpose(0, 1) for part in found)
        return [
            [self._text(ids[kept].tolist()) for ids, kept in zip(*rows, strict=True)]
            for rows in zip(tokens, mask, strict=True)
        ]

    def _asked(self, batch: Mapping[str, Tensor], samples: int, **options: Any) -> dict[str, Any]:
        """Return the arguments of `generate` for a batch of prompts."""
        taken = 1 if self.encodes else batch["input_ids"].shape[1]  # of the positions that the answer has
        room = MAX_NEW_TOKENS if self.limit is None else min(MAX_NEW_TOKENS, self.limit - taken)
        return {
            "model": self.predictor,
            **batch,
            **{"samples": samples, "seed": self.sampling.seed},
            # Without these the model's own settings, which may sample, would hold.
            **{"temperature": None, "top_k": None, "top_p": None, "num_beams": 1},
            "max_new_tokens": self.sampling.max_new_tokens or room,
            "eos_token_id": self.ends or None,
            "pad_token_id": self.pad,
            **options,
        }

    def _answer(self, found: Generation, place: int, row: Mapping[str, Any], draws: list[str]) -> Answer:
        kept = found.mask[0, place]
        ids = found.tokens[0, place][kept].tolist()
        assert found.predictive_entropy is not None and found.mutual_information is not None
        assert found.mixture_log_probability is not None and found.draw_log_probabilities is not None
        is_scored = self.is_random and self.sampling.samples > 0
        clusters = clustered(draws, self.embed, self.sampling.similarity)
        return Answer(
            prompt=_asked(row),
            text=self._text(ids),
            tokens=pieces(ids, self.tokenizer),
            entropy=found.predictive_entropy[0, place][kept].tolist(),
            mutual_information=found.mutual_information[0, place][kept].tolist(),
            log_probability=float(found.log_probability[0, place]),
            mixture_log_probability=float(found.mixture_log_probability[0, place]),
            draw_log_probabilities=found.draw_log_probabilities[:, 0, place].tolist() if is_scored else [],
            draws=draws,
            clusters=clusters,
            semantic_entropy=semantic_entropy([cluster.count for cluster in clusters]) if draws else None,
            is_finished=bool(ids) and ids[-1] in self.ends,
            reference=answer_of(row),
        )

    def _text(self, ids: list[int]) -> str:
        ids = ids[:-1] if ids and ids[-1] in self.ends else ids
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()


def _asked(row: Mapping[str, Any]) -> str:
    return str(asked_of(row[MESSAGES])[-1]["content"] if MESSAGES in row else row[PROMPT])


def pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return the text of each token; together they are the text, with special tokens.

    A token that ends inside a character has an empty piece: the next one has the character.
    """
    found: list[str] = []
    before = ""
    for stop in range(1, len(ids) + 1):
        text: str = tokenizer.decode(ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if stop < len(ids) and text.endswith("\ufffd") or not text.startswith(before):
            found.append("")
            continue
        found.append(text[len(before) :])
        before = text
    return found
