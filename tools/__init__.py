"""Command lines: `python -m tools.NAME`. What they do lives in the other rooms."""

import logging
import warnings

warnings.filterwarnings("ignore", message="No ccache found")  # Paddle's, at every start
logging.getLogger("zoo").setLevel(logging.WARNING)  # a tool says itself what it did
