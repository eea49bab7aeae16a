"""The state of an inner loop: slow weights and buffers, the inner optimizer's state, and the interpolation."""
