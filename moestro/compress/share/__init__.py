"""What experts of a group have in common, found from their weights together: one method a file."""
