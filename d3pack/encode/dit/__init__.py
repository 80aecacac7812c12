"""The methods that train a class-conditional DiT: `classcond` from nothing, `minimax` from one."""
