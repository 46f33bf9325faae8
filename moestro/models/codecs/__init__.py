"""Number formats of experts: as checkpoints store them (`source`), from one to another (`encode`), and in records (`packed`)."""

from moestro.models.codecs.encode import CODECS, Codec, encode, is_exact, parse_codec
from moestro.models.codecs.packed import Record
from moestro.models.codecs.source import decode, load, stored_format, view, weights_of

__all__ = [
    "CODECS",
    "Codec",
    "Record",
    "decode",
    "encode",
    "is_exact",
    "load",
    "parse_codec",
    "stored_format",
    "view",
    "weights_of",
]
