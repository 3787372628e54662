"""How predictions follow from the log-probabilities of label words, one name for each rule.

A capture keeps the mean log-probability per token of each label word. The rules compute a score from it:

- `mean`, the default, is that mean: label words of different lengths are on one scale.
- `sum` multiplies it by the number of tokens: the log-probability of the whole label word.
- `unconditional` is `sum` minus the log-probability of the label word after the template's end, e.g. `Label:`, without
  query and demonstrations (Brown et al., 2020).
- `calibrated` is `sum` minus log p̄, where p̄ is each label's share of the label words' probability, averaged over
  content-free queries: contextual calibration (Zhao et al., 2021).

Content-free queries follow the same demonstrations as the queries. The template's end follows the start tokens, and the
task's description or the chat's system prompt where there is one.
The prediction is the label with the highest score. Where label words have one token each, `mean` and `sum` agree.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Scoring = Literal["mean", "sum", "unconditional", "calibrated"]
"""The rule by which a label word's log-probabilities become its score."""

WITH_BASELINE: tuple[Scoring, ...] = ("unconditional", "calibrated")
"""The rules that also read label words after queries without content."""


def label_scores(
    scoring: Scoring,
    label_log_probs: Float[Tensor, "query label"],
    label_lengths: Sequence[int],
    baselines: Float[Tensor, "query label"] | None = None,
) -> Float[Tensor, "query label"]:
    """Return the score of each label word, by the rule of that name.

    Args:
        scoring: the rule.
        label_log_probs: the mean log-probability per token of each label word, in nats.
        label_lengths: the number of tokens of each label word.
        baselines: what `label_baselines` returns, for the rules that need it.

    Raises:
        ValueError: the rule needs baselines, and there are none.

    Example:
        >>> label_log_probs = torch.tensor([[-1.0, -0.9]])
        >>> label_scores("mean", label_log_probs, (1, 3)).argmax().item()
        1
        >>> label_scores("sum", label_log_probs, (1, 3)).argmax().item()
        0
    """
    if scoring == "mean":
        return label_log_probs
    sums = label_log_probs * torch.tensor(label_lengths, dtype=label_log_probs.dtype)
    if scoring == "sum":
        return sums
    if baselines is None:
        raise ValueError(
            f"expected label words scored after queries without content for scoring={scoring!r}, got none: capture "
            "prompts that build_prompts(..., scoring=…) made"
        )
    return sums - baselines


def label_baselines(
    scoring: Scoring, label_log_probs: Float[Tensor, "baseline label"], label_lengths: Sequence[int]
) -> Float[Tensor, " label"]:
    """Return what a rule subtracts from the log-probability of each whole label word, in nats.

    Args:
        scoring: `unconditional` or `calibrated`.
        label_log_probs: the mean log-probability per token of each label word after each query without content.
        label_lengths: the number of tokens of each label word.
    """
    sums = label_log_probs * torch.tensor(label_lengths, dtype=label_log_probs.dtype)
    if scoring == "unconditional":
        return sums.mean(0)
    # The logarithm of a mean of shares, where a share itself may be too small for its dtype.
    return sums.log_softmax(-1).logsumexp(0) - math.log(len(sums))
