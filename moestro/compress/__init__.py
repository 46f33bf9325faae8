"""Making a model smaller or cheaper, with proof of what it cost."""
