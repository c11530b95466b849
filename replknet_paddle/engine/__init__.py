"""Training and evaluation: `run` builds and wires everything, the other files are its parts."""

import warnings

# Said by Paddle at every start, and of no use to who starts a run.
warnings.filterwarnings("ignore", message="No ccache found")
warnings.filterwarnings("ignore", message="When training, we now always track global mean")
