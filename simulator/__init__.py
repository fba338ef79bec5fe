"""A cluster in virtual time: the real gateways in front of workers that are latency models.

Nothing of the router is written twice here. Requests of a trace enter real dispatchers, whose fleets talk to simulated
workers through the same port that leads to gRPC in a cluster; only time, the wires and the machines are models."""
