"""The global router and its gRPC gateway: admits, places and follows every request; computes nothing itself."""
