"""How close drawn pictures are to real ones: distances between sets of pictures, and the classifier that they use."""
