"""Values and protocols that every other package speaks: routing, experts, layers, traces, plans, method cards, errors."""
