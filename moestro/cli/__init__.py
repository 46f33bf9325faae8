"""The moestro command: one short file per verb, imports inside functions."""
