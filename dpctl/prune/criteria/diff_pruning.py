"""Diff-Pruning (Fang et al., NeurIPS 2023, section 4.2): Taylor importance over the timesteps with L_t / L_max > T."""

from dpctl.prune.importance import Scores, Scoring, first_order

NEEDS_DATA = True
COMPARABLE = True
READS = ("weighting", "threshold", "reduction")


def score(scoring: Scoring) -> Scores:
    """Return |w * dL/dw|, L the denoising loss over the timesteps above the recipe's threshold."""
    return first_order(scoring, weighting="threshold")
