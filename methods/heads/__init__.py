"""Methods that put a classifier of their own on the features of an unchanged CLIP."""
