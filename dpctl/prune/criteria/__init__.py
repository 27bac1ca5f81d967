"""Criteria of importance, one file each: a registry (see dpctl/registry.py)."""
