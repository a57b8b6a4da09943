"""Methods that train small matrices beside frozen weights of CLIP and merge them."""
