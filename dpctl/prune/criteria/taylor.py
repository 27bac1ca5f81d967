"""First-order Taylor importance over all timesteps alike (Molchanov et al., ICLR 2017): Diff-Pruning with T = 0."""

from dpctl.prune.importance import Scores, Scoring, first_order

NEEDS_DATA = True
COMPARABLE = True
READS = ("weighting", "reduction")


def score(scoring: Scoring) -> Scores:
    """Return |w * dL/dw|, L the denoising loss over the whole schedule."""
    return first_order(scoring, weighting="uniform")
