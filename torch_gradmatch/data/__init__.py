"""Batches from several domains: the sampler that draws them and the loaders around it."""
