"""saelab: a sparse-autoencoder interpretability workbench."""

__version__ = "0.1.0"
