"""How a group of experts becomes one expert: coefficients and alignments of its members."""
