"""Does it help on real data? One domain left out in turn, on data sets that a package manager delivers."""
