"""What an expert is worth: one file per criterion, from the statistics of a layer to scores_E; more is better."""
