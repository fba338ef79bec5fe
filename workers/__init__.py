"""What a prefill and a decode worker have in common: the life, the desk of requests, the streams of gateways."""
