"""Calculus over domains: their gradients, how well these agree, and Hessian-vector products."""
