"""Methods that train small matrices, added to frozen weights of CLIP, and merge them."""
