"""From a spec to its encoder; and the decoders of everything that such encoders write."""

from kv_transfer.codec import RAW, Decoder, Encoder
from kv_transfer.codecs.fp8 import Fp8Decoder, Fp8Encoder
from kv_transfer.codecs.lossless import LosslessDecoder, LosslessEncoder
from kv_transfer.codecs.quantised import QuantisedDecoder, QuantisedEncoder
from kv_transfer.codecs.spec import PipelineSpec

CODED_DECODERS: tuple[Decoder, ...] = (LosslessDecoder(), QuantisedDecoder(), Fp8Decoder())


def open_encoder(spec: PipelineSpec) -> Encoder:
    """Return the encoder of a pipeline. Stateless: one serves every thread. Pure."""
    if spec.kind == "none":
        return RAW
    if spec.kind == "lossless":
        return LosslessEncoder(spec.zstd_level)
    if spec.kind == "fp8":
        return Fp8Encoder()
    return QuantisedEncoder(spec)
