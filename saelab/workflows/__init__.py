"""Whole jobs over several layers. The CLI, the notebooks and the app call these; none of them has logic of its own."""
