"""Group Fisher (Liu et al., ICML 2021): second order, the squared gradient of a mask over each channel.

One timestep's batch is one sample of the gradient.
"""

from dpctl.prune.importance import Scores, Scoring, second_order

NEEDS_DATA = True
COMPARABLE = True
READS = ("weighting",)


def score(scoring: Scoring) -> Scores:
    """Return the sum over timesteps of (sum of w * dL_t/dw)^2."""
    return second_order(scoring, weighting="uniform")
