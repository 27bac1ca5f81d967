"""Measure subjects against one another: one process each, turns interleaved, ratios paired."""
