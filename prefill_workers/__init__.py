"""The prefill service: computes prompts, streams first tokens to gateways, hands KV caches over to decode workers."""
