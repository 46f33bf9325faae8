"""Methods that choose how many bits each expert has, within a bound on quality."""
