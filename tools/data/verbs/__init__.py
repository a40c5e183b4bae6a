"""One file per verb of `megaphi data`: its options, and the call of the stage."""
