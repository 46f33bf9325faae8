"""One probe per file: what is counted or summed while a model reads."""
