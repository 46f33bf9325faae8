"""What mixes tokens in a layer: one file each; a factory from a `MoEConfig` to a module (x_BTD, rotary, mask) -> y_BTD."""
