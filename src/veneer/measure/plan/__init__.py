"""What a run will need and how to set it up, before it is made: pure functions, each figure with its formula and its source."""
