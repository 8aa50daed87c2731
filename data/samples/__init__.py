"""Contents of a sample: captions and their cleaning, labels and class names, and the reason why one is bad."""
