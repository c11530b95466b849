"""Training and evaluation: `run` builds and wires everything, the other files are its parts."""

import warnings

# Paddle warns of these at every start, and users can do nothing about them.
warnings.filterwarnings("ignore", message="No ccache found")
warnings.filterwarnings("ignore", message="When training, we now always track global mean")
