"""Weight sparsity of the subject model: which weights may go, how they go, and what that costs.

Every method is a choice of score, pattern and allocation (:class:`~saelab.sparsity.recipe.Recipe`); the layers of a
model are pruned in the order of its forward pass, each on inputs computed with those before it already pruned.
"""
