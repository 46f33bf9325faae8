"""Number formats of experts: as checkpoints store them (`source`), from one to another (`encode`), and in records (`packed`)."""

from moestro.models.codecs.encode import CODECS, Codec, encode, encode_matrix, keeps_weights, parse_codec
from moestro.models.codecs.packed import Record
from moestro.models.codecs.source import decode, load, stored_format, view, weights_of

__all__ = [
    "CODECS",
    "Codec",
    "Record",
    "decode",
    "encode",
    "encode_matrix",
    "keeps_weights",
    "load",
    "parse_codec",
    "stored_format",
    "view",
    "weights_of",
]
