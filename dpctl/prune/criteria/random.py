"""Random scores: the baseline that every criterion has to beat."""

import torch

from dpctl.diffusion import sample_generator
from dpctl.prune.importance import Scores, Scoring

NEEDS_DATA = False
COMPARABLE = False
READS = ()


def score(scoring: Scoring) -> Scores:
    """Return uniform scores, a function of the seed and the group's name."""
    seed = scoring.recipe.seed
    return {
        g.name: torch.rand(g.width, generator=sample_generator(seed, 0, f"random/{g.name}")) for g in scoring.groups
    }
