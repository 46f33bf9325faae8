"""How many experts each layer keeps: one file per rule, from scores to the experts kept."""
