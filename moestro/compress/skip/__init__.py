"""Which of a token's experts need not run: from statistics to the taps that a model's layers get, one method a file."""
