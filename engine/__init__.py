"""Training and evaluation: `run` builds and wires everything, the other files are its parts."""
