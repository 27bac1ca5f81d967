"""Quality metrics, one file each: a registry (see dpctl/registry.py)."""
