"""The one training loop: text to packed sequences, objectives, schedules, checkpoints that resume to the same bits."""
