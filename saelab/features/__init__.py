"""The feature store: what every feature of an SAE does on a text, kept by token and by feature, and questions to it."""
