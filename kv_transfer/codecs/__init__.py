"""Codecs: pipelines of recombinable stages that make KV small on the wire, and back.

`spec` says what a pipeline is (plain data, YAML), `ladder` has hand-made rungs, `pipeline.open_encoder` makes an
encoder of one, `pipeline.CODED_DECODERS` reads all of them, `roundtrip` does both for those who measure quality. The
arithmetic is defined by `reference`; `kernels` is the same in numba, bit for bit, imported when a frame is coded.
"""
