"""What a meta-iteration does: Fish, SmoothFish and IDGM, one file each."""
