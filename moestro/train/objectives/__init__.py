"""What a training run minimises; one file each."""
