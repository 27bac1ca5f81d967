"""Squared L2 norm of a channel's weights over all coupled layers (Li et al., ICLR 2017, on DepGraph's groups)."""

from dpctl.prune.importance import Scores, Scoring, reduce_over

NEEDS_DATA = False
COMPARABLE = False
READS = ()


def score(scoring: Scoring) -> Scores:
    """Return the sum of squared weights of each channel."""
    squares = {name: weight.detach().square() for name, weight in scoring.unet.named_parameters()}
    return {group.name: reduce_over(scoring.unet, group, squares, "sum-abs") for group in scoring.groups}
