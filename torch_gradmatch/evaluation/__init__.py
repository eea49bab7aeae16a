"""What is run once, not in every step: what the methods cost, how exact they are, and which of them helps."""
