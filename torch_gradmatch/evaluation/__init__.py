"""What is run once, not in every step: cost and fidelity of the methods on a model of one's own."""
