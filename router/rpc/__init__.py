"""The gateway's public gRPC surface: Inference, Admin, grpc.health.v1 and reflection."""
