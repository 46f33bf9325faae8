"""The yardsticks: what a model, or a smaller one made from it, is worth."""
