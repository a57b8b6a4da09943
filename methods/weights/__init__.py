"""Methods that change weights of CLIP in place."""
