"""What stands in the place of a feed-forward layer: one file each; a factory that builds a module at a `Site`."""
