"""How requests get to workers: the doors, the breaker before each of them, and who came with whom before."""
