"""Text of labelled domains, made into sequences whose order is a pure function of the seed and the step."""
