"""What a neuron of an expert is worth: one file per criterion, from statistics and weights to scores_F."""
