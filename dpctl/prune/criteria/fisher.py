"""Group Fisher (Liu et al., ICML 2021): second order, the squared gradient of a mask over each channel.

One small batch over the timesteps is one sample of the gradient.
"""

from dpctl.prune.importance import Scores, Scoring, second_order

NEEDS_DATA = True
COMPARABLE = True
READS = ("weighting",)


def score(scoring: Scoring) -> Scores:
    """Return the sum over batches of (sum of w * dL/dw)^2."""
    return second_order(scoring, weighting="uniform")
