"""What the experts of a model do on given text: streaming probes, the measures read off them, and the file that keeps both."""
