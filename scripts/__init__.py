"""Set-up, tuning, the tiny CLIP's training, and reports."""
