"""One measure per file: what a profile says, as a pure function of its statistics or its trace."""
