"""Sparse feature circuits: SAE latents and errors as nodes."""
