"""What the gateways of one cluster tell each other: credit, sessions, breakers."""
