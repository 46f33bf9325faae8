"""Which experts become one: one file per rule, from the statistics of a layer to labels_E."""
