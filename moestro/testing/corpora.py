"""Real text that every Python install has, by domain, for tests; it lives beside the training data (`train.data.installed`)."""

from moestro.train.data.installed import ENOUGH, LANGUAGES, domains, size, text

__all__ = ["ENOUGH", "LANGUAGES", "domains", "size", "text"]
