"""Prune, finetune, export and measure diffusion models."""
