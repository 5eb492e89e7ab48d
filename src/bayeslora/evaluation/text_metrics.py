r"""Scores between 0 and 1 of generated texts, each compared with the reference that gives it the best score.

Exact match and F1 are those of SQuAD (Rajpurkar et al., 2016, arXiv:1606.05250; 2018, arXiv:1806.03822, for questions
without an answer). BLEU is sacreBLEU's corpus BLEU, and ROUGE-L is the F-measure of `rouge_score`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bayeslora.data.text_tasks import NO_ANSWER
from bayeslora.errors import BayesLoraError

References = Sequence[Sequence[str]]
"""Reference answers of each row; an empty list means that the question has no answer."""
_PACKAGES = {"bleu": ("sacrebleu", "sacrebleu"), "rouge_l": ("rouge_score", "rouge-score")}


def check_metrics(names: Sequence[str]) -> None:
    """Raise `BayesLoraError` if one of these scores needs a package that is not installed."""
    for name in names:
        module, package = _PACKAGES.get(name, ("", ""))
        if module and find_spec(module) is None:
            raise BayesLoraError(f"{package} is not installed, but the score {name} needs it: pip install {package}")


def exact_match(texts: Sequence[str], references: References) -> NDArray[np.float64]:
    """Return (n,) 1 where a text equals a reference up to case, punctuation and articles, otherwise 0."""
    return _best(texts, references, lambda text, answer: float(_words(text) == _words(answer)))


def token_f1(texts: Sequence[str], references: References) -> NDArray[np.float64]:
    """Return the F1 of the words (n,) of each text, against its best reference.

    If the text or the reference has no words (no answer), the F1 is 1 if both have none, and otherwise 0.
    """
    return _best(texts, references, _f1)


def rouge_l(texts: Sequence[str], references: References) -> NDArray[np.float64]:
    """Return the ROUGE-L F-measure (n,) of each text (longest common subsequence), against its best reference."""
    check_metrics(["rouge_l"])
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return _best(texts, references, lambda text, answer: float(scorer.score(answer, text)["rougeL"].fmeasure))


def bleu(texts: Sequence[str], references: References) -> float:
    """Return the corpus BLEU of all texts, each of which may have several references."""
    check_metrics(["bleu"])
    import sacrebleu

    most = max(map(len, references))
    streams: list[Any] = [[row[place] if place < len(row) else None for row in references] for place in range(most)]
    return float(sacrebleu.corpus_bleu(list(texts), streams).score) / 100


def text_scores(
    metrics: Sequence[str], texts: Sequence[str], references: References
) -> tuple[dict[str, float], NDArray[np.float64]]:
    """Return scores by name, and the loss (n,) of each text: 1 - F1 if `metrics` has `f1`, otherwise 1 - ROUGE-L."""
    found = {name: BY_ROW[name](texts, references) for name in metrics if name in BY_ROW}
    scores = {name: float(found[name].mean()) if name in found else bleu(texts, references) for name in metrics}
    return scores, 1 - found["f1" if "f1" in found else "rouge_l"]


BY_ROW: dict[str, Callable[[Sequence[str], References], NDArray[np.float64]]] = {
    "exact_match": exact_match,
    "f1": token_f1,
    "rouge_l": rouge_l,
}
"""Functions that return a score for each text, by name."""


def _best(texts: Sequence[str], references: References, score: Any) -> NDArray[np.float64]:
    pairs = zip(texts, references, strict=True)
    return np.array([max(score(_answer(text), each) for each in answers or [""]) for text, answers in pairs])


def _answer(text: str) -> str:
    """Return a text, empty if it says that there is no answer."""
    return "" if _words(text) == _words(NO_ANSWER) else text


def _f1(text: str, answer: str) -> float:
    ours, theirs = _words(text), _words(answer)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def _words(text: str) -> list[str]:
    """Return the words in lower case without articles, after ASCII punctuation is deleted, as SQuAD compares them."""
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(?:a|an|the)\b", " ", kept).split()
