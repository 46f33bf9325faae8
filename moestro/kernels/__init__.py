"""Raw-array operations: a numpy reference each, and native code when it is there."""
