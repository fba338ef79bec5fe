"""Ten lines each, against a running gateway: `python -m examples.stream_text localhost:50051`. The tests run them."""
