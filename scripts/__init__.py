"""Set-up, sweeps, reports, and the tiny CLIP's training."""
