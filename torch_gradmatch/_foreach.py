"""Copies of many tensors in few operations."""
