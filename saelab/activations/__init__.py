"""Harvesting activations, the store on disk, and shuffled streams from a store or straight from the model."""
