"""Questions asked of a model and its SAE, each with one frozen result object."""
