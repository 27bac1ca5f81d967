"""Criteria of importance, one file each: a registry (see dpctl/registry.py).

A criterion module has ``score(scoring: Scoring) -> Scores``, ``NEEDS_DATA``, ``COMPARABLE``: whether scores of
different groups are in one unit (a change of the loss), so that a plan may weigh one group against another, and
``READS``: which of the recipe's weighting, threshold and reduction it follows; the others are refused where given.
"""
