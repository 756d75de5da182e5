"""Explainers: from the examples of features to explanations."""
