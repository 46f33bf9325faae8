"""Writing compressed models in the forms that others read."""
