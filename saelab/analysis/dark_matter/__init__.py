"""The dark matter of SAEs: what the error ``e = x - x_hat`` is made of (Engels et al., arXiv 2410.14670).

Conventions of the whole package: ``e = x - x_hat`` (what is missing); its *linear part* ``l = [x, 1] W`` with W the
least-squares fit of e on x over the contexts of the fit; its *nonlinear part* ``eta = e - l``. Every R2 and FVU is of
other contexts than those fitted on: tokens of one context resemble each other and leak.
"""
