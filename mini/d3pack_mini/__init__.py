"""The weights of `mini`, the small backbone of d3pack, in `weights/` beside this file."""
