"""Everything that measures time: convolutions, networks, training, input pipeline, inference."""
