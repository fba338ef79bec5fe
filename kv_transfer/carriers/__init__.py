"""What carries messages between two workers: shared memory, TCP, process groups (gloo, NCCL), memory of one process.

All implement the ports of `kv_transfer.link`; `links.open_links` picks by the configuration. The rest of `kv_transfer`
knows the ports only.
"""
