"""The model under study and its text: sources of documents, rows of tokens, sites, and pretraining of a small model."""
