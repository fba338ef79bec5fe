"""How requests get to workers: the port to them, a breaker before each, and who came with whom before."""
