"""Command lines: `replknet NAME`. What they do lives in the other rooms."""

import logging
import os
import warnings

os.environ.setdefault("GLOG_minloglevel", "2")  # before Paddle: its notes on every export
warnings.filterwarnings("ignore", message="No ccache found")  # Paddle's, at every start
logging.getLogger("zoo").setLevel(logging.WARNING)  # a tool says itself what it did
