"""Synchronous inference engine: model, paged KV pool, scheduler, sampler. Tensors in, tokens out; no network."""
