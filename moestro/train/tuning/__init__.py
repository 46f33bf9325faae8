"""What is trained of a pretrained model, and towards what: recovery after compression, and skipping that is learned."""
